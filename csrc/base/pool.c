/* base/pool.c -- see base/pool.h. */
#include "base/pool.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

#include "base/engine.h"
#include "base/slice.h"
#include "base/thread.h"

#define POOL_MAX 16 /* threads of one guest: more do not make a disk faster */
#define POOL_MORE 1 /* than one guest may have busy: another's task need not wait for one of its to end */

struct pool {
    struct vnd_engine *engine;
    pthread_mutex_t lock;
    pthread_cond_t some;
    struct turns tasks;
    bool down;
    uint32_t threads, each; /* each: that one guest may have busy */
    pthread_t thread[POOL_MAX + POOL_MORE];
    uintptr_t serves[POOL_MAX + POOL_MORE];
};

static bool may_serve(void *ctx, uintptr_t who)
{
    struct pool *p = ctx;

    return turns_served(p->serves, p->threads, who) < p->each;
}

static void *pool_run(void *arg)
{
    struct pool *p = arg;
    struct slice slice = { 0 };
    uint32_t me;

    pthread_mutex_lock(&p->lock);
    for (me = 0; !pthread_equal(pthread_self(), p->thread[me]); me++)
        ;
    for (;;) {
        struct pool_task *t =
            (struct pool_task *)turns_pop(&p->tasks, p->down ? NULL : may_serve, p); /* its turn is first */

        if (!t && p->down)
            break;
        if (!t) {
            pthread_cond_wait(&p->some, &p->lock);
            continue;
        }
        bool has_more = turns_served(p->serves, p->threads, t->turn.who) > 0;

        p->serves[me] = t->turn.who;
        pthread_mutex_unlock(&p->lock);
        slice_set(&slice, has_more); /* a guest's only thread is stopped for no other's second */
        t->run(t);
        pthread_mutex_lock(&p->lock);
        p->serves[me] = TURNS_NO_GUEST;
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

int pool_new(struct vnd_engine *e, uint32_t threads)
{
    struct pool *p = calloc(1, sizeof *p);
    int rc = 0;

    if (!p)
        return -ENOMEM;
    p->engine = e;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->some, NULL);
    e->pool = p;
    p->each = threads < POOL_MAX ? threads : POOL_MAX;
    pthread_mutex_lock(&p->lock); /* a thread looks for its own number first */
    for (uint32_t i = 0; i < p->each + POOL_MORE && !rc; i++) {
        p->serves[i] = TURNS_NO_GUEST;
        rc = thread_start(&p->thread[i], "vnd-pool", pool_run, p);
        p->threads += !rc;
    }
    pthread_mutex_unlock(&p->lock);
    if (rc)
        pool_free(e);
    return rc;
}

void pool_free(struct vnd_engine *e)
{
    struct pool *p = e->pool;

    pthread_mutex_lock(&p->lock);
    p->down = true;
    pthread_cond_broadcast(&p->some);
    pthread_mutex_unlock(&p->lock);
    for (uint32_t i = 0; i < p->threads; i++)
        pthread_join(p->thread[i], NULL);
    pthread_cond_destroy(&p->some);
    pthread_mutex_destroy(&p->lock);
    free(p);
    e->pool = NULL;
}

void pool_submit(struct vnd_engine *e, struct pool_task *t, uintptr_t who)
{
    struct pool *p = e->pool;

    pthread_mutex_lock(&p->lock);
    turns_push(&p->tasks, &t->turn, who);
    pthread_cond_signal(&p->some); /* a thread that is awake looks by itself */
    pthread_mutex_unlock(&p->lock);
}
