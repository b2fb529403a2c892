/* base/engine.h -- the engine object: configuration, counters, events, and the thread pool that owns nothing. No globals
 * anywhere; everything hangs off a vnd_engine (law 11). */
#ifndef VND_ENGINE_H
#define VND_ENGINE_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#include "vnd.h"

/* Counters of vnd_stats, in the same order, each on the engine, relaxed. Threads that count at high rate keep their own
 * block (engine_counters_register) so that queues share no cache line. */
struct engine_counters {
    _Atomic uint64_t fuse_requests, fuse_errors, read_bytes, hits, parked, expired, pool_reads, fetch_jobs,
        fetched_bytes, fetched_chunks, verified_chunks, digest_failures, prefetch_bytes, ring_errors;
    struct engine_counters *next;   /* list of registered blocks */
    _Atomic int64_t oldest_park_us; /* monotonic time of the oldest parked request of this thread, 0 = none */
    /* The requests that wait at the block's owner, oldest first: their number, at most max. NULL: it keeps none. Called
     * under the engine's lock. */
    int (*_Atomic waiting)(struct engine_counters *c, vnd_waiting *out, int max, int64_t now);
};

struct engine_events;
struct fetcher; /* jobs: store/fetch.c */
struct pool;    /* page-cache misses: store/page.c */

struct vnd_engine {
    vnd_engine_cfg cfg; /* defaults filled in */
    struct engine_events *events;
    struct fetcher *fetcher;
    struct pool *pool;
    struct vnd_store *stores; /* list, under lock */
    pthread_mutex_t lock;
    struct engine_counters *counters; /* list of blocks, under lock */
    struct engine_counters shared;    /* for threads without a block of their own */
    uint64_t metrics_shards;          /* taken: fs/metrics.h, under lock */
    _Atomic int shutdown;
};

/* Says one line; any thread, never blocks, drops (and counts) when nobody listens. The same text within 5 s is given
 * once. */
void engine_say(struct vnd_engine *e, int level, int cause, const char *fmt, ...) __attribute__((format(printf, 4, 5)));
void engine_counters_register(struct vnd_engine *e, struct engine_counters *c);
void engine_counters_unregister(struct vnd_engine *e, struct engine_counters *c); /* adds them to shared */
int64_t now_us(void);                                                             /* CLOCK_MONOTONIC */
struct timespec time_after_ms(int ms); /* CLOCK_MONOTONIC too: for waits on a condition */
/* One error line into err (may be NULL); returns rc, so that `return fail_line(...)` reads well. */
int fail_line(int rc, char *err, size_t err_len, const char *fmt, ...) __attribute__((format(printf, 4, 5)));
/* pthread_create with all signals blocked and a name (15 bytes). */
int thread_start(pthread_t *t, const char *name, void *(*fn)(void *), void *arg);

/* Life cycle of the parts, each in its own file. */
int fetcher_new(struct vnd_engine *e);       /* store/fetch.c */
void fetcher_shutdown(struct vnd_engine *e); /* wakes job_next with -ESHUTDOWN, fails waiters with ESHUTDOWN */
void fetcher_free(struct vnd_engine *e);
int pool_new(struct vnd_engine *e, uint32_t threads); /* store/page.c */
void pool_free(struct vnd_engine *e);                 /* joins */

#endif
