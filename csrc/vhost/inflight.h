/* vhost/inflight.h -- which heads of a ring are in the device's hands, in memory that outlives the process: the vhost-user
 * in-flight region for split rings (vhost-user specification, "Inflight I/O tracking"; libvhost-user's layout).
 *
 * A region per queue, each rounded up to 64 bytes. The order of stores matters: whatever moment a process dies at,
 * the next one finds every head either in flight or used.
 */
#ifndef VND_INFLIGHT_H
#define VND_INFLIGHT_H
#include <stdbool.h>
#include <stdint.h>

struct vring_used_elem;
struct req_once;

struct inflight_desc {
    uint8_t inflight;
    /* Ours, padding to others: */
    uint8_t deaths;   /* so many processes in a row died while the head was in flight */
    uint8_t once[4];  /* struct req_once */
    uint16_t next;    /* batch list: the head staged before this one */
    uint64_t counter; /* order of fetching */
};
struct inflight_region {
    uint64_t features;
    uint16_t version; /* 1; 0 = blank */
    uint16_t desc_num;
    uint16_t last_batch_head;
    uint16_t used_idx;
    struct inflight_desc desc[];
};

struct inflight {
    struct inflight_region *region; /* NULL: none */
    uint32_t num;                   /* entries it has room for */
    uint64_t counter;
};

/* Behind the regions of all queues: room for struct fuse_kept (fuse/kept.h). */
#define INFLIGHT_TAIL_BYTES 256u
/* A request that was in flight at so many deaths in a row is not tried again. */
#define INFLIGHT_DEATHS_MAX 2

/* Bytes of one queue's region. */
uint64_t inflight_stride(uint32_t queue_size);
/* Makes it blank for a ring of num entries that stands at used_idx. */
void inflight_reset(struct inflight *f, uint32_t num, uint16_t used_idx);
/* Where a head's struct req_once is. */
struct req_once *inflight_once(struct inflight *f, uint16_t head);
/* A head was fetched. */
void inflight_begin(struct inflight *f, uint16_t head);
bool inflight_busy(const struct inflight *f, uint16_t head);
/* Before used.idx moves over the batch, and after it. */
void inflight_stage(struct inflight *f, const struct vring_used_elem *batch, uint32_t n);
void inflight_finish(struct inflight *f, const struct vring_used_elem *batch, uint32_t n, uint16_t used_idx);
/* A head is given up without a used entry. */
void inflight_drop(struct inflight *f, uint16_t head);
/* The heads in flight, oldest first, in heads (room for num): their number, or -ENOMEM. The ring is stopped. */
int inflight_list(struct inflight *f, uint32_t num, uint16_t *heads);
/* Makes the region say that these heads are in flight, for a start that recovers them. */
void inflight_put(struct inflight *f, const uint16_t *heads, uint32_t n);
/* Takes over what another process left in a region that is not blank, for a ring of num entries whose used.idx is
 * used_idx. Heads to serve again, oldest first, are put in heads (room for num); their number. died: that process died,
 * which counts for each of them. -EINVAL: not ours. */
int inflight_recover(struct inflight *f, uint32_t num, uint16_t used_idx, bool died, uint16_t *heads);
/* The head is not to be tried again. */
bool inflight_is_fatal(const struct inflight *f, uint16_t head);

#endif
