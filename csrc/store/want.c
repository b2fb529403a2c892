/* store/want.c -- what is wanted and not yet dispatched. Passive: what is next is chosen in store/fetch.c.
 *
 * A source is one server that fetches are made from (vnd_blob_set_source). It has a share of the fetch slots, so that a
 * server that hangs holds no more than that, and others feel nothing. What readers want of it stands in lanes, one for
 * each session; sources take turns, and within a source the lanes do. A session that has nothing under way at a source
 * finds a slot even where others hold its whole share. (Weights of sessions would stand in a lane: how many turns it gets.)
 *
 * No slot waits for another attempt. A job that failed in a way that may pass ends with a time (vnd_job_retry), and the
 * chunks that readers still have time for wait in their source's list until then. A server that fails as a whole is a time
 * of its source: nothing is asked of it before, and then one job at a time until one brings bytes. A reader's deadline is
 * its transport's: nothing here fails a reader but an error that no attempt can mend.
 *
 * Ranges that no reader waits for (prefetch, windows of streams) stand behind, with smaller shares. All under fetcher->lock.
 */
#include <errno.h>
#include <stdlib.h>

#include "store/fetcher.h"

static void unref_source(struct fetcher *f, struct source *s)
{
    pthread_mutex_lock(&f->lock);
    source_unref(f, s);
    pthread_mutex_unlock(&f->lock);
}

void want_free(struct fetcher *f, struct want *w)
{
    if (w->source)
        unref_source(f, w->source);
    if (w->meta)
        blob_unref(w->meta);
    core_unref(w->core);
    free(w);
}

void ranges_free(struct fetcher *f, struct want_range *p)
{
    while (p) {
        struct want_range *gone = p;
        p = p->next;
        unref_source(f, gone->source);
        core_unref(gone->core);
        free(gone);
    }
}

/* Takes over the want and queues a copy. What the cache is thought to hold needs no server. */
static int push(struct fetcher *f, struct want want, bool head)
{
    struct want *w = malloc(sizeof *w);
    bool cached = !want.meta && cachefile_marked(want.core->cache, want.index);
    int rc = -ENOMEM;

    if (!w)
        return rc;
    *w = want;
    core_ref(w->core);
    if (w->meta)
        blob_ref(w->meta);
    pthread_mutex_lock(&f->lock);
    w->source = source_ref(f, cached ? SOURCE_CACHE : w->asker.source);
    if (w->source && w->not_before_us) {
        source_defer(w->source, w);
        rc = 0;
    } else if (w->source && source_push(w->source, w, head)) {
        rc = 0;
    }
    pthread_cond_signal(&f->some);
    pthread_mutex_unlock(&f->lock);
    if (rc)
        want_free(f, w);
    return rc;
}

int want_push(struct blob_core *c, uint32_t index, int64_t deadline_us, struct asker asker, bool head)
{
    /* The span is the same for all, so those who come later go to the lane's end. */
    return push(c->engine->fetcher,
                (struct want){ .core = c, .index = index, .deadline_us = deadline_us, .asker = asker }, head);
}

int want_defer(struct blob_core *c, uint32_t index, int64_t deadline_us, struct asker asker, int64_t not_before_us)
{
    return push(
        c->engine->fetcher,
        (struct want){
            .core = c, .index = index, .deadline_us = deadline_us, .not_before_us = not_before_us, .asker = asker },
        true);
}

int want_push_meta(struct vnd_blob *b, int64_t not_before_us)
{
    struct fetcher *f = b->core->engine->fetcher;

    return push(f,
                (struct want){ .core = b->core,
                               .deadline_us = now_us() + (int64_t)f->engine->cfg.read_deadline_ms * 1000,
                               .not_before_us = not_before_us,
                               .asker = asker_of(b, 0),
                               .meta = b },
                true);
}

/* Takes the ranges of a core, or with c NULL of a tag, out of a list. A busy range is dropped by the thread that
 * works on it. */
static void take_ranges(struct want_range **p, const struct blob_core *c, uint64_t tag, struct want_range **out)
{
    while (*p) {
        struct want_range *r = *p;
        bool hit = c ? r->core == c : r->tag == tag;
        r->cancelled |= hit;
        if (!hit || r->busy) {
            p = &r->next;
            continue;
        }
        *p = r->next;
        r->next = *out;
        *out = r;
    }
}

/* Drops the ranges of a core that no reader waits for, or the prefetch of a tag, and cancels their jobs. */
static void drop_ranges(struct fetcher *f, const struct blob_core *c, uint64_t tag)
{
    struct want_range *gone = NULL;

    pthread_mutex_lock(&f->lock);
    for (struct source *s = f->sources; s; s = s->next) {
        take_ranges(&s->ranges[FOR_PREFETCH], c, tag, &gone);
        if (c)
            take_ranges(&s->ranges[FOR_STREAM], c, 0, &gone);
    }
    for (int i = 0; i < FETCH_SLOTS; i++) {
        struct job *j = &f->slots[i];
        if (j->id && (c ? j->whom != FOR_READER && j->core == c : j->whom == FOR_PREFETCH && j->tag == tag))
            atomic_store(&j->cancelled, true);
    }
    pthread_mutex_unlock(&f->lock);
    ranges_free(f, gone);
}

void want_drop_ranges(struct blob_core *c)
{
    drop_ranges(c->engine->fetcher, c, 0);
}

void want_move_ranges(struct blob_core *from, struct blob_core *to, struct asker asker)
{
    struct fetcher *f = from->engine->fetcher;
    uint32_t moved = 0;

    pthread_mutex_lock(&f->lock);
    for (struct source *s = f->sources; s; s = s->next)
        for (struct want_range *r = s->ranges[FOR_PREFETCH]; r; r = r->next)
            if (r->core == from && r->asker.id == asker.id && !r->busy) {
                r->core = to;
                core_ref(to);
                moved++;
            }
    pthread_mutex_unlock(&f->lock);
    while (moved--)
        core_unref(from);
}

struct want *want_take(struct fetcher *f, const struct blob_core *c)
{
    struct want *all = NULL;

    pthread_mutex_lock(&f->lock);
    for (struct source *s = f->sources; s; s = s->next) {
        struct want *of = source_take(s, c);
        while (of) {
            struct want *w = of;
            of = w->next;
            w->next = all;
            all = w;
        }
    }
    pthread_mutex_unlock(&f->lock);
    return all;
}

void wants_free(struct fetcher *f, struct want *list)
{
    while (list) {
        struct want *w = list;
        list = w->next;
        want_free(f, w);
    }
}

void want_purge(struct blob_core *c)
{
    struct fetcher *f = c->engine->fetcher;

    wants_free(f, want_take(f, c));
    want_drop_ranges(c);
}

void want_promote(struct fetcher *f, int slot, uint32_t index)
{
    struct job *j = &f->slots[slot];
    uint32_t had = atomic_load(&j->preempt_after);

    while (index + 1 > had && !atomic_compare_exchange_weak(&j->preempt_after, &had, index + 1))
        ;
}

void want_release_slot(struct fetcher *f, struct job *j)
{
    pthread_mutex_lock(&f->lock);
    slot_release(f, j);
    pthread_cond_broadcast(&f->some);
    pthread_mutex_unlock(&f->lock);
}

/* ---------------------------------------------------------------- ranges */

/* fetcher->lock is held. */
static int queue_range(struct blob_core *c, enum job_for whom, struct want_range range, bool head)
{
    struct fetcher *f = c->engine->fetcher;
    struct want_range *p = malloc(sizeof *p), **at;

    if (!p)
        return -ENOMEM;
    *p = range;
    p->core = c;
    p->source = source_ref(f, range.asker.source);
    if (!p->source) {
        free(p);
        return -ENOMEM;
    }
    core_ref(c);
    at = &p->source->ranges[whom];
    while (*at && !head)
        at = &(*at)->next;
    p->next = *at;
    *at = p;
    pthread_cond_broadcast(&f->some); /* not every thread takes prefetch */
    return 0;
}

int want_later(struct blob_core *c, enum job_for whom, struct want_range range, bool head)
{
    struct fetcher *f = c->engine->fetcher;
    int rc;

    pthread_mutex_lock(&f->lock);
    rc = queue_range(c, whom, range, head);
    pthread_mutex_unlock(&f->lock);
    return rc;
}

int want_stream(struct blob_core *c, uint32_t first, uint32_t end, struct asker asker)
{
    return queue_range(c, FOR_STREAM, (struct want_range){ .asker = asker, .at = first, .end = end }, false);
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
    for (const struct source *s = f->sources; s && !some; s = s->next)
        for (const struct want_range *p = s->ranges[FOR_PREFETCH]; p && !some; p = p->next)
            some = p->tag == tag;
    for (int i = 0; i < FETCH_SLOTS && !some; i++)
        some = f->slots[i].id && f->slots[i].whom == FOR_PREFETCH && f->slots[i].tag == tag;
    pthread_mutex_unlock(&f->lock);
    return some;
}

void want_wake(struct fetcher *f)
{
    pthread_mutex_lock(&f->lock);
    pthread_cond_broadcast(&f->some);
    pthread_mutex_unlock(&f->lock);
}
