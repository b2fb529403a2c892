/* fuse_rig.h -- a session on a mount table with one worker and no transport; what tests ask of it and how they read the
 * answers. */
#ifndef FUSE_RIG_H
#define FUSE_RIG_H
#include "check.h"
#include "fake_req.h"
#include "v6_image.h"
#include "fs/vfs.h"

#define FLAGS (0x1u | 0x4u | 0x10u)
#define FLAG_XATTR 0x20u
#define YEAR_S (365ull * 24 * 3600)

static vnd_engine *engine;

BEFORE_EACH
{
    engine = vnd_engine_new(&(vnd_engine_cfg){ 0 });
    CHECK(engine);
}

AFTER_EACH
{
    vnd_engine_shutdown(engine);
    vnd_engine_free(engine);
}

/* One daemon: a mount table, a session on it, a worker, and the last reply. */
struct rig {
    vnd_vfs *vfs;
    struct fuse_session *s;
    struct fuse_worker w;
    struct img_nids n;
    struct fake_req f;
    enum req_verdict verdict;
    int32_t error; /* errno of the reply, positive */
    uint32_t len;  /* payload bytes */
    const uint8_t *data;
};

static inline void call_filled(struct rig *g)
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

static inline void call_cap(struct rig *g, uint32_t op, uint64_t nodeid, const void *body, uint32_t len,
                            uint32_t out_cap)
{
    fake_done(&g->f);
    fake_fill(&g->f, op, nodeid, body, len, out_cap);
    call_filled(g);
}

static inline void call(struct rig *g, uint32_t op, uint64_t nodeid, const void *body, uint32_t len)
{
    call_cap(g, op, nodeid, body, len, 8192);
}

static inline int error_of(struct rig *g, uint32_t op, uint64_t nodeid, const void *body, uint32_t len)
{
    call(g, op, nodeid, body, len);
    CHECK_EQ(g->verdict, REQ_REPLY);
    return g->error;
}

static inline struct fuse_init_out init(struct rig *g, uint32_t major, uint32_t minor, uint64_t flags)
{
    struct fuse_init_in in = { .major = major,
                               .minor = minor,
                               .max_readahead = 131072,
                               .flags = (uint32_t)flags,
                               .flags2 = (uint32_t)(flags >> 32) };
    struct fuse_init_out out = { 0 };

    CHECK_EQ(error_of(g, FUSE_OP_INIT, 0, &in, sizeof(in)), 0);
    memcpy(&out, g->data, g->len < sizeof(out) ? g->len : sizeof(out));
    return out;
}

static inline void rig_new(struct rig *g, int kind)
{
    memset(g, 0, sizeof(*g));
    g->vfs = vnd_vfs_new(engine, kind);
    CHECK(g->vfs);
    g->s = fuse_session_new(engine, g->vfs);
    CHECK(g->s);
    CHECK_EQ(fuse_worker_init(&g->w, engine, g->vfs), 0);
}

static inline void rig_free(struct rig *g)
{
    fake_done(&g->f);
    fuse_worker_free(&g->w, g->vfs);
    fuse_session_free(g->s);
    vnd_vfs_free(g->vfs);
}

static inline vnd_rafs *open_tree(uint64_t flags, struct img_nids *n)
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

static inline struct fuse_entry_out lookup(struct rig *g, uint64_t dir, const char *name)
{
    struct fuse_entry_out e = { 0 };

    CHECK_EQ(error_of(g, FUSE_OP_LOOKUP, dir, name, (uint32_t)strlen(name) + 1), 0);
    CHECK_EQ(g->len, sizeof(e));
    memcpy(&e, g->data, sizeof(e));
    return e;
}

/* A rafs session on one image at "/". */
static inline vnd_rafs *rig_rafs(struct rig *g, uint64_t flags)
{
    rig_new(g, VND_SESSION_RAFS);
    vnd_rafs *r = open_tree(flags, &g->n);

    CHECK_EQ(vnd_vfs_mount_rafs(g->vfs, "/", r), 0);
    init(g, 7, 38, ~0ull);
    return r;
}

static inline int xattr(struct rig *g, uint64_t nodeid, const char *name, uint32_t size)
{
    uint8_t body[64] = { 0 };
    uint32_t len = name ? (uint32_t)strlen(name) + 1 : 0;

    memcpy(body, &size, 4);
    if (name)
        memcpy(body + 8, name, len);
    return error_of(g, name ? FUSE_OP_GETXATTR : FUSE_OP_LISTXATTR, nodeid, body, 8 + len);
}

/* ---- listings */

struct seen {
    uint64_t ino, off;
    char name[256];
    struct fuse_entry_out e;
    uint32_t type;
};

/* One reply's entries; checks padding and bounds. */
static inline int parse_dir(struct rig *g, bool plus, struct seen *out, int max)
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
        for (uint32_t k = at + (uint32_t)sizeof(d) + d.namelen; k % 8; k++)
            CHECK_EQ(g->data[k], 0);
        out[n].ino = d.ino;
        out[n].off = d.off;
        out[n].type = d.type;
        at += (uint32_t)((sizeof(d) + d.namelen + 7) & ~7u);
        n++;
    }
    return n;
}

static inline int read_dir(struct rig *g, uint64_t nodeid, bool plus, uint64_t off, uint32_t size, struct seen *out,
                           int max)
{
    struct fuse_read_in in = { .offset = off, .size = size };

    if (error_of(g, plus ? FUSE_OP_READDIRPLUS : FUSE_OP_READDIR, nodeid, &in, sizeof(in)))
        return -g->error;
    CHECK(g->len <= size);
    return parse_dir(g, plus, out, max);
}

/* ---- a file system of zeroes, since bytes are the store's business */

#define ZERO_SIZE (2u << 20)

static inline int zero_extents(struct fs *fs, uint64_t ino, uint64_t off, uint32_t len, struct fs_extents *out)
{
    out->bytes = 0;
    if (off >= ZERO_SIZE)
        return 0;
    out->bytes = len < ZERO_SIZE - off ? len : (uint32_t)(ZERO_SIZE - off);
    out->at[0] = (struct extent){ .len = out->bytes };
    return 1;
}
static inline int zero_getattr(struct fs *fs, uint64_t ino, vnd_attr *out)
{
    *out = (vnd_attr){ .ino = ino, .mode = ino == 5 ? S_IFDIR | 0755 : S_IFREG | 0644, .size_bytes = ZERO_SIZE };
    return 0;
}
static inline int zero_lookup(struct fs *fs, uint64_t dir, const char *name, size_t len, vnd_attr *out)
{
    if (len == 2 && name[0] == '.')
        return zero_getattr(fs, 5, out);
    return len == 1 && (*name == 'z' || *name == 'd') ? zero_getattr(fs, *name == 'z' ? 6 : 5, out) : -ENOENT;
}
static inline uint64_t zero_root(struct fs *fs)
{
    return 5;
}
static inline bool zero_has_xattr(struct fs *fs)
{
    return false;
}
static const struct fs_ops zero_ops = { .name = "zero",
                                        .getattr = zero_getattr,
                                        .lookup = zero_lookup,
                                        .extents = zero_extents,
                                        .root = zero_root,
                                        .has_xattr = zero_has_xattr };

#endif
