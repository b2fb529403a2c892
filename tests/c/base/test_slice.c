/* The time slices that threads ask for. */
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>

#include "base/slice.h"
#include "check.h"

struct attr {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns, deadline_ns, period_ns;
};

/* Of this thread, as Linux has it; 0: it knows none (before 6.12). */
static uint64_t slice_now(void)
{
    struct attr a = { 0 };

    CHECK_EQ(syscall(SYS_sched_getattr, 0, &a, sizeof(a), 0), 0);
    return a.runtime_ns;
}

TEST(a_quiet_thread_has_a_short_slice_and_a_busy_one_has_not)
{
    struct slice s = { 0 };
    uint64_t first = slice_now();

    slice_count(&s, 0, 1);
    CHECK(!s.is_long);
    if (first)
        CHECK_EQ(slice_now(), SLICE_SHORT_US * 1000);
    for (int i = 0; i < 2 * SLICE_EVENTS; i++) { /* a few requests at a time */
        slice_count(&s, 4, 0);
        slice_count(&s, 0, 1);
    }
    CHECK(!s.is_long);
    for (int i = 0; i < 4; i++) { /* many */
        slice_count(&s, 32, 0);
        slice_count(&s, 0, 1);
    }
    CHECK(s.is_long);
    CHECK_EQ(slice_now(), first);
    for (int i = 0; i < SLICE_EVENTS; i++) {
        slice_count(&s, 1, 0);
        slice_count(&s, 0, 1);
    }
    CHECK(!s.is_long);
    slice_set(&s, true);
    CHECK_EQ(slice_now(), first);
}

TEST(a_policy_that_the_operator_chose_is_left_alone)
{
    struct sched_param p = { 0 };
    struct slice s = { 0 };

    CHECK_EQ(sched_setscheduler(0, SCHED_BATCH, &p), 0);
    slice_set(&s, false);
    slice_set(&s, true);
    CHECK_EQ(sched_getscheduler(0), SCHED_BATCH);
}
