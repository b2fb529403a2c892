/* vhost/request.c -- the requests of a queue: from a head to a copied request, served, parked, woken, expired,
 * answered. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vhost/internal.h"

/* A FUSE request is 1 MiB and a header; more than this is nonsense and answered so. */
#define REQUEST_BYTES_MAX (4u << 20)

static struct queue_slot *slot_of(struct req *r)
{
    return (struct queue_slot *)(void *)((char *)r - offsetof(struct queue_slot, req));
}

/* ---- guest memory of a request, as ranges of host memory that are valid until the thread takes a new table */

struct cursor {
    struct queue *q;
    const struct vring_seg *seg;
    uint32_t n, skip, left; /* segments, bytes to skip in the first, bytes wanted */
    uint8_t *host;          /* the piece */
    uint64_t gpa, len;
};

/* Bytes [off, off+len) of the readable or writable part. False: out of its bounds. */
static bool cursor_open(struct cursor *c, const struct queue_slot *s, bool out, uint32_t off, uint32_t len)
{
    *c = (struct cursor){
        .q = s->queue, .seg = s->segs + (out ? s->n_in : 0), .n = out ? s->n_out : s->n_in, .left = len
    };
    while (c->n > 0 && off >= c->seg->len) {
        off -= c->seg->len;
        c->seg++;
        c->n--;
    }
    c->skip = off;
    return c->n > 0 || (off == 0 && len == 0);
}

/* 1: a piece, 0: the end, -EFAULT. */
static int cursor_next(struct cursor *c)
{
    uint64_t want;

    if (c->left == 0)
        return 0;
    if (c->n == 0)
        return -EFAULT;
    c->gpa = c->seg->gpa + c->skip;
    want = c->seg->len - c->skip;
    if (want > c->left)
        want = c->left;
    c->host = guestmem_host(c->q->mem, &c->q->mem_hint, c->gpa, want, &c->len);
    if (c->host == NULL)
        return -EFAULT;
    c->left -= (uint32_t)c->len;
    c->skip += (uint32_t)c->len;
    if (c->skip == c->seg->len) {
        c->skip = 0;
        c->seg++;
        c->n--;
    }
    return 1;
}

static int copy_in(const struct queue_slot *s, uint32_t off, void *dst, uint32_t len)
{
    struct cursor c;
    uint8_t *to = dst;
    int rc;

    if (!cursor_open(&c, s, false, off, len))
        return -EINVAL;
    while ((rc = cursor_next(&c)) > 0) {
        memcpy(to, c.host, c.len);
        to += c.len;
    }
    /* The guest may write on: what was copied is what counts. */
    atomic_signal_fence(memory_order_seq_cst);
    return rc;
}

static int op_in_copy(struct req *r, uint32_t off, void *dst, uint32_t len)
{
    if (off > r->body_len || len > r->body_len - off)
        return -EINVAL;
    return copy_in(slot_of(r), off + (uint32_t)sizeof(r->in), dst, len);
}

/* The pieces of a range, adjacent ones joined: their number or -EFAULT. */
static int collect(struct cursor *c, struct iovec *iov, int max)
{
    int n = 0, rc;

    while ((rc = cursor_next(c)) > 0) {
        if (n > 0 && (uint8_t *)iov[n - 1].iov_base + iov[n - 1].iov_len == c->host) {
            iov[n - 1].iov_len += c->len;
            continue;
        }
        if (n == max)
            return -EFAULT;
        iov[n++] = (struct iovec){ .iov_base = c->host, .iov_len = c->len };
    }
    return rc < 0 ? rc : n;
}

static int op_in_iov(struct req *r, uint32_t off, uint32_t len, struct iovec *iov, int max)
{
    struct cursor c;

    if (off > r->body_len || len > r->body_len - off ||
        !cursor_open(&c, slot_of(r), false, off + (uint32_t)sizeof(r->in), len))
        return -EFAULT;
    return collect(&c, iov, max);
}

static int op_out_copy(struct req *r, uint32_t off, const void *src, uint32_t len)
{
    struct queue_slot *s = slot_of(r);
    const uint8_t *from = src;
    struct cursor c;
    int rc;

    if (off > r->out_cap || len > r->out_cap - off || !cursor_open(&c, s, true, off, len))
        return -EFAULT;
    while ((rc = cursor_next(&c)) > 0) {
        guestmem_write(s->queue->log, c.host, from, c.len, c.gpa);
        from += c.len;
    }
    return rc;
}

static int op_out_iov(struct req *r, uint32_t off, uint32_t len, struct iovec *iov, int max)
{
    struct cursor c;

    if (off > r->out_cap || len > r->out_cap - off || !cursor_open(&c, slot_of(r), true, off, len))
        return -EFAULT;
    return collect(&c, iov, max);
}

static void op_out_dirty(struct req *r, uint32_t off, uint32_t len)
{
    struct queue_slot *s = slot_of(r);
    struct cursor c;

    if (s->queue->log == NULL || !cursor_open(&c, s, true, off, len))
        return;
    while (cursor_next(&c) > 0)
        guestmem_mark(s->queue->log, c.gpa, c.len);
}

static const struct req_ops queue_req_ops = {
    .in_copy = op_in_copy,
    .out_copy = op_out_copy,
    .out_iov = op_out_iov,
    .out_dirty = op_out_dirty,
    .in_iov = op_in_iov,
};

/* ---- parked requests */

static void note_oldest(struct queue *q)
{
    atomic_store_explicit(&q->worker.counters.oldest_park_us, q->first ? q->first->parked_us : 0, memory_order_relaxed);
}

static void link_parked(struct queue *q, struct queue_slot *s)
{
    pthread_mutex_lock(&q->parked_lock);
    s->prev = q->last;
    s->next = NULL;
    if (q->last != NULL)
        q->last->next = s;
    else
        q->first = s;
    q->last = s;
    pthread_mutex_unlock(&q->parked_lock);
    q->n_parked++;
    note_oldest(q);
}

void queue_unpark(struct queue *q, struct queue_slot *s)
{
    pthread_mutex_lock(&q->parked_lock);
    if (s->prev != NULL)
        s->prev->next = s->next;
    else
        q->first = s->next;
    if (s->next != NULL)
        s->next->prev = s->prev;
    else
        q->last = s->prev;
    s->prev = s->next = NULL;
    pthread_mutex_unlock(&q->parked_lock);
    q->n_parked--;
    note_oldest(q);
}

int queue_list_waiting(struct engine_counters *c, vnd_waiting *out, int max, int64_t now)
{
    struct queue *q = (struct queue *)(void *)((char *)c - offsetof(struct queue, worker.counters));
    int n = 0;

    pthread_mutex_lock(&q->parked_lock);
    for (const struct queue_slot *s = q->first; s != NULL && n < max; s = s->next)
        out[n++] = (vnd_waiting){ .nodeid = s->req.in.nodeid,
                                  .unique = s->req.in.unique,
                                  .opcode = s->req.in.opcode,
                                  .wait_us = now > s->parked_us ? (uint64_t)(now - s->parked_us) : 0 };
    pthread_mutex_unlock(&q->parked_lock);
    return n;
}

static void free_segs(struct queue_slot *s)
{
    if (s->segs_on_heap) {
        uint32_t bytes = (s->n_in + s->n_out) * (uint32_t)sizeof(*s->segs);

        free((void *)(uintptr_t)s->segs);
        atomic_fetch_sub_explicit(s->queue->segs_bytes, bytes, memory_order_relaxed);
        s->segs_on_heap = 0;
    }
    s->segs = NULL;
    s->n_in = s->n_out = 0;
}

/* The ranges leave the queue's scratch. False: no room. */
static bool keep_segs(struct queue *q, struct queue_slot *s)
{
    uint32_t n = s->n_in + s->n_out, bytes = n * (uint32_t)sizeof(*s->segs);
    struct vring_seg *heap;

    if (n <= QUEUE_SEGS_OWN) {
        memcpy(s->own, s->segs, bytes);
        s->segs = s->own;
        return true;
    }
    if (atomic_fetch_add_explicit(q->segs_bytes, bytes, memory_order_relaxed) + bytes <= QUEUE_SEGS_BUDGET) {
        heap = malloc(bytes);
        if (heap != NULL) {
            memcpy(heap, s->segs, bytes);
            s->segs = heap;
            s->segs_on_heap = 1;
            return true;
        }
    }
    atomic_fetch_sub_explicit(q->segs_bytes, bytes, memory_order_relaxed);
    return false;
}

/* Only what an error reply needs: the out header, in at most as many ranges as it has bytes. */
static void keep_reply_head(struct queue_slot *s)
{
    uint32_t n = s->n_out < sizeof(struct fuse_out_header) ? s->n_out : (uint32_t)sizeof(struct fuse_out_header);

    memcpy(s->own, s->segs + s->n_in, n * sizeof(s->own[0]));
    s->segs = s->own;
    s->n_in = 0;
    s->n_out = n;
}

/* The head's slot may serve again. */
void queue_release(struct queue *q, struct queue_slot *s)
{
    free_segs(s);
    s->state = SLOT_FREE;
    inflight_drop(&q->inflight, s->head);
}

static void answer(struct queue *q, struct queue_slot *s, enum req_verdict verdict)
{
    uint32_t len = verdict == REQ_REPLY && s->req.out_len <= s->req.out_cap ? s->req.out_len : 0;

    if (s->state != SLOT_SERVING)
        queue_unpark(q, s);
    free_segs(s);
    s->state = SLOT_STAGED;
    vring_stage(&q->vring, s->head, len);
    if (q->vring.n_staged == VRING_BATCH)
        queue_flush(q);
}

static void fail(struct queue *q, struct queue_slot *s, int error)
{
    answer(q, s, fuse_session_fail(q->session, &q->worker, &s->req, error));
}

static void park(struct queue *q, struct queue_slot *s)
{
    if (s->state != SLOT_SERVING) {
        s->state = SLOT_PARKED; /* again: it keeps its place and its deadline */
        return;
    }
    if (keep_segs(q, s)) {
        s->state = SLOT_PARKED;
    } else if (store_wait_cancel(&s->req.wait)) {
        fail(q, s, EIO);
        return;
    } else {
        keep_reply_head(s);
        s->state = SLOT_DOOMED;
    }
    s->parked_us = s->deadline_us - q->deadline_us;
    link_parked(q, s);
}

static void serve(struct queue *q, struct queue_slot *s)
{
    enum req_verdict verdict = fuse_session_serve(q->session, &q->worker, &s->req);

    if (verdict == REQ_PARKED)
        park(q, s);
    else
        answer(q, s, verdict);
}

/* Copies header and arguments, once. */
static int load_request(struct queue *q, struct queue_slot *s, const struct vring_chain *c)
{
    struct req *r = &s->req;
    uint32_t head = c->in_bytes < sizeof(r->in) ? c->in_bytes : (uint32_t)sizeof(r->in);
    int rc;

    s->n_in = c->n_in;
    s->n_out = c->n_out;
    s->segs = c->seg;
    memset(&r->in, 0, sizeof(r->in));
    r->body_len = c->in_bytes - head;
    r->args_len = r->body_len < REQ_ARGS_MAX ? r->body_len : REQ_ARGS_MAX;
    r->out_cap = c->out_bytes;
    r->out_len = 0;
    r->began_us = 0;
    r->ops = &queue_req_ops;
    store_wait_init(&r->wait, queue_wake, s);
    rc = copy_in(s, 0, &r->in, head);
    if (rc == 0)
        rc = copy_in(s, head, r->args, r->args_len);
    if (r->args_len < REQ_ARGS_MAX)
        r->args[r->args_len] = 0;
    r->args_nul = 0;
    r->session_gen = fuse_session_gen(q->session);
    return rc;
}

void queue_fetch_head(struct queue *q, uint16_t head, bool again, int64_t now)
{
    struct queue_slot *s = &q->slots[head];
    const char *why = NULL;
    int rc;

    if (s->state != SLOT_FREE || (!again && inflight_busy(&q->inflight, head))) {
        queue_break(q, VND_CAUSE_GUEST, "a descriptor that is in use was offered again");
        return;
    }
    rc = vring_walk(&q->vring, q->mem, &q->mem_hint, head, &q->chain, &why);
    if (rc == -EBADMSG) {
        queue_break(q, VND_CAUSE_GUEST, why);
        return;
    }
    s->head = head;
    s->queue = q;
    s->state = SLOT_SERVING;
    if (!again)
        inflight_begin(&q->inflight, head);
    if (rc == 0)
        rc = load_request(q, s, &q->chain);
    if (rc != 0) {
        answer(q, s, REQ_NOREPLY); /* its addresses lead nowhere: there is no unique to answer to */
        return;
    }
    s->deadline_us = now + q->deadline_us;
    s->req.wait.deadline_us = s->deadline_us;
    if (q->chain.in_bytes < sizeof(s->req.in) || q->chain.in_bytes > REQUEST_BYTES_MAX ||
        q->chain.out_bytes > REQUEST_BYTES_MAX)
        fail(q, s, EINVAL);
    else
        serve(q, s);
}

/* ---- wakes */

/* Any thread. After the last line the queue may be gone; until then wakers keeps it. */
void queue_wake(struct store_wait *w)
{
    struct queue *q = ((struct queue_slot *)w->owner)->queue;
    struct store_wait *top;
    uint64_t one = 1;

    atomic_fetch_add_explicit(&q->wakers, 1, memory_order_relaxed);
    top = atomic_load_explicit(&q->done, memory_order_relaxed);
    do {
        w->done_next = top;
    } while (!atomic_compare_exchange_weak(&q->done, &top, w));
    if (atomic_load(&q->sleeping) && atomic_exchange(&q->sleeping, 0))
        if (write(q->wake_fd, &one, sizeof(one)) < 0) {
            /* An eventfd that is full is readable all the same. */
        }
    atomic_fetch_sub_explicit(&q->wakers, 1, memory_order_release);
}

/* Next woken request in the order of the wakes, NULL: none. */
struct queue_slot *queue_take_done(struct queue *q)
{
    struct store_wait *w = q->todo;

    if (w == NULL) {
        struct store_wait *list = NULL;

        if (atomic_load_explicit(&q->done, memory_order_relaxed) == NULL)
            return NULL;
        for (w = atomic_exchange_explicit(&q->done, NULL, memory_order_acquire); w != NULL;) {
            struct store_wait *next = w->done_next;

            w->done_next = list;
            list = w;
            w = next;
        }
        w = list;
    }
    q->todo = w->done_next;
    return w->owner;
}

void queue_run_done(struct queue *q)
{
    struct queue_slot *s;

    while (!q->broken && (s = queue_take_done(q)) != NULL) {
        if (s->state == SLOT_DOOMED) {
            store_wait_done(&s->req.wait);
            fail(q, s, EIO);
        } else {
            serve(q, s);
        }
    }
}

void queue_expire(struct queue *q, int64_t now)
{
    struct queue_slot *next;

    for (struct queue_slot *s = q->first; s != NULL && s->deadline_us <= now && !q->broken; s = next) {
        next = s->next;
        if (s->state != SLOT_PARKED)
            continue;
        if (!store_wait_cancel(&s->req.wait)) {
            s->state = SLOT_EXPIRED;
            continue;
        }
        atomic_fetch_add_explicit(&q->worker.counters.expired, 1, memory_order_relaxed);
        engine_say(q->engine, VND_LEVEL_ERROR, VND_CAUSE_DEADLINE,
                   "guest read answered with EIO: its data did not come within %lld ms (queue %u)",
                   (long long)(q->deadline_us / 1000), q->index);
        fail(q, s, EIO);
    }
}

/* The guest stood still, so its requests have as much time as at first. */
void queue_thaw(struct queue *q, int64_t now)
{
    for (struct queue_slot *s = q->first; s != NULL; s = s->next)
        s->deadline_us = now + q->deadline_us;
}

void queue_fail_parked(struct queue *q)
{
    struct queue_slot *next;

    for (struct queue_slot *s = q->first; s != NULL && !q->broken; s = next) {
        next = s->next;
        if (s->state == SLOT_DOOMED)
            continue;
        if (s->state == SLOT_PARKED && store_wait_cancel(&s->req.wait))
            fail(q, s, EIO);
        else
            s->state = SLOT_DOOMED;
    }
}
