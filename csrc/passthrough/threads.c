/* passthrough/threads.c -- threads for host calls that may take long, and the sweep of idle descriptors. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/seccomp.h"
#include "base/slice.h"
#include "passthrough/internal.h"

static void run_task(struct pt_task *t)
{
    struct store_wait *w = t->wait;

    t->run(t->arg);
    free(t);
    w->wake(w); /* the last use of it: the request and its queue may be gone now */
}

static bool sweep_due(struct vnd_passthrough *p)
{
    bool due;

    pthread_mutex_lock(&p->lock);
    due = p->n_cached > 0;
    for (struct pt_mount *m = p->mounts; m && !due; m = m->next)
        due = m->above && m->fd >= 0;
    pthread_mutex_unlock(&p->lock);
    return due;
}

/* Whether another task of this guest may begin. */
static bool may_serve(void *ctx, uintptr_t who)
{
    struct pt_pool *pool = ctx;

    return turns_served(pool->serves, pool->threads, who) < PT_THREADS_EACH;
}

static void *pool_main(void *arg)
{
    struct vnd_passthrough *p = arg;
    struct pt_pool *pool = &p->pool;
    struct slice slice = { 0 };
    bool timed_out;
    uint32_t me;

    engine_confine(p->engine, VND_THREAD_SHARE);
    pthread_mutex_lock(&pool->lock);
    for (me = 0; !pthread_equal(pthread_self(), pool->thread[me]); me++)
        ;
    for (;;) {
        struct pt_task *t = (struct pt_task *)turns_pop(&pool->tasks, pool->down ? NULL : may_serve, pool);
        struct timespec until;

        if (t) {
            bool has_more = turns_served(pool->serves, pool->threads, t->turn.who) > 0;

            pool->queued--;
            pool->serves[me] = t->turn.who;
            pthread_mutex_unlock(&pool->lock);
            slice_set(&slice, has_more); /* a guest's only thread is stopped for no other's second */
            run_task(t);
            pthread_mutex_lock(&pool->lock);
            pool->serves[me] = TURNS_NO_GUEST;
            continue;
        }
        if (pool->down)
            break;
        pool->idle++;
        if (me > 0) {
            pthread_cond_wait(&pool->some, &pool->lock);
            pool->idle--;
            continue;
        }
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_sec += PT_IDLE_MS / 1000;
        timed_out = pthread_cond_timedwait(&pool->some, &pool->lock, &until) == ETIMEDOUT;
        pool->idle--;
        if (timed_out) { /* the first thread sweeps */
            pthread_mutex_unlock(&pool->lock);
            if (sweep_due(p))
                pt_drop_idle(p, false);
            pthread_mutex_lock(&pool->lock);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* Under the pool's lock. */
static int start_thread(struct vnd_passthrough *p)
{
    struct pt_pool *pool = &p->pool;
    int rc;

    pool->serves[pool->threads] = TURNS_NO_GUEST;
    rc = thread_start(&pool->thread[pool->threads], "vnd-host-fs", pool_main, p);

    pool->threads += !rc;
    return rc;
}

int pt_pool_start(struct vnd_passthrough *p)
{
    struct pt_pool *pool = &p->pool;
    pthread_condattr_t attr;
    int rc;

    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->some, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_lock(&pool->lock);
    rc = start_thread(p);
    pthread_mutex_unlock(&pool->lock);
    return rc;
}

void pt_pool_stop(struct vnd_passthrough *p)
{
    struct pt_pool *pool = &p->pool;

    pthread_mutex_lock(&pool->lock);
    pool->down = true;
    pthread_cond_broadcast(&pool->some);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->threads; i++)
        pthread_join(pool->thread[i], NULL);
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->some);
}

int pt_run(struct fs *fs, struct store_wait *w, void (*fn)(void *arg), void *arg)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_pool *pool = &p->pool;
    struct pt_task *t = malloc(sizeof(*t));

    if (!t)
        return -ENOMEM;
    *t = (struct pt_task){ .run = fn, .arg = arg, .wait = w };
    w->parked_once = 1;
    w->err = 0;
    pthread_mutex_lock(&pool->lock);
    turns_push(&pool->tasks, &t->turn, w->who);
    if (++pool->queued > pool->idle && pool->threads < PT_THREADS)
        start_thread(p); /* if that fails, the threads there are serve it later */
    pthread_cond_broadcast(&pool->some);
    pthread_mutex_unlock(&pool->lock);
    return -EINPROGRESS;
}

bool pt_may_wait(struct fs *fs, uint64_t ino)
{
    struct vnd_passthrough *p = pt_of(fs);

    return atomic_load_explicit(&p->n_remote, memory_order_relaxed) && pt_is_on_remote(p, ino);
}
