/* base/haltpoll.c: the window follows what was lately seen, and looks in vain are bounded. Time is given, so nothing here
 * depends on how fast the machine is. */
#include "base/haltpoll.h"

#include "check.h"

#define MAX_US 50

/* A poller that has lately seen work come idle_us after the work before, often enough. */
static struct haltpoll poller_of(int64_t idle_us, int64_t now)
{
    struct haltpoll p;

    haltpoll_init(&p, MAX_US, now);
    for (int i = 0; i < 20; i++)
        haltpoll_slept(&p, idle_us);
    return p;
}

TEST(a_thread_sleeps_at_once_until_work_came_soon)
{
    struct haltpoll p;

    haltpoll_init(&p, MAX_US, 0);
    CHECK_EQ(haltpoll_window_us(&p, 1000000), 0);
    haltpoll_slept(&p, 20);
    CHECK(haltpoll_window_us(&p, 2000000) > 0);
}

TEST(the_window_grows_to_the_limit_and_no_further)
{
    struct haltpoll p = poller_of(20, 0);

    CHECK_EQ(haltpoll_window_us(&p, 1000000), MAX_US);
}

TEST(a_slow_guest_closes_the_window)
{
    struct haltpoll p = poller_of(20, 0);

    for (int i = 0; i < 5; i++)
        haltpoll_slept(&p, 1000);
    CHECK_EQ(haltpoll_window_us(&p, 1000000), 0);
}

TEST(zero_never_looks)
{
    struct haltpoll p;

    haltpoll_init(&p, 0, 0);
    for (int i = 0; i < 20; i++)
        haltpoll_slept(&p, 1);
    CHECK_EQ(haltpoll_window_us(&p, 1000000), 0);
}

TEST(looks_in_vain_take_at_most_three_percent)
{
    struct haltpoll p = poller_of(20, 0);
    int64_t now = 1000000, began = now, looked = 0;

    /* The worst guest: it always asks just after the look has ended, too late to be taken for one on this processor. */
    while (now < began + 10000000) {
        int64_t w = haltpoll_window_us(&p, now);

        looked += w;
        now += w + 30;
        haltpoll_looked(&p, w, false);
        haltpoll_slept(&p, MAX_US);
    }
    CHECK(looked > 0);
    CHECK(looked <= (now - began) * 3 / 100 + 3000); /* and the credit it began with */
}

TEST(looks_that_find_work_are_free)
{
    struct haltpoll p = poller_of(20, 0);
    int64_t now = 1000000;

    CHECK_EQ(haltpoll_window_us(&p, now), MAX_US);
    for (int i = 0; i < 1000; i++) {
        haltpoll_looked(&p, 20, true);
        CHECK_EQ(haltpoll_window_us(&p, now += 21), MAX_US);
    }
}

/* Work that comes right after the thread fell asleep, again and again: the guest waits for this processor. */
TEST(a_guest_on_the_same_processor_ends_the_looks_for_a_while)
{
    struct haltpoll p = poller_of(20, 0);
    int64_t now = 1000000, looks = 0;

    for (int i = 0; i < 100; i++) {
        int64_t w = haltpoll_window_us(&p, now += 1000);

        looks += w > 0;
        if (w > 0)
            haltpoll_looked(&p, w, false);
        haltpoll_slept(&p, w + 5);
    }
    CHECK_EQ(looks, 8);
    CHECK(haltpoll_window_us(&p, now + 200000) > 0); /* tried again later */
}
