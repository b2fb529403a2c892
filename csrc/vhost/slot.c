/* vhost/slot.c -- a request's slot: the ranges of guest memory that it holds, and its way through parked and woken. */
#include <stdlib.h>
#include <string.h>

#include "vhost/internal.h"

/* ---- ranges */

void queue_free_segs(struct queue_slot *s)
{
    if (s->segs_on_heap) {
        uint32_t bytes = (s->n_in + s->n_out) * (uint32_t)sizeof(*s->segs);

        free((void *)(uintptr_t)s->segs);
        atomic_fetch_sub_explicit(&s->queue->common->segs_bytes, bytes, memory_order_relaxed);
        s->segs_on_heap = false;
    }
    s->segs = NULL;
    s->n_in = s->n_out = 0;
}

bool queue_keep_segs(struct queue_slot *s)
{
    uint32_t n = s->n_in + s->n_out, bytes = n * (uint32_t)sizeof(*s->segs);
    _Atomic uint32_t *used = &s->queue->common->segs_bytes;
    struct vring_seg *heap;

    if (n <= QUEUE_SEGS_OWN) {
        memcpy(s->own, s->segs, bytes);
        s->segs = s->own;
        return true;
    }
    if (atomic_fetch_add_explicit(used, bytes, memory_order_relaxed) + bytes <= QUEUE_SEGS_BUDGET) {
        heap = malloc(bytes);
        if (heap != NULL) {
            memcpy(heap, s->segs, bytes);
            s->segs = heap;
            s->segs_on_heap = true;
            return true;
        }
    }
    atomic_fetch_sub_explicit(used, bytes, memory_order_relaxed);
    return false;
}

/* The last writable byte alone. */
static void keep_reply_end(struct queue_slot *s)
{
    const struct vring_seg *last = NULL;

    for (uint32_t i = 0; i < s->n_out; i++)
        if (s->segs[s->n_in + i].len != 0)
            last = &s->segs[s->n_in + i];
    s->n_in = s->n_out = s->req.out_cap = 0;
    if (last != NULL) {
        s->own[0] = (struct vring_seg){ .gpa = last->gpa + last->len - 1, .len = 1 };
        s->n_out = s->req.out_cap = 1;
    }
    s->segs = s->own;
}

/* The out header lies in at most as many ranges as it has bytes. */
void queue_keep_reply(struct queue_slot *s)
{
    if (s->queue->kind->reply_at_end) {
        keep_reply_end(s);
        return;
    }
    uint32_t n = s->n_out < sizeof(struct fuse_out_header) ? s->n_out : (uint32_t)sizeof(struct fuse_out_header);

    memcpy(s->own, s->segs + s->n_in, n * sizeof(s->own[0]));
    s->segs = s->own;
    s->n_in = 0;
    s->n_out = n;
}

/* ---- parked */

void queue_park(struct queue_slot *s)
{
    struct parklist *l = &s->queue->parked;

    s->parked.since_us = s->parked.deadline_us - s->queue->deadline_us;
    s->parked.nodeid = s->req.in.nodeid;
    s->parked.unique = s->req.in.unique;
    s->parked.opcode = s->req.in.opcode;
    pthread_mutex_lock(&l->lock);
    parklist_add(l, &s->parked);
    pthread_mutex_unlock(&l->lock);
}

void queue_unpark(struct queue_slot *s)
{
    struct parklist *l = &s->queue->parked;

    pthread_mutex_lock(&l->lock);
    parklist_remove(l, &s->parked);
    pthread_mutex_unlock(&l->lock);
}

void queue_release(struct queue_slot *s)
{
    queue_free_segs(s);
    s->state = SLOT_FREE;
    inflight_drop(&s->queue->inflight, s->head);
}

/* ---- woken */

void queue_wake(struct store_wait *w)
{
    wakelist_push(&((struct queue_slot *)w->owner)->queue->wakes, &w->done);
}

struct queue_slot *queue_take_woken(struct queue *q)
{
    struct wake_item *item = wakelist_take(&q->wakes);

    return item != NULL ? store_wait_of(item)->owner : NULL;
}
