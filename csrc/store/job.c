/* store/job.c -- a job that was dispatched: its life, digests compared, chunks committed (docs/datapath.md 6). Bytes in
 * and chunks decoded are store/decode.c's.
 *
 * Nothing but the comparison here makes bytes ready. A chunk that is wrong is asked for once more; then its readers
 * get EIO. Chunks commit as they land: a bad or slow tail never holds back the head.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "store/job.h"

#define KEEP_BYTES (4u << 20) /* buffers up to this stay with the first slots, as many as one busy source uses */

void job_init(struct job *j)
{
    pthread_mutex_init(&j->lock, NULL);
}

void job_begin(struct job *j, uint64_t id)
{
    j->id = id;
    j->began_us = now_us();
    j->first_us = 0;
    j->first_bytes = 0;
    atomic_store(&j->cancelled, false);
    j->unspaced = j->bad = j->lost = false;
    j->fed = j->wasted = 0;
    j->dec.pos = j->coff;
    j->dec.cursor = 0;
    j->dec.pend_off = j->dec.pend.len = 0;
    j->dec.scratch.len = j->dec.kept.len = 0;
    j->dec.views_n = 0;
    j->dec.batch_id = 0;
}

static void shrink(struct buffer *b, size_t keep_bytes)
{
    if (b->cap > keep_bytes) {
        free(b->at);
        *b = (struct buffer){ 0 };
    }
}

/* Frees what a slot does not keep between jobs: large buffers, and (bare) all that it has. */
static void free_buffers(struct decoding *d, bool bare)
{
    struct buffer *all[] = { &d->pend, &d->scratch, &d->kept, &d->batch, &d->clear };

    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        shrink(all[i], bare ? 0 : KEEP_BYTES);
    if (!bare)
        return;
    codec_free(d->codec);
    d->codec = NULL;
    free(d->views);
    d->views = NULL;
    d->views_cap = 0;
}

void job_wipe(struct job *j)
{
    struct blob_core *c = j->core;

    free_buffers(&j->dec, true);
    pthread_mutex_destroy(&j->lock);
    if (j->id && j->meta)
        blob_unref(j->meta);
    if (j->id && c)
        core_unref(c);
}

struct job *job_get(struct vnd_engine *e, uint64_t id)
{
    struct fetcher *f = e->fetcher;
    struct job *j = &f->slots[id % FETCH_SLOTS];
    bool ok;

    pthread_mutex_lock(&j->lock);
    pthread_mutex_lock(&f->lock);
    ok = id && j->id == id;
    pthread_mutex_unlock(&f->lock);
    if (ok)
        return j;
    pthread_mutex_unlock(&j->lock);
    return NULL;
}

const struct blobtable *job_table(const struct job *j)
{
    return atomic_load_explicit(&j->core->table, memory_order_acquire);
}

bool job_unwanted(struct fetcher *f, struct job *j)
{
    uint32_t after;
    bool demand;

    if (atomic_load(&j->cancelled) || atomic_load(&j->core->closed) || atomic_load(&f->down))
        return true;
    after = atomic_load(&j->preempt_after);
    if (j->whom == FOR_READER || !after || j->first + j->dec.cursor < after)
        return false;
    pthread_mutex_lock(&f->lock);
    demand = j->source && j->source->queued;
    pthread_mutex_unlock(&f->lock);
    return demand;
}

/* ---------------------------------------------------------------- commit */

/* Table and epoch of one commit. They are taken together, so that bytes compared with one table never become ready
 * under another. */
struct commit {
    struct vnd_engine *e;
    struct job *j;
    const struct blobtable *t;
    uint64_t epoch;
    uint64_t written_bytes;
    int ready, wrong;
};

/* Whether the bytes are the chunk's. A chunk without a digest is taken only where the engine allows that. */
static bool digest_right(const struct commit *m, uint32_t view, const uint8_t *given)
{
    struct job *j = m->j;
    uint32_t i = j->first + j->dec.views[view].rel;
    uint8_t own[CODEC_DIGEST_BYTES];

    if (!m->t->chunk[i].usize || m->t->chunk[i].usize != j->dec.views[view].usize)
        return false; /* the table changed meanwhile */
    if (!(m->t->chunk[i].flags & BLOBTABLE_DIGEST))
        return m->e->cfg.allow_unverified &&
               (!(m->t->chunk[i].flags & BLOBTABLE_CRC32) ||
                m->t->chunk[i].crc32 ==
                    vnd_crc32c(j->dec.scratch.at + j->dec.views[view].at, j->dec.views[view].usize));
    if (j->core->info.digester == CODEC_SHA256) {
        if (codec_sha256(j->dec.scratch.at + j->dec.views[view].at, j->dec.views[view].usize, own))
            return false;
        given = own;
    }
    return given && !memcmp(given, m->t->digest[i], CODEC_DIGEST_BYTES);
}

/* Writes views [from, to), which touch in memory and in the data file. A verify job's are there, or below. */
static int write_views(struct commit *m, uint32_t from, uint32_t to)
{
    struct job *j = m->j;
    struct cachefile *cache = j->core->cache;
    const uint8_t *bytes =
        cache->stored ? j->dec.kept.at + j->dec.views[from].kept_at : j->dec.scratch.at + j->dec.views[from].at;
    const struct blobtable_chunk *tail = &m->t->chunk[j->first + j->dec.views[to - 1].rel];
    uint64_t off = cachefile_off(cache, &m->t->chunk[j->first + j->dec.views[from].rel]);
    uint64_t end = cachefile_off(cache, tail) + cachefile_len(cache, tail);
    int rc;

    if (j->kind == VND_JOB_VERIFY && !j->dec.views[from].below)
        return 0;
    rc = cachefile_write(cache, off, bytes, end - off);
    if (!rc)
        m->written_bytes += end - off;
    return rc;
}

/* A chunk that is right but could not be written. */
static void keep_unwritten(struct job *j, uint32_t view)
{
    j->unspaced = true;
    if (j->whom != FOR_READER && !atomic_load(&j->preempt_after)) {
        atomic_store(&j->cancelled, true); /* chunks that cannot be kept are not fetched ahead */
        want_drop_ranges(j->core);
    } else {
        uncached_put(j->core, j->first + j->dec.views[view].rel, j->dec.scratch.at + j->dec.views[view].at,
                     j->dec.views[view].usize);
    }
}

/* Makes views [from, to) ready, or keeps them in memory. */
static void commit_views(struct commit *m, uint32_t from, uint32_t to)
{
    struct job *j = m->j;
    struct cachefile *cache = j->core->cache;
    _Atomic uint64_t *counter =
        j->kind == VND_JOB_VERIFY ? &m->e->shared.verified_chunks : &m->e->shared.fetched_chunks;
    int rc = from < to ? write_views(m, from, to) : 0;
    bool lost = false;

    if (!rc) {
        lost = !cachefile_commit_begin(cache, m->epoch); /* invalidated meanwhile, perhaps these bytes */
        if (!lost) {
            /* counted first: who sees them ready finds them counted */
            atomic_fetch_add_explicit(counter, to - from, memory_order_relaxed);
            for (uint32_t v = from; v < to; v++)
                cachefile_set_ready(cache, j->first + j->dec.views[v].rel);
            cachefile_commit_end(cache);
        }
    }
    for (uint32_t v = from; v < to; v++) {
        uint32_t rel = j->dec.views[v].rel;
        if (lost) {
            j->state[rel] = JOB_WANT; /* left over at the end, so asked for again */
            j->lost = true;
            continue;
        }
        j->state[rel] = JOB_DONE;
        if (rc)
            keep_unwritten(j, v);
        else
            m->ready++;
        miss_finish(j->core, j->first + rel, 0);
    }
}

bool job_chunk_is_bad(struct job *j, uint32_t rel)
{
    uint64_t moves = atomic_load_explicit(&j->core->cache->moves, memory_order_acquire);

    if (j->kind == VND_JOB_VERIFY && (moves != j->mark_moves || moves & 1)) {
        j->state[rel] = JOB_WANT; /* left over at the end, so asked for again */
        j->lost = true;
        return false;
    }
    j->state[rel] = JOB_BAD;
    j->bad = true;
    return true;
}

static bool views_touch(const struct commit *m, uint32_t v)
{
    const struct job *j = m->j;
    const struct blobtable_chunk *a = &m->t->chunk[j->first + j->dec.views[v].rel];
    const struct blobtable_chunk *b = &m->t->chunk[j->first + j->dec.views[v + 1].rel];

    if (j->dec.views[v].below != j->dec.views[v + 1].below)
        return false;
    if (j->core->cache->stored)
        return a->coff + a->csize == b->coff && j->dec.views[v].kept_at + a->csize == j->dec.views[v + 1].kept_at;
    return a->uoff + a->usize == b->uoff && j->dec.views[v].at + j->dec.views[v].usize == j->dec.views[v + 1].at;
}

static int job_commit(struct vnd_engine *e, struct job *j, const uint8_t *digests, int n)
{
    struct commit m = { .e = e, .j = j };
    uint32_t from = 0, count = (uint32_t)n;

    if (n < 0 || count > j->dec.views_n ||
        (!digests && n && j->core->info.digester != CODEC_SHA256 && !e->cfg.allow_unverified))
        return -EINVAL;
    if (!n)
        return 0;
    pthread_mutex_lock(&j->core->cache->lock);
    m.t = job_table(j);
    m.epoch = j->kind == VND_JOB_VERIFY ? j->verify_epoch : cachefile_epoch(j->core->cache);
    pthread_mutex_unlock(&j->core->cache->lock);
    for (uint32_t v = 0; v < count; v++) {
        if (!digest_right(&m, v, digests ? digests + (size_t)v * CODEC_DIGEST_BYTES : NULL)) {
            commit_views(&m, from, v);
            from = v + 1;
            m.wrong += job_chunk_is_bad(j, j->dec.views[v].rel);
            j->wasted += j->kind == VND_JOB_VERIFY ? 0 : m.t->chunk[j->first + j->dec.views[v].rel].csize;
        } else if (v + 1 == count || !views_touch(&m, v)) {
            commit_views(&m, from, v + 1);
            from = v + 1;
        }
    }
    if (m.written_bytes)
        cachefile_note_written(j->core->cache, m.written_bytes);
    if (m.ready)
        claim_wake_all(&j->core->store->wake);
    j->dec.views_n -= count;
    memmove(j->dec.views, j->dec.views + count, j->dec.views_n * sizeof *j->dec.views);
    if (!j->dec.views_n)
        j->dec.scratch.len = j->dec.kept.len = 0;
    if (!m.wrong)
        return j->unspaced ? -ENOSPC : m.ready;
    atomic_fetch_add_explicit(&e->shared.digest_failures, (uint64_t)m.wrong, memory_order_relaxed);
    return -EBADMSG;
}

int vnd_job_commit(vnd_engine *e, uint64_t job_id, const uint8_t *digests, int n)
{
    struct job *j = job_get(e, job_id);
    int rc;

    if (!j)
        return -EINVAL;
    rc = job_commit(e, j, digests, n);
    pthread_mutex_unlock(&j->lock);
    return rc;
}

/* ---------------------------------------------------------------- end */

/* Says what was wrong with a bad chunk. */
static void say_bad(struct vnd_engine *e, const struct job *j, uint32_t i, bool again)
{
    const struct blobtable_chunk *k = &job_table(j)->chunk[i];

    if (j->kind == VND_JOB_VERIFY)
        engine_say(e, VND_LEVEL_WARNING, VND_CAUSE_DIGEST,
                   "cache of blob %s: chunk %u in the data file at %" PRIu64 " is not the "
                   "image's; it is fetched again",
                   j->core->info.id, i, k->uoff);
    else if (again)
        engine_say(e, VND_LEVEL_WARNING, VND_CAUSE_DIGEST,
                   "blob %s: chunk %u [%" PRIu64 ", +%u) came with wrong bytes; it is "
                   "asked for once more",
                   j->core->info.id, i, k->coff, k->csize);
    else if (core_drop_meta(j->core))
        engine_say(e, VND_LEVEL_ERROR, VND_CAUSE_DIGEST,
                   "blob %s: chunk %u [%" PRIu64 ", +%u) has wrong bytes: readers get "
                   "EIO; its place comes from %s.blob.meta in the cache directory, which is removed: open the image "
                   "again",
                   j->core->info.id, i, k->coff, k->csize, j->core->info.id);
    else
        engine_say(e, VND_LEVEL_ERROR, VND_CAUSE_DIGEST,
                   "blob %s: chunk %u [%" PRIu64 ", +%u) has wrong bytes: readers get "
                   "EIO; the blob on the server or the image is damaged",
                   j->core->info.id, i, k->coff, k->csize);
}

/* Asks again for the chunks that the job leaves, or fails their readers. */
static void job_leftovers(struct vnd_engine *e, struct job *j, int error)
{
    bool verify = j->kind == VND_JOB_VERIFY, dropped = job_unwanted(e->fetcher, j);

    for (uint32_t rel = j->n; rel-- > 0;) { /* backwards: each goes to the head of the queue */
        uint32_t i = j->first + rel;
        if (j->state[rel] == JOB_BAD) {
            bool again =
                miss_retry(j->core, i, verify ? MISS_ANY_TRIES : FETCH_TRIES, verify ? MISS_FORCE : MISS_COUNTS, EIO);
            say_bad(e, j, i, again);
        } else if (j->state[rel] == JOB_WANT || j->state[rel] == JOB_DECODED) {
            if (j->bad || j->lost || dropped) /* the job did not reach it: that is no try */
                miss_retry(j->core, i, MISS_ANY_TRIES, 0, EIO);
            else if (!error || j->whom != FOR_READER || verify)
                miss_retry(j->core, i, FETCH_TRIES, MISS_COUNTS, EIO);
            else
                miss_finish(j->core, i, EIO);
        }
    }
}

/* Leaves what is left to a later attempt. */
static void job_defer(struct job *j, int64_t not_before_us)
{
    uint32_t first = j->n;

    for (uint32_t rel = 0; rel < j->n; rel++) {
        if (j->state[rel] != JOB_WANT && j->state[rel] != JOB_DECODED)
            continue;
        first = first < rel ? first : rel;
        miss_defer(j->core, j->first + rel, not_before_us);
    }
    if (j->whom == FOR_PREFETCH && first < j->n && !atomic_load(&j->cancelled) && !atomic_load(&j->core->closed))
        want_later(j->core, FOR_PREFETCH,
                   (struct want_range){ .asker = j->asker,
                                        .at = j->first + first,
                                        .end = j->first + j->n,
                                        .tag = j->tag,
                                        .not_before_us = not_before_us },
                   false);
}

/* Gives the table that a META job brought to the load that waits for it. */
static void meta_end(struct job *j, int error)
{
    struct vnd_blob *b = j->meta;

    if (error || j->fed != j->clen) {
        blob_take_raw(b, NULL, 0, EIO);
    } else {
        blob_take_raw(b, j->dec.pend.at, j->dec.pend.len, 0);
        j->dec.pend.at = NULL;
        j->dec.pend.cap = 0;
    }
    j->meta = NULL;
    blob_unref(b);
}

static void meta_defer(struct job *j, int64_t not_before_us)
{
    struct vnd_blob *b = j->meta;

    if (blob_defer_raw(b, not_before_us))
        blob_take_raw(b, NULL, 0, EIO);
    j->meta = NULL;
    blob_unref(b);
}

/* Other processes may claim what the job had. Before its chunks are asked for again: another thread may claim them at
 * once. */
static void release_claims(struct job *j)
{
    if (j->claimed)
        claim_release(j->core->cache->side_fd, j->claim_first, j->claim_n);
    j->claimed = false;
}

/* The job is over: its slot is free, and its lock. Bytes that were of no use. */
static uint64_t job_close(struct fetcher *f, struct job *j)
{
    struct blob_core *c = j->core;
    uint64_t wasted = j->wasted < j->fed ? j->wasted : j->fed;

    claim_wake_all(&c->store->wake);
    free_buffers(&j->dec, j - f->slots >= FETCH_SOURCE_SLOTS);
    want_release_slot(f, j);
    pthread_mutex_unlock(&j->lock);
    core_unref(c);
    return wasted;
}

uint64_t vnd_job_end(vnd_engine *e, uint64_t job_id, int error, int cause, const char *text)
{
    struct job *j = job_get(e, job_id);
    struct blob_core *c;
    bool preempted;

    if (!j)
        return 0;
    c = j->core;
    preempted = j->whom != FOR_READER && job_unwanted(e->fetcher, j) && !atomic_load(&j->cancelled) &&
                !atomic_load(&c->closed) && !atomic_load(&e->fetcher->down);
    release_claims(j);
    if (error && !j->bad && !atomic_load(&c->closed))
        engine_say(e, j->whom == FOR_READER ? VND_LEVEL_ERROR : VND_LEVEL_WARNING, cause, "%s",
                   text && *text ? text : "fetching failed");
    if (j->kind == VND_JOB_META)
        meta_end(j, error);
    else
        job_leftovers(e, j, error);
    /* The rest of a preempted job is queued again. */
    if (preempted && !error && j->dec.cursor < j->n)
        want_later(c, j->whom,
                   (struct want_range){
                       .asker = j->asker, .at = j->first + j->dec.cursor, .end = j->first + j->n, .tag = j->tag },
                   true);
    if (!error && j->first_us && j->fed == j->clen)
        stream_pace(&c->pace, (uint32_t)(j->first_us - j->began_us), j->fed - j->first_bytes,
                    (uint64_t)(now_us() - j->first_us));
    return job_close(e->fetcher, j);
}

uint64_t vnd_job_retry(vnd_engine *e, uint64_t job_id, int64_t not_before_us, int64_t source_not_before_us, int cause,
                       const char *text)
{
    struct job *j = job_get(e, job_id);
    struct blob_core *c;

    if (!j)
        return 0;
    if (j->bad || j->kind == VND_JOB_VERIFY) { /* wrong bytes are told as such */
        pthread_mutex_unlock(&j->lock);
        return vnd_job_end(e, job_id, EIO, cause, text);
    }
    c = j->core;
    release_claims(j);
    pthread_mutex_lock(&c->lock);
    failure_set(&c->last_failure, 0, cause, "%s", text && *text ? text : "fetching failed");
    pthread_mutex_unlock(&c->lock);
    if (source_not_before_us) {
        pthread_mutex_lock(&e->fetcher->lock);
        source_pause(j->source, source_not_before_us);
        pthread_mutex_unlock(&e->fetcher->lock);
    }
    if (not_before_us <= 0) /* a time, so that it waits at the source behind what is due */
        not_before_us = 1;
    if (j->kind == VND_JOB_META)
        meta_defer(j, not_before_us);
    else
        job_defer(j, not_before_us);
    return job_close(e->fetcher, j);
}
