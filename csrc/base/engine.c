/* base/engine.c -- the engine object: life cycle, counters, events for Python's log thread. */
#include "base/engine.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Ring of lines waiting for the log thread. Small: a flood is worth one line, not memory. */
#define EVENTS_MAX 128
#define EVENTS_SAME_US (5 * 1000 * 1000) /* the same line again within this is only counted */
#define EVENTS_RECENT 16                 /* how many different lines are remembered for that */

struct recent {
    char text[VND_ERR_MAX];
    int64_t at_us;
    uint32_t repeated;
};

struct engine_events {
    pthread_mutex_t lock;
    pthread_cond_t some;
    vnd_event ring[EVENTS_MAX];
    uint32_t head, count;
    uint32_t dropped;
    struct recent recent[EVENTS_RECENT];
};

int64_t now_us(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

struct timespec time_after_ms(int ms)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    ts.tv_sec += ms / 1000;
    ts.tv_nsec += (long)(ms % 1000) * 1000000;
    if (ts.tv_nsec >= 1000000000) {
        ts.tv_sec++;
        ts.tv_nsec -= 1000000000;
    }
    return ts;
}

int fail_line(int rc, char *err, size_t err_len, const char *fmt, ...)
{
    if (err && err_len) {
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(err, err_len, fmt, ap);
        va_end(ap);
    }
    return rc;
}

int thread_start(pthread_t *t, const char *name, void *(*fn)(void *), void *arg)
{
    sigset_t all, old;
    char short_name[16];
    int rc;

    /* Signals are Python's main thread's business. SIGBUS and SIGSEGV are synchronous and must stay deliverable. */
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    rc = pthread_create(t, NULL, fn, arg);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc)
        return -rc;
    snprintf(short_name, sizeof short_name, "%s", name);
    pthread_setname_np(*t, short_name);
    return 0;
}

/* ---------------------------------------------------------------- events */

static struct engine_events *events_new(void)
{
    struct engine_events *ev = calloc(1, sizeof *ev);
    pthread_condattr_t attr;

    if (!ev)
        return NULL;
    pthread_mutex_init(&ev->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&ev->some, &attr);
    pthread_condattr_destroy(&attr);
    return ev;
}

static void events_free(struct engine_events *ev)
{
    if (!ev)
        return;
    pthread_cond_destroy(&ev->some);
    pthread_mutex_destroy(&ev->lock);
    free(ev);
}

/* Whether the line is to be given now; *repeated gets how often it was held back since it last was. */
static int events_admit(struct engine_events *ev, const char *text, int64_t now, uint32_t *repeated)
{
    struct recent *oldest = &ev->recent[0];

    for (int i = 0; i < EVENTS_RECENT; i++) {
        struct recent *r = &ev->recent[i];
        if (strcmp(r->text, text) == 0) {
            if (now - r->at_us < EVENTS_SAME_US) {
                r->repeated++;
                return 0;
            }
            *repeated = r->repeated;
            r->repeated = 0;
            r->at_us = now;
            return 1;
        }
        if (r->at_us < oldest->at_us)
            oldest = r;
    }
    snprintf(oldest->text, sizeof oldest->text, "%s", text);
    oldest->at_us = now;
    oldest->repeated = 0;
    *repeated = 0;
    return 1;
}

void engine_say(struct vnd_engine *e, int level, int cause, const char *fmt, ...)
{
    struct engine_events *ev = e->events;
    char text[VND_ERR_MAX];
    struct timespec ts;
    uint32_t repeated = 0;
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            *c = '?'; /* one line stays one line, whatever an image called its blob */
    clock_gettime(CLOCK_REALTIME, &ts);

    pthread_mutex_lock(&ev->lock);
    if (events_admit(ev, text, now_us(), &repeated)) {
        if (ev->count == EVENTS_MAX) {
            ev->dropped++;
        } else {
            vnd_event *slot = &ev->ring[(ev->head + ev->count) % EVENTS_MAX];
            slot->time_us = (uint64_t)ts.tv_sec * 1000000u + (uint64_t)ts.tv_nsec / 1000u;
            slot->level = level;
            slot->cause = cause;
            slot->repeated = repeated;
            memcpy(slot->text, text, sizeof text);
            ev->count++;
            pthread_cond_signal(&ev->some);
        }
    }
    pthread_mutex_unlock(&ev->lock);
}

int vnd_event_next(vnd_engine *e, vnd_event *out, int timeout_ms)
{
    struct engine_events *ev = e->events;
    struct timespec until;
    int rc = 0;

    until = time_after_ms(timeout_ms);
    pthread_mutex_lock(&ev->lock);
    while (!ev->count && !atomic_load(&e->shutdown) && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&ev->some, &ev->lock, &until);
    if (ev->count) {
        *out = ev->ring[ev->head];
        if (ev->dropped) {
            out->repeated += ev->dropped;
            ev->dropped = 0;
        }
        ev->head = (ev->head + 1) % EVENTS_MAX;
        ev->count--;
        rc = 0;
    } else {
        rc = atomic_load(&e->shutdown) ? -ESHUTDOWN : -ETIMEDOUT;
    }
    pthread_mutex_unlock(&ev->lock);
    return rc;
}

/* ---------------------------------------------------------------- counters */

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
        int (*waiting)(struct engine_counters *, vnd_waiting *, int, int64_t) = atomic_load(&c->waiting);
        if (waiting)
            n += waiting(c, out + n, max - n, now);
    }
    pthread_mutex_unlock(&e->lock);
    return n;
}

/* ---------------------------------------------------------------- life cycle */

vnd_engine *vnd_engine_new(const vnd_engine_cfg *cfg)
{
    vnd_engine *e = calloc(1, sizeof *e);

    if (!e)
        return NULL;
    if (cfg)
        e->cfg = *cfg;
    if (!e->cfg.read_deadline_ms)
        e->cfg.read_deadline_ms = 30000;
    if (!e->cfg.pool_threads)
        e->cfg.pool_threads = 2;
    if (!e->cfg.sync_interval_ms)
        e->cfg.sync_interval_ms = 30000;
    pthread_mutex_init(&e->lock, NULL);
    e->events = events_new();
    if (!e->events || fetcher_new(e) || pool_new(e, e->cfg.pool_threads)) {
        vnd_engine_free(e);
        return NULL;
    }
    return e;
}

void vnd_engine_shutdown(vnd_engine *e)
{
    if (atomic_exchange(&e->shutdown, 1))
        return;
    if (e->fetcher)
        fetcher_shutdown(e);
    pthread_mutex_lock(&e->events->lock);
    pthread_cond_broadcast(&e->events->some);
    pthread_mutex_unlock(&e->events->lock);
}

void vnd_engine_free(vnd_engine *e)
{
    if (!e)
        return;
    if (e->events)
        vnd_engine_shutdown(e);
    if (e->pool)
        pool_free(e);
    if (e->fetcher)
        fetcher_free(e);
    events_free(e->events);
    pthread_mutex_destroy(&e->lock);
    free(e);
}
