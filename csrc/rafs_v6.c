/* rafs_v6.c -- RAFS v6: EROFS inodes and directories, chunk-based files over a table of blobs. rafs-format 3.
 *
 * The kernel's EROFS and this reader must agree on every byte, so layouts follow the kernel's rules where they are
 * wider than what builders emit.
 */
#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "rafs_v6.h"

#define SB 1024
#define EXT_SB 1152
#define DEVICE_SLOTS_UNIT 128
#define DEVICE_SLOT 128
#define BLOB_ENTRY 256
#define EROFS_MAGIC 0xe0f5e1e2u
#define EROFS_COMPAT_RAFS 0x40000000u
#define EROFS_INCOMPAT_CHUNKED_FILE 0x4u
#define EROFS_INCOMPAT_DEVICE_TABLE 0x8u
#define BLOB_MAX 254                        /* the kernel's device mask hides the rest, rafs-format 3.6 */
#define CHUNKS_PER_BLOB_MAX (1u << 24)

/* ---- opening */

static int v6_detect(const uint8_t *base, uint64_t size)
{
    return size >= SB + 128 && rafs_le32(base + SB) == EROFS_MAGIC;
}

static int fail_incompat(uint32_t bits, const struct rafs_error *e)
{
    static const char *const names[] = {
        "LZ4 0padding", "compression configurations or big pclusters", NULL, NULL, "tail packing of compressed data",
        "fragments", "xattr name prefixes", "48-bit layout", "metabox",
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

/* A table must lie, aligned, in the file and clear of the inodes. */
static int check_table(const struct vnd_rafs *r, const char *name, uint64_t off, uint64_t size, uint32_t align,
                       uint32_t unit, const struct rafs_error *e)
{
    if (!size) {
        return 0;
    }
    if (off < EXT_SB + 256 || off % align || size % unit || !rafs_at(r, off, size)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "%s of %llu bytes at %llu does not fit a bootstrap of %llu bytes", name,
                         (unsigned long long)size, (unsigned long long)off, (unsigned long long)r->size);
    }
    return 0;
}

static bool ranges_meet(uint64_t a, uint64_t a_len, uint64_t b, uint64_t b_len)
{
    return a_len && b_len && a < b + b_len && b < a + a_len;
}

static int read_superblock(struct vnd_rafs *r, const struct rafs_error *e)
{
    const uint8_t *sb = r->base + SB;
    uint32_t compat = rafs_le32(sb + 8), incompat = rafs_le32(sb + 80), bits = sb[12];
    uint64_t root_off;

    if (!(compat & EROFS_COMPAT_RAFS)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "a plain EROFS image, not RAFS: it names no blobs to fetch");
    }
    if (fail_incompat(incompat & ~(EROFS_INCOMPAT_CHUNKED_FILE | EROFS_INCOMPAT_DEVICE_TABLE), e)) {
        return -1;
    }
    if (bits != 12 && bits != 9) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "block size 2^%u is not one of 512 and 4096", bits);
    }
    if (r->size < 4096 || r->size & ((1u << bits) - 1)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "truncated: %llu bytes are not whole blocks", (unsigned long long)r->size);
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
    if (root_off < EXT_SB + 256 || !rafs_at(r, root_off, 32)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "truncated: the root inode at %llu is not in %llu bytes",
                         (unsigned long long)root_off, (unsigned long long)r->size);
    }
    return 0;
}

static int read_ext_superblock(struct vnd_rafs *r, const struct rafs_error *e)
{
    const uint8_t *x = r->base + EXT_SB;
    vnd_rafs_info *i = &r->info;
    uint64_t unknown, root_off = r->meta_off + (uint64_t)r->root_nid * 32;
    uint32_t codec;

    i->flags = rafs_le64(x);
    unknown = i->flags & ~(RAFS_FLAG_KNOWN | RAFS_FLAG_COMPAT);
    if (unknown) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "needs RAFS feature 0x%llx, which is unknown", (unsigned long long)unknown);
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
    if (!i->prefetch_table_offset) {
        i->prefetch_table_size_bytes = 0;       /* seen in old empty images */
    }
    i->blob_count = (uint32_t)(i->blob_table_size_bytes / BLOB_ENTRY);
    i->prefetch_count = (uint32_t)(i->prefetch_table_size_bytes / 4);
    if (check_table(r, "blob table", i->blob_table_offset, i->blob_table_size_bytes, 4096, BLOB_ENTRY, e) ||
        check_table(r, "chunk table", i->chunk_table_offset, i->chunk_table_size_bytes, 4096, RAFS_CHUNK_RECORD, e) ||
        check_table(r, "prefetch table", i->prefetch_table_offset, i->prefetch_table_size_bytes, 4, 4, e)) {
        return -1;
    }
    r->inode_end = r->size;
    if (i->chunk_table_size_bytes && i->chunk_table_offset > root_off) {
        r->inode_end = i->chunk_table_offset;
    }
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

/* Copies an id field of 64 bytes, NUL padded; false if there is more behind the padding. */
static bool copy_id(char out[VND_ID_MAX + 1], const uint8_t *field)
{
    size_t len = strnlen((const char *)field, VND_ID_MAX);

    memcpy(out, field, len);
    out[len] = 0;
    for (size_t i = len; i < VND_ID_MAX; i++) {
        if (field[i]) {
            return false;
        }
    }
    return true;
}

static int read_blob(struct vnd_rafs *r, uint32_t k, const uint8_t *b, const struct rafs_error *e)
{
    vnd_blob_info *i = &r->blobs[k].info;
    bool tarfs = r->info.flags & RAFS_FLAG_TARFS;

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
    if (!copy_id(i->id, b) || !rafs_id_valid(i->id)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "blob %u has an id that is not 1 to 64 of [0-9a-zA-Z_-]", k);
    }
    for (uint32_t j = 0; j < k; j++) {
        if (strcmp(r->blobs[j].info.id, i->id) == 0) {
            return rafs_fail(e, VND_CAUSE_FORMAT, "blobs %u and %u have the same id", j, k);
        }
    }
    if (i->features & (RAFS_BLOB_UNKNOWN | RAFS_BLOB_INTERNAL)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "blob %u needs feature 0x%x, which is unknown", k,
                         i->features & (RAFS_BLOB_UNKNOWN | RAFS_BLOB_INTERNAL));
    }
    if (i->features & RAFS_BLOB_ENCRYPTED || rafs_le32(b + 216) != 0) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "blob %u is encrypted, which is not supported yet", k);
    }
    if (rafs_le32(b + 64) != k || i->chunk_size_bytes != r->info.chunk_size_bytes || i->compressor > 3 ||
        i->digester > 1 || i->ci_compressor > 3 || i->chunk_count > CHUNKS_PER_BLOB_MAX ||
        i->compressed_size_bytes > RAFS_BLOB_CSIZE_MAX || i->uncompressed_size_bytes > RAFS_BLOB_USIZE_MAX ||
        (!tarfs && i->ci_csize_bytes > i->ci_usize_bytes) || i->ci_offset > RAFS_BLOB_CSIZE_MAX) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "blob table entry %u (%.16s...) holds values out of range", k, i->id);
    }
    return 0;
}

/* Blob table against device slots: the kernel goes by one, we by the other. */
static int read_blobs(struct vnd_rafs *r, const struct rafs_error *e)
{
    const uint8_t *sb = r->base + SB;
    uint64_t slots = (uint64_t)rafs_le16(sb + 88) * DEVICE_SLOTS_UNIT, devices = rafs_le16(sb + 86);
    uint32_t n = r->info.blob_count;

    if (n > BLOB_MAX || devices != n) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "%u blobs and %llu devices: must be equal, and at most %d", n,
                         (unsigned long long)devices, BLOB_MAX);
    }
    if (!n) {
        return 0;
    }
    if (slots < EXT_SB + 256 || !rafs_at(r, slots, devices * DEVICE_SLOT) ||
        ranges_meet(slots, devices * DEVICE_SLOT, r->info.blob_table_offset, r->info.blob_table_size_bytes)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "its device table does not fit");
    }
    r->blobs = calloc(n, sizeof(*r->blobs));
    if (!r->blobs) {
        return rafs_fail(e, VND_CAUSE_IO, "out of memory");
    }
    for (uint32_t k = 0; k < n; k++) {
        const uint8_t *entry = r->base + r->info.blob_table_offset + (uint64_t)k * BLOB_ENTRY;

        if (read_blob(r, k, entry, e)) {
            return -1;
        }
        if (memcmp(entry, r->base + slots + (uint64_t)k * DEVICE_SLOT, VND_ID_MAX) != 0) {
            return rafs_fail(e, VND_CAUSE_FORMAT, "device slot %u and blob table entry %u name different blobs", k, k);
        }
    }
    return 0;
}

static int v6_open(struct vnd_rafs *r, const struct rafs_error *e)
{
    struct v6_inode root;

    if (read_superblock(r, e) || read_ext_superblock(r, e) || read_blobs(r, e)) {
        return -1;
    }
    if (v6_inode(r, r->root_nid, &root) || !S_ISDIR(root.mode)) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "the root inode is not a directory");
    }
    return 0;
}

/* ---- inodes */

int v6_inode(const struct vnd_rafs *r, uint64_t nid, struct v6_inode *out)
{
    uint64_t off, head;
    uint32_t format, icount;
    const uint8_t *p;

    if (nid > r->inode_end / 32) {
        return -EIO;
    }
    off = r->meta_off + nid * 32;
    if (off < EXT_SB + 256 || off > r->inode_end || r->inode_end - off < 32) {
        return -EIO;
    }
    p = r->base + off;
    format = rafs_le16(p);
    head = format & 1 ? 64 : 32;
    if (r->inode_end - off < head || format & ~0xfu) {
        return -EIO;
    }
    icount = rafs_le16(p + 2);
    *out = (struct v6_inode){ .nid = nid, .off = off, .layout = format >> 1 & 7, .mode = rafs_le16(p + 4),
                              .u = rafs_le32(p + 16), .head = (uint32_t)head,
                              .xattr_len = icount ? 12 + (icount - 1) * 4 : 0 };
    if (format & 1) {
        out->size = rafs_le64(p + 8);
        out->uid = rafs_le32(p + 24);
        out->gid = rafs_le32(p + 28);
        out->mtime = rafs_le64(p + 32);
        out->mtime_nsec = rafs_le32(p + 40);
        out->nlink = rafs_le32(p + 44);
    } else {
        out->nlink = rafs_le16(p + 6);
        out->size = rafs_le32(p + 8);
        out->uid = rafs_le16(p + 24);
        out->gid = rafs_le16(p + 26);
        out->mtime = rafs_le64(r->base + SB + 24);     /* the image's build time */
        out->mtime_nsec = rafs_le32(r->base + SB + 32);
    }
    if (out->size > INT64_MAX || (out->layout != V6_FLAT_PLAIN && out->layout != V6_FLAT_INLINE &&
                                  out->layout != V6_CHUNKED) ||
        r->inode_end - off - head < out->xattr_len || !(out->mode & S_IFMT)) {
        return -EIO;
    }
    if (!(r->info.flags & RAFS_FLAG_EXPLICIT_UID_GID)) {
        out->uid = r->own_uid;
        out->gid = r->own_gid;
    }
    return 0;
}

/* Block b of a flat inode's data: its bytes and their number, NULL where the image lies. */
static const uint8_t *flat_block(const struct vnd_rafs *r, const struct v6_inode *n, uint64_t b, uint32_t *len)
{
    uint64_t blksz = 1ull << r->blkszbits, at = b << r->blkszbits, off;

    *len = (uint32_t)(n->size - at < blksz ? n->size - at : blksz);
    if (n->layout == V6_FLAT_INLINE && n->size - at <= blksz) {
        off = n->off + n->head + n->xattr_len;
        if (off > r->inode_end || *len > r->inode_end - off) {
            return NULL;
        }
        return r->base + off;
    }
    if (n->layout == V6_CHUNKED) {
        return NULL;
    }
    off = ((uint64_t)n->u + b) << r->blkszbits;
    return rafs_at(r, off, *len);
}

static void fill_attr(const struct v6_inode *n, vnd_attr *out)
{
    *out = (vnd_attr){
        .ino = n->nid, .size_bytes = n->size, .blocks = (n->size + 511) / 512, .mtime_s = n->mtime,
        .mtime_nsec = n->mtime_nsec, .mode = n->mode, .nlink = n->nlink, .uid = n->uid, .gid = n->gid,
        .rdev = S_ISCHR(n->mode) || S_ISBLK(n->mode) ? n->u : 0,
    };
}

static int v6_getattr(struct fs *fs, uint64_t ino, vnd_attr *out)
{
    struct v6_inode n;
    int rc = v6_inode((struct vnd_rafs *)fs, ino, &n);

    if (!rc) {
        fill_attr(&n, out);
    }
    return rc;
}

/* ---- directories */

int v6_dir_open(const struct vnd_rafs *r, uint64_t nid, struct v6_inode *n, uint64_t *blocks)
{
    int rc = v6_inode(r, nid, n);

    if (rc) {
        return rc;
    }
    if (!S_ISDIR(n->mode)) {
        return -ENOTDIR;
    }
    *blocks = (n->size + (1ull << r->blkszbits) - 1) >> r->blkszbits;
    return n->layout == V6_CHUNKED ? -EIO : 0;
}

int v6_dir_block(const struct vnd_rafs *r, const struct v6_inode *n, uint64_t b, struct v6_block *out)
{
    uint32_t first;

    out->base = flat_block(r, n, b, &out->len);
    if (!out->base || out->len < V6_DIRENT) {
        return -EIO;
    }
    first = rafs_le16(out->base + 8);
    if (!first || first % V6_DIRENT || first > out->len) {
        return -EIO;
    }
    out->count = first / V6_DIRENT;
    return 0;
}

int v6_dir_entry(const struct v6_block *b, uint32_t k, struct v6_entry *out)
{
    const uint8_t *d = b->base + k * V6_DIRENT;
    uint32_t start = rafs_le16(d + 8), end;

    if (start < b->count * V6_DIRENT || start > b->len) {
        return -EIO;
    }
    if (k + 1 < b->count) {
        end = rafs_le16(d + V6_DIRENT + 8);
        if (end > b->len || end < start) {
            return -EIO;
        }
    } else {
        end = start + (uint32_t)strnlen((const char *)b->base + start, b->len - start);
    }
    out->nid = rafs_le64(d);
    out->file_type = d[10];
    out->name = (const char *)b->base + start;
    out->len = end - start;
    return out->len == 0 || out->len > RAFS_NAME_MAX ? -EIO : 0;
}

static int name_compare(const char *a, uint32_t a_len, const struct v6_entry *b)
{
    int c = memcmp(a, b->name, a_len < b->len ? a_len : b->len);

    return c ? c : (a_len > b->len) - (a_len < b->len);
}

/* Binary search for the last block whose first name is not above the wanted one, then in that block. */
static int dir_find(const struct vnd_rafs *r, const struct v6_inode *dir, uint64_t blocks, const char *name,
                    uint32_t len, struct v6_entry *out)
{
    uint64_t lo = 0, hi = blocks;
    struct v6_block b, best = { 0 };
    uint32_t a = 1, z;
    int rc, c;

    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;

        rc = v6_dir_block(r, dir, mid, &b);
        rc = rc ? rc : v6_dir_entry(&b, 0, out);
        if (rc) {
            return rc;
        }
        c = name_compare(name, len, out);
        if (c == 0) {
            return 0;
        }
        if (c < 0) {
            hi = mid;
        } else {
            lo = mid + 1;
            best = b;
        }
    }
    for (z = best.count; a < z;) {
        uint32_t mid = a + (z - a) / 2;

        rc = v6_dir_entry(&best, mid, out);
        if (rc) {
            return rc;
        }
        c = name_compare(name, len, out);
        if (c == 0) {
            return 0;
        }
        if (c < 0) {
            z = mid;
        } else {
            a = mid + 1;
        }
    }
    return -ENOENT;
}

static int v6_lookup(struct fs *fs, uint64_t dir, const char *name, size_t len, vnd_attr *out)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct v6_inode n;
    struct v6_entry entry;
    uint64_t blocks;
    int rc;

    if (len == 1 && name[0] == '.') {
        return v6_getattr(fs, dir, out);
    }
    rc = v6_dir_open(r, dir, &n, &blocks);
    if (!rc) {
        rc = dir_find(r, &n, blocks, name, (uint32_t)len, &entry);
    }
    if (!rc) {
        rc = v6_inode(r, entry.nid, &n);
    }
    if (!rc && len == 2 && name[0] == '.' && name[1] == '.' && !S_ISDIR(n.mode)) {
        rc = -EIO;
    }
    if (!rc) {
        fill_attr(&n, out);
    }
    return rc;
}

static const uint8_t dirent_types[8] = { DT_UNKNOWN, DT_REG, DT_DIR, DT_CHR, DT_BLK, DT_FIFO, DT_SOCK, DT_LNK };

/* Cookies: block << 10 | entry, of the entry to go on with (a block has at most 341); 0 = the first. */
static int v6_readdir(struct fs *fs, uint64_t dir, uint64_t off, int want_attr, fs_dir_put put, void *ctx)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct v6_inode n, child;
    struct v6_block b;
    struct v6_entry entry;
    uint64_t blocks;
    uint32_t k = off & 1023;
    vnd_attr attr;
    int rc = v6_dir_open(r, dir, &n, &blocks);

    for (uint64_t at = off >> 10; !rc && at < blocks; at++, k = 0) {
        rc = v6_dir_block(r, &n, at, &b);
        for (; !rc && k < b.count; k++) {
            uint64_t next = k + 1 < b.count ? at << 10 | (k + 1) : (at + 1) << 10;
            bool dots;

            rc = v6_dir_entry(&b, k, &entry);
            if (rc) {
                break;
            }
            if (memchr(entry.name, '/', entry.len) || memchr(entry.name, 0, entry.len)) {
                return -EIO;
            }
            dots = entry.name[0] == '.' && (entry.len == 1 || (entry.len == 2 && entry.name[1] == '.'));
            if (want_attr && !dots) {
                rc = v6_inode(r, entry.nid, &child);
                if (rc) {
                    break;
                }
                fill_attr(&child, &attr);
            }
            if (put(ctx, entry.nid, entry.name, entry.len, entry.file_type < 8 ? dirent_types[entry.file_type] : 0,
                    next, want_attr && !dots ? &attr : NULL)) {
                return 0;
            }
        }
    }
    return rc;
}

/* ---- symlinks, xattrs */

static int64_t v6_readlink(struct fs *fs, uint64_t ino, char *buf, size_t cap)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct v6_inode n;
    uint32_t len;
    int rc = v6_inode(r, ino, &n);

    if (rc) {
        return rc;
    }
    if (!S_ISLNK(n.mode)) {
        return -EINVAL;
    }
    if (!n.size || n.size > RAFS_SYMLINK_MAX) {
        return -EIO;
    }
    if (n.size > cap) {
        return -ERANGE;
    }
    for (uint64_t b = 0; b << r->blkszbits < n.size; b++) {
        const uint8_t *p = flat_block(r, &n, b, &len);

        if (!p || memchr(p, 0, len)) {
            return -EIO;
        }
        memcpy(buf + (b << r->blkszbits), p, len);
    }
    return (int64_t)n.size;
}

static int v6_listxattr(struct fs *fs, uint64_t ino, char *buf, size_t cap, size_t *need)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct v6_inode n;
    int rc = v6_inode(r, ino, &n);

    return rc ? rc : rafs_xattr_list(r->base + n.off + n.head, n.xattr_len, buf, cap, need);
}

static int v6_getxattr(struct fs *fs, uint64_t ino, const char *name, size_t len, char *buf, size_t cap, size_t *need)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct v6_inode n;
    int rc = v6_inode(r, ino, &n);

    return rc ? rc : rafs_xattr_get(r->base + n.off + n.head, n.xattr_len, name, len, buf, cap, need);
}

/* ---- file data */

int v6_chunk_at(const struct vnd_rafs *r, const struct v6_inode *n, uint64_t k, struct rafs_chunk *out)
{
    uint64_t array = (n->off + n->head + n->xattr_len + 7) & ~7ull, at, start = k << r->chunk_bits;
    const uint8_t *p;
    uint32_t device;

    if (k > r->size / 8) {
        return -EIO;
    }
    at = array + k * 8;
    if (at > r->inode_end || r->inode_end - at < 8) {
        return -EIO;
    }
    p = r->base + at;
    device = rafs_le16(p + 2);
    out->blob = (device & 0xff) - 1;        /* 0 becomes too large */
    out->index = rafs_le16(p) | (device >> 8) << 16;
    out->uoff = (uint64_t)rafs_le32(p + 4) << r->blkszbits;
    out->size = (uint32_t)(n->size - start < r->info.chunk_size_bytes ? n->size - start : r->info.chunk_size_bytes);
    if (out->blob >= r->info.blob_count) {
        return -EIO;
    }
    /* An index in an unfit table would be as good as none: the store looks the chunk up by it. */
    if (!(r->info.flags & RAFS_FLAG_TARFS) && out->index >= r->blobs[out->blob].info.chunk_count) {
        return -EIO;
    }
    return 0;
}

static int file_inode(const struct vnd_rafs *r, uint64_t ino, struct v6_inode *n)
{
    int rc = v6_inode(r, ino, n);

    if (rc) {
        return rc;
    }
    if (!S_ISREG(n->mode)) {
        return S_ISDIR(n->mode) ? -EISDIR : -EINVAL;
    }
    return n->layout == V6_CHUNKED || n->size == 0 ? 0 : -EIO;
}

static int v6_extents(struct fs *fs, uint64_t ino, uint64_t off, uint32_t len, struct extent *ext, int max,
                      uint32_t *got)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct rafs_chunk c;
    struct v6_inode n;
    int count = 0, rc = file_inode(r, ino, &n);

    *got = 0;
    if (rc || off >= n.size) {
        return rc;
    }
    if (len > n.size - off) {
        len = (uint32_t)(n.size - off);
    }
    while (*got < len && count < max) {
        uint64_t at = off + *got;
        struct extent *x = &ext[count];

        rc = v6_chunk_at(r, &n, at >> r->chunk_bits, &c);
        if (rc) {
            return rc;
        }
        x->blob = r->blobs[c.blob].blob;
        if (!x->blob) {
            return -ENODEV;                 /* opened for its metadata only */
        }
        x->chunk = c.index;
        x->chunk_off = (uint32_t)(at & (r->info.chunk_size_bytes - 1));
        x->uoff = c.uoff + x->chunk_off;
        x->len = c.size - x->chunk_off;
        if (x->len > len - *got) {
            x->len = len - *got;
        }
        *got += x->len;
        count++;
    }
    return count;
}

static int v6_chunk(struct vnd_rafs *r, uint64_t ino, uint64_t k, struct rafs_chunk *out)
{
    struct v6_inode n;
    int rc = file_inode(r, ino, &n);

    if (rc) {
        return rc;
    }
    if (k >= (n.size + r->info.chunk_size_bytes - 1) >> r->chunk_bits) {
        return 0;
    }
    rc = v6_chunk_at(r, &n, k, out);
    return rc ? rc : 1;
}

static int v6_record(struct vnd_rafs *r, uint64_t i, uint32_t *blob, struct blob_chunk *out)
{
    const uint8_t *p;

    if (i >= r->info.chunk_table_size_bytes / RAFS_CHUNK_RECORD) {
        return -ENOENT;
    }
    p = r->base + r->info.chunk_table_offset + i * RAFS_CHUNK_RECORD;
    *blob = rafs_le32(p + 32);
    *out = (struct blob_chunk){ .flags = rafs_le32(p + 36), .csize = rafs_le32(p + 40), .usize = rafs_le32(p + 44),
                                .coff = rafs_le64(p + 48), .uoff = rafs_le64(p + 56), .index = rafs_le32(p + 72) };
    memcpy(out->digest, p, sizeof(out->digest));
    return 0;
}

static int v6_prefetch(struct vnd_rafs *r, uint64_t *inos, int max)
{
    int n = 0;

    for (uint32_t i = 0; i < r->info.prefetch_count && n < max; i++) {
        uint32_t nid = rafs_le32(r->base + r->info.prefetch_table_offset + 4ull * i);

        if (!nid) {
            break;
        }
        inos[n++] = nid;
    }
    return n;
}

static int v6_statfs(struct fs *fs, uint64_t *blocks, uint64_t *files, uint32_t *bsize)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;

    *blocks = r->fs_blocks;
    *files = r->inos;
    *bsize = 1u << r->blkszbits;
    return 0;
}

static uint64_t v6_root(struct fs *fs)
{
    return ((struct vnd_rafs *)fs)->root_nid;
}

static int v6_has_xattr(struct fs *fs)
{
    return (((struct vnd_rafs *)fs)->info.flags & RAFS_FLAG_HAS_XATTR) != 0;
}

static const struct fs_ops v6_fs_ops = {
    .name = "rafs", .getattr = v6_getattr, .lookup = v6_lookup, .readdir = v6_readdir, .readlink = v6_readlink,
    .extents = v6_extents, .listxattr = v6_listxattr, .getxattr = v6_getxattr, .statfs = v6_statfs, .root = v6_root,
    .has_xattr = v6_has_xattr,
};

const struct rafs_version rafs_v6 = {
    .name = "v6", .detect = v6_detect, .open = v6_open, .fs_ops = &v6_fs_ops, .chunk = v6_chunk, .record = v6_record,
    .prefetch = v6_prefetch, .check = v6_check,
};
