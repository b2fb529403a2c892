/* vhost/inflight.c -- see inflight.h. */
#include "vhost/inflight.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fuse/req.h"
#include "vnd.h"
#include "vhost/vring.h"

#define INFLIGHT_VERSION 1
#define INFLIGHT_ALIGN 64

static_assert(sizeof(struct inflight_desc) == 16, "entry");
static_assert(offsetof(struct inflight_region, desc) == 16, "head");

/* Only a process that dies between two stores would see them out of order, and its memory is this machine's: the
 * compiler is all that must be held back. */
static void keep_order(void)
{
    atomic_signal_fence(memory_order_seq_cst);
}

uint64_t inflight_stride(uint32_t queue_size)
{
    uint64_t bytes = sizeof(struct inflight_region) + (uint64_t)queue_size * sizeof(struct inflight_desc);

    return (bytes + INFLIGHT_ALIGN - 1) / INFLIGHT_ALIGN * INFLIGHT_ALIGN;
}

void inflight_reset(struct inflight *f, uint32_t num, uint16_t used_idx)
{
    struct inflight_region *r = f->region;

    r->version = 0;
    keep_order();
    memset(r->desc, 0, num * sizeof(r->desc[0]));
    r->features = 0;
    r->desc_num = (uint16_t)num;
    r->last_batch_head = 0;
    r->used_idx = used_idx;
    keep_order();
    r->version = INFLIGHT_VERSION;
    f->counter = 0;
}

void inflight_begin(struct inflight *f, uint16_t head)
{
    f->region->desc[head].counter = f->counter++;
    f->region->desc[head].deaths = 0;
    memset(f->region->desc[head].once, 0, sizeof(f->region->desc[head].once));
    keep_order();
    f->region->desc[head].inflight = 1;
    keep_order();
}

struct req_once *inflight_once(struct inflight *f, uint16_t head)
{
    static_assert(sizeof(struct req_once) == sizeof(f->region->desc[0].once), "room");
    static_assert(offsetof(struct inflight_desc, once) % _Alignof(struct req_once) == 0, "aligned");

    return (void *)f->region->desc[head].once;
}

bool inflight_is_fatal(const struct inflight *f, uint16_t head)
{
    return f->region->desc[head].deaths >= INFLIGHT_DEATHS_MAX;
}

bool inflight_busy(const struct inflight *f, uint16_t head)
{
    return f->region->desc[head].inflight != 0;
}

void inflight_stage(struct inflight *f, const struct vring_used_elem *batch, uint32_t n)
{
    struct inflight_region *r = f->region;

    for (uint32_t i = 0; i < n; i++) {
        r->desc[batch[i].id].next = r->last_batch_head;
        keep_order();
        r->last_batch_head = (uint16_t)batch[i].id;
    }
    keep_order();
}

void inflight_finish(struct inflight *f, const struct vring_used_elem *batch, uint32_t n, uint16_t used_idx)
{
    keep_order();
    for (uint32_t i = 0; i < n; i++)
        f->region->desc[batch[i].id].inflight = 0;
    keep_order();
    f->region->used_idx = used_idx;
}

void inflight_drop(struct inflight *f, uint16_t head)
{
    f->region->desc[head].inflight = 0;
}

struct found {
    uint64_t counter;
    uint16_t head;
};

static int compare_counter(const void *a, const void *b)
{
    const struct found *x = a, *y = b;

    return (x->counter > y->counter) - (x->counter < y->counter);
}

int inflight_list(struct inflight *f, uint32_t num, uint16_t *heads)
{
    struct inflight_region *r = f->region;
    struct found *found = calloc(num, sizeof(*found));
    int n = 0;

    if (found == NULL)
        return -ENOMEM;
    f->counter = 0;
    for (uint32_t i = 0; i < num; i++) {
        if (r->desc[i].inflight == 0)
            continue;
        found[n++] = (struct found){ .counter = r->desc[i].counter, .head = (uint16_t)i };
        if (r->desc[i].counter >= f->counter)
            f->counter = r->desc[i].counter + 1;
    }
    qsort(found, (size_t)n, sizeof(*found), compare_counter);
    for (int i = 0; i < n; i++)
        heads[i] = found[i].head;
    free(found);
    return n;
}

void inflight_put(struct inflight *f, const uint16_t *heads, uint32_t n)
{
    inflight_reset(f, f->num, 0);
    f->region->last_batch_head = UINT16_MAX; /* no batch: where the ring stands is not known yet */
    for (uint32_t i = 0; i < n; i++)
        inflight_begin(f, heads[i]);
}

int inflight_recover(struct inflight *f, uint32_t num, uint16_t used_idx, bool died, uint16_t *heads)
{
    struct inflight_region *r = f->region;
    int n;

    if (r->version != INFLIGHT_VERSION || r->desc_num < num)
        return -EINVAL;
    /* The process died after used.idx moved and before the batch was struck off: its length is the difference. */
    uint16_t head = r->last_batch_head, lag = (uint16_t)(used_idx - r->used_idx);
    for (; lag > 0 && lag <= num && head < num; lag--) {
        r->desc[head].inflight = 0;
        head = r->desc[head].next;
    }
    keep_order();
    r->used_idx = used_idx;
    n = inflight_list(f, num, heads);
    for (int i = 0; died && i < n; i++)
        if (r->desc[heads[i]].deaths < UINT8_MAX)
            r->desc[heads[i]].deaths++;
    return n;
}

int vnd_inflight_create(uint32_t nq, uint32_t qsize, uint64_t *size_bytes)
{
    int fd, e;

    if (nq == 0 || nq > VND_QUEUE_MAX || qsize == 0 || qsize > VND_RING_MAX)
        return -EINVAL;
    *size_bytes = nq * inflight_stride(qsize) + INFLIGHT_TAIL_BYTES;
    fd = memfd_create("vhost-inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)*size_bytes) != 0 ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) != 0) {
        e = errno;
        close(fd);
        return -e;
    }
    return fd;
}
