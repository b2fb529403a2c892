/* rafs/check.c -- faults of an image that opening does not look for, because the search takes time that grows with the
 * image. */
#include "rafs/check.h"
#include "blob/table.h"
#include "blob/cipher.h"
#include "blob/codec.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

bool rafs_fault(struct rafs_faults *f, const char *fmt, ...)
{
    char line[VND_ERR_MAX];
    va_list ap;
    size_t len;

    if (f->count >= f->max)
        return false;
    va_start(ap, fmt);
    vsnprintf(line, sizeof(line), fmt, ap);
    va_end(ap);
    for (char *p = line; *p; p++)
        if ((unsigned char)*p < ' ' || *p == 0x7f)
            *p = '?';
    len = strlen(line);
    if (f->used + len + 2 <= f->cap) {
        if (f->used)
            f->out[f->used++] = '\n';
        memcpy(f->out + f->used, line, len + 1);
        f->used += len;
    }
    return ++f->count < f->max;
}

/* Faults that show only when all records of a blob are seen together. */
static void check_table(struct vnd_rafs *r, struct rafs_faults *f, uint32_t blob)
{
    struct blobtable *t;
    struct failure why = { .line = "out of memory" };
    int rc = r->blobs[blob].info.chunk_count
                 ? blobtable_from_records(&t, &r->blobs[blob].info, rafs_blob_chunks, r, &why)
                 : -ENODATA;

    if (!rc)
        blobtable_free(t);
    else if (rc != -ENODATA)
        rafs_fault(f, "%s", why.line);
}

struct record_walk {
    struct vnd_rafs *r;
    struct rafs_faults *f;
};

static bool check_record(struct vnd_rafs *r, struct rafs_faults *f, uint64_t i, uint32_t blob,
                         const struct blob_chunk *c)
{
    static const uint8_t unset[32];

    if (blob >= r->info.blob_count)
        return rafs_fault(f, "chunk record %llu names blob %u of %u", (unsigned long long)i, blob, r->info.blob_count);
    const vnd_blob_info *b = &r->blobs[blob].info;
    uint64_t end = (b->uncompressed_size_bytes + 4095) & ~4095ull;

    if (c->index >= b->chunk_count) {
        return rafs_fault(f, "chunk record %llu has index %u of %u in blob %u", (unsigned long long)i, c->index,
                          b->chunk_count, blob);
    }
    /* The record of a chunk inside a batch does not say where the chunk is stored: csize is 0. */
    bool in_batch = (b->features & RAFS_BLOB_BATCH) && !c->csize;
    /* A chunk of less than 16 bytes is padded before it is encrypted. */
    bool padded = b->cipher && c->usize < 16 && c->csize == CIPHER_PADDED;

    if (!c->csize && c->flags & 1 && b->compressor == CODEC_GZIP && !(b->features & RAFS_BLOB_ZRAN)) {
        return rafs_fault(f,
                          "chunk record %llu (blob %u, index %u) has no stored size, as those of eStargz images, "
                          "which are not read",
                          (unsigned long long)i, blob, c->index);
    }
    if (!c->usize || c->usize > r->info.chunk_size_bytes || c->csize > RAFS_CHUNK_SIZE_MAX ||
        (!(c->flags & 1) && !in_batch && !padded && c->csize != c->usize)) {
        return rafs_fault(f, "chunk record %llu (blob %u, index %u) has bad sizes: %u stored, %u plain",
                          (unsigned long long)i, blob, c->index, c->csize, c->usize);
    }
    /* The record of a gzip layer's chunk says only about where it is; its context says exactly. */
    bool about = b->features & RAFS_BLOB_ZRAN;

    if (c->uoff > end || c->usize > end - c->uoff ||
        (!about && (c->coff > b->compressed_size_bytes || c->csize > b->compressed_size_bytes - c->coff))) {
        return rafs_fault(f, "chunk record %llu (blob %u, index %u) lies outside its blob", (unsigned long long)i, blob,
                          c->index);
    }
    if (memcmp(c->digest, unset, 32) == 0 && !(r->info.flags & RAFS_FLAG_TARFS)) {
        return rafs_fault(f, "chunk record %llu (blob %u, index %u) has no digest", (unsigned long long)i, blob,
                          c->index);
    }
    return true;
}

static int put_record(void *ctx, uint64_t number, uint32_t blob, const struct blob_chunk *c)
{
    struct record_walk *w = ctx;

    return !check_record(w->r, w->f, number, blob, c);
}

/* For all versions: compares the chunk records with the blob table and finds missing digests. */
static void check_records(struct vnd_rafs *r, struct rafs_faults *f)
{
    struct record_walk w = { r, f };
    bool sized = true;

    for (uint32_t k = 0; k < r->info.blob_count && f->count < f->max; k++) {
        const vnd_blob_info *b = &r->blobs[k].info;

        if (b->chunk_count && !b->compressed_size_bytes) {
            rafs_fault(f,
                       "blob %u (%s) has %u chunks in 0 stored bytes, as nydus-image's generated dictionaries say; "
                       "none of them can be read",
                       k, b->id, b->chunk_count);
            sized = false;
        }
    }
    if (!sized) /* each record of such a blob would be one more fault */
        return;
    r->version->records(r, UINT32_MAX, put_record, &w);
    for (uint32_t k = 0; k < r->info.blob_count && f->count < f->max; k++)
        check_table(r, f, k);
}

int vnd_rafs_check(vnd_rafs *r, int max_faults, char *out, size_t out_len)
{
    struct rafs_faults f = { .max = max_faults > 0 ? max_faults : 1, .out = out, .cap = out_len };

    if (out_len)
        out[0] = 0;
    check_records(r, &f);
    if (f.count < f.max)
        r->version->check(r, &f);
    return f.count;
}
