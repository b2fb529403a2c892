/* test_fuse.c -- the FUSE session over a mount table: every answer that the kernel can see, without a kernel. */
#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>

#include "check.h"
#include "fake_req.h"
#include "v6_image.h"
#include "vfs.h"

#define FLAGS (0x1u | 0x4u | 0x10u)
#define FLAG_XATTR 0x20u
#define YEAR_S (365ull * 24 * 3600)

static vnd_engine *engine;

/* One daemon: a mount table, a session on it, a worker, and the last reply. */
struct rig {
    vnd_vfs *vfs;
    struct fuse_session *s;
    struct fuse_worker w;
    struct img_nids n;
    struct fake_req f;
    enum req_verdict verdict;
    int32_t error;              /* errno of the reply, positive */
    uint32_t len;               /* payload bytes */
    const uint8_t *data;
};

static void call_filled(struct rig *g)
{
    struct fuse_out_header h;

    g->f.r.session_gen = fuse_session_gen(g->s);
    g->verdict = fuse_session_serve(g->s, &g->w, &g->f.r);
    g->error = 0;
    g->len = 0;
    g->data = NULL;
    if (g->verdict != REQ_REPLY) {
        CHECK_EQ(g->f.r.out_len, 0);
        return;
    }
    CHECK(g->f.r.out_len >= sizeof(h) && g->f.r.out_len <= g->f.r.out_cap);
    memcpy(&h, g->f.out, sizeof(h));
    CHECK_EQ(h.len, g->f.r.out_len);
    CHECK_EQ(h.unique, 77);
    CHECK(h.error <= 0 && h.error > -512);
    CHECK(h.error == 0 || h.len == sizeof(h));
    g->error = -h.error;
    g->len = h.len - (uint32_t)sizeof(h);
    g->data = g->f.out + sizeof(h);
}

static void call_cap(struct rig *g, uint32_t op, uint64_t nodeid, const void *body, uint32_t len, uint32_t out_cap)
{
    fake_done(&g->f);
    fake_fill(&g->f, op, nodeid, body, len, out_cap);
    call_filled(g);
}

static void call(struct rig *g, uint32_t op, uint64_t nodeid, const void *body, uint32_t len)
{
    call_cap(g, op, nodeid, body, len, 8192);
}

static int error_of(struct rig *g, uint32_t op, uint64_t nodeid, const void *body, uint32_t len)
{
    call(g, op, nodeid, body, len);
    CHECK_EQ(g->verdict, REQ_REPLY);
    return g->error;
}

static struct fuse_init_out init(struct rig *g, uint32_t major, uint32_t minor, uint64_t flags)
{
    struct fuse_init_in in = { .major = major, .minor = minor, .max_readahead = 131072, .flags = (uint32_t)flags,
                               .flags2 = (uint32_t)(flags >> 32) };
    struct fuse_init_out out = { 0 };

    CHECK_EQ(error_of(g, FUSE_OP_INIT, 0, &in, sizeof(in)), 0);
    memcpy(&out, g->data, g->len < sizeof(out) ? g->len : sizeof(out));
    return out;
}

static void rig_new(struct rig *g, int kind)
{
    memset(g, 0, sizeof(*g));
    g->vfs = vnd_vfs_new(engine, kind);
    CHECK(g->vfs);
    g->s = fuse_session_new(engine, g->vfs);
    CHECK(g->s);
    CHECK_EQ(fuse_worker_init(&g->w, engine, g->vfs), 0);
}

static void rig_free(struct rig *g)
{
    fake_done(&g->f);
    fuse_worker_free(&g->w, g->vfs);
    fuse_session_free(g->s);
    vnd_vfs_free(g->vfs);
}

static vnd_rafs *open_tree(uint64_t flags, struct img_nids *n)
{
    char path[32], err[VND_ERR_MAX] = "";
    struct img m;
    int cause, fd;

    img_init(&m, flags);
    *n = img_tree(&m);
    fd = img_fd(m.b, sizeof(m.b), path);
    vnd_rafs *r = vnd_rafs_open(engine, path, NULL, NULL, &cause, err, sizeof(err));

    close(fd);
    CHECK(r);
    return r;
}

static struct fuse_entry_out lookup(struct rig *g, uint64_t dir, const char *name)
{
    struct fuse_entry_out e = { 0 };

    CHECK_EQ(error_of(g, FUSE_OP_LOOKUP, dir, name, (uint32_t)strlen(name) + 1), 0);
    CHECK_EQ(g->len, sizeof(e));
    memcpy(&e, g->data, sizeof(e));
    return e;
}

/* ---- session life */

static void test_init(void)
{
    struct rig g;
    struct fuse_init_out out;
    uint64_t guest61 = 0xb7bfffffbull;      /* what a 6.1 guest offers */
    uint32_t gen;

    rig_new(&g, VND_SESSION_RAFS);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 1, NULL, 0), EIO);
    CHECK_EQ(error_of(&g, FUSE_OP_INIT, 0, "\7\0\0\0", 4), EINVAL);
    out = init(&g, 8, 0, 0);
    CHECK_EQ(out.major, 7);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 1, NULL, 0), EIO);      /* not yet: the kernel comes again */
    CHECK_EQ(error_of(&g, FUSE_OP_INIT, 0, "\6\0\0\0\1\0\0\0\0\0\0\0\0\0\0\0", 16), EPROTO);
    gen = fuse_session_gen(g.s);
    out = init(&g, 7, 38, guest61 | FUSE_INIT_INIT_EXT);
    CHECK_EQ(fuse_session_gen(g.s), gen);
    CHECK_EQ(g.len, 64);
    CHECK_EQ(out.minor, 38);
    CHECK_EQ(out.max_readahead, 131072);
    CHECK_EQ(out.max_pages, 256);
    CHECK_EQ(out.max_write, 4096);
    CHECK(out.max_background >= 256);
    CHECK_EQ(out.time_gran, 1);
    CHECK_EQ(out.flags2, 0);
    CHECK_EQ(out.flags & ~(uint32_t)guest61 & ~(uint32_t)FUSE_INIT_INIT_EXT, 0);
    CHECK(out.flags & FUSE_INIT_EXPLICIT_INVAL_DATA);
    CHECK(!(out.flags & FUSE_INIT_AUTO_INVAL_DATA));
    CHECK(out.flags & FUSE_INIT_CACHE_SYMLINKS && out.flags & FUSE_INIT_DO_READDIRPLUS);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 1, NULL, 0), 0);
    /* A second INIT: a new session, whatever belonged to the old one gets no answer. */
    out = init(&g, 7, 45, ~0ull);
    CHECK_EQ(out.minor, 38);
    CHECK_EQ(fuse_session_gen(g.s), gen + 1);
    fake_done(&g.f);
    fake_fill(&g.f, FUSE_OP_GETATTR, 1, NULL, 0, 8192);
    g.f.r.session_gen = gen;
    CHECK_EQ(fuse_session_serve(g.s, &g.w, &g.f.r), REQ_NOREPLY);
    CHECK_EQ(fuse_session_fail(g.s, &g.w, &g.f.r, EIO), REQ_NOREPLY);
    out = init(&g, 7, 12, 0);
    CHECK_EQ(g.len, 24);
    CHECK_EQ(out.minor, 12);
    CHECK_EQ(out.flags, 0);
    CHECK_EQ(error_of(&g, FUSE_OP_DESTROY, 0, NULL, 0), 0);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 1, NULL, 0), EIO);
    init(&g, 7, 38, 0);
    fuse_session_reset(g.s);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 1, NULL, 0), EIO);
    rig_free(&g);
    rig_new(&g, VND_SESSION_MIXED);
    out = init(&g, 7, 38, guest61);
    CHECK(out.flags & FUSE_INIT_AUTO_INVAL_DATA);
    CHECK(!(out.flags & FUSE_INIT_EXPLICIT_INVAL_DATA));
    rig_free(&g);
}

/* A rafs session on one image at "/". */
static vnd_rafs *rig_rafs(struct rig *g, uint64_t flags)
{
    rig_new(g, VND_SESSION_RAFS);
    vnd_rafs *r = open_tree(flags, &g->n);

    CHECK_EQ(vnd_vfs_mount_rafs(g->vfs, "/", r), 0);
    init(g, 7, 38, ~0ull);
    return r;
}

static void test_malformed(void)
{
    struct rig g;
    vnd_rafs *r = rig_rafs(&g, FLAGS);
    char longer[600];

    CHECK_EQ(error_of(&g, FUSE_OP_MAX, 1, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, 4096, 1, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, UINT32_MAX, 1, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, 0, 1, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 2ull << 48, NULL, 0), ESTALE);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 0, NULL, 0), ESTALE);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 1ull << 48 | 0xffffffffffff, NULL, 0), EIO);
    CHECK_EQ(error_of(&g, FUSE_OP_READ, 1, "abc", 3), EINVAL);
    fake_done(&g.f);
    fake_fill(&g.f, FUSE_OP_GETATTR, 1, "0123456789abcdef", 16, 8192);
    g.f.r.in.len = 40;
    call_filled(&g);
    CHECK_EQ(g.error, EINVAL);
    /* Room: none for a header, only for a header, one byte short. */
    call_cap(&g, FUSE_OP_GETATTR, 1, NULL, 0, 15);
    CHECK_EQ(g.verdict, REQ_NOREPLY);
    call_cap(&g, FUSE_OP_GETATTR, 1, NULL, 0, 16);
    CHECK_EQ(g.error, EINVAL);
    call_cap(&g, FUSE_OP_GETATTR, 1, NULL, 0, 119);
    CHECK_EQ(g.error, EINVAL);
    call_cap(&g, FUSE_OP_GETATTR, 1, NULL, 0, 120);
    CHECK_EQ(g.error, 0);
    call_cap(&g, FUSE_OP_FORGET, 1, NULL, 0, 0);
    CHECK_EQ(g.verdict, REQ_NOREPLY);
    call_cap(&g, FUSE_OP_BATCH_FORGET, 1, "garbage", 7, 8192);
    CHECK_EQ(g.verdict, REQ_NOREPLY);
    call(&g, FUSE_OP_INTERRUPT, 1, "12345678", 8);
    CHECK_EQ(g.verdict, REQ_NOREPLY);
    /* Names. */
    memset(longer, 'a', sizeof(longer));
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, 1, "\0\0", 2), EINVAL);
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, 1, "abc", 3), EINVAL);
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, 1, "a/b", 4), EINVAL);
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, 1, longer, 600), ENAMETOOLONG);
    longer[256] = 0;
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, 1, longer, 257), ENAMETOOLONG);
    longer[255] = 0;
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, 1, longer, 256), 0);      /* absent, and said so for good */
    rig_free(&g);
    vnd_rafs_free(r);
}

/* ---- inside an image */

static void test_lookup_and_attr(void)
{
    struct rig g;
    vnd_rafs *r = rig_rafs(&g, FLAGS);
    uint64_t base = 1ull << 48;
    struct fuse_attr_out attr;
    struct fuse_entry_out e = lookup(&g, 1, "file");

    CHECK_EQ(e.nodeid, base | g.n.file);
    CHECK_EQ(e.attr.ino, e.nodeid);
    CHECK_EQ(e.entry_valid, YEAR_S);
    CHECK_EQ(e.attr_valid, YEAR_S);
    CHECK_EQ(e.attr.size, IMG_FILE_SIZE);
    CHECK_EQ(e.attr.mode, S_IFREG | 0644);
    CHECK_EQ(e.attr.nlink, 2);
    CHECK_EQ(e.attr.mtimensec, 123456789);
    CHECK_EQ(lookup(&g, 1, "hard").nodeid, e.nodeid);
    e = lookup(&g, 1, "nothing");
    CHECK_EQ(e.nodeid, 0);
    CHECK_EQ(e.entry_valid, YEAR_S);
    CHECK_EQ(lookup(&g, 1, ".").nodeid, 1);
    CHECK_EQ(lookup(&g, 1, "..").nodeid, 1);
    CHECK_EQ(lookup(&g, base | g.n.sub, "..").nodeid, 1);
    CHECK_EQ(lookup(&g, base | g.n.deep, "..").nodeid, base | g.n.sub);
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, base | g.n.file, "x", 2), ENOTDIR);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 1, NULL, 0), 0);
    memcpy(&attr, g.data, sizeof(attr));
    CHECK_EQ(attr.attr.ino, 1);
    CHECK_EQ(attr.attr_valid, YEAR_S);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, base | IMG_ROOT, NULL, 0), 0);
    memcpy(&attr, g.data, sizeof(attr));
    CHECK_EQ(attr.attr.ino, 1);
    CHECK_EQ(error_of(&g, FUSE_OP_READLINK, base | g.n.link, NULL, 0), 0);
    CHECK(g.len == 11 && memcmp(g.data, "target/path", 11) == 0);
    CHECK_EQ(error_of(&g, FUSE_OP_READLINK, 1, NULL, 0), EINVAL);
    CHECK_EQ(error_of(&g, FUSE_OP_STATFS, 1, NULL, 0), 0);
    CHECK_EQ(g.len, 80);
    rig_free(&g);
    vnd_rafs_free(r);
}

static void test_refusals(void)
{
    static const uint32_t erofs[] = { FUSE_OP_SETATTR, FUSE_OP_SYMLINK, FUSE_OP_MKNOD, FUSE_OP_MKDIR, FUSE_OP_UNLINK,
        FUSE_OP_RMDIR, FUSE_OP_RENAME, FUSE_OP_LINK, FUSE_OP_WRITE, FUSE_OP_SETXATTR, FUSE_OP_REMOVEXATTR,
        FUSE_OP_CREATE, FUSE_OP_FALLOCATE, FUSE_OP_RENAME2, FUSE_OP_COPY_FILE_RANGE, FUSE_OP_TMPFILE };
    struct fuse_open_in rdwr = { .flags = O_RDWR }, trunc = { .flags = O_TRUNC }, read_only = { 0 };
    struct rig g;
    vnd_rafs *r = rig_rafs(&g, FLAGS);
    uint64_t file = 1ull << 48 | g.n.file;

    for (size_t i = 0; i < sizeof(erofs) / sizeof(erofs[0]); i++) {
        CHECK_EQ(error_of(&g, erofs[i], file, NULL, 0), EROFS);
    }
    CHECK_EQ(error_of(&g, FUSE_OP_IOCTL, file, NULL, 0), ENOTTY);
    CHECK_EQ(error_of(&g, FUSE_OP_SETUPMAPPING, file, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_STATX, file, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_OPEN, file, &rdwr, 8), EROFS);
    CHECK_EQ(error_of(&g, FUSE_OP_OPEN, file, &trunc, 8), EROFS);
    CHECK_EQ(error_of(&g, FUSE_OP_OPEN, file, &read_only, 8), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_OPENDIR, 1, &read_only, 8), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_FLUSH, file, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_RELEASE, file, NULL, 0), 0);
    CHECK_EQ(error_of(&g, FUSE_OP_SYNCFS, file, NULL, 0), 0);
    rig_free(&g);
    vnd_rafs_free(r);
}

static void test_access_and_lseek(void)
{
    struct fuse_access_in write = { .mask = 2 }, exec = { .mask = 1 }, reading = { .mask = 4 };
    struct fuse_lseek_in data = { .offset = 5, .whence = SEEK_DATA }, hole = { .offset = 5, .whence = SEEK_HOLE },
                         past = { .offset = IMG_FILE_SIZE, .whence = SEEK_DATA }, bad = { .whence = 9 };
    struct rig g;
    vnd_rafs *r = rig_rafs(&g, FLAGS);
    uint64_t file = 1ull << 48 | g.n.file, off;

    CHECK_EQ(error_of(&g, FUSE_OP_ACCESS, file, &write, 8), EROFS);
    CHECK_EQ(error_of(&g, FUSE_OP_ACCESS, file, &exec, 8), EACCES);     /* root needs one x bit */
    CHECK_EQ(error_of(&g, FUSE_OP_ACCESS, file, &reading, 8), 0);
    CHECK_EQ(error_of(&g, FUSE_OP_ACCESS, 1, &exec, 8), 0);
    CHECK_EQ(error_of(&g, FUSE_OP_LSEEK, file, &data, 24), 0);
    memcpy(&off, g.data, 8);
    CHECK_EQ(off, 5);
    CHECK_EQ(error_of(&g, FUSE_OP_LSEEK, file, &hole, 24), 0);
    memcpy(&off, g.data, 8);
    CHECK_EQ(off, IMG_FILE_SIZE);
    CHECK_EQ(error_of(&g, FUSE_OP_LSEEK, file, &past, 24), ENXIO);
    CHECK_EQ(error_of(&g, FUSE_OP_LSEEK, file, &bad, 24), EINVAL);
    rig_free(&g);
    vnd_rafs_free(r);
}

static int xattr(struct rig *g, uint64_t nodeid, const char *name, uint32_t size)
{
    uint8_t body[64] = { 0 };
    uint32_t len = name ? (uint32_t)strlen(name) + 1 : 0;

    memcpy(body, &size, 4);
    if (name) {
        memcpy(body + 8, name, len);
    }
    return error_of(g, name ? FUSE_OP_GETXATTR : FUSE_OP_LISTXATTR, nodeid, body, 8 + len);
}

static void test_xattrs(void)
{
    struct rig g;
    vnd_rafs *r = rig_rafs(&g, FLAGS | FLAG_XATTR);
    uint64_t with = 1ull << 48 | g.n.xfile, without = 1ull << 48 | g.n.file;
    uint32_t size;

    CHECK_EQ(xattr(&g, with, "user.foo", 0), 0);
    memcpy(&size, g.data, 4);
    CHECK_EQ(size, 5);
    CHECK_EQ(g.len, 8);
    CHECK_EQ(xattr(&g, with, "user.foo", 5), 0);
    CHECK(g.len == 5 && memcmp(g.data, "hello", 5) == 0);
    CHECK_EQ(xattr(&g, with, "user.foo", 4), ERANGE);
    CHECK_EQ(xattr(&g, with, "trusted.overlay.opaque", 100), ENODATA);
    CHECK_EQ(xattr(&g, without, "user.foo", 100), ENODATA);
    CHECK_EQ(xattr(&g, with, NULL, 0), 0);
    memcpy(&size, g.data, 4);
    CHECK_EQ(size, 22);
    CHECK_EQ(xattr(&g, with, NULL, 100), 0);
    CHECK_EQ(g.len, 22);
    CHECK_EQ(xattr(&g, with, NULL, 21), ERANGE);
    CHECK_EQ(xattr(&g, without, NULL, 100), 0);
    CHECK_EQ(g.len, 0);
    CHECK_EQ(error_of(&g, FUSE_OP_GETXATTR, with, "\0\0\0\0\0\0\0\0ab", 10), EINVAL);
    rig_free(&g);
    vnd_rafs_free(r);
    r = rig_rafs(&g, FLAGS);
    CHECK_EQ(xattr(&g, 1, "user.foo", 5), ENOSYS);
    CHECK_EQ(xattr(&g, 1, NULL, 5), ENOSYS);
    rig_free(&g);
    vnd_rafs_free(r);
}

/* ---- listings */

struct seen { uint64_t ino, off; char name[256]; struct fuse_entry_out e; uint32_t type; };

/* One reply's entries; checks padding and bounds. */
static int parse_dir(struct rig *g, bool plus, struct seen *out, int max)
{
    uint32_t at = 0;
    int n = 0;

    while (at < g->len) {
        struct fuse_dirent d;

        CHECK(n < max && g->len - at >= sizeof(d) + (plus ? 128 : 0));
        if (plus) {
            memcpy(&out[n].e, g->data + at, sizeof(out[n].e));
            at += 128;
        }
        memcpy(&d, g->data + at, sizeof(d));
        CHECK(d.namelen >= 1 && d.namelen <= 255);
        CHECK(g->len - at >= ((sizeof(d) + d.namelen + 7) & ~7u));
        memcpy(out[n].name, g->data + at + sizeof(d), d.namelen);
        out[n].name[d.namelen] = 0;
        for (uint32_t k = at + (uint32_t)sizeof(d) + d.namelen; k % 8; k++) {
            CHECK_EQ(g->data[k], 0);
        }
        out[n].ino = d.ino;
        out[n].off = d.off;
        out[n].type = d.type;
        at += (uint32_t)((sizeof(d) + d.namelen + 7) & ~7u);
        n++;
    }
    return n;
}

static int read_dir(struct rig *g, uint64_t nodeid, bool plus, uint64_t off, uint32_t size, struct seen *out, int max)
{
    struct fuse_read_in in = { .offset = off, .size = size };

    if (error_of(g, plus ? FUSE_OP_READDIRPLUS : FUSE_OP_READDIR, nodeid, &in, sizeof(in))) {
        return -g->error;
    }
    CHECK(g->len <= size);
    return parse_dir(g, plus, out, max);
}

static void test_listings(void)
{
    static struct seen d[300];
    struct rig g;
    vnd_rafs *r = rig_rafs(&g, FLAGS);
    uint64_t big = 1ull << 48 | g.n.big;

    for (int plus = 0; plus < 2; plus++) {
        /* Sizes that end at every place of an entry. */
        for (uint32_t size = 168; size < 168 + 168; size += 8) {
            uint64_t off = 0;
            int total = 0, n;

            while ((n = read_dir(&g, big, plus, off, size, d, 300)) > 0) {
                for (int i = 0; i < n; i++, total++) {
                    char want[16];

                    snprintf(want, sizeof(want), total == 0 ? "." : total == 1 ? ".." : "n%03d", total - 2);
                    CHECK(strcmp(d[i].name, want) == 0);
                    CHECK_EQ(d[i].type, total < 2 ? DT_DIR : DT_REG);
                    if (plus) {
                        CHECK_EQ(d[i].e.nodeid, total < 2 ? 0 : d[i].ino);
                        CHECK_EQ(d[i].e.entry_valid, total < 2 ? 0 : YEAR_S);
                    }
                }
                off = d[n - 1].off;
            }
            CHECK_EQ(n, 0);
            CHECK_EQ(total, IMG_MANY + 2);
        }
        CHECK_EQ(read_dir(&g, big, plus, 0, 24, d, 300), -EINVAL);  /* not even one: no end, an error */
        CHECK_EQ(read_dir(&g, 1ull << 48 | g.n.file, plus, 0, 4096, d, 300), -ENOTDIR);
        CHECK_EQ(read_dir(&g, big, plus, UINT64_MAX, 4096, d, 300), 0);
        CHECK_EQ(read_dir(&g, big, plus, 123456, 4096, d, 300), 0);
    }
    CHECK_EQ(read_dir(&g, 1, false, 0, 4096, d, 300), 10);
    CHECK_EQ(d[0].ino, 1);
    CHECK_EQ(d[1].ino, 1);
    CHECK_EQ(d[5].ino, 1ull << 48 | g.n.file);
    CHECK_EQ(d[5].ino, d[6].ino);
    rig_free(&g);
    vnd_rafs_free(r);
}

/* ---- reads: a file system of zeroes, since bytes are the store's business */

#define ZERO_SIZE (2u << 20)

static int zero_extents(struct fs *fs, uint64_t ino, uint64_t off, uint32_t len, struct extent *x, int max, uint32_t *got)
{
    *got = 0;
    if (off >= ZERO_SIZE) {
        return 0;
    }
    *got = len < ZERO_SIZE - off ? len : (uint32_t)(ZERO_SIZE - off);
    *x = (struct extent){ .len = *got };
    return 1;
}
static int zero_getattr(struct fs *fs, uint64_t ino, vnd_attr *out)
{
    *out = (vnd_attr){ .ino = ino, .mode = ino == 5 ? S_IFDIR | 0755 : S_IFREG | 0644, .size_bytes = ZERO_SIZE };
    return 0;
}
static int zero_lookup(struct fs *fs, uint64_t dir, const char *name, size_t len, vnd_attr *out)
{
    if (len == 2 && name[0] == '.') {
        return zero_getattr(fs, 5, out);
    }
    return len == 1 && (*name == 'z' || *name == 'd') ? zero_getattr(fs, *name == 'z' ? 6 : 5, out) : -ENOENT;
}
static uint64_t zero_root(struct fs *fs)
{
    return 5;
}
static int zero_has_xattr(struct fs *fs)
{
    return 0;
}
static const struct fs_ops zero_ops = { .name = "zero", .getattr = zero_getattr, .lookup = zero_lookup,
    .extents = zero_extents, .root = zero_root, .has_xattr = zero_has_xattr };

static int read_at(struct rig *g, uint64_t nodeid, uint64_t off, uint32_t size, uint32_t out_cap)
{
    struct fuse_read_in in = { .offset = off, .size = size };

    call_cap(g, FUSE_OP_READ, nodeid, &in, sizeof(in), out_cap);
    return g->error ? -g->error : (int)g->len;
}

static void test_reads(void)
{
    struct fs zero = { &zero_ops };
    struct rig g;
    uint64_t file = 1ull << 48 | 6;

    rig_new(&g, VND_SESSION_RAFS);
    CHECK_EQ(vfs_mount(g.vfs, "/", &zero), 0);
    init(&g, 7, 38, ~0ull);
    CHECK_EQ(read_at(&g, file, 0, 4096, 16 + 4096), 4096);
    CHECK(g.data[0] == 0 && g.data[4095] == 0);
    CHECK_EQ(g.f.dirty, 4096);
    CHECK_EQ(read_at(&g, file, 0, 1u << 20, 16 + (1u << 20)), 1 << 20);
    CHECK_EQ(read_at(&g, file, ZERO_SIZE - 10, 4096, 16 + 10), 10);     /* the end, and room for it */
    CHECK_EQ(read_at(&g, file, ZERO_SIZE, 4096, 16), 0);
    CHECK_EQ(read_at(&g, file, UINT64_MAX, 4096, 8192), 0);
    /* A short reply would be taken for the end of the file: an error instead. */
    CHECK_EQ(read_at(&g, file, 0, 4096, 16 + 4095), -EINVAL);
    CHECK_EQ(read_at(&g, file, 0, 0xffffffff, 16 + (2u << 20)), -EINVAL);
    CHECK_EQ(read_at(&g, file, 0, 4096, 16), -EINVAL);
    CHECK_EQ(read_at(&g, file, 0, 0, 16), 0);
    rig_free(&g);
}

/* ---- mounts */

static void test_pseudo_and_mixed(void)
{
    struct fuse_open_in read_only = { 0 };
    struct fuse_open_out opened;
    static struct seen d[20];
    struct img_nids n;
    struct rig g;
    vnd_rafs *a = open_tree(FLAGS, &n), *b = open_tree(FLAGS, &n);
    struct fuse_entry_out e;
    uint64_t rafs_dir, cid, root_a, root_b, file;

    rig_new(&g, VND_SESSION_MIXED);
    init(&g, 7, 38, ~0ull);
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, 1, "rafs", 5), ENOENT);       /* never cached: it may come */
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "rafs", a), -EINVAL);
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "/rafs/../x", a), -EINVAL);
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "/rafs//c1/lowerdir/", a), 0);
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "/rafs/c1/lowerdir", b), -EEXIST);
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "/rafs", b), -EBUSY);
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "/", b), -EBUSY);
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "/rafs/c2", b), 0);
    e = lookup(&g, 1, "rafs");
    CHECK(e.nodeid > 1 && e.nodeid >> 48 == 0);
    CHECK_EQ(e.entry_valid, 0);
    CHECK_EQ(e.attr_valid, 0);
    CHECK_EQ(e.attr.mode, S_IFDIR | 0755);
    rafs_dir = e.nodeid;
    cid = lookup(&g, rafs_dir, "c1").nodeid;
    e = lookup(&g, cid, "lowerdir");
    root_a = e.nodeid;
    CHECK_EQ(root_a, 1ull << 48 | IMG_ROOT);
    CHECK_EQ(e.entry_valid, 0);             /* the mount may go */
    CHECK_EQ(e.attr_valid, YEAR_S);
    root_b = lookup(&g, rafs_dir, "c2").nodeid;
    CHECK_EQ(root_b, 2ull << 48 | IMG_ROOT);
    CHECK_EQ(lookup(&g, root_a, "..").nodeid, cid);
    CHECK_EQ(lookup(&g, cid, "..").nodeid, rafs_dir);
    CHECK_EQ(lookup(&g, rafs_dir, "..").nodeid, 1);
    CHECK_EQ(lookup(&g, 1, "..").nodeid, 1);
    CHECK(lookup(&g, root_a, "file").nodeid != lookup(&g, root_b, "file").nodeid);

    /* Listings show what lookups give, over mount points in both directions. */
    CHECK_EQ(read_dir(&g, rafs_dir, true, 0, 4096, d, 20), 4);
    CHECK(strcmp(d[2].name, "c1") == 0 && d[2].ino == cid && d[2].e.nodeid == cid && d[2].e.attr_valid == 0);
    CHECK(strcmp(d[3].name, "c2") == 0 && d[3].ino == root_b && d[3].e.nodeid == root_b);
    CHECK_EQ(d[3].e.attr.ino, root_b);
    CHECK_EQ(d[3].e.attr.nlink, 4);
    CHECK_EQ(d[3].e.entry_valid, 0);
    CHECK_EQ(read_dir(&g, rafs_dir, true, d[2].off, 4096, d, 20), 1);
    CHECK_EQ(read_dir(&g, root_a, false, 0, 4096, d, 20), 10);
    CHECK_EQ(d[0].ino, root_a);
    CHECK_EQ(d[1].ino, cid);
    CHECK_EQ(d[5].ino, 1ull << 48 | n.file);

    /* Nothing that a read-write neighbour has is ever ENOSYS. */
    file = 1ull << 48 | n.file;
    CHECK_EQ(error_of(&g, FUSE_OP_OPEN, file, &read_only, 8), 0);
    memcpy(&opened, g.data, sizeof(opened));
    CHECK(opened.open_flags & FUSE_OPEN_KEEP_CACHE);
    CHECK_EQ(opened.fh, 0);
    CHECK_EQ(error_of(&g, FUSE_OP_OPENDIR, root_a, &read_only, 8), 0);
    memcpy(&opened, g.data, sizeof(opened));
    CHECK(opened.open_flags & FUSE_OPEN_CACHE_DIR);
    CHECK_EQ(error_of(&g, FUSE_OP_OPENDIR, rafs_dir, &read_only, 8), 0);
    memcpy(&opened, g.data, sizeof(opened));
    CHECK_EQ(opened.open_flags, 0);
    CHECK_EQ(error_of(&g, FUSE_OP_OPEN, root_a, &read_only, 8), EISDIR);
    CHECK_EQ(error_of(&g, FUSE_OP_OPENDIR, file, &read_only, 8), ENOTDIR);
    CHECK_EQ(error_of(&g, FUSE_OP_FLUSH, file, NULL, 0), 0);
    CHECK_EQ(error_of(&g, FUSE_OP_FSYNC, file, NULL, 0), 0);
    CHECK_EQ(error_of(&g, FUSE_OP_FSYNCDIR, root_a, NULL, 0), 0);
    CHECK_EQ(xattr(&g, file, "user.foo", 5), ENODATA);
    CHECK_EQ(xattr(&g, file, NULL, 5), 0);
    CHECK_EQ(xattr(&g, rafs_dir, "user.foo", 5), ENODATA);
    CHECK_EQ(xattr(&g, rafs_dir, NULL, 0), 0);
    CHECK_EQ(error_of(&g, FUSE_OP_MKDIR, rafs_dir, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_MKDIR, 1, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_MKDIR, root_a, NULL, 0), EROFS);
    CHECK_EQ(error_of(&g, FUSE_OP_UNLINK, rafs_dir, NULL, 0), EROFS);

    CHECK_EQ(vnd_vfs_umount(g.vfs, "/rafs/c1"), -ENOENT);
    CHECK_EQ(vnd_vfs_umount(g.vfs, "/rafs/c1/lowerdir"), 0);
    vnd_rafs_free(a);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, file, NULL, 0), ESTALE);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, cid, NULL, 0), ESTALE);      /* nothing needed it any more */
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, rafs_dir, "c1", 3), ENOENT);
    CHECK_EQ(lookup(&g, rafs_dir, "c2").nodeid, root_b);
    a = open_tree(FLAGS, &n);
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "/rafs/c1/lowerdir", a), 0);
    cid = lookup(&g, rafs_dir, "c1").nodeid;
    CHECK_EQ(lookup(&g, cid, "lowerdir").nodeid >> 48, 3);              /* serials are never used again */
    rig_free(&g);
    vnd_rafs_free(a);
    vnd_rafs_free(b);
}

/* Mounts on directories of other mounts. */
static void test_nested(void)
{
    struct fs zero = { &zero_ops };
    static struct seen d[20];
    struct rig g;
    vnd_rafs *r = rig_rafs(&g, FLAGS);
    struct fuse_entry_out e;
    uint64_t sub = 1ull << 48 | g.n.sub;

    CHECK_EQ(vfs_mount(g.vfs, "/absent", &zero), -ENOENT);
    CHECK_EQ(vfs_mount(g.vfs, "/file", &zero), -ENOTDIR);
    CHECK_EQ(vfs_mount(g.vfs, "/sub/deep", &zero), 0);
    e = lookup(&g, sub, "deep");
    CHECK_EQ(e.nodeid, 2ull << 48 | 5);
    CHECK_EQ(e.entry_valid, 0);
    CHECK_EQ(lookup(&g, e.nodeid, "..").nodeid, sub);
    CHECK_EQ(read_dir(&g, sub, true, 0, 4096, d, 20), 3);
    CHECK_EQ(d[2].e.nodeid, 2ull << 48 | 5);
    CHECK_EQ(d[2].e.attr.size, ZERO_SIZE);
    CHECK_EQ(vnd_vfs_umount(g.vfs, "/"), -EBUSY);
    CHECK_EQ(vnd_vfs_umount(g.vfs, "/sub/deep"), 0);
    CHECK_EQ(lookup(&g, sub, "deep").nodeid, 1ull << 48 | g.n.deep);
    CHECK_EQ(vnd_vfs_umount(g.vfs, "/"), 0);
    CHECK_EQ(vnd_vfs_umount(g.vfs, "/"), -ENOENT);
    rig_free(&g);
    vnd_rafs_free(r);
}

/* ---- mounts come and go under requests: under a sanitizer, a use of what was freed shows */

struct racer { struct rig *g; _Atomic int *stop; uint64_t done; };

static void *race(void *arg)
{
    struct racer *me = arg;
    struct fuse_worker w;
    struct fake_req f;

    CHECK_EQ(fuse_worker_init(&w, engine, me->g->vfs), 0);
    for (uint64_t nodeid = 1; !atomic_load(me->stop); nodeid = nodeid == 1 ? 2 : 1) {
        struct fuse_read_in in = { .size = 4096 };

        fake_fill(&f, FUSE_OP_READDIRPLUS, nodeid, &in, sizeof(in), 8192);
        f.r.session_gen = fuse_session_gen(me->g->s);
        CHECK_EQ(fuse_session_serve(me->g->s, &w, &f.r), REQ_REPLY);
        fake_done(&f);
        me->done++;
    }
    fuse_worker_free(&w, me->g->vfs);
    return NULL;
}

static void test_mounts_under_load(void)
{
    _Atomic int stop = 0;
    struct img_nids n;
    struct rig g;
    struct racer racers[2] = { { &g, &stop, 0 }, { &g, &stop, 0 } };
    pthread_t threads[2];

    rig_new(&g, VND_SESSION_MIXED);
    init(&g, 7, 38, ~0ull);
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(pthread_create(&threads[i], NULL, race, &racers[i]), 0);
    }
    for (int i = 0; i < 100; i++) {
        vnd_rafs *r = open_tree(FLAGS, &n);

        CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, i % 2 ? "/a" : "/a/b", r), 0);
        sched_yield();
        CHECK_EQ(vnd_vfs_umount(g.vfs, i % 2 ? "/a" : "/a/b"), 0);
        vnd_rafs_free(r);
    }
    atomic_store(&stop, 1);
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
    }
    rig_free(&g);
}

int main(void)
{
    engine = vnd_engine_new(&(vnd_engine_cfg){ 0 });
    CHECK(engine);
    test_init();
    test_malformed();
    test_lookup_and_attr();
    test_refusals();
    test_access_and_lseek();
    test_xattrs();
    test_listings();
    test_reads();
    test_pseudo_and_mixed();
    test_nested();
    test_mounts_under_load();
    vnd_engine_shutdown(engine);
    vnd_engine_free(engine);
    puts("test_fuse: ok");
    return 0;
}
