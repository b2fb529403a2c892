/* store/fetcher.c -- the fetcher's life. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "store/fetcher.h"

int fetcher_new(struct vnd_engine *e)
{
    struct fetcher *f = NULL;
    pthread_condattr_t attr;

    if (posix_memalign((void **)&f, 64, sizeof *f))
        return -ENOMEM;
    memset(f, 0, sizeof *f);
    f->engine = e;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&f->lock, NULL);
    pthread_cond_init(&f->some, &attr);
    pthread_mutex_init(&f->foreign_lock, NULL);
    pthread_cond_init(&f->foreign_some, &attr);
    pthread_mutex_init(&f->upkeep_lock, NULL);
    pthread_cond_init(&f->upkeep_some, &attr);
    pthread_mutex_init(&f->uncached_lock, NULL);
    pthread_condattr_destroy(&attr);
    for (int i = 0; i < FETCH_SHARDS; i++)
        pthread_mutex_init(&f->shards[i].lock, NULL);
    for (int i = 0; i < FETCH_SLOTS; i++)
        job_init(&f->slots[i]);
    e->fetcher = f;
    return 0;
}

void fetcher_shutdown(struct vnd_engine *e)
{
    struct fetcher *f = e->fetcher;

    pthread_mutex_lock(&f->lock);
    atomic_store(&f->down, true);
    pthread_cond_broadcast(&f->some);
    pthread_mutex_unlock(&f->lock);
    foreign_stop(f);
    upkeep_stop(f);
    miss_fail_all(f, ESHUTDOWN);
    struct want *left = want_take(f, NULL);
    for (struct want *w = left; w; w = w->next)
        if (w->meta)
            blob_take_raw(w->meta, NULL, 0, ESHUTDOWN);
    wants_free(f, left);
}

void fetcher_free(struct vnd_engine *e)
{
    struct fetcher *f = e->fetcher;

    for (int i = 0; i < FETCH_SLOTS; i++)
        job_wipe(&f->slots[i]);
    wants_free(f, want_take(f, NULL));
    for (struct source *s = f->sources; s; s = s->next) {
        s->refs++; /* until sources_free: it is looked at once more */
        ranges_free(f, s->ranges[FOR_STREAM]);
        ranges_free(f, s->ranges[FOR_PREFETCH]);
    }
    sources_free(f);
    miss_fail_all(f, ESHUTDOWN);
    uncached_free(f);
    for (int i = 0; i < FETCH_SHARDS; i++)
        pthread_mutex_destroy(&f->shards[i].lock);
    pthread_cond_destroy(&f->some);
    pthread_cond_destroy(&f->foreign_some);
    pthread_cond_destroy(&f->upkeep_some);
    pthread_mutex_destroy(&f->lock);
    pthread_mutex_destroy(&f->foreign_lock);
    pthread_mutex_destroy(&f->upkeep_lock);
    pthread_mutex_destroy(&f->uncached_lock);
    free(f);
    e->fetcher = NULL;
}
