/* rafs/v5.c -- RAFS v5: superblock and tables, checked once when an image is opened, and the walk of all chunk records
 * (docs/rafs-format.md 2.1 to 2.4, 2.6).
 *
 * Images of old builders do not number their chunks and do not say how large a blob is. A chunk's number is then its rank
 * by its place in the blob, which is what later builders write, and opening reads all records once.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "blob/codec.h"
#include "rafs/v5.h"

#define V5_VERSION 0x500u
#define V5_SIZE_MAX (2ull << 30)
#define EXT_ENTRY 64
#define FEATURES_KNOWN 0xfffu /* other low bits are ignored, as Nydus does */

struct table {
    const char *name;
    uint64_t off, size;
};

/* ---- opening */

static bool v5_detect(const uint8_t *base, uint64_t size)
{
    return size >= 8 && rafs_le32(base) == V5_MAGIC;
}

static int read_superblock(struct vnd_rafs *r, const struct rafs_error *e)
{
    vnd_rafs_info *i = &r->info;
    const uint8_t *sb = r->base;
    uint64_t unknown;

    if (rafs_le32(sb + 4) != V5_VERSION)
        return rafs_fail(e, VND_CAUSE_FORMAT, "RAFS version 0x%x is not supported", rafs_le32(sb + 4));
    if (r->size <= V5_SB || r->size > V5_SIZE_MAX || r->size % 8) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "truncated: %llu bytes are no RAFS v5 bootstrap",
                         (unsigned long long)r->size);
    }
    if (rafs_le32(sb + 8) != V5_SB)
        return rafs_fail(e, VND_CAUSE_FORMAT, "a RAFS v5 superblock of %u bytes, not %d", rafs_le32(sb + 8), V5_SB);
    i->fs_version = 5;
    i->chunk_size_bytes = rafs_le32(sb + 12);
    if (i->chunk_size_bytes < 4096 || i->chunk_size_bytes > RAFS_CHUNK_SIZE_MAX ||
        i->chunk_size_bytes & (i->chunk_size_bytes - 1)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "chunk size %u is no power of two from 4096 to 16777216",
                         i->chunk_size_bytes);
    }
    r->chunk_bits = (uint8_t)__builtin_ctz(i->chunk_size_bytes);
    i->flags = rafs_le64(sb + 16);
    unknown = i->flags & ~(RAFS_FLAG_KNOWN | RAFS_FLAG_COMPAT);
    if (unknown) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "needs RAFS feature 0x%llx, which is unknown",
                         (unsigned long long)unknown);
    }
    i->inode_count = rafs_le64(sb + 24);
    r->inode_table = rafs_le64(sb + 32);
    i->prefetch_table_offset = rafs_le64(sb + 40);
    i->blob_table_offset = rafs_le64(sb + 48);
    r->slots = rafs_le32(sb + 56);
    i->prefetch_count = rafs_le32(sb + 60);
    i->prefetch_table_size_bytes = 4ull * i->prefetch_count;
    i->blob_table_size_bytes = rafs_le32(sb + 64);
    r->ext_count = rafs_le32(sb + 68);
    r->ext_table = rafs_le64(sb + 72);
    i->block_size_bytes = 4096;
    i->root_ino = 1;
    if (!r->slots || i->inode_count > r->slots) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "%llu inodes and an inode table of %u",
                         (unsigned long long)i->inode_count, r->slots);
    }
    return 0;
}

static int check_tables(const struct vnd_rafs *r, const struct rafs_error *e)
{
    const struct table t[] = {
        { "inode table", r->inode_table, 4ull * r->slots },
        { "prefetch table", r->info.prefetch_table_offset, r->info.prefetch_table_size_bytes },
        { "blob table", r->info.blob_table_offset, r->info.blob_table_size_bytes },
        { "extended blob table", r->ext_table, (uint64_t)EXT_ENTRY * r->ext_count },
    };
    const size_t n = sizeof(t) / sizeof(t[0]);

    for (size_t a = 0; a < n; a++) {
        if (t[a].size && (t[a].off < V5_SB || t[a].off % 8 || !rafs_at(r, t[a].off, t[a].size))) {
            return rafs_fail(e, VND_CAUSE_FORMAT, "%s of %llu bytes at %llu does not fit a bootstrap of %llu bytes",
                             t[a].name, (unsigned long long)t[a].size, (unsigned long long)t[a].off,
                             (unsigned long long)r->size);
        }
        for (size_t b = 0; b < a; b++)
            if (t[a].size && t[b].size && t[a].off < t[b].off + t[b].size && t[b].off < t[a].off + t[a].size)
                return rafs_fail(e, VND_CAUSE_FORMAT, "its %s and %s overlap", t[b].name, t[a].name);
    }
    return 0;
}

/* Reads the records of the blob table, which vary in length, into the first max blobs. The number of records in the
 * table, or -EIO: it is malformed or has too many. */
static int64_t walk_blob_table(struct vnd_rafs *r, uint32_t max)
{
    const uint8_t *p = r->base + r->info.blob_table_offset, *end = p + r->info.blob_table_size_bytes;
    uint32_t n = 0;

    while (end - p > 8) {
        size_t len = strnlen((const char *)p + 8, (size_t)(end - p) - 8);

        if (n >= V5_BLOB_MAX || len > VND_ID_MAX)
            return -EIO;
        if (n < max) {
            memcpy(r->blobs[n].info.id, p + 8, len);
            r->blobs[n].info.id[len] = 0;
            r->blobs[n].info.prefetch_end = rafs_le32(p + 4) ? (uint64_t)rafs_le32(p) + rafs_le32(p + 4) : 0;
        }
        n++;
        p += 8 + len;
        if (p < end)
            p++;
        /* Zeroes fill the table up to 8 bytes. */
        if (end - p <= 8)
            break;
    }
    return n;
}

/* The codec of all blobs, as vnd_blob_info has it. Old images name none: they are lz4_block. */
static uint32_t compressor_of(uint64_t flags)
{
    static const struct {
        uint32_t flag, codec;
    } codecs[] = {
        { RAFS_FLAG_NONE, CODEC_NONE },
        { RAFS_FLAG_LZ4, CODEC_LZ4_BLOCK },
        { RAFS_FLAG_GZIP, CODEC_GZIP },
        { RAFS_FLAG_ZSTD, CODEC_ZSTD },
    };

    for (size_t i = 0; i < sizeof(codecs) / sizeof(codecs[0]); i++)
        if (flags & codecs[i].flag)
            return codecs[i].codec;
    return CODEC_LZ4_BLOCK;
}

static int read_blob(struct vnd_rafs *r, uint32_t k, const struct rafs_error *e)
{
    vnd_blob_info *i = &r->blobs[k].info;
    uint64_t flags = r->info.flags;

    i->index = k;
    i->chunk_size_bytes = r->info.chunk_size_bytes;
    i->compressor = compressor_of(flags);
    i->digester = flags & RAFS_FLAG_BLAKE3 || !(flags & RAFS_FLAG_SHA256) ? 0 : 1;
    if (!blob_id_valid(i->id))
        return rafs_fail(e, VND_CAUSE_FORMAT, "blob %u has an id that is not 1 to 64 of [0-9a-zA-Z_-]", k);
    for (uint32_t j = 0; j < k; j++)
        if (strcmp(r->blobs[j].info.id, i->id) == 0)
            return rafs_fail(e, VND_CAUSE_FORMAT, "blobs %u and %u have the same id", j, k);
    if (k < r->ext_count) {
        const uint8_t *x = r->base + r->ext_table + (uint64_t)k * EXT_ENTRY;

        i->chunk_count = rafs_le32(x);
        i->features = rafs_le32(x + 4) & (FEATURES_KNOWN | 0xffff0000u);
        i->uncompressed_size_bytes = rafs_le64(x + 8);
        i->compressed_size_bytes = rafs_le64(x + 16);
    }
    if (i->features & (RAFS_BLOB_EXTERNAL | RAFS_BLOB_ENCRYPTED | RAFS_BLOB_BATCH | RAFS_BLOB_ZRAN | RAFS_BLOB_TARFS |
                       RAFS_BLOB_INTERNAL)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "blob %u has features 0x%x, which RAFS v5 has no form for", k,
                         i->features);
    }
    if (i->chunk_count > RAFS_CHUNKS_PER_BLOB_MAX || i->compressed_size_bytes > RAFS_BLOB_CSIZE_MAX ||
        i->uncompressed_size_bytes > RAFS_BLOB_USIZE_MAX) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "extended blob table entry %u (%.16s...) holds values out of range", k,
                         i->id);
    }
    return 0;
}

static int read_blobs(struct vnd_rafs *r, const struct rafs_error *e)
{
    int64_t n = walk_blob_table(r, 0);
    int rc = 0;

    if (n < 0)
        return rafs_fail(e, VND_CAUSE_FORMAT, "its blob table is malformed, or has more than %d blobs", V5_BLOB_MAX);
    if (r->ext_count && r->ext_count != n) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "%llu blobs and %u entries in the extended blob table",
                         (unsigned long long)n, r->ext_count);
    }
    if (!n)
        return 0;
    r->blobs = calloc((size_t)n, sizeof(*r->blobs));
    if (!r->blobs)
        return rafs_no_memory(e);
    r->info.blob_count = (uint32_t)n;
    walk_blob_table(r, (uint32_t)n);
    for (uint32_t k = 0; k < (uint32_t)n && !rc; k++)
        rc = read_blob(r, k, e);
    return rc;
}

/* ---- chunk records */

/* Calls put for each chunk record that a file is read by. Inodes that overlap could name more records than the image has
 * room for; the walk ends after as many as it has room for. */
static int v5_records(struct vnd_rafs *r, uint32_t only_blob, rafs_put_record put, void *ctx)
{
    uint64_t left = r->size / RAFS_CHUNK_RECORD, number = 0;
    struct v5_inode n;
    int rc = 0;

    for (uint64_t slot = 1; slot <= r->slots && !rc; slot++) {
        if (v5_inode(r, slot, &n) || !S_ISREG(n.mode))
            continue;
        for (uint32_t k = 0; k < n.child_count && !rc; k++, number++) {
            const uint8_t *p = n.chunks + (uint64_t)k * RAFS_CHUNK_RECORD;
            struct blob_chunk c;
            uint32_t blob;

            if (!left--)
                return 0;
            if (only_blob != UINT32_MAX && rafs_le32(p + 32) != only_blob)
                continue;
            v5_decode_chunk(r, p, &blob, &c);
            if (!(c.flags & V5_CHUNK_HOLE))
                rc = put(ctx, number, blob, &c);
        }
    }
    return rc;
}

/* ---- numbering of chunks that have none */

static bool unnumbered(const struct vnd_rafs *r, uint32_t blob)
{
    return blob < r->info.blob_count && !r->blobs[blob].info.chunk_count;
}

static bool place_sane(const struct blob_chunk *c)
{
    return c->usize && c->usize <= RAFS_CHUNK_SIZE_MAX && c->csize <= RAFS_CHUNK_SIZE_MAX &&
           c->uoff <= RAFS_BLOB_USIZE_MAX - RAFS_CHUNK_SIZE_MAX && c->coff <= RAFS_BLOB_CSIZE_MAX - RAFS_CHUNK_SIZE_MAX;
}

struct numbering {
    struct vnd_rafs *r;
    struct v5_numbers *n; /* by blob */
    uint32_t *room;       /* by blob: how many records were counted */
};

static int count_record(void *ctx, uint64_t number, uint32_t blob, const struct blob_chunk *c)
{
    struct numbering *x = ctx;

    if (unnumbered(x->r, blob) && place_sane(c))
        x->room[blob]++;
    return 0;
}

static int collect_record(void *ctx, uint64_t number, uint32_t blob, const struct blob_chunk *c)
{
    struct numbering *x = ctx;
    vnd_blob_info *i;

    /* The file may have changed since the records were counted. */
    if (!unnumbered(x->r, blob) || !place_sane(c) || x->n[blob].count >= x->room[blob])
        return 0;
    i = &x->r->blobs[blob].info;
    x->n[blob].uoff[x->n[blob].count++] = c->uoff; /* NOLINT(clang-analyzer-core.NullDereference): has room */
    if (c->coff + c->csize > i->compressed_size_bytes)
        i->compressed_size_bytes = c->coff + c->csize;
    if (c->uoff + c->usize > i->uncompressed_size_bytes)
        i->uncompressed_size_bytes = c->uoff + c->usize;
    return 0;
}

static int compare_u64(const void *a, const void *b)
{
    uint64_t x, y;

    memcpy(&x, a, 8);
    memcpy(&y, b, 8);
    return (x > y) - (x < y);
}

static void sort_blob(struct v5_numbers *n)
{
    uint32_t used = 0;

    qsort(n->uoff, n->count, sizeof(*n->uoff), compare_u64);
    for (uint32_t i = 0; i < n->count; i++)
        if (!used || n->uoff[used - 1] != n->uoff[i])
            n->uoff[used++] = n->uoff[i];
    n->count = used;
}

/* Two walks over all records, whatever the number of blobs. */
static int collect_places(struct numbering *x)
{
    uint32_t blobs = x->r->info.blob_count;

    v5_records(x->r, UINT32_MAX, count_record, x);
    for (uint32_t k = 0; k < blobs; k++) {
        if (!x->room[k])
            continue;
        x->n[k].uoff = malloc(x->room[k] * sizeof(*x->n[k].uoff));
        if (!x->n[k].uoff)
            return -ENOMEM;
    }
    v5_records(x->r, UINT32_MAX, collect_record, x);
    for (uint32_t k = 0; k < blobs; k++)
        if (x->n[k].count)
            sort_blob(&x->n[k]);
    return 0;
}

static int number_chunks(struct vnd_rafs *r, const struct rafs_error *e)
{
    uint32_t blobs = r->info.blob_count, first = 0;
    struct numbering x = { .r = r };
    int rc;

    while (first < blobs && !unnumbered(r, first))
        first++;
    if (first == blobs)
        return 0;
    x.n = calloc(blobs, sizeof(*x.n));
    x.room = calloc(blobs, sizeof(*x.room));
    rc = x.n && x.room ? collect_places(&x) : -ENOMEM;
    free(x.room);
    r->numbers = x.n; /* freed by v5_close */
    if (rc)
        return rafs_no_memory(e);
    for (uint32_t k = first; k < blobs; k++) {
        if (!unnumbered(r, k))
            continue;
        r->blobs[k].info.chunk_count = x.n[k].count;
        if (x.n[k].count > RAFS_CHUNKS_PER_BLOB_MAX)
            return rafs_fail(e, VND_CAUSE_FORMAT, "blob %u has %u chunks, more than can be served", k, x.n[k].count);
    }
    return 0;
}

static int v5_open(struct vnd_rafs *r, const struct rafs_error *e)
{
    const uint8_t *first;
    struct v5_inode root;
    int rc;

    if (r->size < V5_SB) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "truncated: %llu bytes are no RAFS v5 bootstrap",
                         (unsigned long long)r->size);
    }
    if ((rc = read_superblock(r, e)) || (rc = check_tables(r, e)) || (rc = read_blobs(r, e)))
        return rc;
    /* The layout before 1.0 has no name at its place in the root (docs/rafs-format.md 2.9). */
    first = rafs_at(r, (uint64_t)rafs_le32(r->base + r->inode_table) << 3, V5_INODE);
    if (first && rafs_le16(first + 100) == 0 && rafs_le32(first + 52) >> 12 == S_IFDIR >> 12) {
        return rafs_fail(e, VND_CAUSE_FORMAT,
                         "its inodes are of a RAFS v5 layout from before version 1.0, which is "
                         "not supported: convert the image anew");
    }
    if (v5_inode(r, 1, &root) || !S_ISDIR(root.mode))
        return rafs_fail(e, VND_CAUSE_FORMAT, "the root inode is malformed or not a directory");
    return number_chunks(r, e);
}

static void v5_close(struct vnd_rafs *r)
{
    for (uint32_t k = 0; r->numbers && k < r->info.blob_count; k++)
        free(r->numbers[k].uoff);
    free(r->numbers);
}

/* ---- inode records */

static int v5_prefetch(struct vnd_rafs *r, uint64_t *inos, int max)
{
    int n = 0;

    for (uint32_t i = 0; i < r->info.prefetch_count && n < max; i++) {
        uint32_t ino = rafs_le32(r->base + r->info.prefetch_table_offset + 4ull * i);

        if (!ino)
            break;
        inos[n++] = ino;
    }
    return n;
}

const struct rafs_version rafs_v5 = {
    .name = "v5",
    .detect = v5_detect,
    .open = v5_open,
    .close = v5_close,
    .fs_ops = &v5_fs_ops,
    .chunk = v5_chunk,
    .records = v5_records,
    .prefetch = v5_prefetch,
    .check = v5_check,
};
