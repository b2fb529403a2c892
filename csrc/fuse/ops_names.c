/* fuse/ops_names.c -- FUSE operations that make, rename and remove names, on a file system that can be written to. The
 * table in fuse/session.c calls them for no other node.
 *
 * An operation first checks that its reply has room, so that nothing is done that would then have to be undone.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#include "fuse/internal.h"

static struct fuse_entry_out entry_of(struct fuse_call *c, const vnd_attr *attr)
{
    struct vfs_node node = { c->node.fs, attr->ino, c->node.serial };
    struct fuse_entry_out e;

    fuse_fill_entry(c, &e, &c->node, &node, attr);
    return e;
}

static enum req_verdict reply_entry(struct fuse_call *c, int rc, const vnd_attr *attr)
{
    struct vfs_node node = { c->node.fs, attr->ino, c->node.serial };
    struct fuse_entry_out e;

    if (!rc)
        rc = fuse_hold_node(c, &node);
    if (rc)
        return fuse_reply_error(c, -rc);
    e = entry_of(c, attr);
    return fuse_reply(c, &e, sizeof(e));
}

/* A name at off in a request whose answer of out bytes has room: 0, or -errno. */
static int get_name(struct fuse_call *c, size_t off, size_t out, const char **name)
{
    uint32_t len;

    if (c->r->args_len < off || !fuse_has_room(c, out))
        return -EINVAL;
    return fuse_arg_name(c, (uint32_t)off, false, name, &len);
}

/* The same of a name that is to be made: nothing is made that the guest could not hold. */
static int get_new_name(struct fuse_call *c, size_t off, const char **name)
{
    int rc = get_name(c, off, sizeof(struct fuse_entry_out), name);

    return !rc && fuse_holds_all(c, FUSE_HELD_NODE) ? -ENFILE : rc;
}

enum req_verdict fuse_rw_mkdir(struct fuse_call *c)
{
    struct fs_make make;
    struct fuse_mkdir_in in;
    const char *name;
    vnd_attr attr;
    int rc;

    rc = get_new_name(c, sizeof(in), &name);
    if (rc)
        return fuse_reply_error(c, -rc);
    memcpy(&in, c->r->args, sizeof(in));
    make = (struct fs_make){ .dir = c->node.ino, .name = name, .mode = S_IFDIR | (in.mode & 07777) };
    make.who = fuse_caller_of(c, in.umask);
    rc = fuse_made_before(c, fuse_rw_of(c)->mknod(c->node.fs, &make, &attr), name, &attr);
    return reply_entry(c, rc, &attr);
}

enum req_verdict fuse_rw_mknod(struct fuse_call *c)
{
    struct fs_make make;
    struct fuse_mknod_in in;
    const char *name;
    vnd_attr attr;
    int rc = get_new_name(c, sizeof(in), &name);

    if (rc)
        return fuse_reply_error(c, -rc);
    memcpy(&in, c->r->args, sizeof(in));
    if (S_ISDIR(in.mode) || S_ISLNK(in.mode))
        return fuse_reply_error(c, EINVAL);
    make = (struct fs_make){ .dir = c->node.ino, .name = name, .mode = in.mode, .rdev = in.rdev };
    make.who = fuse_caller_of(c, in.umask);
    rc = fuse_made_before(c, fuse_rw_of(c)->mknod(c->node.fs, &make, &attr), name, &attr);
    return reply_entry(c, rc, &attr);
}

enum req_verdict fuse_rw_symlink(struct fuse_call *c)
{
    struct fs_make make;
    char *target = (char *)fuse_scratch(c);
    uint32_t off, len;
    const char *name;
    vnd_attr attr;
    int rc = get_new_name(c, 0, &name);

    if (rc)
        return fuse_reply_error(c, -rc);
    off = (uint32_t)strlen(name) + 1;
    len = c->r->body_len - off;
    if (len > 4096)
        return fuse_reply_error(c, ENAMETOOLONG);
    if (!len || c->r->ops->in_copy(c->r, off, target, len) || !memchr(target, 0, len))
        return fuse_reply_error(c, EINVAL);
    make = (struct fs_make){ .who = fuse_caller_of(c, 0), .dir = c->node.ino, .name = name, .mode = S_IFLNK };
    rc = fuse_made_before(c, fuse_rw_of(c)->symlink(c->node.fs, &make, target, &attr), name, &attr);
    return reply_entry(c, rc, &attr);
}

enum req_verdict fuse_rw_link(struct fuse_call *c)
{
    struct fuse_link_in in;
    struct vfs_node old;
    const char *name;
    vnd_attr attr;
    int rc = get_new_name(c, sizeof(in), &name);

    if (rc)
        return fuse_reply_error(c, -rc);
    memcpy(&in, c->r->args, sizeof(in));
    rc = vfs_resolve(c->s->vfs, in.oldnodeid, &old);
    if (!rc && old.fs != c->node.fs)
        rc = -EXDEV;
    if (!rc)
        rc = fuse_made_before(c, fuse_rw_of(c)->link(c->node.fs, old.ino, c->node.ino, name, &attr), name, &attr);
    return reply_entry(c, rc, &attr);
}

static enum req_verdict remove_name(struct fuse_call *c, bool dir)
{
    const char *name;
    int rc = get_name(c, 0, 0, &name);

    if (rc)
        return fuse_reply_error(c, -rc);
    return fuse_reply_rc(c, fuse_gone_before(c, fuse_rw_of(c)->unlink(c->node.fs, c->node.ino, name, dir), -ENOENT));
}

enum req_verdict fuse_rw_unlink(struct fuse_call *c)
{
    return remove_name(c, false);
}

enum req_verdict fuse_rw_rmdir(struct fuse_call *c)
{
    return remove_name(c, true);
}

static enum req_verdict rename_name(struct fuse_call *c, size_t args, uint64_t new_dir, uint32_t flags)
{
    const char *name, *new_name;
    struct vfs_node to;
    uint32_t len;
    int rc = get_name(c, args, 0, &name);

    if (!rc)
        rc = fuse_arg_name(c, (uint32_t)(args + strlen(name) + 1), false, &new_name, &len);
    if (rc)
        return fuse_reply_error(c, -rc);
    rc = vfs_resolve(c->s->vfs, new_dir, &to);
    if (!rc && to.fs != c->node.fs)
        rc = -EXDEV;
    if (!rc) {
        struct fs_rename what = { fuse_caller_of(c, 0), c->node.ino, to.ino, name, new_name, flags };

        rc = fuse_gone_before(c, fuse_rw_of(c)->rename(c->node.fs, &what), -ENOENT);
    }
    return fuse_reply_rc(c, rc);
}

enum req_verdict fuse_rw_rename(struct fuse_call *c)
{
    struct fuse_rename_in in = { 0 };

    memcpy(&in, c->r->args, c->r->args_len < sizeof(in) ? c->r->args_len : sizeof(in));
    return rename_name(c, sizeof(in), in.newdir, 0);
}

enum req_verdict fuse_rw_rename2(struct fuse_call *c)
{
    struct fuse_rename2_in in = { 0 };

    memcpy(&in, c->r->args, c->r->args_len < sizeof(in) ? c->r->args_len : sizeof(in));
    return rename_name(c, sizeof(in), in.newdir, in.flags);
}

static enum req_verdict make_file(struct fuse_call *c, bool tmpfile)
{
    struct fs_make make;
    struct {
        struct fuse_entry_out entry;
        struct fuse_open_out open;
    } out = { 0 };
    struct fuse_create_in in;
    const char *name = "";
    vnd_attr attr;
    int rc;

    if (tmpfile) /* its name is a "/" that means nothing */
        rc = c->r->args_len < sizeof(in) || !fuse_has_room(c, sizeof(out)) ? -EINVAL : 0;
    else
        rc = get_name(c, sizeof(in), sizeof(out), &name);
    if (!rc && (fuse_holds_all(c, FUSE_HELD_FILE) || fuse_holds_all(c, FUSE_HELD_NODE)))
        rc = -ENFILE;
    if (rc)
        return fuse_reply_error(c, -rc);
    memcpy(&in, c->r->args, sizeof(in));
    make = (struct fs_make){ .who = fuse_caller_of(c, in.umask),
                             .dir = c->node.ino,
                             .name = name,
                             .mode = in.mode,
                             .flags = c->before == REQ_NOT_BEGUN ? in.flags : in.flags & ~(uint32_t)(O_EXCL | O_TRUNC),
                             .kill = !tmpfile && in.open_flags & FUSE_OPEN_KILL_SUIDGID };
    if (tmpfile)
        rc = fuse_rw_of(c)->tmpfile(c->node.fs, &make, &attr, &out.open.fh);
    else
        rc = fuse_rw_of(c)->create(c->node.fs, &make, &attr, &out.open.fh);
    if (rc)
        return fuse_reply_error(c, -rc);
    rc = fuse_hold_node(c, &(struct vfs_node){ c->node.fs, attr.ino, c->node.serial });
    if (rc)
        fuse_rw_of(c)->release(c->node.fs, out.open.fh);
    else
        rc = fuse_hold_file(c, out.open.fh); /* the count stays until the session ends, where this fails */
    if (rc)
        return fuse_reply_error(c, -rc);
    out.entry = entry_of(c, &attr);
    return fuse_reply(c, &out, sizeof(out));
}

enum req_verdict fuse_rw_create(struct fuse_call *c)
{
    return make_file(c, false);
}

enum req_verdict fuse_rw_tmpfile(struct fuse_call *c)
{
    return make_file(c, true);
}
