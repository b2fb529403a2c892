/* rafs/v6_fs.c -- RAFS v6 as a file system: EROFS inodes, directories and symlinks, chunk-based files over a table of
 * blobs (docs/rafs-format.md 3.4 to 3.7).
 */
#include <dirent.h>
#include <errno.h>
#include <sys/stat.h>

#include "rafs/v6.h"

/* ---- inodes */

static void fill_attr(const struct v6_inode *n, vnd_attr *out)
{
    *out = (vnd_attr){
        .ino = n->nid,
        .size_bytes = n->size,
        .blocks = (n->size + 511) / 512,
        .mtime_s = n->mtime,
        .mtime_nsec = n->mtime_nsec,
        .mode = n->mode,
        .nlink = n->nlink,
        .uid = n->uid,
        .gid = n->gid,
        .rdev = S_ISCHR(n->mode) || S_ISBLK(n->mode) ? n->u : 0,
    };
}

static int v6_getattr(struct fs *fs, uint64_t ino, vnd_attr *out)
{
    struct v6_inode n;
    int rc = v6_inode((struct vnd_rafs *)fs, ino, &n);

    if (!rc)
        fill_attr(&n, out);
    return rc;
}

/* ---- directories */

/* Searches for the last block whose first name is not above the wanted name, then in that block. */
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
        if (rc)
            return rc;
        c = rafs_name_compare(name, len, out->name, out->len);
        if (c == 0)
            return 0;
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
        if (rc)
            return rc;
        c = rafs_name_compare(name, len, out->name, out->len);
        if (c == 0)
            return 0;
        if (c < 0)
            z = mid;
        else
            a = mid + 1;
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

    if (len == 1 && name[0] == '.')
        return v6_getattr(fs, dir, out);
    rc = v6_dir_open(r, dir, &n, &blocks);
    if (!rc)
        rc = dir_find(r, &n, blocks, name, (uint32_t)len, &entry);
    if (!rc)
        rc = v6_inode(r, entry.nid, &n);
    if (!rc && len == 2 && name[0] == '.' && name[1] == '.' && !S_ISDIR(n.mode))
        rc = -EIO;
    if (!rc)
        fill_attr(&n, out);
    return rc;
}

static const uint8_t dirent_types[8] = { DT_UNKNOWN, DT_REG, DT_DIR, DT_CHR, DT_BLK, DT_FIFO, DT_SOCK, DT_LNK };

/* A cookie is block << 10 | entry of the entry to go on with; a block has at most 341 entries. 0 is the first. */
static int v6_readdir(struct fs *fs, const struct fs_listing *l)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct v6_inode n, child;
    struct v6_block b;
    struct v6_entry entry;
    uint64_t blocks;
    uint32_t k = l->off & 1023;
    vnd_attr attr;
    int rc = v6_dir_open(r, l->dir, &n, &blocks);

    for (uint64_t at = l->off >> 10; !rc && at < blocks; at++, k = 0) {
        rc = v6_dir_block(r, &n, at, &b);
        for (; !rc && k < b.count; k++) {
            uint64_t next = k + 1 < b.count ? at << 10 | (k + 1) : (at + 1) << 10;
            struct fs_entry e;

            rc = v6_dir_entry(&b, k, &entry);
            if (rc)
                break;
            if (rafs_name_broken(entry.name, entry.len))
                return -EIO;
            e = (struct fs_entry){ .ino = entry.nid, .next_off = next, .name = entry.name, .len = entry.len };
            e.type = entry.file_type < 8 ? dirent_types[entry.file_type] : DT_UNKNOWN;
            if (l->want_attr && !rafs_name_is_dots(entry.name, entry.len)) {
                rc = v6_inode(r, entry.nid, &child);
                if (rc)
                    break;
                fill_attr(&child, &attr);
                e.attr = &attr;
            }
            if (l->put(l->ctx, &e))
                return 0;
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

    if (rc)
        return rc;
    if (!S_ISLNK(n.mode))
        return -EINVAL;
    if (!n.size || n.size > RAFS_SYMLINK_MAX)
        return -EIO;
    if (n.size > cap)
        return -ERANGE;
    for (uint64_t b = 0; b << r->blkszbits < n.size; b++) {
        const uint8_t *p = v6_flat_block(r, &n, b, &len);

        if (!p || memchr(p, 0, len))
            return -EIO;
        memcpy(buf + (b << r->blkszbits), p, len);
    }
    return (int64_t)n.size;
}

static int v6_listxattr(struct fs *fs, uint64_t ino, struct fs_buf *out)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct v6_inode n;
    int rc = v6_inode(r, ino, &n);

    return rc ? rc : rafs_xattr_list(r->base + n.off + n.head, n.xattr_len, out);
}

static int v6_getxattr(struct fs *fs, uint64_t ino, const char *name, size_t len, struct fs_buf *out)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct v6_inode n;
    int rc = v6_inode(r, ino, &n);

    return rc ? rc : rafs_xattr_get(r->base + n.off + n.head, n.xattr_len, name, len, out);
}

/* ---- file data */

static int file_inode(const struct vnd_rafs *r, uint64_t ino, struct v6_inode *n)
{
    int rc = v6_inode(r, ino, n);

    if (rc)
        return rc;
    if (!S_ISREG(n->mode))
        return S_ISDIR(n->mode) ? -EISDIR : -EINVAL;
    return n->layout == V6_CHUNKED || n->size == 0 ? 0 : -EIO;
}

static int v6_extents(struct fs *fs, uint64_t ino, uint64_t off, uint32_t len, struct fs_extents *out)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct rafs_chunk c;
    struct v6_inode n;
    int count = 0, rc = file_inode(r, ino, &n);

    out->bytes = 0;
    if (rc || off >= n.size)
        return rc;
    if (len > n.size - off)
        len = (uint32_t)(n.size - off);
    while (out->bytes < len && count < out->max) {
        uint64_t at = off + out->bytes;
        struct extent *x = &out->at[count];

        rc = v6_chunk_at(r, &n, at >> r->chunk_bits, &c);
        if (rc)
            return rc;
        x->blob = r->blobs[c.blob].blob;
        if (!x->blob)
            return -ENODEV; /* the image was opened for its metadata alone */
        x->chunk = c.index;
        x->chunk_off = (uint32_t)(at & (r->info.chunk_size_bytes - 1));
        x->uoff = c.uoff + x->chunk_off;
        x->len = c.size - x->chunk_off;
        if (x->len > len - out->bytes)
            x->len = len - out->bytes;
        out->bytes += x->len;
        count++;
    }
    return count;
}

int v6_chunk(struct vnd_rafs *r, uint64_t ino, uint64_t k, struct rafs_chunk *out)
{
    struct v6_inode n;
    int rc = file_inode(r, ino, &n);

    if (rc)
        return rc;
    if (k >= (n.size + r->info.chunk_size_bytes - 1) >> r->chunk_bits)
        return 0;
    rc = v6_chunk_at(r, &n, k, out);
    return rc ? rc : 1;
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

static bool v6_has_xattr(struct fs *fs)
{
    return (((struct vnd_rafs *)fs)->info.flags & RAFS_FLAG_HAS_XATTR) != 0;
}

const struct fs_ops v6_fs_ops = {
    .name = "rafs",
    .getattr = v6_getattr,
    .lookup = v6_lookup,
    .readdir = v6_readdir,
    .readlink = v6_readlink,
    .extents = v6_extents,
    .seek = rafs_seek,
    .listxattr = v6_listxattr,
    .getxattr = v6_getxattr,
    .statfs = v6_statfs,
    .root = v6_root,
    .has_xattr = v6_has_xattr,
    .backing_fd = v6_backing_fd,
};
