/* fuse/reply.c -- how a reply is encoded: header and payload, errors, attributes, and names taken from a request. */
#include <errno.h>
#include <string.h>

#include "fs/pseudo.h"
#include "fuse/internal.h"

#define FUSE_HDR ((uint32_t)sizeof(struct fuse_out_header))
#define BLKSIZE 4096

static enum req_verdict reply_bytes(struct fuse_call *c, const void *reply, uint32_t total)
{
    struct req *r = c->r;

    if (r->ops->out_copy(r, 0, reply, total)) {
        r->out_len = 0;
        return REQ_NOREPLY;
    }
    r->out_len = total;
    fuse_count(&c->w->counters.fuse_requests, 1);
    return REQ_REPLY;
}

enum req_verdict fuse_reply_error(struct fuse_call *c, int error)
{
    struct fuse_out_header h = { .len = FUSE_HDR, .error = -error, .unique = c->r->in.unique };

    c->error = (uint16_t)error;
    c->unknown = error == ENOSYS;
    if (error != ENOENT && error != ENODATA && error != ENOSYS) {
        fuse_count(&c->w->counters.fuse_errors, 1);
        c->failed = true;
    }
    if (c->r->out_cap < FUSE_HDR) {
        c->r->out_len = 0;
        return REQ_NOREPLY;
    }
    return reply_bytes(c, &h, FUSE_HDR);
}

enum req_verdict fuse_reply(struct fuse_call *c, const void *data, uint32_t len)
{
    struct {
        struct fuse_out_header h;
        uint8_t data[144];
    } out;

    if (len > sizeof(out.data) || c->r->out_cap < FUSE_HDR + len)
        return fuse_reply_error(c, EINVAL);
    out.h = (struct fuse_out_header){ .len = FUSE_HDR + len, .unique = c->r->in.unique };
    if (len)
        memcpy(out.data, data, len);
    return reply_bytes(c, &out, FUSE_HDR + len);
}

enum req_verdict fuse_reply_scratch(struct fuse_call *c, uint32_t len)
{
    struct fuse_out_header h = { .len = FUSE_HDR + len, .unique = c->r->in.unique };

    if (c->r->out_cap < FUSE_HDR || len > c->r->out_cap - FUSE_HDR)
        return fuse_reply_error(c, EINVAL);
    memcpy(c->w->scratch, &h, sizeof(h));
    return reply_bytes(c, c->w->scratch, FUSE_HDR + len);
}

uint32_t fuse_reply_room(const struct fuse_call *c, uint32_t want)
{
    uint32_t room = c->r->out_cap < FUSE_HDR ? 0 : c->r->out_cap - FUSE_HDR;

    if (room > c->w->scratch_bytes - FUSE_HDR)
        room = c->w->scratch_bytes - FUSE_HDR;
    return room < want ? room : want;
}

int fuse_arg_name(const struct fuse_call *c, uint32_t off, bool dots, const char **name, uint32_t *len)
{
    const struct req *r = c->r;
    const char *start = (const char *)r->args + off;
    const char *end;

    if (off >= r->args_len)
        return -EINVAL;
    end = memchr(start, 0, r->args_len - off);
    if (!end)
        return r->args_len < r->body_len || r->args_len - off > 255 ? -ENAMETOOLONG : -EINVAL;
    if (end == start)
        return -EINVAL;
    if (end - start > 255)
        return -ENAMETOOLONG;
    *name = start;
    *len = (uint32_t)(end - start);
    if (memchr(start, '/', *len))
        return -EINVAL;
    if (!dots && start[0] == '.' && (*len == 1 || (*len == 2 && start[1] == '.')))
        return -EINVAL;
    return 0;
}

/* A file system's own error. EIO says that its metadata is not sound, which its owner should hear of. */
enum req_verdict fuse_reply_fs_error(struct fuse_call *c, int rc)
{
    if (rc == -EIO && !c->node.fs->ops->rw) {
        engine_say(c->s->engine, VND_LEVEL_WARNING, VND_CAUSE_FORMAT,
                   "%s: EIO to a reader: the image is malformed there (`check` "
                   "tells where), or a guest asks for an inode that is not in it",
                   c->node.fs->label ? c->node.fs->label : c->node.fs->ops->name);
    }
    return fuse_reply_error(c, -rc);
}

/* ---- attributes */

static void fill_attr(struct fuse_attr *a, const vnd_attr *in, uint64_t ino)
{
    *a = (struct fuse_attr){
        .ino = ino,
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
    fill_attr(&e->attr, attr, vfs_shown_ino(c->s->vfs, node->serial, node->ino));
}

enum req_verdict fuse_reply_attr(struct fuse_call *c, const vnd_attr *attr)
{
    struct fuse_attr_out out = { 0 };

    fill_valid(&c->node, &out.attr_valid, &out.attr_valid_nsec);
    fill_attr(&out.attr, attr, vfs_shown_ino(c->s->vfs, c->node.serial, c->node.ino));
    if (!c->node.serial && c->node.ino == PSEUDO_ROOT_INO && c->s->keeps_root)
        out.attr_valid = FUSE_VALID_FOREVER_S;
    return fuse_reply(c, &out, sizeof(out));
}
