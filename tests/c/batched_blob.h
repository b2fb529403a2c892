/* batched_blob.h -- blobs whose chunk table is stored in the blob itself, and one of small chunks that are decoded five at a
 * time.
 */
#ifndef BATCHED_BLOB_H
#define BATCHED_BLOB_H
#include "blob/meta.h"
#include "store_fixture.h"

#define N 60
#define PER_BATCH 5
#define SLOT 4096
#define TABLE_BYTES (N * 24) /* where the contexts begin */

static inline void put32(uint8_t *p, uint32_t v)
{
    memcpy(p, &v, 4);
}
static inline void put64(uint8_t *p, uint64_t v)
{
    memcpy(p, &v, 8);
}

/* Appends the stored form of a table with its header to the blob, and states it in the blob table. */
static inline void seal(struct fix_blob *b, const uint8_t *table, size_t len, uint32_t ctx_offset, uint32_t ctx_count)
{
    uint8_t *h, *packed = malloc(len + 1024);
    size_t n = ZSTD_compress(packed, len + 1024, table, len, 3);

    b->info.ci_compressor = CODEC_ZSTD;
    if (n >= len) {
        memcpy(packed, table, len);
        n = len;
        b->info.ci_compressor = CODEC_NONE;
    }
    b->info.ci_offset = b->stored_len;
    b->info.ci_csize_bytes = n;
    b->info.ci_usize_bytes = len;
    b->stored = realloc(b->stored, b->stored_len + n + 4096);
    memcpy(b->stored + b->stored_len, packed, n);
    h = b->stored + b->stored_len + n;
    memset(h, 0, 4096);
    put32(h, 0xB10BB10B);
    put32(h + 4, b->info.features);
    put32(h + 8, b->info.ci_compressor);
    put32(h + 12, b->info.chunk_count);
    put64(h + 16, b->info.ci_offset);
    put64(h + 24, n);
    put64(h + 32, len);
    put64(h + 40, ctx_offset);
    put64(h + 48, (uint64_t)ctx_count * 40);
    put32(h + 56, ctx_count);
    put32(h + 4092, 0xB10BB10B);
    b->stored_len += n + 4096;
    free(packed);
}

/* What batched_blob_new writes: the stored table as it grows, and the batch that is not stored yet. */
struct batching {
    struct fix_blob *b;
    uint8_t *table;
    uint8_t pending[PER_BATCH * SLOT];
    size_t used;
    uint32_t contexts, in_batch, from; /* from: the batch's first chunk */
};

static inline void store_batch(struct batching *w, uint32_t end)
{
    struct fix_blob *b = w->b;
    size_t n = fix_compress(b->info.compressor, w->pending, w->used, b->stored + b->stored_len, 2 * PER_BATCH * SLOT);

    if (n >= w->used) {
        memcpy(b->stored + b->stored_len, w->pending, w->used);
        n = w->used;
    }
    put32(w->table + TABLE_BYTES + w->contexts * 40, (uint32_t)n);
    put32(w->table + TABLE_BYTES + w->contexts * 40 + 4, (uint32_t)w->used);
    for (uint32_t k = w->from; k < end; k++)
        put64(w->table + k * 24 + 8, b->stored_len);
    b->stored_len += n;
    w->contexts++;
    w->in_batch = 0;
    w->used = 0;
}

/* A chunk that stands alone: its flags in the table. */
static inline uint64_t store_alone(struct batching *w, struct blob_chunk *c, const uint8_t *plain)
{
    struct fix_blob *b = w->b;

    c->coff = b->stored_len;
    c->csize = (uint32_t)fix_compress(b->info.compressor, plain, c->usize, b->stored + b->stored_len, 2 * SLOT);
    c->flags = b->info.compressor ? 1 : 0;
    put64(w->table + c->index * 24 + 8, c->coff | (uint64_t)c->csize << 40);
    b->stored_len += c->csize;
    w->from = c->index + 1;
    return c->flags;
}

/* A chunk of a batch: its flags in the table. */
static inline uint64_t add_to_batch(struct batching *w, struct blob_chunk *c, const uint8_t *plain)
{
    if (!w->in_batch)
        w->from = c->index;
    c->flags = 0x10; /* no place and no mark, as real bootstraps have it */
    put64(w->table + c->index * 24 + 16, w->used | (uint64_t)w->contexts << 32);
    memcpy(w->pending + w->used, plain, c->usize);
    w->used += c->usize;
    w->in_batch++;
    return 1 | 4;
}

/* Small chunks, five of them decoded together; every eleventh stands alone. table_out (may be NULL): its table, the
 * caller's to free. */
static inline struct fix_blob *batched_blob_new(uint32_t codec, uint8_t **table_out)
{
    struct fix_blob *b = calloc(1, sizeof *b);
    struct batching w = { .b = b, .table = calloc(1, TABLE_BYTES + N * 40) };
    uint32_t seed = 5;

    b->chunk = calloc(N, sizeof *b->chunk);
    b->plain_len = N * SLOT;
    b->plain = calloc(1, b->plain_len);
    b->stored = malloc(4 * N * SLOT);
    b->info = (vnd_blob_info){ .chunk_size_bytes = SLOT,
                               .chunk_count = N,
                               .compressor = codec,
                               .digester = 1,
                               .features = 1 | BLOBMETA_CHUNK_INFO_V2 | BLOBMETA_BATCH,
                               .uncompressed_size_bytes = b->plain_len };
    strcpy(b->info.id, "batched");
    for (uint32_t i = 0; i < N; i++) {
        bool alone = i % 11 == 10;
        struct blob_chunk *c = &b->chunk[i];
        uint8_t *p = b->plain + i * SLOT;

        if (w.in_batch == PER_BATCH || (alone && w.in_batch))
            store_batch(&w, i);
        *c = (struct blob_chunk){ .index = i, .usize = 1000 + i * 40, .uoff = (uint64_t)i * SLOT };
        for (uint32_t k = 0; k < c->usize; k++)
            p[k] = (uint8_t)(k % 3 ? 'a' + i % 26 : fix_random(&seed));
        CHECK(codec_sha256(p, c->usize, c->digest) == 0);
        uint64_t flags = alone ? store_alone(&w, c, p) : add_to_batch(&w, c, p);
        put64(w.table + i * 24, (uint64_t)i | (uint64_t)(c->usize - 1) << 32 | flags << 56);
    }
    store_batch(&w, N);
    b->info.compressed_size_bytes = b->stored_len;
    seal(b, w.table, TABLE_BYTES + w.contexts * 40, TABLE_BYTES, w.contexts);
    b->info.compressed_size_bytes = b->stored_len;
    if (table_out)
        *table_out = w.table;
    else
        free(w.table);
    return b;
}

/* The stored header of a blob that is sealed: its last 4096 bytes. */
static inline void copy_header(const struct fix_blob *b, uint8_t out[4096])
{
    memcpy(out, b->stored + b->stored_len - 4096, 4096);
}

#endif
