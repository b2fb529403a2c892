/* fuse/ops.c -- the FUSE operations over a vfs; see fuse_ops.h. No allocation, no lock. */
#include "fuse/internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fs/pseudo.h"

#define BLKSIZE 4096

static bool in_rafs_session(const struct fuse_call *c)
{
    return vfs_session_kind(c->s->vfs) == VND_SESSION_RAFS;
}

/* A file system's own error. EIO says that its metadata is not sound, which its owner should hear of. */
static enum req_verdict reply_fs_error(struct fuse_call *c, int rc)
{
    if (rc == -EIO && !c->node.fs->ops->rw) {
        engine_say(c->s->engine, 30, VND_CAUSE_FORMAT,
                   "%s: EIO to a reader: the image is malformed there (`check` "
                   "tells where), or a guest asks for an inode that is not in it",
                   c->node.fs->label ? c->node.fs->label : c->node.fs->ops->name);
    }
    return fuse_reply_error(c, -rc);
}

static void fill_attr(struct fuse_attr *a, const vnd_attr *in, uint64_t nodeid)
{
    *a = (struct fuse_attr){
        .ino = nodeid,
        .size = in->size_bytes,
        .blocks = in->blocks,
        .atime = in->mtime_s,
        .mtime = in->mtime_s,
        .ctime = in->mtime_s,
        .atimensec = in->mtime_nsec,
        .mtimensec = in->mtime_nsec,
        .ctimensec = in->mtime_nsec,
        .mode = in->mode,
        .nlink = in->nlink,
        .uid = in->uid,
        .gid = in->gid,
        .rdev = in->rdev,
        .blksize = BLKSIZE,
    };
    if (in->blksize_bytes) {
        a->blksize = in->blksize_bytes;
        a->atime = in->atime_s;
        a->atimensec = in->atime_nsec;
        a->ctime = in->ctime_s;
        a->ctimensec = in->ctime_nsec;
    }
}

static void fill_valid(const struct vfs_node *node, uint64_t *seconds, uint32_t *nsec)
{
    const struct fs_rw_ops *rw = node->fs->ops->rw;

    *seconds = !node->serial ? 0 : rw ? rw->valid_ms / 1000 : FUSE_VALID_FOREVER_S;
    *nsec = node->serial && rw ? rw->valid_ms % 1000 * 1000000 : 0;
}

/* How long a name in dir and the attributes of node hold. Mounts come and go under pseudo directories and
 * nothing can tell a virtio-fs kernel so; inside an image nothing ever changes; a host directory says for itself. */
void fuse_fill_entry(struct fuse_call *c, struct fuse_entry_out *e, const struct vfs_node *dir,
                     const struct vfs_node *node, const vnd_attr *attr)
{
    memset(e, 0, sizeof(*e));
    e->nodeid = vfs_nodeid(c->s->vfs, node->serial, node->ino);
    e->generation = attr->generation;
    if (dir->serial && node->serial == dir->serial)
        fill_valid(dir, &e->entry_valid, &e->entry_valid_nsec);
    fill_valid(node, &e->attr_valid, &e->attr_valid_nsec);
    fill_attr(&e->attr, attr, e->nodeid);
}

enum req_verdict fuse_op_lookup(struct fuse_call *c)
{
    struct fuse_entry_out out;
    struct vfs_node node;
    vnd_attr attr;
    const char *name;
    uint32_t len;
    int rc = fuse_arg_name(c, 0, true, &name, &len);

    if (rc)
        return fuse_reply_error(c, rc);
    rc = vfs_lookup(c->s->vfs, &c->node, name, len, &node, &attr);
    if (rc == -ENOENT && c->node.serial && !c->node.fs->ops->rw) {
        memset(&out, 0, sizeof(out)); /* nodeid 0: the absence itself is cached */
        out.entry_valid = FUSE_VALID_FOREVER_S;
        return fuse_reply(c, &out, sizeof(out));
    }
    if (rc)
        return reply_fs_error(c, rc);
    fuse_fill_entry(c, &out, &c->node, &node, &attr);
    return fuse_reply(c, &out, sizeof(out));
}

static int node_attr(const struct vfs_node *n, vnd_attr *attr)
{
    return n->fs->ops->getattr(n->fs, n->ino, attr);
}

enum req_verdict fuse_reply_attr(struct fuse_call *c, const vnd_attr *attr)
{
    struct fuse_attr_out out = { 0 };

    fill_valid(&c->node, &out.attr_valid, &out.attr_valid_nsec);
    fill_attr(&out.attr, attr, vfs_nodeid(c->s->vfs, c->node.serial, c->node.ino));
    if (out.attr.ino == PSEUDO_ROOT_INO && !c->node.serial && c->s->keeps_root)
        out.attr_valid = FUSE_VALID_FOREVER_S;
    return fuse_reply(c, &out, sizeof(out));
}

enum req_verdict fuse_op_getattr(struct fuse_call *c)
{
    const struct fs_rw_ops *rw = c->node.fs->ops->rw;
    struct fuse_getattr_in in = { 0 };
    vnd_attr attr;
    int rc;

    if (c->r->args_len >= sizeof(in))
        memcpy(&in, c->r->args, sizeof(in));
    if (rw && in.flags & FUSE_GETATTR_FH)
        rc = rw->getattr(c->node.fs, c->node.ino, in.fh, &attr);
    else
        rc = node_attr(&c->node, &attr);
    return rc ? reply_fs_error(c, rc) : fuse_reply_attr(c, &attr);
}

enum req_verdict fuse_op_readlink(struct fuse_call *c)
{
    uint32_t room = fuse_reply_room(c, 4096);
    int64_t n = c->node.fs->ops->readlink(c->node.fs, c->node.ino, (char *)fuse_scratch(c), room);

    return n < 0 ? reply_fs_error(c, (int)n) : fuse_reply_scratch(c, (uint32_t)n);
}

static enum req_verdict open_node(struct fuse_call *c, bool dir)
{
    struct fuse_open_out out = { 0 };
    struct fuse_open_in in;
    vnd_attr attr;
    int rc;

    if (c->node.fs->ops->rw)
        return fuse_rw_open(c, dir);
    memcpy(&in, c->r->args, sizeof(in));
    if ((in.flags & O_ACCMODE) != O_RDONLY || (in.flags & O_TRUNC))
        return fuse_reply_error(c, EROFS);
    rc = node_attr(&c->node, &attr);
    if (rc)
        return reply_fs_error(c, rc);
    if (S_ISDIR(attr.mode) != dir)
        return fuse_reply_error(c, dir ? ENOTDIR : EISDIR);
    if (!dir && S_ISREG(attr.mode) && atomic_load_explicit(&c->s->passthrough, memory_order_relaxed)) {
        out.backing_id = backing_open(c->s->backing, c->r->in.nodeid, c->node.fs, c->node.ino);
        out.open_flags = FUSE_OPEN_NOFLUSH | (out.backing_id ? FUSE_OPEN_PASSTHROUGH : FUSE_OPEN_KEEP_CACHE);
        return fuse_reply(c, &out, sizeof(out));
    }
    if (in_rafs_session(c))
        return fuse_reply_error(c, ENOSYS); /* never asked again; KEEP_CACHE and CACHE_DIR are implied */
    if (c->node.serial)
        out.open_flags = FUSE_OPEN_KEEP_CACHE | (dir ? FUSE_OPEN_CACHE_DIR : FUSE_OPEN_NOFLUSH);
    return fuse_reply(c, &out, sizeof(out));
}

enum req_verdict fuse_op_open(struct fuse_call *c)
{
    return open_node(c, false);
}

enum req_verdict fuse_op_opendir(struct fuse_call *c)
{
    return open_node(c, true);
}

enum req_verdict fuse_op_read(struct fuse_call *c)
{
    struct req *r = c->r;
    struct fuse_worker *w = c->w;
    struct fuse_out_header h = { .unique = r->in.unique };
    struct fuse_read_in in;
    uint32_t got = 0, want;
    bool parked_before = r->wait.parked_once;
    int n, iov_n;
    int64_t done;

    if (c->node.fs->ops->rw)
        return fuse_rw_read(c);
    memcpy(&in, r->args, sizeof(in));
    /* One byte more than we may give, so that a reply shorter than asked for can only be the end of the file: the
     * kernel takes it for that. */
    want = in.size > FUSE_REPLY_MAX ? FUSE_REPLY_MAX + 1 : in.size;
    n = c->node.fs->ops->extents(c->node.fs, c->node.ino, in.offset, want, w->extents, STORE_EXTENTS_MAX, &got);
    if (n < 0)
        return reply_fs_error(c, n);
    if (r->out_cap < sizeof(h) || got > r->out_cap - sizeof(h) || got > FUSE_REPLY_MAX)
        return fuse_reply_error(c, EINVAL);
    if (!got)
        return fuse_reply(c, NULL, 0);
    iov_n = r->ops->out_iov(r, sizeof(h), got, w->iov, REQ_IOV_MAX);
    if (iov_n <= 0)
        return fuse_reply_error(c, iov_n ? -iov_n : EIO);
    done = store_read(&r->wait, w->extents, n, w->iov, iov_n);
    if (done == -EINPROGRESS) {
        if (!parked_before)
            fuse_count(&w->counters.parked, 1);
        return REQ_PARKED;
    }
    store_wait_done(&r->wait);
    if (done != (int64_t)got)
        return fuse_reply_error(c, done < 0 ? (int)-done : EIO);
    c->waited = parked_before;
    if (!parked_before)
        fuse_count(&w->counters.hits, 1);
    r->ops->out_dirty(r, sizeof(h), got);
    h.len = (uint32_t)sizeof(h) + got;
    if (r->ops->out_copy(r, 0, &h, sizeof(h))) {
        r->out_len = 0;
        return REQ_NOREPLY;
    }
    r->out_len = h.len;
    fuse_count(&w->counters.read_bytes, got);
    fuse_count(&w->counters.fuse_requests, 1);
    return REQ_REPLY;
}

/* ---- listings */

struct listing {
    struct fuse_call *c;
    uint8_t *buf;
    uint32_t used, cap;
    bool plus;
    bool refused; /* an entry did not fit */
    int err;
};

/* What stands at an entry: the node itself or what is mounted on it; above a mount's root, the directory
 * outside. */
static struct vfs_node entry_node(struct fuse_call *c, uint64_t ino, const char *name, uint32_t name_len)
{
    struct vfs_node node = { c->node.fs, ino, c->node.serial };
    vnd_attr attr;

    if (name_len == 1 && name[0] == '.')
        return node;
    if (name_len == 2 && name[0] == '.' && name[1] == '.' && vfs_is_mount_root(c->s->vfs, &c->node)) {
        vfs_lookup(c->s->vfs, &c->node, "..", 2, &node, &attr);
        return node;
    }
    vfs_cover(c->s->vfs, &node);
    return node;
}

static int put_entry(void *ctx, uint64_t ino, const char *name, size_t name_len, uint32_t type, uint64_t next_off,
                     const vnd_attr *attr)
{
    struct listing *l = ctx;
    struct vfs_node node = entry_node(l->c, ino, name, (uint32_t)name_len);
    uint32_t entry = l->plus ? (uint32_t)sizeof(struct fuse_entry_out) : 0;
    uint32_t len = entry + (uint32_t)((sizeof(struct fuse_dirent) + name_len + 7) & ~7ull);
    struct fuse_dirent d = { .off = next_off, .namelen = (uint32_t)name_len, .type = type };
    uint8_t *at = l->buf + l->used;

    if (len > l->cap - l->used) {
        l->refused = true;
        return 1;
    }
    d.ino = vfs_nodeid(l->c->s->vfs, node.serial, node.ino);
    if (l->plus) {
        struct fuse_entry_out e;
        vnd_attr covering;

        memset(&e, 0, sizeof(e));
        if (attr) {
            if (node.fs != l->c->node.fs || node.ino != ino) {
                l->err = node_attr(&node, &covering);
                if (l->err)
                    return 1;
                attr = &covering;
            }
            fuse_fill_entry(l->c, &e, &l->c->node, &node, attr);
        }
        memcpy(at, &e, sizeof(e));
    }
    memset(at + len - 8, 0, 8);
    memcpy(at + entry, &d, sizeof(d));
    memcpy(at + entry + sizeof(d), name, name_len);
    l->used += len;
    return 0;
}

static enum req_verdict list_dir(struct fuse_call *c, bool plus)
{
    struct fuse_read_in in;
    struct listing l = { .c = c, .buf = fuse_scratch(c), .plus = plus };
    int rc;

    memcpy(&in, c->r->args, sizeof(in));
    l.cap = fuse_reply_room(c, in.size);
    if (c->node.fs->ops->rw)
        rc = c->node.fs->ops->rw->readdir(c->node.fs, c->node.ino, in.fh, in.offset, plus, put_entry, &l);
    else
        rc = c->node.fs->ops->readdir(c->node.fs, c->node.ino, in.offset, plus, put_entry, &l);
    if (!rc)
        rc = l.err;
    /* An error after some entries is told by the next request, which starts at it. An entry that does not even
     * fit into an empty reply is an error: no entries would mean the end. */
    if (!l.used && (rc || l.refused))
        return rc ? reply_fs_error(c, rc) : fuse_reply_error(c, EINVAL);
    return fuse_reply_scratch(c, l.used);
}

enum req_verdict fuse_op_readdir(struct fuse_call *c)
{
    return list_dir(c, false);
}

enum req_verdict fuse_op_readdirplus(struct fuse_call *c)
{
    return list_dir(c, true);
}

/* ---- xattrs */

/* Answers a request for need bytes that stand in the scratch; rc is the file system's. */
static enum req_verdict reply_xattr(struct fuse_call *c, uint32_t size, int rc, size_t need)
{
    struct fuse_getxattr_out out = { 0 };

    if (rc)
        return reply_fs_error(c, rc);
    if (!size) {
        out.size = (uint32_t)need;
        return fuse_reply(c, &out, sizeof(out));
    }
    return fuse_reply_scratch(c, (uint32_t)need);
}

/* The kernel then stops asking: every first exec of a file asks for security.capability. */
static bool no_xattrs_at_all(struct fuse_call *c)
{
    return in_rafs_session(c) && !vfs_has_xattr(c->s->vfs);
}

enum req_verdict fuse_op_getxattr(struct fuse_call *c)
{
    struct fuse_getxattr_in in;
    const char *name;
    uint32_t name_len;
    size_t need = 0;
    int rc;

    if (no_xattrs_at_all(c))
        return fuse_reply_error(c, ENOSYS);
    memcpy(&in, c->r->args, sizeof(in));
    name = (const char *)c->r->args + sizeof(in);
    name_len = (uint32_t)strnlen(name, c->r->args_len - sizeof(in));
    if (!name_len || name_len == c->r->args_len - sizeof(in))
        return fuse_reply_error(c, EINVAL);
    if (name_len > 255)
        return fuse_reply_error(c, ERANGE);
    rc = c->node.fs->ops->getxattr(c->node.fs, c->node.ino, name, name_len, (char *)fuse_scratch(c),
                                   fuse_reply_room(c, in.size), &need);
    return reply_xattr(c, in.size, rc, need);
}

enum req_verdict fuse_op_listxattr(struct fuse_call *c)
{
    struct fuse_getxattr_in in;
    size_t need = 0;
    int rc;

    if (no_xattrs_at_all(c))
        return fuse_reply_error(c, ENOSYS);
    memcpy(&in, c->r->args, sizeof(in));
    rc = c->node.fs->ops->listxattr(c->node.fs, c->node.ino, (char *)fuse_scratch(c), fuse_reply_room(c, in.size),
                                    &need);
    return reply_xattr(c, in.size, rc, need);
}

/* ---- the rest */

enum req_verdict fuse_op_statfs(struct fuse_call *c)
{
    struct fuse_kstatfs out = { .namelen = 255 };
    int rc;

    if (c->node.fs->ops->rw)
        return fuse_rw_statfs(c);
    rc = c->node.fs->ops->statfs(c->node.fs, &out.blocks, &out.files, &out.bsize);
    out.frsize = out.bsize;
    return rc ? reply_fs_error(c, rc) : fuse_reply(c, &out, sizeof(out));
}

/* Not sent by kernels that check permissions themselves (virtio-fs always does). Supplementary groups are not in
 * the request, so a group's bits count for the caller's own group only. */
enum req_verdict fuse_op_access(struct fuse_call *c)
{
    struct fuse_access_in in;
    const struct fuse_in_header *h = &c->r->in;
    uint32_t bits;
    vnd_attr attr;
    int rc;

    memcpy(&in, c->r->args, sizeof(in));
    rc = node_attr(&c->node, &attr);
    if (rc)
        return reply_fs_error(c, rc);
    if (in.mask & ~7u)
        return fuse_reply_error(c, EINVAL);
    if (!c->node.fs->ops->rw && (in.mask & W_OK) && (S_ISREG(attr.mode) || S_ISDIR(attr.mode) || S_ISLNK(attr.mode)))
        return fuse_reply_error(c, EROFS);
    if (h->uid == 0)
        bits = attr.mode & 0111 || S_ISDIR(attr.mode) ? 7 : 6;
    else if (h->uid == attr.uid)
        bits = attr.mode >> 6;
    else if (h->gid == attr.gid)
        bits = attr.mode >> 3;
    else
        bits = attr.mode;
    return in.mask & ~bits & 7 ? fuse_reply_error(c, EACCES) : fuse_reply(c, NULL, 0);
}

/* No file has holes that we know of, so data goes to the end. */
enum req_verdict fuse_op_lseek(struct fuse_call *c)
{
    struct fuse_lseek_out out;
    struct fuse_lseek_in in;
    vnd_attr attr;
    int rc;

    if (c->node.fs->ops->rw)
        return fuse_rw_lseek(c);
    memcpy(&in, c->r->args, sizeof(in));
    rc = node_attr(&c->node, &attr);
    if (rc)
        return reply_fs_error(c, rc);
    out.offset = in.offset;
    if (in.whence == SEEK_DATA || in.whence == SEEK_HOLE) {
        if (in.offset >= attr.size_bytes)
            return fuse_reply_error(c, ENXIO);
        if (in.whence == SEEK_HOLE)
            out.offset = attr.size_bytes;
    } else if (in.whence == SEEK_END) {
        out.offset = attr.size_bytes + in.offset;
    } else if (in.whence != SEEK_SET) {
        return fuse_reply_error(c, EINVAL);
    }
    return out.offset > INT64_MAX ? fuse_reply_error(c, EINVAL) : fuse_reply(c, &out, sizeof(out));
}
