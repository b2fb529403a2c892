/* rafs/v6_inode.c -- records of a RAFS v6 bootstrap as they lie on disk: inodes, directory blocks, chunk indexes
 * (docs/rafs-format.md 3.4 to 3.6).
 *
 * The kernel's EROFS and this reader must agree on every byte, so layouts follow the kernel's rules where they are wider
 * than what builders write.
 */
#include <errno.h>
#include <sys/stat.h>

#include "rafs/v6.h"

int v6_inode(const struct vnd_rafs *r, uint64_t nid, struct v6_inode *out)
{
    uint64_t off, head;
    uint32_t format, icount;
    const uint8_t *p;

    if (nid > r->inode_end / 32)
        return -EIO;
    off = r->meta_off + nid * 32;
    if (off < V6_TABLES || off > r->inode_end || r->inode_end - off < 32)
        return -EIO;
    p = r->base + off;
    format = rafs_le16(p);
    head = format & 1 ? 64 : 32;
    if (r->inode_end - off < head || format & ~0xfu)
        return -EIO;
    icount = rafs_le16(p + 2);
    *out = (struct v6_inode){ .nid = nid,
                              .off = off,
                              .layout = format >> 1 & 7,
                              .mode = rafs_le16(p + 4),
                              .u = rafs_le32(p + 16),
                              .head = (uint32_t)head,
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
        out->mtime = rafs_le64(r->base + V6_SB + 24); /* the image's build time */
        out->mtime_nsec = rafs_le32(r->base + V6_SB + 32);
    }
    if (out->size > INT64_MAX ||
        (out->layout != V6_FLAT_PLAIN && out->layout != V6_FLAT_INLINE && out->layout != V6_CHUNKED) ||
        r->inode_end - off - head < out->xattr_len || !(out->mode & S_IFMT)) {
        return -EIO;
    }
    if (!(r->info.flags & RAFS_FLAG_EXPLICIT_UID_GID)) {
        out->uid = r->own_uid;
        out->gid = r->own_gid;
    }
    return 0;
}

const uint8_t *v6_flat_block(const struct vnd_rafs *r, const struct v6_inode *n, uint64_t b, uint32_t *len)
{
    uint64_t blksz = 1ull << r->blkszbits, at = b << r->blkszbits, off;

    *len = (uint32_t)(n->size - at < blksz ? n->size - at : blksz);
    if (n->layout == V6_FLAT_INLINE && n->size - at <= blksz) {
        off = n->off + n->head + n->xattr_len;
        if (off > r->inode_end || *len > r->inode_end - off)
            return NULL;
        return r->base + off;
    }
    if (n->layout == V6_CHUNKED)
        return NULL;
    off = ((uint64_t)n->u + b) << r->blkszbits;
    return rafs_at(r, off, *len);
}

int v6_dir_open(const struct vnd_rafs *r, uint64_t nid, struct v6_inode *n, uint64_t *blocks)
{
    int rc = v6_inode(r, nid, n);

    if (rc)
        return rc;
    if (!S_ISDIR(n->mode))
        return -ENOTDIR;
    *blocks = (n->size + (1ull << r->blkszbits) - 1) >> r->blkszbits;
    return n->layout == V6_CHUNKED ? -EIO : 0;
}

int v6_dir_block(const struct vnd_rafs *r, const struct v6_inode *n, uint64_t b, struct v6_block *out)
{
    uint32_t first;

    out->base = v6_flat_block(r, n, b, &out->len);
    if (!out->base || out->len < V6_DIRENT)
        return -EIO;
    first = rafs_le16(out->base + 8);
    if (!first || first % V6_DIRENT || first > out->len)
        return -EIO;
    out->count = first / V6_DIRENT;
    return 0;
}

int v6_dir_entry(const struct v6_block *b, uint32_t k, struct v6_entry *out)
{
    const uint8_t *d = b->base + k * V6_DIRENT;
    uint32_t start = rafs_le16(d + 8), end;

    if (start < b->count * V6_DIRENT || start > b->len)
        return -EIO;
    if (k + 1 < b->count) {
        end = rafs_le16(d + V6_DIRENT + 8);
        if (end > b->len || end < start)
            return -EIO;
    } else {
        end = start + (uint32_t)strnlen((const char *)b->base + start, b->len - start);
    }
    out->nid = rafs_le64(d);
    out->file_type = d[10];
    out->name = (const char *)b->base + start;
    out->len = end - start;
    return out->len == 0 || out->len > RAFS_NAME_MAX ? -EIO : 0;
}

int v6_chunk_at(const struct vnd_rafs *r, const struct v6_inode *n, uint64_t k, struct rafs_chunk *out)
{
    uint64_t array = (n->off + n->head + n->xattr_len + 7) & ~7ull, at, start = k << r->chunk_bits;
    const uint8_t *p;
    uint32_t device;

    if (k > r->size / 8)
        return -EIO;
    at = array + k * 8;
    if (at > r->inode_end || r->inode_end - at < 8)
        return -EIO;
    p = r->base + at;
    device = rafs_le16(p + 2);
    *out = (struct rafs_chunk){ .file_off = start };
    out->blob = (device & 0xff) - 1; /* device 0, which is no blob, becomes the largest number and is refused below */
    out->index = rafs_le16(p) | (device >> 8) << 16;
    out->uoff = (uint64_t)rafs_le32(p + 4) << r->blkszbits;
    out->size = (uint32_t)(n->size - start < r->info.chunk_size_bytes ? n->size - start : r->info.chunk_size_bytes);
    if (out->blob >= r->info.blob_count)
        return -EIO;
    /* The store looks the chunk up by its index, so one that the blob does not have is refused here. */
    if (!(r->info.flags & RAFS_FLAG_TARFS) && out->index >= r->blobs[out->blob].info.chunk_count)
        return -EIO;
    return 0;
}
