/* base/wakelist.h -- how other threads give items back to the one thread that takes them: a stack that any thread
 * pushes on, and an eventfd that is written only while the taker sleeps. No locks.
 *
 * The taker, in a loop:
 *
 *     while ((item = wakelist_take(l)) != NULL)
 *         ...
 *     if (wakelist_sleep(l) && nothing else is to do)
 *         poll or epoll_wait on l->fd and what else it waits for;
 *     wakelist_awake(l);
 *
 * "Nothing else" is asked between the two calls, as the taker's other callers change their state first and raise then:
 * whichever of both comes second sees the other.
 */
#ifndef VND_WAKELIST_H
#define VND_WAKELIST_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

/* Embedded in what is given back. Pushed once at a time. */
struct wake_item {
    struct wake_item *next;
};

struct wakelist {
    int fd;                 /* eventfd, -1: not open */
    struct wake_item *todo; /* the taker's alone: taken off the stack, oldest first */
    /* Shared with those who push. */
    _Alignas(64) _Atomic(struct wake_item *) done; /* newest first */
    _Atomic int sleeping;
    _Atomic int wakers; /* threads inside wakelist_push */
};

/* 0 or -errno. */
int wakelist_open(struct wakelist *l);
/* The taker's, once nothing is left that could be pushed: waits until the last push has returned. */
void wakelist_wait(struct wakelist *l);
/* After wakelist_wait. What is still in the list is the owner's. Safe on a list that was never opened but has fd -1. */
void wakelist_close(struct wakelist *l);
/* Raises an eventfd; one that is full is readable all the same. */
void event_raise(int fd);
/* Ends the taker's sleep, now or the next. Any thread. */
void wakelist_raise(struct wakelist *l);
/* Resets the eventfd, where it is polled by level: true if it was raised. */
bool wakelist_clear(struct wakelist *l);

/* Any thread. After the last line the list may be gone; until then wakers keeps it. */
static inline void wakelist_push(struct wakelist *l, struct wake_item *item)
{
    struct wake_item *top;

    atomic_fetch_add_explicit(&l->wakers, 1, memory_order_relaxed);
    top = atomic_load_explicit(&l->done, memory_order_relaxed);
    do
        item->next = top;
    while (!atomic_compare_exchange_weak(&l->done, &top, item));
    if (atomic_load(&l->sleeping) && atomic_exchange(&l->sleeping, 0))
        wakelist_raise(l);
    atomic_fetch_sub_explicit(&l->wakers, 1, memory_order_release);
}

/* The taker's. The next item in the order of the pushes, NULL: none. */
static inline struct wake_item *wakelist_take(struct wakelist *l)
{
    struct wake_item *item = l->todo;

    if (!item) {
        struct wake_item *list;

        if (!atomic_load_explicit(&l->done, memory_order_relaxed))
            return NULL;
        for (list = atomic_exchange_explicit(&l->done, NULL, memory_order_acquire); list;) {
            struct wake_item *next = list->next;

            list->next = item;
            item = list;
            list = next;
        }
        if (!item) /* only one thread takes, so this is never true: for tools that cannot know */
            return NULL;
    }
    l->todo = item->next;
    return item;
}

/* The taker's. Whether there is nothing to take. */
static inline bool wakelist_empty(struct wakelist *l)
{
    return !l->todo && !atomic_load(&l->done);
}

/* The taker's, before it sleeps: from here on a push raises the eventfd. Whether there is nothing to take. */
static inline bool wakelist_sleep(struct wakelist *l)
{
    atomic_store(&l->sleeping, 1);
    return wakelist_empty(l);
}

/* After it slept, or did not. */
static inline void wakelist_awake(struct wakelist *l)
{
    atomic_store_explicit(&l->sleeping, 0, memory_order_relaxed);
}

#endif
