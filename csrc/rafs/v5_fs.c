/* rafs/v5_fs.c -- RAFS v5 as a file system: the names of a directory are consecutive entries of the inode table, and the
 * chunks of a file follow its inode (docs/rafs-format.md 2.5 to 2.8).
 */
#include <dirent.h>
#include <errno.h>
#include <sys/stat.h>

#include "rafs/v5.h"

/* ---- inodes */

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

/* The attributes that a name leads to. In a malformed image a later name of a file may hold other values than the first
 * name; the first name's count. */
static int attr_of_child(const struct vnd_rafs *r, const struct v5_inode *child, vnd_attr *out)
{
    struct v5_inode n;
    int rc = v5_inode(r, child->ino, &n);

    if (!rc)
        fill_attr(&n, out);
    return rc;
}

/* ---- directories */

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

/* A cookie is 0 for ".", 1 for "..", 2 + k for the k-th child. */
static int v5_readdir(struct fs *fs, const struct fs_listing *l)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct v5_inode n, child;
    uint64_t off = l->off;
    vnd_attr attr;
    int rc = v5_dir(r, l->dir, &n);

    if (rc)
        return rc;
    if (off == 0) {
        if (l->put(l->ctx, &(struct fs_entry){ l->dir, 1, ".", 1, DT_DIR, NULL }))
            return 0;
        off = 1;
    }
    if (off == 1) {
        if (l->put(l->ctx, &(struct fs_entry){ l->dir == 1 ? 1 : n.parent, 2, "..", 2, DT_DIR, NULL }))
            return 0;
        off = 2;
    }
    for (; off - 2 < n.child_count; off++) {
        struct fs_entry e;

        rc = v5_child(r, &n, (uint32_t)(off - 2), &child);
        if (!rc && !name_usable(&child))
            rc = -EIO;
        if (!rc && l->want_attr)
            rc = attr_of_child(r, &child, &attr);
        if (rc)
            return rc;
        e = (struct fs_entry){
            child.ino, off + 1, child.name, child.name_len, dirent_type(child.mode), l->want_attr ? &attr : NULL
        };
        if (l->put(l->ctx, &e))
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

static int v5_listxattr(struct fs *fs, uint64_t ino, struct fs_buf *out)
{
    struct v5_xattr x;
    struct v5_inode n;
    uint64_t at = 0;
    int rc = v5_inode((struct vnd_rafs *)fs, ino, &n);

    out->need = 0;
    if (rc)
        return rc;
    while ((rc = v5_xattr_next(&n, &at, &x)) > 0) {
        if (out->need + x.name_len + 1 <= out->cap)
            memcpy(out->at + out->need, x.name, x.name_len + 1u);
        out->need += x.name_len + 1;
    }
    return rc ? rc : out->cap && out->need > out->cap ? -ERANGE : 0;
}

static int v5_getxattr(struct fs *fs, uint64_t ino, const char *name, size_t len, struct fs_buf *out)
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
        return rafs_xattr_give(x.value, x.value_len, out);
    }
    return rc ? rc : -ENODATA;
}

/* ---- file data */

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

/* In a file with holes: the last chunk that starts at or before byte at, or child_count if no chunk does. */
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

/* The extent at byte at of the file; *len gets how many bytes of it follow. */
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
        return x->blob ? 0 : -ENODEV; /* the image was opened for its metadata alone */
    }
    if (!holes)
        return -EIO; /* the chunk is shorter than it must be */
    k = k < n->child_count ? k + 1 : 0;
    next = k < n->child_count ? rafs_le64(n->chunks + k * RAFS_CHUNK_RECORD + 64) : n->size;
    if (next <= at)
        return -EIO;
    *len = (next < n->size ? next : n->size) - at;
    return 0;
}

static int v5_extents(struct fs *fs, uint64_t ino, uint64_t off, uint32_t len, struct fs_extents *out)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct v5_inode n;
    uint64_t room;
    int count = 0, rc = file_inode(r, ino, &n);

    out->bytes = 0;
    if (rc || off >= n.size)
        return rc;
    if (len > n.size - off)
        len = (uint32_t)(n.size - off);
    while (out->bytes < len && count < out->max) {
        rc = extent_at(r, &n, off + out->bytes, &out->at[count], &room);
        if (rc)
            return rc;
        out->at[count].len = room < len - out->bytes ? (uint32_t)room : len - out->bytes;
        out->bytes += out->at[count].len;
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
    .seek = rafs_seek,
    .listxattr = v5_listxattr,
    .getxattr = v5_getxattr,
    .statfs = v5_statfs,
    .root = v5_root,
    .has_xattr = v5_has_xattr,
};
