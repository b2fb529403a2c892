/* rafs/v5_fs.c -- RAFS v5 as a file system: names in consecutive slots of the inode table, chunks in their inodes
 * (docs/rafs-format.md 2.5 to 2.8).
 *
 * A directory's slots lie behind its own, and each slot names its directory: both are asked of every step, so no
 * image makes a walk go in circles or down one branch twice.
 */
#include <dirent.h>
#include <errno.h>
#include <sys/stat.h>

#include "rafs/v5.h"

/* ---- inodes */

int v5_inode(const struct vnd_rafs *r, uint64_t ino, struct v5_inode *out)
{
    int rc = v5_record(r, ino, out);

    return rc ? rc : out->ino == ino ? 0 : -EIO;
}

static void fill_attr(const struct v5_inode *n, vnd_attr *out)
{
    *out = (vnd_attr){
        .ino = n->ino,
        .size_bytes = n->size,
        .blocks = n->blocks,
        .mtime_s = n->mtime,
        .mtime_nsec = n->mtime_nsec,
        .mode = n->mode,
        .nlink = n->nlink,
        .uid = n->uid,
        .gid = n->gid,
        .rdev = S_ISCHR(n->mode) || S_ISBLK(n->mode) ? n->rdev : 0,
    };
}

static int v5_getattr(struct fs *fs, uint64_t ino, vnd_attr *out)
{
    struct v5_inode n;
    int rc = v5_inode((struct vnd_rafs *)fs, ino, &n);

    if (!rc)
        fill_attr(&n, out);
    return rc;
}

/* What a name leads to: another name of the same file may hold other values if the image lies, so the first one's
 * are given. */
static int attr_of_child(const struct vnd_rafs *r, const struct v5_inode *child, vnd_attr *out)
{
    struct v5_inode n;
    int rc = v5_inode(r, child->ino, &n);

    if (!rc)
        fill_attr(&n, out);
    return rc;
}

/* ---- directories */

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

static int v5_lookup(struct fs *fs, uint64_t dir, const char *name, size_t len, vnd_attr *out)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct v5_inode n, child;
    uint32_t lo = 0, hi;
    int rc = v5_dir(r, dir, &n);

    if (rc)
        return rc;
    if (rafs_name_is_dots(name, len))
        return v5_getattr(fs, len == 1 || dir == 1 ? dir : n.parent, out);
    hi = n.child_count;
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        int c;

        rc = v5_child(r, &n, mid, &child);
        if (rc)
            return rc;
        c = rafs_name_compare(name, len, child.name, child.name_len);
        if (c == 0)
            return attr_of_child(r, &child, out);
        if (c < 0)
            hi = mid;
        else
            lo = mid + 1;
    }
    return -ENOENT;
}

static uint32_t dirent_type(uint32_t mode)
{
    return (mode & S_IFMT) >> 12; /* DT_* are the types of the mode */
}

static bool name_usable(const struct v5_inode *n)
{
    return !rafs_name_broken(n->name, n->name_len) && !rafs_name_is_dots(n->name, n->name_len);
}

/* Cookies: 0 ".", 1 "..", 2 + k the k-th child. */
static int v5_readdir(struct fs *fs, uint64_t dir, uint64_t off, bool want_attr, fs_dir_put put, void *ctx)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct v5_inode n, child;
    vnd_attr attr;
    int rc = v5_dir(r, dir, &n);

    if (rc)
        return rc;
    if (off == 0) {
        if (put(ctx, dir, ".", 1, DT_DIR, 1, NULL))
            return 0;
        off = 1;
    }
    if (off == 1) {
        if (put(ctx, dir == 1 ? 1 : n.parent, "..", 2, DT_DIR, 2, NULL))
            return 0;
        off = 2;
    }
    for (; off - 2 < n.child_count; off++) {
        rc = v5_child(r, &n, (uint32_t)(off - 2), &child);
        if (!rc && !name_usable(&child))
            rc = -EIO;
        if (!rc && want_attr)
            rc = attr_of_child(r, &child, &attr);
        if (rc)
            return rc;
        if (put(ctx, child.ino, child.name, child.name_len, dirent_type(child.mode), off + 1, want_attr ? &attr : NULL))
            return 0;
    }
    return 0;
}

/* ---- symlinks, xattrs */

static int64_t v5_readlink(struct fs *fs, uint64_t ino, char *buf, size_t cap)
{
    struct v5_inode n;
    int rc = v5_inode((struct vnd_rafs *)fs, ino, &n);

    if (rc)
        return rc;
    if (!S_ISLNK(n.mode))
        return -EINVAL;
    if (!n.link_len || n.link_len > RAFS_SYMLINK_MAX || memchr(n.link, 0, n.link_len))
        return -EIO;
    if (n.link_len > cap)
        return -ERANGE;
    memcpy(buf, n.link, n.link_len);
    return n.link_len;
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

static int v5_listxattr(struct fs *fs, uint64_t ino, char *buf, size_t cap, size_t *need)
{
    struct v5_xattr x;
    struct v5_inode n;
    uint64_t at = 0;
    int rc = v5_inode((struct vnd_rafs *)fs, ino, &n);

    *need = 0;
    if (rc)
        return rc;
    while ((rc = v5_xattr_next(&n, &at, &x)) > 0) {
        if (*need + x.name_len + 1 <= cap)
            memcpy(buf + *need, x.name, x.name_len + 1u);
        *need += x.name_len + 1;
    }
    return rc ? rc : cap && *need > cap ? -ERANGE : 0;
}

static int v5_getxattr(struct fs *fs, uint64_t ino, const char *name, size_t len, char *buf, size_t cap, size_t *need)
{
    struct v5_xattr x;
    struct v5_inode n;
    uint64_t at = 0;
    int rc = v5_inode((struct vnd_rafs *)fs, ino, &n);

    if (rc)
        return rc;
    while ((rc = v5_xattr_next(&n, &at, &x)) > 0) {
        if (len != x.name_len || memcmp(name, x.name, len) != 0)
            continue;
        return rafs_xattr_give(x.value, x.value_len, buf, cap, need);
    }
    return rc ? rc : -ENODATA;
}

/* ---- file data */

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

static int file_inode(const struct vnd_rafs *r, uint64_t ino, struct v5_inode *n)
{
    int rc = v5_inode(r, ino, n);

    if (rc)
        return rc;
    if (!S_ISREG(n->mode))
        return S_ISDIR(n->mode) ? -EISDIR : -EINVAL;
    /* Without holes the chunk of a byte is found by division. */
    return n->flags & V5_INODE_HAS_HOLE || n->child_count == (n->size + r->info.chunk_size_bytes - 1) >> r->chunk_bits
               ? 0
               : -EIO;
}

/* Of a file with holes: the last chunk that starts at or before a byte, or child_count if there is none. */
static uint64_t chunk_before(const struct v5_inode *n, uint64_t at)
{
    uint64_t lo = 0, hi = n->child_count;

    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;

        if (rafs_le64(n->chunks + mid * RAFS_CHUNK_RECORD + 64) <= at)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo ? lo - 1 : n->child_count;
}

/* The extent at a byte of the file, as long as it goes. */
static int extent_at(const struct vnd_rafs *r, const struct v5_inode *n, uint64_t at, struct extent *x, uint64_t *len)
{
    bool holes = n->flags & V5_INODE_HAS_HOLE;
    uint64_t k = holes ? chunk_before(n, at) : at >> r->chunk_bits, next = 0;
    struct rafs_chunk c = { 0 };
    int rc = k < n->child_count ? v5_chunk_at(r, n, k, &c) : holes ? 0 : -EIO;

    if (rc)
        return rc;
    *x = (struct extent){ 0 };
    if (k < n->child_count && at - c.file_off < c.size) {
        *len = c.size - (at - c.file_off);
        if (c.hole)
            return 0;
        x->blob = r->blobs[c.blob].blob;
        x->chunk = c.index;
        x->chunk_off = (uint32_t)(at - c.file_off);
        x->uoff = c.uoff + x->chunk_off;
        return x->blob ? 0 : -ENODEV; /* opened for its metadata only */
    }
    if (!holes)
        return -EIO; /* a chunk that is not as long as it must be */
    k = k < n->child_count ? k + 1 : 0;
    next = k < n->child_count ? rafs_le64(n->chunks + k * RAFS_CHUNK_RECORD + 64) : n->size;
    if (next <= at)
        return -EIO;
    *len = (next < n->size ? next : n->size) - at;
    return 0;
}

static int v5_extents(struct fs *fs, uint64_t ino, uint64_t off, uint32_t len, struct extent *ext, int max,
                      uint32_t *got)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct v5_inode n;
    uint64_t room;
    int count = 0, rc = file_inode(r, ino, &n);

    *got = 0;
    if (rc || off >= n.size)
        return rc;
    if (len > n.size - off)
        len = (uint32_t)(n.size - off);
    while (*got < len && count < max) {
        rc = extent_at(r, &n, off + *got, &ext[count], &room);
        if (rc)
            return rc;
        ext[count].len = room < len - *got ? (uint32_t)room : len - *got;
        *got += ext[count].len;
        count++;
    }
    return count;
}

int v5_chunk(struct vnd_rafs *r, uint64_t ino, uint64_t k, struct rafs_chunk *out)
{
    struct v5_inode n;
    int rc = file_inode(r, ino, &n);

    if (rc)
        return rc;
    if (k >= n.child_count)
        return 0;
    rc = v5_chunk_at(r, &n, k, out);
    return rc ? rc : 1;
}

static int v5_statfs(struct fs *fs, uint64_t *blocks, uint64_t *files, uint32_t *bsize)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;

    *blocks = 0;
    for (uint32_t k = 0; k < r->info.blob_count; k++)
        *blocks += (r->blobs[k].info.uncompressed_size_bytes + 4095) / 4096;
    *files = r->slots;
    *bsize = 4096;
    return 0;
}

static uint64_t v5_root(struct fs *fs)
{
    return 1;
}

static bool v5_has_xattr(struct fs *fs)
{
    return (((struct vnd_rafs *)fs)->info.flags & RAFS_FLAG_HAS_XATTR) != 0;
}

const struct fs_ops v5_fs_ops = {
    .name = "rafs",
    .getattr = v5_getattr,
    .lookup = v5_lookup,
    .readdir = v5_readdir,
    .readlink = v5_readlink,
    .extents = v5_extents,
    .listxattr = v5_listxattr,
    .getxattr = v5_getxattr,
    .statfs = v5_statfs,
    .root = v5_root,
    .has_xattr = v5_has_xattr,
};
