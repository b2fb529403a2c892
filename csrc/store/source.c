/* store/source.c -- sources, their lanes, and the slots that jobs hold of them (see the head of store/want.c).
 *
 * Passive and small: everything here runs under fetcher->lock, blocks nowhere and calls nothing above it.
 */
#include <stdlib.h>

#include "store/fetcher.h"

/* ---------------------------------------------------------------- sources */

struct source *source_ref(struct fetcher *f, uint32_t number)
{
    struct source **at = &f->sources, *s;

    while (*at && (*at)->number != number)
        at = &(*at)->next;
    s = *at;
    if (!s && (s = calloc(1, sizeof *s))) {
        s->number = number;
        s->lanes_tail = &s->lanes;
        s->later_tail = &s->later;
        *at = s;
    }
    if (s)
        s->refs++;
    return s;
}

void source_unref(struct fetcher *f, struct source *s)
{
    if (--s->refs)
        return;
    for (struct source **at = &f->sources; *at; at = &(*at)->next)
        if (*at == s) {
            *at = s->next;
            break;
        }
    free(s); /* its lanes are gone: each holds a want or a job, and those hold the source */
}

void sources_free(struct fetcher *f)
{
    while (f->sources) {
        struct source *s = f->sources;
        f->sources = s->next;
        while (s->lanes) { /* of jobs that were never ended */
            struct lane *l = s->lanes;
            s->lanes = l->next;
            free(l);
        }
        free(s);
    }
}

void source_rotate(struct fetcher *f, struct source *s)
{
    struct source **at = &f->sources;

    while (*at != s)
        at = &(*at)->next;
    *at = s->next;
    while (*at)
        at = &(*at)->next;
    s->next = NULL;
    *at = s;
}

void source_pause(struct source *s, int64_t not_before_us)
{
    if (s->not_before_us < not_before_us)
        s->not_before_us = not_before_us;
    s->doubtful = true;
}

void source_answers(struct fetcher *f, struct job *j)
{
    pthread_mutex_lock(&f->lock);
    if (j->source && j->source->doubtful) {
        j->source->doubtful = false;
        j->source->trial = NULL;
        j->source->not_before_us = 0;
        pthread_cond_broadcast(&f->some);
    }
    pthread_mutex_unlock(&f->lock);
}

/* ---------------------------------------------------------------- lanes */

static struct lane *lane_of(struct source *s, uintptr_t session)
{
    struct lane *l = s->lanes;

    while (l && l->session != session)
        l = l->next;
    if (!l && (l = calloc(1, sizeof *l))) {
        l->session = session;
        *s->lanes_tail = l;
        s->lanes_tail = &l->next;
    }
    return l;
}

static void unlink_lane(struct source *s, struct lane *l)
{
    struct lane **at = &s->lanes;

    while (*at != l)
        at = &(*at)->next;
    *at = l->next;
    if (!*at)
        s->lanes_tail = at;
    l->next = NULL;
}

static void drop_empty_lane(struct source *s, struct lane *l)
{
    if (l->first || l->running)
        return;
    unlink_lane(s, l);
    free(l);
}

bool source_push(struct source *s, struct want *w, bool head)
{
    struct lane *l = lane_of(s, w->asker.session);

    if (!l)
        return false;
    if (!l->first)
        l->last = &l->first;
    if (head) {
        w->next = l->first;
        l->first = w;
        if (!w->next)
            l->last = &w->next;
    } else {
        w->next = NULL;
        *l->last = w;
        l->last = &w->next;
    }
    s->queued++;
    if (w->meta && s->lanes != l) { /* readers of all its chunks wait for it: its lane is the next */
        unlink_lane(s, l);
        l->next = s->lanes;
        s->lanes = l;
        if (!l->next)
            s->lanes_tail = &l->next;
    }
    return true;
}

struct want *source_pop(struct source *s, struct lane *l)
{
    struct want *w = l->first;

    l->first = w->next;
    if (!l->first)
        l->last = &l->first;
    w->next = NULL;
    s->queued--;
    unlink_lane(s, l);
    *s->lanes_tail = l;
    s->lanes_tail = &l->next;
    return w;
}

void source_defer(struct source *s, struct want *w)
{
    struct want **at = s->later_tail;

    /* What fails now has the latest time, as a rule: the end is looked at first. */
    if (s->later && w->not_before_us < s->later_last_us)
        for (at = &s->later; *at && (*at)->not_before_us <= w->not_before_us;)
            at = &(*at)->next;
    else
        s->later_last_us = w->not_before_us;
    w->next = *at;
    *at = w;
    if (!w->next)
        s->later_tail = &w->next;
}

void source_resume(struct source *s, int64_t now)
{
    struct want *due = NULL;

    while (s->later && s->later->not_before_us <= now) {
        struct want *w = s->later;
        s->later = w->next;
        w->next = due;
        due = w;
    }
    if (!s->later)
        s->later_tail = &s->later;
    while (due) { /* the latest first, each before the one that came before it: they keep their order */
        struct want *w = due;
        due = w->next;
        if (source_push(s, w, true))
            continue;
        w->not_before_us = now + SOURCE_NO_MEMORY_US;
        source_defer(s, w);
    }
}

static void take_wants(struct want **list, const struct blob_core *c, struct want **out)
{
    while (*list) {
        struct want *w = *list;
        if (c && w->core != c) {
            list = &w->next;
            continue;
        }
        *list = w->next;
        w->next = *out;
        *out = w;
    }
}

struct want *source_take(struct source *s, const struct blob_core *c)
{
    struct want *all = NULL;

    for (struct lane *l = s->lanes, *next; l; l = next) {
        next = l->next;
        take_wants(&l->first, c, &all);
        for (l->last = &l->first; *l->last;)
            l->last = &(*l->last)->next;
    }
    take_wants(&s->later, c, &all);
    for (s->later_tail = &s->later; *s->later_tail;)
        s->later_tail = &(*s->later_tail)->next;
    s->queued = 0;
    for (struct lane *l = s->lanes, *next; l; l = next) {
        next = l->next;
        for (const struct want *w = l->first; w; w = w->next)
            s->queued++;
        drop_empty_lane(s, l);
    }
    return all;
}

/* ---------------------------------------------------------------- slots */

/* Of a source's share, by what a job is for. Demand always finds a slot before long: prefetch and streams leave it one. */
static const uint32_t slots_for[] = { [FOR_READER] = FETCH_SOURCE_SLOTS,
                                      [FOR_PREFETCH] = FETCH_PREFETCH_SLOTS,
                                      [FOR_STREAM] = FETCH_STREAM_SLOTS };

/* What a source may hold: less where few slots are left, so that there are some for sources that hold none. */
static uint32_t share(const struct fetcher *f)
{
    uint32_t left = FETCH_SLOTS - f->running, part = left / 4;

    return !left ? 0 : !part ? 1 : part < FETCH_SOURCE_SLOTS ? part : FETCH_SOURCE_SLOTS;
}

bool source_may(const struct fetcher *f, const struct source *s, enum job_for whom, int64_t now)
{
    uint32_t most = share(f);

    if (s->not_before_us > now || (s->doubtful && s->trial) || !most)
        return false;
    if (whom == FOR_READER) /* the last ones are for sessions that hold none: lane_may */
        return s->running < most + FETCH_FIRST_SLOTS;
    return s->running + 1 < most && s->running_for[whom] < slots_for[whom];
}

struct lane *source_next_lane(const struct fetcher *f, const struct source *s)
{
    uint32_t most = share(f);

    for (struct lane *l = s->lanes; l; l = l->next)
        if (l->first && (s->running < most || !l->running))
            return l;
    return NULL;
}

struct job *slot_reserve(struct fetcher *f, struct source *s, enum job_for whom, struct lane *l)
{
    for (int i = 0; i < FETCH_SLOTS; i++) {
        struct job *j = &f->slots[i];
        if (j->id || j->reserved)
            continue;
        j->reserved = true;
        j->whom = whom;
        j->source = s;
        j->lane = l;
        s->refs++;
        f->running++;
        s->running++;
        s->running_for[whom]++;
        if (l)
            l->running++;
        if (s->doubtful)
            s->trial = j;
        return j;
    }
    return NULL; /* not while share() gives any */
}

static void leave_source(struct fetcher *f, struct job *j)
{
    struct source *s = j->source;

    s->running--;
    s->running_for[j->whom]--;
    if (j->lane) {
        j->lane->running--;
        drop_empty_lane(s, j->lane);
    }
    if (s->trial == j)
        s->trial = NULL;
    j->source = NULL;
    j->lane = NULL;
    source_unref(f, s);
}

void slot_move(struct fetcher *f, struct job *j, uint32_t number)
{
    struct source *s;

    if (j->source->number == number || !(s = source_ref(f, number)))
        return;
    struct lane *l = j->lane ? lane_of(s, j->lane->session) : NULL;
    leave_source(f, j);
    j->source = s; /* the reference that source_ref took is the job's */
    j->lane = l;
    s->running++;
    s->running_for[j->whom]++;
    if (l)
        l->running++;
}

void slot_release(struct fetcher *f, struct job *j)
{
    f->running--;
    leave_source(f, j);
    j->reserved = false;
    j->id = 0;
    j->core = NULL;
}
