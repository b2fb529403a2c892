/* base/wakelist.c -- see base/wakelist.h. */
#include "base/wakelist.h"

#include <errno.h>
#include <sched.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <unistd.h>

int wakelist_open(struct wakelist *l)
{
    l->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return l->fd < 0 ? -errno : 0;
}

void wakelist_wait(struct wakelist *l)
{
    while (atomic_load_explicit(&l->wakers, memory_order_acquire) != 0)
        sched_yield();
}

void wakelist_close(struct wakelist *l)
{
    if (l->fd >= 0)
        close(l->fd);
    l->fd = -1;
}

void event_raise(int fd)
{
    uint64_t one = 1;
    ssize_t n = write(fd, &one, sizeof one);

    (void)n;
}

void wakelist_raise(struct wakelist *l)
{
    event_raise(l->fd);
}

bool wakelist_clear(struct wakelist *l)
{
    uint64_t count;

    return read(l->fd, &count, sizeof count) > 0;
}
