/* blob/table.h -- where each chunk of a blob lies and what it must be. Immutable once built; every entry was checked
 * against the blob's bounds and against every other (no two chunks share bytes of the cache file).
 */
#ifndef VND_BLOBTABLE_H
#define VND_BLOBTABLE_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "blob/chunk.h"

#define BLOBTABLE_CHUNK_MAX (16u << 20) /* bytes of a chunk: docs/rafs-format.md 7.2 */
#define BLOBTABLE_COUNT_MAX (1u << 24)  /* chunks of a blob */
#define BLOBTABLE_COMPRESSED 1u         /* docs/rafs-format.md 2.6 */
#define BLOBTABLE_ENCRYPTED 4u
#define BLOBTABLE_BATCH 8u
#define BLOBTABLE_CRC32 16u          /* kept only where there is no digest */
#define BLOBTABLE_DIGEST 0x80000000u /* ours: digest[] holds one */

struct blobtable_chunk {
    uint64_t coff, uoff;
    uint32_t csize;
    uint32_t usize; /* 0: the image names no such chunk */
    uint32_t flags;
    uint32_t batch;    /* 0, or 1 + the context it is decoded with, whose coff and csize these are */
    uint32_t batch_at; /* where it starts in the decoded batch */
    uint32_t batch_usize;
    uint32_t crc32;
    uint32_t pad; /* 0: chunks are compared as bytes */
};

struct blobtable {
    uint32_t n;       /* chunks of the blob */
    uint32_t known;   /* of them described here */
    uint32_t digests; /* of them with a digest */
    struct blobtable_chunk *chunk;
    uint8_t (*digest)[32];
    struct zran *zran;      /* the contexts of a gzip layer; NULL: the blob is none */
    struct blobtable *next; /* owner's list */
};

/* Builds from a bootstrap's chunk records; those of batched chunks lack their place (see blobmeta_place). 0;
 * -ENODATA: there are none; -EINVAL with a line: malformed; -ENOMEM. */
int blobtable_from_records(struct blobtable **out, const vnd_blob_info *info, blob_chunks_fn chunks, void *ctx,
                           struct failure *f);
/* What is wrong with one chunk by itself, NULL = nothing. */
const char *blobtable_check(const vnd_blob_info *info, const struct blobtable_chunk *c);
/* Whether both describe the same chunks alike. */
bool blobtable_equal(const struct blobtable *a, const struct blobtable *b);
/* Makes a new table with the chunks of both. -EEXIST with a line: they contradict each other. */
int blobtable_merge(struct blobtable **out, const struct blobtable *a, const struct blobtable *b, struct failure *f);
/* First pair of chunks that share uncompressed bytes, among those with usize[i] != 0. true: there is one. */
bool blobtable_overlap(const struct blobtable *t, uint32_t *a, uint32_t *b);
/* Size of the part of the blob that holds chunks, and of ID.blob.raw. */
uint64_t blobtable_stored_bytes(const vnd_blob_info *info);
/* Why a cache file cannot hold the chunks as they are stored, NULL = it can. */
const char *blobtable_unstorable(const vnd_blob_info *info, const struct blobtable *t);
/* A short name of what a table says, by SHA-256 of all of it and of how info says it is stored. 0 or -EIO, -ENOMEM. */
#define BLOBTABLE_NAME_LEN 16
int blobtable_name(const vnd_blob_info *info, const struct blobtable *t, char out[BLOBTABLE_NAME_LEN + 1]);
struct blobtable *blobtable_new(uint32_t n);
void blobtable_free(struct blobtable *t);

/* Part of the ready test: the extent is where the table has its chunk, so that the trusted bit is about these bytes. */
static inline bool blobtable_covers(const struct blobtable *t, const struct extent *x)
{
    if (x->chunk >= t->n)
        return false;
    const struct blobtable_chunk *c = &t->chunk[x->chunk];
    return x->chunk_off <= c->usize && x->len <= c->usize - x->chunk_off && c->usize != 0 &&
           x->uoff - x->chunk_off == c->uoff && x->uoff >= x->chunk_off;
}

#endif
