/* base/counters.c -- see base/counters.h. */
#include "base/counters.h"

#include <pthread.h>
#include <string.h>

#include "base/clock.h"
#include "base/engine.h"
#include "base/parklist.h"

/* The tool does not settle on one form for a list of X(). */
/* clang-format off */
#define COUNTERS(X) \
    X(fuse_requests) X(fuse_errors) X(read_bytes) X(hits) X(parked) X(expired) X(pool_reads) X(fetch_jobs) \
    X(fetched_bytes) X(fetched_chunks) X(verified_chunks) X(digest_failures) X(prefetch_bytes) X(ring_errors)
/* clang-format on */

void engine_counters_register(struct vnd_engine *e, struct engine_counters *c)
{
    pthread_mutex_lock(&e->lock);
    c->next = e->counters;
    e->counters = c;
    pthread_mutex_unlock(&e->lock);
}

void engine_counters_unregister(struct vnd_engine *e, struct engine_counters *c)
{
    pthread_mutex_lock(&e->lock);
    for (struct engine_counters **p = &e->counters; *p; p = &(*p)->next) {
        if (*p == c) {
            *p = c->next;
            break;
        }
    }
#define X(field)                                                                                       \
    atomic_fetch_add_explicit(&e->shared.field, atomic_load_explicit(&c->field, memory_order_relaxed), \
                              memory_order_relaxed);
    COUNTERS(X)
#undef X
    pthread_mutex_unlock(&e->lock);
}

void vnd_engine_stats(vnd_engine *e, vnd_stats *out)
{
    int64_t oldest = 0;

    memset(out, 0, sizeof *out);
    pthread_mutex_lock(&e->lock);
    e->shared.next = e->counters;
    for (struct engine_counters *c = &e->shared; c; c = c->next) {
#define X(field) out->field += atomic_load_explicit(&c->field, memory_order_relaxed);
        COUNTERS(X)
#undef X
        int64_t at = atomic_load_explicit(&c->oldest_park_us, memory_order_relaxed);
        if (at && (!oldest || at < oldest))
            oldest = at;
    }
    pthread_mutex_unlock(&e->lock);
    if (oldest) {
        int64_t age = now_us() - oldest;
        out->oldest_wait_us = age > 0 ? (uint64_t)age : 0;
    }
}

int vnd_engine_waiting(vnd_engine *e, vnd_waiting *out, int max)
{
    int64_t now = now_us();
    int n = 0;

    pthread_mutex_lock(&e->lock);
    for (struct engine_counters *c = e->counters; c && n < max; c = c->next) {
        struct parklist *parked = atomic_load(&c->parked_list);

        if (parked)
            n += parklist_read(parked, out + n, max - n, now);
    }
    pthread_mutex_unlock(&e->lock);
    return n;
}
