/* base/events.c -- see base/events.h. */
#include "base/events.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/engine.h"

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

struct engine_events *events_new(void)
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

void events_free(struct engine_events *ev)
{
    if (!ev)
        return;
    pthread_cond_destroy(&ev->some);
    pthread_mutex_destroy(&ev->lock);
    free(ev);
}

void events_wake(struct engine_events *ev)
{
    pthread_mutex_lock(&ev->lock);
    pthread_cond_broadcast(&ev->some);
    pthread_mutex_unlock(&ev->lock);
}

/* Whether the line is to be given now. *repeated gets how often it was held back since it was last given. */
static bool events_admit(struct engine_events *ev, const char *text, int64_t now, uint32_t *repeated)
{
    struct recent *oldest = &ev->recent[0];

    for (int i = 0; i < EVENTS_RECENT; i++) {
        struct recent *r = &ev->recent[i];
        if (strcmp(r->text, text) == 0) {
            if (now - r->at_us < EVENTS_SAME_US) {
                r->repeated++;
                return false;
            }
            *repeated = r->repeated;
            r->repeated = 0;
            r->at_us = now;
            return true;
        }
        if (r->at_us < oldest->at_us)
            oldest = r;
    }
    snprintf(oldest->text, sizeof oldest->text, "%s", text);
    oldest->at_us = now;
    oldest->repeated = 0;
    *repeated = 0;
    return true;
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
