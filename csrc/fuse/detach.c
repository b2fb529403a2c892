/* fuse/detach.c -- requests that may take long leave the queue's thread, so that a slow disk or a server behind a host
 * directory delays no other request of the queue, least of all a warm read of an image.
 *
 * A copy of the request, whose memory is the heap's (only a queue's thread touches its guest's), is served by a thread of
 * the file system; its reply is copied to the guest when the request is woken.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "fuse/internal.h"

/* Bytes of detached requests, of one session and of all sessions of the engine. No session has more than it leaves to the
 * others. Above any of these a request is served where it came in. */
#define DETACHED_BYTES_MAX (128u << 20)
#define DETACHED_ALL_MAX (512ull << 20)
#define BODY_MAX (FUSE_REPLY_MAX + 4096u)
/* To free more than that takes a file system long. */
#define TRUNCATE_BYTES (4u << 20)
/* After a call that took longer, all of this guest's are detached for a while: its disk may be busy. Less may be a busy
 * machine, where a thread waits that long for a processor. Another guest's calls are not, for they would cost more by what
 * this one has done. */
#define SLOW_MS 100
#define SLOW_FOR_MS 2000

struct detached {
    struct store_answer answer; /* first */
    struct fuse_session *s;
    struct store_wait *origin;
    struct req r;
    size_t bytes;    /* of all this */
    uint16_t serial; /* of the mount whose thread serves it */
    enum req_verdict verdict;
    uint8_t *out; /* behind the body */
    uint8_t body[];
};

/* A worker whose thread may wait. The session keeps them for the next request. */
struct fuse_waiting_worker {
    struct fuse_worker w;
    struct fuse_waiting_worker *next;
};

static struct detached *detached_of(struct req *r)
{
    return (struct detached *)(void *)((char *)r - offsetof(struct detached, r));
}

static int detached_in_copy(struct req *r, uint32_t off, void *dst, uint32_t len)
{
    if (off > r->body_len || len > r->body_len - off)
        return -EINVAL;
    memcpy(dst, detached_of(r)->body + off, len);
    return 0;
}

static int detached_out_copy(struct req *r, uint32_t off, const void *src, uint32_t len)
{
    if (off > r->out_cap || len > r->out_cap - off)
        return -EFAULT;
    memcpy(detached_of(r)->out + off, src, len);
    return 0;
}

static int detached_out_iov(struct req *r, uint32_t off, uint32_t len, struct iovec *iov, int max)
{
    if (off > r->out_cap || len > r->out_cap - off || max < 1)
        return -EFAULT;
    iov[0] = (struct iovec){ detached_of(r)->out + off, len };
    return 1;
}

static int detached_in_iov(struct req *r, uint32_t off, uint32_t len, struct iovec *iov, int max)
{
    if (off > r->body_len || len > r->body_len - off || max < 1)
        return -EINVAL;
    iov[0] = (struct iovec){ detached_of(r)->body + off, len };
    return 1;
}

static void detached_out_dirty(struct req *r, uint32_t off, uint32_t len)
{
}

static const struct req_ops detached_ops = {
    .in_copy = detached_in_copy,
    .out_copy = detached_out_copy,
    .out_iov = detached_out_iov,
    .out_dirty = detached_out_dirty,
    .in_iov = detached_in_iov,
};

static void drop(struct store_answer *a)
{
    struct detached *d = (struct detached *)a;

    atomic_fetch_sub_explicit(&d->s->detached_bytes, d->bytes, memory_order_relaxed);
    atomic_fetch_sub_explicit(&d->s->engine->detached_bytes, d->bytes, memory_order_relaxed);
    free(d);
}

/* ---- on the file system's thread */

static struct fuse_waiting_worker *worker_take(struct fuse_session *s)
{
    struct fuse_waiting_worker *w;

    pthread_mutex_lock(&s->lock);
    w = s->waiting_workers;
    if (w)
        s->waiting_workers = w->next;
    pthread_mutex_unlock(&s->lock);
    if (w)
        return w;
    w = malloc(sizeof(*w));
    if (!w || fuse_worker_init(&w->w, s->engine, s->vfs)) {
        free(w);
        return NULL;
    }
    w->w.may_wait = true;
    return w;
}

static void worker_give(struct fuse_session *s, struct fuse_waiting_worker *w)
{
    pthread_mutex_lock(&s->lock);
    w->next = s->waiting_workers;
    s->waiting_workers = w;
    pthread_mutex_unlock(&s->lock);
}

void fuse_waiting_workers_free(struct fuse_session *s)
{
    for (struct fuse_waiting_worker *w = s->waiting_workers, *next; w; w = next) {
        next = w->next;
        fuse_worker_free(&w->w, s->vfs);
        free(w);
    }
    s->waiting_workers = NULL;
}

static void serve_detached(void *arg)
{
    struct detached *d = arg;
    struct fuse_waiting_worker *w = worker_take(d->s);

    d->verdict = REQ_PARKED; /* that stands for: not served */
    if (w) {
        d->verdict = d->s->serve(d->s, &w->w, &d->r);
        worker_give(d->s, w);
    }
    d->origin->answer = &d->answer;
}

/* ---- on the queue's thread */

/* Frees more than TRUNCATE_BYTES. */
static bool truncates_much(struct fuse_call *c, uint64_t size_bytes)
{
    vnd_attr attr;

    return c->node.fs->ops->getattr(c->node.fs, c->node.ino, &attr) == 0 && attr.blocks * 512 > TRUNCATE_BYTES &&
           attr.blocks * 512 - TRUNCATE_BYTES > size_bytes;
}

static bool takes_long(struct fuse_call *c)
{
    struct fuse_setattr_in set;
    struct fuse_open_in open;

    switch (c->r->in.opcode) {
    case FUSE_OP_FSYNC:
    case FUSE_OP_FSYNCDIR:
    case FUSE_OP_FALLOCATE:
    case FUSE_OP_COPY_FILE_RANGE: return true;
    case FUSE_OP_SETATTR:
        if (c->r->args_len < sizeof(set))
            return false;
        memcpy(&set, c->r->args, sizeof(set));
        return set.valid & FUSE_SET_SIZE && truncates_much(c, set.size);
    case FUSE_OP_OPEN: memcpy(&open, c->r->args, sizeof(open)); return open.flags & O_TRUNC && truncates_much(c, 0);
    default: return false;
    }
}

static bool has_budget(struct fuse_session *s, size_t bytes)
{
    uint64_t mine = atomic_load_explicit(&s->detached_bytes, memory_order_relaxed) + bytes;

    return mine <= DETACHED_BYTES_MAX &&
           atomic_load_explicit(&s->engine->detached_bytes, memory_order_relaxed) + mine <= DETACHED_ALL_MAX;
}

enum req_verdict fuse_rw_detach(struct fuse_call *c, fuse_op_fn fn)
{
    struct req *r = c->r;
    uint32_t out = r->out_cap < BODY_MAX ? r->out_cap : BODY_MAX;
    size_t bytes = sizeof(struct detached) + r->body_len + out;
    struct detached *d = NULL;

    if (r->body_len <= BODY_MAX && has_budget(c->s, bytes))
        d = malloc(bytes);
    if (!d)
        return fn(c);
    *d = (struct detached){ .answer = { drop }, .s = c->s, .origin = &r->wait, .r = *r, .bytes = bytes };
    d->out = d->body + r->body_len;
    d->r.ops = &detached_ops;
    d->r.out_cap = out;
    store_wait_init(&d->r.wait, NULL, NULL);
    d->r.wait.who = r->wait.who;
    /* What was checked is what is used: the rest alone is read from the guest. */
    memcpy(d->body, r->args, r->args_len);
    if (r->body_len > r->args_len &&
        r->ops->in_copy(r, r->args_len, d->body + r->args_len, r->body_len - r->args_len)) {
        free(d);
        return fuse_reply_error(c, EFAULT);
    }
    atomic_fetch_add_explicit(&c->s->detached_bytes, bytes, memory_order_relaxed);
    atomic_fetch_add_explicit(&c->s->engine->detached_bytes, bytes, memory_order_relaxed);
    d->serial = c->node.serial;
    if (c->node.fs->ops->rw->run(c->node.fs, &r->wait, serve_detached, d) != -EINPROGRESS) {
        drop(&d->answer);
        return fn(c);
    }
    return REQ_PARKED;
}

static bool was_slow(struct fuse_session *s)
{
    int64_t until = atomic_load_explicit(&s->slow_until_ms, memory_order_relaxed);

    return until && coarse_ms() < until;
}

enum req_verdict fuse_rw_serve(struct fuse_call *c, fuse_op_fn fn)
{
    enum req_verdict verdict;
    int64_t start;

    if (c->w->may_wait)
        return fn(c);
    if (takes_long(c) || was_slow(c->s) || fuse_rw_of(c)->may_wait(c->node.fs, c->node.ino))
        return fuse_rw_detach(c, fn);
    start = coarse_ms();
    verdict = fn(c);
    if (coarse_ms() - start > SLOW_MS)
        atomic_store_explicit(&c->s->slow_until_ms, coarse_ms() + SLOW_FOR_MS, memory_order_relaxed);
    return verdict;
}

enum req_verdict fuse_rw_finish(struct fuse_call *c)
{
    struct req *r = c->r;
    struct detached *d = (struct detached *)r->wait.answer;
    enum req_verdict verdict = d->verdict;

    r->out_len = 0;
    r->step = d->serial;
    if (r->session_gen != atomic_load_explicit(&c->s->gen, memory_order_acquire)) {
        verdict = REQ_NOREPLY; /* of a guest that was reset meanwhile */
    } else if (verdict == REQ_PARKED) {
        verdict = fuse_reply_error(c, ENOMEM);
    } else if (verdict == REQ_REPLY) {
        struct fuse_out_header h;

        memcpy(&h, d->out, sizeof(h));
        c->failed = h.error != 0;
        if (r->ops->out_copy(r, 0, d->out, d->r.out_len))
            verdict = REQ_NOREPLY;
        else
            r->out_len = d->r.out_len;
    }
    store_wait_done(&r->wait);
    return verdict;
}
