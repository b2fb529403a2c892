/* device_rig.h -- a device as a front-end drives it, in one process: queue threads, the real store and FUSE
 * session, a guest made of the fake guest's rings, a file whose bytes come when the test lets them.
 */
#ifndef DEVICE_RIG_H
#define DEVICE_RIG_H
#include <sys/eventfd.h>

#include "fakeguest/fg_fuse.c"
#include "fakeguest/fg_ram.c"
#include "fakeguest/fg_ring.c"
#include "vhost/device.h"
#include "fs/fs.h"
#include "store_fixture.h"
#include "fs/vfs.h"

#define QUEUES 2 /* hiprio, requests */
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

static inline int one_getattr(struct fs *fs, uint64_t ino, vnd_attr *out)
{
    *out = (vnd_attr){ .ino = ino, .mode = ino == FILE_INO ? 0100444 : 040555, .nlink = 1 };
    return 0;
}

static inline int one_extents(struct fs *fs, uint64_t ino, uint64_t off, uint32_t len, struct fs_extents *out)
{
    struct one_file *o = (struct one_file *)(void *)fs;

    out->bytes = len;
    return fix_extents(o->fix->h, o->blob, off, len, out->at, out->max);
}

static inline uint64_t one_root(struct fs *fs)
{
    return 1;
}
static inline int one_lookup(struct fs *fs, uint64_t dir, const char *name, size_t len, vnd_attr *out)
{
    return -ENOENT;
}

static inline bool one_xattr(struct fs *fs)
{
    return false;
}

static const struct fs_ops one_ops = {
    .name = "one",
    .getattr = one_getattr,
    .lookup = one_lookup,
    .extents = one_extents,
    .root = one_root,
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

static inline int apply(struct rig *r)
{
    int rc = vnd_device_apply(r->dev, &r->st, DRAIN_MS, r->err, sizeof(r->err));

    if (rc != 0)
        CHECK(strlen(r->err) > 0);
    return rc;
}

static inline void set_memory(struct rig *r)
{
    r->st.region_count = 2;
    r->st.region_gen++;
    for (int i = 0; i < 2; i++)
        r->st.regions[i] = (vnd_region){ .gpa = regions[i].gpa,
                                         .size_bytes = regions[i].size_bytes,
                                         .user_addr = (uintptr_t)fg_ram_at(r->ram, regions[i].gpa, 1),
                                         .mmap_offset = regions[i].file_offset,
                                         .fd = fg_ram_fd(r->ram) };
}

static inline fg_queue_config ring_config(const struct rig *r, uint32_t i)
{
    return (fg_queue_config){ .num = RING,
                              .desc_gpa = 0x1000 + 0x4000 * i,
                              .avail_gpa = 0x2000 + 0x4000 * i,
                              .used_gpa = 0x3000 + 0x4000 * i,
                              .event_idx = !!(r->st.features & F_EVENT_IDX),
                              .indirect = 1,
                              .slot_gpa = 0x10000 + i * (RAM_BYTES / 2),
                              .slot_count = SLOTS,
                              .slot_data_bytes = SLOT_DATA,
                              .scatter = 1 };
}

/* Fresh rings, as after a boot. */
static inline void set_rings(struct rig *r, bool log)
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

static inline void plug(struct rig *r)
{
    r->dev = vnd_device_new(&(vnd_device_cfg){ .engine = r->fix.e, .vfs = r->vfs, .queue_count = QUEUES }, r->err,
                            sizeof(r->err));
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
static inline void load_table(struct rig *r)
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
    pthread_mutex_lock(&reader.lock); /* the waker may still be on its way out of it */
    pthread_mutex_unlock(&reader.lock);
    store_wait_done(&reader.w);
}

static inline void rig_up(struct rig *r, uint32_t deadline_ms)
{
    memset(r, 0, sizeof(*r));
    fix_dir_make(r->dir);
    r->blob = fix_blob_new("b10b", 0, CHUNKS, CHUNK);
    r->fix.server.hold = 1;
    r->fix.server.flip_from = r->fix.server.flip_to = -1;
    fix_up(&r->fix, r->dir, r->blob, 1);
    if (deadline_ms)
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

static inline void unplug(struct rig *r)
{
    vnd_device_free(r->dev);
    r->dev = NULL;
}

static inline void rig_down(struct rig *r)
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
static inline uint32_t make(struct rig *r, uint8_t *buf, uint32_t opcode, uint64_t nodeid, const void *args,
                            uint32_t len)
{
    struct fuse_in_header h = {
        .len = (uint32_t)sizeof(h) + len, .opcode = opcode, .unique = r->unique += 2, .nodeid = nodeid
    };

    memcpy(buf, &h, sizeof(h));
    memcpy(buf + sizeof(h), args, len);
    return h.len;
}

static inline void send_init(struct rig *r)
{
    struct fuse_init_in in = { .major = 7, .minor = 38, .max_readahead = 131072, .flags = 1u << 30 | 1u << 22 };
    uint8_t buf[256];

    CHECK_EQ(fg_submit(r->q[RQ], 0, buf, make(r, buf, FUSE_OP_INIT, 0, &in, sizeof(in)), 64, 0), 0);
}

static inline void send_read(struct rig *r, uint32_t slot, uint32_t chunk, uint32_t len)
{
    struct fuse_read_in in = { .offset = (uint64_t)chunk * CHUNK, .size = len };
    uint8_t buf[256];
    uint32_t n = make(r, buf, FUSE_OP_READ, 1ull << 48 | FILE_INO, &in, sizeof(in));

    CHECK_EQ(fg_submit(r->q[RQ], slot, buf, n, 0, len), 0);
}

/* The next reply: its slot; bytes of file data, or a negative errno. */
static inline int64_t reap(struct rig *r, uint32_t *slot, uint8_t *data)
{
    static uint8_t reply[SLOT_DATA + 256];
    struct fuse_out_header h;
    int64_t n = fg_reap(r->q[RQ], slot, reply, sizeof(reply), WAIT_MS);

    if (n < (int64_t)sizeof(h)) {
        fprintf(stderr, "reap: %lld: %s\n", (long long)n, fg_queue_error(r->q[RQ]));
        check_fail();
    }
    memcpy(&h, reply, sizeof(h));
    if (data)
        memcpy(data, reply + sizeof(h), (size_t)n - sizeof(h));
    return h.error ? h.error : n - (int64_t)sizeof(h);
}

static inline void init_session(struct rig *r)
{
    uint32_t slot;

    send_init(r);
    CHECK_EQ(reap(r, &slot, NULL), 64);
}

/* Reads and compares; waits. */
static inline void check_read(struct rig *r, uint32_t slot, uint32_t chunk, uint32_t len)
{
    static uint8_t data[SLOT_DATA];
    uint32_t got;

    send_read(r, slot, chunk, len);
    CHECK_EQ(reap(r, &got, data), len);
    CHECK_EQ(got, slot);
    CHECK(memcmp(data, r->blob->plain + (size_t)chunk * CHUNK, len) == 0);
}

static inline vnd_stats stats(struct rig *r)
{
    vnd_stats s;

    vnd_engine_stats(r->fix.e, &s);
    return s;
}

/* Until so many reads in all have been parked. */
static inline void await_parked(struct rig *r, uint64_t n)
{
    CHECK_SOON(stats(r).parked >= n);
}

static inline bool err_signalled(int fd)
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

static inline void serve_now(struct rig *r, int fail)
{
    atomic_store(&r->fix.server.fail_errno, fail);
    atomic_store(&r->fix.server.hold, 0);
}

static inline uint16_t used_idx(struct rig *r)
{
    return atomic_load(&r->q[RQ]->used->idx);
}

/* ---- stop and start */
static inline void stop_rings(struct rig *r)
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

static inline void restart_rings(struct rig *r)
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

#endif
