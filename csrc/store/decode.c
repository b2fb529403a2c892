/* store/decode.c -- bytes into a job that was dispatched, chunks out of them (docs/datapath.md 6). */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "blob/cipher.h"
#include "store/job.h"
#include "blob/zran.h"

static int grow(struct buffer *b, size_t need)
{
    if (need > b->cap) {
        size_t n = need < FETCH_BATCH_BYTES ? FETCH_BATCH_BYTES : need;
        uint8_t *q = realloc(b->at, n);
        if (!q)
            return -ENOMEM;
        b->at = q;
        b->cap = n;
    }
    return 0;
}

/* ---------------------------------------------------------------- bytes in */

struct input {
    const uint8_t *p;
    size_t len;
};

static size_t pending(const struct job *j)
{
    return j->dec.pend.len - j->dec.pend_off;
}

static int keep(struct job *j, const uint8_t *p, size_t len)
{
    if (j->dec.pend_off) {
        memmove(j->dec.pend.at, j->dec.pend.at + j->dec.pend_off, pending(j));
        j->dec.pend.len -= j->dec.pend_off;
        j->dec.pend_off = 0;
    }
    if (grow(&j->dec.pend, j->dec.pend.len + len))
        return -ENOMEM;
    if (len)
        memcpy(j->dec.pend.at + j->dec.pend.len, p, len);
    j->dec.pend.len += len;
    return 0;
}

/* Passes over n bytes of the range, as far as they came. */
static void skip(struct job *j, struct input *in, uint64_t n)
{
    size_t a = pending(j) < n ? pending(j) : (size_t)n;

    j->dec.pend_off += a;
    j->dec.pos += a;
    j->wasted += a;
    n -= a;
    a = in->len < n ? in->len : (size_t)n;
    in->p += a;
    in->len -= a;
    j->dec.pos += a;
    j->wasted += a;
}

/* n bytes at the read position in one piece; NULL: they have not all come (what did is kept), or -ENOMEM in *rc. */
static const uint8_t *take(struct job *j, struct input *in, size_t n, int *rc)
{
    const uint8_t *p = NULL;
    size_t have = pending(j);

    if (have < n && have) { /* only complete the piece: the rest is decoded where it is */
        size_t more = n - have < in->len ? n - have : in->len;
        *rc = keep(j, in->p, more);
        if (*rc)
            return NULL;
        in->p += more;
        in->len -= more;
        have += more;
    }
    if (have >= n) {
        p = j->dec.pend.at + j->dec.pend_off;
        j->dec.pend_off += n;
    } else if (!have && in->len >= n) {
        p = in->p;
        in->p += n;
        in->len -= n;
    } else {
        return NULL;
    }
    j->dec.pos += n;
    return p;
}

/* Of the chunk that was decoded to the end of scratch (and kept). */
static int add_view(struct job *j, uint32_t rel, const struct blobtable_chunk *k, bool below)
{
    if (j->dec.views_n == j->dec.views_cap) {
        uint32_t cap = j->dec.views_cap ? j->dec.views_cap * 2 : 64;
        void *p = realloc(j->dec.views, cap * sizeof *j->dec.views);
        if (!p)
            return -ENOMEM;
        j->dec.views = p;
        j->dec.views_cap = cap;
    }
    j->dec.views[j->dec.views_n].rel = rel;
    j->dec.views[j->dec.views_n].usize = k->usize;
    j->dec.views[j->dec.views_n].at = j->dec.scratch.len;
    j->dec.views[j->dec.views_n].kept_at = j->dec.kept.len;
    j->dec.views[j->dec.views_n].below = below;
    j->dec.views_n++;
    j->dec.scratch.len += k->usize;
    if (j->core->cache->stored)
        j->dec.kept.len += k->csize;
    return 0;
}

static uint32_t codec_of(const struct job *j, const struct blobtable_chunk *k)
{
    return k->flags & BLOBTABLE_COMPRESSED ? j->core->info.compressor : CODEC_NONE;
}

/* Decodes what is stored at a chunk's place into exactly len bytes. */
static int decode_stored(struct job *j, const struct blobtable_chunk *k, const uint8_t *src, uint8_t *dst, size_t len)
{
    const struct zran *zran = job_table(j)->zran;
    const vnd_blob_info *info = &j->core->info;
    uint32_t codec = codec_of(j, k);
    size_t plain = k->csize;
    int rc;

    if (k->batch && zran) /* blobmeta_parse: the context is there, csize and len are its */
        return zran_decode(zran, k->batch - 1, src, dst);
    if (k->flags & BLOBTABLE_ENCRYPTED) {
        if (grow(&j->dec.clear, k->csize))
            return -ENOMEM;
        rc = cipher_decrypt(info->cipher_key, info->cipher_iv, src, k->csize, j->dec.clear.at, &plain);
        if (rc)
            return rc;
        src = j->dec.clear.at;
        if (k->batch && plain == len) /* a batch is raw where its sizes are the same */
            codec = CODEC_NONE;
    }
    return codec_decode(j->dec.codec, codec, src, plain, dst, len);
}

/* A copy for a cache file that holds chunks as they are stored: src is the caller's. */
static int keep_stored(struct job *j, const struct blobtable_chunk *k, const uint8_t *src)
{
    if (!j->core->cache->stored)
        return 0;
    if (grow(&j->dec.kept, j->dec.kept.len + k->csize))
        return -ENOMEM;
    memcpy(j->dec.kept.at + j->dec.kept.len, src, k->csize);
    return 0;
}

/* Decodes one chunk into scratch. 1: its bytes have not all come. */
static int decode_chunk(struct job *j, struct input *in, const struct blobtable_chunk *k)
{
    uint8_t *dst = j->dec.scratch.at + j->dec.scratch.len;
    const uint8_t *src;
    int rc = 0;

    if (!k->batch || k->batch != j->dec.batch_id) {
        src = take(j, in, k->csize, &rc);
        if (!src)
            return rc ? rc : 1;
        if (!k->batch)
            return keep_stored(j, k, src) ? -ENOMEM : decode_stored(j, k, src, dst, k->usize);
        j->dec.batch_id = 0;
        rc = grow(&j->dec.batch, k->batch_usize);
        if (!rc)
            rc = decode_stored(j, k, src, j->dec.batch.at, k->batch_usize);
        if (rc)
            return rc;
        j->dec.batch_id = k->batch;
    }
    memcpy(dst, j->dec.batch.at + k->batch_at, k->usize); /* blobtable_check: inside the batch */
    return 0;
}

/* Decodes what is complete until a batch is full. -EBADMSG: a chunk does not decode (marked; the next call goes
 * on). */
static int decode(struct job *j, struct input *in)
{
    const struct blobtable *t = job_table(j);
    int rc = 0;

    while (!rc && j->dec.cursor < j->n && j->dec.scratch.len < FETCH_BATCH_BYTES) {
        const struct blobtable_chunk *k = &t->chunk[j->first + j->dec.cursor];
        if (j->state[j->dec.cursor] != JOB_WANT) {
            j->dec.cursor++;
            continue;
        }
        if (j->dec.pos < k->coff)
            skip(j, in, k->coff - j->dec.pos);
        if (j->dec.pos < k->coff)
            break;
        if (j->dec.pos > k->coff && (!k->batch || k->batch != j->dec.batch_id)) {
            rc = -EBADMSG; /* its batch did not decode */
        } else {
            if (grow(&j->dec.scratch, j->dec.scratch.len + k->usize))
                return -ENOMEM;
            rc = decode_chunk(j, in, k);
        }
        if (rc == 1)
            return 0;
        if (rc == -EBADMSG) {
            j->state[j->dec.cursor++] = JOB_BAD;
            j->bad = true;
            j->wasted += k->csize;
            break;
        }
        if (!rc)
            rc = add_view(j, j->dec.cursor, k, false);
        if (!rc)
            j->state[j->dec.cursor++] = JOB_DECODED;
    }
    return rc;
}

/* Reads one chunk out of the data file, or the lower one, to the end of scratch. */
static int read_chunk(struct job *j, const struct blobtable_chunk *k, bool below)
{
    struct cachefile *cache = j->core->cache;
    uint8_t *dst = j->dec.scratch.at + j->dec.scratch.len;

    if (!cache->stored)
        return cachefile_read_marked(cache, below, k->uoff, dst, k->usize);
    if ((!j->dec.codec && !(j->dec.codec = codec_new())) || grow(&j->dec.kept, j->dec.kept.len + k->csize))
        return -ENOMEM;
    if (cachefile_read_marked(cache, below, k->coff, j->dec.kept.at + j->dec.kept.len, k->csize))
        return -EIO;
    return decode_stored(j, k, j->dec.kept.at + j->dec.kept.len, dst, k->usize);
}

/* Reads the next chunks of a verify job out of the data file. */
static int decode_verify(struct job *j)
{
    const struct blobtable *t = job_table(j);
    int rc = 0;

    j->verify_epoch = cachefile_epoch(j->core->cache); /* before the bytes are read, of which they must be */
    while (!rc && j->dec.cursor < j->n && j->dec.scratch.len < FETCH_BATCH_BYTES) {
        const struct blobtable_chunk *k = &t->chunk[j->first + j->dec.cursor];
        if (j->state[j->dec.cursor] != JOB_WANT) {
            j->dec.cursor++;
            continue;
        }
        if (grow(&j->dec.scratch, j->dec.scratch.len + k->usize))
            return -ENOMEM;
        bool below = cachefile_is_below(j->core->cache, j->first + j->dec.cursor);
        if (read_chunk(j, k, below)) {
            job_chunk_is_bad(j, j->dec.cursor++);
            continue;
        }
        rc = add_view(j, j->dec.cursor, k, below);
        if (!rc)
            j->state[j->dec.cursor++] = JOB_DECODED;
    }
    return rc;
}

static int job_feed(struct vnd_engine *e, struct job *j, const uint8_t *buf, size_t len)
{
    struct input in = { buf, len };
    int rc;

    if (job_unwanted(e->fetcher, j))
        return -ECANCELED;
    if (j->kind == VND_JOB_VERIFY || len > j->clen - j->fed)
        return -EINVAL;
    if (!j->fed)
        source_answers(e->fetcher, j);
    if (j->kind == VND_JOB_META) {
        j->fed += len;
        atomic_fetch_add_explicit(&e->shared.fetched_bytes, len, memory_order_relaxed);
        return keep(j, buf, len);
    }
    if (!j->dec.codec && !(j->dec.codec = codec_new()))
        return -ENOMEM;
    j->fed += len;
    atomic_fetch_add_explicit(&e->shared.fetched_bytes, len, memory_order_relaxed);
    if (!j->first_us) {
        j->first_us = now_us();
        j->first_bytes = len;
    }
    if (j->whom == FOR_PREFETCH)
        atomic_fetch_add_explicit(&e->shared.prefetch_bytes, len, memory_order_relaxed);
    rc = decode(j, &in);
    /* What is left over, because a batch is full or a chunk incomplete, is decoded by a later call. */
    if (in.len && j->dec.cursor < j->n) {
        int more = keep(j, in.p, in.len);
        if (more)
            return more;
    }
    return rc ? rc : (int)j->dec.views_n;
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
    if (!j->dec.views_n && j->kind != VND_JOB_META && !job_unwanted(e->fetcher, j)) {
        struct input none = { (const uint8_t *)"", 0 }; /* no null pointer: it is moved over by nothing */
        rc = j->kind == VND_JOB_VERIFY ? decode_verify(j) : decode(j, &none);
        if (rc == -EBADMSG && j->dec.views_n)
            rc = 0;
    }
    while (n < max && (uint32_t)n < j->dec.views_n) {
        out[n].chunk_index = j->first + j->dec.views[n].rel;
        out[n].usize_bytes = j->dec.views[n].usize;
        out[n].data = j->dec.scratch.at + j->dec.views[n].at;
        n++;
    }
    pthread_mutex_unlock(&j->lock);
    return rc ? rc : n;
}
