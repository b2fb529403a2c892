/* store/fetch.c -- what is to be fetched next: demand before prefetch (datapath (e)). What one job takes along is
 * store/merge.c's, jobs once handed out are store/job.c's.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "blob/meta.h"
#include "store/fetcher.h"

#define PREFETCH_SCAN 4096 /* chunks looked at per turn */

/* ---------------------------------------------------------------- life cycle */

int fetcher_new(struct vnd_engine *e)
{
    struct fetcher *f = NULL;
    pthread_condattr_t attr;

    if (posix_memalign((void **)&f, 64, sizeof *f))
        return -ENOMEM;
    memset(f, 0, sizeof *f);
    f->engine = e;
    f->demand_tail = &f->demand;
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

static void want_free(struct fetch_want *w)
{
    if (w->meta)
        handle_put(w->meta);
    core_put(w->core);
    free(w);
}

static void ranges_free(struct prefetch *p)
{
    while (p) {
        struct prefetch *gone = p;
        p = p->next;
        core_put(gone->core);
        free(gone);
    }
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
    pthread_mutex_lock(&f->lock);
    struct fetch_want *left = f->demand;
    f->demand = NULL;
    f->demand_tail = &f->demand;
    pthread_mutex_unlock(&f->lock);
    while (left) {
        struct fetch_want *w = left;
        left = w->next;
        if (w->meta)
            handle_raw(w->meta, NULL, 0, ESHUTDOWN);
        want_free(w);
    }
}

void fetcher_free(struct vnd_engine *e)
{
    struct fetcher *f = e->fetcher;

    for (int i = 0; i < FETCH_SLOTS; i++)
        job_wipe(&f->slots[i]);
    while (f->demand) {
        struct fetch_want *w = f->demand;
        f->demand = w->next;
        want_free(w);
    }
    ranges_free(f->ahead);
    ranges_free(f->prefetch);
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

/* ---------------------------------------------------------------- queues */

int fetch_push(struct blob_core *c, uint32_t index, int64_t deadline_us, const void *hint, bool head)
{
    struct fetcher *f = c->engine->fetcher;
    struct fetch_want *w = malloc(sizeof *w);

    if (!w)
        return -ENOMEM;
    *w = (struct fetch_want){ .core = c, .index = index, .deadline_us = deadline_us, .hint = hint };
    core_get(c);
    pthread_mutex_lock(&f->lock);
    if (head) {
        w->next = f->demand;
        f->demand = w;
        if (!w->next)
            f->demand_tail = &w->next;
    } else { /* the deadline is the same span for all, so arrival order is deadline order */
        *f->demand_tail = w;
        f->demand_tail = &w->next;
    }
    pthread_cond_signal(&f->some);
    pthread_mutex_unlock(&f->lock);
    return 0;
}

/* Asks for a blob's stored chunk table, before everything else: readers of every chunk wait for it. */
int fetch_push_meta(struct vnd_blob *b)
{
    struct fetcher *f = b->core->engine->fetcher;
    struct fetch_want *w = malloc(sizeof *w);

    if (!w)
        return -ENOMEM;
    *w = (struct fetch_want){ .core = b->core, .hint = b, .meta = b };
    w->deadline_us = now_us() + (int64_t)f->engine->cfg.read_deadline_ms * 1000;
    core_get(b->core);
    handle_get(b);
    pthread_mutex_lock(&f->lock);
    w->next = f->demand;
    f->demand = w;
    if (!w->next)
        f->demand_tail = &w->next;
    pthread_cond_signal(&f->some);
    pthread_mutex_unlock(&f->lock);
    return 0;
}

/* Takes the ranges of a core out of a list, or with c NULL of a tag. A busy one is dropped by the thread that works on
 * it. */
static struct prefetch *take_ranges(struct prefetch **p, const struct blob_core *c, uint64_t tag)
{
    struct prefetch *gone = NULL;

    while (*p) {
        struct prefetch *r = *p;
        bool hit = c ? r->core == c : r->tag == tag;
        r->cancelled |= hit;
        if (!hit || r->busy) {
            p = &r->next;
            continue;
        }
        *p = r->next;
        r->next = gone;
        gone = r;
    }
    return gone;
}

/* Drops what nobody waits for of a core, or the prefetch of a tag; tells the jobs under way. */
static void drop_ranges(struct fetcher *f, const struct blob_core *c, uint64_t tag)
{
    struct prefetch *gone, *ahead = NULL;

    pthread_mutex_lock(&f->lock);
    gone = take_ranges(&f->prefetch, c, tag);
    if (c)
        ahead = take_ranges(&f->ahead, c, 0);
    for (int i = 0; i < FETCH_SLOTS; i++) {
        struct job *j = &f->slots[i];
        if (j->id && (c ? j->whom != FOR_READER && j->core == c : j->whom == FOR_PREFETCH && j->tag == tag))
            atomic_store(&j->cancelled, true);
    }
    pthread_mutex_unlock(&f->lock);
    ranges_free(gone);
    ranges_free(ahead);
}

void fetch_drop_prefetch(struct blob_core *c)
{
    drop_ranges(c->engine->fetcher, c, 0);
}

/* Drops what is queued for a closed core. Its jobs see for themselves that it is closed. */
void fetch_purge(struct blob_core *c)
{
    struct fetcher *f = c->engine->fetcher;
    struct fetch_want *wants = NULL;

    pthread_mutex_lock(&f->lock);
    for (struct fetch_want **p = &f->demand; *p;) {
        struct fetch_want *w = *p;
        if (w->core != c) {
            p = &w->next;
            continue;
        }
        *p = w->next;
        w->next = wants;
        wants = w;
    }
    f->demand_tail = &f->demand;
    while (*f->demand_tail)
        f->demand_tail = &(*f->demand_tail)->next;
    pthread_mutex_unlock(&f->lock);
    while (wants) {
        struct fetch_want *w = wants;
        wants = w->next;
        want_free(w);
    }
    fetch_drop_prefetch(c);
}

void fetch_promote(struct fetcher *f, int slot, uint32_t index)
{
    struct job *j = &f->slots[slot];
    uint32_t had = atomic_load(&j->shed_after);

    while (index + 1 > had && !atomic_compare_exchange_weak(&j->shed_after, &had, index + 1))
        ;
}

/* ---------------------------------------------------------------- handing out */

static const uint32_t slots_for[] = { [FOR_READER] = FETCH_SLOTS,
                                      [FOR_PREFETCH] = FETCH_PREFETCH_SLOTS,
                                      [FOR_STREAM] = FETCH_STREAM_SLOTS };

/* Demand always finds a slot before long: prefetch and streams leave it one between them. */
static bool slot_free(const struct fetcher *f, enum job_for whom)
{
    return f->running < (whom == FOR_READER ? FETCH_SLOTS : FETCH_SLOTS - 1) && f->running_for[whom] < slots_for[whom];
}

static int slot_reserve(struct fetcher *f, enum job_for whom)
{
    if (!slot_free(f, whom))
        return -1;
    for (int i = 0; i < FETCH_SLOTS; i++) {
        struct job *j = &f->slots[i];
        if (!j->id && !j->reserved) {
            j->reserved = true;
            j->whom = whom;
            f->running++;
            f->running_for[whom]++;
            return i;
        }
    }
    return -1;
}

static void slot_release(struct fetcher *f, struct job *j)
{
    f->running--;
    f->running_for[j->whom]--;
    j->reserved = false;
    j->id = 0;
    j->core = NULL;
}

void fetch_release_slot(struct fetcher *f, struct job *j)
{
    pthread_mutex_lock(&f->lock);
    slot_release(f, j);
    pthread_cond_broadcast(&f->some);
    pthread_mutex_unlock(&f->lock);
}

void vnd_blob_set_amplify(vnd_blob *b, uint32_t bytes)
{
    atomic_store_explicit(&b->amplify_bytes, bytes, memory_order_relaxed);
}

/* How far the image of the handle that asked wants a miss extended. */
static uint32_t amplify_of(struct blob_core *c, const void *hint)
{
    uint32_t bytes = AMPLIFY_DEFAULT_BYTES;

    pthread_mutex_lock(&c->lock);
    for (const struct vnd_blob *b = c->handles; b; b = b->next)
        if (b == hint)
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
    out->blob = c->handles;
    for (struct vnd_blob *b = c->handles; b; b = b->next)
        if (b == j->hint)
            out->blob = b;
    pthread_mutex_unlock(&c->lock);
}

/* Tries to make a job of the next wanted chunk; f->lock is held on entry and exit, not between. 1: out is
 * filled. */
static int next_demand(struct fetcher *f, vnd_job *out)
{
    int slot = slot_reserve(f, FOR_READER);
    struct fetch_want *w = f->demand;
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
        uint32_t amplify = amplify_of(w->core, w->hint);
        enum miss_state state = miss_look(w->core, w->index, now_us());
        pthread_mutex_lock(&f->lock);
        if (state == MISS_QUEUED) {
            uint32_t window = stream_miss(w->core, w->index, amplify, &stream);
            pthread_mutex_unlock(&f->lock);
            made = job_build(f, slot, w->core, w->index, UINT32_MAX, true, window);
            pthread_mutex_lock(&f->lock);
        } else if (state == MISS_EXPIRED) {
            /* Whoever wanted it has given up: not in the way of those who have not. */
            pthread_mutex_unlock(&f->lock);
            fetch_later(w->core, FOR_PREFETCH, w->index, w->index + 1, 0, w->hint, false);
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
        stream_fetched(w->core, stream, j->first + j->n, j->clen, w->hint);
    j->deadline_us = w->deadline_us;
    j->tag = 0;
    job_begin(j, ++f->next_id * FETCH_SLOTS + (uint64_t)slot);
    j->hint = w->hint;
    fill_out(j, out);
    free(w); /* its reference to the core is the job's now */
    return 1;
}

/* The same of a list of ranges. -1: nothing to try, 0: tried and nothing came of it. */
static int next_range(struct fetcher *f, struct prefetch **list, enum job_for whom, vnd_job *out)
{
    uint32_t window_bytes = whom == FOR_PREFETCH ? FETCH_PREFETCH_BYTES : STREAM_WINDOW_MAX;
    struct prefetch *p = *list, **at;
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
        core_get(p->core);
    pthread_mutex_lock(&f->lock);
    p->busy = false;
    if (made) {
        j->deadline_us = 0;
        j->tag = p->tag;
        job_begin(j, ++f->next_id * FETCH_SLOTS + (uint64_t)slot);
        atomic_store(&j->cancelled, p->cancelled);
        j->hint = p->hint;
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

/* What is next for anybody: 1, or as next_range. Demand goes before what is ahead of readers, that before prefetch. */
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

/* ---------------------------------------------------------------- prefetch */

static int queue_range(struct blob_core *c, enum job_for whom, struct prefetch range, bool head)
{
    struct fetcher *f = c->engine->fetcher;
    struct prefetch *p = malloc(sizeof *p), **at = whom == FOR_STREAM ? &f->ahead : &f->prefetch;

    if (!p)
        return -ENOMEM;
    *p = range;
    p->core = c;
    core_get(c);
    while (*at && !head)
        at = &(*at)->next;
    p->next = *at;
    *at = p;
    pthread_cond_broadcast(&f->some); /* not every thread takes prefetch */
    return 0;
}

int fetch_later(struct blob_core *c, enum job_for whom, uint32_t first, uint32_t end, uint64_t tag, const void *hint,
                bool head)
{
    struct fetcher *f = c->engine->fetcher;
    int rc;

    pthread_mutex_lock(&f->lock);
    rc = queue_range(c, whom, (struct prefetch){ .hint = hint, .at = first, .end = end, .tag = tag }, head);
    pthread_mutex_unlock(&f->lock);
    return rc;
}

int fetch_stream(struct blob_core *c, uint32_t first, uint32_t end, const void *hint)
{
    return queue_range(c, FOR_STREAM, (struct prefetch){ .hint = hint, .at = first, .end = end }, false);
}

int vnd_prefetch(vnd_blob *b, uint32_t first, uint32_t n, uint64_t tag)
{
    int rc =
        fetch_later(b->core, FOR_PREFETCH, first, n && n < UINT32_MAX - first ? first + n : UINT32_MAX, tag, b, false);

    if (!rc && !atomic_load_explicit(&b->table, memory_order_acquire))
        handle_want_load(b);
    return rc;
}

void vnd_prefetch_cancel(vnd_engine *e, uint64_t tag)
{
    drop_ranges(e->fetcher, NULL, tag);
}

int vnd_prefetch_pending(vnd_engine *e, uint64_t tag)
{
    struct fetcher *f = e->fetcher;
    bool some = false;

    pthread_mutex_lock(&f->lock);
    for (const struct prefetch *p = f->prefetch; p && !some; p = p->next)
        some = p->tag == tag;
    for (int i = 0; i < FETCH_SLOTS && !some; i++)
        some = f->slots[i].id && f->slots[i].whom == FOR_PREFETCH && f->slots[i].tag == tag;
    pthread_mutex_unlock(&f->lock);
    return some;
}

void fetch_wake(struct fetcher *f)
{
    pthread_mutex_lock(&f->lock);
    pthread_cond_broadcast(&f->some);
    pthread_mutex_unlock(&f->lock);
}
