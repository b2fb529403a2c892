/* store/fetch.c -- what is to be fetched next: demand before prefetch (docs/datapath.md 5). What one job takes along is
 * store/merge.c's, jobs once dispatched are store/job.c's.
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

/* Tries to make a job of the next wanted chunk; f->lock is held on entry and exit, not between. 1: out is
 * filled. */
static int next_demand(struct fetcher *f, vnd_job *out)
{
    int slot = slot_reserve(f, FOR_READER);
    struct want *w = f->demand;
    uint64_t stream = 0;
    struct job *j;
    bool made = false;

    if (slot < 0)
        return 0;
    j = &f->slots[slot];
    f->demand = w->next;
    if (!f->demand)
        f->demand_tail = &f->demand;
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
            made = job_build(f, slot, w->core, w->index, UINT32_MAX, true, window);
            pthread_mutex_lock(&f->lock);
        } else if (state == MISS_EXPIRED) {
            /* The reader who wanted it has given up: it goes behind the chunks that readers wait for. */
            pthread_mutex_unlock(&f->lock);
            want_later(w->core, FOR_PREFETCH, w->index, w->index + 1, 0, w->asker, false);
            pthread_mutex_lock(&f->lock);
        }
    }
    if (!made) {
        slot_release(f, j);
        pthread_mutex_unlock(&f->lock);
        want_free(w);
        pthread_mutex_lock(&f->lock);
        return 0;
    }
    if (!w->meta)
        stream_fetched(w->core, stream, j->first + j->n, j->clen, w->asker);
    j->deadline_us = w->deadline_us;
    j->tag = 0;
    job_begin(j, ++f->next_id * FETCH_SLOTS + (uint64_t)slot);
    j->asker = w->asker;
    fill_out(j, out);
    free(w); /* its reference to the core is the job's now */
    return 1;
}

/* The same of a list of ranges. -1: nothing to try, 0: tried and nothing came of it. */
static int next_range(struct fetcher *f, struct want_range **list, enum job_for whom, vnd_job *out)
{
    uint32_t window_bytes = whom == FOR_PREFETCH ? FETCH_PREFETCH_BYTES : STREAM_WINDOW_MAX;
    struct want_range *p = *list, **at;
    struct job *j;
    bool made = false;
    int slot;

    /* One thread at a time works on a range; a range whose table is still being loaded waits. */
    while (p && (p->busy || !atomic_load_explicit(&p->core->table, memory_order_acquire)))
        p = p->next;
    if (!p || (slot = slot_reserve(f, whom)) < 0)
        return -1;
    j = &f->slots[slot];
    p->busy = true;
    pthread_mutex_unlock(&f->lock);
    if (p->end > p->core->info.chunk_count)
        p->end = p->core->info.chunk_count;
    for (int looked = 0; !made && p->at < p->end && looked < PREFETCH_SCAN; looked++) {
        if (!cachefile_ready(p->core->cache, p->at))
            made = job_build(f, slot, p->core, p->at, p->end, false, window_bytes);
        p->at = made ? j->first + j->n : p->at + 1;
    }
    if (made)
        core_ref(p->core);
    pthread_mutex_lock(&f->lock);
    p->busy = false;
    if (made) {
        j->deadline_us = 0;
        j->tag = p->tag;
        job_begin(j, ++f->next_id * FETCH_SLOTS + (uint64_t)slot);
        atomic_store(&j->cancelled, p->cancelled);
        j->asker = p->asker;
        fill_out(j, out);
    } else {
        slot_release(f, j);
    }
    if (p->at >= p->end || p->cancelled) {
        for (at = list; *at != p; at = &(*at)->next)
            ;
        *at = p->next;
        p->next = NULL;
        pthread_mutex_unlock(&f->lock);
        ranges_free(p);
        pthread_mutex_lock(&f->lock);
    }
    return made;
}

/* Makes the next job: 1, or as next_range. Demand goes first, then what is ahead of readers, then prefetch. */
static int next_job(struct fetcher *f, vnd_job *out, bool take_prefetch)
{
    int got = -1;

    if (f->demand && slot_free(f, FOR_READER))
        return next_demand(f, out);
    if (f->ahead && slot_free(f, FOR_STREAM))
        got = next_range(f, &f->ahead, FOR_STREAM, out);
    if (got < 0 && take_prefetch && f->prefetch && slot_free(f, FOR_PREFETCH))
        got = next_range(f, &f->prefetch, FOR_PREFETCH, out);
    return got;
}

int vnd_job_next(vnd_engine *e, vnd_job *out, int take_prefetch, int timeout_ms)
{
    struct fetcher *f = e->fetcher;
    struct timespec until;
    int rc = -ETIMEDOUT;
    bool late = false;

    until = time_after_ms(timeout_ms);
    pthread_mutex_lock(&f->lock);
    for (;;) {
        if (atomic_load(&f->down)) {
            rc = -ESHUTDOWN;
            break;
        }
        int got = next_job(f, out, take_prefetch);
        if (got > 0) {
            rc = 0;
            break;
        }
        if (got == 0)
            continue;
        if (late)
            break;
        late = pthread_cond_timedwait(&f->some, &f->lock, &until) == ETIMEDOUT;
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
    rc = want_later(c, FOR_PREFETCH, first, end, tag, asker_of(b), false);
    while (!rc && (now = b->core) != c) { /* its table was loaded meanwhile, and contradicts another image's */
        want_move_ranges(c, now, asker_of(b));
        core_ref(now);
        core_unref(c);
        c = now;
    }
    core_unref(c);
    if (!rc && !atomic_load_explicit(&b->table, memory_order_acquire))
        blob_want_load(b);
    return rc;
}
