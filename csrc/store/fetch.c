/* store/fetch.c -- what is to be fetched next: sources and sessions in turn, demand before prefetch (store/want.c,
 * docs/datapath.md 5). What one job takes along is store/merge.c's, jobs once dispatched are store/job.c's.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "blob/meta.h"
#include "store/fetcher.h"

#define PREFETCH_SCAN 4096 /* chunks looked at per turn */

/* How far the image of the handle that asked wants a miss extended. */
static uint32_t amplify_of(struct blob_core *c, struct asker asker)
{
    uint32_t bytes = AMPLIFY_DEFAULT_BYTES;

    pthread_mutex_lock(&c->lock);
    for (const struct vnd_blob *b = c->blobs; b; b = b->next)
        if (asker_is(asker, b))
            bytes = atomic_load_explicit(&b->amplify_bytes, memory_order_relaxed);
    pthread_mutex_unlock(&c->lock);
    return bytes;
}

static void fill_out(struct job *j, vnd_job *out)
{
    struct blob_core *c = j->core;

    memset(out, 0, sizeof *out);
    out->id = j->id;
    out->coff = j->coff;
    out->clen = j->clen;
    out->kind = j->kind;
    for (uint32_t i = 0; i < j->n; i++)
        out->chunk_count += j->state[i] == JOB_WANT;
    out->prefetch = j->whom == FOR_PREFETCH;
    out->digester = c->info.digester;
    out->deadline_us = j->deadline_us;
    /* The chunk table of a layer that is used as it is lies in a blob of its own. */
    memcpy(out->blob_id, j->kind == VND_JOB_META && j->meta->info.meta_id[0] ? j->meta->info.meta_id : c->info.id,
           sizeof out->blob_id);
    pthread_mutex_lock(&c->lock);
    out->blob = c->blobs;
    for (struct vnd_blob *b = c->blobs; b; b = b->next)
        if (asker_is(j->asker, b))
            out->blob = b;
    pthread_mutex_unlock(&c->lock);
}

/* Numbers a job that was built and tells of it. fetcher->lock is held. */
static void start_job(struct fetcher *f, struct job *j, struct asker asker, vnd_job *out)
{
    slot_move(f, j, j->kind == VND_JOB_VERIFY ? SOURCE_CACHE : asker.source);
    job_begin(j, ++f->next_id * FETCH_SLOTS + (uint64_t)(j - f->slots));
    j->asker = asker;
    fill_out(j, out);
}

/* Tries to make a job of the next want of a lane; f->lock is held on entry and exit, not between. 1: out is
 * filled. */
static int next_demand(struct fetcher *f, struct source *s, struct lane *l, vnd_job *out)
{
    struct want *w = source_pop(s, l);
    struct job *j = slot_reserve(f, s, FOR_READER, l);
    int slot = (int)(j - f->slots);
    uint64_t stream = 0;
    bool made = false;

    source_rotate(f, s);
    if (w->meta) {
        j->core = w->core;
        j->meta = w->meta;
        j->kind = VND_JOB_META;
        j->first = j->n = 0;
        j->claimed = false;
        j->coff = w->meta->info.ci_offset;
        j->clen = w->meta->info.ci_csize_bytes + BLOBMETA_HEADER;
        made = true;
    } else {
        pthread_mutex_unlock(&f->lock);
        uint32_t amplify = amplify_of(w->core, w->asker);
        enum miss_state state = miss_look(w->core, w->index, now_us());
        pthread_mutex_lock(&f->lock);
        if (state == MISS_QUEUED) {
            uint32_t window = stream_miss(w->core, w->index, amplify, &stream);
            pthread_mutex_unlock(&f->lock);
            made = job_build(f, slot, &(struct job_plan){ w->core, w->index, UINT32_MAX, true, window });
            pthread_mutex_lock(&f->lock);
        } else if (state == MISS_EXPIRED) {
            /* The reader who wanted it has given up: it goes behind the chunks that readers wait for. */
            pthread_mutex_unlock(&f->lock);
            want_later(w->core, FOR_PREFETCH,
                       (struct want_range){ .asker = w->asker, .at = w->index, .end = w->index + 1 }, false);
            pthread_mutex_lock(&f->lock);
        }
    }
    if (!made) {
        slot_release(f, j);
        pthread_mutex_unlock(&f->lock);
        want_free(f, w);
        pthread_mutex_lock(&f->lock);
        return 0;
    }
    if (!w->meta)
        stream_fetched(w->core, stream, j->first + j->n, j->clen, w->asker);
    j->deadline_us = w->deadline_us;
    j->tag = 0;
    start_job(f, j, w->asker, out);
    source_unref(f, w->source);
    free(w); /* its other references are the job's now */
    return 1;
}

/* The first range that can be worked on now. One thread at a time works on a range; a range whose table is still being
 * loaded waits. *next_us: gets no later than when one can be that failed. */
static struct want_range *find_range(struct want_range *p, int64_t now, int64_t *next_us)
{
    for (; p; p = p->next) {
        if (p->busy || !atomic_load_explicit(&p->core->table, memory_order_acquire))
            continue;
        if (p->not_before_us <= now)
            return p;
        if (p->not_before_us < *next_us)
            *next_us = p->not_before_us;
    }
    return NULL;
}

/* Tries to make a job of a range; locks and result as next_demand. */
static int next_range(struct fetcher *f, struct source *s, enum job_for whom, struct want_range *p, vnd_job *out)
{
    uint32_t window_bytes = whom == FOR_PREFETCH ? FETCH_PREFETCH_BYTES : STREAM_WINDOW_MAX;
    struct job *j = slot_reserve(f, s, whom, NULL);
    int slot = (int)(j - f->slots);
    struct want_range **at;
    bool made = false;

    source_rotate(f, s);
    p->busy = true;
    pthread_mutex_unlock(&f->lock);
    if (p->end > p->core->info.chunk_count)
        p->end = p->core->info.chunk_count;
    for (int looked = 0; !made && p->at < p->end && looked < PREFETCH_SCAN; looked++) {
        if (!cachefile_ready(p->core->cache, p->at))
            made = job_build(f, slot, &(struct job_plan){ p->core, p->at, p->end, false, window_bytes });
        p->at = made ? j->first + j->n : p->at + 1;
    }
    if (made)
        core_ref(p->core);
    pthread_mutex_lock(&f->lock);
    p->busy = false;
    if (made) {
        j->deadline_us = 0;
        j->tag = p->tag;
        start_job(f, j, p->asker, out);
        atomic_store(&j->cancelled, p->cancelled);
    } else {
        slot_release(f, j);
    }
    if (p->at >= p->end || p->cancelled) {
        for (at = &s->ranges[whom]; *at != p; at = &(*at)->next)
            ;
        *at = p->next;
        p->next = NULL;
        pthread_mutex_unlock(&f->lock);
        ranges_free(f, p);
        pthread_mutex_lock(&f->lock);
    }
    return made;
}

/* Makes the next job: 1, or as next_range; *next_us gets no later than when there may be one if nothing else changes. Demand
 * goes first, then what is ahead of readers, then prefetch. */
static int next_job(struct fetcher *f, vnd_job *out, bool take_prefetch, int64_t *next_us)
{
    static const enum job_for ranges[] = { FOR_STREAM, FOR_PREFETCH };
    int64_t now = now_us();
    struct want_range *p;
    struct lane *l;

    for (struct source *s = f->sources; s; s = s->next) {
        source_resume(s, now);
        if (s->not_before_us > now && s->not_before_us < *next_us)
            *next_us = s->not_before_us;
        else if (s->later && s->later->not_before_us < *next_us)
            *next_us = s->later->not_before_us;
        if (s->queued && source_may(f, s, FOR_READER, now) && (l = source_next_lane(f, s)))
            return next_demand(f, s, l, out);
    }
    for (int i = 0; i < (take_prefetch ? 2 : 1); i++)
        for (struct source *s = f->sources; s; s = s->next)
            if (s->ranges[ranges[i]] && source_may(f, s, ranges[i], now) &&
                (p = find_range(s->ranges[ranges[i]], now, next_us)))
                return next_range(f, s, ranges[i], p, out);
    return -1;
}

int vnd_job_next(vnd_engine *e, vnd_job *out, int take_prefetch, int timeout_ms)
{
    struct fetcher *f = e->fetcher;
    int64_t until_us = now_us() + (int64_t)timeout_ms * 1000;
    int rc = -ETIMEDOUT;
    bool late = false;

    pthread_mutex_lock(&f->lock);
    for (;;) {
        int64_t next_us = until_us;
        if (atomic_load(&f->down)) {
            rc = -ESHUTDOWN;
            break;
        }
        int got = next_job(f, out, take_prefetch, &next_us);
        if (got > 0) {
            rc = 0;
            break;
        }
        if (got == 0)
            continue;
        if (late)
            break;
        struct timespec until = time_at_us(next_us);
        late = pthread_cond_timedwait(&f->some, &f->lock, &until) == ETIMEDOUT && next_us == until_us;
    }
    pthread_mutex_unlock(&f->lock);
    if (!rc)
        atomic_fetch_add_explicit(&e->shared.fetch_jobs, 1, memory_order_relaxed);
    return rc;
}

int vnd_prefetch(vnd_blob *b, uint32_t first, uint32_t n, uint64_t tag)
{
    uint32_t end = n && n < UINT32_MAX - first ? first + n : UINT32_MAX;
    struct blob_core *c = b->core, *now;
    int rc;

    core_ref(c);
    rc = want_later(c, FOR_PREFETCH,
                    (struct want_range){ .asker = asker_of(b, 0), .at = first, .end = end, .tag = tag }, false);
    while (!rc && (now = b->core) != c) { /* its table was loaded meanwhile, and contradicts another image's */
        want_move_ranges(c, now, asker_of(b, 0));
        core_ref(now);
        core_unref(c);
        c = now;
    }
    core_unref(c);
    if (!rc && !atomic_load_explicit(&b->table, memory_order_acquire))
        blob_want_load(b);
    return rc;
}
