/* store/uncached.c -- chunks that were fetched and checked but could not be written (disk full, read-only): kept in
 * memory, a bounded number of bytes, newest first, so that the readers that wait for them find them. They set no
 * bit.
 */
#include <stdlib.h>
#include <string.h>

#include "store/fetcher.h"

#define UNCACHED_BYTES (64u << 20)

struct uncached_chunk {
    struct uncached_chunk *next, *prev;
    struct blob_core *core;
    uint32_t index;
    struct store_buf *buf;
};

static void take_out(struct fetcher *f, struct uncached_chunk *u)
{
    *(u->prev ? &u->prev->next : &f->uncached) = u->next;
    *(u->next ? &u->next->prev : &f->uncached_last) = u->prev;
    f->uncached_bytes -= u->buf->len;
    atomic_fetch_sub(&u->core->uncached, 1);
    store_buf_unref(u->buf);
    free(u);
}

static struct uncached_chunk *find(struct fetcher *f, const struct blob_core *c, uint32_t index)
{
    struct uncached_chunk *u = f->uncached;

    while (u && (u->core != c || u->index != index))
        u = u->next;
    return u;
}

int uncached_put(struct blob_core *c, uint32_t index, const uint8_t *data, size_t len)
{
    struct fetcher *f = c->engine->fetcher;
    struct uncached_chunk *u = calloc(1, sizeof *u);
    struct store_buf *b = store_buf_new(len);

    if (!u || !b) {
        free(u);
        free(b);
        return -1;
    }
    memcpy(b->data, data, len);
    u->core = c;
    u->index = index;
    u->buf = b;
    pthread_mutex_lock(&f->uncached_lock);
    struct uncached_chunk *old = find(f, c, index);
    if (old)
        take_out(f, old);
    u->next = f->uncached;
    *(u->next ? &u->next->prev : &f->uncached_last) = u;
    f->uncached = u;
    f->uncached_bytes += len;
    atomic_fetch_add(&c->uncached, 1);
    while (f->uncached_bytes > UNCACHED_BYTES && f->uncached_last != u)
        take_out(f, f->uncached_last);
    pthread_mutex_unlock(&f->uncached_lock);
    return 0;
}

struct store_buf *uncached_get(struct blob_core *c, uint32_t index)
{
    struct fetcher *f = c->engine->fetcher;
    struct store_buf *b = NULL;
    struct uncached_chunk *u;

    if (!atomic_load_explicit(&c->uncached, memory_order_relaxed))
        return NULL;
    pthread_mutex_lock(&f->uncached_lock);
    u = find(f, c, index);
    if (u) {
        b = u->buf;
        atomic_fetch_add(&b->refs, 1);
    }
    pthread_mutex_unlock(&f->uncached_lock);
    return b;
}

void uncached_drop(struct blob_core *c)
{
    struct fetcher *f = c->engine->fetcher;

    pthread_mutex_lock(&f->uncached_lock);
    for (struct uncached_chunk *u = f->uncached, *next; u; u = next) {
        next = u->next;
        if (u->core == c)
            take_out(f, u);
    }
    pthread_mutex_unlock(&f->uncached_lock);
}

static bool write_after_all(struct blob_core *c, uint32_t index, const struct store_buf *b)
{
    const struct blobtable *t = atomic_load_explicit(&c->table, memory_order_acquire);
    const struct blobtable_chunk *k = &t->chunk[index];
    uint64_t epoch = cachefile_epoch(c->cache);

    if (c->stored) /* the stored form is not kept in memory: fetch it again */
        return true;
    if (k->usize != b->len || cachefile_write(c->cache, k->uoff, b->data, b->len))
        return false;
    if (cachefile_commit_begin(c->cache, epoch)) {
        cachefile_set_ready(c->cache, index);
        cachefile_commit_end(c->cache);
    }
    cachefile_note_written(c->cache, k->usize);
    return true;
}

void uncached_flush(struct blob_core *c)
{
    struct fetcher *f = c->engine->fetcher;
    bool more = true;

    while (more && atomic_load_explicit(&c->uncached, memory_order_relaxed)) {
        struct store_buf *b = NULL;
        struct uncached_chunk *u;
        uint32_t index = 0;

        pthread_mutex_lock(&f->uncached_lock);
        for (u = f->uncached; u && u->core != c; u = u->next)
            ;
        if (u) {
            index = u->index;
            b = u->buf;
            atomic_fetch_add(&b->refs, 1);
        }
        pthread_mutex_unlock(&f->uncached_lock);
        more = b && write_after_all(c, index, b);
        pthread_mutex_lock(&f->uncached_lock);
        u = more ? find(f, c, index) : NULL;
        if (u && u->buf == b)
            take_out(f, u);
        pthread_mutex_unlock(&f->uncached_lock);
        store_buf_unref(b);
    }
}

void uncached_free(struct fetcher *f)
{
    pthread_mutex_lock(&f->uncached_lock);
    while (f->uncached)
        take_out(f, f->uncached);
    pthread_mutex_unlock(&f->uncached_lock);
}
