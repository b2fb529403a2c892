/* vhost/vring.h -- the mechanics of one split virtqueue (virtio 1.2, 2.7): no threads, no files, no FUSE.
 *
 * Everything in the ring is the guest's and changes at any time: each field is loaded once, the copy is checked,
 * the copy is used. A structural violation is -EBADMSG and ends the ring; a request whose addresses lead nowhere is
 * -EFAULT and ends that request.
 */
#ifndef VND_VRING_H
#define VND_VRING_H
#include <stdbool.h>
#include <stdint.h>

#include "vhost/guestmem.h"

#define VRING_BATCH 16       /* used entries published at once, at most */
#define VRING_CHAIN_MAX 1032 /* descriptors of a request: the largest ring and a little */

struct vring_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};
struct vring_used_elem {
    uint32_t id, len;
};

struct vring {
    uint32_t num; /* entries, a power of two */
    bool event_idx;
    bool notify_off;   /* used.flags says "do not kick" (without EVENT_IDX) */
    bool force_signal; /* the first batch after a start is always signalled */
    uint16_t last_avail, used_idx, signalled_used;
    uint8_t *desc, *avail, *used; /* host addresses, NULL = not resolved */
    struct guestlog *log;         /* NULL: used ring is not logged */
    uint64_t used_gpa;            /* where the dirty log has the used ring */
    uint32_t n_staged;
    struct vring_used_elem staged[VRING_BATCH];
};

/* A range of guest memory. */
struct vring_seg {
    uint64_t gpa;
    uint32_t len;
};
/* A request's ranges, readable ones first; adjacent ones are joined. */
struct vring_chain {
    uint32_t n_in, n_out; /* segments */
    uint32_t in_bytes, out_bytes;
    struct vring_seg seg[VRING_CHAIN_MAX];
    struct vring_desc table[VRING_CHAIN_MAX]; /* private copy of an indirect table */
};

/* Resolves the three parts. -EINVAL: not aligned, or num not a power of two in 1..VND_RING_MAX; -EFAULT: not in one
 * region. */
int vring_resolve(struct vring *v, const struct guestmem *m, uint32_t num, uint64_t desc, uint64_t avail,
                  uint64_t used);
/* used.idx as it stands in guest memory. */
uint16_t vring_used_now(const struct vring *v);
/* Entries to fetch; -EBADMSG if the guest claims more than the ring holds. */
int vring_pending(const struct vring *v);
/* Next head: 0, or -EBADMSG. */
int vring_next(struct vring *v, uint16_t *head);
/* Walks the chain at head. why: what is wrong, static text. */
int vring_walk(const struct vring *v, const struct guestmem *m, uint32_t *hint, uint16_t head, struct vring_chain *c,
               const char **why);
/* Puts a used entry behind those staged; the caller publishes before VRING_BATCH are there. */
void vring_stage(struct vring *v, uint16_t head, uint32_t len);
/* Publishes the staged entries: a front-end that polls sees them now. They can be read in staged until the next is. */
void vring_publish(struct vring *v);
/* Whether the guest wants a signal for what was published since the last one. Asked once, the answer is acted on. */
bool vring_must_signal(struct vring *v);
/* Asks for a kick at the next entry; true if there already is one. */
bool vring_arm(struct vring *v);
/* We are awake: kicks are wasted. */
void vring_disarm(struct vring *v);

#endif
