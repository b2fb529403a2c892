/* store/merge.c -- which chunks one job takes: from the wanted one over its neighbours, claimed against other processes
 * (docs/datapath.md 3, 5).
 */
#include <errno.h>
#include <string.h>

#include "store/fetcher.h"

#define BRIDGE_SHARE 12 /* percent of a job's bytes that may be fetched for no chunk, to join two ranges */
#define VERIFY_BYTES (1u << 20)
#define WANTED_BYTES (1u << 20) /* wanted chunks are merged up to this, even beyond the window */

struct merge {
    struct fetcher *f;
    struct job *j;
    int slot;
    struct blobtable *t;
    struct cachefile *cache;
    bool overdue;        /* fetched without a claim, and nothing with it */
    bool verify, wanted; /* wanted: a reader waits for the first chunk */
    uint32_t window_bytes;
    uint32_t limit;        /* chunks from here on are not taken */
    uint32_t batch;        /* of the last taken chunk */
    uint64_t end, bridged; /* end of the last taken chunk; bytes of the range that are not needed */
};

static uint64_t chunk_end(const struct blobtable_chunk *k)
{
    return k->coff + k->csize;
}

/* Whether chunk i, not ready, may be joined to a job that reaches to b->end. */
static bool may_join(const struct merge *b, uint32_t i, bool *speculative)
{
    const struct blobtable_chunk *k = &b->t->chunk[i], *head = &b->t->chunk[b->j->first];
    uint64_t bytes, gap;

    *speculative = true;
    if (b->verify) {
        bytes = k->uoff + k->usize - head->uoff;
        return k->uoff > head->uoff && bytes <= VERIFY_BYTES && cachefile_marked(b->cache, i);
    }
    if (cachefile_marked(b->cache, i))
        return false;
    if (k->batch && k->batch == b->batch) { /* comes with what is fetched already */
        *speculative = true;
        return true;
    }
    if (k->coff < b->end)
        return false;
    bytes = chunk_end(k) - head->coff;
    gap = k->coff - b->end;
    if (gap > FETCH_BRIDGE_BYTES || (b->bridged + gap) * 100 > bytes * BRIDGE_SHARE)
        return false;
    *speculative = bytes <= b->window_bytes;
    return *speculative || (b->wanted && bytes <= WANTED_BYTES);
}

/* Takes the neighbours after the first chunk. */
static void merge_forward(struct merge *b)
{
    struct job *j = b->j;
    uint32_t last = j->n ? j->n - 1 : 0;

    for (uint32_t rel = last + 1; rel < FETCH_JOB_CHUNKS && j->first + rel < b->limit; rel++) {
        uint32_t i = j->first + rel;
        const struct blobtable_chunk *k = &b->t->chunk[i];
        bool speculative, wanted = false, force = false;

        j->state[rel] = JOB_SKIP;
        if (!k->usize)
            continue;
        if (cachefile_ready(b->cache, i)) { /* bridged, if something follows that is worth it */
            if (!b->verify && k->coff > b->end + FETCH_BRIDGE_BYTES)
                break;
            continue;
        }
        if (!may_join(b, i, &speculative))
            break;
        enum miss_take got = miss_take(j->core, i, b->slot, speculative, &wanted, &force);
        if (got == MISS_READY) {
            miss_finish(j->core, i, 0);
            continue;
        }
        if (got != MISS_TAKEN)
            break;
        if (b->verify && force) { /* its bytes in the file are known to be wrong */
            miss_retry(j->core, i, MISS_ANY_TRIES, MISS_FORCE, EIO);
            break;
        }
        j->state[rel] = JOB_WANT;
        b->bridged += b->verify || k->coff < b->end ? 0 : k->coff - b->end;
        b->end = chunk_end(k);
        b->batch = k->batch;
        last = rel;
    }
    j->n = last + 1;
}

/* Takes the members of the first chunk's batch that come before it: they are decoded together. */
static void merge_backward(struct merge *b)
{
    struct job *j = b->j;
    uint32_t index = j->first, first = index;
    bool wanted, force;

    while (first > 0 && index - first < FETCH_JOB_CHUNKS / 2 && b->t->chunk[first - 1].batch == b->batch)
        first--;
    for (uint32_t i = first; i < index; i++) {
        enum miss_take got = MISS_BUSY;
        if (b->t->chunk[i].usize)
            got = miss_take(j->core, i, b->slot, true, &wanted, &force);
        if (got == MISS_READY)
            miss_finish(j->core, i, 0);
        j->state[i - first] = got == MISS_TAKEN ? JOB_WANT : JOB_SKIP;
    }
    j->state[index - first] = JOB_WANT;
    j->first = first;
    j->n = index - first + 1;
}

/* A reader who reads backwards: the chunk behind the wanted one is ready, those before it are not. Takes a small
 * window of them: small, because the wanted chunk then arrives last. */
static void reach_back(struct merge *b)
{
    struct job *j = b->j;
    uint32_t index = j->first, first = index;
    uint32_t reach = b->window_bytes < FETCH_BACK_BYTES ? b->window_bytes : FETCH_BACK_BYTES;
    const struct blobtable_chunk *k = &b->t->chunk[index];
    bool wanted, force;

    if (index + 1 < b->t->n && b->t->chunk[index + 1].usize && !cachefile_ready(b->cache, index + 1))
        return;
    while (first > 0 && index - first < FETCH_JOB_CHUNKS / 2) {
        const struct blobtable_chunk *before = &b->t->chunk[first - 1];
        if (!before->usize || before->batch || chunk_end(before) != b->t->chunk[first].coff ||
            chunk_end(k) - before->coff > reach || cachefile_ready(b->cache, first - 1) ||
            cachefile_marked(b->cache, first - 1))
            break;
        if (miss_take(j->core, first - 1, b->slot, true, &wanted, &force) != MISS_TAKEN)
            break;
        first--;
    }
    memset(j->state, JOB_WANT, index - first + 1);
    j->first = first;
    j->n = index - first + 1;
}

/* Claims the units against other processes. Drops from the job the chunks that those hold or have made ready. */
static void claim_job(struct merge *b)
{
    struct job *j = b->j;

    j->claimed = false;
    /* Verifying needs no claim: it does no harm if two processes do it, and it must not wait for a stuck fetch. */
    if (b->cache->side_fd >= 0 && !b->verify && !b->overdue) {
        int got = claim_units(b->cache->side_fd, j->first, j->n);
        if (got >= 0 && (uint32_t)got < j->n) {
            for (uint32_t rel = (uint32_t)got; rel < j->n; rel++)
                if (j->state[rel] == JOB_WANT && miss_leave(j->core, j->first + rel))
                    foreign_add(b->f, j->core, j->first + rel);
            j->n = (uint32_t)got;
        }
        j->claimed = got > 0;
        j->claim_first = j->first;
        j->claim_n = j->n;
    }
    for (uint32_t rel = 0; rel < j->n; rel++)
        if (j->state[rel] == JOB_WANT && cachefile_ready(b->cache, j->first + rel)) {
            j->state[rel] = JOB_SKIP;
            miss_finish(j->core, j->first + rel, 0);
        }
    while (j->n && j->state[j->n - 1] == JOB_SKIP)
        j->n--;
    uint32_t skip = 0;
    while (skip < j->n && j->state[skip] == JOB_SKIP)
        skip++;
    j->first += skip;
    j->n -= skip;
    memmove(j->state, j->state + skip, j->n);
    if (!j->n && j->claimed) {
        claim_release(b->cache->side_fd, j->claim_first, j->claim_n);
        j->claimed = false;
    }
}

bool job_build(struct fetcher *f, int slot, const struct job_plan *plan)
{
    struct job *j = &f->slots[slot];
    struct blob_core *c = plan->core;
    uint32_t index = plan->index;
    bool waited = plan->waited;
    struct merge b = { .f = f,
                       .j = j,
                       .slot = slot,
                       .cache = c->cache,
                       .wanted = waited,
                       .window_bytes = plan->window_bytes,
                       .t = atomic_load_explicit(&c->table, memory_order_acquire) };
    bool wanted = false, force = false;
    enum miss_take got;

    j->core = c;
    j->first = index;
    j->n = 0;
    if (atomic_load(&c->closed) || !b.t || index >= b.t->n || !b.t->chunk[index].usize)
        return false;
    atomic_store(&j->preempt_after, 0);
    got = miss_take(c, index, slot, !waited, &wanted, &force);
    if (got == MISS_READY)
        miss_finish(c, index, 0);
    if (got != MISS_TAKEN)
        return false;
    b.limit = plan->end < b.t->n ? plan->end : b.t->n;
    b.overdue = waited && miss_is_overdue(c, index);
    /* Waits for the end of an exchange of the files: the old chunk map says nothing about the new file. */
    pthread_mutex_lock(&b.cache->lock);
    pthread_mutex_unlock(&b.cache->lock);
    j->mark_moves = atomic_load_explicit(&b.cache->moves, memory_order_acquire);
    b.verify = !force && cachefile_marked(b.cache, index);
    /* Another process sets trusted, then marked: a chunk seen untrusted and then marked may be trusted by now. */
    if (b.verify && cachefile_ready(b.cache, index)) {
        miss_finish(c, index, 0);
        return false;
    }
    b.end = chunk_end(&b.t->chunk[index]);
    b.batch = b.t->chunk[index].batch;
    j->state[0] = JOB_WANT;
    if (b.overdue && !b.batch)
        b.limit = index + 1;
    if (b.batch && !b.verify)
        merge_backward(&b);
    else if (!b.verify && waited && !b.overdue)
        reach_back(&b);
    merge_forward(&b);
    claim_job(&b);
    if (!j->n)
        return false;
    const struct blobtable_chunk *head = &b.t->chunk[j->first], *tail = &b.t->chunk[j->first + j->n - 1];
    j->kind = b.verify ? VND_JOB_VERIFY : VND_JOB_FETCH;
    j->coff = head->coff;
    j->clen = b.verify ? 0 : chunk_end(tail) - head->coff;
    return true;
}
