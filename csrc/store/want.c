/* store/want.c -- what is wanted and not yet dispatched: the demand queue, ranges that no reader waits for, and the
 * slots of the jobs under way. store/fetch.c chooses what is next.
 */
#include <errno.h>
#include <stdlib.h>

#include "store/fetcher.h"

void want_free(struct want *w)
{
    if (w->meta)
        blob_unref(w->meta);
    core_unref(w->core);
    free(w);
}

void ranges_free(struct want_range *p)
{
    while (p) {
        struct want_range *gone = p;
        p = p->next;
        core_unref(gone->core);
        free(gone);
    }
}

/* The queue is in order of deadlines: the span is the same for all readers, so a later one goes to its end. */
static void push(struct fetcher *f, struct want *w, bool head)
{
    core_ref(w->core);
    pthread_mutex_lock(&f->lock);
    if (head) {
        w->next = f->demand;
        f->demand = w;
        if (!w->next)
            f->demand_tail = &w->next;
    } else {
        *f->demand_tail = w;
        f->demand_tail = &w->next;
    }
    pthread_cond_signal(&f->some);
    pthread_mutex_unlock(&f->lock);
}

int want_push(struct blob_core *c, uint32_t index, int64_t deadline_us, struct asker asker, bool head)
{
    struct want *w = malloc(sizeof *w);

    if (!w)
        return -ENOMEM;
    *w = (struct want){ .core = c, .index = index, .deadline_us = deadline_us, .asker = asker };
    push(c->engine->fetcher, w, head);
    return 0;
}

int want_push_meta(struct vnd_blob *b)
{
    struct fetcher *f = b->core->engine->fetcher;
    struct want *w = malloc(sizeof *w);

    if (!w)
        return -ENOMEM;
    *w = (struct want){ .core = b->core, .asker = asker_of(b), .meta = b };
    w->deadline_us = now_us() + (int64_t)f->engine->cfg.read_deadline_ms * 1000;
    blob_ref(b);
    push(f, w, true);
    return 0;
}

/* Takes the ranges of a core, or with c NULL of a tag, out of a list. A busy range is dropped by the thread that
 * works on it. */
static struct want_range *take_ranges(struct want_range **p, const struct blob_core *c, uint64_t tag)
{
    struct want_range *gone = NULL;

    while (*p) {
        struct want_range *r = *p;
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

/* Drops the ranges of a core that no reader waits for, or the prefetch of a tag, and cancels their jobs. */
static void drop_ranges(struct fetcher *f, const struct blob_core *c, uint64_t tag)
{
    struct want_range *gone, *ahead = NULL;

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

void want_drop_ranges(struct blob_core *c)
{
    drop_ranges(c->engine->fetcher, c, 0);
}

void want_move_ranges(struct blob_core *from, struct blob_core *to, struct asker asker)
{
    struct fetcher *f = from->engine->fetcher;
    uint32_t moved = 0;

    pthread_mutex_lock(&f->lock);
    for (struct want_range *r = f->prefetch; r; r = r->next)
        if (r->core == from && r->asker.id == asker.id && !r->busy) {
            r->core = to;
            core_ref(to);
            moved++;
        }
    pthread_mutex_unlock(&f->lock);
    while (moved--)
        core_unref(from);
}

/* Drops what is queued for a closed core. Its jobs see for themselves that it is closed. */
void want_purge(struct blob_core *c)
{
    struct fetcher *f = c->engine->fetcher;
    struct want *wants = NULL;

    pthread_mutex_lock(&f->lock);
    for (struct want **p = &f->demand; *p;) {
        struct want *w = *p;
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
        struct want *w = wants;
        wants = w->next;
        want_free(w);
    }
    want_drop_ranges(c);
}

void want_promote(struct fetcher *f, int slot, uint32_t index)
{
    struct job *j = &f->slots[slot];
    uint32_t had = atomic_load(&j->preempt_after);

    while (index + 1 > had && !atomic_compare_exchange_weak(&j->preempt_after, &had, index + 1))
        ;
}

/* ---------------------------------------------------------------- slots */

static const uint32_t slots_for[] = { [FOR_READER] = FETCH_SLOTS,
                                      [FOR_PREFETCH] = FETCH_PREFETCH_SLOTS,
                                      [FOR_STREAM] = FETCH_STREAM_SLOTS };

/* Prefetch and streams together leave one slot to demand, so that it is served before long. */
bool slot_free(const struct fetcher *f, enum job_for whom)
{
    return f->running < (whom == FOR_READER ? FETCH_SLOTS : FETCH_SLOTS - 1) && f->running_for[whom] < slots_for[whom];
}

int slot_reserve(struct fetcher *f, enum job_for whom)
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

void slot_release(struct fetcher *f, struct job *j)
{
    f->running--;
    f->running_for[j->whom]--;
    j->reserved = false;
    j->id = 0;
    j->core = NULL;
}

void want_release_slot(struct fetcher *f, struct job *j)
{
    pthread_mutex_lock(&f->lock);
    slot_release(f, j);
    pthread_cond_broadcast(&f->some);
    pthread_mutex_unlock(&f->lock);
}

/* ---------------------------------------------------------------- ranges */

static int queue_range(struct blob_core *c, enum job_for whom, struct want_range range, bool head)
{
    struct fetcher *f = c->engine->fetcher;
    struct want_range *p = malloc(sizeof *p), **at = whom == FOR_STREAM ? &f->ahead : &f->prefetch;

    if (!p)
        return -ENOMEM;
    *p = range;
    p->core = c;
    core_ref(c);
    while (*at && !head)
        at = &(*at)->next;
    p->next = *at;
    *at = p;
    pthread_cond_broadcast(&f->some); /* not every thread takes prefetch */
    return 0;
}

int want_later(struct blob_core *c, enum job_for whom, uint32_t first, uint32_t end, uint64_t tag, struct asker asker,
               bool head)
{
    struct fetcher *f = c->engine->fetcher;
    int rc;

    pthread_mutex_lock(&f->lock);
    rc = queue_range(c, whom, (struct want_range){ .asker = asker, .at = first, .end = end, .tag = tag }, head);
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
    for (const struct want_range *p = f->prefetch; p && !some; p = p->next)
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
