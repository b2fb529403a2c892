/* base/parklist.c -- see base/parklist.h. */
#include "base/parklist.h"

#include <stddef.h>

#include "base/counters.h"

#define MS_MAX 1000000

void parklist_init(struct parklist *l, struct engine_counters *counters)
{
    l->first = l->last = NULL;
    l->n = 0;
    l->counters = counters;
    pthread_mutex_init(&l->lock, NULL);
}

void parklist_destroy(struct parklist *l)
{
    pthread_mutex_destroy(&l->lock);
}

static void note_oldest(struct parklist *l)
{
    atomic_store_explicit(&l->counters->oldest_park_us, l->first ? l->first->since_us : 0, memory_order_relaxed);
}

void parklist_add(struct parklist *l, struct parked *p)
{
    struct parked *at = l->last;

    while (at && at->deadline_us > p->deadline_us)
        at = at->prev;
    p->prev = at;
    p->next = at ? at->next : l->first;
    *(at ? &at->next : &l->first) = p;
    *(p->next ? &p->next->prev : &l->last) = p;
    p->listed = true;
    l->n++;
    note_oldest(l);
}

void parklist_remove(struct parklist *l, struct parked *p)
{
    *(p->prev ? &p->prev->next : &l->first) = p->next;
    *(p->next ? &p->next->prev : &l->last) = p->prev;
    p->prev = p->next = NULL;
    p->listed = false;
    l->n--;
    note_oldest(l);
}

int parklist_ms_left(const struct parklist *l, int64_t now)
{
    for (const struct parked *p = l->first; p; p = p->next)
        if (!p->wakes) {
            int64_t ms = p->deadline_us > now ? (p->deadline_us - now + 999) / 1000 : 0;

            return ms < MS_MAX ? (int)ms : MS_MAX;
        }
    return -1;
}

int parklist_read(struct parklist *l, vnd_waiting *out, int max, int64_t now)
{
    int n = 0;

    pthread_mutex_lock(&l->lock);
    for (const struct parked *p = l->first; p && n < max; p = p->next)
        out[n++] = (vnd_waiting){ .nodeid = p->nodeid,
                                  .unique = p->unique,
                                  .opcode = p->opcode,
                                  .wait_us = now > p->since_us ? (uint64_t)(now - p->since_us) : 0 };
    pthread_mutex_unlock(&l->lock);
    return n;
}
