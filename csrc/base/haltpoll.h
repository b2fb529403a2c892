/* base/haltpoll.h -- how long a thread looks for work before it sleeps. A wake-up from another processor costs some 5 to
 * 25 us, more than most requests; a thread that is still awake does not pay it. As KVM's halt polling does, the window
 * follows what the thread lately saw.
 *
 *     until = now + haltpoll_window_us(p, now);
 *     found = look until then;
 *     haltpoll_looked(p, looked_us, found);
 *     if (!found) { sleep; haltpoll_slept(p, looked_us + slept_us); }
 *
 * Bounds: looks that found nothing take at most 3 % of one processor over time. So an idle or slow guest costs next to
 * nothing. A thread stops looking for a while when it was preempted, or when work came again and again right after it fell
 * asleep: then another thread needs its processor, perhaps the guest itself. With one processor no thread
 * looks.
 *
 * One struct a thread, used by that thread alone; no locks.
 */
#ifndef VND_HALTPOLL_H
#define VND_HALTPOLL_H
#include <stdbool.h>
#include <stdint.h>

struct haltpoll {
    uint32_t max_us;    /* no look is longer; 0: never look */
    uint32_t window_us; /* the next look, 0: none */
    int64_t credit_us;  /* what looks in vain may still cost */
    int64_t asked_us;   /* when the credit was last filled up */
    int64_t check_us;   /* when processors and preemptions are looked at next */
    int64_t resume_us;  /* no look before: the processor is needed */
    uint32_t pause_us;  /* the last such pause */
    long preempted;     /* involuntary context switches at the last check */
    int64_t looked_us;  /* in vain, just before the sleep; 0: it did not look */
    uint32_t vain;      /* looks in a row that were in vain though the work came right after them */
};

/* The calling thread's, max_us long at most. */
void haltpoll_init(struct haltpoll *p, uint32_t max_us, int64_t now);
/* How long to look now, 0: sleep at once. */
uint32_t haltpoll_window_us(struct haltpoll *p, int64_t now);
void haltpoll_looked(struct haltpoll *p, int64_t looked_us, bool found);
/* idle_us: from the end of the work before to the work that ended the sleep. */
void haltpoll_slept(struct haltpoll *p, int64_t idle_us);

/* Tells the processor that this is a loop that waits. */
static inline void haltpoll_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
