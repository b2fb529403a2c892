/* rafs/v5.h -- decoded pieces of a v5 bootstrap, for rafs/v5.c, rafs/v5_fs.c and the checker. All are
 * bounds-checked as they come (docs/rafs-format.md 2).
 */
#ifndef VND_RAFS_V5_H
#define VND_RAFS_V5_H
#include "rafs/internal.h"

#define V5_MAGIC 0x52414653u
#define V5_SB 8192   /* bytes of the superblock */
#define V5_INODE 128 /* fixed part of an inode record */
#define V5_BLOB_MAX 4096
#define V5_CHUNK_COMPRESSED 1u
#define V5_CHUNK_HOLE 2u
#define V5_INODE_XATTR 4u
#define V5_INODE_HAS_HOLE 8u

struct v5_inode {
    uint32_t slot; /* of the inode table, from 1: one for each name */
    uint64_t ino, parent, size, blocks, flags, mtime;
    uint32_t mode, nlink, uid, gid, rdev, mtime_nsec, child_index, child_count;
    const char *name, *link; /* not NUL-ended */
    uint32_t name_len, link_len;
    const uint8_t *xattr, *chunks, *digest;
    uint64_t xattr_len; /* bytes of attributes, without their length field */
};

/* Chunks of one blob in the order of their places, for images that do not number them. */
struct v5_numbers {
    uint64_t *uoff;
    uint32_t count;
};

/* The record in a slot; 0 or -EIO where the image lies. */
int v5_record(const struct vnd_rafs *r, uint64_t slot, struct v5_inode *out);
/* The inode of a number, which is the slot of its first name. */
int v5_inode(const struct vnd_rafs *r, uint64_t ino, struct v5_inode *out);
/* The k-th name of a directory that v5_dir passed. */
int v5_child(const struct vnd_rafs *r, const struct v5_inode *dir, uint32_t k, struct v5_inode *out);
int v5_dir(const struct vnd_rafs *r, uint64_t ino, struct v5_inode *out); /* or -ENOTDIR */
/* Chunk k < child_count of a regular file. */
int v5_chunk_at(const struct vnd_rafs *r, const struct v5_inode *n, uint64_t k, struct rafs_chunk *out);
/* Copies a chunk record; *blob gets its blob. */
void v5_decode_chunk(const struct vnd_rafs *r, const uint8_t *p, uint32_t *blob, struct blob_chunk *out);
/* One attribute after the other; *at from 0 on: 1, 0 at the end, -EIO. */
struct v5_xattr {
    const char *name;
    const uint8_t *value;
    uint32_t name_len, value_len;
};
int v5_xattr_next(const struct v5_inode *n, uint64_t *at, struct v5_xattr *out);

extern const struct fs_ops v5_fs_ops; /* rafs/v5_fs.c */
int v5_chunk(struct vnd_rafs *r, uint64_t ino, uint64_t k, struct rafs_chunk *out);
void v5_check(struct vnd_rafs *r, struct rafs_faults *f); /* rafs/v5_check.c */

#endif
