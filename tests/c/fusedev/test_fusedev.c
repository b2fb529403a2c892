/* The /dev/fuse transport on a socket that keeps message borders, as the device does: answers out of
 * order, interrupts, deadlines, stops with reads that never come, several threads. */
#include "image_of_blob.h"

#include <poll.h>
#include <sys/socket.h>

#include "fs/vfs.h"
#include "fuse/wire.h"

#define FILE_BYTES (3 * IMG_CHUNK)

struct rig {
    char dir[200];
    vnd_engine *engine;
    vnd_store *store;
    vnd_rafs *image;
    vnd_vfs *vfs;
    vnd_fusedev *dev;
    struct fix_blob *blob;
    struct fix_server server;
    struct img_nids n;
    int fd; /* the kernel's end */
    uint8_t reply[(1 << 20) + 64];
};

static struct rig *g; /* the case's own */

BEFORE_EACH
{
    g = malloc(sizeof *g);
    CHECK(g);
}

AFTER_EACH
{
    free(g);
}

struct answer {
    struct fuse_out_header h;
    uint32_t len;
};

static void send_request(uint64_t unique, uint32_t op, uint64_t node, const void *body, uint32_t len)
{
    struct {
        struct fuse_in_header h;
        uint8_t body[256];
    } m = {
        .h = { .len = (uint32_t)sizeof(struct fuse_in_header) + len, .opcode = op, .unique = unique, .nodeid = node },
    };

    memcpy(m.body, body, len);
    CHECK_EQ(send(g->fd, &m, m.h.len, 0), m.h.len);
}

static struct answer receive(void)
{
    struct pollfd wait = { .fd = g->fd, .events = POLLIN };
    struct answer a = { 0 };
    ssize_t n;

    CHECK_EQ(poll(&wait, 1, 20000), 1);
    n = recv(g->fd, g->reply, sizeof(g->reply), 0);
    CHECK(n >= (ssize_t)sizeof(a.h));
    memcpy(&a.h, g->reply, sizeof(a.h));
    CHECK_EQ(a.h.len, n);
    a.len = (uint32_t)n - (uint32_t)sizeof(a.h);
    return a;
}

static bool is_silent(void)
{
    struct pollfd wait = { .fd = g->fd, .events = POLLIN };

    return poll(&wait, 1, 0) == 0;
}

static void send_read(uint64_t unique, uint64_t off, uint32_t size)
{
    struct fuse_read_in in = { .offset = off, .size = size };

    send_request(unique, FUSE_OP_READ, 1ull << 48 | g->n.file, &in, sizeof(in));
}

static void check_data(struct answer a, uint64_t off, uint32_t len)
{
    CHECK_EQ(a.h.error, 0);
    CHECK_EQ(a.len, len);
    CHECK(memcmp(g->reply + 16, g->blob->plain + 3 * IMG_CHUNK + off, len) == 0);
}

static vnd_stats stats(void)
{
    vnd_stats s;

    vnd_engine_stats(g->engine, &s);
    return s;
}

static void await_parked(uint64_t n)
{
    CHECK_SOON(stats().parked >= n);
}

static void start_device(uint32_t threads, uint32_t flags)
{
    char err[VND_ERR_MAX] = "";
    int pair[2];

    CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    CHECK_EQ(setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &(int){ 4 << 20 }, sizeof(int)), 0);
    g->dev = vnd_fusedev_new(g->engine, g->vfs, pair[0], threads, VND_FUSEDEV_SHARED | flags, err, sizeof(err));
    CHECK(g->dev);
    close(pair[0]);
    g->fd = pair[1];
}

static void rig_new(uint32_t threads, uint32_t deadline_ms)
{
    struct fuse_init_in init = { .major = 7, .minor = 45, .flags = ~0u };
    char id[65], path[32], err[VND_ERR_MAX] = "";
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
    CHECK(g->image);
    g->vfs = vnd_vfs_new(g->engine, VND_SESSION_RAFS);
    CHECK_EQ(vnd_vfs_mount_rafs(g->vfs, "/", g->image), 0);
    atomic_store(&g->server.hold, 1);
    fix_server_start(&g->server, g->engine, g->blob, 1);
    start_device(threads, 0);
    CHECK(!vnd_fusedev_ready(g->dev));
    send_request(1, FUSE_OP_INIT, 0, &init, sizeof(init));
    CHECK_EQ(receive().h.error, 0);
    CHECK(vnd_fusedev_ready(g->dev));
}

static void rig_free(void)
{
    vnd_fusedev_free(g->dev);
    close(g->fd);
    vnd_engine_shutdown(g->engine);
    fix_server_stop(&g->server);
    vnd_vfs_free(g->vfs);
    vnd_rafs_free(g->image);
    vnd_store_free(g->store);
    vnd_engine_free(g->engine);
    fix_blob_free(g->blob);
    fix_dir_remove(g->dir);
}

TEST(cold_beside_warm)
{
    struct fuse_getattr_in attr = { 0 };

    rig_new(1, 30000);
    send_read(10, 0, 4096);
    await_parked(1);
    for (uint64_t u = 20; u < 40; u++) {
        send_request(u, FUSE_OP_GETATTR, 1, &attr, sizeof(attr));
        CHECK_EQ(receive().h.unique, u);
    }
    CHECK(is_silent());
    atomic_store(&g->server.hold, 0);
    struct answer a = receive();
    CHECK_EQ(a.h.unique, 10);
    check_data(a, 0, 4096);
    send_read(11, 100, 3000); /* warm now: the reader answers itself */
    check_data(receive(), 100, 3000);
    CHECK(stats().hits >= 1);
    rig_free();
}

TEST(interrupt)
{
    uint64_t target = 10, unknown = 99;

    rig_new(2, 30000);
    send_read(target, 0, 4096);
    await_parked(1);
    send_request(12, FUSE_OP_INTERRUPT, 0, &unknown, sizeof(unknown));
    send_request(11, FUSE_OP_INTERRUPT, 0, &target, sizeof(target));
    struct answer a = receive();
    CHECK_EQ(a.h.unique, target);
    CHECK_EQ(a.h.error, -EINTR);
    CHECK(is_silent());
    rig_free();
}

/* Two readers: the interrupt may be read before the request that it is for has parked, or even been read. */
TEST(early_interrupt)
{
    rig_new(2, 30000);
    for (uint64_t u = 10; u < 210; u += 2) {
        uint64_t interrupt = u | 1;

        send_read(u, 0, 4096);
        send_request(interrupt, FUSE_OP_INTERRUPT, 0, &u, sizeof(u));
        struct answer a = receive();
        CHECK_EQ(a.h.unique, u);
        CHECK_EQ(a.h.error, -EINTR);
    }
    CHECK(is_silent());
    rig_free();
}

TEST(deadline)
{
    rig_new(2, 200);
    int64_t before = now_us();
    send_read(10, 0, 4096);
    struct answer a = receive();
    CHECK_EQ(a.h.unique, 10);
    CHECK_EQ(a.h.error, -EIO);
    CHECK(now_us() - before >= 190000);
    CHECK_EQ(stats().expired, 1);
    rig_free();
}

/* Stops with parked reads: silent and prompt. A successor gets what the kernel sends again. */
TEST(stop_and_resume)
{
    rig_new(4, 30000);
    for (uint64_t u = 10; u < 16; u++)
        send_read(u, (u - 10) * 4096, 4096);
    await_parked(6);
    CHECK_EQ(vnd_fusedev_wait(g->dev, 0), -ETIMEDOUT);
    int64_t before = now_us();
    vnd_fusedev_stop(g->dev);
    CHECK(now_us() - before < 5000000);
    CHECK_EQ(vnd_fusedev_wait(g->dev, 0), 0);
    CHECK(is_silent());
    vnd_fusedev_free(g->dev);
    close(g->fd);
    start_device(2, VND_FUSEDEV_RESUME | VND_FUSEDEV_RESEND);
    struct answer a = receive(); /* its notification: unique 0, code RESEND */
    CHECK_EQ(a.h.unique, 0);
    CHECK_EQ(a.h.error, 7);
    CHECK(vnd_fusedev_ready(g->dev));
    send_read(1ull << 63 | 10, 0, 4096);
    atomic_store(&g->server.hold, 0);
    a = receive();
    CHECK_EQ(a.h.unique, 1ull << 63 | 10);
    check_data(a, 0, 4096);
    rig_free();
}

TEST(end_of_mount)
{
    rig_new(3, 30000);
    shutdown(g->fd, SHUT_RDWR);
    CHECK_EQ(vnd_fusedev_wait(g->dev, 20000), 0);
    rig_free();
}

/* Everything at once: many reads of everything, cold and warm, each answered once with the right bytes. */
TEST(many)
{
    enum { READS = 400, SIZE = 3000 };
    uint8_t seen[READS] = { 0 };
    uint32_t file = FILE_BYTES, random = 7;
    uint64_t off[READS];

    rig_new(4, 30000);
    atomic_store(&g->server.hold, 0);
    for (int i = 0, sent = 0; i < READS; i++) {
        for (; sent < READS && sent < i + 32; sent++) {
            off[sent] = fix_random(&random) % (file - SIZE);
            send_read(1000 + (uint64_t)sent, off[sent], SIZE);
        }
        struct answer a = receive();
        uint64_t k = a.h.unique - 1000;
        CHECK(k < READS && !seen[k]);
        seen[k] = 1;
        check_data(a, off[k], SIZE);
    }
    rig_free();
}

/* The kernel may keep what it knows of the root, and is told when that changed. */
TEST(root_is_kept)
{
    struct fuse_getattr_in in = { 0 };
    struct fuse_attr_out out;
    struct {
        uint64_t nodeid;
        int64_t off, len;
    } told;
    struct answer a;

    rig_new(1, 30000);
    CHECK_EQ(vnd_vfs_umount(g->vfs, "/"), 0);
    CHECK_EQ(vnd_fusedev_root_changed(g->dev), 0);
    a = receive();
    CHECK(a.h.unique == 0 && a.h.error == 2 && a.len == sizeof(told)); /* FUSE_NOTIFY_INVAL_INODE */
    memcpy(&told, g->reply + sizeof(a.h), sizeof(told));
    CHECK(told.nodeid == 1 && told.off < 0);
    send_request(7, FUSE_OP_GETATTR, 1, &in, sizeof(in));
    a = receive();
    CHECK(a.h.unique == 7 && a.h.error == 0 && a.len == sizeof(out));
    memcpy(&out, g->reply + sizeof(a.h), sizeof(out));
    CHECK(out.attr_valid > 1000000);
    rig_free();
}

/* What no kernel sends is refused, not read past. */
TEST(malformed)
{
    struct fuse_in_header h = { .len = 5000, .opcode = FUSE_OP_GETATTR, .unique = 5, .nodeid = 1 };

    rig_new(1, 30000);
    CHECK_EQ(send(g->fd, &h, 10, 0), 10);
    CHECK_EQ(send(g->fd, &h, sizeof(h), 0), sizeof(h));
    CHECK_EQ(receive().h.error, -EINVAL);
    send_request(6, FUSE_OP_INTERRUPT, 0, "", 0);
    send_request(7, FUSE_OP_READ, 1ull << 48 | g->n.file, "x", 1);
    CHECK_EQ(receive().h.error, -EINVAL);
    rig_free();
}
