/* blob/table.c -- see blob/table.h. */
#include "blob/table.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <string.h>

#include "blob/meta.h"
#include "blob/cipher.h"
#include "blob/codec.h"
#include "base/base.h"
#include "blob/zran.h"

struct build {
    struct blobtable *t;
    const vnd_blob_info *info;
    struct failure *failure;
};

/* Blob features, docs/rafs-format.md 4.1 */
#define BLOB_SEPARATE 0x10u
#define BLOB_TAR_HEADER 0x10000000u
#define BLOB_TAR_TOC 0x40000000u

struct span {
    uint64_t uoff;
    uint32_t usize, index;
};

struct blobtable *blobtable_new(uint32_t n)
{
    struct blobtable *t = calloc(1, sizeof *t);

    if (!t)
        return NULL;
    t->n = n;
    t->chunk = calloc(n ? n : 1, sizeof *t->chunk);
    t->digest = calloc(n ? n : 1, sizeof *t->digest);
    if (!t->chunk || !t->digest) {
        blobtable_free(t);
        return NULL;
    }
    return t;
}

void blobtable_free(struct blobtable *t)
{
    if (!t)
        return;
    free(t->chunk);
    free(t->digest);
    zran_unref(t->zran);
    free(t);
}

static bool is_zero(const uint8_t *p, size_t n)
{
    while (n--)
        if (*p++)
            return false;
    return true;
}

/* The part of the check that concerns the cache file. */
static const char *check_space(const vnd_blob_info *info, const struct blobtable_chunk *c)
{
    if (c->usize == 0 || c->usize > BLOBTABLE_CHUNK_MAX)
        return "uncompressed size out of range";
    if (c->uoff > info->uncompressed_size_bytes || c->usize > info->uncompressed_size_bytes - c->uoff)
        return "uncompressed range beyond the blob";
    return NULL;
}

const char *blobtable_check(const vnd_blob_info *info, const struct blobtable_chunk *c)
{
    bool compressed = c->flags & BLOBTABLE_COMPRESSED;
    uint32_t decoded = c->batch ? c->batch_usize : c->usize;
    const char *why = check_space(info, c);

    if (why)
        return why;
    if (c->csize == 0 || c->csize > BLOBTABLE_CHUNK_MAX)
        return "compressed size out of range";
    if (c->coff > info->compressed_size_bytes || c->csize > info->compressed_size_bytes - c->coff)
        return "compressed range beyond the blob";
    if (c->batch && (decoded > BLOBTABLE_CHUNK_MAX || c->batch_at > decoded || c->usize > decoded - c->batch_at))
        return "beyond its batch";
    if (c->flags & BLOBTABLE_ENCRYPTED && (!info->cipher || c->csize < 16))
        return "encrypted, and it cannot be";
    if (!compressed && c->csize != decoded &&
        !(c->flags & BLOBTABLE_ENCRYPTED && decoded < 16 && c->csize == CIPHER_PADDED))
        return "stored raw with two sizes";
    if (compressed && info->compressor == CODEC_NONE)
        return "compressed in a blob without compression";
    return NULL;
}

static int put_record(void *ctx, const struct blob_chunk *r)
{
    struct build *b = ctx;
    struct blobtable_chunk c = { .coff = r->coff,
                                 .uoff = r->uoff,
                                 .csize = r->csize,
                                 .usize = r->usize,
                                 .flags = r->flags & (BLOBTABLE_COMPRESSED | BLOBTABLE_ENCRYPTED) },
                           *e;
    const char *why = "index beyond the blob's chunk count";
    /* Builders leave the place of a batched chunk 0 and do not flag it either. */
    bool batch = ((r->flags & BLOBTABLE_BATCH || !r->csize) && b->info->features & BLOBMETA_BATCH) ||
                 b->info->features & BLOBMETA_ZRAN; /* for those a record's place is not one to read at */

    if (!batch && !r->csize && r->flags & BLOBTABLE_COMPRESSED && b->info->compressor == CODEC_GZIP)
        return failure_set(b->failure, -EINVAL, VND_CAUSE_FORMAT,
                           "blob %s chunk %u: has no stored size, as those of eStargz "
                           "images, which are not read; convert the image",
                           b->info->id, r->index);
    if (batch) /* where it lies is not known yet; blobmeta_place brings it, checked */
        c.coff = c.csize = c.flags = 0;
    if (r->index < b->info->chunk_count)
        why = batch ? check_space(b->info, &c) : blobtable_check(b->info, &c);
    if (why)
        return failure_set(b->failure, -EINVAL, VND_CAUSE_FORMAT, "blob %s chunk %u: %s; the image is damaged",
                           b->info->id, r->index, why);
    if (!is_zero(r->digest, sizeof r->digest)) {
        c.flags |= BLOBTABLE_DIGEST;
    } else if (r->flags & BLOBTABLE_CRC32 && r->crc32) {
        c.flags |= BLOBTABLE_CRC32;
        c.crc32 = r->crc32;
    }
    e = &b->t->chunk[r->index];
    if (e->usize) { /* an image may name a chunk more than once, always alike */
        if (memcmp(e, &c, sizeof c) || memcmp(b->t->digest[r->index], r->digest, 32))
            return failure_set(b->failure, -EINVAL, VND_CAUSE_FORMAT,
                               "blob %s chunk %u: described twice and differently; "
                               "the image is damaged",
                               b->info->id, r->index);
        return 0;
    }
    *e = c;
    memcpy(b->t->digest[r->index], r->digest, 32);
    b->t->known++;
    if (c.flags & BLOBTABLE_DIGEST)
        b->t->digests++;
    return 0;
}

static int span_order(const void *a, const void *b)
{
    const struct span *x = a, *y = b;
    return x->uoff < y->uoff ? -1 : x->uoff > y->uoff;
}

bool blobtable_overlap(const struct blobtable *t, uint32_t *a, uint32_t *b)
{
    uint64_t end = 0;
    uint32_t last = 0, k = 0;
    bool sorted = true, hit = false;
    struct span *s;

    for (uint32_t i = 0; i < t->n && sorted; i++) {
        if (!t->chunk[i].usize)
            continue;
        sorted = t->chunk[i].uoff >= end;
        end = t->chunk[i].uoff + t->chunk[i].usize;
    }
    if (sorted) /* what every builder writes: index order is offset order */
        return false;
    s = malloc((size_t)t->known * sizeof *s);
    if (!s) {
        *a = *b = 0;
        return true;
    }
    for (uint32_t i = 0; i < t->n && k < t->known; i++)
        if (t->chunk[i].usize)
            s[k++] = (struct span){ t->chunk[i].uoff, t->chunk[i].usize, i };
    qsort(s, k, sizeof *s, span_order);
    end = 0;
    for (uint32_t i = 0; i < k && !hit; i++) {
        if (i && s[i].uoff < end) {
            *a = last;
            *b = s[i].index;
            hit = true;
        }
        end = s[i].uoff + s[i].usize;
        last = s[i].index;
    }
    free(s);
    return hit;
}

int blobtable_from_records(struct blobtable **out, const vnd_blob_info *info, blob_chunks_fn chunks, void *ctx,
                           struct failure *f)
{
    struct build b = { .info = info, .failure = f };
    uint32_t x, y;
    int rc;

    *out = NULL;
    if (!info->chunk_count || info->chunk_count > BLOBTABLE_COUNT_MAX)
        return failure_set(f, -EINVAL, VND_CAUSE_FORMAT, "blob %s: %u chunks; 1 to %u can be served", info->id,
                           info->chunk_count, BLOBTABLE_COUNT_MAX);
    b.t = blobtable_new(info->chunk_count);
    if (!b.t)
        return failure_set(f, -ENOMEM, VND_CAUSE_FORMAT, "blob %s: no memory for a table of %u chunks", info->id,
                           info->chunk_count);
    rc = chunks ? chunks(ctx, info->index, put_record, &b) : 0;
    if (!rc && !b.t->known)
        rc = -ENODATA;
    if (!rc && blobtable_overlap(b.t, &x, &y))
        rc = failure_set(f, -EINVAL, VND_CAUSE_FORMAT, "blob %s: chunks %u and %u share bytes; the image is damaged",
                         info->id, x, y);
    if (rc) {
        blobtable_free(b.t);
        return rc < 0 ? rc : -EINVAL;
    }
    *out = b.t;
    return 0;
}

uint64_t blobtable_stored_bytes(const vnd_blob_info *info)
{
    uint64_t header = info->features & BLOB_TAR_HEADER ? 512 : 0;

    if (info->features & BLOB_SEPARATE || !(info->features & BLOB_TAR_TOC))
        return info->compressed_size_bytes;
    if (info->ci_csize_bytes && info->ci_usize_bytes)
        return info->ci_offset > header ? info->ci_offset - header : 0;
    return info->compressed_size_bytes > header ? info->compressed_size_bytes - header : 0;
}

const char *blobtable_unstorable(const vnd_blob_info *info, const struct blobtable *t)
{
    uint64_t size = blobtable_stored_bytes(info), end = 0;

    /* A unit of several chunks would be decoded as a whole for each of them. nydusd keeps them, too, and then reads
     * EIO. */
    if (info->features & (BLOBMETA_BATCH | BLOBMETA_ZRAN))
        return "its chunks are stored together, in batches or gzip contexts";
    if (info->cipher)
        return "its chunks are encrypted";
    for (uint32_t i = 0; i < t->n; i++) {
        const struct blobtable_chunk *k = &t->chunk[i];
        if (!k->usize)
            continue;
        if (k->coff < end || k->coff > size || k->csize > size - k->coff)
            return "its chunks are not stored one behind the other";
        end = k->coff + k->csize;
    }
    return NULL;
}

_Static_assert(sizeof(struct blobtable_chunk) == 48, "chunks are compared as bytes, so none may be padding");

static bool same_chunk(const struct blobtable *a, const struct blobtable *b, uint32_t i)
{
    return !memcmp(&a->chunk[i], &b->chunk[i], sizeof a->chunk[i]) && !memcmp(a->digest[i], b->digest[i], 32);
}

int blobtable_name(const vnd_blob_info *info, const struct blobtable *t, char out[BLOBTABLE_NAME_LEN + 1])
{
    const struct {
        uint64_t size_bytes;
        uint32_t n, compressor, digester, cipher;
    } head = { info->uncompressed_size_bytes, t->n, info->compressor, info->digester, info->cipher };
    EVP_MD_CTX *md = EVP_MD_CTX_new();
    uint8_t digest[EVP_MAX_MD_SIZE];
    bool good;

    if (!md)
        return -ENOMEM;
    good = EVP_DigestInit_ex(md, EVP_sha256(), NULL) == 1 && EVP_DigestUpdate(md, &head, sizeof head) == 1 &&
           EVP_DigestUpdate(md, info->cipher_key, sizeof info->cipher_key) == 1 &&
           EVP_DigestUpdate(md, info->cipher_iv, sizeof info->cipher_iv) == 1;
    for (uint32_t i = 0; i < t->n && good; i++) /* chunks that are not named are not touched */
        good = !t->chunk[i].usize || (EVP_DigestUpdate(md, &i, sizeof i) == 1 &&
                                      EVP_DigestUpdate(md, &t->chunk[i], sizeof t->chunk[i]) == 1 &&
                                      EVP_DigestUpdate(md, t->digest[i], sizeof t->digest[i]) == 1);
    if (good && t->zran) {
        size_t dicts_len, contexts = (size_t)zran_count(t->zran) * sizeof(struct zran_context);
        const uint8_t *dicts = zran_dicts(t->zran, &dicts_len);
        good = EVP_DigestUpdate(md, zran_at(t->zran, 0), contexts) == 1 && EVP_DigestUpdate(md, dicts, dicts_len) == 1;
    }
    good = good && EVP_DigestFinal_ex(md, digest, NULL) == 1;
    EVP_MD_CTX_free(md);
    for (int i = 0; i < BLOBTABLE_NAME_LEN / 2 && good; i++)
        snprintf(out + 2 * i, 3, "%02x", digest[i]);
    return good ? 0 : -EIO;
}

bool blobtable_equal(const struct blobtable *a, const struct blobtable *b)
{
    return a->n == b->n && a->known == b->known && zran_equal(a->zran, b->zran) &&
           !memcmp(a->chunk, b->chunk, (size_t)a->n * sizeof *a->chunk) &&
           !memcmp(a->digest, b->digest, (size_t)a->n * sizeof *a->digest);
}

int blobtable_merge(struct blobtable **out, const struct blobtable *a, const struct blobtable *b, struct failure *f)
{
    struct blobtable *t;
    uint32_t x, y;

    *out = NULL;
    if (a->n != b->n)
        return failure_set(f, -EEXIST, VND_CAUSE_DIGEST, "%u chunks, another image says %u", b->n, a->n);
    if (!zran_equal(a->zran, b->zran))
        return failure_set(f, -EEXIST, VND_CAUSE_DIGEST, "its gzip contexts differ from another image's");
    t = blobtable_new(a->n);
    if (!t)
        return failure_set(f, -ENOMEM, VND_CAUSE_DIGEST, "no memory for a table of %u chunks", a->n);
    t->zran = zran_ref(a->zran);
    for (uint32_t i = 0; i < a->n; i++) {
        const struct blobtable *from = a->chunk[i].usize ? a : b;
        if (!from->chunk[i].usize)
            continue; /* nor touches its memory */
        if (a->chunk[i].usize && b->chunk[i].usize && !same_chunk(a, b, i)) {
            blobtable_free(t);
            return failure_set(f, -EEXIST, VND_CAUSE_DIGEST, "chunk %u differs from what another image says of it", i);
        }
        t->chunk[i] = from->chunk[i];
        memcpy(t->digest[i], from->digest[i], 32);
        t->known += t->chunk[i].usize != 0;
        t->digests += !!(t->chunk[i].flags & BLOBTABLE_DIGEST);
    }
    if (blobtable_overlap(t, &x, &y)) {
        blobtable_free(t);
        return failure_set(f, -EEXIST, VND_CAUSE_DIGEST, "chunk %u shares bytes with chunk %u of another image", y, x);
    }
    *out = t;
    return 0;
}
