/* disk/files.c -- a disk as a file system: one directory, in it the flat disk and each device of its own. */
#include <dirent.h>
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "disk/disk.h"

/* Inode numbers: the root, the flat disk, the bootstrap, then the blobs. */
enum { INO_ROOT = 1, INO_DISK, INO_PARTS };
#define COOKIE_ENTRIES 2u /* "." and ".." have the cookies before */

static struct vnd_disk *disk_of(struct fs *fs)
{
    return (struct vnd_disk *)(void *)fs;
}

static const char *name_of(const struct vnd_disk *d, uint64_t ino)
{
    return ino == INO_DISK ? "disk" : ino == INO_PARTS ? "bootstrap" : blob_id(d->parts[ino - INO_PARTS].blob);
}

static bool is_inode(const struct vnd_disk *d, uint64_t ino)
{
    return ino >= INO_ROOT && ino < INO_PARTS + (uint64_t)d->n_parts;
}

static void fill(const struct vnd_disk *d, uint64_t ino, vnd_attr *out)
{
    bool dir = ino == INO_ROOT;

    *out = (vnd_attr){ .ino = ino, .mode = dir ? S_IFDIR | 0555 : S_IFREG | 0444, .nlink = dir ? 2 : 1 };
    if (!dir)
        out->size_bytes = ino == INO_DISK ? d->bytes : d->parts[ino - INO_PARTS].bytes;
    out->blocks = out->size_bytes / DISK_SECTOR;
}

static int disk_getattr(struct fs *fs, uint64_t ino, vnd_attr *out)
{
    if (!is_inode(disk_of(fs), ino))
        return -ESTALE;
    fill(disk_of(fs), ino, out);
    return 0;
}

static int disk_lookup(struct fs *fs, uint64_t dir, const char *name, size_t len, vnd_attr *out)
{
    struct vnd_disk *d = disk_of(fs);

    if (dir != INO_ROOT)
        return is_inode(d, dir) ? -ENOTDIR : -ESTALE;
    if ((len == 1 && name[0] == '.') || (len == 2 && memcmp(name, "..", 2) == 0)) {
        fill(d, INO_ROOT, out);
        return 0;
    }
    for (uint64_t ino = INO_DISK; is_inode(d, ino); ino++) {
        const char *mine = name_of(d, ino);

        if (strlen(mine) == len && memcmp(mine, name, len) == 0) {
            fill(d, ino, out);
            return 0;
        }
    }
    return -ENOENT;
}

static int disk_readdir(struct fs *fs, const struct fs_listing *l)
{
    struct vnd_disk *d = disk_of(fs);
    uint64_t end = COOKIE_ENTRIES + d->n_parts + 1;

    if (l->dir != INO_ROOT)
        return is_inode(d, l->dir) ? -ENOTDIR : -ESTALE;
    for (uint64_t at = l->off; at < end; at++) {
        bool dots = at < COOKIE_ENTRIES;
        uint64_t ino = dots ? INO_ROOT : INO_DISK + at - COOKIE_ENTRIES;
        struct fs_entry e = { .ino = ino, .next_off = at + 1, .type = dots ? DT_DIR : DT_REG };
        vnd_attr attr;

        e.name = at == 0 ? "." : at == 1 ? ".." : name_of(d, ino);
        e.len = strlen(e.name);
        if (!dots && l->want_attr) {
            fill(d, ino, &attr);
            e.attr = &attr;
        }
        if (l->put(l->ctx, &e) != 0)
            return 0;
    }
    return 0;
}

static int64_t disk_readlink(struct fs *fs, uint64_t ino, char *buf, size_t cap)
{
    return is_inode(disk_of(fs), ino) ? -EINVAL : -ESTALE;
}

static int disk_file_extents(struct fs *fs, uint64_t ino, uint64_t off, uint32_t len, struct fs_extents *out)
{
    struct vnd_disk *d = disk_of(fs);
    uint64_t size;
    int n;

    if (ino == INO_ROOT || !is_inode(d, ino))
        return ino == INO_ROOT ? -EISDIR : -ESTALE;
    size = ino == INO_DISK ? d->bytes : d->parts[ino - INO_PARTS].bytes;
    n = ino == INO_DISK ? disk_extents(d, off, len, out)
                        : disk_part_extents(d, &d->parts[ino - INO_PARTS], off, len, out);
    /* A reader would take what is short for the end of the file: chunks that are smaller than a block have no room. */
    if (n >= 0 && off < size && out->bytes < (len < size - off ? len : size - off))
        return -EIO;
    return n;
}

static int disk_listxattr(struct fs *fs, uint64_t ino, struct fs_buf *out)
{
    out->need = 0;
    return 0;
}

static int disk_getxattr(struct fs *fs, uint64_t ino, const char *name, size_t len, struct fs_buf *out)
{
    return -ENODATA;
}

static int disk_statfs(struct fs *fs, uint64_t *blocks, uint64_t *files, uint32_t *bsize)
{
    *bsize = RAFS_FLAT_BLOCK;
    *blocks = disk_of(fs)->bytes / RAFS_FLAT_BLOCK;
    *files = INO_PARTS - 1 + (uint64_t)disk_of(fs)->n_parts;
    return 0;
}

static uint64_t disk_root(struct fs *fs)
{
    return INO_ROOT;
}

static bool disk_has_xattr(struct fs *fs)
{
    return false;
}

const struct fs_ops disk_fs_ops = {
    .name = "disk",
    .getattr = disk_getattr,
    .lookup = disk_lookup,
    .readdir = disk_readdir,
    .readlink = disk_readlink,
    .extents = disk_file_extents,
    .listxattr = disk_listxattr,
    .getxattr = disk_getxattr,
    .statfs = disk_statfs,
    .root = disk_root,
    .has_xattr = disk_has_xattr,
};
