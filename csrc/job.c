/* job.c -- a job that was handed out: bytes in, chunks decoded, digests compared, committed (datapath (f)).
 *
 * Nothing but the comparison here makes bytes ready. A chunk that is wrong is asked for once more; then its readers
 * get EIO. Chunks commit as they land: a bad or slow tail never holds back the head.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cipher.h"
#include "fetcher.h"
#include "zran.h"

#define KEEP_BYTES (4u << 20)       /* buffers up to this stay with the slot */

void job_init(struct job *j)
{
    pthread_mutex_init(&j->lock, NULL);
}

void job_begin(struct job *j, uint64_t id)
{
    j->id = id;
    atomic_store(&j->cancelled, false);
    j->unspaced = j->bad = false;
    j->fed = 0;
    j->pos = j->coff;
    j->cursor = 0;
    j->pend_off = j->pend_len = 0;
    j->scratch_len = 0;
    j->views_n = 0;
    j->batch_id = 0;
}

static void shrink(uint8_t **p, size_t *cap)
{
    if (*cap > KEEP_BYTES) {
        free(*p);
        *p = NULL;
        *cap = 0;
    }
}

void job_wipe(struct job *j)
{
    struct blob_core *c = j->core;

    free(j->pend);
    free(j->scratch);
    free(j->views);
    free(j->batch);
    free(j->clear);
    codec_free(j->codec);
    pthread_mutex_destroy(&j->lock);
    if (j->id && j->meta)
        handle_put(j->meta);
    if (j->id && c)
        core_put(c);
}

/* The job of an id, locked; NULL: no such job. */
static struct job *job_get(struct vnd_engine *e, uint64_t id)
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

static int grow(uint8_t **p, size_t *cap, size_t need)
{
    if (need > *cap) {
        size_t n = need < FETCH_BATCH_BYTES ? FETCH_BATCH_BYTES : need;
        uint8_t *q = realloc(*p, n);
        if (!q)
            return -ENOMEM;
        *p = q;
        *cap = n;
    }
    return 0;
}

static const struct blobtable *table_of(const struct job *j)
{
    return atomic_load_explicit(&j->core->table, memory_order_acquire);
}

/* Nobody wants what is left. */
static bool unwanted(struct fetcher *f, struct job *j)
{
    uint32_t shed;
    bool demand;

    if (atomic_load(&j->cancelled) || atomic_load(&j->core->closed) || atomic_load(&f->down))
        return true;
    shed = atomic_load(&j->shed_after);
    if (!j->prefetch || !shed || j->first + j->cursor < shed)
        return false;
    pthread_mutex_lock(&f->lock);
    demand = f->demand != NULL;
    pthread_mutex_unlock(&f->lock);
    return demand;
}

/* ---------------------------------------------------------------- bytes in */

struct input {
    const uint8_t *p;
    size_t len;
};

static size_t pending(const struct job *j)
{
    return j->pend_len - j->pend_off;
}

static int keep(struct job *j, const uint8_t *p, size_t len)
{
    if (j->pend_off) {
        memmove(j->pend, j->pend + j->pend_off, pending(j));
        j->pend_len -= j->pend_off;
        j->pend_off = 0;
    }
    if (grow(&j->pend, &j->pend_cap, j->pend_len + len))
        return -ENOMEM;
    if (len)
        memcpy(j->pend + j->pend_len, p, len);
    j->pend_len += len;
    return 0;
}

/* Passes over n bytes of the range, as far as they came. */
static void skip(struct job *j, struct input *in, uint64_t n)
{
    size_t a = pending(j) < n ? pending(j) : (size_t)n;

    j->pend_off += a;
    j->pos += a;
    n -= a;
    a = in->len < n ? in->len : (size_t)n;
    in->p += a;
    in->len -= a;
    j->pos += a;
}

/* n bytes at the read position in one piece; NULL: they have not all come (what did is kept), or -ENOMEM in *rc. */
static const uint8_t *take(struct job *j, struct input *in, size_t n, int *rc)
{
    const uint8_t *p = NULL;
    size_t have = pending(j);

    if (have < n && have) {             /* only complete the piece: the rest is decoded where it is */
        size_t more = n - have < in->len ? n - have : in->len;
        *rc = keep(j, in->p, more);
        if (*rc)
            return NULL;
        in->p += more;
        in->len -= more;
        have += more;
    }
    if (have >= n) {
        p = j->pend + j->pend_off;
        j->pend_off += n;
    } else if (!have && in->len >= n) {
        p = in->p;
        in->p += n;
        in->len -= n;
    } else {
        return NULL;
    }
    j->pos += n;
    return p;
}

static int add_view(struct job *j, uint32_t rel, uint32_t usize, size_t at)
{
    if (j->views_n == j->views_cap) {
        uint32_t cap = j->views_cap ? j->views_cap * 2 : 64;
        void *p = realloc(j->views, cap * sizeof *j->views);
        if (!p)
            return -ENOMEM;
        j->views = p;
        j->views_cap = cap;
    }
    j->views[j->views_n].rel = rel;
    j->views[j->views_n].usize = usize;
    j->views[j->views_n].at = at;
    j->views_n++;
    return 0;
}

static uint32_t codec_of(const struct job *j, const struct blobtable_chunk *k)
{
    return k->flags & BLOBTABLE_COMPRESSED ? j->core->info.compressor : CODEC_NONE;
}

/* Decodes what is stored at a chunk's place into exactly len bytes. */
static int decode_stored(struct job *j, const struct blobtable_chunk *k, const uint8_t *src, uint8_t *dst,
                         size_t len)
{
    const struct zran *zran = table_of(j)->zran;
    const vnd_blob_info *info = &j->core->info;
    uint32_t codec = codec_of(j, k);
    size_t plain = k->csize;
    int rc;

    if (k->batch && zran)           /* blobmeta_parse: the context is there, csize and len are its */
        return zran_decode(zran, k->batch - 1, src, dst);
    if (k->flags & BLOBTABLE_ENCRYPTED) {
        if (grow(&j->clear, &j->clear_cap, k->csize))
            return -ENOMEM;
        rc = cipher_decrypt(info->cipher_key, info->cipher_iv, src, k->csize, j->clear, &plain);
        if (rc)
            return rc;
        src = j->clear;
        if (k->batch && plain == len)   /* a batch is raw where its sizes are the same */
            codec = CODEC_NONE;
    }
    return codec_decode(j->codec, codec, src, plain, dst, len);
}

/* Decodes one chunk into scratch. 1: its bytes have not all come. */
static int decode_chunk(struct job *j, struct input *in, const struct blobtable_chunk *k)
{
    uint8_t *dst = j->scratch + j->scratch_len;
    const uint8_t *src;
    int rc = 0;

    if (!k->batch || k->batch != j->batch_id) {
        src = take(j, in, k->csize, &rc);
        if (!src)
            return rc ? rc : 1;
        if (!k->batch)
            return decode_stored(j, k, src, dst, k->usize);
        j->batch_id = 0;
        rc = grow(&j->batch, &j->batch_cap, k->batch_usize);
        if (!rc)
            rc = decode_stored(j, k, src, j->batch, k->batch_usize);
        if (rc)
            return rc;
        j->batch_id = k->batch;
    }
    memcpy(dst, j->batch + k->batch_at, k->usize);      /* blobtable_check: inside the batch */
    return 0;
}

/* Decodes what is complete until a batch is full. -EBADMSG: a chunk does not decode (marked; the next call goes
 * on). */
static int decode(struct job *j, struct input *in)
{
    const struct blobtable *t = table_of(j);
    int rc = 0;

    while (!rc && j->cursor < j->n && j->scratch_len < FETCH_BATCH_BYTES) {
        const struct blobtable_chunk *k = &t->chunk[j->first + j->cursor];
        if (j->state[j->cursor] != JOB_WANT) {
            j->cursor++;
            continue;
        }
        if (j->pos < k->coff)
            skip(j, in, k->coff - j->pos);
        if (j->pos < k->coff)
            break;
        if (j->pos > k->coff && (!k->batch || k->batch != j->batch_id)) {
            rc = -EBADMSG;          /* its batch did not decode */
        } else {
            if (grow(&j->scratch, &j->scratch_cap, j->scratch_len + k->usize))
                return -ENOMEM;
            rc = decode_chunk(j, in, k);
        }
        if (rc == 1)
            return 0;
        if (rc == -EBADMSG) {
            j->state[j->cursor++] = JOB_BAD;
            j->bad = true;
            break;
        }
        if (!rc)
            rc = add_view(j, j->cursor, k->usize, j->scratch_len);
        if (!rc) {
            j->state[j->cursor++] = JOB_DECODED;
            j->scratch_len += k->usize;
        }
    }
    return rc;
}

/* Reads the next chunks of a verify job out of the data file. */
static int decode_verify(struct job *j)
{
    const struct blobtable *t = table_of(j);
    int rc = 0;

    while (!rc && j->cursor < j->n && j->scratch_len < FETCH_BATCH_BYTES) {
        const struct blobtable_chunk *k = &t->chunk[j->first + j->cursor];
        if (j->state[j->cursor] != JOB_WANT) {
            j->cursor++;
            continue;
        }
        if (grow(&j->scratch, &j->scratch_cap, j->scratch_len + k->usize))
            return -ENOMEM;
        if (cachefile_read(j->core->cache, k->uoff, j->scratch + j->scratch_len, k->usize)) {
            j->state[j->cursor++] = JOB_BAD;
            j->bad = true;
            continue;
        }
        rc = add_view(j, j->cursor, k->usize, j->scratch_len);
        if (!rc) {
            j->state[j->cursor++] = JOB_DECODED;
            j->scratch_len += k->usize;
        }
    }
    return rc;
}

static int job_feed(struct vnd_engine *e, struct job *j, const uint8_t *buf, size_t len)
{
    struct input in = { buf, len };
    int rc;

    if (unwanted(e->fetcher, j))
        return -ECANCELED;
    if (j->kind == VND_JOB_VERIFY || len > j->clen - j->fed)
        return -EINVAL;
    if (j->kind == VND_JOB_META) {
        j->fed += len;
        atomic_fetch_add_explicit(&e->shared.fetched_bytes, len, memory_order_relaxed);
        return keep(j, buf, len);
    }
    if (!j->codec && !(j->codec = codec_new()))
        return -ENOMEM;
    j->fed += len;
    atomic_fetch_add_explicit(&e->shared.fetched_bytes, len, memory_order_relaxed);
    if (j->prefetch)
        atomic_fetch_add_explicit(&e->shared.prefetch_bytes, len, memory_order_relaxed);
    rc = decode(j, &in);
    /* What is left over, because a batch is full or a chunk incomplete, is decoded by a later call. */
    if (in.len && j->cursor < j->n) {
        int more = keep(j, in.p, in.len);
        if (more)
            return more;
    }
    return rc ? rc : (int)j->views_n;
}

int vnd_job_feed(vnd_engine *e, uint64_t job_id, const uint8_t *buf, size_t len)
{
    struct job *j = job_get(e, job_id);
    int rc;

    if (!j)
        return -EINVAL;
    rc = job_feed(e, j, buf, len);
    pthread_mutex_unlock(&j->lock);
    return rc;
}

int vnd_job_chunks(vnd_engine *e, uint64_t job_id, vnd_chunk_view *out, int max)
{
    struct job *j = job_get(e, job_id);
    int n = 0, rc = 0;

    if (!j)
        return -EINVAL;
    if (!j->views_n && j->kind != VND_JOB_META && !unwanted(e->fetcher, j)) {
        struct input none = { NULL, 0 };
        rc = j->kind == VND_JOB_VERIFY ? decode_verify(j) : decode(j, &none);
        if (rc == -EBADMSG && j->views_n)
            rc = 0;
    }
    while (n < max && (uint32_t)n < j->views_n) {
        out[n].chunk_index = j->first + j->views[n].rel;
        out[n].usize_bytes = j->views[n].usize;
        out[n].data = j->scratch + j->views[n].at;
        n++;
    }
    pthread_mutex_unlock(&j->lock);
    return rc ? rc : n;
}

/* ---------------------------------------------------------------- commit */

/* What one commit goes by: taken together, so that bytes compared with one table never become ready under
 * another. */
struct commit {
    struct vnd_engine *e;
    struct job *j;
    const struct blobtable *t;
    uint64_t epoch;
    uint64_t low, high;     /* span written */
    int ready, wrong;
};

/* Whether the bytes are the chunk's. A chunk without a digest is taken only where the engine allows that. */
static bool digest_right(const struct commit *m, uint32_t view, const uint8_t *given)
{
    struct job *j = m->j;
    uint32_t i = j->first + j->views[view].rel;
    uint8_t own[CODEC_DIGEST_BYTES];

    if (!m->t->chunk[i].usize || m->t->chunk[i].usize != j->views[view].usize)
        return false;       /* the table changed meanwhile */
    if (!(m->t->chunk[i].flags & BLOBTABLE_DIGEST))
        return m->e->cfg.allow_unverified &&
               (!(m->t->chunk[i].flags & BLOBTABLE_CRC32) ||
                m->t->chunk[i].crc32 == vnd_crc32c(j->scratch + j->views[view].at, j->views[view].usize));
    if (j->core->info.digester == CODEC_SHA256) {
        if (codec_sha256(j->scratch + j->views[view].at, j->views[view].usize, own))
            return false;
        given = own;
    }
    return given && !memcmp(given, m->t->digest[i], CODEC_DIGEST_BYTES);
}

/* Writes views [from, to), which touch in scratch and in the data file. */
static int write_views(struct commit *m, uint32_t from, uint32_t to)
{
    struct job *j = m->j;
    size_t at = j->views[from].at, end = j->views[to - 1].at + j->views[to - 1].usize;
    uint64_t uoff = m->t->chunk[j->first + j->views[from].rel].uoff;
    int rc;

    if (j->kind == VND_JOB_VERIFY)
        return 0;
    rc = cachefile_write(j->core->cache, uoff, j->scratch + at, end - at);
    if (!rc) {
        m->low = uoff < m->low ? uoff : m->low;
        m->high = uoff + (end - at) > m->high ? uoff + (end - at) : m->high;
    }
    return rc;
}

/* A chunk that is right but could not be written. */
static void keep_unwritten(struct job *j, uint32_t view)
{
    j->unspaced = true;
    if (j->prefetch && !atomic_load(&j->shed_after)) {
        atomic_store(&j->cancelled, true);      /* no use in fetching ahead into nowhere */
        fetch_drop_prefetch(j->core);
    } else {
        uncached_put(j->core, j->first + j->views[view].rel, j->scratch + j->views[view].at, j->views[view].usize);
    }
}

/* Makes views [from, to) ready, or keeps them in memory. */
static void settle_views(struct commit *m, uint32_t from, uint32_t to)
{
    struct job *j = m->j;
    struct cachefile *cache = j->core->cache;
    _Atomic uint64_t *counter = j->kind == VND_JOB_VERIFY ? &m->e->shared.verified_chunks :
                                &m->e->shared.fetched_chunks;
    int rc = from < to ? write_views(m, from, to) : 0;
    bool lost = false;

    if (!rc) {
        pthread_mutex_lock(&cache->lock);
        lost = !cachefile_epoch_holds(cache, m->epoch);     /* bytes were taken away meanwhile, perhaps these */
        for (uint32_t v = from; v < to && !lost; v++)
            cachefile_set_ready(cache, j->first + j->views[v].rel);
        pthread_mutex_unlock(&cache->lock);
    }
    for (uint32_t v = from; v < to; v++) {
        uint32_t rel = j->views[v].rel;
        if (lost) {
            j->state[rel] = JOB_WANT;       /* left over at the end, so asked for again */
            continue;
        }
        j->state[rel] = JOB_DONE;
        if (rc) {
            keep_unwritten(j, v);
        } else {
            atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
            m->ready++;
        }
        miss_finish(j->core, j->first + rel, 0);
    }
}

static bool views_touch(const struct commit *m, uint32_t v)
{
    const struct job *j = m->j;
    const struct blobtable_chunk *a = &m->t->chunk[j->first + j->views[v].rel];
    const struct blobtable_chunk *b = &m->t->chunk[j->first + j->views[v + 1].rel];

    return a->uoff + a->usize == b->uoff && j->views[v].at + j->views[v].usize == j->views[v + 1].at;
}

static int job_commit(struct vnd_engine *e, struct job *j, const uint8_t *digests, int n)
{
    struct commit m = { .e = e, .j = j, .low = UINT64_MAX };
    uint32_t from = 0, count = (uint32_t)n;

    if (n < 0 || count > j->views_n || (!digests && n && j->core->info.digester != CODEC_SHA256 &&
                                        !e->cfg.allow_unverified))
        return -EINVAL;
    if (!n)
        return 0;
    pthread_mutex_lock(&j->core->cache->lock);
    m.t = table_of(j);
    m.epoch = cachefile_epoch(j->core->cache);
    pthread_mutex_unlock(&j->core->cache->lock);
    for (uint32_t v = 0; v < count; v++) {
        if (!digest_right(&m, v, digests ? digests + (size_t)v * CODEC_DIGEST_BYTES : NULL)) {
            settle_views(&m, from, v);
            from = v + 1;
            j->state[j->views[v].rel] = JOB_BAD;
            j->bad = true;
            m.wrong++;
        } else if (v + 1 == count || !views_touch(&m, v)) {
            settle_views(&m, from, v + 1);
            from = v + 1;
        }
    }
    if (m.low < m.high)
        cachefile_settle(j->core->cache, m.low, m.high);
    if (m.ready)
        claim_wake_all(&j->core->store->wake);
    j->views_n -= count;
    memmove(j->views, j->views + count, j->views_n * sizeof *j->views);
    if (!j->views_n)
        j->scratch_len = 0;
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
    const struct blobtable_chunk *k = &table_of(j)->chunk[i];

    if (j->kind == VND_JOB_VERIFY)
        engine_say(e, 30, VND_CAUSE_DIGEST, "cache of blob %s: chunk %u in the data file at %" PRIu64 " is not the "
                   "image's; it is fetched again", j->core->info.id, i, k->uoff);
    else if (again)
        engine_say(e, 30, VND_CAUSE_DIGEST, "blob %s: chunk %u [%" PRIu64 ", +%u) came with wrong bytes; it is "
                   "asked for once more", j->core->info.id, i, k->coff, k->csize);
    else
        engine_say(e, 40, VND_CAUSE_DIGEST, "blob %s: chunk %u [%" PRIu64 ", +%u) has wrong bytes: readers get "
                   "EIO; the blob on the server or the image is damaged", j->core->info.id, i, k->coff, k->csize);
}

/* Settles what the job leaves: asked for again, or failed. */
static void job_leftovers(struct vnd_engine *e, struct job *j, int error)
{
    bool verify = j->kind == VND_JOB_VERIFY, dropped = unwanted(e->fetcher, j);

    for (uint32_t rel = j->n; rel-- > 0;) {     /* backwards: each goes to the head of the queue */
        uint32_t i = j->first + rel;
        if (j->state[rel] == JOB_BAD) {
            bool again = miss_retry(j->core, i, verify ? 255 : FETCH_TRIES, !verify, verify, EIO);
            say_bad(e, j, i, again);
        } else if (j->state[rel] == JOB_WANT || j->state[rel] == JOB_DECODED) {
            if (j->bad || dropped)              /* not reached, through no fault of its own */
                miss_retry(j->core, i, 255, false, false, EIO);
            else if (!error || j->prefetch || verify)
                miss_retry(j->core, i, FETCH_TRIES, true, false, EIO);
            else
                miss_fail(j->core, i, j->deadline_us, EIO);
        }
    }
}

/* Hands what a META job brought to the load that waits for it. */
static void meta_end(struct job *j, int error)
{
    struct vnd_blob *b = j->meta;

    if (error || j->fed != j->clen) {
        handle_raw(b, NULL, 0, EIO);
    } else {
        handle_raw(b, j->pend, j->pend_len, 0);
        j->pend = NULL;
        j->pend_cap = 0;
    }
    j->meta = NULL;
    handle_put(b);
}

void vnd_job_end(vnd_engine *e, uint64_t job_id, int error, int cause, const char *text)
{
    struct job *j = job_get(e, job_id);
    struct blob_core *c;
    bool shed;

    if (!j)
        return;
    c = j->core;
    shed = j->prefetch && unwanted(e->fetcher, j) && !atomic_load(&j->cancelled) && !atomic_load(&c->closed) &&
           !atomic_load(&e->fetcher->down);
    /* First: chunks asked for again are claimed anew, maybe by another thread at once. */
    if (j->claimed)
        claim_release(c->cache->side_fd, j->claim_first, j->claim_n);
    j->claimed = false;
    if (error && !j->bad && !atomic_load(&c->closed))
        engine_say(e, j->prefetch ? 30 : 40, cause, "%s", text && *text ? text : "fetching failed");
    if (j->kind == VND_JOB_META)
        meta_end(j, error);
    else
        job_leftovers(e, j, error);
    claim_wake_all(&c->store->wake);
    /* A prefetch that made way for a reader goes on later where it stopped. */
    if (shed && !error && j->cursor < j->n)
        fetch_ahead(c, j->first + j->cursor, j->first + j->n, j->tag, j->hint, true);
    shrink(&j->pend, &j->pend_cap);
    shrink(&j->scratch, &j->scratch_cap);
    shrink(&j->batch, &j->batch_cap);
    shrink(&j->clear, &j->clear_cap);
    fetch_release_slot(e->fetcher, j);
    pthread_mutex_unlock(&j->lock);
    core_put(c);
}
