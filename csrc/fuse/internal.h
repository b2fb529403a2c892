/* fuse/internal.h -- inside of fuse/. From the bottom: worker.c, held.c (what a session holds), reply.c (encoding), detach.c (requests that take long),
 * ops.c (operations on any file system), ops_rw.c and ops_names.c (those of file systems that can be written to),
 * session.c (INIT, the opcode table, dispatch). None of them uses one that comes later.
 */
#ifndef VND_FUSE_OPS_H
#define VND_FUSE_OPS_H
#include "fs/backing.h"
#include "fuse/fuse.h"
#include "fuse/kept.h"
#include "fs/vfs.h"

/* How long the kernel may keep what a RAFS image said: it never changes. */
#define FUSE_VALID_FOREVER_S (365ull * 24 * 3600)

#define FUSE_HELD_STRIPES 16 /* so that the queues of a guest seldom meet */

/* Some of what a session holds; see fuse/held.c. */
struct held_stripe {
    pthread_mutex_t lock;
    struct held **buckets;
    uint32_t n_buckets, n;
};

/* How much of a kind the sessions of the engine hold. No session holds more than it leaves to others. */
struct held_budget {
    _Atomic uint64_t mine, *all;
    uint64_t all_max;
};

struct fuse_session {
    struct vnd_engine *engine;
    struct vnd_vfs *vfs;
    /* fuse_session_serve: how detach.c, which lies below session.c, has the copy of a request served. Set once. */
    enum req_verdict (*serve)(struct fuse_session *s, struct fuse_worker *w, struct req *r);
    pthread_mutex_t lock; /* INIT, DESTROY and reset against each other; waiting_workers */
    _Atomic uint32_t gen; /* raised by DESTROY, reset, and an INIT without either: older requests are void */
    _Atomic bool ready;   /* INIT is done and DESTROY is not */
    vnd_init_result init; /* what it was answered, under lock */
    _Atomic uint64_t detached_bytes;
    _Atomic int64_t slow_until_ms; /* coarse_ms; 0: no call of this guest was slow */
    struct held_stripe held[FUSE_HELD_STRIPES];
    struct held_budget budget[2];                /* by enum fuse_held_kind */
    struct fuse_waiting_worker *waiting_workers; /* idle ones of fuse/detach.c, under lock */
    uint32_t owner;                              /* number of its front-end; 0: what it holds outlives nothing */
    struct fuse_kept *kept;                      /* NULL: nothing outlives the process; changed under lock */
    struct backing *backing;                     /* NULL: the kernel reads nothing by itself */
    bool keeps_root;                             /* the transport tells when the root's attributes change */
    _Atomic bool backs_files;                    /* the kernel took it: every open of an image's files is counted */
};

/* One request being served. */
struct fuse_call {
    struct fuse_session *s;
    struct fuse_worker *w;
    struct req *r;
    struct vfs_node node;                          /* of in.nodeid, when the operation asks for it */
    bool failed;                                   /* answered with an error that counts as one */
    bool waited;                                   /* a read whose data was not there at once */
    enum req_verdict (*once)(struct fuse_call *c); /* what fuse_once serves it by */
    enum req_step before;                          /* how far a process that died came with it */
    uint16_t error;                                /* answered with it; 0: with success */
    bool unknown;                                  /* answered with ENOSYS: not asked again, and nothing to count */
};

typedef enum req_verdict (*fuse_op_fn)(struct fuse_call *c);

/* ---- fuse/reply.c */
/* Success with len bytes of fixed reply (at most 144). */
enum req_verdict fuse_reply(struct fuse_call *c, const void *data, uint32_t len);
/* Success with the len bytes that stand in the worker's scratch behind room for a header. */
enum req_verdict fuse_reply_scratch(struct fuse_call *c, uint32_t len);
/* error: positive errno. */
enum req_verdict fuse_reply_error(struct fuse_call *c, int error);
/* rc: -errno of the node's file system. EIO of an image says that its metadata is not sound: it is logged. */
enum req_verdict fuse_reply_fs_error(struct fuse_call *c, int rc);
/* Success with the attributes of the call's own node. */
enum req_verdict fuse_reply_attr(struct fuse_call *c, const vnd_attr *attr);
/* The bytes a reply may hold: what fits into the reply space, the scratch and want. */
uint32_t fuse_reply_room(const struct fuse_call *c, uint32_t want);
/* The name in dir that leads to node, and node's attributes, as LOOKUP tells them. */
void fuse_fill_entry(struct fuse_call *c, struct fuse_entry_out *e, const struct vfs_node *dir,
                     const struct vfs_node *node, const vnd_attr *attr);
/* A NUL-ended name at args + off, with pointer and length: 0, -EINVAL (empty, with a '/', unterminated; "." and ".."
 * unless dots is set) or -ENAMETOOLONG. */
int fuse_arg_name(const struct fuse_call *c, uint32_t off, bool dots, const char **name, uint32_t *len);

/* rc: 0 or -errno; success has no payload. */
static inline enum req_verdict fuse_reply_rc(struct fuse_call *c, int rc)
{
    return rc ? fuse_reply_error(c, -rc) : fuse_reply(c, NULL, 0);
}

/* Where a reply's payload is built in the worker's scratch: behind room for a header. */
static inline uint8_t *fuse_scratch(struct fuse_call *c)
{
    return c->w->scratch + sizeof(struct fuse_out_header);
}

/* A reply of len bytes after its header fits. */
static inline bool fuse_has_room(const struct fuse_call *c, size_t len)
{
    return c->r->out_cap >= sizeof(struct fuse_out_header) + len;
}

/* Adds to one of the worker's own counters: no other thread writes them, so no locked instruction. */
static inline void fuse_count(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n, memory_order_relaxed);
}

/* Everything that the connection shows is images: the kernel may be told ENOSYS, which it keeps for all files. */
static inline bool fuse_in_rafs_session(const struct fuse_call *c)
{
    return vfs_session_kind(c->s->vfs) == VND_SESSION_RAFS;
}

/* NULL: the call's node is of a read-only file system. */
static inline const struct fs_rw_ops *fuse_rw_of(const struct fuse_call *c)
{
    return c->node.fs->ops->rw;
}

static inline struct fs_caller fuse_caller_of(const struct fuse_call *c, uint32_t umask)
{
    return (struct fs_caller){ c->r->in.uid, c->r->in.gid, umask };
}

/* ---- fuse/held.c: what the session holds of file systems that can be written to, which other guests share. Any thread. */
enum fuse_held_kind { FUSE_HELD_NODE, FUSE_HELD_FILE };
/* One look-up of an inode, or an open file: 0, -ENOMEM, or -ENFILE where the session would hold more than its share. */
int fuse_hold(struct fuse_session *s, enum fuse_held_kind kind, uint16_t serial, uint64_t id);
/* Takes at most n back: as many as the session held of them. */
uint64_t fuse_give_back(struct fuse_session *s, enum fuse_held_kind kind, uint16_t serial, uint64_t id, uint64_t n);
bool fuse_holds(struct fuse_session *s, enum fuse_held_kind kind, uint16_t serial, uint64_t id);
/* Everything, by a thread that is inside as reader. */
void fuse_give_all_back(struct fuse_session *s, struct vfs_reader *reader);
/* What a session of this owner held in another process. By a thread that is inside. */
void fuse_take_all_held(struct fuse_session *s);
void fuse_held_init(struct fuse_session *s);
void fuse_held_free(struct fuse_session *s);

/* The entry or file that the call has just got is the session's; where that cannot be, it is given back. 0 or -errno. */
static inline int fuse_hold_node(struct fuse_call *c, const struct vfs_node *node)
{
    int rc = fuse_hold(c->s, FUSE_HELD_NODE, node->serial, node->ino);

    if (rc)
        node->fs->ops->rw->forget(node->fs, node->ino, 1);
    return rc;
}
static inline int fuse_hold_file(struct fuse_call *c, uint64_t fh)
{
    int rc = fuse_hold(c->s, FUSE_HELD_FILE, c->node.serial, fh);

    if (rc)
        c->node.fs->ops->rw->release(c->node.fs, fh);
    return rc;
}
/* Asked before something is opened or made: there may be nothing left on the host of what a guest cannot be given. */
static inline bool fuse_holds_all(const struct fuse_call *c, enum fuse_held_kind kind)
{
    const struct held_budget *b = &c->s->budget[kind];

    return atomic_load_explicit(&b->mine, memory_order_relaxed) + atomic_load_explicit(b->all, memory_order_relaxed) >=
           b->all_max;
}
/* fh names no file of this session. 0 names none and is the file system's to judge. */
static inline bool fuse_is_foreign(struct fuse_call *c, uint64_t fh)
{
    return fh && !fuse_holds(c->s, FUSE_HELD_FILE, c->node.serial, fh);
}

/* ---- fuse/once.c: operations that must not be done twice */
/* Serves the request by c->once, unless a process that died has done so; notes how far it is. */
enum req_verdict fuse_once(struct fuse_call *c);
/* rc of making name in the call's directory: where a process that died may have made it and it is there now, it is looked up,
 * as if this call had made it. 0 with attr, or -errno. */
int fuse_made_before(struct fuse_call *c, int rc, const char *name, vnd_attr *attr);
/* rc of taking something away: where a process that died may have done so, gone is no error. gone: the -errno that says so. */
int fuse_gone_before(const struct fuse_call *c, int rc, int gone);
/* The file ends with these bytes: an append that a process began, and died in, was done. */
bool fuse_was_appended(struct fuse_call *c, uint64_t fh, const struct iovec *iov, int n, uint32_t len);

/* ---- fuse/detach.c: requests that may take long */
/* Serves the request by fn on this thread, or has a thread of the file system serve it where that may take long. */
enum req_verdict fuse_rw_serve(struct fuse_call *c, fuse_op_fn fn);
/* Has a thread of the file system serve it; on this one where there is no memory or too much is detached already. */
enum req_verdict fuse_rw_detach(struct fuse_call *c, fuse_op_fn fn);
/* The reply of a request that another thread has served (wait.answer). */
enum req_verdict fuse_rw_finish(struct fuse_call *c);
void fuse_waiting_workers_free(struct fuse_session *s);

/* ---- fuse/ops.c: on any file system; where one that can be written to answers otherwise, the table names that */
enum req_verdict fuse_op_lookup(struct fuse_call *c);
enum req_verdict fuse_op_forget(struct fuse_call *c);
enum req_verdict fuse_op_batch_forget(struct fuse_call *c);
enum req_verdict fuse_op_getattr(struct fuse_call *c);
enum req_verdict fuse_op_readlink(struct fuse_call *c);
enum req_verdict fuse_op_open(struct fuse_call *c);
enum req_verdict fuse_op_opendir(struct fuse_call *c);
enum req_verdict fuse_op_read(struct fuse_call *c);
enum req_verdict fuse_op_release(struct fuse_call *c);
enum req_verdict fuse_op_readdir(struct fuse_call *c);
enum req_verdict fuse_op_readdirplus(struct fuse_call *c);
enum req_verdict fuse_op_getxattr(struct fuse_call *c);
enum req_verdict fuse_op_listxattr(struct fuse_call *c);
enum req_verdict fuse_op_statfs(struct fuse_call *c);
enum req_verdict fuse_op_access(struct fuse_call *c);
enum req_verdict fuse_op_lseek(struct fuse_call *c);

/* ---- fuse/ops_rw.c and fuse/ops_names.c: the call's node is of a file system that can be written to... */
enum req_verdict fuse_rw_open(struct fuse_call *c);
enum req_verdict fuse_rw_opendir(struct fuse_call *c);
enum req_verdict fuse_rw_read(struct fuse_call *c);
enum req_verdict fuse_rw_write(struct fuse_call *c);
enum req_verdict fuse_rw_release(struct fuse_call *c);
enum req_verdict fuse_rw_flush(struct fuse_call *c);
enum req_verdict fuse_rw_fsync(struct fuse_call *c);
enum req_verdict fuse_rw_setattr(struct fuse_call *c);
enum req_verdict fuse_rw_lseek(struct fuse_call *c);
enum req_verdict fuse_rw_statfs(struct fuse_call *c);
enum req_verdict fuse_rw_fallocate(struct fuse_call *c);
enum req_verdict fuse_rw_copy_file_range(struct fuse_call *c);
enum req_verdict fuse_rw_setxattr(struct fuse_call *c);
enum req_verdict fuse_rw_removexattr(struct fuse_call *c);
enum req_verdict fuse_rw_mkdir(struct fuse_call *c);
enum req_verdict fuse_rw_mknod(struct fuse_call *c);
enum req_verdict fuse_rw_symlink(struct fuse_call *c);
enum req_verdict fuse_rw_link(struct fuse_call *c);
enum req_verdict fuse_rw_unlink(struct fuse_call *c);
enum req_verdict fuse_rw_rmdir(struct fuse_call *c);
enum req_verdict fuse_rw_rename(struct fuse_call *c);
enum req_verdict fuse_rw_rename2(struct fuse_call *c);
enum req_verdict fuse_rw_create(struct fuse_call *c);
enum req_verdict fuse_rw_tmpfile(struct fuse_call *c);
/* ... but for this, which asks every mount that can be written to. */
enum req_verdict fuse_op_syncfs(struct fuse_call *c);

#endif
