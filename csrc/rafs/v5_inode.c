/* rafs/v5_inode.c -- records of a RAFS v5 bootstrap as they lie on disk: inodes, names, chunks, xattrs
 * (docs/rafs-format.md 2.5 to 2.8).
 *
 * A directory's slots lie behind its own, and each slot names its directory: both are checked at every step, so no
 * image makes a walk go in circles or down one branch twice.
 */
#include <errno.h>
#include <sys/stat.h>

#include "rafs/v5.h"

static uint64_t up8(uint64_t v)
{
    return (v + 7) & ~7ull;
}

int v5_record(const struct vnd_rafs *r, uint64_t slot, struct v5_inode *out)
{
    uint64_t off, left;
    const uint8_t *p;

    if (slot < 1 || slot > r->slots)
        return -EIO;
    off = (uint64_t)rafs_le32(r->base + r->inode_table + (slot - 1) * 4) << 3;
    if (off < V5_SB || !(p = rafs_at(r, off, V5_INODE)))
        return -EIO;
    *out = (struct v5_inode){
        .slot = (uint32_t)slot,
        .digest = p,
        .parent = rafs_le64(p + 32),
        .ino = rafs_le64(p + 40),
        .uid = rafs_le32(p + 48),
        .gid = rafs_le32(p + 52),
        .mode = rafs_le32(p + 60),
        .size = rafs_le64(p + 64),
        .blocks = rafs_le64(p + 72),
        .flags = rafs_le64(p + 80),
        .nlink = rafs_le32(p + 88),
        .child_index = rafs_le32(p + 92),
        .child_count = rafs_le32(p + 96),
        .name_len = rafs_le16(p + 100),
        .link_len = rafs_le16(p + 102),
        .rdev = rafs_le32(p + 104),
        .mtime_nsec = rafs_le32(p + 108),
        .mtime = rafs_le64(p + 112),
    };
    left = r->size - off - V5_INODE;
    p += V5_INODE;
    if (!out->name_len || out->name_len > RAFS_NAME_MAX || up8(out->name_len) > left || out->ino < 1 ||
        out->ino > r->slots || !out->nlink || out->size > INT64_MAX || out->mode > 0xffff ||
        (out->ino != slot && !S_ISREG(out->mode))) {
        return -EIO;
    }
    out->name = (const char *)p;
    p += up8(out->name_len);
    left -= up8(out->name_len);
    if (S_ISLNK(out->mode)) {
        if (up8(out->link_len) > left)
            return -EIO;
        out->link = (const char *)p;
        p += up8(out->link_len);
        left -= up8(out->link_len);
    }
    if (out->flags & V5_INODE_XATTR) {
        if (left < 8 || (out->xattr_len = rafs_le64(p)) > left - 8 || up8(out->xattr_len) > left - 8)
            return -EIO;
        out->xattr = p + 8;
        p += 8 + up8(out->xattr_len);
        left -= 8 + up8(out->xattr_len);
    }
    if (S_ISREG(out->mode)) {
        if ((uint64_t)out->child_count * RAFS_CHUNK_RECORD > left)
            return -EIO;
        out->chunks = p;
    }
    if (!(r->info.flags & RAFS_FLAG_EXPLICIT_UID_GID)) {
        out->uid = r->own_uid;
        out->gid = r->own_gid;
    }
    return 0;
}

int v5_inode(const struct vnd_rafs *r, uint64_t ino, struct v5_inode *out)
{
    int rc = v5_record(r, ino, out);

    return rc ? rc : out->ino == ino ? 0 : -EIO;
}

int v5_dir(const struct vnd_rafs *r, uint64_t ino, struct v5_inode *out)
{
    int rc = v5_inode(r, ino, out);

    if (rc)
        return rc;
    if (!S_ISDIR(out->mode))
        return -ENOTDIR;
    if (out->child_count && (out->child_index <= out->slot || out->child_count > r->slots ||
                             out->child_index - 1 > r->slots - out->child_count)) {
        return -EIO;
    }
    return 0;
}

int v5_child(const struct vnd_rafs *r, const struct v5_inode *dir, uint32_t k, struct v5_inode *out)
{
    int rc = v5_record(r, (uint64_t)dir->child_index + k, out);
    struct v5_inode first;

    if (rc || out->parent != dir->ino)
        return -EIO;
    /* Only files have several names: one that leads to a directory would make a circle. */
    return out->ino == out->slot || (v5_inode(r, out->ino, &first) == 0 && S_ISREG(first.mode)) ? 0 : -EIO;
}

void v5_decode_chunk(const struct vnd_rafs *r, const uint8_t *p, uint32_t *blob, struct blob_chunk *out)
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
    if (*blob < r->info.blob_count && r->numbers && r->numbers[*blob].uoff) {
        const struct v5_numbers *n = &r->numbers[*blob];
        uint32_t lo = 0, hi = n->count;

        while (lo < hi) {
            uint32_t mid = lo + (hi - lo) / 2;

            if (n->uoff[mid] < out->uoff)
                lo = mid + 1;
            else
                hi = mid;
        }
        out->index = lo < n->count && n->uoff[lo] == out->uoff ? lo : UINT32_MAX;
    }
}

int v5_chunk_at(const struct vnd_rafs *r, const struct v5_inode *n, uint64_t k, struct rafs_chunk *out)
{
    const uint8_t *p = n->chunks + k * RAFS_CHUNK_RECORD;
    struct blob_chunk c;
    uint32_t blob;

    v5_decode_chunk(r, p, &blob, &c);
    *out = (struct rafs_chunk){
        .blob = blob, .index = c.index, .uoff = c.uoff, .size = c.usize, .record = p, .file_off = k << r->chunk_bits
    };
    if (n->flags & V5_INODE_HAS_HOLE)
        out->file_off = rafs_le64(p + 64);
    out->hole = c.flags & V5_CHUNK_HOLE;
    if (out->file_off >= n->size || !c.usize || c.usize > r->info.chunk_size_bytes)
        return -EIO;
    if (out->size > n->size - out->file_off)
        out->size = (uint32_t)(n->size - out->file_off);
    if (!out->hole && (blob >= r->info.blob_count || c.index >= r->blobs[blob].info.chunk_count))
        return -EIO;
    return 0;
}

int v5_xattr_next(const struct v5_inode *n, uint64_t *at, struct v5_xattr *out)
{
    uint64_t left = n->xattr_len - *at;
    const uint8_t *p;
    uint32_t len;
    size_t name;

    if (!left)
        return 0;
    p = n->xattr + *at;
    if (left < 4 || (len = rafs_le32(p)) > left - 4)
        return -EIO;
    name = strnlen((const char *)p + 4, len);
    if (!name || name == len || name > RAFS_NAME_MAX || len - name - 1 > UINT16_MAX + 1u)
        return -EIO;
    *out = (struct v5_xattr){ .name = (const char *)p + 4,
                              .name_len = (uint32_t)name,
                              .value = p + 4 + name + 1,
                              .value_len = len - (uint32_t)name - 1 };
    *at += 4 + (uint64_t)len;
    return 1;
}
