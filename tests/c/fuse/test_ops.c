/* READ from an image down to the blob store and back: parked, woken, failed, expired,
 * dropped. */
#include "store_fixture.h"

#include "fake_req.h"
#include "image_of_blob.h"
#include "fs/vfs.h"

/* A session on an image whose blob is the fixture's: same chunks, their true digests. */
struct rig {
    char dir[200];
    vnd_engine *engine;
    vnd_store *store;
    vnd_rafs *image;
    vnd_vfs *vfs;
    struct fuse_session *s;
    struct fuse_worker w;
    struct fix_blob *blob;
    struct fix_server server;
    struct img_nids n;
    struct fake_req f;
    struct fix_reader woken; /* counts wakes of f */
};

static void rig_new(struct rig *g, uint32_t deadline_ms)
{
    char id[65], path[32], err[VND_ERR_MAX] = "";
    struct fuse_init_in init = { .major = 7, .minor = 38, .flags = ~0u };
    struct fake_req f;
    struct img m;
    int cause, fd;

    memset(g, 0, sizeof(*g));
    memset(id, 'a', 64);
    id[64] = 0;
    fix_dir_make(g->dir);
    g->blob = fix_blob_new(id, 0, IMG_BLOB_CHUNKS, IMG_CHUNK);
    make_image(&m, &g->n, g->blob);
    g->engine = vnd_engine_new(&(vnd_engine_cfg){ .read_deadline_ms = deadline_ms });
    g->store = vnd_store_open(g->engine, g->dir, 0, err, sizeof(err));
    CHECK(g->store);
    fd = img_fd(m.b, sizeof(m.b), path);
    g->image = vnd_rafs_open(g->engine, path, NULL, g->store, &cause, err, sizeof(err));
    close(fd);
    if (!g->image)
        fprintf(stderr, "%s\n", err);
    CHECK(g->image);
    fix_load_blob(vnd_rafs_blob(g->image, 0));
    g->vfs = vnd_vfs_new(g->engine, VND_SESSION_RAFS);
    CHECK_EQ(vnd_vfs_mount_rafs(g->vfs, "/", g->image), 0);
    g->s = fuse_session_new(g->engine, g->vfs);
    CHECK_EQ(fuse_worker_init(&g->w, g->engine, g->vfs), 0);
    fake_fill(&f, FUSE_OP_INIT, 0, &init, sizeof(init), 80);
    CHECK_EQ(fuse_session_serve(g->s, &g->w, &f.r), REQ_REPLY);
    fake_done(&f);
    atomic_store(&g->server.hold, 1);
    fix_server_start(&g->server, g->engine, g->blob, 1);
    fix_reader_init(&g->woken);
}

static void rig_free(struct rig *g)
{
    fake_done(&g->f);
    vnd_engine_shutdown(g->engine);
    fix_server_stop(&g->server);
    fuse_worker_free(&g->w, g->vfs);
    fuse_session_free(g->s);
    vnd_vfs_free(g->vfs);
    vnd_rafs_free(g->image);
    vnd_store_free(g->store);
    vnd_engine_free(g->engine);
    fix_blob_free(g->blob);
    fix_dir_remove(g->dir);
}

static enum req_verdict start_read(struct rig *g, uint64_t off, uint32_t size)
{
    struct fuse_read_in in = { .offset = off, .size = size };

    fake_done(&g->f);
    fake_fill(&g->f, FUSE_OP_READ, 1ull << 48 | g->n.file, &in, sizeof(in), 16 + size);
    store_wait_init(&g->f.r.wait, fix_wake, &g->woken);
    g->f.r.wait.deadline_us = now_us() + 30000000;
    g->f.r.session_gen = fuse_session_gen(g->s);
    return fuse_session_serve(g->s, &g->w, &g->f.r);
}

/* Runs it again at each wake until it is answered. */
static enum req_verdict finish_read(struct rig *g)
{
    enum req_verdict v;

    do {
        fix_reader_wait(&g->woken);
        v = fuse_session_serve(g->s, &g->w, &g->f.r);
    } while (v == REQ_PARKED);
    return v;
}

static void check_bytes(struct rig *g, uint64_t off, uint32_t len)
{
    struct fuse_out_header h;

    memcpy(&h, g->f.out, sizeof(h));
    CHECK_EQ(h.error, 0);
    CHECK_EQ(h.len, 16 + len);
    CHECK_EQ(g->f.r.out_len, 16 + len);
    CHECK(memcmp(g->f.out + 16, g->blob->plain + 3 * IMG_CHUNK + off, len) == 0);
}

static void check_error(struct rig *g, int error)
{
    struct fuse_out_header h;

    memcpy(&h, g->f.out, sizeof(h));
    CHECK_EQ(h.error, -error);
    CHECK_EQ(h.len, 16);
    CHECK_EQ(g->f.r.out_len, 16);
}

TEST(parked_then_hit)
{
    struct rig g;
    vnd_stats stats;

    rig_new(&g, 0);
    CHECK_EQ(start_read(&g, 100, 8000), REQ_PARKED);
    CHECK_EQ(g.woken.woken, 0);
    atomic_store(&g.server.hold, 0);
    CHECK_EQ(finish_read(&g), REQ_REPLY);
    check_bytes(&g, 100, 8000);
    CHECK_EQ(g.f.dirty, 8000);
    vnd_engine_stats(g.engine, &stats);
    CHECK_EQ(stats.parked, 1);
    CHECK_EQ(stats.hits, 0);
    CHECK_EQ(stats.read_bytes, 8000);
    CHECK_EQ(start_read(&g, 4096, 4096), REQ_REPLY);
    check_bytes(&g, 4096, 4096);
    vnd_engine_stats(g.engine, &stats);
    CHECK_EQ(stats.parked, 1);
    CHECK_EQ(stats.hits, 1);
    CHECK_EQ(stats.read_bytes, 12096);
    rig_free(&g);
}

TEST(wrong_bytes_are_eio)
{
    struct rig g;
    vnd_stats stats;

    rig_new(&g, 0);
    atomic_store(&g.server.flip_to, 1000);
    atomic_store(&g.server.hold, 0);
    CHECK_EQ(start_read(&g, 0, 4096), REQ_PARKED);
    CHECK_EQ(finish_read(&g), REQ_REPLY);
    check_error(&g, EIO);
    vnd_engine_stats(g.engine, &stats);
    CHECK(stats.digest_failures > 0);
    CHECK_EQ(stats.fuse_errors, 1);
    CHECK_EQ(stats.read_bytes, 0);
    rig_free(&g);
}

TEST(expiry)
{
    struct rig g;

    rig_new(&g, 0);
    CHECK_EQ(start_read(&g, 0, 4096), REQ_PARKED);
    CHECK(store_wait_cancel(&g.f.r.wait));
    CHECK_EQ(fuse_session_fail(g.s, &g.w, &g.f.r, EIO), REQ_REPLY);
    check_error(&g, EIO);
    rig_free(&g);
}

/* The guest was reset while a read was parked: when it is woken, no byte is written. */
TEST(reset_while_parked)
{
    struct rig g;

    rig_new(&g, 0);
    CHECK_EQ(start_read(&g, 0, 4096), REQ_PARKED);
    fuse_session_reset(g.s);
    atomic_store(&g.server.hold, 0);
    CHECK_EQ(finish_read(&g), REQ_NOREPLY);
    CHECK_EQ(g.f.r.out_len, 0);
    for (uint32_t i = 0; i < g.f.r.out_cap; i++)
        CHECK_EQ(g.f.out[i], 0xee);
    store_wait_done(&g.f.r.wait);
    rig_free(&g);
}

/* The mount goes while a read is parked, and the image is closed: the reader is told. */
TEST(umount_while_parked)
{
    struct rig g;

    rig_new(&g, 0);
    CHECK_EQ(start_read(&g, 0, 4096), REQ_PARKED);
    CHECK_EQ(vnd_vfs_umount(g.vfs, "/"), 0);
    vnd_rafs_free(g.image);
    g.image = NULL;
    atomic_store(&g.server.hold, 0);
    CHECK_EQ(finish_read(&g), REQ_REPLY);
    check_error(&g, ESTALE);
    rig_free(&g);
}

TEST(tool_read)
{
    uint8_t *buf = malloc(IMG_FILE_SIZE + 100);
    struct rig g;

    rig_new(&g, 100);
    CHECK_EQ(vnd_rafs_read(g.image, g.n.file, 0, buf, 10), -ETIMEDOUT); /* there is no fetch thread */
    atomic_store(&g.server.hold, 0);
    CHECK_EQ(vnd_rafs_read(g.image, g.n.file, 0, buf, IMG_FILE_SIZE + 100), IMG_FILE_SIZE);
    CHECK(memcmp(buf, g.blob->plain + 3 * IMG_CHUNK, IMG_FILE_SIZE) == 0);
    CHECK_EQ(vnd_rafs_read(g.image, g.n.file, IMG_FILE_SIZE - 5, buf, 100), 5);
    CHECK_EQ(vnd_rafs_read(g.image, g.n.file, IMG_FILE_SIZE, buf, 100), 0);
    CHECK_EQ(vnd_rafs_read(g.image, g.n.sub, 0, buf, 100), -EISDIR);
    rig_free(&g);
    free(buf);
}
