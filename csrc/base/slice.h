/* base/slice.h -- how long a thread runs before another on its processor has its turn.
 *
 * A thread of a guest that asks now and then must run at once when it is woken, also where threads of guests that flood the
 * daemon want all processors. Linux (6.12 and later) lets a thread with a short time slice take the place of one with a longer
 * one. So a thread asks for short slices while it finds few requests between two rests, and gives that up while it finds many.
 * How long it rests is not looked at: a thread that waits for a processor would seem to. Threads whose policy the operator
 * has chosen are left alone. Each struct belongs to one thread.
 */
#ifndef VND_SLICE_H
#define VND_SLICE_H
#include <stdbool.h>
#include <stdint.h>

#define SLICE_SHORT_US 100 /* the least that Linux takes */
#define SLICE_EVENTS 64    /* requests and rests that are looked at before the slice is changed */
#define SLICE_MANY 8       /* requests between two rests */

struct slice {
    uint32_t requests, rests; /* since the slice was last looked at */
    bool asked, is_long;      /* long: the system's own length */
};

/* Asks for a short slice, or for the system's length, where that is not so already. */
void slice_set(struct slice *s, bool is_long);

/* Found so many requests, or nothing left to do. */
static inline void slice_count(struct slice *s, uint32_t requests, uint32_t rests)
{
    s->requests += requests;
    s->rests += rests;
    if (s->asked && s->requests + s->rests < SLICE_EVENTS)
        return;
    slice_set(s, s->requests >= SLICE_MANY * (s->rests + 1));
    s->requests = s->rests = 0;
}

#endif
