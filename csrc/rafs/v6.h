/* rafs/v6.h -- RAFS v6: its records as they lie on disk (v6_inode.c), files for the kernel (backing.c), the file system
 * over the records (v6_fs.c), the walk and the checker (v6_walk.c, v6_check.c) and opening (v6.c), each above the one
 * before. docs/rafs-format.md 3 describes the format. Every record is checked against the bootstrap's bounds when it is
 * decoded.
 */
#ifndef VND_RAFS_V6_H
#define VND_RAFS_V6_H
#include "rafs/internal.h"

#define V6_MAGIC 0xe0f5e1e2u /* EROFS's */
#define V6_SB 1024           /* byte of the file where the EROFS superblock starts */
#define V6_EXT_SB 1152       /* byte of the file where RAFS's own superblock starts */
#define V6_TABLES 1408       /* below this byte of the file lie superblocks alone */

#define V6_SB_SLOTS 88      /* offset in the superblock, u16: where the device table is, in device slots */
#define V6_DEVICE 128       /* bytes of a device slot; it starts with the blob's id */
#define V6_DEVICE_BLOCKS 64 /* offset in a device slot, u32: blocks of the blob */
#define V6_DEVICE_MAPPED 68 /* offset in a device slot, u32: its first block where all blobs are one device */

enum v6_layout { V6_FLAT_PLAIN = 0, V6_FLAT_INLINE = 2, V6_CHUNKED = 4 };
#define V6_DIRENT 12

struct v6_inode {
    uint64_t nid, off, size, mtime;
    uint32_t mtime_nsec, layout, mode, nlink, uid, gid, u;
    uint32_t head, xattr_len; /* bytes: fixed part; xattr body behind it */
};
struct v6_block { /* one directory block */
    const uint8_t *base;
    uint32_t len, count;
};
struct v6_entry {
    uint64_t nid;
    const char *name; /* 1..255 bytes, content not checked */
    uint32_t len, file_type;
};

/* These return 0, or -EIO where the image is malformed. */
int v6_inode(const struct vnd_rafs *r, uint64_t nid, struct v6_inode *out);
/* Block b of a flat inode's data: its bytes, *len of them; NULL where the image is malformed. */
const uint8_t *v6_flat_block(const struct vnd_rafs *r, const struct v6_inode *n, uint64_t b, uint32_t *len);
/* The inode of a directory, and how many blocks it has. Also -ENOTDIR. */
int v6_dir_open(const struct vnd_rafs *r, uint64_t nid, struct v6_inode *n, uint64_t *blocks);
int v6_dir_block(const struct vnd_rafs *r, const struct v6_inode *n, uint64_t b, struct v6_block *out);
int v6_dir_entry(const struct v6_block *b, uint32_t k, struct v6_entry *out);
/* Chunk k of a chunk-based file. */
int v6_chunk_at(const struct vnd_rafs *r, const struct v6_inode *n, uint64_t k, struct rafs_chunk *out);

/* rafs/v6_walk.c: rafs_version.records for an image without a chunk table, made from its files. */
int v6_walk_chunks(struct vnd_rafs *r, uint32_t only_blob, rafs_put_record put, void *ctx);

extern const struct fs_ops v6_fs_ops; /* rafs/v6_fs.c */
int v6_chunk(struct vnd_rafs *r, uint64_t ino, uint64_t k, struct rafs_chunk *out);

/* rafs/v6.c: the device slot of blob k, which exists. 0 or -EIO. */
int v6_flat_place(const struct vnd_rafs *r, uint32_t k, uint64_t *at, uint64_t *bytes);

int v6_backing_fd(struct fs *fs, uint64_t nid); /* rafs/backing.c */

void v6_check(struct vnd_rafs *r, struct rafs_faults *f); /* rafs/v6_check.c */

#endif
