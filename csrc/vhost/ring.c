/* vhost/ring.c -- the life of a queue's ring: started, published, broken, dropped. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "vhost/internal.h"

#define VIRTIO_RING_F_EVENT_IDX (1ull << 29)
#define VRING_F_LOG 1u /* vnd_ring_state.flags: log writes to the used ring */

/* A full eventfd is signalled already. Errors do not matter: the front-end chose what fd is. */
static void write_event(int fd)
{
    if (fd >= 0)
        event_raise(fd);
}

void queue_signal(struct queue *q)
{
    write_event(q->call_fd);
}

void queue_signal_error(struct queue *q)
{
    atomic_fetch_add_explicit(&q->worker.counters.ring_errors, 1, memory_order_relaxed);
    write_event(q->err_fd);
}

static void publish(struct queue *q)
{
    struct vring *v = &q->vring;
    const struct vring_used_elem *batch = v->staged; /* they stay there until the next one is staged */
    uint32_t n = v->n_staged;

    if (n == 0)
        return;
    inflight_stage(&q->inflight, batch, n);
    vring_publish(v);
    inflight_finish(&q->inflight, batch, n, v->used_idx);
    for (uint32_t i = 0; i < n; i++)
        q->slots[batch[i].id].state = SLOT_FREE;
}

/* Once memory is lost nothing is published any more: the queue ends. */
static bool lost_memory(struct queue *q)
{
    if (!atomic_load_explicit(&q->common->mem_lost, memory_order_relaxed))
        return false;
    queue_break(q, VND_CAUSE_IO, NULL);
    return true;
}

void queue_publish(struct queue *q)
{
    if (q->vring.n_staged != 0 && !lost_memory(q))
        publish(q);
}

void queue_flush(struct queue *q)
{
    if (q->vring.n_staged == 0 && q->vring.used_idx == q->vring.signalled_used)
        return;
    if (lost_memory(q))
        return;
    publish(q);
    if (vring_must_signal(&q->vring))
        queue_signal(q);
}

void queue_break(struct queue *q, int cause, const char *why)
{
    if (q->broken)
        return;
    q->broken = true;
    if (atomic_load_explicit(&q->common->mem_lost, memory_order_relaxed)) {
        cause = VND_CAUSE_IO; /* the zeroes that came in its place look like a fault of the guest */
        why = "a memory file of the guest was truncated";
    } else {
        publish(q); /* what came before the fault is answered */
        if (vring_must_signal(&q->vring))
            queue_signal(q);
    }
    engine_say(q->engine, VND_LEVEL_ERROR, cause, "front-end %u: queue %u stopped: %s; the guest must reset its device",
               q->common->number, q->index, why);
    queue_signal_error(q);
    queue_drop_all(q);
}

void queue_drop_all(struct queue *q)
{
    struct parked *next;

    for (uint32_t i = 0; i < q->vring.n_staged; i++)
        queue_release(&q->slots[q->vring.staged[i].id]);
    q->vring.n_staged = 0;
    for (; q->next_resubmit < q->n_resubmit; q->next_resubmit++)
        inflight_drop(&q->inflight, q->resubmit[q->next_resubmit]);
    for (struct parked *p = q->parked.first; p != NULL; p = next) {
        struct queue_slot *s = slot_of_parked(p);

        next = p->next;
        queue_unpark(s);
        if (store_wait_cancel(&s->req.wait)) {
            queue_release(s);
        } else {
            s->state = SLOT_ZOMBIE;
            q->n_zombies++;
        }
    }
    /* Their wakes are on the way: the slots are ours again only when they have arrived. */
    while (q->n_zombies > 0) {
        struct queue_slot *s = queue_take_woken(q);

        if (s != NULL) {
            store_wait_done(&s->req.wait);
            queue_release(s);
            q->n_zombies--;
            continue;
        }
        if (wakelist_sleep(&q->wakes))
            queue_sleep(q, -1);
        wakelist_awake(&q->wakes);
    }
}

void queue_sleep(struct queue *q, int timeout_ms)
{
    struct epoll_event ev[2];

    /* Both fds are watched for edges: neither needs to be read, and a front-end cannot make us block in a read. */
    if (epoll_wait(q->epoll_fd, ev, 2, timeout_ms) < 0 && errno != EINTR)
        engine_say(q->engine, VND_LEVEL_ERROR, VND_CAUSE_IO, "front-end %u: queue %u: epoll: %s", q->common->number,
                   q->index, strerror(errno));
}

int queue_resolve(struct queue *q)
{
    const vnd_ring_state *r = &q->ring;
    int rc = vring_resolve(&q->vring, q->mem, r->num, r->desc_addr, r->avail_addr, r->used_addr);

    q->vring.log = r->flags & VRING_F_LOG ? q->log : NULL;
    q->vring.used_gpa = r->log_addr;
    return rc;
}

/* Slots for the ring's size; all must be free. */
static int size_slots(struct queue *q, uint32_t num)
{
    struct queue_slot *slots;
    uint16_t *resubmit;

    if (q->slots != NULL && q->n_slots == num)
        return 0;
    slots = calloc(num, sizeof(*slots));
    resubmit = calloc(num, sizeof(*resubmit));
    if (slots == NULL || resubmit == NULL) {
        free(slots);
        free(resubmit);
        return -ENOMEM;
    }
    free(q->slots);
    free(q->resubmit);
    q->slots = slots;
    q->resubmit = resubmit;
    q->n_slots = num;
    q->n_resubmit = q->next_resubmit = 0;
    return 0;
}

/* Goes on with what another process left in the in-flight region, or makes that blank. */
static int take_over(struct queue *q, struct queue_conf *c, uint16_t used)
{
    int n;

    if (c->recover == RECOVER_NOT || q->inflight.region->version == 0) {
        inflight_reset(&q->inflight, c->ring.num, used);
        return 0;
    }
    n = inflight_recover(&q->inflight, c->ring.num, used, c->died, q->resubmit);
    if (n < 0)
        return failure_set(&c->failure, n, VND_CAUSE_GUEST,
                           "ring %u: the in-flight region is of another version or size", q->index);
    if (c->recover == RECOVER_SAME_BASE && (uint16_t)(used + n) != c->ring.base) {
        inflight_reset(&q->inflight, c->ring.num, used); /* the guest began anew meanwhile */
        return 0;
    }
    q->n_resubmit = (uint32_t)n;
    q->vring.last_avail = (uint16_t)(used + q->n_resubmit);
    queue_signal(q); /* the other process may have died between an answer and its interrupt */
    return 0;
}

int queue_start(struct queue *q, struct queue_conf *c)
{
    uint16_t old_avail = q->vring.last_avail, old_used = q->vring.used_idx, used;
    int rc;

    q->ring = c->ring;
    rc = queue_resolve(q);
    if (rc == -EINVAL)
        return failure_set(&c->failure, rc, VND_CAUSE_GUEST,
                           "ring %u: %u entries (a power of two up to %d is due) or a badly aligned part", q->index,
                           c->ring.num, VND_RING_MAX);
    if (rc != 0)
        return failure_set(&c->failure, rc, VND_CAUSE_GUEST,
                           "ring %u: not in guest memory (descriptors 0x%llx, available 0x%llx, used 0x%llx)", q->index,
                           (unsigned long long)c->ring.desc_addr, (unsigned long long)c->ring.avail_addr,
                           (unsigned long long)c->ring.used_addr);
    if (q->inflight.region == NULL || q->inflight.num < c->ring.num)
        return failure_set(&c->failure, -EINVAL, VND_CAUSE_GUEST, "ring %u: %u entries, the in-flight region has %u",
                           q->index, c->ring.num, q->inflight.num);
    used = vring_used_now(&q->vring);
    /* A guest that was stopped and goes on finds its requests where they were; a rebooted one starts at 0, which
     * cannot be where a ring with requests in flight stood (avail and used differ there). */
    if (q->parked.n > 0 && !q->broken && c->ring.num == q->n_slots && c->ring.base == old_avail && used == old_used) {
        q->vring.force_signal = true;
        q->running = true;
        return 0;
    }
    queue_drop_all(q);
    rc = size_slots(q, c->ring.num);
    if (rc != 0)
        return failure_set(&c->failure, rc, VND_CAUSE_GUEST, "ring %u: out of memory", q->index);
    q->vring.event_idx = (c->features & VIRTIO_RING_F_EVENT_IDX) != 0;
    q->vring.notify_off = false;
    q->vring.force_signal = true;
    q->vring.last_avail = c->ring.base;
    q->vring.used_idx = q->vring.signalled_used = used;
    q->vring.n_staged = 0;
    q->n_resubmit = q->next_resubmit = 0;
    rc = take_over(q, c, used);
    if (rc != 0)
        return rc;
    q->broken = false;
    q->running = true;
    return 0;
}
