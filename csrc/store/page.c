/* store/page.c -- reads of ready chunks that are not in the page cache: a pool thread waits for the disk, not the
 * queue's. A task's bytes go into its own buffer, never into guest memory.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "store/fetcher.h"

#define AGAIN_MAX 2 /* then the kernel drops pages faster than the reader comes back: give it the bytes */

struct page_task {
    struct pool_task task;
    struct vnd_engine *engine;
    struct store_unit unit; /* the reader is linked here; under its shard's lock */
    size_t total;
    int n;
    bool decoded;   /* some come out of a cache that holds chunks as they are stored */
    uint8_t *bytes; /* copies of extents that are bytes: the image may be closed meanwhile */
    struct extent ext[];
};

static void page_run(struct pool_task *task)
{
    struct page_task *t = (struct page_task *)task;
    struct miss_shard *s = miss_shard_of(t->engine->fetcher, t, 0);
    struct store_buf *b = store_buf_new(t->total);
    struct store_wait *list;
    int64_t rc = -ENOMEM;
    int missing, err = 0;

    if (b) {
        struct iovec iov = { b->data, t->total };
        rc = store_serve(t->ext, t->n, &iov, 1, false, &missing);
        if (rc == -EAGAIN) /* the epoch was odd throughout */
            for (int i = 0; i < t->n; i++)
                if (t->ext[i].blob)
                    cachefile_examine(t->ext[i].blob->cache);
    }
    /* The reader's next attempt finds out why there were no bytes; only an error of the disk ends it here. */
    if (rc < 0 && rc != -ENODATA && rc != -EAGAIN)
        err = (int)-rc;
    pthread_mutex_lock(&s->lock);
    if (rc >= 0 && t->unit.waiters && (t->decoded || t->unit.waiters->again >= AGAIN_MAX)) {
        t->unit.waiters->buf = b;
        b = NULL;
    }
    list = miss_detach(&t->unit, err);
    pthread_mutex_unlock(&s->lock);
    for (int i = 0; i < t->n; i++)
        if (t->ext[i].blob)
            blob_unref(t->ext[i].blob);
    store_buf_unref(b);
    free(t->bytes);
    free(t);
    miss_wake(list);
}

/* 0 or -ENOMEM. */
static int copy_bytes(struct page_task *t)
{
    size_t len = 0;

    for (int i = 0; i < t->n; i++)
        len += t->ext[i].blob || !t->ext[i].bytes ? 0 : t->ext[i].len;
    if (len == 0)
        return 0;
    t->bytes = malloc(len);
    if (!t->bytes)
        return -ENOMEM;
    len = 0;
    for (int i = 0; i < t->n; i++) {
        struct extent *x = &t->ext[i];

        if (x->blob || !x->bytes)
            continue;
        x->bytes = memcpy(t->bytes + len, x->bytes, x->len);
        len += x->len;
    }
    return 0;
}

int page_park(struct vnd_engine *e, struct store_wait *w, const struct extent *ext, int n)
{
    struct page_task *t = calloc(1, sizeof *t + (size_t)n * sizeof *ext);
    struct miss_shard *s;

    if (!t)
        return -ENOMEM;
    s = miss_shard_of(e->fetcher, t, 0);
    t->task.run = page_run;
    t->engine = e;
    t->n = n;
    memcpy(t->ext, ext, (size_t)n * sizeof *ext);
    if (copy_bytes(t)) {
        free(t);
        return -ENOMEM;
    }
    for (int i = 0; i < n; i++) {
        t->total += ext[i].len;
        if (ext[i].blob) {
            blob_ref(ext[i].blob);
            t->decoded |= ext[i].blob->cache->stored;
        }
    }
    t->unit.state = UNIT_OTHER;
    pthread_mutex_lock(&s->lock);
    w->again = (uint8_t)(w->again + (w->again < 255));
    miss_link(s, &t->unit, w);
    pthread_mutex_unlock(&s->lock);
    atomic_fetch_add_explicit(&e->shared.pool_reads, 1, memory_order_relaxed);
    pool_submit(e, &t->task, w->who);
    return 0;
}
