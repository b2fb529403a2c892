/* test_device.c -- the device as a front-end drives it, in one process: queue threads, the real store and FUSE
 * session, a guest made of the fake guest's rings. What only threads can get wrong: waking, stopping, swapping,
 * tearing down.
 */
#include <sys/eventfd.h>

#include "fakeguest/fg_fuse.c"
#include "fakeguest/fg_ram.c"
#include "fakeguest/fg_ring.c"
#include "device.h"
#include "fs.h"
#include "store_fixture.h"
#include "vfs.h"

#define QUEUES 2                    /* hiprio, requests */
#define RQ 1
#define RING 16u
#define SLOTS 12u
#define SLOT_DATA (64u << 10)
#define CHUNK (64u << 10)
#define CHUNKS 32u
#define RAM_BYTES (4ull << 20)
#define DRAIN_MS 50
#define WAIT_MS 5000
#define FILE_INO 2
#define F_EVENT_IDX (1ull << 29)
#define F_LOG_ALL (1ull << 26)

/* ---- a file system of one file, whose bytes are the blob's */
struct one_file {
    struct fs fs;
    struct fix *fix;
    struct fix_blob *blob;
};

static int one_getattr(struct fs *fs, uint64_t ino, vnd_attr *out)
{
    *out = (vnd_attr){ .ino = ino, .mode = ino == FILE_INO ? 0100444 : 040555, .nlink = 1 };
    return 0;
}

static int one_extents(struct fs *fs, uint64_t ino, uint64_t off, uint32_t len, struct extent *ext, int max,
                       uint32_t *got)
{
    struct one_file *o = (struct one_file *)(void *)fs;

    *got = len;
    return fix_extents(o->fix->h, o->blob, off, len, ext, max);
}

static uint64_t one_root(struct fs *fs) { return 1; }
static int one_lookup(struct fs *fs, uint64_t dir, const char *name, size_t len, vnd_attr *out) { return -ENOENT; }
static int one_xattr(struct fs *fs) { return 0; }

static const struct fs_ops one_ops = {
    .name = "one", .getattr = one_getattr, .lookup = one_lookup, .extents = one_extents, .root = one_root,
    .has_xattr = one_xattr,
};

/* ---- a guest, its front-end and the device */
struct rig {
    char dir[64];
    struct fix fix;
    struct fix_blob *blob;
    struct one_file file;
    vnd_vfs *vfs;
    vnd_device *dev;
    vnd_device_state st;
    char err[VND_ERR_MAX];
    fg_ram *ram;
    fg_queue *q[QUEUES];
    int kick[QUEUES], call[QUEUES], errfd[QUEUES];
    uint64_t unique;
};

static const fg_region regions[] = {
    { .gpa = 0, .size_bytes = RAM_BYTES / 2, .file_offset = 0x100000 },
    { .gpa = RAM_BYTES / 2, .size_bytes = RAM_BYTES / 2, .file_offset = 0x100000 + RAM_BYTES },
};

static int apply(struct rig *r)
{
    int rc = vnd_device_apply(r->dev, &r->st, DRAIN_MS, r->err, sizeof(r->err));

    if (rc != 0)
        CHECK(strlen(r->err) > 0);
    return rc;
}

static void set_memory(struct rig *r)
{
    r->st.region_count = 2;
    r->st.region_gen++;
    for (int i = 0; i < 2; i++)
        r->st.regions[i] = (vnd_region){ .gpa = regions[i].gpa, .size_bytes = regions[i].size_bytes,
                                         .user_addr = (uintptr_t)fg_ram_at(r->ram, regions[i].gpa, 1),
                                         .mmap_offset = regions[i].file_offset, .fd = fg_ram_fd(r->ram) };
}

static fg_queue_config ring_config(const struct rig *r, uint32_t i)
{
    return (fg_queue_config){ .num = RING, .desc_gpa = 0x1000 + 0x4000 * i, .avail_gpa = 0x2000 + 0x4000 * i,
                              .used_gpa = 0x3000 + 0x4000 * i, .event_idx = !!(r->st.features & F_EVENT_IDX),
                              .indirect = 1, .slot_gpa = 0x10000 + i * (RAM_BYTES / 2), .slot_count = SLOTS,
                              .slot_data_bytes = SLOT_DATA, .scatter = 1 };
}

/* Fresh rings, as after a boot. */
static void set_rings(struct rig *r, bool log)
{
    for (uint32_t i = 0; i < QUEUES; i++) {
        fg_queue_config c = ring_config(r, i);
        vnd_ring_state *s = &r->st.rings[i];

        fg_queue_free(r->q[i]);
        r->q[i] = fg_queue_new(r->ram, &c, 0);
        CHECK(r->q[i]);
        fg_queue_set_kick(r->q[i], r->kick[i]);
        fg_queue_set_call(r->q[i], r->call[i]);
        s->num = RING;
        s->flags = log;
        s->base = 0;
        s->desc_addr = (uintptr_t)fg_ram_at(r->ram, c.desc_gpa, 1);
        s->avail_addr = (uintptr_t)fg_ram_at(r->ram, c.avail_gpa, 1);
        s->used_addr = (uintptr_t)fg_ram_at(r->ram, c.used_gpa, 1);
        s->log_addr = c.used_gpa;
        s->kick_fd = r->kick[i];
        s->call_fd = r->call[i];
        s->err_fd = r->errfd[i];
        r->st.kick_gen[i]++;
        r->st.call_gen[i]++;
        r->st.err_gen[i]++;
        s->started = 1;
        s->enabled = 1;
    }
}

static void plug(struct rig *r)
{
    r->dev = vnd_device_new(r->fix.e, r->vfs, QUEUES, r->err, sizeof(r->err));
    CHECK(r->dev);
    memset(&r->st, 0, sizeof(r->st));
    r->st.features = 1ull << 32 | 1ull << 30 | F_EVENT_IDX | 1ull << 28;
    r->st.ring_count = QUEUES;
    r->st.inflight_fd = r->st.log_fd = -1;
    for (int i = 0; i < QUEUES; i++)
        r->st.rings[i].kick_fd = r->st.rings[i].call_fd = r->st.rings[i].err_fd = -1;
    set_memory(r);
    set_rings(r, false);
    CHECK_EQ(apply(r), 0);
}

/* Until the blob's chunk table is there, so that a read parks on its chunk at once. */
static void load_table(struct rig *r)
{
    int64_t until = now_us() + WAIT_MS * 1000;
    struct extent ext[1];
    uint8_t byte;
    struct iovec iov = { &byte, 1 };
    struct fix_reader reader;
    uint64_t total = 0;

    fix_reader_init(&reader);
    fix_extents(r->fix.h, r->blob, 0, 1, ext, 1);
    int64_t rc = store_read(&reader.w, ext, 1, &iov, 1);
    CHECK(rc == -EINPROGRESS);
    while (vnd_blob_ready(r->fix.h, &total), total == 0) {
        CHECK(now_us() < until);
        usleep(500);
    }
    if (!store_wait_cancel(&reader.w))
        fix_reader_wait(&reader);
    pthread_mutex_lock(&reader.lock);   /* the waker may still be on its way out of it */
    pthread_mutex_unlock(&reader.lock);
    store_wait_done(&reader.w);
}

static void rig_up(struct rig *r, uint32_t deadline_ms)
{
    memset(r, 0, sizeof(*r));
    fix_dir_make(r->dir, "/tmp");
    r->blob = fix_blob_new("b10b", 0, CHUNKS, CHUNK);
    r->fix.server.hold = 1;
    r->fix.server.flip_from = r->fix.server.flip_to = -1;
    fix_up(&r->fix, r->dir, r->blob, 1);
    r->fix.e->cfg.read_deadline_ms = deadline_ms;
    r->file = (struct one_file){ .fs = { &one_ops }, .fix = &r->fix, .blob = r->blob };
    r->vfs = vnd_vfs_new(r->fix.e, VND_SESSION_RAFS);
    CHECK(r->vfs);
    CHECK_EQ(vfs_mount(r->vfs, "/", &r->file.fs), 0);
    r->ram = fg_ram_new(regions, 2, 0);
    CHECK(r->ram);
    for (int i = 0; i < QUEUES; i++) {
        r->kick[i] = eventfd(0, EFD_CLOEXEC);
        r->call[i] = eventfd(0, EFD_CLOEXEC);
        r->errfd[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    }
    load_table(r);
    plug(r);
}

static void unplug(struct rig *r)
{
    vnd_device_free(r->dev);
    r->dev = NULL;
}

static void rig_down(struct rig *r)
{
    unplug(r);
    for (int i = 0; i < QUEUES; i++) {
        fg_queue_free(r->q[i]);
        close(r->kick[i]);
        close(r->call[i]);
        close(r->errfd[i]);
    }
    CHECK_EQ(fg_ram_check_gaps(r->ram), 0);
    fg_ram_free(r->ram);
    vnd_vfs_free(r->vfs);
    atomic_store(&r->fix.server.hold, 0);
    fix_down(&r->fix);
    fix_blob_free(r->blob);
    fix_dir_remove(r->dir);
}

/* ---- requests */
static uint32_t make(struct rig *r, uint8_t *buf, uint32_t opcode, uint64_t nodeid, const void *args, uint32_t len)
{
    struct fuse_in_header h = { .len = (uint32_t)sizeof(h) + len, .opcode = opcode, .unique = r->unique += 2,
                                .nodeid = nodeid };

    memcpy(buf, &h, sizeof(h));
    memcpy(buf + sizeof(h), args, len);
    return h.len;
}

static void send_init(struct rig *r)
{
    struct fuse_init_in in = { .major = 7, .minor = 38, .max_readahead = 131072, .flags = 1u << 30 | 1u << 22 };
    uint8_t buf[256];

    CHECK_EQ(fg_submit(r->q[RQ], 0, buf, make(r, buf, FUSE_OP_INIT, 0, &in, sizeof(in)), 64, 0), 0);
}

static void send_read(struct rig *r, uint32_t slot, uint32_t chunk, uint32_t len)
{
    struct fuse_read_in in = { .offset = (uint64_t)chunk * CHUNK, .size = len };
    uint8_t buf[256];
    uint32_t n = make(r, buf, FUSE_OP_READ, 1ull << 48 | FILE_INO, &in, sizeof(in));

    CHECK_EQ(fg_submit(r->q[RQ], slot, buf, n, 0, len), 0);
}

/* The next reply: its slot; bytes of file data, or a negative errno. */
static int64_t reap(struct rig *r, uint32_t *slot, uint8_t *data)
{
    static uint8_t reply[SLOT_DATA + 256];
    struct fuse_out_header h;
    int64_t n = fg_reap(r->q[RQ], slot, reply, sizeof(reply), WAIT_MS);

    if (n < (int64_t)sizeof(h)) {
        fprintf(stderr, "reap: %lld: %s\n", (long long)n, fg_queue_error(r->q[RQ]));
        abort();
    }
    memcpy(&h, reply, sizeof(h));
    if (data)
        memcpy(data, reply + sizeof(h), (size_t)n - sizeof(h));
    return h.error ? h.error : n - (int64_t)sizeof(h);
}

static void init_session(struct rig *r)
{
    uint32_t slot;

    send_init(r);
    CHECK_EQ(reap(r, &slot, NULL), 64);
}

/* Reads and compares; waits. */
static void check_read(struct rig *r, uint32_t slot, uint32_t chunk, uint32_t len)
{
    static uint8_t data[SLOT_DATA];
    uint32_t got;

    send_read(r, slot, chunk, len);
    CHECK_EQ(reap(r, &got, data), len);
    CHECK_EQ(got, slot);
    CHECK(memcmp(data, r->blob->plain + (size_t)chunk * CHUNK, len) == 0);
}

static vnd_stats stats(struct rig *r)
{
    vnd_stats s;

    vnd_engine_stats(r->fix.e, &s);
    return s;
}

/* Until so many reads in all have been parked. */
static void await_parked(struct rig *r, uint64_t n)
{
    int64_t until = now_us() + WAIT_MS * 1000;

    while (stats(r).parked < n) {
        CHECK(now_us() < until);
        usleep(500);
    }
}

static bool err_signalled(int fd)
{
    int64_t until = now_us() + WAIT_MS * 1000;
    uint64_t n;

    while (read(fd, &n, sizeof(n)) < 0) {
        if (now_us() > until)
            return false;
        usleep(500);
    }
    return true;
}

static void serve_now(struct rig *r, int fail)
{
    atomic_store(&r->fix.server.fail_errno, fail);
    atomic_store(&r->fix.server.hold, 0);
}

static uint16_t used_idx(struct rig *r)
{
    return atomic_load(&r->q[RQ]->used->idx);
}

/* ---- the tests */

static void test_reads(void)
{
    struct rig r;

    rig_up(&r, 0);
    init_session(&r);
    serve_now(&r, 0);
    check_read(&r, 0, 0, CHUNK);
    check_read(&r, 1, 0, 4096);
    for (uint32_t i = 0; i < 100; i++)
        check_read(&r, i % SLOTS, i % (CHUNKS - 1), 4096);
    CHECK(stats(&r).hits > 60);
    rig_down(&r);
}

/* A cold read does not hold up a warm one behind it; answers go out of order. */
static void test_cold_beside_warm(void)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 0);
    init_session(&r);
    serve_now(&r, 0);
    check_read(&r, 0, 0, 4096);
    atomic_store(&r.fix.server.hold, 1);
    usleep(60000);                      /* the server's own wait for a job ends */
    uint64_t parked = stats(&r).parked;
    send_read(&r, 1, 20, 4096);
    await_parked(&r, parked + 1);
    for (int i = 0; i < 50; i++)
        check_read(&r, 2, 0, 4096);
    atomic_store(&r.fix.server.hold, 0);
    CHECK_EQ(reap(&r, &slot, NULL), 4096);
    CHECK_EQ(slot, 1);
    rig_down(&r);
}

/* Kicks before enable; nothing is looked at until then, all of it then without another kick. */
static void test_kick_before_enable(void)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 0);
    r.st.rings[RQ].enabled = 0;
    CHECK_EQ(apply(&r), 0);
    send_init(&r);
    fg_queue_kick(r.q[RQ]);
    CHECK_EQ(apply(&r), 0);             /* passes through the queue's loop */
    CHECK_EQ(used_idx(&r), 0);
    r.st.rings[RQ].enabled = 1;
    CHECK_EQ(apply(&r), 0);
    CHECK_EQ(reap(&r, &slot, NULL), 64);
    rig_down(&r);
}

/* A request that misses is answered through the call fd that is there by then; the new one is signalled at once. */
static void test_call_swap(void)
{
    struct rig r;
    uint32_t slot;
    uint64_t n;

    rig_up(&r, 0);
    init_session(&r);
    send_read(&r, 0, 3, 4096);
    await_parked(&r, 1);
    int fd = eventfd(0, EFD_CLOEXEC);
    close(r.call[RQ]);                  /* the old one is ours to close: the device has its own */
    r.call[RQ] = fd;
    r.st.rings[RQ].call_fd = fd;
    r.st.call_gen[RQ]++;
    CHECK_EQ(apply(&r), 0);
    CHECK(read(fd, &n, sizeof(n)) == sizeof(n));
    fg_queue_set_call(r.q[RQ], fd);
    serve_now(&r, 0);
    CHECK_EQ(reap(&r, &slot, NULL), 4096);
    check_read(&r, 0, 3, 4096);
    rig_down(&r);
}

struct swapper { struct rig *r; _Atomic int stop, calls; };

static void *swap_main(void *arg)
{
    struct swapper *s = arg;

    while (!atomic_load(&s->stop)) {
        set_memory(s->r);
        CHECK_EQ(apply(s->r), 0);
        atomic_fetch_add(&s->calls, 1);
    }
    return NULL;
}

/* Memory is replaced all the time while reads run. */
static void test_memory_swap(void)
{
    struct rig r;
    struct swapper s = { .r = &r };
    pthread_t t;

    rig_up(&r, 0);
    init_session(&r);
    serve_now(&r, 0);
    CHECK(pthread_create(&t, NULL, swap_main, &s) == 0);
    for (uint32_t i = 0; i < 300 || atomic_load(&s.calls) < 30; i++)
        check_read(&r, i % SLOTS, i % (CHUNKS - 1), 4096);
    atomic_store(&s.stop, 1);
    pthread_join(t, NULL);
    rig_down(&r);
}

/* Memory without the rings: the queue pauses; with them again it goes on, even for what waited meanwhile. */
static void test_memory_gone(void)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 0);
    init_session(&r);
    r.st.region_count = 0;
    r.st.region_gen++;
    CHECK_EQ(apply(&r), 0);
    send_read(&r, 0, 0, 4096);
    serve_now(&r, 0);
    CHECK_EQ(apply(&r), 0);
    CHECK_EQ(used_idx(&r), 1);
    set_memory(&r);
    CHECK_EQ(apply(&r), 0);
    CHECK_EQ(reap(&r, &slot, NULL), 4096);
    rig_down(&r);
}

static void stop_rings(struct rig *r)
{
    for (int i = 0; i < QUEUES; i++) {
        r->st.rings[i].enabled = 0;
        CHECK_EQ(apply(r), 0);
    }
    for (int i = 0; i < QUEUES; i++) {
        r->st.rings[i].started = 0;
        r->st.rings[i].kick_fd = r->st.rings[i].call_fd = -1;
        r->st.kick_gen[i]++;
        r->st.call_gen[i]++;
        CHECK_EQ(apply(r), 0);
    }
}

static void restart_rings(struct rig *r)
{
    for (int i = 0; i < QUEUES; i++) {
        r->st.rings[i].started = r->st.rings[i].enabled = 1;
        r->st.rings[i].kick_fd = r->kick[i];
        r->st.rings[i].call_fd = r->call[i];
        r->st.kick_gen[i]++;
        r->st.call_gen[i]++;
    }
    CHECK_EQ(apply(r), 0);
}

/* A stop with a read that never comes: bounded, silent, and answered after the guest goes on. */
static void test_stop_and_continue(void)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 0);
    init_session(&r);
    send_read(&r, 2, 5, 4096);
    send_read(&r, 3, 9, 4096);
    await_parked(&r, 2);
    int64_t before = now_us();
    stop_rings(&r);
    CHECK(now_us() - before < 1000 * (DRAIN_MS + 2000));
    CHECK_EQ(r.st.rings[RQ].base, 3);
    CHECK_EQ(used_idx(&r), 1);
    serve_now(&r, 0);                   /* data comes while the guest stands still: it must not be written */
    while (stats(&r).fetched_chunks == 0)
        usleep(500);
    vnd_device_state other = r.st;      /* passes through the queues' loops */
    other.log_gen++;
    CHECK_EQ(vnd_device_apply(r.dev, &other, DRAIN_MS, r.err, sizeof(r.err)), 0);
    r.st.log_gen = other.log_gen;
    CHECK_EQ(used_idx(&r), 1);
    restart_rings(&r);
    CHECK_EQ(reap(&r, &slot, NULL), 4096);
    CHECK_EQ(reap(&r, &slot, NULL), 4096);
    CHECK_EQ(fg_queue_in_flight(r.q[RQ]), 0);
    check_read(&r, 0, 5, 4096);
    rig_down(&r);
}

/* A reboot drops what was in flight and uses the heads anew. */
static void test_reboot(void)
{
    struct rig r;

    rig_up(&r, 0);
    init_session(&r);
    for (uint32_t i = 0; i < SLOTS; i++)
        send_read(&r, i, i, 4096);
    await_parked(&r, SLOTS);
    stop_rings(&r);
    set_rings(&r, false);
    CHECK_EQ(apply(&r), 0);
    init_session(&r);
    serve_now(&r, 0);
    for (uint32_t i = 0; i < SLOTS; i++)
        check_read(&r, i, i, 4096);
    rig_down(&r);
}

/* With the dirty log on, nothing can be taken along: EIO. And everything that was written is in the log. */
static void test_stop_for_migration(void)
{
    struct rig r;
    uint32_t slot;
    uint8_t bits[RAM_BYTES / 4096 / 8];
    int fd = memfd_create("log", MFD_CLOEXEC);

    rig_up(&r, 0);
    CHECK(ftruncate(fd, 4096) == 0);
    init_session(&r);
    r.st.features |= F_LOG_ALL;
    r.st.log_fd = fd;
    r.st.log_size_bytes = sizeof(bits);
    r.st.log_gen++;
    for (int i = 0; i < QUEUES; i++)
        r.st.rings[i].flags = 1;
    CHECK_EQ(apply(&r), 0);
    send_read(&r, 1, 0, 4096);
    await_parked(&r, 1);
    stop_rings(&r);
    CHECK_EQ(used_idx(&r), 2);
    CHECK_EQ(reap(&r, &slot, NULL), -EIO);
    CHECK(pread(fd, bits, sizeof(bits), 0) == sizeof(bits));
    uint64_t header = ring_config(&r, RQ).slot_gpa + fg_slot_bytes(SLOT_DATA) + FG_SLOT_OUT;
    CHECK(bits[header / 4096 / 8] & 1 << header / 4096 % 8);
    CHECK(bits[0x7000 / 4096 / 8] & 1 << 0x7000 / 4096 % 8);    /* used ring of queue 1 */
    CHECK_EQ(bits[0x10000 / 4096 / 8], 0);                      /* the other queue's requests: nothing */
    restart_rings(&r);
    serve_now(&r, 0);
    CHECK(pwrite(fd, (uint8_t[64]){ 0 }, 64, 0) == 64);
    check_read(&r, 0, 0, 4096);
    CHECK(pread(fd, bits, sizeof(bits), 0) == sizeof(bits));
    uint64_t data = ring_config(&r, RQ).slot_gpa + fg_page_at(r.q[RQ], 0);
    CHECK(bits[data / 4096 / 8] & 1 << data / 4096 % 8);
    close(fd);
    rig_down(&r);
}

static void test_deadline(void)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 80);
    init_session(&r);
    int64_t before = now_us();
    for (uint32_t i = 0; i < 3; i++)
        send_read(&r, i, i, 4096);
    for (uint32_t i = 0; i < 3; i++)
        CHECK_EQ(reap(&r, &slot, NULL), -EIO);
    int64_t took = now_us() - before;
    CHECK(took >= 80000 && took < 3000000);
    CHECK_EQ(stats(&r).expired, 3);
    CHECK(fix_said(r.fix.e, VND_CAUSE_DEADLINE, "EIO"));
    serve_now(&r, 0);
    check_read(&r, 0, 0, 4096);
    rig_down(&r);
}

/* A deadline does not run while the guest cannot be answered. */
static void test_deadline_frozen(void)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 300);
    init_session(&r);
    send_read(&r, 0, 0, 4096);
    await_parked(&r, 1);
    r.st.rings[RQ].enabled = 0;
    CHECK_EQ(apply(&r), 0);
    usleep(400000);
    serve_now(&r, 0);
    while (stats(&r).fetched_chunks == 0)
        usleep(500);
    CHECK_EQ(used_idx(&r), 1);
    r.st.rings[RQ].enabled = 1;
    CHECK_EQ(apply(&r), 0);
    CHECK_EQ(reap(&r, &slot, NULL), 4096);
    rig_down(&r);
}

/* The guest breaks a queue: err fd, one line, that queue only, and a restart heals it. */
static void test_broken_queue(void)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 0);
    init_session(&r);
    send_read(&r, 0, 0, 4096);
    await_parked(&r, 1);
    /* The parked request's head again. */
    fg_queue *q = r.q[RQ];
    q->avail->ring[q->avail_idx % RING] = q->avail->ring[(uint16_t)(q->avail_idx - 1) % RING];
    atomic_store(&q->avail->idx, (uint16_t)(q->avail_idx + 1));
    fg_queue_kick(q);
    CHECK(err_signalled(r.errfd[RQ]));
    CHECK(fix_said(r.fix.e, VND_CAUSE_GUEST, "offered again"));
    CHECK_EQ(stats(&r).ring_errors, 1);
    serve_now(&r, 0);
    uint16_t stood = used_idx(&r);
    /* The other queue lives: a FORGET is consumed. */
    uint8_t buf[64];
    uint64_t one = 1, cookie;
    uint32_t len;
    CHECK_EQ(fg_submit(r.q[0], 0, buf, make(&r, buf, FUSE_OP_FORGET, 2, &one, 8), -1, 0), 0);
    CHECK_EQ(fg_queue_wait(r.q[0], WAIT_MS), 0);
    CHECK_EQ(fg_queue_pop(r.q[0], &cookie, &len), 1);
    CHECK_EQ(len, 0);
    CHECK_EQ(used_idx(&r), stood);
    stop_rings(&r);
    set_rings(&r, false);
    CHECK_EQ(apply(&r), 0);
    init_session(&r);
    check_read(&r, 0, 0, 4096);
    (void)slot;
    rig_down(&r);
}

/* A read whose pages lie nowhere fails alone. */
static void test_hole(void)
{
    struct rig r;
    struct fuse_read_in in = { .offset = 0, .size = 4096 };
    uint8_t *req;
    uint64_t cookie;
    uint32_t len;

    rig_up(&r, 0);
    init_session(&r);
    serve_now(&r, 0);
    check_read(&r, 0, 0, 4096);
    uint64_t gpa = ring_config(&r, RQ).slot_gpa;
    req = fg_ram_at(r.ram, gpa, 4096);
    uint32_t n = make(&r, req, FUSE_OP_READ, 1ull << 48 | FILE_INO, &in, sizeof(in));
    fg_segment bad_out[] = { { gpa, n, 0 }, { RAM_BYTES * 8, 4096 + 16, 1 } };
    fg_segment bad_in[] = { { RAM_BYTES * 8, n, 0 }, { gpa + 4096, 4096 + 16, 1 } };
    fg_segment bad_data[] = { { gpa, n, 0 }, { gpa + 4096, 16, 1 }, { RAM_BYTES * 8, 4096, 1 } };
    fg_segment *bad[] = { bad_out, bad_in, bad_data };
    for (int i = 0; i < 3; i++) {
        CHECK(fg_queue_add(r.q[RQ], bad[i], i == 2 ? 3 : 2, 0, 77) >= 0);
        fg_queue_publish(r.q[RQ]);
        CHECK_EQ(fg_queue_wait(r.q[RQ], WAIT_MS), 0);
        CHECK_EQ(fg_queue_pop(r.q[RQ], &cookie, &len), 1);
        CHECK_EQ(len, i == 2 ? 16 : 0);     /* there is room for an error in the last */
    }
    check_read(&r, 1, 0, 4096);
    CHECK_EQ(stats(&r).ring_errors, 0);
    rig_down(&r);
}

static void test_truncated(void)
{
    struct rig r;

    rig_up(&r, 0);
    init_session(&r);
    CHECK(ftruncate(fg_ram_fd(r.ram), 0x100000 + 0x4000) == 0);     /* rings of queue 1 and all data */
    uint64_t one = 1;
    CHECK(write(r.kick[RQ], &one, 8) == 8);
    CHECK(err_signalled(r.errfd[RQ]));
    CHECK(fix_said(r.fix.e, VND_CAUSE_IO, "truncated"));
    unplug(&r);
    CHECK(ftruncate(fg_ram_fd(r.ram), 0x100000 + RAM_BYTES * 3 / 2) == 0);
    fg_ram_free(r.ram);
    r.ram = fg_ram_new(regions, 2, 0);
    plug(&r);                           /* the daemon serves the next front-end */
    init_session(&r);
    serve_now(&r, 0);
    check_read(&r, 0, 0, 4096);
    rig_down(&r);
}

/* A device dies with requests in the front-end's in-flight region; the next one serves them. */
static void test_inflight(void)
{
    struct rig r;
    uint64_t size;
    uint32_t slot, seen = 0;

    rig_up(&r, 0);
    unplug(&r);
    int fd = vnd_inflight_create(QUEUES, RING, &size);
    CHECK(fd >= 0);
    plug(&r);
    stop_rings(&r);
    r.st.inflight_fd = fd;
    r.st.inflight_size_bytes = size;
    r.st.inflight_queues = QUEUES;
    r.st.inflight_queue_size = RING;
    r.st.inflight_gen++;
    set_rings(&r, false);
    CHECK_EQ(apply(&r), 0);
    init_session(&r);
    for (uint32_t i = 0; i < 4; i++)
        send_read(&r, i, i, 4096);
    await_parked(&r, 4);
    /* As a crash would leave it: a copy of the region at this moment. */
    int copy = vnd_inflight_create(QUEUES, RING, &size);
    uint8_t bytes[1024];
    CHECK(size <= sizeof(bytes) && pread(fd, bytes, size, 0) == (ssize_t)size);
    CHECK(pwrite(copy, bytes, size, 0) == (ssize_t)size);
    unplug(&r);
    vnd_device_state st = r.st;
    r.dev = vnd_device_new(r.fix.e, r.vfs, QUEUES, r.err, sizeof(r.err));
    CHECK(r.dev);
    st.inflight_fd = copy;
    r.st = st;
    serve_now(&r, 0);
    CHECK_EQ(apply(&r), 0);
    /* Without INIT the answer is EIO (a keeper process would hand its INIT over): what counts is that all come. */
    for (int i = 0; i < 4; i++) {
        reap(&r, &slot, NULL);
        seen |= 1u << slot;
    }
    CHECK_EQ(seen, 15);
    CHECK_EQ(fg_queue_in_flight(r.q[RQ]), 0);
    close(fd);
    close(copy);
    rig_down(&r);
}

/* A blank region of the front-end: the base it sets is obeyed. */
static void test_blank_inflight(void)
{
    struct rig r;
    uint64_t size;
    int fd = vnd_inflight_create(QUEUES, RING, &size);

    rig_up(&r, 0);
    stop_rings(&r);
    r.st.inflight_fd = fd;
    r.st.inflight_size_bytes = size;
    r.st.inflight_queues = QUEUES;
    r.st.inflight_queue_size = RING;
    r.st.inflight_gen++;
    set_rings(&r, false);
    send_init(&r);                      /* lies before the base: never served */
    r.st.rings[RQ].base = 1;
    CHECK_EQ(apply(&r), 0);
    CHECK_EQ(apply(&r), 0);
    CHECK_EQ(used_idx(&r), 0);
    stop_rings(&r);
    CHECK_EQ(r.st.rings[RQ].base, 1);
    close(fd);
    rig_down(&r);
}

/* A ring that was started without a kick fd is looked at all the same. */
static void test_no_kick_fd(void)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 0);
    stop_rings(&r);
    set_rings(&r, false);
    for (int i = 0; i < QUEUES; i++)
        r.st.rings[i].kick_fd = -1;
    CHECK_EQ(apply(&r), 0);
    send_init(&r);
    CHECK_EQ(reap(&r, &slot, NULL), 64);
    rig_down(&r);
}

/* What the front-end asks for and cannot have, leaves the device as it was. */
static void test_refused(void)
{
    struct rig r;

    rig_up(&r, 0);
    init_session(&r);
    serve_now(&r, 0);
    vnd_device_state good = r.st;
    r.st.features |= 1ull << 40;
    CHECK_EQ(apply(&r), -EINVAL);
    r.st = good;
    r.st.regions[1].gpa = 4096;
    r.st.region_gen++;
    CHECK_EQ(apply(&r), -EINVAL);
    r.st = good;
    check_read(&r, 0, 0, 4096);
    stop_rings(&r);
    good = r.st;
    set_rings(&r, false);
    r.st.rings[RQ].num = 12;
    CHECK_EQ(apply(&r), -EINVAL);
    r.st.rings[RQ].num = RING;
    r.st.rings[RQ].used_addr = 0x1000;
    CHECK_EQ(apply(&r), -EFAULT);
    CHECK(err_signalled(r.errfd[RQ]));
    CHECK_EQ(stats(&r).ring_errors, 1);
    set_memory(&r);
    CHECK_EQ(apply(&r), 0);             /* tries again, fails again: no news */
    CHECK_EQ(stats(&r).ring_errors, 1);
    set_rings(&r, false);
    int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    r.st.rings[RQ].kick_fd = file;      /* a plain file cannot be waited on */
    CHECK_EQ(apply(&r), -EPERM);
    close(file);
    set_rings(&r, false);
    CHECK_EQ(apply(&r), 0);
    check_read(&r, 0, 1, 4096);
    rig_down(&r);
}

/* A read into more ranges than a slot holds waits like any other; beyond the device's budget it fails, alone. */
static void test_many_ranges(void)
{
    struct rig r;
    struct fuse_read_in in = { .offset = 3 * CHUNK, .size = 60 * 1024 };
    fg_segment seg[62];
    uint64_t cookie;
    uint32_t len;

    rig_up(&r, 0);
    init_session(&r);
    uint64_t gpa = ring_config(&r, RQ).slot_gpa;
    uint8_t *at = fg_ram_at(r.ram, gpa, 256 << 10);
    uint32_t n = make(&r, at, FUSE_OP_READ, 1ull << 48 | FILE_INO, &in, sizeof(in));
    seg[0] = (fg_segment){ gpa, n, 0 };
    seg[1] = (fg_segment){ gpa + 4096, 16, 1 };
    for (uint32_t i = 0; i < 60; i++)
        seg[2 + i] = (fg_segment){ gpa + 8192 + 2048 * i, 1024, 1 };
    CHECK(fg_queue_add(r.q[RQ], seg, 62, gpa + 0x40000, 1) >= 0);
    fg_queue_publish(r.q[RQ]);
    await_parked(&r, 1);
    CHECK(atomic_load(&r.dev->segs_bytes) > 0);
    serve_now(&r, 0);
    CHECK_EQ(fg_queue_wait(r.q[RQ], WAIT_MS), 0);
    CHECK_EQ(fg_queue_pop(r.q[RQ], &cookie, &len), 1);
    CHECK_EQ(len, 16 + 60 * 1024);
    for (uint32_t i = 0; i < 60; i++)
        CHECK(memcmp(at + 8192 + 2048 * i, r.blob->plain + 3 * CHUNK + 1024 * i, 1024) == 0);
    CHECK_EQ(atomic_load(&r.dev->segs_bytes), 0);

    atomic_store(&r.fix.server.hold, 1);
    atomic_store(&r.dev->segs_bytes, QUEUE_SEGS_BUDGET);
    in.offset = 25 * CHUNK;
    make(&r, at, FUSE_OP_READ, 1ull << 48 | FILE_INO, &in, sizeof(in));
    CHECK(fg_queue_add(r.q[RQ], seg, 62, gpa + 0x40000, 1) >= 0);
    fg_queue_publish(r.q[RQ]);
    CHECK_EQ(fg_queue_wait(r.q[RQ], WAIT_MS), 0);
    CHECK_EQ(fg_queue_pop(r.q[RQ], &cookie, &len), 1);
    CHECK_EQ(len, 16);
    struct fuse_out_header h;
    memcpy(&h, at + 4096, sizeof(h));
    CHECK_EQ(h.error, -EIO);
    CHECK_EQ(atomic_load(&r.dev->segs_bytes), QUEUE_SEGS_BUDGET);
    check_read(&r, 1, 3, 4096);
    rig_down(&r);
}

/* Wakes race with everything that ends a request: hang-up, reset, deadline. */
static void test_races(void)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 20);
    serve_now(&r, EIO);                 /* chunks never come, every job wakes its readers */
    for (int round = 0; round < 60; round++) {
        init_session(&r);
        for (uint32_t i = 0; i < SLOTS; i++)
            send_read(&r, i, (i * 7 + (uint32_t)round) % CHUNKS, 4096);
        switch (round % 3) {
        case 0:
            usleep((useconds_t)(round * 37 % 1000));
            unplug(&r);
            plug(&r);
            break;
        case 1:
            for (uint32_t i = 0; i < SLOTS; i++)
                CHECK_EQ(reap(&r, &slot, NULL), -EIO);
            break;
        default:
            vnd_device_reset(r.dev);
            stop_rings(&r);
            set_rings(&r, false);
            CHECK_EQ(apply(&r), 0);
        }
    }
    rig_down(&r);
}

int main(int argc, char **argv)
{
    static const struct { const char *name; void (*run)(void); } tests[] = {
        { "reads", test_reads },
        { "cold_beside_warm", test_cold_beside_warm },
        { "kick_before_enable", test_kick_before_enable },
        { "call_swap", test_call_swap },
        { "memory_swap", test_memory_swap },
        { "memory_gone", test_memory_gone },
        { "stop_and_continue", test_stop_and_continue },
        { "reboot", test_reboot },
        { "stop_for_migration", test_stop_for_migration },
        { "deadline", test_deadline },
        { "deadline_frozen", test_deadline_frozen },
        { "broken_queue", test_broken_queue },
        { "hole", test_hole },
        { "truncated", test_truncated },
        { "inflight", test_inflight },
        { "blank_inflight", test_blank_inflight },
        { "no_kick_fd", test_no_kick_fd },
        { "refused", test_refused },
        { "many_ranges", test_many_ranges },
        { "races", test_races },
    };

    for (size_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++)
        if (argc < 2 || strcmp(argv[1], tests[i].name) == 0) {
            if (getenv("VERBOSE"))
                fprintf(stderr, "%s\n", tests[i].name);
            tests[i].run();
        }
    return 0;
}
