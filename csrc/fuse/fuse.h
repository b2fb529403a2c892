/* fuse/fuse.h -- one FUSE connection: INIT state, decode, dispatch by one opcode table, encode.
 * Transport-free. */
#ifndef VND_FUSE_SESSION_H
#define VND_FUSE_SESSION_H
#include "base/engine.h"
#include "fuse/req.h"

struct fuse_session;

/* What a serving thread owns: scratch and counters. One per queue thread; allocate once, never share. */
struct fuse_worker {
    struct vnd_engine *engine;
    struct engine_counters counters;
    uint32_t metrics_shard; /* fs/metrics.h */
    int64_t now_us;         /* CLOCK_MONOTONIC when the thread last looked: where its next request begins */
    struct extent extents[STORE_EXTENTS_MAX];
    struct iovec iov[REQ_IOV_MAX];
    bool may_wait;            /* its thread serves no queue: calls may take as long as they do */
    _Atomic uint64_t epoch;   /* vfs quiescence: odd while inside serve */
    struct fuse_worker *next; /* list in the vfs */
    uint8_t *scratch;         /* 1 MiB + header: listings and xattrs are built here, then copied out once */
    uint32_t scratch_bytes;
};
/* Registers with engine and vfs. */
int fuse_worker_init(struct fuse_worker *w, struct vnd_engine *e, struct vnd_vfs *v);
void fuse_worker_free(struct fuse_worker *w, struct vnd_vfs *v);

struct backing;

struct fuse_session *fuse_session_new(struct vnd_engine *e, struct vnd_vfs *v);
void fuse_session_free(struct fuse_session *s);
/* Serves one request; also re-runs a woken one (same struct, wait.err or wait.buf set by the store). Requests of an
 * older session_gen (before the last INIT or reset) get REQ_NOREPLY. */
enum req_verdict fuse_session_serve(struct fuse_session *s, struct fuse_worker *w, struct req *r);
/* Writes an error reply (positive errno) if there is room: REQ_REPLY or REQ_NOREPLY. Used on expiry. */
enum req_verdict fuse_session_fail(struct fuse_session *s, struct fuse_worker *w, struct req *r, int error);
void fuse_session_reset(struct fuse_session *s);   /* as before INIT */
uint32_t fuse_session_gen(struct fuse_session *s); /* for new requests */
/* Goes on with a connection that another process negotiated: no INIT will come. */
void fuse_session_resume(struct fuse_session *s);
/* Before INIT: offers passthrough (fs/backing.h); b must outlive the session. */
void fuse_session_set_backing(struct fuse_session *s, struct backing *b);
/* Before INIT: the kernel may keep the attributes of the root, because the transport tells it when they change. */
void fuse_session_keep_root(struct fuse_session *s);
bool fuse_session_ready(struct fuse_session *s); /* INIT was answered */

#endif
