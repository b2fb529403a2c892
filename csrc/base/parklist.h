/* base/parklist.h -- the parked requests of one transport's thread, oldest first: when the first one's deadline passes, how
 * long it has waited, and what `vnd_engine_waiting` lists.
 *
 * Threads and locks: the list is changed, and looked at by other threads, under its lock, which is taken after the engine's
 * lock and before a lock of the store. Where one thread alone changes a list, it may look at it without the lock.
 */
#ifndef VND_PARKLIST_H
#define VND_PARKLIST_H
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "vnd.h"

struct engine_counters;

/* Embedded in a request. */
struct parked {
    struct parked *prev, *next;
    int64_t since_us, deadline_us; /* CLOCK_MONOTONIC */
    bool listed;
    bool wakes; /* its wake is under way and decides what becomes of it: the deadline does not count any more */
    uint64_t nodeid, unique; /* for those who ask what waits */
    uint32_t opcode;
};

struct parklist {
    pthread_mutex_t lock;
    struct parked *first, *last;
    uint32_t n;
    struct engine_counters *counters; /* its oldest_park_us is kept */
};

void parklist_init(struct parklist *l, struct engine_counters *counters);
void parklist_destroy(struct parklist *l);
/* With the lock held, unless no other thread looks at the list. A request stands behind those whose deadline is no later. */
void parklist_add(struct parklist *l, struct parked *p);
void parklist_remove(struct parklist *l, struct parked *p);
/* Milliseconds from now until the next deadline, at most 1,000,000; -1: nothing waits for one. */
int parklist_ms_left(const struct parklist *l, int64_t now);
/* What waits, oldest first: the number, at most max. Takes the lock. */
int parklist_read(struct parklist *l, vnd_waiting *out, int max, int64_t now);

#endif
