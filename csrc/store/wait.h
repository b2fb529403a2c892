/* store/wait.h -- a request that waits for the store: parked on what is missing, woken by any thread. */
#ifndef VND_WAIT_H
#define VND_WAIT_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/wakelist.h"
#include "vnd.h"

/* Counted bytes for what could not come from the cache file. */
struct store_buf {
    _Atomic uint32_t refs;
    size_t len;
    uint8_t data[];
};
struct store_buf *store_buf_new(size_t len); /* with one reference; NULL: no memory */
void store_buf_unref(struct store_buf *b);   /* NULL: nothing */

/* What another thread made for a waiter. */
struct store_answer {
    void (*drop)(struct store_answer *a);
};

/* A waiter: embedded in whatever waits, owned by it. Only the store touches the fields above the line while
 * linked. */
struct store_wait {
    struct store_wait *next, **prev; /* shard list */
    struct store_unit *unit;         /* the unit it is linked on, NULL = not linked */
    void *shard;                     /* whose lock guards the link */
    struct store_buf *buf;           /* set by the waker: the wanted bytes, served by the next store_read */
    struct store_answer *answer;     /* set by a waker that is not the store: what it waited for */
    int32_t err;                     /* set by the waker: positive errno to fail with */
    uint8_t again;                   /* EAGAINs so far (page cache) */
    uint8_t parked_once;             /* for the statistics */
    /* ---- the owner's */
    int64_t deadline_us;                /* CLOCK_MONOTONIC; orders demand */
    uintptr_t session;                  /* one of those who share what a server can give; compared only, 0: none */
    void (*wake)(struct store_wait *w); /* called once per park, any thread, no store lock held; must not block */
    struct wake_item done;              /* free for the owner's wake list */
    void *owner;
    uintptr_t who; /* the guest or mount that waits, where they share a queue (base/turns.h); 0: none */
};

/* The waiter that an item of a wakelist is embedded in. */
static inline struct store_wait *store_wait_of(struct wake_item *item)
{
    return (struct store_wait *)((char *)item - offsetof(struct store_wait, done));
}

/* Clears the store's part for a new request. */
void store_wait_init(struct store_wait *w, void (*wake)(struct store_wait *), void *owner);

/* Unlinks a waiter (deadline, hang-up). true: it was linked and will not be woken; false: wake has been or is being
 * called. Also drops w->buf. */
bool store_wait_cancel(struct store_wait *w);
/* The same for a waiter whose deadline has passed: says why the last attempt to fetch for it failed, if one did (else cause
 * is VND_CAUSE_DEADLINE). who: the kind of read, for the line. */
bool store_wait_expire(struct store_wait *w, struct vnd_engine *e, const char *who, int64_t deadline_ms);
/* After the last store_read, whatever its result: drops w->buf and w->answer. */
void store_wait_done(struct store_wait *w);
/* Takes w off its unit. Its shard's lock is held. */
void store_wait_unlink(struct store_wait *w);

#endif
