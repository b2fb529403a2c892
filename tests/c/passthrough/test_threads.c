/* The threads of a host directory: what one guest has them do does not keep another's waiting. */
#include <errno.h>

#include "check.h"
#include "passthrough/internal.h"

#define FLOOD 40

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int begun, done, woken;

static void call_that_takes_long(void *arg)
{
    atomic_fetch_add(&begun, 1);
    pthread_mutex_lock(&gate);
    pthread_mutex_unlock(&gate);
}

static void call_that_is_short(void *arg)
{
    atomic_fetch_add(&done, 1);
}

static void wake(struct store_wait *w)
{
    atomic_fetch_add(&woken, 1);
}

static void give(struct fs *fs, struct store_wait *w, uintptr_t who, void (*fn)(void *arg))
{
    store_wait_init(w, wake, NULL);
    w->who = who;
    CHECK_EQ(fs->ops->rw->run(fs, w, fn, NULL), -EINPROGRESS);
}

static void await(_Atomic int *count, int n)
{
    CHECK_SOON(atomic_load(count) >= n);
}

TEST(a_guest_whose_calls_take_long)
{
    vnd_engine *e = vnd_engine_new(NULL);
    char err[VND_ERR_MAX];
    vnd_passthrough *p = vnd_passthrough_new(e, "/tmp", 0, err, sizeof(err));
    struct store_wait waits[FLOOD + 2];

    CHECK(p);
    alarm(60); /* where the second guest waits for the first */
    pthread_mutex_lock(&gate);
    for (int i = 0; i < FLOOD; i++)
        give(&p->fs, &waits[i], 1, call_that_takes_long);
    await(&begun, PT_THREADS_EACH);
    for (int i = 0; i < 2; i++)
        give(&p->fs, &waits[FLOOD + i], 2, call_that_is_short);
    await(&done, 2);
    CHECK_EQ(atomic_load(&begun), PT_THREADS_EACH);
    pthread_mutex_unlock(&gate);
    await(&woken, FLOOD + 2);
    CHECK_EQ(atomic_load(&begun), FLOOD);
    vnd_passthrough_free(p);
    vnd_engine_shutdown(e);
    vnd_engine_free(e);
}

/* Freed while calls are queued: they are finished, whichever guest they are for. */
TEST(calls_that_are_queued_at_the_end)
{
    vnd_engine *e = vnd_engine_new(NULL);
    char err[VND_ERR_MAX];
    vnd_passthrough *p = vnd_passthrough_new(e, "/tmp", 0, err, sizeof(err));
    struct store_wait waits[FLOOD];

    CHECK(p);
    for (int i = 0; i < FLOOD; i++)
        give(&p->fs, &waits[i], 1, call_that_takes_long);
    vnd_passthrough_free(p);
    CHECK_EQ(atomic_load(&woken), FLOOD);
    vnd_engine_shutdown(e);
    vnd_engine_free(e);
}
