/* base/turns.h -- a queue that guests share and take turns in: each one's items in the order they came, one of each guest in
 * turn. So a guest that queues a thousand holds up another's item by one, not by a thousand.
 *
 * No memory and no lock of its own: items are embedded, the caller holds its lock around all calls. push looks through the
 * guests that have something queued.
 */
#ifndef VND_TURNS_H
#define VND_TURNS_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct turn_item {
    uintptr_t who;                       /* whose turn it uses: compared only */
    struct turn_item *next;              /* of the same guest */
    struct turn_item *next_first, *last; /* of a guest's first item: that of the next guest, and the guest's last */
};

/* Zeroes: empty. */
struct turns {
    struct turn_item *first, *last; /* the first item of each guest, in the order of their turns */
};

void turns_push(struct turns *t, struct turn_item *item, uintptr_t who);
/* The item whose turn it is, of a guest that may (NULL: any) says true of. NULL: there is none. */
struct turn_item *turns_pop(struct turns *t, bool (*may)(void *ctx, uintptr_t who), void *ctx);

/* What a thread serves that serves no guest. */
#define TURNS_NO_GUEST UINTPTR_MAX
/* How many of these threads serve that guest. */
static inline uint32_t turns_served(const uintptr_t *serves, uint32_t threads, uintptr_t who)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < threads; i++)
        n += serves[i] == who;
    return n;
}

static inline bool turns_empty(const struct turns *t)
{
    return !t->first;
}

#endif
