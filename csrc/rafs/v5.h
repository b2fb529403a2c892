/* rafs/v5.h -- RAFS v5: its records as they lie on disk (v5_inode.c), the file system over them (v5_fs.c), the checker
 * (v5_check.c) and opening (v5.c), each above the one before. docs/rafs-format.md 2 describes the format. Every record
 * is checked against the bootstrap's bounds when it is decoded, so a decoded value is safe to use.
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
    uint32_t slot; /* entry of the inode table, from 1: there is one for each name */
    uint64_t ino, parent, size, blocks, flags, mtime;
    uint32_t mode, nlink, uid, gid, rdev, mtime_nsec, child_index, child_count;
    const char *name, *link; /* not NUL-ended */
    uint32_t name_len, link_len;
    const uint8_t *xattr, *chunks, *digest;
    uint64_t xattr_len; /* bytes of all attributes, without their length field */
};

/* Chunks of one blob in the order of their places, for images that do not number them. */
struct v5_numbers {
    uint64_t *uoff;
    uint32_t count;
};

/* These return 0, or -EIO where the image is malformed. */

/* The record in an entry of the inode table. */
int v5_record(const struct vnd_rafs *r, uint64_t slot, struct v5_inode *out);
/* The inode of a number, which is the entry of its first name. */
int v5_inode(const struct vnd_rafs *r, uint64_t ino, struct v5_inode *out);
/* The k-th name of a directory that v5_dir passed. */
int v5_child(const struct vnd_rafs *r, const struct v5_inode *dir, uint32_t k, struct v5_inode *out);
/* The inode of a directory whose entries lie where they may. Also -ENOTDIR. */
int v5_dir(const struct vnd_rafs *r, uint64_t ino, struct v5_inode *out);
/* Chunk k of a regular file; k is below child_count. */
int v5_chunk_at(const struct vnd_rafs *r, const struct v5_inode *n, uint64_t k, struct rafs_chunk *out);
/* Copies the chunk record at p; *blob gets its blob's index, unchecked. */
void v5_decode_chunk(const struct vnd_rafs *r, const uint8_t *p, uint32_t *blob, struct blob_chunk *out);
struct v5_xattr {
    const char *name;
    const uint8_t *value;
    uint32_t name_len, value_len;
};
/* Gives one attribute and moves *at, which starts at 0, behind it: 1, 0 at the end, -EIO. */
int v5_xattr_next(const struct v5_inode *n, uint64_t *at, struct v5_xattr *out);

extern const struct fs_ops v5_fs_ops; /* rafs/v5_fs.c */
int v5_chunk(struct vnd_rafs *r, uint64_t ino, uint64_t k, struct rafs_chunk *out);
void v5_check(struct vnd_rafs *r, struct rafs_faults *f); /* rafs/v5_check.c */

#endif
