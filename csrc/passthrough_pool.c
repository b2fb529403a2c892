/* passthrough_pool.c -- threads for host calls that may take long, and the sweep of idle descriptors. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "passthrough.h"

static void run_task(struct vnd_passthrough *p, struct pt_task *t)
{
    struct store_wait *w = t->wait;

    t->run(t);
    close(t->fd);
    free(t);
    w->wake(w);     /* the last of it: the request and its queue may be gone now */
}

static bool sweep_due(struct vnd_passthrough *p)
{
    bool due;

    pthread_mutex_lock(&p->lock);
    due = p->n_cached > 0;
    for (struct pt_mount *m = p->mounts; m && !due; m = m->next) {
        due = m->above && m->fd >= 0;
    }
    pthread_mutex_unlock(&p->lock);
    return due;
}

static void *pool_main(void *arg)
{
    struct vnd_passthrough *p = arg;
    struct pt_pool *pool = &p->pool;
    bool sweeper;

    pthread_mutex_lock(&pool->lock);
    sweeper = pool->threads++ == 0;
    for (;;) {
        struct pt_task *t = pool->head;
        struct timespec until;

        if (t) {
            pool->head = t->next;
            if (!pool->head) {
                pool->tail = &pool->head;
            }
            pthread_mutex_unlock(&pool->lock);
            run_task(p, t);
            pthread_mutex_lock(&pool->lock);
            continue;
        }
        if (pool->down) {
            break;
        }
        if (!sweeper) {
            pthread_cond_wait(&pool->some, &pool->lock);
            continue;
        }
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_sec += PT_IDLE_MS / 1000;
        if (pthread_cond_timedwait(&pool->some, &pool->lock, &until) == ETIMEDOUT) {
            pthread_mutex_unlock(&pool->lock);
            if (sweep_due(p)) {
                pt_drop_idle(p, false);
            }
            pthread_mutex_lock(&pool->lock);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

int pt_pool_start(struct vnd_passthrough *p)
{
    struct pt_pool *pool = &p->pool;
    pthread_condattr_t attr;

    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->some, &attr);
    pthread_condattr_destroy(&attr);
    pool->tail = &pool->head;
    for (uint32_t i = 0; i < PT_THREADS; i++) {
        int rc = thread_start(&pool->thread[i], "vnd-host-fs", pool_main, p);

        if (rc) {
            return rc > 0 ? -rc : rc;
        }
    }
    return 0;
}

void pt_pool_stop(struct vnd_passthrough *p)
{
    struct pt_pool *pool = &p->pool;

    pthread_mutex_lock(&pool->lock);
    pool->down = true;
    pthread_cond_broadcast(&pool->some);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < PT_THREADS; i++) {
        if (pool->thread[i]) {
            pthread_join(pool->thread[i], NULL);
        }
    }
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->some);
}

int pt_pool_run(struct vnd_passthrough *p, struct store_wait *w, void (*run)(struct pt_task *t), int fd, uint32_t mode,
                uint64_t off, uint64_t len)
{
    struct pt_pool *pool = &p->pool;
    struct pt_task *t = malloc(sizeof(*t));

    if (!t) {
        return -ENOMEM;
    }
    *t = (struct pt_task){ .run = run, .p = p, .wait = w, .mode = mode, .off = off, .len = len };
    t->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (t->fd < 0) {
        int rc = -errno;

        free(t);
        return rc == -EMFILE ? -ENFILE : rc;
    }
    w->parked_once = 1;
    w->err = 0;
    pthread_mutex_lock(&pool->lock);
    *pool->tail = t;
    pool->tail = &t->next;
    pthread_cond_broadcast(&pool->some);
    pthread_mutex_unlock(&pool->lock);
    return -EINPROGRESS;
}
