/* Requests of virtio-blk, from a guest's ring to the bytes of a disk and back: served, refused, late, cut anywhere. */
#include "device_rig.h"
#include "disk_rig.h"

/* virtio 1.2, 5.2.6 */
enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13, T_SECURE_ERASE = 14 };
enum { S_OK = 0, S_IOERR = 1, S_UNSUPP = 2, S_NONE = 0xee /* the test's own: nothing was written */ };

/* Guest memory that device_rig.h leaves free. */
#define HEADER 0x8000ull
#define STATUS 0x8100ull
#define INDIRECT 0x9000ull
#define DATA 0x130000ull
#define NOWHERE (1ull << 40)
#define SECTOR DISK_SECTOR
#define SECTORS (DISK_BYTES / SECTOR)
#define HEADER_BYTES 16u

static struct disk_rig g;
static struct rig r;

static void blk_up(uint32_t deadline_ms)
{
    vnd_device_cfg cfg = { .disk = NULL, .blk_id = "a disk", .kind = VND_DEVICE_BLK, .queue_count = QUEUES };

    disk_rig_make(&g, deadline_ms);
    disk_rig_up(&g);
    CHECK(g.disk);
    memset(&r, 0, sizeof(r));
    r.fix.e = g.engine;
    r.vfs = vnd_vfs_new(g.engine, VND_SESSION_RAFS);
    r.ram = fg_ram_new(regions, 2, 0);
    CHECK(r.vfs && r.ram);
    for (int i = 0; i < QUEUES; i++) {
        r.kick[i] = eventfd(0, EFD_CLOEXEC);
        r.call[i] = eventfd(0, EFD_CLOEXEC);
        r.errfd[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    }
    cfg.engine = g.engine;
    cfg.vfs = r.vfs;
    cfg.disk = g.disk;
    r.dev = vnd_device_new(&cfg, r.err, sizeof(r.err));
    CHECK(r.dev);
    r.st.features = 1ull << 32 | 1ull << 30 | F_EVENT_IDX | 1ull << 28;
    r.st.ring_count = QUEUES;
    r.st.inflight_fd = r.st.log_fd = -1;
    set_memory(&r);
    set_rings(&r, false);
    CHECK_EQ(apply(&r), 0);
}

static void blk_down(void)
{
    unplug(&r);
    for (int i = 0; i < QUEUES; i++) {
        fg_queue_free(r.q[i]);
        close(r.kick[i]);
        close(r.call[i]);
        close(r.errfd[i]);
    }
    CHECK_EQ(fg_ram_check_gaps(r.ram), 0);
    fg_ram_free(r.ram);
    vnd_vfs_free(r.vfs);
    disk_rig_free(&g);
}

static void put_header(uint32_t type, uint64_t sector)
{
    uint8_t *at = fg_ram_at(r.ram, HEADER, HEADER_BYTES);

    memset(at, 0, HEADER_BYTES);
    memcpy(at, &type, sizeof(type));
    memcpy(at + 8, &sector, sizeof(sector));
    *fg_ram_at(r.ram, STATUS, 1) = S_NONE;
}

static void submit(const fg_segment *segments, int n, uint64_t table)
{
    CHECK(fg_queue_add(r.q[RQ], segments, n, table, 1) >= 0);
    fg_queue_publish(r.q[RQ]);
}

/* Waits for the answer of the only request in flight: its status. used: what the ring says was written. */
static int await_status(uint32_t *used)
{
    uint64_t cookie;

    CHECK_EQ(fg_queue_wait(r.q[RQ], WAIT_MS), 0);
    CHECK_EQ(fg_queue_pop(r.q[RQ], &cookie, used), 1);
    return *fg_ram_at(r.ram, STATUS, 1);
}

/* A request of the usual three parts; bytes 0: it has no data. */
static int ask(uint32_t type, uint64_t sector, uint32_t bytes, uint32_t *used)
{
    const fg_segment all[] = { { HEADER, HEADER_BYTES, 0 }, { DATA, bytes, 1 }, { STATUS, 1, 1 } };
    const fg_segment bare[] = { all[0], all[2] };

    put_header(type, sector);
    if (bytes)
        memset(fg_ram_at(r.ram, DATA, bytes), 0xee, bytes);
    submit(bytes ? all : bare, bytes ? 3 : 2, 0);
    return await_status(used);
}

static void check_data(uint64_t sector, uint32_t bytes)
{
    CHECK(memcmp(fg_ram_at(r.ram, DATA, bytes), g.want + sector * SECTOR, bytes) == 0);
}

static void check_alive(void)
{
    uint32_t used;

    CHECK_EQ(ask(T_IN, 2, SECTOR, &used), S_OK);
    check_data(2, SECTOR);
}

TEST(a_read_gives_the_whole_disk)
{
    uint32_t used;

    blk_up(0);
    CHECK_EQ(ask(T_IN, 0, DISK_BYTES, &used), S_OK);
    CHECK_EQ(used, DISK_BYTES + 1);
    check_data(0, DISK_BYTES);
    blk_down();
}

TEST(a_read_of_each_sector)
{
    uint32_t used;

    blk_up(0);
    for (uint64_t i = 0; i < SECTORS; i++) {
        CHECK_EQ(ask(T_IN, i, SECTOR, &used), S_OK);
        CHECK_EQ(used, SECTOR + 1);
        check_data(i, SECTOR);
    }
    blk_down();
}

TEST(a_read_of_what_is_not_there_waits_for_it)
{
    const fg_segment all[] = { { HEADER, HEADER_BYTES, 0 }, { DATA, BLOCK, 1 }, { STATUS, 1, 1 } };
    uint64_t sector = (BLOB_AT + FIRST_CHUNK) * (BLOCK / SECTOR);
    uint32_t used;

    blk_up(0);
    fix_hold(&g.server);
    put_header(T_IN, sector);
    submit(all, 3, 0);
    await_parked(&r, 1);
    CHECK_EQ(used_idx(&r), 0);
    atomic_store(&g.server.hold, 0);
    CHECK_EQ(await_status(&used), S_OK);
    check_data(sector, BLOCK);
    CHECK_EQ(stats(&r).parked, 1);
    CHECK_EQ(stats(&r).hits, 0);
    blk_down();
}

TEST(a_read_of_what_is_there_is_a_hit)
{
    uint32_t used;

    blk_up(0);
    CHECK_EQ(ask(T_IN, 0, BLOCK, &used), S_OK);
    CHECK_EQ(stats(&r).hits, 1);
    CHECK_EQ(stats(&r).parked, 0);
    CHECK_EQ(stats(&r).read_bytes, BLOCK);
    blk_down();
}

TEST(a_read_that_nothing_comes_for_ends_with_an_error)
{
    uint32_t used;

    blk_up(50);
    fix_hold(&g.server);
    CHECK_EQ(ask(T_IN, (BLOB_AT + FIRST_CHUNK) * (BLOCK / SECTOR), BLOCK, &used), S_IOERR);
    CHECK_EQ(stats(&r).expired, 1);
    check_alive();
    blk_down();
}

TEST(a_read_beyond_the_end_is_refused)
{
    const struct {
        uint64_t sector;
        uint32_t bytes;
    } cases[] = {
        { SECTORS, SECTOR },    { SECTORS + 1, SECTOR },         { SECTORS - 1, 2 * SECTOR },
        { UINT64_MAX, SECTOR }, { UINT64_MAX / SECTOR, SECTOR }, { UINT64_MAX / SECTOR + 1, SECTOR },
        { 1, DISK_BYTES },
    };
    uint32_t used;

    blk_up(0);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        CHECK_EQ(ask(T_IN, cases[i].sector, cases[i].bytes, &used), S_IOERR);
        CHECK_EQ(used, 0);
        CHECK_EQ(*fg_ram_at(r.ram, DATA, 1), 0xee); /* not even what is before the end was read */
    }
    CHECK_EQ(stats(&r).fuse_errors, sizeof(cases) / sizeof(cases[0]));
    check_alive();
    blk_down();
}

TEST(a_read_of_no_whole_sector_is_refused)
{
    uint32_t used;

    blk_up(0);
    CHECK_EQ(ask(T_IN, 0, SECTOR - 1, &used), S_IOERR);
    CHECK_EQ(ask(T_IN, 0, SECTOR + 1, &used), S_IOERR);
    blk_down();
}

TEST(a_read_of_nothing_is_served)
{
    uint32_t used;

    blk_up(0);
    CHECK_EQ(ask(T_IN, SECTORS, 0, &used), S_OK);
    CHECK_EQ(used, 1);
    blk_down();
}

/* The header in two descriptors; a sector's bytes in two; the status behind data in one. */
TEST(parts_may_be_cut_anywhere)
{
    const fg_segment cut[] = {
        { HEADER, 5, 0 },
        { HEADER + 5, 11, 0 },
        { DATA, 300, 1 },
        { DATA + 300, 2 * SECTOR - 300 + 1, 1 },
    };
    uint32_t used;

    blk_up(0);
    put_header(T_IN, 2);
    *fg_ram_at(r.ram, DATA + 2 * SECTOR, 1) = S_NONE;
    submit(cut, 4, 0);
    await_status(&used);
    CHECK_EQ(used, 2 * SECTOR + 1);
    CHECK_EQ(*fg_ram_at(r.ram, DATA + 2 * SECTOR, 1), S_OK);
    check_data(2, 2 * SECTOR);
    blk_down();
}

/* Each sector lies where the one before it does not end: the read is served in pieces. */
TEST(a_read_into_more_ranges_than_a_piece_may_have)
{
    enum { N = 2 * REQ_IOV_MAX };
    static fg_segment all[N + 2];
    uint32_t used;

    blk_up(0);
    put_header(T_IN, 0);
    all[0] = (fg_segment){ HEADER, HEADER_BYTES, 0 };
    for (uint32_t i = 0; i < N; i++)
        all[1 + i] = (fg_segment){ DATA + (N - 1 - i) * SECTOR, SECTOR, 1 };
    all[N + 1] = (fg_segment){ STATUS, 1, 1 };
    submit(all, N + 2, INDIRECT);
    CHECK_EQ(await_status(&used), S_OK);
    CHECK_EQ(used, N * SECTOR + 1);
    for (uint32_t i = 0; i < N; i++)
        CHECK(memcmp(fg_ram_at(r.ram, all[1 + i].gpa, SECTOR), g.want + i * SECTOR, SECTOR) == 0);
    blk_down();
}

TEST(a_read_into_no_memory_is_an_error)
{
    const fg_segment all[] = { { HEADER, HEADER_BYTES, 0 }, { NOWHERE, BLOCK, 1 }, { STATUS, 1, 1 } };
    uint32_t used;

    blk_up(0);
    put_header(T_IN, 0);
    submit(all, 3, 0);
    CHECK_EQ(await_status(&used), S_IOERR);
    CHECK_EQ(used, 0);
    check_alive();
    blk_down();
}

TEST(a_status_byte_in_no_memory_is_not_written)
{
    const fg_segment all[] = { { HEADER, HEADER_BYTES, 0 }, { DATA, SECTOR, 1 }, { NOWHERE, 1, 1 } };
    uint32_t used;

    blk_up(0);
    put_header(T_IN, 0);
    submit(all, 3, 0);
    CHECK_EQ(await_status(&used), S_NONE);
    CHECK_EQ(used, 0);
    check_alive();
    blk_down();
}

TEST(a_request_without_a_status_byte_comes_back_unanswered)
{
    const fg_segment header = { HEADER, HEADER_BYTES, 0 };
    uint32_t used;

    blk_up(0);
    put_header(T_FLUSH, 0);
    submit(&header, 1, 0);
    CHECK_EQ(await_status(&used), S_NONE);
    CHECK_EQ(used, 0);
    check_alive();
    blk_down();
}

TEST(a_header_that_is_cut_short_is_an_error)
{
    const fg_segment all[] = { { HEADER, HEADER_BYTES - 1, 0 }, { DATA, SECTOR, 1 }, { STATUS, 1, 1 } };
    uint32_t used;

    blk_up(0);
    put_header(T_IN, 0);
    submit(all, 3, 0);
    CHECK_EQ(await_status(&used), S_IOERR);
    check_alive();
    blk_down();
}

TEST(the_id_is_filled_with_zeroes)
{
    char id[VND_BLK_ID_BYTES] = "a disk";
    uint32_t used;

    blk_up(0);
    CHECK_EQ(ask(T_GET_ID, 0, VND_BLK_ID_BYTES, &used), S_OK);
    CHECK_EQ(used, VND_BLK_ID_BYTES + 1);
    CHECK(memcmp(fg_ram_at(r.ram, DATA, sizeof(id)), id, sizeof(id)) == 0);
    blk_down();
}

TEST(the_id_needs_all_its_room)
{
    uint32_t used;

    blk_up(0);
    CHECK_EQ(ask(T_GET_ID, 0, VND_BLK_ID_BYTES - 1, &used), S_IOERR);
    CHECK_EQ(ask(T_GET_ID, 0, 0, &used), S_IOERR);
    blk_down();
}

/* used.len ends behind the id: what a guest gave more was not written. */
TEST(the_id_in_more_room_leaves_the_rest)
{
    uint32_t used;

    blk_up(0);
    CHECK_EQ(ask(T_GET_ID, 0, SECTOR, &used), S_OK);
    CHECK_EQ(used, 0);
    CHECK_EQ(*fg_ram_at(r.ram, DATA + VND_BLK_ID_BYTES, 1), 0xee);
    blk_down();
}

TEST(a_flush_has_nothing_to_do)
{
    uint32_t used;

    blk_up(0);
    CHECK_EQ(ask(T_FLUSH, 0, 0, &used), S_OK);
    CHECK_EQ(used, 1);
    blk_down();
}

TEST(what_would_write_is_an_error)
{
    const uint32_t types[] = { T_OUT, T_DISCARD, T_WRITE_ZEROES, T_SECURE_ERASE };
    uint32_t used;

    blk_up(0);
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++)
        CHECK_EQ(ask(types[i], 0, 0, &used), S_IOERR);
    check_alive();
    blk_down();
}

TEST(what_is_not_known_is_unsupported)
{
    const uint32_t types[] = { 2, 3, 5, 10, 15, UINT32_MAX };
    uint32_t used;

    blk_up(0);
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++)
        CHECK_EQ(ask(types[i], 0, 0, &used), S_UNSUPP);
    check_alive();
    blk_down();
}
