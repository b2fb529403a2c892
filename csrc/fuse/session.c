/* fuse/session.c -- INIT, the opcode table, dispatch; see fuse.h.
 *
 * What each operation answers follows from two facts: the tree of an image never changes, and the kernel remembers ENOSYS
 * for the whole connection. So a `rafs` session says ENOSYS where that saves requests for good (OPEN, FLUSH, ...), a `mixed`
 * one never does for anything that a file system beside the image may answer (the table's column rw).
 */
#include "fuse/fuse.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fuse/internal.h"
#include "fs/metrics.h"

#define FUSE_HDR ((uint32_t)sizeof(struct fuse_out_header))

/* ---- INIT */

/* What each kind of session asks of the kernel; it gets what the kernel offered of it. */
static uint64_t wanted_flags(int kind)
{
    uint64_t flags = FUSE_INIT_ASYNC_READ | FUSE_INIT_EXPORT_SUPPORT | FUSE_INIT_DO_READDIRPLUS |
                     FUSE_INIT_READDIRPLUS_AUTO | FUSE_INIT_ASYNC_DIO | FUSE_INIT_PARALLEL_DIROPS |
                     FUSE_INIT_MAX_PAGES | FUSE_INIT_CACHE_SYMLINKS | FUSE_INIT_INIT_EXT | FUSE_INIT_POSIX_ACL;

    /* ACLs of images and host directories are obeyed by the guest's kernel. Immutable data is never dropped because an
     * attribute was refreshed; a host directory's data must be. A host directory is not for the guest alone, so the
     * guest's kernel must not write back when it likes (WRITEBACK_CACHE). Where one of its directories has a default ACL,
     * the umask does not count, which only the host knows in time. */
    return flags |
           (kind == VND_SESSION_RAFS ? FUSE_INIT_EXPLICIT_INVAL_DATA
                                     : FUSE_INIT_AUTO_INVAL_DATA | FUSE_INIT_ATOMIC_O_TRUNC | FUSE_INIT_BIG_WRITES |
                                           FUSE_INIT_HANDLE_KILLPRIV_V2 | FUSE_INIT_DONT_MASK);
}

/* Under the lock: INIT was answered so, here or in another process. */
static void begin_as(struct fuse_session *s, const vnd_init_result *init)
{
    s->init = *init;
    atomic_store(&s->ready, true);
    if (s->kept)
        fuse_kept_write(s->kept, &(struct fuse_kept){ .ready = 1,
                                                      .minor = init->minor,
                                                      .max_pages = init->max_pages,
                                                      .max_write = init->max_write,
                                                      .session_kind = (uint32_t)vfs_session_kind(s->vfs),
                                                      .flags = init->flags });
}

static uint32_t max_write(int kind)
{
    return kind == VND_SESSION_RAFS ? 4096 : FUSE_REPLY_MAX;
}

/* Begins a connection, or begins it anew: then no DESTROY came, and the guest was reset under us. */
static void session_begin(struct fuse_session *s, struct vfs_reader *reader, const struct fuse_init_out *out)
{
    pthread_mutex_lock(&s->lock);
    if (atomic_load(&s->ready))
        atomic_fetch_add(&s->gen, 1);
    begin_as(s, &(vnd_init_result){ .minor = out->minor,
                                    .max_write = out->max_write,
                                    .flags = (uint64_t)out->flags2 << 32 | out->flags,
                                    .max_pages = out->max_pages });
    pthread_mutex_unlock(&s->lock);
    fuse_give_all_back(s, reader);
}

static enum req_verdict op_init(struct fuse_call *c)
{
    struct fuse_init_in in = { 0 };
    struct fuse_init_out out = { .major = FUSE_WIRE_MAJOR, .minor = FUSE_WIRE_MINOR };
    uint32_t len = c->r->args_len < sizeof(in) ? c->r->args_len : (uint32_t)sizeof(in), out_len = sizeof(out);
    uint64_t flags;

    memcpy(&in, c->r->args, len);
    if (in.major > FUSE_WIRE_MAJOR)
        return fuse_reply(c, &out, sizeof(out)); /* the kernel comes again with ours */
    if (in.major < FUSE_WIRE_MAJOR || len < 16)
        return fuse_reply_error(c, EPROTO);
    if (in.minor < out.minor)
        out.minor = in.minor;
    if (in.minor < 23)
        out_len = in.minor < 5 ? 8 : 24; /* how the reply grew */
    if (c->r->out_cap < FUSE_HDR + out_len)
        return fuse_reply_error(c, EINVAL);
    flags = in.flags;
    if (flags & FUSE_INIT_INIT_EXT)
        flags |= (uint64_t)in.flags2 << 32;
    flags &= wanted_flags(vfs_session_kind(c->s->vfs)) | (c->s->backing ? FUSE_INIT_PASSTHROUGH : 0);
    if (flags & FUSE_INIT_PASSTHROUGH)
        out.max_stack_depth = 1; /* so that overlayfs fits on top (linux/fs.h: 2 in all) */
    atomic_store(&c->s->backs_files, (flags & FUSE_INIT_PASSTHROUGH) != 0);
    out.max_readahead = in.max_readahead;
    out.flags = (uint32_t)flags;
    out.flags2 = (uint32_t)(flags >> 32);
    out.max_background = 256; /* 0 would leave the kernel's 12 */
    out.congestion_threshold = 192;
    /* Where nothing is written, it keeps buffers of /dev/fuse small. */
    out.max_write = max_write(vfs_session_kind(c->s->vfs));
    out.time_gran = 1;
    out.max_pages = flags & FUSE_INIT_MAX_PAGES ? FUSE_REPLY_MAX / 4096 : 0;
    session_begin(c->s, &c->w->reader, &out);
    return fuse_reply(c, &out, out_len);
}

/* What other guests hold of file systems that they share stays theirs. */
static void session_end(struct fuse_session *s, struct vfs_reader *reader)
{
    pthread_mutex_lock(&s->lock);
    atomic_fetch_add(&s->gen, 1);
    atomic_store(&s->ready, false);
    if (s->kept)
        fuse_kept_write(s->kept, &(struct fuse_kept){ 0 });
    pthread_mutex_unlock(&s->lock);
    fuse_give_all_back(s, reader);
}

static enum req_verdict op_destroy(struct fuse_call *c)
{
    session_end(c->s, &c->w->reader);
    return fuse_reply(c, NULL, 0);
}

/* ---- the short answers */

static enum req_verdict op_none(struct fuse_call *c)
{
    c->r->out_len = 0;
    return REQ_NOREPLY;
}

static enum req_verdict op_enosys(struct fuse_call *c)
{
    return fuse_reply_error(c, ENOSYS);
}

static enum req_verdict op_enotty(struct fuse_call *c)
{
    return fuse_reply_error(c, ENOTTY);
}

static enum req_verdict op_erofs(struct fuse_call *c)
{
    return fuse_reply_error(c, EROFS);
}

/* In an image nothing is ever dirty: 0 would be right in both kinds, ENOSYS ends the asking. */
static enum req_verdict op_flush(struct fuse_call *c)
{
    return fuse_in_rafs_session(c) ? op_enosys(c) : fuse_reply(c, NULL, 0);
}

/* Between two file systems of which one can be written to the kernel copies by reading and writing, once told EXDEV. */
static enum req_verdict op_copy_file_range(struct fuse_call *c)
{
    return fuse_reply_error(c, fuse_in_rafs_session(c) ? EROFS : EXDEV);
}

/* Kata's agent makes the parents of its mount points and tolerates EEXIST and ENOSYS only. The kernel does not remember
 * ENOSYS of MKDIR. */
static enum req_verdict op_mkdir(struct fuse_call *c)
{
    return fuse_reply_error(c, c->node.serial ? EROFS : ENOSYS);
}

/* ---- the table */

/* NEED_NODE: an error if the node is gone. USE_NODE: served all the same. ANY_TIME: also before INIT. NO_REPLY: no reply is
 * due, not even for what is wrong. ONCE: not done twice (fuse/once.c). */
enum { NEED_NODE = 1, ANY_TIME = 2, NO_REPLY = 4, USE_NODE = 8, ONCE = 16 };

struct fuse_op {
    fuse_op_fn fn;
    fuse_op_fn rw;     /* instead of fn where the node's file system can be written to; NULL: fn serves both */
    uint16_t args_min; /* bytes after the in header at least */
    uint8_t flags;
};

static const struct fuse_op ops[FUSE_OP_MAX] = {
    [FUSE_OP_LOOKUP] = { fuse_op_lookup, NULL, 2, NEED_NODE },
    [FUSE_OP_FORGET] = { fuse_op_forget, NULL, sizeof(struct fuse_forget_in), NO_REPLY },
    [FUSE_OP_GETATTR] = { fuse_op_getattr, NULL, 0, NEED_NODE },
    [FUSE_OP_SETATTR] = { op_erofs, fuse_rw_setattr, 0, NEED_NODE | ONCE },
    [FUSE_OP_READLINK] = { fuse_op_readlink, NULL, 0, NEED_NODE },
    [FUSE_OP_SYMLINK] = { op_erofs, fuse_rw_symlink, 0, NEED_NODE | ONCE },
    [FUSE_OP_MKNOD] = { op_erofs, fuse_rw_mknod, 0, NEED_NODE | ONCE },
    [FUSE_OP_MKDIR] = { op_mkdir, fuse_rw_mkdir, 0, NEED_NODE | ONCE },
    [FUSE_OP_UNLINK] = { op_erofs, fuse_rw_unlink, 0, NEED_NODE | ONCE },
    [FUSE_OP_RMDIR] = { op_erofs, fuse_rw_rmdir, 0, NEED_NODE | ONCE },
    [FUSE_OP_RENAME] = { op_erofs, fuse_rw_rename, 0, NEED_NODE | ONCE },
    [FUSE_OP_LINK] = { op_erofs, fuse_rw_link, 0, NEED_NODE | ONCE },
    [FUSE_OP_OPEN] = { fuse_op_open, fuse_rw_open, sizeof(struct fuse_open_in), NEED_NODE | ONCE },
    [FUSE_OP_READ] = { fuse_op_read, fuse_rw_read, sizeof(struct fuse_read_in), NEED_NODE },
    [FUSE_OP_WRITE] = { op_erofs, fuse_rw_write, 0, NEED_NODE | ONCE },
    [FUSE_OP_STATFS] = { fuse_op_statfs, fuse_rw_statfs, 0, NEED_NODE },
    [FUSE_OP_RELEASE] = { fuse_op_release, fuse_rw_release, 0, USE_NODE },
    [FUSE_OP_FSYNC] = { op_flush, fuse_rw_fsync, 0, NEED_NODE },
    [FUSE_OP_SETXATTR] = { op_erofs, fuse_rw_setxattr, 0, NEED_NODE | ONCE },
    [FUSE_OP_GETXATTR] = { fuse_op_getxattr, NULL, sizeof(struct fuse_getxattr_in) + 2, NEED_NODE },
    [FUSE_OP_LISTXATTR] = { fuse_op_listxattr, NULL, sizeof(struct fuse_getxattr_in), NEED_NODE },
    [FUSE_OP_REMOVEXATTR] = { op_erofs, fuse_rw_removexattr, 0, NEED_NODE | ONCE },
    [FUSE_OP_FLUSH] = { op_flush, fuse_rw_flush, 0, NEED_NODE },
    [FUSE_OP_INIT] = { op_init, NULL, 8, ANY_TIME },
    [FUSE_OP_OPENDIR] = { fuse_op_opendir, fuse_rw_opendir, sizeof(struct fuse_open_in), NEED_NODE },
    [FUSE_OP_READDIR] = { fuse_op_readdir, NULL, sizeof(struct fuse_read_in), NEED_NODE },
    [FUSE_OP_RELEASEDIR] = { fuse_op_release, fuse_rw_release, 0, USE_NODE },
    [FUSE_OP_FSYNCDIR] = { op_flush, fuse_rw_fsync, 0, NEED_NODE },
    [FUSE_OP_GETLK] = { op_enosys, NULL, 0, 0 }, /* locks stay with the kernel: INIT does not offer them */
    [FUSE_OP_SETLK] = { op_enosys, NULL, 0, 0 },
    [FUSE_OP_SETLKW] = { op_enosys, NULL, 0, 0 },
    [FUSE_OP_ACCESS] = { fuse_op_access, NULL, sizeof(struct fuse_access_in), NEED_NODE },
    [FUSE_OP_CREATE] = { op_erofs, fuse_rw_create, 0, NEED_NODE | ONCE },
    [FUSE_OP_INTERRUPT] = { op_none, NULL, 0, ANY_TIME }, /* every read ends by its deadline */
    [FUSE_OP_BMAP] = { op_enosys, NULL, 0, 0 },
    [FUSE_OP_DESTROY] = { op_destroy, NULL, 0, 0 },
    [FUSE_OP_IOCTL] = { op_enotty, NULL, 0, NEED_NODE },
    [FUSE_OP_POLL] = { op_enosys, NULL, 0, 0 },
    [FUSE_OP_NOTIFY_REPLY] = { op_none, NULL, 0, ANY_TIME },
    [FUSE_OP_BATCH_FORGET] = { fuse_op_batch_forget, NULL, sizeof(struct fuse_batch_forget_in), NO_REPLY },
    [FUSE_OP_FALLOCATE] = { op_erofs, fuse_rw_fallocate, 0, NEED_NODE },
    [FUSE_OP_READDIRPLUS] = { fuse_op_readdirplus, NULL, sizeof(struct fuse_read_in), NEED_NODE },
    [FUSE_OP_RENAME2] = { op_erofs, fuse_rw_rename2, 0, NEED_NODE | ONCE },
    [FUSE_OP_LSEEK] = { fuse_op_lseek, fuse_rw_lseek, sizeof(struct fuse_lseek_in), NEED_NODE },
    [FUSE_OP_COPY_FILE_RANGE] = { op_copy_file_range, fuse_rw_copy_file_range, 0, NEED_NODE },
    [FUSE_OP_SETUPMAPPING] = { op_enosys, NULL, 0, 0 }, /* no DAX window */
    [FUSE_OP_REMOVEMAPPING] = { op_enosys, NULL, 0, 0 },
    [FUSE_OP_SYNCFS] = { fuse_op_syncfs, NULL, 0, 0 },
    [FUSE_OP_TMPFILE] = { op_erofs, fuse_rw_tmpfile, 0, NEED_NODE | ONCE },
    [FUSE_OP_STATX] = { op_enosys, NULL, 0, 0 }, /* sent only for a birth time, which RAFS has not */
};

static enum req_verdict serve_call(struct fuse_call *c)
{
    static const struct fuse_op unknown = { op_enosys, NULL, 0, 0 };
    const struct fuse_in_header *in = &c->r->in;
    const struct fuse_op *op = in->opcode < FUSE_OP_MAX && ops[in->opcode].fn ? &ops[in->opcode] : &unknown;

    if (op->flags & NO_REPLY) {
        c->r->out_len = 0;
        /* Forgotten twice, a node is lost that the guest still knows; a count too many goes with the session. */
        if (c->r->again)
            return REQ_NOREPLY;
        if (c->r->session_gen != atomic_load_explicit(&c->s->gen, memory_order_acquire) ||
            !atomic_load_explicit(&c->s->ready, memory_order_acquire) || c->r->args_len < op->args_min ||
            c->r->args_len > c->r->body_len) {
            return REQ_NOREPLY;
        }
        return op->fn(c);
    }
    if (!(op->flags & ANY_TIME)) {
        if (c->r->session_gen != atomic_load_explicit(&c->s->gen, memory_order_acquire))
            return op_none(c); /* of a guest that was reset meanwhile: its memory is another's now */
        if (!atomic_load_explicit(&c->s->ready, memory_order_acquire))
            return fuse_reply_error(c, EIO);
    }
    if (op->fn == op_none)
        return op_none(c);
    if (in->len != sizeof(*in) + (uint64_t)c->r->body_len || c->r->args_len > c->r->body_len ||
        c->r->args_len > REQ_ARGS_MAX || c->r->args_len < op->args_min) {
        return fuse_reply_error(c, EINVAL);
    }
    if (op->flags & (NEED_NODE | USE_NODE)) {
        int rc = vfs_resolve(c->s->vfs, in->nodeid, &c->node);

        if (rc && op->flags & NEED_NODE)
            return fuse_reply_error(c, -rc);
        if (!rc && c->node.fs->ops->rw) {
            vfs_confine(&c->w->reader, c->node.serial); /* a call to the host may hang */
            if (op->flags & ONCE)
                c->once = op->rw ? op->rw : op->fn;
            return fuse_rw_serve(c, op->flags & ONCE ? fuse_once : op->rw ? op->rw : op->fn);
        }
    }
    return op->fn(c);
}

/* Number of an operation among those of vnd_fop_stats, plus one; 0 for others. */
static const uint8_t fop_numbers[FUSE_OP_MAX] = {
    [FUSE_OP_GETATTR] = 1, [FUSE_OP_READLINK] = 2, [FUSE_OP_OPEN] = 3,          [FUSE_OP_RELEASE] = 4,
    [FUSE_OP_READ] = 5,    [FUSE_OP_STATFS] = 6,   [FUSE_OP_GETXATTR] = 7,      [FUSE_OP_LISTXATTR] = 8,
    [FUSE_OP_OPENDIR] = 9, [FUSE_OP_LOOKUP] = 10,  [FUSE_OP_READDIR] = 11,      [FUSE_OP_READDIRPLUS] = 12,
    [FUSE_OP_ACCESS] = 13, [FUSE_OP_FORGET] = 14,  [FUSE_OP_BATCH_FORGET] = 15,
};

/* Between vfs_enter and vfs_leave: the file system may be freed as soon as no thread is. */
static void count_op(struct fuse_call *c, enum req_verdict verdict)
{
    uint32_t opcode = c->r->in.opcode;
    int fop = opcode < FUSE_OP_MAX ? fop_numbers[opcode] : 0;
    struct metrics_op op = { .failed = c->failed, .waited = c->waited };

    /* Forgets have no reply; of the rest what gets none was not answered (it waits, or its guest is gone). */
    if (!fop || c->unknown || verdict == REQ_PARKED ||
        (verdict == REQ_NOREPLY && opcode != FUSE_OP_FORGET && opcode != FUSE_OP_BATCH_FORGET)) {
        return;
    }
    if (!c->node.fs && vfs_resolve(c->s->vfs, c->r->in.nodeid, &c->node))
        return;
    if (!c->node.fs->metrics)
        return;
    op.fop = (uint32_t)fop - 1;
    op.read = opcode == FUSE_OP_READ && !c->failed && c->r->out_len >= FUSE_HDR;
    op.bytes = op.read ? c->r->out_len - FUSE_HDR : 0;
    if (op.bytes) {
        c->w->now_us = now_us();
        op.took_us = c->w->now_us > c->r->began_us ? c->w->now_us - c->r->began_us : 0;
    }
    op.ino = c->node.ino;
    metrics_count(c->node.fs->metrics, c->w->metrics_shard, &op);
}

enum req_verdict fuse_session_serve(struct fuse_session *s, struct fuse_worker *w, struct req *r)
{
    struct fuse_call c = { .s = s, .w = w, .r = r };
    enum req_verdict verdict;

    if (r->wait.answer) { /* served and counted by another thread */
        verdict = fuse_rw_finish(&c);
        if (verdict != REQ_REPLY || r->in.opcode != FUSE_OP_SYNCFS || c.failed)
            return verdict; /* else there may be more mounts */
    }
    if (!r->began_us)
        r->began_us = w->now_us ? w->now_us : now_us();
    vfs_enter(&w->reader);
    verdict = serve_call(&c);
    count_op(&c, verdict);
    vfs_leave(&w->reader);
    return verdict;
}

enum req_verdict fuse_session_fail(struct fuse_session *s, struct fuse_worker *w, struct req *r, int error)
{
    struct fuse_call c = { .s = s, .w = w, .r = r };
    enum req_verdict verdict;

    if (r->session_gen != fuse_session_gen(s))
        return op_none(&c);
    verdict = fuse_reply_error(&c, error);
    vfs_enter(&w->reader);
    count_op(&c, verdict);
    vfs_leave(&w->reader);
    return verdict;
}

void fuse_session_reset(struct fuse_session *s)
{
    struct vfs_reader reader = { 0 };

    vfs_reader_add(s->vfs, &reader);
    vfs_enter(&reader);
    session_end(s, &reader);
    vfs_leave(&reader);
    vfs_reader_remove(s->vfs, &reader);
}

uint32_t fuse_session_gen(struct fuse_session *s)
{
    return atomic_load_explicit(&s->gen, memory_order_acquire);
}

void fuse_session_resume(struct fuse_session *s)
{
    atomic_store(&s->ready, true);
}

void fuse_session_set_owner(struct fuse_session *s, uint32_t owner)
{
    struct vfs_reader reader = { 0 };

    s->owner = owner;
    vfs_reader_add(s->vfs, &reader);
    vfs_enter(&reader);
    fuse_take_all_held(s);
    vfs_leave(&reader);
    vfs_reader_remove(s->vfs, &reader);
}

void fuse_session_keep(struct fuse_session *s, struct fuse_kept *k)
{
    pthread_mutex_lock(&s->lock);
    s->kept = k;
    if (k && fuse_kept_is_ready(k)) {
        s->init = (vnd_init_result){
            .minor = k->minor, .max_write = k->max_write, .flags = k->flags, .max_pages = (uint16_t)k->max_pages
        };
        atomic_store(&s->ready, true);
    }
    pthread_mutex_unlock(&s->lock);
}

bool fuse_session_init_get(struct fuse_session *s, vnd_init_result *out)
{
    bool ready;

    pthread_mutex_lock(&s->lock);
    ready = atomic_load(&s->ready);
    if (ready)
        *out = s->init;
    pthread_mutex_unlock(&s->lock);
    return ready;
}

int fuse_session_resume_as(struct fuse_session *s, const vnd_init_result *init)
{
    int kind = vfs_session_kind(s->vfs);

    if (init->minor > FUSE_WIRE_MINOR || init->flags & ~wanted_flags(kind) || init->max_write > max_write(kind) ||
        init->max_pages > FUSE_REPLY_MAX / 4096)
        return -EOPNOTSUPP;
    pthread_mutex_lock(&s->lock);
    begin_as(s, init);
    pthread_mutex_unlock(&s->lock);
    return 0;
}

void fuse_session_set_backing(struct fuse_session *s, struct backing *b)
{
    s->backing = b;
}

void fuse_session_keep_root(struct fuse_session *s)
{
    s->keeps_root = true;
}

bool fuse_session_ready(struct fuse_session *s)
{
    return atomic_load_explicit(&s->ready, memory_order_acquire);
}

struct fuse_session *fuse_session_new(struct vnd_engine *e, struct vnd_vfs *v)
{
    struct fuse_session *s = calloc(1, sizeof(*s));

    if (s) {
        s->engine = e;
        s->vfs = v;
        s->serve = fuse_session_serve;
        pthread_mutex_init(&s->lock, NULL);
        fuse_held_init(s);
    }
    return s;
}

void fuse_session_free(struct fuse_session *s)
{
    if (s) {
        fuse_session_reset(s);
        fuse_waiting_workers_free(s);
        fuse_held_free(s);
        pthread_mutex_destroy(&s->lock);
        free(s);
    }
}
