/* fuse/kept.c -- see kept.h. */
#include "fuse/kept.h"

#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

/* Only a process that dies between two stores would see them out of order, and its memory is this machine's. */
static void keep_order(void)
{
    atomic_signal_fence(memory_order_seq_cst);
}

/* FNV-1a: it tells torn and foreign memory; who may write here may write what he likes. */
static uint64_t sum_of(const struct fuse_kept *k)
{
    struct fuse_kept copy = *k;
    const uint8_t *at = (const uint8_t *)&copy;
    uint64_t sum = 0xcbf29ce484222325ull;

    copy.seq = 0;
    for (size_t i = 0; i < offsetof(struct fuse_kept, sum); i++)
        sum = (sum ^ at[i]) * 0x100000001b3ull;
    return sum;
}

bool fuse_kept_is_ready(const struct fuse_kept *k)
{
    struct fuse_kept copy = *k; /* a front-end may write on */

    return copy.magic == FUSE_KEPT_MAGIC && copy.version == FUSE_KEPT_VERSION && copy.size_bytes == sizeof(copy) &&
           !(copy.seq & 1) && copy.ready == 1 && copy.sum == sum_of(&copy);
}

void fuse_kept_write(struct fuse_kept *k, const struct fuse_kept *from)
{
    struct fuse_kept all = *from;
    uint32_t seq = k->seq | 1;

    k->seq = seq;
    keep_order();
    all.magic = FUSE_KEPT_MAGIC;
    all.version = FUSE_KEPT_VERSION;
    all.size_bytes = sizeof(all);
    all.seq = seq;
    all.sum = sum_of(&all);
    memcpy(k, &all, sizeof(all));
    keep_order();
    k->seq = seq + 1;
}
