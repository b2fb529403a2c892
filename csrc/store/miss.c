/* store/miss.c -- the miss table: which chunks are wanted or being fetched, and who waits for them (docs/datapath.md
 * 3). */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "store/fetcher.h"

#define BUCKETS (sizeof((struct miss_shard *)0)->bucket / sizeof((struct miss_shard *)0)->bucket[0])

static uint64_t miss_hash(const void *key, uint32_t index)
{
    uint64_t h = ((uint64_t)(uintptr_t)key >> 4) * 0x9E3779B97F4A7C15ull + index;
    h ^= h >> 29;
    h *= 0xBF58476D1CE4E5B9ull;
    return h ^ h >> 32;
}

struct miss_shard *miss_shard_of(struct fetcher *f, const void *key, uint32_t index)
{
    return &f->shards[miss_hash(key, index) % FETCH_SHARDS];
}

static struct store_unit **unit_find(struct miss_shard *s, const struct blob_core *c, uint32_t index)
{
    struct store_unit **p = &s->bucket[miss_hash(c, index) / FETCH_SHARDS % BUCKETS];

    while (*p && ((*p)->core != c || (*p)->index != index))
        p = &(*p)->next;
    return p;
}

static struct store_unit *unit_add(struct store_unit **at, struct blob_core *c, uint32_t index, int state)
{
    struct store_unit *u = calloc(1, sizeof *u);

    if (!u)
        return NULL;
    u->core = c;
    u->index = index;
    u->state = (uint8_t)state;
    u->slot = -1;
    *at = u; /* at is the end of its bucket */
    return u;
}

/* ---------------------------------------------------------------- waiters */

void miss_link(struct miss_shard *s, struct store_unit *u, struct store_wait *w)
{
    w->shard = s;
    w->unit = u;
    w->parked_once = 1;
    w->next = u->waiters;
    if (w->next)
        w->next->prev = &w->next;
    w->prev = &u->waiters;
    u->waiters = w;
}

struct store_wait *miss_detach(struct store_unit *u, int err)
{
    struct store_wait *list = NULL, *w;

    while ((w = u->waiters)) { /* the list is reversed: the first reader is woken first */
        store_wait_unlink(w);
        if (err)
            w->err = err;
        w->next = list;
        list = w;
    }
    return list;
}

void miss_wake(struct store_wait *list)
{
    while (list) {
        struct store_wait *w = list;
        list = w->next; /* once woken it may be linked elsewhere */
        w->next = NULL;
        w->wake(w);
    }
}

/* ---------------------------------------------------------------- units */

int miss_want(struct blob_core *c, uint32_t index, struct store_wait *w, int64_t deadline_us, struct asker asker)
{
    struct fetcher *f = c->engine->fetcher;
    struct miss_shard *s = miss_shard_of(f, c, index);
    struct store_unit **at, *u;
    bool push = false;
    int rc = 0;

    pthread_mutex_lock(&s->lock);
    at = unit_find(s, c, index);
    u = *at;
    if (cachefile_ready(c->cache, index)) {
        rc = 1;
    } else if (atomic_load(&f->down) || atomic_load(&c->closed)) {
        rc = -ESHUTDOWN;
    } else if (!u && !(u = unit_add(at, c, index, UNIT_QUEUED))) {
        rc = -ENOMEM;
    } else {
        /* Not behind what another session has queued before it: it stands in this one's lane too. */
        push = u->state == UNIT_QUEUED && (!u->wanted || u->session != asker.session);
        if (!u->deadline_us || (deadline_us && deadline_us < u->deadline_us))
            u->deadline_us = deadline_us;
        if (!u->wanted)
            u->asker = asker;
        u->session = asker.session;
        u->wanted = true;
        if (u->state == UNIT_CLAIMED && u->slot >= 0)
            want_promote(f, u->slot, index);
        if (w)
            miss_link(s, u, w);
    }
    pthread_mutex_unlock(&s->lock);
    if (push && want_push(c, index, deadline_us, asker, false))
        miss_finish(c, index, ENOMEM);
    return rc;
}

enum miss_take miss_take(struct blob_core *c, uint32_t index, int slot, bool create, bool *wanted, bool *force_fetch)
{
    struct miss_shard *s = miss_shard_of(c->engine->fetcher, c, index);
    struct store_unit **at, *u;
    enum miss_take rc = MISS_TAKEN;

    pthread_mutex_lock(&s->lock);
    at = unit_find(s, c, index);
    u = *at;
    if (cachefile_ready(c->cache, index)) {
        rc = MISS_READY;
    } else if (u && u->state != UNIT_QUEUED) {
        rc = MISS_BUSY;
    } else if (!u && (!create || !(u = unit_add(at, c, index, UNIT_CLAIMED)))) {
        rc = MISS_ABSENT;
    } else {
        u->state = UNIT_CLAIMED;
        u->slot = (int16_t)slot;
        *wanted = u->wanted;
        *force_fetch = u->force_fetch;
    }
    pthread_mutex_unlock(&s->lock);
    return rc;
}

bool miss_is_overdue(struct blob_core *c, uint32_t index)
{
    struct miss_shard *s = miss_shard_of(c->engine->fetcher, c, index);
    const struct store_unit *u;
    bool overdue;

    pthread_mutex_lock(&s->lock);
    u = *unit_find(s, c, index);
    overdue = u && u->overdue;
    pthread_mutex_unlock(&s->lock);
    return overdue;
}

void miss_finish(struct blob_core *c, uint32_t index, int err)
{
    struct miss_shard *s = miss_shard_of(c->engine->fetcher, c, index);
    struct store_unit **at, *u;
    struct store_wait *list = NULL;

    pthread_mutex_lock(&s->lock);
    at = unit_find(s, c, index);
    u = *at;
    if (u) {
        *at = u->next;
        list = miss_detach(u, err);
    }
    pthread_mutex_unlock(&s->lock);
    free(u);
    miss_wake(list);
}

/* The next deadline of the readers that still have time; 0: none has. */
static int64_t deadline_left(const struct store_unit *u, int64_t now)
{
    int64_t next_us = u->deadline_us > now ? u->deadline_us : 0; /* a reader of several chunks waits for the first */

    for (const struct store_wait *w = u->waiters; w; w = w->next)
        if (w->deadline_us > now && (!next_us || w->deadline_us < next_us))
            next_us = w->deadline_us;
    if (!next_us && u->waiters) /* its transport lets it wait on */
        next_us = now + (int64_t)u->core->engine->cfg.read_deadline_ms * 1000;
    return next_us;
}

void miss_defer(struct blob_core *c, uint32_t index, int64_t not_before_us)
{
    struct miss_shard *s = miss_shard_of(c->engine->fetcher, c, index);
    struct asker asker = { 0 };
    int64_t deadline_us = 0;
    struct store_unit *u;

    pthread_mutex_lock(&s->lock);
    u = *unit_find(s, c, index);
    if (u && u->wanted)
        deadline_us = deadline_left(u, now_us());
    if (deadline_us) {
        u->state = UNIT_QUEUED;
        u->slot = -1;
        u->failed = true;
        u->deadline_us = deadline_us;
        asker = u->asker;
    }
    pthread_mutex_unlock(&s->lock);
    if (!deadline_us || want_defer(c, index, deadline_us, asker, not_before_us))
        miss_finish(c, index, deadline_us ? ENOMEM : EIO);
}

bool miss_retry(struct blob_core *c, uint32_t index, uint32_t max_tries, uint32_t flags, int err)
{
    struct miss_shard *s = miss_shard_of(c->engine->fetcher, c, index);
    struct store_unit *u;
    int64_t deadline_us = 0;
    struct asker asker = { 0 };
    bool again = false;

    pthread_mutex_lock(&s->lock);
    u = *unit_find(s, c, index);
    if (u) {
        if (flags & MISS_COUNTS && u->tries < UINT8_MAX)
            u->tries++;
        u->force_fetch |= (flags & MISS_FORCE) != 0;
        u->overdue |= (flags & MISS_OVERDUE) != 0;
        again = u->wanted && u->tries < max_tries;
        if (again) {
            u->state = UNIT_QUEUED;
            u->slot = -1;
            deadline_us = u->deadline_us;
            asker = u->asker;
        }
    }
    pthread_mutex_unlock(&s->lock);
    if (again && want_push(c, index, deadline_us, asker, true))
        again = false;
    if (!again)
        miss_finish(c, index, err);
    return again;
}

enum miss_state miss_look(struct blob_core *c, uint32_t index, int64_t now)
{
    struct miss_shard *s = miss_shard_of(c->engine->fetcher, c, index);
    enum miss_state state = MISS_GONE;
    struct store_unit **at, *u, *gone = NULL;

    pthread_mutex_lock(&s->lock);
    at = unit_find(s, c, index);
    u = *at;
    if (u && u->state == UNIT_QUEUED) {
        state = MISS_QUEUED;
        if (!u->waiters && u->deadline_us && u->deadline_us < now) {
            state = MISS_EXPIRED;
            *at = u->next;
            gone = u;
        }
    }
    pthread_mutex_unlock(&s->lock);
    free(gone);
    return state;
}

bool miss_leave(struct blob_core *c, uint32_t index)
{
    struct fetcher *f = c->engine->fetcher;
    struct miss_shard *s = miss_shard_of(f, c, index);
    struct store_unit *u;
    bool wanted = false;

    pthread_mutex_lock(&s->lock);
    u = *unit_find(s, c, index);
    if (u && u->wanted) {
        u->state = UNIT_FOREIGN;
        u->slot = -1;
        wanted = true;
    }
    pthread_mutex_unlock(&s->lock);
    if (!wanted)
        miss_finish(c, index, 0);
    return wanted;
}

/* Fails the units of one core, or of all. */
static void fail_units(struct fetcher *f, const struct blob_core *c, int err)
{
    for (int i = 0; i < FETCH_SHARDS; i++) {
        struct miss_shard *s = &f->shards[i];
        struct store_unit *gone = NULL;
        struct store_wait *list = NULL;

        pthread_mutex_lock(&s->lock);
        for (size_t b = 0; b < BUCKETS; b++) {
            struct store_unit **p = &s->bucket[b];
            while (*p) {
                struct store_unit *u = *p;
                if (c && u->core != c) {
                    p = &u->next;
                    continue;
                }
                *p = u->next;
                u->next = gone;
                gone = u;
                struct store_wait *more = miss_detach(u, err);
                while (more) {
                    struct store_wait *w = more;
                    more = w->next;
                    w->next = list;
                    list = w;
                }
            }
        }
        pthread_mutex_unlock(&s->lock);
        while (gone) {
            struct store_unit *u = gone;
            gone = u->next;
            free(u);
        }
        miss_wake(list);
    }
}

void miss_fail_core(struct blob_core *c, int err)
{
    fail_units(c->engine->fetcher, c, err);
}

void miss_fail_all(struct fetcher *f, int err)
{
    fail_units(f, NULL, err);
}
