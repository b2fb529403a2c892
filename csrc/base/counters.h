/* base/counters.h -- what vnd_stats is summed from. Counting is relaxed and takes no lock; the list of blocks is under the
 * engine's lock.
 */
#ifndef VND_COUNTERS_H
#define VND_COUNTERS_H
#include <stdatomic.h>
#include <stdint.h>

#include "vnd.h"

struct parklist;

/* The counters of vnd_stats, in the same order. A thread that counts at a high rate registers a block of its own, so that
 * two queues share no cache line. The block's owner keeps it until engine_counters_unregister. */
struct engine_counters {
    _Atomic uint64_t fuse_requests, fuse_errors, read_bytes, hits, parked, expired, pool_reads, fetch_jobs,
        fetched_bytes, fetched_chunks, verified_chunks, digest_failures, prefetch_bytes, ring_errors;
    struct engine_counters *next;         /* list of registered blocks */
    _Atomic int64_t oldest_park_us;       /* now_us() when this thread's oldest parked request was parked, 0: none is */
    struct parklist *_Atomic parked_list; /* the requests that wait at the block's owner; NULL: it lists none */
};

void engine_counters_register(struct vnd_engine *e, struct engine_counters *c);
/* Adds the block's counts to the engine's own. */
void engine_counters_unregister(struct vnd_engine *e, struct engine_counters *c);

#endif
