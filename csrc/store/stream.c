/* store/stream.c -- see stream.h. */
#include "store/fetcher.h"

#define PACE_SHARE 16 /* a window takes this many times the latency: little of the time is waiting */

uint32_t stream_window_max(const struct link_pace *p, uint32_t amplify_bytes)
{
    uint64_t rate = atomic_load_explicit(&p->bytes_per_s, memory_order_relaxed);
    uint64_t wait_us = atomic_load_explicit(&p->latency_us, memory_order_relaxed);
    uint64_t link = rate / 1000 * wait_us / 1000 * PACE_SHARE;

    if (link > STREAM_WINDOW_MAX)
        link = STREAM_WINDOW_MAX;
    return amplify_bytes > link ? amplify_bytes : (uint32_t)link;
}

static uint64_t smooth(uint64_t had, uint64_t now)
{
    return had ? (had * 3 + now) / 4 : now;
}

void stream_pace(struct link_pace *p, uint32_t latency_us, uint64_t rest_bytes, uint64_t rest_us)
{
    atomic_store_explicit(&p->latency_us, (uint32_t)smooth(atomic_load(&p->latency_us), latency_us),
                          memory_order_relaxed);
    if (rest_bytes >= AMPLIFY_MIN_BYTES && rest_us)
        atomic_store_explicit(&p->bytes_per_s, smooth(atomic_load(&p->bytes_per_s), rest_bytes * 1000000 / rest_us),
                              memory_order_relaxed);
}

void stream_init(struct blob_core *c)
{
    for (int i = 0; i < STREAMS; i++)
        atomic_init(&c->streams[i].mark, STREAM_NONE);
}

/* A window of so many bytes that begins at chunk from: returns the first chunk behind it; from itself if it holds
 * none. */
static uint32_t window_end(const struct blobtable *t, uint32_t from, uint64_t bytes)
{
    uint64_t start, end;
    uint32_t i = from;

    if (from >= t->n || !t->chunk[from].usize)
        return from;
    start = end = t->chunk[from].coff;
    for (; i < t->n && i - from < FETCH_JOB_CHUNKS && t->chunk[i].usize; i++) {
        const struct blobtable_chunk *k = &t->chunk[i];
        if (i > from && (k->coff < start || k->coff > end + FETCH_BRIDGE_BYTES || k->coff + k->csize - start > bytes))
            break;
        end = k->coff + k->csize;
    }
    return i;
}

static void set_mark(struct blob_core *c, struct stream *s, uint32_t mark)
{
    uint32_t had = atomic_load_explicit(&s->mark, memory_order_relaxed);

    if ((had == STREAM_NONE) != (mark == STREAM_NONE))
        atomic_fetch_add_explicit(&c->marks, mark == STREAM_NONE ? UINT32_MAX : 1, memory_order_relaxed);
    atomic_store_explicit(&s->mark, mark, memory_order_relaxed);
}

/* Queues the next window and notes where it starts. */
static void add_window(struct blob_core *c, struct stream *s, struct asker asker)
{
    const struct blobtable *t = atomic_load_explicit(&c->table, memory_order_acquire);
    uint64_t half = s->fetched_bytes / 2;
    uint32_t end = window_end(t, s->ahead, s->window_bytes < half ? s->window_bytes : half);

    if (end == s->ahead || want_stream(c, s->ahead, end, asker)) {
        set_mark(c, s, STREAM_NONE);
        return;
    }
    set_mark(c, s, s->ahead);
    s->ahead = end;
}

static bool established(const struct stream *s)
{
    return s->fetched_bytes >= STREAM_AHEAD_AFTER;
}

/* The window grows beyond amplify once the reader is likely to go on. */
static void grow(struct blob_core *c, struct stream *s)
{
    uint32_t max = established(s) ? stream_window_max(&c->pace, s->amplify_bytes) : s->amplify_bytes;

    s->window_bytes = s->window_bytes > max / 2 ? max : s->window_bytes * 2;
}

uint32_t stream_miss(struct blob_core *c, uint32_t index, uint32_t amplify_bytes, uint64_t *number)
{
    struct stream *s = NULL, *oldest = &c->streams[0];

    *number = 0;
    if (!amplify_bytes)
        return 0;
    if (amplify_bytes < AMPLIFY_MIN_BYTES)
        amplify_bytes = AMPLIFY_MIN_BYTES;
    if (amplify_bytes > STREAM_WINDOW_MAX)
        amplify_bytes = STREAM_WINDOW_MAX;
    for (int i = 0; i < STREAMS && !s; i++) {
        struct stream *x = &c->streams[i];
        if (x->used && index >= x->next && index <= x->ahead)
            s = x;
        if (x->used < oldest->used)
            oldest = x;
    }
    if (s) {
        s->amplify_bytes = amplify_bytes;
        grow(c, s);
    } else {
        s = oldest;
        set_mark(c, s, STREAM_NONE);
        s->next = s->ahead = index;
        s->amplify_bytes = amplify_bytes;
        s->fetched_bytes = 0;
        s->window_bytes = amplify_bytes / 4 > AMPLIFY_MIN_BYTES ? amplify_bytes / 4 : AMPLIFY_MIN_BYTES;
    }
    s->used = *number = ++c->stream_clock;
    return s->window_bytes;
}

void stream_fetched(struct blob_core *c, uint64_t number, uint32_t end, uint64_t bytes, struct asker asker)
{
    struct stream *s = NULL;

    for (int i = 0; i < STREAMS; i++)
        if (number && c->streams[i].used == number)
            s = &c->streams[i];
    if (!s)
        return;
    s->fetched_bytes += bytes;
    s->next = end;
    if (s->ahead > end)
        return; /* the window ahead is still ahead of the reader */
    s->ahead = end;
    set_mark(c, s, STREAM_NONE);
    if (established(s))
        add_window(c, s, asker);
}

void stream_reached(struct blob_core *c, uint32_t index, struct asker asker)
{
    struct fetcher *f = c->engine->fetcher;

    pthread_mutex_lock(&f->lock);
    for (int i = 0; i < STREAMS; i++) {
        struct stream *s = &c->streams[i];
        uint32_t mark = atomic_load_explicit(&s->mark, memory_order_relaxed);
        if (!s->used || mark != index)
            continue;
        const struct blobtable_chunk *k = atomic_load_explicit(&c->table, memory_order_acquire)->chunk;
        s->used = ++c->stream_clock;
        s->fetched_bytes += k[s->ahead - 1].coff + k[s->ahead - 1].csize - k[mark].coff;
        s->next = mark;
        grow(c, s);
        add_window(c, s, asker);
    }
    pthread_mutex_unlock(&f->lock);
}
