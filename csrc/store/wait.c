/* store/wait.c -- see store/wait.h. */
#include "store/wait.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "store/internal.h"

struct store_buf *store_buf_new(size_t len)
{
    struct store_buf *b = malloc(sizeof *b + len);

    if (b) {
        atomic_init(&b->refs, 1);
        b->len = len;
    }
    return b;
}

void store_buf_unref(struct store_buf *b)
{
    if (b && atomic_fetch_sub(&b->refs, 1) == 1)
        free(b);
}

void store_wait_init(struct store_wait *w, void (*wake)(struct store_wait *), void *owner)
{
    memset(w, 0, sizeof *w);
    w->wake = wake;
    w->owner = owner;
}

void store_wait_unlink(struct store_wait *w)
{
    *w->prev = w->next;
    if (w->next)
        w->next->prev = w->prev;
    w->next = NULL;
    w->prev = NULL;
    w->unit = NULL;
}

static void drop_buf(struct store_wait *w)
{
    store_buf_unref(w->buf);
    w->buf = NULL;
}

/* last: gets why the last attempt failed, if there was one. */
static bool cancel(struct store_wait *w, struct failure *last)
{
    struct miss_shard *s = w->shard;
    bool linked = false;

    if (s) {
        pthread_mutex_lock(&s->lock);
        linked = w->unit != NULL;
        if (linked && last && w->unit->failed) {
            struct blob_core *c = w->unit->core;
            pthread_mutex_lock(&c->lock);
            *last = c->last_failure;
            pthread_mutex_unlock(&c->lock);
        }
        if (linked)
            store_wait_unlink(w);
        pthread_mutex_unlock(&s->lock);
    }
    if (linked || !s)
        drop_buf(w); /* the answer stays: the thread that makes it may be at work */
    return linked;
}

bool store_wait_cancel(struct store_wait *w)
{
    return cancel(w, NULL);
}

bool store_wait_expire(struct store_wait *w, struct vnd_engine *e, const char *who, int64_t deadline_ms)
{
    struct failure last = { .cause = VND_CAUSE_DEADLINE };

    if (!cancel(w, &last))
        return false;
    engine_say(e, VND_LEVEL_ERROR, last.cause, "%s answered with EIO: its data did not come within %lld ms%s%s", who,
               (long long)deadline_ms, *last.line ? "; the last attempt: " : "", last.line);
    return true;
}

void store_wait_done(struct store_wait *w)
{
    struct store_answer *a = w->answer;

    drop_buf(w);
    w->answer = NULL;
    if (a)
        a->drop(a);
}
