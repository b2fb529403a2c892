/* rafs/v6.c -- RAFS v6: superblocks and tables, checked once when an image is opened (docs/rafs-format.md 3.1 to 3.3,
 * 3.8, 3.9).
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "blob/cipher.h"
#include "rafs/v6.h"

#define BLOB_ENTRY 256
#define EROFS_COMPAT_RAFS 0x40000000u
#define EROFS_INCOMPAT_CHUNKED_FILE 0x4u
#define EROFS_INCOMPAT_DEVICE_TABLE 0x8u
#define BLOB_MAX 254 /* the kernel's device mask has no room for more, docs/rafs-format.md 3.6 */

/* ---- opening */

static bool v6_detect(const uint8_t *base, uint64_t size)
{
    return size >= V6_SB + 128 && rafs_le32(base + V6_SB) == V6_MAGIC;
}

static int fail_incompat(uint32_t bits, const struct rafs_error *e)
{
    static const char *const names[] = {
        "LZ4 0padding",
        "compression configurations or big pclusters",
        NULL,
        NULL,
        "tail packing of compressed data",
        "fragments",
        "xattr name prefixes",
        "48-bit layout",
        "metabox",
    };

    for (uint32_t i = 0; i < 32; i++) {
        if (bits & 1u << i) {
            const char *name = i < sizeof(names) / sizeof(names[0]) && names[i] ? names[i] : "unknown";

            return rafs_fail(e, VND_CAUSE_FORMAT, "needs EROFS incompatible feature 0x%x (%s), which is not supported",
                             1u << i, name);
        }
    }
    return 0;
}

struct table {
    const char *name;
    uint64_t off, size;
    uint32_t align, entry; /* bytes */
};

/* A table must be aligned, and lie in the file, behind the superblocks. */
static int check_table(const struct vnd_rafs *r, const struct table *t, const struct rafs_error *e)
{
    if (!t->size)
        return 0;
    if (t->off < V6_TABLES || t->off % t->align || t->size % t->entry || !rafs_at(r, t->off, t->size)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "%s of %llu bytes at %llu does not fit a bootstrap of %llu bytes",
                         t->name, (unsigned long long)t->size, (unsigned long long)t->off, (unsigned long long)r->size);
    }
    return 0;
}

static bool ranges_meet(uint64_t a, uint64_t a_len, uint64_t b, uint64_t b_len)
{
    return a_len && b_len && a < b + b_len && b < a + a_len;
}

static int read_superblock(struct vnd_rafs *r, const struct rafs_error *e)
{
    const uint8_t *sb = r->base + V6_SB;
    uint32_t compat = rafs_le32(sb + 8), incompat = rafs_le32(sb + 80), bits = sb[12];
    uint64_t root_off;
    int rc;

    if (!(compat & EROFS_COMPAT_RAFS))
        return rafs_fail(e, VND_CAUSE_FORMAT, "a plain EROFS image, not RAFS: it names no blobs to fetch");
    rc = fail_incompat(incompat & ~(EROFS_INCOMPAT_CHUNKED_FILE | EROFS_INCOMPAT_DEVICE_TABLE), e);
    if (rc)
        return rc;
    if (bits != 12 && bits != 9)
        return rafs_fail(e, VND_CAUSE_FORMAT, "block size 2^%u is not one of 512 and 4096", bits);
    if (r->size < 4096 || r->size & ((1u << bits) - 1)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "truncated: %llu bytes are not whole blocks",
                         (unsigned long long)r->size);
    }
    r->blkszbits = (uint8_t)bits;
    r->root_nid = rafs_le16(sb + 14);
    r->inos = rafs_le64(sb + 16);
    r->fs_blocks = rafs_le32(sb + 36);
    r->meta_off = (uint64_t)rafs_le32(sb + 40) << bits;
    r->info.meta_blkaddr = rafs_le32(sb + 40);
    r->info.block_size_bytes = 1u << bits;
    r->info.root_ino = r->root_nid;
    r->info.inode_count = r->inos;
    r->info.fs_version = 6;
    root_off = r->meta_off + (uint64_t)r->root_nid * 32;
    if (root_off < V6_TABLES || !rafs_at(r, root_off, 32)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "truncated: the root inode at %llu is not in %llu bytes",
                         (unsigned long long)root_off, (unsigned long long)r->size);
    }
    return 0;
}

/* Blob, chunk and prefetch table must be clear of each other and of the inodes. */
static int check_tables(struct vnd_rafs *r, const struct rafs_error *e)
{
    const vnd_rafs_info *i = &r->info;
    const struct table tables[] = {
        { "blob table", i->blob_table_offset, i->blob_table_size_bytes, 4096, BLOB_ENTRY },
        { "chunk table", i->chunk_table_offset, i->chunk_table_size_bytes, 4096, RAFS_CHUNK_RECORD },
        { "prefetch table", i->prefetch_table_offset, i->prefetch_table_size_bytes, 4, 4 },
    };
    uint64_t root_off = r->meta_off + (uint64_t)r->root_nid * 32;
    int rc = 0;

    for (size_t k = 0; k < sizeof(tables) / sizeof(tables[0]) && !rc; k++)
        rc = check_table(r, &tables[k], e);
    if (rc)
        return rc;
    r->inode_end = r->size;
    if (i->chunk_table_size_bytes && i->chunk_table_offset > root_off)
        r->inode_end = i->chunk_table_offset;
    if (ranges_meet(i->blob_table_offset, i->blob_table_size_bytes, i->chunk_table_offset, i->chunk_table_size_bytes) ||
        ranges_meet(i->blob_table_offset, i->blob_table_size_bytes, i->prefetch_table_offset,
                    i->prefetch_table_size_bytes) ||
        ranges_meet(i->chunk_table_offset, i->chunk_table_size_bytes, i->prefetch_table_offset,
                    i->prefetch_table_size_bytes)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "its blob, chunk and prefetch tables overlap");
    }
    if (ranges_meet(root_off, r->inode_end - root_off, i->blob_table_offset, i->blob_table_size_bytes) ||
        ranges_meet(root_off, r->inode_end - root_off, i->prefetch_table_offset, i->prefetch_table_size_bytes)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "its tables overlap the inodes");
    }
    return 0;
}

static int read_ext_superblock(struct vnd_rafs *r, const struct rafs_error *e)
{
    const uint8_t *x = r->base + V6_EXT_SB;
    vnd_rafs_info *i = &r->info;
    uint64_t unknown;
    uint32_t codec;

    i->flags = rafs_le64(x);
    unknown = i->flags & ~(RAFS_FLAG_KNOWN | RAFS_FLAG_COMPAT);
    if (unknown) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "needs RAFS feature 0x%llx, which is unknown",
                         (unsigned long long)unknown);
    }
    codec = (uint32_t)i->flags & RAFS_FLAG_COMPRESS_MASK;
    if (!codec || codec & (codec - 1)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "flags 0x%llx name not exactly one compressor",
                         (unsigned long long)i->flags);
    }
    if (!(i->flags & RAFS_FLAG_BLAKE3) == !(i->flags & RAFS_FLAG_SHA256)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "flags 0x%llx name not exactly one digest algorithm",
                         (unsigned long long)i->flags);
    }
    i->chunk_size_bytes = rafs_le32(x + 20);
    if (i->chunk_size_bytes < 4096 || i->chunk_size_bytes > RAFS_CHUNK_SIZE_MAX ||
        i->chunk_size_bytes & (i->chunk_size_bytes - 1)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "chunk size %u is no power of two from 4096 to 16777216",
                         i->chunk_size_bytes);
    }
    r->chunk_bits = (uint8_t)__builtin_ctz(i->chunk_size_bytes);
    i->blob_table_offset = rafs_le64(x + 8);
    i->blob_table_size_bytes = rafs_le32(x + 16);
    i->chunk_table_offset = rafs_le64(x + 24);
    i->chunk_table_size_bytes = rafs_le64(x + 32);
    i->prefetch_table_offset = rafs_le64(x + 40);
    i->prefetch_table_size_bytes = rafs_le32(x + 48);
    if (!i->prefetch_table_offset)
        i->prefetch_table_size_bytes = 0; /* old empty images have a size without a table */
    i->blob_count = (uint32_t)(i->blob_table_size_bytes / BLOB_ENTRY);
    i->prefetch_count = (uint32_t)(i->prefetch_table_size_bytes / 4);
    return check_tables(r, e);
}

/* Copies an id field of 64 bytes, NUL padded. False if anything but NULs follows the first NUL. */
static bool copy_id(char out[VND_ID_MAX + 1], const uint8_t *field)
{
    size_t len = strnlen((const char *)field, VND_ID_MAX);

    memcpy(out, field, len);
    out[len] = 0;
    for (size_t i = len; i < VND_ID_MAX; i++)
        if (field[i])
            return false;
    return true;
}

/* The key and the tweak of an encrypted blob stand where another blob has the digest of its chunk table's blob. */
static int read_cipher(vnd_blob_info *i, const uint8_t *b, const struct rafs_error *e)
{
    static const char *const names[] = { "none", "AES-128-XTS", "AES-256-XTS", "AES-256-GCM" };

    i->cipher = rafs_le32(b + 216);
    if (i->cipher > 1) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "blob %u is encrypted with %s, which is not supported", i->index,
                         i->cipher < 4 ? names[i->cipher] : "an unknown cipher");
    }
    if (!i->cipher != !(i->features & RAFS_BLOB_ENCRYPTED)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "blob %u is encrypted by its features or its cipher, not by both",
                         i->index);
    }
    if (!i->cipher)
        return 0;
    memcpy(i->cipher_key, b + 168, sizeof(i->cipher_key));
    memcpy(i->cipher_iv, b + 200, sizeof(i->cipher_iv));
    if (!cipher_key_valid(i->cipher_key))
        return rafs_fail(e, VND_CAUSE_FORMAT, "blob %u has a key of two equal halves", i->index);
    return 0;
}

/* A blob that another tool made (an OCI layer) has its chunk table in another blob, which is named by its digest. */
static int read_meta_id(const struct vnd_rafs *r, vnd_blob_info *i, const uint8_t *b, const struct rafs_error *e)
{
    static const uint8_t unset[32];

    if (i->features & RAFS_BLOB_ZRAN && !(i->features & RAFS_BLOB_CHUNK_INFO_V2))
        return rafs_fail(e, VND_CAUSE_FORMAT, "blob %u is a gzip layer without chunk infos of version 2", i->index);
    if (!(i->features & RAFS_BLOB_SEPARATE) || i->cipher)
        return 0;
    if (memcmp(b + 168, unset, sizeof(unset)) == 0)
        return 0;
    for (int k = 0; k < 32; k++) {
        static const char hex[] = "0123456789abcdef";

        i->meta_id[2 * k] = hex[b[168 + k] >> 4];
        i->meta_id[2 * k + 1] = hex[b[168 + k] & 15];
    }
    return 0;
}

static int read_blob(struct vnd_rafs *r, uint32_t k, const uint8_t *b, const struct rafs_error *e)
{
    vnd_blob_info *i = &r->blobs[k].info;
    bool tarfs = r->info.flags & RAFS_FLAG_TARFS;
    int rc;

    i->index = k;
    i->chunk_size_bytes = rafs_le32(b + 68);
    i->chunk_count = rafs_le32(b + 72);
    i->compressor = rafs_le32(b + 76);
    i->digester = rafs_le32(b + 80);
    i->features = rafs_le32(b + 84);
    i->compressed_size_bytes = rafs_le64(b + 88);
    i->uncompressed_size_bytes = rafs_le64(b + 96);
    i->ci_compressor = rafs_le32(b + 108);
    i->ci_offset = rafs_le64(b + 112);
    i->ci_csize_bytes = rafs_le64(b + 120);
    i->ci_usize_bytes = rafs_le64(b + 128);
    if (!copy_id(i->id, b) || !blob_id_valid(i->id))
        return rafs_fail(e, VND_CAUSE_FORMAT, "blob %u has an id that is not 1 to 64 of [0-9a-zA-Z_-]", k);
    for (uint32_t j = 0; j < k; j++)
        if (strcmp(r->blobs[j].info.id, i->id) == 0)
            return rafs_fail(e, VND_CAUSE_FORMAT, "blobs %u and %u have the same id", j, k);
    if (i->features & (RAFS_BLOB_UNKNOWN | RAFS_BLOB_INTERNAL)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "blob %u needs feature 0x%x, which is unknown", k,
                         i->features & (RAFS_BLOB_UNKNOWN | RAFS_BLOB_INTERNAL));
    }
    if ((rc = read_cipher(i, b, e)) || (rc = read_meta_id(r, i, b, e)))
        return rc;
    if (rafs_le32(b + 64) != k || i->chunk_size_bytes != r->info.chunk_size_bytes || i->compressor > 3 ||
        i->digester > 1 || i->ci_compressor > 3 || i->chunk_count > RAFS_CHUNKS_PER_BLOB_MAX ||
        i->compressed_size_bytes > RAFS_BLOB_CSIZE_MAX || i->uncompressed_size_bytes > RAFS_BLOB_USIZE_MAX ||
        (!tarfs && i->ci_csize_bytes > i->ci_usize_bytes) || i->ci_offset > RAFS_BLOB_CSIZE_MAX) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "blob table entry %u (%.16s...) holds values out of range", k, i->id);
    }
    return 0;
}

/* Blob table and device slots must agree: the kernel goes by the slots, this reader by the table. */
static int read_blobs(struct vnd_rafs *r, const struct rafs_error *e)
{
    const uint8_t *sb = r->base + V6_SB;
    uint64_t slots = (uint64_t)rafs_le16(sb + V6_SB_SLOTS) * V6_DEVICE, devices = rafs_le16(sb + 86);
    uint32_t n = r->info.blob_count;
    int rc;

    if (n > BLOB_MAX || devices != n) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "%u blobs and %llu devices: must be equal, and at most %d", n,
                         (unsigned long long)devices, BLOB_MAX);
    }
    if (!n)
        return 0;
    if (slots < V6_TABLES || !rafs_at(r, slots, devices * V6_DEVICE) ||
        ranges_meet(slots, devices * V6_DEVICE, r->info.blob_table_offset, r->info.blob_table_size_bytes)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "its device table does not fit");
    }
    r->blobs = calloc(n, sizeof(*r->blobs));
    if (!r->blobs)
        return rafs_no_memory(e);
    for (uint32_t k = 0; k < n; k++) {
        const uint8_t *entry = r->base + r->info.blob_table_offset + (uint64_t)k * BLOB_ENTRY;

        if ((rc = read_blob(r, k, entry, e)))
            return rc;
        if (memcmp(entry, r->base + slots + (uint64_t)k * V6_DEVICE, VND_ID_MAX) != 0)
            return rafs_fail(e, VND_CAUSE_FORMAT, "device slot %u and blob table entry %u name different blobs", k, k);
    }
    return 0;
}

static int v6_open(struct vnd_rafs *r, const struct rafs_error *e)
{
    struct v6_inode root;
    int rc;

    if ((rc = read_superblock(r, e)) || (rc = read_ext_superblock(r, e)) || (rc = read_blobs(r, e)))
        return rc;
    if (v6_inode(r, r->root_nid, &root) || !S_ISDIR(root.mode))
        return rafs_fail(e, VND_CAUSE_FORMAT, "the root inode is not a directory");
    return 0;
}

int v6_flat_place(const struct vnd_rafs *r, uint32_t k, uint64_t *at, uint64_t *bytes)
{
    uint64_t slots = (uint64_t)rafs_le16(r->base + V6_SB + V6_SB_SLOTS) * V6_DEVICE;
    const uint8_t *slot = rafs_at(r, slots + (uint64_t)k * V6_DEVICE, V6_DEVICE);

    if (!slot)
        return -EIO; /* it was there when the image was opened */
    *bytes = (uint64_t)rafs_le32(slot + V6_DEVICE_BLOCKS) << r->blkszbits;
    *at = (uint64_t)rafs_le32(slot + V6_DEVICE_MAPPED) << r->blkszbits;
    return 0;
}

/* ---- tables */

static void decode_record(const uint8_t *p, uint32_t *blob, struct blob_chunk *out)
{
    *blob = rafs_le32(p + 32);
    *out = (struct blob_chunk){ .flags = rafs_le32(p + 36),
                                .csize = rafs_le32(p + 40),
                                .usize = rafs_le32(p + 44),
                                .coff = rafs_le64(p + 48),
                                .uoff = rafs_le64(p + 56),
                                .index = rafs_le32(p + 72),
                                .crc32 = rafs_le32(p + 76) };
    memcpy(out->digest, p, sizeof(out->digest));
}

static int v6_record(struct vnd_rafs *r, uint64_t i, uint32_t *blob, struct blob_chunk *out)
{
    if (i >= r->info.chunk_table_size_bytes / RAFS_CHUNK_RECORD)
        return -ENOENT;
    decode_record(r->base + r->info.chunk_table_offset + i * RAFS_CHUNK_RECORD, blob, out);
    return 0;
}

static int v6_records(struct vnd_rafs *r, uint32_t only_blob, rafs_put_record put, void *ctx)
{
    uint64_t n = r->info.chunk_table_size_bytes / RAFS_CHUNK_RECORD;
    int rc = 0;

    if (r->info.flags & RAFS_FLAG_TARFS)
        return v6_walk_chunks(r, only_blob, put, ctx);
    for (uint64_t i = 0; i < n && !rc; i++) {
        const uint8_t *p = r->base + r->info.chunk_table_offset + i * RAFS_CHUNK_RECORD;
        struct blob_chunk c;
        uint32_t blob;

        if (only_blob != UINT32_MAX && rafs_le32(p + 32) != only_blob)
            continue;
        decode_record(p, &blob, &c);
        rc = only_blob == UINT32_MAX || blob == only_blob ? put(ctx, i, blob, &c) : 0;
    }
    return rc;
}

static int v6_prefetch(struct vnd_rafs *r, uint64_t *inos, int max)
{
    int n = 0;

    for (uint32_t i = 0; i < r->info.prefetch_count && n < max; i++) {
        uint32_t nid = rafs_le32(r->base + r->info.prefetch_table_offset + 4ull * i);

        if (!nid)
            break;
        inos[n++] = nid;
    }
    return n;
}

const struct rafs_version rafs_v6 = {
    .name = "v6",
    .detect = v6_detect,
    .open = v6_open,
    .fs_ops = &v6_fs_ops,
    .chunk = v6_chunk,
    .records = v6_records,
    .record = v6_record,
    .prefetch = v6_prefetch,
    .check = v6_check,
};
