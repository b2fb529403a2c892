/* base/pool.c -- see base/pool.h. */
#include "base/pool.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

#include "base/engine.h"
#include "base/thread.h"

#define POOL_MAX 16 /* threads: more do not make a disk faster */

struct pool {
    struct vnd_engine *engine;
    pthread_mutex_t lock;
    pthread_cond_t some;
    struct turns tasks;
    bool down;
    uint32_t threads;
    pthread_t thread[POOL_MAX];
};

static void *pool_run(void *arg)
{
    struct pool *p = arg;

    pthread_mutex_lock(&p->lock);
    for (;;) {
        struct pool_task *t = (struct pool_task *)turns_pop(&p->tasks, NULL, NULL); /* turn is its first member */

        if (!t && p->down)
            break;
        if (!t) {
            pthread_cond_wait(&p->some, &p->lock);
            continue;
        }
        pthread_mutex_unlock(&p->lock);
        t->run(t);
        pthread_mutex_lock(&p->lock);
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
    for (uint32_t i = 0; i < threads && i < POOL_MAX && !rc; i++) {
        rc = thread_start(&p->thread[i], "vnd-pool", pool_run, p);
        p->threads += !rc;
    }
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
    pthread_cond_signal(&p->some);
    pthread_mutex_unlock(&p->lock);
}
