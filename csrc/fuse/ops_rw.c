/* fuse/ops_rw.c -- the FUSE operations that a read-write file system has (fs/fs.h's fs_rw_ops). On a read-only one they
 * answer EROFS or nothing to do, never ENOSYS, which the kernel would take for the whole connection.
 *
 * Whatever would have to be undone if the reply found no room is not done then.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <linux/xattr.h>

#include "fuse/internal.h"

#define XATTR_VALUE_MAX 65536
#define FORGETS_AT_ONCE 32

/* ---- what the guest forgets */

static void forget_one(struct fuse_call *c, uint64_t nodeid, uint64_t n)
{
    struct vfs_node node;

    if (vfs_resolve(c->s->vfs, nodeid, &node) == 0 && node.fs->ops->rw)
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

/* ---- attributes */

enum req_verdict fuse_op_setattr(struct fuse_call *c)
{
    static const struct {
        uint32_t wire, ours;
    } bits[] = {
        { 1u << 0, FS_SET_MODE },
        { 1u << 1, FS_SET_UID },
        { 1u << 2, FS_SET_GID },
        { 1u << 3, FS_SET_SIZE },
        { 1u << 4, FS_SET_ATIME },
        { 1u << 5, FS_SET_MTIME },
        { FUSE_SET_ATIME_NOW, FS_SET_ATIME_NOW },
        { FUSE_SET_MTIME_NOW, FS_SET_MTIME_NOW },
        { FUSE_SET_KILL_SUIDGID, FS_SET_KILL },
    };
    struct fuse_setattr_in in;
    struct fs_setattr set;
    vnd_attr attr;
    int rc;

    if (!fuse_rw_of(c))
        return fuse_reply_error(c, EROFS);
    if (c->r->args_len < sizeof(in) || !fuse_has_room(c, sizeof(struct fuse_attr_out)))
        return fuse_reply_error(c, EINVAL);
    memcpy(&in, c->r->args, sizeof(in));
    set = (struct fs_setattr){ .mode = in.mode,
                               .uid = in.uid,
                               .gid = in.gid,
                               .size_bytes = in.size,
                               .atime = { (time_t)in.atime, in.atimensec },
                               .mtime = { (time_t)in.mtime, in.mtimensec } };
    for (size_t i = 0; i < sizeof(bits) / sizeof(bits[0]); i++)
        set.valid |= in.valid & bits[i].wire ? bits[i].ours : 0;
    rc = fuse_rw_of(c)->setattr(c->node.fs, c->node.ino, in.valid & FUSE_SET_FH ? in.fh : 0, &set, &attr);
    return rc ? fuse_reply_error(c, -rc) : fuse_reply_attr(c, &attr);
}

/* ---- open files */

enum req_verdict fuse_rw_open(struct fuse_call *c, bool dir)
{
    struct fuse_open_out out = { 0 };
    struct fuse_open_in in;
    int rc;

    if (!fuse_has_room(c, sizeof(out)))
        return fuse_reply_error(c, EINVAL);
    memcpy(&in, c->r->args, sizeof(in));
    rc = fuse_rw_of(c)->open(c->node.fs, c->node.ino, in.flags, dir, in.open_flags & FUSE_OPEN_KILL_SUIDGID, &out.fh);
    return rc ? fuse_reply_error(c, -rc) : fuse_reply(c, &out, sizeof(out));
}

enum req_verdict fuse_op_release(struct fuse_call *c)
{
    struct fuse_release_in in;

    if (c->r->args_len >= sizeof(in) && vfs_resolve(c->s->vfs, c->r->in.nodeid, &c->node) == 0 && fuse_rw_of(c)) {
        memcpy(&in, c->r->args, sizeof(in));
        fuse_rw_of(c)->release(c->node.fs, in.fh);
    } else if (c->r->in.opcode == FUSE_OP_RELEASE && atomic_load_explicit(&c->s->passthrough, memory_order_relaxed)) {
        backing_release(c->s->backing, c->r->in.nodeid);
    }
    return fuse_reply(c, NULL, 0);
}

enum req_verdict fuse_rw_flush(struct fuse_call *c)
{
    struct fuse_flush_in in;

    if (c->r->args_len < sizeof(in))
        return fuse_reply_error(c, EINVAL);
    memcpy(&in, c->r->args, sizeof(in));
    return fuse_reply_rc(c, fuse_rw_of(c)->flush(c->node.fs, in.fh));
}

enum req_verdict fuse_rw_fsync(struct fuse_call *c)
{
    struct fuse_fsync_in in;

    if (c->r->args_len < sizeof(in))
        return fuse_reply_error(c, EINVAL);
    memcpy(&in, c->r->args, sizeof(in));
    if (!in.fh)
        return fuse_reply_error(c, EBADF);
    return fuse_reply_rc(c, fuse_rw_of(c)->sync(c->node.fs, c->node.ino, in.fh, in.fsync_flags & FUSE_FSYNC_FDATASYNC));
}

static enum req_verdict sync_mounts(struct fuse_call *c)
{
    struct vfs_node node;
    int rc = 0;

    for (uint32_t i = 0; !rc && vfs_rw_mount(c->s->vfs, i, &node); i++)
        rc = node.fs->ops->rw->sync(node.fs, node.ino, 0, false);
    return fuse_reply_rc(c, rc);
}

/* One superblock in the guest: the request names its root, whatever is mounted below. */
enum req_verdict fuse_op_syncfs(struct fuse_call *c)
{
    if (c->w->may_wait || !vfs_rw_mount(c->s->vfs, 0, &c->node))
        return sync_mounts(c);
    return fuse_rw_detach(c, sync_mounts);
}

enum req_verdict fuse_rw_read(struct fuse_call *c)
{
    struct req *r = c->r;
    struct fuse_worker *w = c->w;
    struct fuse_out_header h = { .unique = r->in.unique };
    struct fuse_read_in in;
    int64_t got;
    int n;

    memcpy(&in, r->args, sizeof(in));
    if (in.size > FUSE_REPLY_MAX || in.offset > INT64_MAX || !fuse_has_room(c, in.size))
        return fuse_reply_error(c, EINVAL);
    n = in.size ? r->ops->out_iov(r, sizeof(h), in.size, w->iov, REQ_IOV_MAX) : 0;
    if (n < 0)
        return fuse_reply_error(c, -n);
    got = fuse_rw_of(c)->read(c->node.fs, c->node.ino, in.fh, in.offset, w->iov, n, w->may_wait ? NULL : &r->wait);
    if (got == -EINPROGRESS)
        return REQ_PARKED;
    store_wait_done(&r->wait);
    if (got < 0)
        return fuse_reply_error(c, (int)-got);
    r->ops->out_dirty(r, sizeof(h), (uint32_t)got);
    h.len = (uint32_t)sizeof(h) + (uint32_t)got;
    if (r->ops->out_copy(r, 0, &h, sizeof(h))) {
        r->out_len = 0;
        return REQ_NOREPLY;
    }
    r->out_len = h.len;
    fuse_count(&w->counters.read_bytes, (uint64_t)got);
    fuse_count(&w->counters.fuse_requests, 1);
    return REQ_REPLY;
}

enum req_verdict fuse_op_write(struct fuse_call *c)
{
    struct req *r = c->r;
    struct fuse_write_out out = { 0 };
    struct fuse_write_in in;
    int64_t done;
    int n = -EFAULT;

    if (!fuse_rw_of(c))
        return fuse_reply_error(c, EROFS);
    if (r->args_len < sizeof(in) || !fuse_has_room(c, sizeof(out)))
        return fuse_reply_error(c, EINVAL);
    memcpy(&in, r->args, sizeof(in));
    if (in.size > FUSE_REPLY_MAX || in.size > r->body_len - sizeof(in) || in.offset > (uint64_t)INT64_MAX - in.size)
        return fuse_reply_error(c, EINVAL);
    if (r->ops->in_iov)
        n = r->ops->in_iov(r, sizeof(in), in.size, c->w->iov, REQ_IOV_MAX);
    if (n < 0) { /* no such way, or in more pieces than fit */
        if (r->ops->in_copy(r, sizeof(in), fuse_scratch(c), in.size))
            return fuse_reply_error(c, EFAULT);
        c->w->iov[0] = (struct iovec){ fuse_scratch(c), in.size };
        n = 1;
    }
    done = fuse_rw_of(c)->write(c->node.fs, c->node.ino, in.fh, in.offset, c->w->iov, n,
                                (in.flags & O_APPEND) && !(in.write_flags & FUSE_WRITE_CACHE),
                                in.write_flags & FUSE_WRITE_KILL_SUIDGID);
    if (done < 0)
        return fuse_reply_error(c, (int)-done);
    out.size = (uint32_t)done;
    return fuse_reply(c, &out, sizeof(out));
}

enum req_verdict fuse_op_fallocate(struct fuse_call *c)
{
    struct fuse_fallocate_in in;

    if (!fuse_rw_of(c))
        return fuse_reply_error(c, EROFS);
    if (c->r->args_len < sizeof(in))
        return fuse_reply_error(c, EINVAL);
    memcpy(&in, c->r->args, sizeof(in));
    return fuse_reply_rc(c, fuse_rw_of(c)->fallocate(c->node.fs, c->node.ino, in.fh, in.mode, in.offset, in.length));
}

enum req_verdict fuse_op_copy_file_range(struct fuse_call *c)
{
    struct fuse_write_out out = { 0 };
    struct fuse_copy_file_range_in in;
    struct vfs_node to;
    int64_t done;
    int rc;

    if (!fuse_rw_of(c)) /* where something else can be written: the kernel copies by reading and writing */
        return fuse_reply_error(c, vfs_session_kind(c->s->vfs) == VND_SESSION_RAFS ? EROFS : EXDEV);
    if (c->r->args_len < sizeof(in) || !fuse_has_room(c, sizeof(out)))
        return fuse_reply_error(c, EINVAL);
    memcpy(&in, c->r->args, sizeof(in));
    rc = vfs_resolve(c->s->vfs, in.nodeid_out, &to);
    if (rc || to.fs != c->node.fs)
        return fuse_reply_error(c, rc ? -rc : EXDEV);
    if (in.flags || in.off_in > INT64_MAX || in.off_out > INT64_MAX)
        return fuse_reply_error(c, EINVAL);
    done = fuse_rw_of(c)->copy(c->node.fs, in.fh_in, in.off_in, in.fh_out, in.off_out, in.len);
    if (done < 0)
        return fuse_reply_error(c, (int)-done);
    out.size = (uint32_t)done;
    return fuse_reply(c, &out, sizeof(out));
}

enum req_verdict fuse_rw_lseek(struct fuse_call *c)
{
    struct fuse_lseek_out out;
    struct fuse_lseek_in in;
    int64_t at;

    memcpy(&in, c->r->args, sizeof(in));
    at = fuse_rw_of(c)->lseek(c->node.fs, c->node.ino, in.fh, in.offset, in.whence);
    out.offset = (uint64_t)at;
    return at < 0 ? fuse_reply_error(c, (int)-at) : fuse_reply(c, &out, sizeof(out));
}

/* ---- the rest */

/* As a kernel without a security module of its own has it: security.* is root's. Guests' kernels ask their security modules,
 * and some of those let anybody pass. What they all decide by themselves is who may set security.capability (root of a
 * user namespace may). */
static bool is_refused(const struct fuse_call *c, const char *name, bool removes)
{
    return c->r->in.uid && strncmp(name, XATTR_SECURITY_PREFIX, XATTR_SECURITY_PREFIX_LEN) == 0 &&
           (removes || strcmp(name, XATTR_NAME_CAPS));
}

enum req_verdict fuse_op_setxattr(struct fuse_call *c)
{
    struct fs_caller who = fuse_caller_of(c);
    struct fuse_setxattr_in in;
    const char *name;
    uint32_t off, len;

    if (!fuse_rw_of(c))
        return fuse_reply_error(c, EROFS);
    if (c->r->args_len <= sizeof(in))
        return fuse_reply_error(c, EINVAL);
    memcpy(&in, c->r->args, sizeof(in));
    name = (const char *)c->r->args + sizeof(in);
    len = (uint32_t)strnlen(name, c->r->args_len - sizeof(in));
    if (!len || len == c->r->args_len - sizeof(in))
        return fuse_reply_error(c, EINVAL);
    if (len > 255)
        return fuse_reply_error(c, ERANGE);
    if (in.size > XATTR_VALUE_MAX)
        return fuse_reply_error(c, E2BIG);
    if (is_refused(c, name, false))
        return fuse_reply_error(c, EPERM);
    off = (uint32_t)sizeof(in) + len + 1;
    if (in.size > c->r->body_len - off || c->r->ops->in_copy(c->r, off, fuse_scratch(c), in.size))
        return fuse_reply_error(c, EINVAL);
    return fuse_reply_rc(
        c, fuse_rw_of(c)->setxattr(c->node.fs, &who, c->node.ino, name, fuse_scratch(c), in.size, in.flags));
}

enum req_verdict fuse_op_removexattr(struct fuse_call *c)
{
    const char *name = (const char *)c->r->args;
    size_t len = strnlen(name, c->r->args_len);

    if (!fuse_rw_of(c))
        return fuse_reply_error(c, EROFS);
    if (!len || len == c->r->args_len)
        return fuse_reply_error(c, EINVAL);
    if (is_refused(c, name, true))
        return fuse_reply_error(c, EPERM);
    return fuse_reply_rc(c, len > 255 ? -ERANGE : fuse_rw_of(c)->removexattr(c->node.fs, c->node.ino, name));
}

enum req_verdict fuse_rw_statfs(struct fuse_call *c)
{
    struct fuse_kstatfs out = { 0 };
    struct statvfs st;
    int rc = fuse_rw_of(c)->statvfs(c->node.fs, c->node.ino, &st);

    if (rc)
        return fuse_reply_error(c, -rc);
    out = (struct fuse_kstatfs){
        .blocks = st.f_blocks,
        .bfree = st.f_bfree,
        .bavail = st.f_bavail,
        .files = st.f_files,
        .ffree = st.f_ffree,
        .bsize = (uint32_t)st.f_bsize,
        .namelen = (uint32_t)st.f_namemax,
        .frsize = (uint32_t)st.f_frsize,
    };
    return fuse_reply(c, &out, sizeof(out));
}
