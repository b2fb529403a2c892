/* base/slice.c -- see base/slice.h. */
#include "base/slice.h"

#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* struct sched_attr of linux/sched/types.h, which does not go with sched.h: its first version. */
struct attr {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns, deadline_ns, period_ns;
};

/* Kernels that know no slices of single threads take no notice. */
static void ask(uint64_t ns)
{
    struct attr a = { .size = sizeof(a) };

    if (syscall(SYS_sched_getattr, 0, &a, sizeof(a), 0) || a.policy != SCHED_OTHER)
        return;
    a.size = sizeof(a);
    a.runtime_ns = ns;
    a.deadline_ns = a.period_ns = 0;
    syscall(SYS_sched_setattr, 0, &a, 0);
}

void slice_set(struct slice *s, bool is_long)
{
    if (s->asked && s->is_long == is_long)
        return;
    s->asked = true;
    s->is_long = is_long;
    ask(is_long ? 0 : SLICE_SHORT_US * 1000ull);
}
