/* base/haltpoll.c -- see haltpoll.h. */
#include "base/haltpoll.h"

#include <sys/resource.h>
#include <unistd.h>

#define WINDOW_FIRST_US 10
#define CREDIT_PERCENT 3
#define CREDIT_MAX_US 3000   /* of a burst of looks in vain, after a busy time */
#define CHECK_EVERY_US 50000 /* two system calls each */
#define PREEMPTED_MAX 3      /* in that time: timer ticks alone make as many */
#define VAIN_MAX 8           /* so many coincidences are none */
#define RIGHT_AFTER_US 25    /* a wake-up takes about that long */
#define PAUSE_FIRST_US 100000
#define PAUSE_LAST_US 1600000

static long count_preemptions(void)
{
    struct rusage u;

    return getrusage(RUSAGE_THREAD, &u) ? 0 : u.ru_nivcsw;
}

void haltpoll_init(struct haltpoll *p, uint32_t max_us, int64_t now)
{
    if (sysconf(_SC_NPROCESSORS_ONLN) == 1)
        max_us = 0; /* the guest cannot run while this looks */
    *p = (struct haltpoll){ .max_us = max_us, .asked_us = now, .preempted = count_preemptions() };
}

static void pause_looking(struct haltpoll *p, int64_t now)
{
    p->pause_us = p->pause_us == 0 ? PAUSE_FIRST_US : p->pause_us < PAUSE_LAST_US ? p->pause_us * 2 : PAUSE_LAST_US;
    p->resume_us = now + p->pause_us;
    p->vain = 0;
}

/* Whether the processor is needed elsewhere. */
static void check_processor(struct haltpoll *p, int64_t now)
{
    long preempted = count_preemptions();

    p->check_us = now + CHECK_EVERY_US;
    if (preempted - p->preempted > PREEMPTED_MAX || p->vain >= VAIN_MAX)
        pause_looking(p, now);
    else if (now > p->resume_us + PAUSE_LAST_US)
        p->pause_us = 0;
    p->preempted = preempted;
}

uint32_t haltpoll_window_us(struct haltpoll *p, int64_t now)
{
    if (p->window_us == 0)
        return 0;
    if (now >= p->check_us || p->vain >= VAIN_MAX)
        check_processor(p, now);
    if (now < p->resume_us)
        return 0;
    p->credit_us += (now - p->asked_us) * CREDIT_PERCENT / 100;
    if (p->credit_us > CREDIT_MAX_US)
        p->credit_us = CREDIT_MAX_US;
    p->asked_us = now;
    return p->credit_us >= p->window_us ? p->window_us : 0;
}

void haltpoll_looked(struct haltpoll *p, int64_t looked_us, bool found)
{
    p->looked_us = looked_us;
    if (found)
        p->vain = 0;
    else
        p->credit_us -= looked_us;
}

void haltpoll_slept(struct haltpoll *p, int64_t idle_us)
{
    if (p->looked_us != 0)
        p->vain = idle_us - p->looked_us <= RIGHT_AFTER_US ? p->vain + 1 : 0;
    p->looked_us = 0;
    if (idle_us > p->max_us) /* a look as long as may be would not have met it */
        p->window_us = p->window_us / 2 < WINDOW_FIRST_US ? 0 : p->window_us / 2;
    else if (p->window_us < p->max_us)
        p->window_us = p->window_us ? p->window_us * 2 : WINDOW_FIRST_US;
    if (p->window_us > p->max_us)
        p->window_us = p->max_us;
}
