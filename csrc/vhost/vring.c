/* vhost/vring.c -- see vring.h. */
#include "vhost/vring.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>

#define DESC_NEXT 1u
#define DESC_WRITE 2u
#define DESC_INDIRECT 4u
#define AVAIL_NO_INTERRUPT 1u
#define USED_NO_NOTIFY 1u

#define AVAIL_IDX 2 /* byte offsets */
#define AVAIL_RING 4
#define USED_IDX 2
#define USED_RING 4

static uint16_t load16(const uint8_t *p)
{
    return __atomic_load_n((const uint16_t *)(const void *)p, __ATOMIC_RELAXED);
}

static uint16_t avail_idx(const struct vring *v)
{
    return __atomic_load_n((const uint16_t *)(const void *)(v->avail + AVAIL_IDX), __ATOMIC_ACQUIRE);
}

static void put_used16(struct vring *v, uint32_t off, uint16_t value)
{
    guestmem_store16(v->log, v->used + off, value, v->used_gpa + off);
}

int vring_resolve(struct vring *v, const struct guestmem *m, uint32_t num, uint64_t desc, uint64_t avail, uint64_t used)
{
    v->desc = v->avail = v->used = NULL;
    if (num == 0 || num > VND_RING_MAX || (num & (num - 1)) != 0)
        return -EINVAL;
    if (desc % 16 != 0 || avail % 2 != 0 || used % 4 != 0)
        return -EINVAL;
    v->num = num;
    v->desc = guestmem_ring(m, desc, 16ull * num);
    v->avail = guestmem_ring(m, avail, AVAIL_RING + 2ull * num + 2);
    v->used = guestmem_ring(m, used, USED_RING + 8ull * num + 2);
    /* The mapping could move a well aligned user address to a badly aligned host address: sizes and offsets are the
     * front-end's. */
    if (v->desc == NULL || v->avail == NULL || v->used == NULL || (uintptr_t)v->desc % 8 != 0 ||
        (uintptr_t)v->avail % 2 != 0 || (uintptr_t)v->used % 4 != 0) {
        v->desc = v->avail = v->used = NULL;
        return -EFAULT;
    }
    return 0;
}

uint16_t vring_used_now(const struct vring *v)
{
    return load16(v->used + USED_IDX);
}

int vring_pending(const struct vring *v)
{
    uint16_t n = (uint16_t)(avail_idx(v) - v->last_avail);

    return n <= v->num ? n : -EBADMSG;
}

int vring_next(struct vring *v, uint16_t *head)
{
    *head = load16(v->avail + AVAIL_RING + 2u * (v->last_avail & (v->num - 1)));
    if (*head >= v->num)
        return -EBADMSG;
    v->last_avail++;
    return 0;
}

static struct vring_desc load_desc(const uint8_t *p)
{
    const uint64_t *q = (const uint64_t *)(const void *)p;
    uint64_t lo = __atomic_load_n(&q[0], __ATOMIC_RELAXED), hi = __atomic_load_n(&q[1], __ATOMIC_RELAXED);

    return (struct vring_desc){
        .addr = lo, .len = (uint32_t)hi, .flags = (uint16_t)(hi >> 32), .next = (uint16_t)(hi >> 48)
    };
}

/* Puts a range at the end of a part (readable or writable): n segments from first on, joined where they touch. */
static inline int extend(struct vring_seg *first, uint32_t *n, uint32_t *bytes, const struct vring_desc *d,
                         const char **why)
{
    struct vring_seg *last = first + *n;
    uint64_t end;

    if (d->len == 0)
        return 0;
    if (__builtin_add_overflow(d->addr, (uint64_t)d->len, &end)) {
        *why = "descriptor wraps the address space";
        return -EBADMSG;
    }
    if (__builtin_add_overflow(*bytes, d->len, bytes)) {
        *why = "request larger than 4 GiB";
        return -EBADMSG;
    }
    if (*n > 0 && last[-1].gpa + last[-1].len == d->addr) {
        last[-1].len += d->len;
        return 0;
    }
    last->gpa = d->addr;
    last->len = d->len;
    ++*n;
    return 0;
}

/* Appends one checked descriptor. */
static inline int add_seg(struct vring_chain *c, const struct vring_desc *d, const char **why)
{
    if (d->flags & DESC_WRITE)
        return extend(c->seg + c->n_in, &c->n_out, &c->out_bytes, d, why);
    if (c->out_bytes > 0) {
        *why = "readable descriptor after a writable one";
        return -EBADMSG;
    }
    return extend(c->seg, &c->n_in, &c->in_bytes, d, why);
}

/* direct: descriptors that came before it in the ring. */
static int walk_indirect(const struct guestmem *m, uint32_t *hint, const struct vring_desc *at, uint32_t direct,
                         struct vring_chain *c, const char **why)
{
    uint32_t n = at->len / 16, i = 0;

    if (at->len == 0 || at->len % 16 != 0) {
        *why = "indirect table is empty or not a multiple of 16 bytes";
        return -EBADMSG;
    }
    if (n > VRING_CHAIN_MAX - 8 - direct) {
        *why = "indirect table too long";
        return -EBADMSG;
    }
    if (guestmem_read(m, hint, at->addr, c->table, at->len) != 0) {
        *why = "indirect table is not in guest memory";
        return -EFAULT;
    }
    for (uint32_t hops = 0; hops < n; hops++) {
        const struct vring_desc *d = &c->table[i];
        int rc;

        if (d->flags & DESC_INDIRECT) {
            *why = "indirect table in an indirect table";
            return -EBADMSG;
        }
        rc = add_seg(c, d, why);
        if (rc != 0 || !(d->flags & DESC_NEXT))
            return rc;
        if (d->next >= n) {
            *why = "descriptor index beyond the indirect table";
            return -EBADMSG;
        }
        i = d->next;
    }
    *why = "descriptor chain loops";
    return -EBADMSG;
}

int vring_walk(const struct vring *v, const struct guestmem *m, uint32_t *hint, uint16_t head, struct vring_chain *c,
               const char **why)
{
    uint32_t i = head;

    c->n_in = c->n_out = c->in_bytes = c->out_bytes = 0;
    for (uint32_t hops = 0; hops < v->num; hops++) {
        struct vring_desc d = load_desc(v->desc + 16u * i);
        int rc;

        if (d.flags & DESC_INDIRECT) {
            /* virtio 1.2, 2.7.5.3.2: the write flag here means nothing, and direct descriptors may come before. */
            if (d.flags & DESC_NEXT) {
                *why = "descriptors after an indirect one";
                return -EBADMSG;
            }
            return walk_indirect(m, hint, &d, hops, c, why);
        }
        rc = add_seg(c, &d, why);
        if (rc != 0 || !(d.flags & DESC_NEXT))
            return rc;
        if (d.next >= v->num) {
            *why = "descriptor index beyond the ring";
            return -EBADMSG;
        }
        i = d.next;
    }
    *why = "descriptor chain loops";
    return -EBADMSG;
}

void vring_stage(struct vring *v, uint16_t head, uint32_t len)
{
    v->staged[v->n_staged++] = (struct vring_used_elem){ .id = head, .len = len };
}

void vring_publish(struct vring *v)
{
    uint16_t old = v->used_idx;

    if (v->n_staged == 0)
        return;
    for (uint32_t i = 0; i < v->n_staged; i++) {
        uint32_t off = USED_RING + 8u * ((uint16_t)(old + i) & (v->num - 1));

        guestmem_write(v->log, v->used + off, &v->staged[i], sizeof(v->staged[i]), v->used_gpa + off);
    }
    v->used_idx = (uint16_t)(old + v->n_staged);
    v->n_staged = 0;
    put_used16(v, USED_IDX, v->used_idx);
}

bool vring_must_signal(struct vring *v)
{
    uint16_t new = v->used_idx, old = v->signalled_used, event;

    if (new == old)
        return false;
    /* Moved whatever the answer is: entries that were asked about are never asked about again, and so the distance
     * cannot wrap around with a guest that polls for 65,536 entries and then sleeps. */
    v->signalled_used = new;
    /* The guest's wish must be read after our index is out, or both sides could go to sleep. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!v->event_idx)
        return !(load16(v->avail) & AVAIL_NO_INTERRUPT);
    event = load16(v->avail + AVAIL_RING + 2u * v->num);
    if (!v->force_signal && (uint16_t)(new - event - 1) >= (uint16_t)(new - old))
        return false;
    v->force_signal = false;
    return true;
}

bool vring_arm(struct vring *v)
{
    if (v->event_idx) {
        put_used16(v, USED_RING + 8u * v->num, v->last_avail);
    } else if (v->notify_off) {
        put_used16(v, 0, 0);
        v->notify_off = false;
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return avail_idx(v) != v->last_avail;
}

void vring_disarm(struct vring *v)
{
    /* With EVENT_IDX a stale avail_event does it (it comes true again after 65,536 entries: one wasted kick). */
    if (v->event_idx || v->notify_off)
        return;
    put_used16(v, 0, USED_NO_NOTIFY);
    v->notify_off = true;
}
