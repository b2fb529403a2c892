/* vhost/request.c -- the requests of a queue: from a head to a copied request, served, parked, woken, expired,
 * answered. */
#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vhost/internal.h"

/* ---- guest memory of a request, as ranges of host memory that are valid until the thread takes a new table */

struct cursor {
    struct queue *q;
    const struct vring_seg *seg;
    uint32_t n, skip, left; /* segments, bytes to skip in the first, bytes wanted */
    uint8_t *host;          /* the piece */
    uint64_t gpa, len;
};

/* Bytes [off, off+len) of the readable or writable part. False: out of its bounds. */
static inline bool cursor_open(struct cursor *c, const struct queue_slot *s, bool out, uint32_t off, uint32_t len)
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
static inline int cursor_next(struct cursor *c)
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

#define SIGNAL_BATCH 16 /* a guest that sleeps is not kept waiting for more answers than these */

/* ---- served */

static void answer(struct queue *q, struct queue_slot *s, enum req_verdict verdict)
{
    uint32_t len = verdict == REQ_REPLY && s->req.out_len <= s->req.out_cap ? s->req.out_len : 0;

    if (s->state != SLOT_SERVING)
        queue_unpark(s);
    queue_free_segs(s);
    s->state = SLOT_STAGED;
    vring_stage(&q->vring, s->head, len);
    if (q->vring.n_staged >= q->publish_batch)
        queue_publish(q);
    if ((uint16_t)(q->vring.used_idx - q->vring.signalled_used) >= SIGNAL_BATCH)
        queue_flush(q);
}

static void fail(struct queue *q, struct queue_slot *s, int error)
{
    answer(q, s, q->kind->fail(q, &s->req, error));
}

static void park(struct queue *q, struct queue_slot *s)
{
    s->parked.wakes = false;
    if (s->state != SLOT_SERVING) {
        s->state = SLOT_PARKED; /* again: it keeps its place and its deadline */
        return;
    }
    if (queue_keep_segs(s)) {
        s->state = SLOT_PARKED;
    } else if (store_wait_cancel(&s->req.wait)) {
        fail(q, s, EIO);
        return;
    } else {
        queue_keep_reply(s);
        s->state = SLOT_DOOMED;
        s->parked.wakes = true;
    }
    queue_park(s);
}

static void serve(struct queue *q, struct queue_slot *s)
{
    enum req_verdict verdict = q->kind->serve(q, &s->req);

    if (verdict == REQ_PARKED)
        park(q, s);
    else
        answer(q, s, verdict);
}

/* Copies header and arguments, once. */
static int load_request(struct queue *q, struct queue_slot *s, const struct vring_chain *c)
{
    struct req *r = &s->req;
    uint32_t due = q->kind->header_bytes, head = c->in_bytes < due ? c->in_bytes : due;
    int rc;

    s->n_in = c->n_in;
    s->n_out = c->n_out;
    s->segs = c->seg;
    if (head < sizeof(r->in))
        memset(&r->in, 0, sizeof(r->in));
    r->body_len = c->in_bytes - head;
    r->args_len = r->body_len < REQ_ARGS_MAX ? r->body_len : REQ_ARGS_MAX;
    r->out_cap = c->out_bytes;
    r->out_len = 0;
    r->again = false;
    r->once = NULL;
    r->began_us = 0;
    r->step = 0;
    r->ops = &queue_req_ops;
    store_wait_init(&r->wait, queue_wake, s);
    r->wait.who = q->common->who;
    static_assert(offsetof(struct req, args) == offsetof(struct req, in) + sizeof(r->in), "one copy fills both");
    rc = copy_in(s, 0, (uint8_t *)r + (due != 0 ? offsetof(struct req, in) : offsetof(struct req, args)),
                 head + r->args_len);
    if (r->args_len < REQ_ARGS_MAX)
        r->args[r->args_len] = 0;
    r->args_nul = 0;
    r->session_gen = q->session != NULL ? fuse_session_gen(q->session) : 0;
    return rc;
}

/* The process died twice in a row while this request was in flight: it may be the cause, and is not tried a third time. */
static void give_up(struct queue *q, struct queue_slot *s)
{
    const struct fuse_in_header *in = &s->req.in;

    engine_say(q->engine, VND_LEVEL_ERROR, VND_CAUSE_IO,
               "front-end %u: queue %u: request %llu (operation %u, node 0x%llx) was in flight at two deaths in a row: "
               "it is answered with EIO",
               q->common->number, q->index, (unsigned long long)in->unique, in->opcode, (unsigned long long)in->nodeid);
    fail(q, s, EIO);
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
    s->req.again = again;
    s->req.once = inflight_once(&q->inflight, head);
    s->parked.deadline_us = now + q->deadline_us;
    s->req.wait.deadline_us = s->parked.deadline_us;
    s->req.wait.session = q->common->who;
    if (q->chain.in_bytes < q->kind->request_bytes_min || q->chain.in_bytes > q->kind->request_bytes_max ||
        q->chain.out_bytes > q->kind->request_bytes_max)
        fail(q, s, EINVAL);
    else if (again && inflight_is_fatal(&q->inflight, head))
        give_up(q, s);
    else
        serve(q, s);
}

/* ---- woken, expired, given up */

void queue_run_woken(struct queue *q)
{
    struct queue_slot *s;

    while (!q->broken && (s = queue_take_woken(q)) != NULL) {
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
    struct parked *next;
    char who[64];

    snprintf(who, sizeof(who), "guest read (front-end %u, queue %u)", q->common->number, q->index);
    for (struct parked *p = q->parked.first; p != NULL && p->deadline_us <= now && !q->broken; p = next) {
        struct queue_slot *s = slot_of_parked(p);

        next = p->next;
        if (s->state != SLOT_PARKED)
            continue;
        if (!store_wait_expire(&s->req.wait, q->engine, who, q->deadline_us / 1000)) {
            s->state = SLOT_EXPIRED;
            p->wakes = true;
            continue;
        }
        atomic_fetch_add_explicit(&q->worker.counters.expired, 1, memory_order_relaxed);
        fail(q, s, EIO);
    }
}

void queue_thaw(struct queue *q, int64_t now)
{
    for (struct parked *p = q->parked.first; p != NULL; p = p->next)
        p->deadline_us = now + q->deadline_us;
}

void queue_set_aside(struct queue *q)
{
    struct parked *next;

    for (struct parked *p = q->parked.first; p != NULL; p = next) {
        struct queue_slot *s = slot_of_parked(p);

        next = p->next;
        if (s->state != SLOT_PARKED || !store_wait_cancel(&s->req.wait))
            continue;
        queue_unpark(s);
        queue_free_segs(s);
        s->state = SLOT_FREE;
    }
}

void queue_fail_parked(struct queue *q)
{
    struct parked *next;

    for (struct parked *p = q->parked.first; p != NULL && !q->broken; p = next) {
        struct queue_slot *s = slot_of_parked(p);

        next = p->next;
        if (s->state == SLOT_DOOMED)
            continue;
        if (s->state == SLOT_PARKED && store_wait_cancel(&s->req.wait)) {
            fail(q, s, EIO);
        } else {
            s->state = SLOT_DOOMED;
            p->wakes = true;
        }
    }
}
