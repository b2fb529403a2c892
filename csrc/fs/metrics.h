/* fs/metrics.h -- what one mounted image counts of itself: the numbers that nydusd gives per instance.
 *
 * Each serving thread has a shard of its own that it alone writes, with plain stores: queues share no cache line, and an
 * operation costs a few nanoseconds. Threads beyond METRICS_SHARDS - 1 share the last shard, with locked additions.
 * Records of single inodes are kept only where they were asked for; they have a lock, of their shard.
 */
#ifndef VND_METRICS_H
#define VND_METRICS_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "vnd.h"

#define METRICS_SHARDS 64

struct fs_metrics;

/* One operation that was answered. */
struct metrics_op {
    uint64_t ino;
    uint32_t fop;              /* index in vnd_fop_stats */
    bool failed, read, waited; /* read: it is a READ that succeeded, and what follows holds */
    uint32_t bytes;
    int64_t took_us; /* of a read that gave bytes */
};

/* max_inodes: records of inodes that a shard keeps at most, however many a guest asks for. NULL: no memory. */
struct fs_metrics *metrics_new(uint64_t max_inodes);
void metrics_free(struct fs_metrics *m);
/* shard: the calling thread's, from metrics_take_shard. */
void metrics_count(struct fs_metrics *m, uint32_t shard, const struct metrics_op *op);
/* A free shard number, or the shared one; *taken is a set of bits, under the caller's lock. */
uint32_t metrics_take_shard(uint64_t *taken);
void metrics_give_shard(uint64_t *taken, uint32_t shard);

/* nydusd's bucket of a read: below 1K 4K 16K 64K 128K 512K 1M, more. */
uint32_t metrics_size_bucket(uint64_t bytes);

void metrics_sum(struct fs_metrics *m, vnd_mount_stats *out);
void metrics_keep(struct fs_metrics *m, bool records); /* of single inodes */
uint64_t metrics_files(struct fs_metrics *m, vnd_file_stats *out, uint64_t max);
uint64_t metrics_latest(struct fs_metrics *m, uint64_t *inos, uint64_t max);

#endif
