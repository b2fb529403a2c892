/* fuse/fuse.h -- one FUSE connection: the state that INIT begins, decoding, dispatch by one opcode table, encoding.
 *
 * What it is: the protocol between a kernel and a mount table (fs/vfs.h). It knows no transport: a transport fills a
 * struct req (fuse/req.h), has it served here, and moves the bytes of the reply.
 * Threads: a session serves any number of threads at once; each brings a fuse_worker of its own. Requests that may take
 * long run on a thread of their file system (fuse/detach.c); the transport gets them back by req.wait.wake.
 * Locks: the session's own lock (INIT, DESTROY and reset against each other; idle workers), and those over what it holds
 * (fuse/held.c); each is taken alone and for a moment. No lock on the way of a read of an image.
 * Guests that share a file system share none of each other's state: counts of nodes, open files and their number are a
 * session's.
 * Ownership: the transport owns requests and workers, the session owns detached copies of requests. Engine and mount table
 * outlive the session.
 * It may use base, blob, cache, store and fs. Errors are -errno, except fuse_reply_error and fuse_session_fail, which
 * take the positive errno that they write.
 */
#ifndef VND_FUSE_SESSION_H
#define VND_FUSE_SESSION_H
#include "base/base.h"
#include "fs/vfs.h"
#include "fuse/req.h"

/* Largest read, write, listing or xattr of one request: what INIT grants (256 pages). */
#define FUSE_REPLY_MAX (1u << 20)

struct fuse_session;

/* What a serving thread owns: scratch and counters. Allocated once for each thread, never shared. */
struct fuse_worker {
    struct vnd_engine *engine;
    struct engine_counters counters;
    uint32_t metrics_shard; /* fs/metrics.h */
    int64_t now_us;         /* CLOCK_MONOTONIC when the thread last looked: where its next request begins */
    struct extent extents[STORE_EXTENTS_MAX];
    struct iovec iov[REQ_IOV_MAX];
    bool may_wait;            /* its thread serves no queue: calls may take as long as they do */
    struct vfs_reader reader; /* the mount table waits for it */
    uint8_t *scratch;         /* room for a header and FUSE_REPLY_MAX: listings and xattrs, copied out once */
    uint32_t scratch_bytes;
};
/* Registers with engine and mount table. 0 or -ENOMEM. */
int fuse_worker_init(struct fuse_worker *w, struct vnd_engine *e, struct vnd_vfs *v);
void fuse_worker_free(struct fuse_worker *w, struct vnd_vfs *v);

struct backing;
struct fuse_kept;

/* NULL: no memory. */
struct fuse_session *fuse_session_new(struct vnd_engine *e, struct vnd_vfs *v);
/* When no thread serves and no request is parked. */
void fuse_session_free(struct fuse_session *s);
/* Serves one request; also serves a woken one again (the same struct, with wait.err, wait.buf or wait.answer set by the
 * store or the file system). A request of an older session_gen (from before the last INIT or reset) gets REQ_NOREPLY. */
enum req_verdict fuse_session_serve(struct fuse_session *s, struct fuse_worker *w, struct req *r);
/* Writes an error reply if there is room: REQ_REPLY or REQ_NOREPLY. For requests whose deadline has passed. */
enum req_verdict fuse_session_fail(struct fuse_session *s, struct fuse_worker *w, struct req *r, int error);
/* The connection is as before INIT; requests that are parked become void. Not from within a request. */
void fuse_session_reset(struct fuse_session *s);
/* The generation that new requests belong to. */
uint32_t fuse_session_gen(struct fuse_session *s);
/* Goes on with a connection that another process negotiated: no INIT will come. */
void fuse_session_resume(struct fuse_session *s);
/* Its front-end's number, under which what it holds is noted. What it held in another process is its own from here on. Before
 * the first request. */
void fuse_session_set_owner(struct fuse_session *s, uint32_t owner);
/* Keeps what INIT and DESTROY lead to in k (fuse/kept.h), which outlives the process; what another process left there is
 * gone on with. NULL: nowhere. While no thread serves. k outlives the session, or another call. */
void fuse_session_keep(struct fuse_session *s, struct fuse_kept *k);
/* What INIT was answered, for a process that goes on with the session. False: no INIT is in force. */
bool fuse_session_init_get(struct fuse_session *s, vnd_init_result *out);
/* Goes on with a session that was so negotiated. -EOPNOTSUPP: this one would not have answered that. */
int fuse_session_resume_as(struct fuse_session *s, const vnd_init_result *init);
/* Before INIT: offers the kernel that it reads files of images by itself (fs/backing.h); b must outlive the session.
 * NULL: it is not offered. */
void fuse_session_set_backing(struct fuse_session *s, struct backing *b);
/* Before INIT: the kernel may keep the attributes of the root, because the transport tells it when they change. */
void fuse_session_keep_root(struct fuse_session *s);
/* INIT was answered, and no DESTROY came. */
bool fuse_session_ready(struct fuse_session *s);

#endif
