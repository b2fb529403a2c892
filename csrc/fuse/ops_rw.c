/* fuse/ops_rw.c -- FUSE operations on a file system that can be written to (fs/fs.h's fs_rw_ops): open files, their
 * bytes, attributes and extended attributes. The table in fuse/session.c calls them for no other node.
 *
 * An operation first checks that its reply has room, so that nothing is done that would then have to be undone.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <linux/xattr.h>

#include "fuse/internal.h"

#define XATTR_VALUE_MAX 65536

/* ---- attributes */

enum req_verdict fuse_rw_setattr(struct fuse_call *c)
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

    if (c->r->args_len < sizeof(in) || !fuse_has_room(c, sizeof(struct fuse_attr_out)))
        return fuse_reply_error(c, EINVAL);
    memcpy(&in, c->r->args, sizeof(in));
    if (in.valid & FUSE_SET_FH && fuse_is_foreign(c, in.fh))
        return fuse_reply_error(c, EBADF);
    set = (struct fs_setattr){ .mode = in.mode,
                               .uid = in.uid,
                               .gid = in.gid,
                               .size_bytes = in.size,
                               .atime = { (time_t)in.atime, in.atimensec },
                               .mtime = { (time_t)in.mtime, in.mtimensec } };
    for (size_t i = 0; i < sizeof(bits) / sizeof(bits[0]); i++)
        set.valid |= in.valid & bits[i].wire ? bits[i].ours : 0;
    if (c->before == REQ_DONE)
        set.valid &= ~(uint32_t)FS_SET_SIZE; /* another file of the guest's may have written since */
    rc = fuse_rw_of(c)->setattr(c->node.fs, c->node.ino, in.valid & FUSE_SET_FH ? in.fh : 0, &set, &attr);
    return rc ? fuse_reply_error(c, -rc) : fuse_reply_attr(c, &attr);
}

/* ---- open files */

static enum req_verdict open_node(struct fuse_call *c, bool dir)
{
    struct fuse_open_out out = { 0 };
    struct fuse_open_in in;
    int rc;

    if (!fuse_has_room(c, sizeof(out)))
        return fuse_reply_error(c, EINVAL);
    if (fuse_holds_all(c, FUSE_HELD_FILE))
        return fuse_reply_error(c, ENFILE);
    memcpy(&in, c->r->args, sizeof(in));
    if (c->before == REQ_DONE)
        in.flags &= ~(uint32_t)O_TRUNC;
    rc = fuse_rw_of(c)->open(c->node.fs, c->node.ino, in.flags, dir, in.open_flags & FUSE_OPEN_KILL_SUIDGID, &out.fh);
    if (!rc)
        rc = fuse_hold_file(c, out.fh);
    return rc ? fuse_reply_error(c, -rc) : fuse_reply(c, &out, sizeof(out));
}

enum req_verdict fuse_rw_open(struct fuse_call *c)
{
    return open_node(c, false);
}

enum req_verdict fuse_rw_opendir(struct fuse_call *c)
{
    return open_node(c, true);
}

enum req_verdict fuse_rw_release(struct fuse_call *c)
{
    struct fuse_release_in in;

    if (c->r->args_len >= sizeof(in)) {
        memcpy(&in, c->r->args, sizeof(in));
        if (fuse_give_back(c->s, FUSE_HELD_FILE, c->node.serial, in.fh, 1))
            fuse_rw_of(c)->release(c->node.fs, in.fh);
    }
    return fuse_reply(c, NULL, 0);
}

enum req_verdict fuse_rw_flush(struct fuse_call *c)
{
    struct fuse_flush_in in;

    if (c->r->args_len < sizeof(in))
        return fuse_reply_error(c, EINVAL);
    memcpy(&in, c->r->args, sizeof(in));
    if (fuse_is_foreign(c, in.fh))
        return fuse_reply_error(c, EBADF);
    return fuse_reply_rc(c, fuse_rw_of(c)->flush(c->node.fs, in.fh));
}

enum req_verdict fuse_rw_fsync(struct fuse_call *c)
{
    struct fuse_fsync_in in;

    if (c->r->args_len < sizeof(in))
        return fuse_reply_error(c, EINVAL);
    memcpy(&in, c->r->args, sizeof(in));
    if (!in.fh || fuse_is_foreign(c, in.fh))
        return fuse_reply_error(c, EBADF);
    return fuse_reply_rc(c, fuse_rw_of(c)->sync(c->node.fs, c->node.ino, in.fh, in.fsync_flags & FUSE_FSYNC_FDATASYNC));
}

static enum req_verdict sync_next(struct fuse_call *c)
{
    struct vfs_node node;
    int rc = 0;

    if (vfs_rw_after(c->s->vfs, c->r->step, &node)) {
        vfs_confine(&c->w->reader, node.serial);
        rc = node.fs->ops->rw->sync(node.fs, node.ino, 0, false);
        vfs_widen(&c->w->reader);
    }
    return fuse_reply_rc(c, rc);
}

/* One superblock in the guest: the request names its root, whatever is mounted below. Each mount is synced by a thread of its
 * own file system, one after the other: a storage that hangs must not take other mounts' threads. */
enum req_verdict fuse_op_syncfs(struct fuse_call *c)
{
    if (c->w->may_wait)
        return sync_next(c);
    while (vfs_rw_after(c->s->vfs, c->r->step, &c->node)) {
        enum req_verdict verdict = fuse_rw_detach(c, sync_next);

        if (verdict != REQ_REPLY || c->failed)
            return verdict;
        c->r->step = c->node.serial;
    }
    return fuse_reply(c, NULL, 0);
}

enum req_verdict fuse_rw_read(struct fuse_call *c)
{
    struct req *r = c->r;
    struct fuse_worker *w = c->w;
    struct fuse_out_header h = { .unique = r->in.unique };
    struct fuse_read_in in;
    struct fs_io io;
    int64_t got;
    int n;

    memcpy(&in, r->args, sizeof(in));
    if (fuse_is_foreign(c, in.fh))
        return fuse_reply_error(c, EBADF);
    if (in.size > FUSE_REPLY_MAX || in.offset > INT64_MAX || !fuse_has_room(c, in.size))
        return fuse_reply_error(c, EINVAL);
    n = in.size ? r->ops->out_iov(r, sizeof(h), in.size, w->iov, REQ_IOV_MAX) : 0;
    if (n < 0)
        return fuse_reply_error(c, -n);
    io = (struct fs_io){ .ino = c->node.ino, .fh = in.fh, .off = in.offset, .iov = w->iov, .n = n };
    got = fuse_rw_of(c)->read(c->node.fs, &io, w->may_wait ? NULL : &r->wait);
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

enum req_verdict fuse_rw_write(struct fuse_call *c)
{
    struct req *r = c->r;
    struct fuse_write_out out = { 0 };
    struct fuse_write_in in;
    int64_t done;
    int n = -EFAULT;

    if (r->args_len < sizeof(in) || !fuse_has_room(c, sizeof(out)))
        return fuse_reply_error(c, EINVAL);
    memcpy(&in, r->args, sizeof(in));
    if (fuse_is_foreign(c, in.fh))
        return fuse_reply_error(c, EBADF);
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
    if ((in.flags & O_APPEND) && !(in.write_flags & FUSE_WRITE_CACHE) &&
        fuse_was_appended(c, in.fh, c->w->iov, n, in.size)) {
        out.size = in.size;
        return fuse_reply(c, &out, sizeof(out));
    }
    done = fuse_rw_of(c)->write(
        c->node.fs, &(struct fs_io){ .ino = c->node.ino,
                                     .fh = in.fh,
                                     .off = in.offset,
                                     .iov = c->w->iov,
                                     .n = n,
                                     .append = (in.flags & O_APPEND) && !(in.write_flags & FUSE_WRITE_CACHE),
                                     .kill = in.write_flags & FUSE_WRITE_KILL_SUIDGID });
    if (done < 0)
        return fuse_reply_error(c, (int)-done);
    out.size = (uint32_t)done;
    return fuse_reply(c, &out, sizeof(out));
}

enum req_verdict fuse_rw_fallocate(struct fuse_call *c)
{
    struct fuse_fallocate_in in;

    if (c->r->args_len < sizeof(in))
        return fuse_reply_error(c, EINVAL);
    memcpy(&in, c->r->args, sizeof(in));
    if (fuse_is_foreign(c, in.fh))
        return fuse_reply_error(c, EBADF);
    return fuse_reply_rc(c, fuse_rw_of(c)->fallocate(c->node.fs, c->node.ino, in.fh, in.mode, in.offset, in.length));
}

enum req_verdict fuse_rw_copy_file_range(struct fuse_call *c)
{
    struct fuse_write_out out = { 0 };
    struct fuse_copy_file_range_in in;
    struct vfs_node to;
    int64_t done;
    int rc;

    if (c->r->args_len < sizeof(in) || !fuse_has_room(c, sizeof(out)))
        return fuse_reply_error(c, EINVAL);
    memcpy(&in, c->r->args, sizeof(in));
    if (fuse_is_foreign(c, in.fh_in) || fuse_is_foreign(c, in.fh_out))
        return fuse_reply_error(c, EBADF);
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
    if (fuse_is_foreign(c, in.fh))
        return fuse_reply_error(c, EBADF);
    at = fuse_rw_of(c)->lseek(c->node.fs, c->node.ino, in.fh, in.offset, in.whence);
    out.offset = (uint64_t)at;
    return at < 0 ? fuse_reply_error(c, (int)-at) : fuse_reply(c, &out, sizeof(out));
}

/* ---- the rest */

/* As a kernel without a security module of its own has it: security.* is root's. Guests' kernels ask their security
 * modules, and some of those let any user pass. What they all decide by themselves is who may set
 * security.capability (root of a user namespace may). */
static bool is_refused(const struct fuse_call *c, const char *name, bool removes)
{
    return c->r->in.uid && strncmp(name, XATTR_SECURITY_PREFIX, XATTR_SECURITY_PREFIX_LEN) == 0 &&
           (removes || strcmp(name, XATTR_NAME_CAPS));
}

enum req_verdict fuse_rw_setxattr(struct fuse_call *c)
{
    struct fs_caller who = fuse_caller_of(c, 0);
    struct fuse_setxattr_in in;
    struct fs_xattr x;
    const char *name;
    uint32_t off, len;

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
    x = (struct fs_xattr){ name, fuse_scratch(c), in.size, c->before == REQ_NOT_BEGUN ? in.flags : 0 };
    return fuse_reply_rc(c, fuse_rw_of(c)->setxattr(c->node.fs, &who, c->node.ino, &x));
}

enum req_verdict fuse_rw_removexattr(struct fuse_call *c)
{
    const char *name = (const char *)c->r->args;
    size_t len = strnlen(name, c->r->args_len);

    if (!len || len == c->r->args_len)
        return fuse_reply_error(c, EINVAL);
    if (is_refused(c, name, true))
        return fuse_reply_error(c, EPERM);
    return fuse_reply_rc(
        c,
        len > 255 ? -ERANGE : fuse_gone_before(c, fuse_rw_of(c)->removexattr(c->node.fs, c->node.ino, name), -ENODATA));
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
