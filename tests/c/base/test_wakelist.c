/* A list that wakes the thread that takes from it: order, sleep, and its end while a push is under way. */
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>

#include "base/wakelist.h"
#include "check.h"

TEST(items_come_in_the_order_of_the_pushes)
{
    struct wakelist l = { 0 };
    struct wake_item items[3];

    CHECK_EQ(wakelist_open(&l), 0);
    CHECK(wakelist_take(&l) == NULL);
    for (int i = 0; i < 3; i++)
        wakelist_push(&l, &items[i]);
    CHECK(wakelist_take(&l) == &items[0]);
    wakelist_push(&l, &items[0]);
    for (int i = 1; i < 3; i++)
        CHECK(wakelist_take(&l) == &items[i]);
    CHECK(wakelist_take(&l) == &items[0]);
    CHECK(wakelist_take(&l) == NULL);
    wakelist_close(&l);
}

TEST(only_a_sleeper_is_raised)
{
    struct wakelist l = { 0 };
    struct wake_item a, b;

    CHECK_EQ(wakelist_open(&l), 0);
    wakelist_push(&l, &a);
    CHECK(!wakelist_clear(&l));
    CHECK(!wakelist_sleep(&l)); /* there is something to take */
    CHECK(wakelist_take(&l) == &a);
    CHECK(wakelist_sleep(&l));
    wakelist_push(&l, &b);
    CHECK(wakelist_clear(&l));
    wakelist_awake(&l);
    CHECK(wakelist_take(&l) == &b);
    wakelist_close(&l);
}

struct pusher {
    struct wakelist *l;
    struct wake_item item;
    pthread_t thread;
};

static void *push_one(void *arg)
{
    struct pusher *p = arg;

    wakelist_push(p->l, &p->item);
    return NULL;
}

struct ender {
    struct wakelist *l;
    _Atomic bool may_end, ended_early;
    pthread_t thread;
};

static void *end_list(void *arg)
{
    struct ender *e = arg;

    wakelist_wait(e->l);
    atomic_store(&e->ended_early, !atomic_load(&e->may_end));
    return NULL;
}

/* A push has delivered its item and not returned: the list must not be freed under it. The eventfd is a full pipe here, so
 * that the push stays where it is. */
TEST(the_end_waits_for_a_push)
{
    struct wakelist l = { 0 };
    struct pusher p = { .l = &l };
    struct ender e = { .l = &l };
    char byte[4096];
    int fds[2];
    ssize_t n;

    CHECK(pipe2(fds, O_CLOEXEC | O_NONBLOCK) == 0);
    memset(byte, 0, sizeof(byte));
    while (write(fds[1], byte, sizeof(byte)) > 0)
        ;
    CHECK(fcntl(fds[1], F_SETFL, 0) == 0);
    l.fd = fds[1];
    CHECK(wakelist_sleep(&l));
    CHECK(pthread_create(&p.thread, NULL, push_one, &p) == 0);
    while (wakelist_take(&l) == NULL)
        sched_yield();
    CHECK_EQ(atomic_load(&l.wakers), 1);
    CHECK(pthread_create(&e.thread, NULL, end_list, &e) == 0);
    for (int i = 0; i < 100; i++)
        sched_yield();
    atomic_store(&e.may_end, true);
    while ((n = read(fds[0], byte, sizeof(byte))) > 0)
        ;
    pthread_join(p.thread, NULL);
    pthread_join(e.thread, NULL);
    CHECK(!e.ended_early);
    CHECK_EQ(atomic_load(&l.wakers), 0);
    close(fds[0]);
    close(fds[1]);
}
