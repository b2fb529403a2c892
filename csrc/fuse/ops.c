/* fuse/ops.c -- FUSE operations over the mount table: reading, and what every file system answers alike. No allocation and
 * no lock here. */
#include "fuse/internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FORGETS_AT_ONCE 32

enum req_verdict fuse_op_lookup(struct fuse_call *c)
{
    struct fuse_entry_out out;
    struct vfs_node node;
    struct vfs_step step;
    vnd_attr attr;
    const char *name;
    uint32_t len;
    int rc = fuse_arg_name(c, 0, true, &name, &len);

    if (rc)
        return fuse_reply_error(c, -rc);
    step = (struct vfs_step){ .reader = &c->w->reader, .dir = &c->node, .name = name, .len = len };
    rc = vfs_lookup(c->s->vfs, &step, &node, &attr);
    if (rc == -ENOENT && c->node.serial && !c->node.fs->ops->rw) {
        memset(&out, 0, sizeof(out)); /* nodeid 0: the absence itself is cached */
        out.entry_valid = FUSE_VALID_FOREVER_S;
        return fuse_reply(c, &out, sizeof(out));
    }
    if (rc)
        return fuse_reply_fs_error(c, rc);
    if (node.fs->ops->rw) {
        rc = fuse_hold_node(c, &node);
        if (rc)
            return fuse_reply_error(c, -rc);
    }
    fuse_fill_entry(c, &out, &c->node, &node, &attr);
    return fuse_reply(c, &out, sizeof(out));
}

/* ---- what the guest forgets */

static void forget_one(struct fuse_call *c, uint64_t nodeid, uint64_t n)
{
    struct vfs_node node;

    if (vfs_resolve(c->s->vfs, nodeid, &node) || !node.fs->ops->rw)
        return;
    n = fuse_give_back(c->s, FUSE_HELD_NODE, node.serial, node.ino, n); /* others hold some too */
    if (n)
        node.fs->ops->rw->forget(node.fs, node.ino, n);
}

enum req_verdict fuse_op_forget(struct fuse_call *c)
{
    struct fuse_forget_in in;

    memcpy(&in, c->r->args, sizeof(in));
    forget_one(c, c->r->in.nodeid, in.nlookup);
    c->r->out_len = 0;
    return REQ_NOREPLY;
}

enum req_verdict fuse_op_batch_forget(struct fuse_call *c)
{
    struct fuse_forget_one some[FORGETS_AT_ONCE];
    struct fuse_batch_forget_in in;
    uint32_t left, off = sizeof(in);

    memcpy(&in, c->r->args, sizeof(in));
    left = (c->r->body_len - (uint32_t)sizeof(in)) / (uint32_t)sizeof(some[0]);
    if (left > in.count)
        left = in.count;
    while (left) {
        uint32_t n = left < FORGETS_AT_ONCE ? left : FORGETS_AT_ONCE;

        if (c->r->ops->in_copy(c->r, off, some, n * (uint32_t)sizeof(some[0])))
            break;
        for (uint32_t i = 0; i < n; i++)
            forget_one(c, some[i].nodeid, some[i].nlookup);
        off += n * (uint32_t)sizeof(some[0]);
        left -= n;
    }
    c->r->out_len = 0;
    return REQ_NOREPLY;
}

/* ---- attributes, links, open files, reads */

static int node_attr(const struct vfs_node *n, vnd_attr *attr)
{
    return n->fs->ops->getattr(n->fs, n->ino, attr);
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
        rc = fuse_is_foreign(c, in.fh) ? -EBADF : rw->getattr(c->node.fs, c->node.ino, in.fh, &attr);
    else
        rc = node_attr(&c->node, &attr);
    return rc ? fuse_reply_fs_error(c, rc) : fuse_reply_attr(c, &attr);
}

enum req_verdict fuse_op_readlink(struct fuse_call *c)
{
    uint32_t room = fuse_reply_room(c, 4096);
    int64_t n = c->node.fs->ops->readlink(c->node.fs, c->node.ino, (char *)fuse_scratch(c), room);

    return n < 0 ? fuse_reply_fs_error(c, (int)n) : fuse_reply_scratch(c, (uint32_t)n);
}

static enum req_verdict open_node(struct fuse_call *c, bool dir)
{
    struct fuse_open_out out = { 0 };
    struct fuse_open_in in;
    vnd_attr attr;
    int rc;

    memcpy(&in, c->r->args, sizeof(in));
    if ((in.flags & O_ACCMODE) != O_RDONLY || (in.flags & O_TRUNC))
        return fuse_reply_error(c, EROFS);
    rc = node_attr(&c->node, &attr);
    if (rc)
        return fuse_reply_fs_error(c, rc);
    if (S_ISDIR(attr.mode) != dir)
        return fuse_reply_error(c, dir ? ENOTDIR : EISDIR);
    if (!dir && S_ISREG(attr.mode) && atomic_load_explicit(&c->s->backs_files, memory_order_relaxed)) {
        out.backing_id = backing_open(c->s->backing, c->r->in.nodeid, c->node.fs, c->node.ino);
        out.open_flags = FUSE_OPEN_NOFLUSH | (out.backing_id ? FUSE_OPEN_PASSTHROUGH : FUSE_OPEN_KEEP_CACHE);
        return fuse_reply(c, &out, sizeof(out));
    }
    if (fuse_in_rafs_session(c))
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

/* An image's own files are counted where the kernel reads them by itself. */
enum req_verdict fuse_op_release(struct fuse_call *c)
{
    if (c->r->in.opcode == FUSE_OP_RELEASE && atomic_load_explicit(&c->s->backs_files, memory_order_relaxed))
        backing_release(c->s->backing, c->r->in.nodeid);
    return fuse_reply(c, NULL, 0);
}

enum req_verdict fuse_op_read(struct fuse_call *c)
{
    struct req *r = c->r;
    struct fuse_worker *w = c->w;
    struct fuse_out_header h = { .unique = r->in.unique };
    struct fuse_read_in in;
    struct fs_extents x = { w->extents, STORE_EXTENTS_MAX, 0, &r->wait };
    uint32_t got, want;
    bool parked_before = r->wait.parked_once;
    int n, iov_n;
    int64_t done;

    memcpy(&in, r->args, sizeof(in));
    /* One byte more than we may give, so that a reply shorter than asked for can only be the end of the file: the
     * kernel takes it for that. */
    want = in.size > FUSE_REPLY_MAX ? FUSE_REPLY_MAX + 1 : in.size;
    n = c->node.fs->ops->extents(c->node.fs, c->node.ino, in.offset, want, &x);
    if (n == -EINPROGRESS) {
        if (!parked_before)
            fuse_count(&w->counters.parked, 1);
        return REQ_PARKED;
    }
    if (n < 0)
        return fuse_reply_fs_error(c, n);
    got = x.bytes;
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
static struct vfs_node entry_node(struct fuse_call *c, const struct fs_entry *e)
{
    struct vfs_node node = { c->node.fs, e->ino, c->node.serial };
    vnd_attr attr;

    if (e->len == 1 && e->name[0] == '.')
        return node;
    if (e->len == 2 && e->name[0] == '.' && e->name[1] == '.' && vfs_is_mount_root(c->s->vfs, &c->node)) {
        struct vfs_step step = { .reader = &c->w->reader, .dir = &c->node, .name = "..", .len = 2 };

        vfs_lookup(c->s->vfs, &step, &node, &attr);
        return node;
    }
    vfs_cover(c->s->vfs, &c->w->reader, &node);
    return node;
}

/* Fills in what LOOKUP would tell of an entry, and counts it as one. It stays empty where the session may hold no more. */
static int fill_plus(struct fuse_call *c, const struct fs_entry *e, const struct vfs_node *node,
                     struct fuse_entry_out *out)
{
    bool covered = node->fs != c->node.fs || node->ino != e->ino;
    vnd_attr attr = *e->attr;
    int rc = covered ? node_attr(node, &attr) : 0;

    if (!rc && node->fs->ops->rw)
        rc = fuse_hold(c->s, FUSE_HELD_NODE, node->serial, node->ino);
    if (rc && rc != -ENFILE)
        return rc;
    if ((rc || covered) && c->node.fs->ops->rw) /* the entry was counted, and the guest does not hear of it */
        c->node.fs->ops->rw->forget(c->node.fs, e->ino, 1);
    if (!rc)
        fuse_fill_entry(c, out, &c->node, node, &attr);
    return 0;
}

static int put_entry(void *ctx, const struct fs_entry *e)
{
    struct listing *l = ctx;
    struct vfs_node node = entry_node(l->c, e);
    uint32_t entry = l->plus ? (uint32_t)sizeof(struct fuse_entry_out) : 0;
    uint32_t len = entry + (uint32_t)((sizeof(struct fuse_dirent) + e->len + 7) & ~7ull);
    struct fuse_dirent d = { .off = e->next_off, .namelen = (uint32_t)e->len, .type = e->type };
    uint8_t *at = l->buf + l->used;

    if (len > l->cap - l->used) {
        l->refused = true;
        return 1;
    }
    d.ino = vfs_shown_ino(l->c->s->vfs, node.serial, node.ino);
    if (l->plus) {
        struct fuse_entry_out out = { 0 };

        if (e->attr) {
            l->err = fill_plus(l->c, e, &node, &out);
            if (l->err)
                return 1;
        }
        memcpy(at, &out, sizeof(out));
    }
    memset(at + len - 8, 0, 8);
    memcpy(at + entry, &d, sizeof(d));
    memcpy(at + entry + sizeof(d), e->name, e->len);
    l->used += len;
    return 0;
}

static enum req_verdict list_dir(struct fuse_call *c, bool plus)
{
    struct fuse_read_in in;
    struct listing l = { .c = c, .buf = fuse_scratch(c), .plus = plus };
    int rc;

    memcpy(&in, c->r->args, sizeof(in));
    if (fuse_rw_of(c) && fuse_is_foreign(c, in.fh))
        return fuse_reply_error(c, EBADF);
    l.cap = fuse_reply_room(c, in.size);
    rc = c->node.fs->ops->readdir(c->node.fs,
                                  &(struct fs_listing){ c->node.ino, in.fh, in.offset, plus, put_entry, &l });
    if (!rc)
        rc = l.err;
    /* An error after some entries is told by the next request, which starts at it. An entry that does not even
     * fit into an empty reply is an error: no entries would mean the end. */
    if (!l.used && (rc || l.refused))
        return rc ? fuse_reply_fs_error(c, rc) : fuse_reply_error(c, EINVAL);
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
        return fuse_reply_fs_error(c, rc);
    if (!size) {
        out.size = (uint32_t)need;
        return fuse_reply(c, &out, sizeof(out));
    }
    return fuse_reply_scratch(c, (uint32_t)need);
}

/* The kernel then stops asking: every first exec of a file asks for security.capability. */
static bool no_xattrs_at_all(struct fuse_call *c)
{
    return fuse_in_rafs_session(c) && !vfs_has_xattr(c->s->vfs);
}

enum req_verdict fuse_op_getxattr(struct fuse_call *c)
{
    struct fuse_getxattr_in in;
    const char *name;
    uint32_t name_len;
    struct fs_buf out = { .at = (char *)fuse_scratch(c) };
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
    out.cap = fuse_reply_room(c, in.size);
    rc = c->node.fs->ops->getxattr(c->node.fs, c->node.ino, name, name_len, &out);
    return reply_xattr(c, in.size, rc, out.need);
}

enum req_verdict fuse_op_listxattr(struct fuse_call *c)
{
    struct fuse_getxattr_in in;
    struct fs_buf out = { .at = (char *)fuse_scratch(c) };
    int rc;

    if (no_xattrs_at_all(c))
        return fuse_reply_error(c, ENOSYS);
    memcpy(&in, c->r->args, sizeof(in));
    out.cap = fuse_reply_room(c, in.size);
    rc = c->node.fs->ops->listxattr(c->node.fs, c->node.ino, &out);
    return reply_xattr(c, in.size, rc, out.need);
}

/* ---- the rest */

enum req_verdict fuse_op_statfs(struct fuse_call *c)
{
    struct fuse_kstatfs out = { .namelen = 255 };
    int rc;

    rc = c->node.fs->ops->statfs(c->node.fs, &out.blocks, &out.files, &out.bsize);
    out.frsize = out.bsize;
    return rc ? fuse_reply_fs_error(c, rc) : fuse_reply(c, &out, sizeof(out));
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
        return fuse_reply_fs_error(c, rc);
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

/* Where data or a hole begins, from off on; off is below the size. */
static int64_t seek_data(struct fuse_call *c, const vnd_attr *attr, uint64_t off, bool hole)
{
    const struct fs *fs = c->node.fs;
    int64_t at = S_ISREG(attr->mode) && fs->ops->seek ? fs->ops->seek(c->node.fs, c->node.ino, off, hole) : -ENODEV;

    if (at == -ENODEV || at == -ENOMEM) /* it cannot tell: all is data */
        at = (int64_t)(hole ? attr->size_bytes : off);
    return at > (int64_t)attr->size_bytes ? (int64_t)attr->size_bytes : at;
}

enum req_verdict fuse_op_lseek(struct fuse_call *c)
{
    struct fuse_lseek_out out;
    struct fuse_lseek_in in;
    vnd_attr attr;
    int64_t at;
    int rc;

    memcpy(&in, c->r->args, sizeof(in));
    rc = node_attr(&c->node, &attr);
    if (rc)
        return fuse_reply_fs_error(c, rc);
    out.offset = in.offset;
    if (in.whence == SEEK_DATA || in.whence == SEEK_HOLE) {
        if (in.offset >= attr.size_bytes)
            return fuse_reply_error(c, ENXIO);
        at = seek_data(c, &attr, in.offset, in.whence == SEEK_HOLE);
        if (at < 0)
            return fuse_reply_fs_error(c, (int)at);
        out.offset = (uint64_t)at;
    } else if (in.whence == SEEK_END) {
        out.offset = attr.size_bytes + in.offset;
    } else if (in.whence != SEEK_SET) {
        return fuse_reply_error(c, EINVAL);
    }
    return out.offset > INT64_MAX ? fuse_reply_error(c, EINVAL) : fuse_reply(c, &out, sizeof(out));
}
