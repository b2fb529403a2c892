/* rafs/v6.h -- decoded pieces of a v6 bootstrap, for rafs/v6.c and its checker. All are bounds-checked as they
 * come. */
#ifndef VND_RAFS_V6_H
#define VND_RAFS_V6_H
#include "rafs/internal.h"

#define V6_SB 1024 /* bytes from the file's start: EROFS superblock, RAFS's own behind it */
#define V6_EXT_SB 1152
#define V6_TABLES 1408 /* nothing but superblocks lies below */

#define V6_SB_SLOTS 88 /* in the superblock, u16: where the device table is, in its slots' size */
#define V6_DEVICE 128  /* bytes of a device slot: the blob's id, then these, u32 both */
#define V6_DEVICE_BLOCKS 64
#define V6_DEVICE_MAPPED 68 /* block where it begins when all are one device */

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

/* 0 or -EIO where the image lies. */
int v6_inode(const struct vnd_rafs *r, uint64_t nid, struct v6_inode *out);
int v6_dir_open(const struct vnd_rafs *r, uint64_t nid, struct v6_inode *n, uint64_t *blocks); /* or -ENOTDIR */
int v6_dir_block(const struct vnd_rafs *r, const struct v6_inode *n, uint64_t b, struct v6_block *out);
int v6_dir_entry(const struct v6_block *b, uint32_t k, struct v6_entry *out);
int v6_chunk_at(const struct vnd_rafs *r, const struct v6_inode *n, uint64_t k, struct rafs_chunk *out);

/* rafs/v6_walk.c: rafs_version's records, out of the files themselves. */
int v6_walk_chunks(struct vnd_rafs *r, uint32_t only_blob, rafs_put_record put, void *ctx);

extern const struct fs_ops v6_fs_ops; /* rafs/v6_fs.c */
int v6_chunk(struct vnd_rafs *r, uint64_t ino, uint64_t k, struct rafs_chunk *out);

int v6_backing_fd(struct fs *fs, uint64_t nid); /* rafs/backing.c */

void v6_check(struct vnd_rafs *r, struct rafs_faults *f); /* rafs/check.c */

#endif
