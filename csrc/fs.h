/* fs.h -- what a file system offers the FUSE session. A file system is one C file and one table of these (law 6);
 * it knows nothing of queues, requests, nodeid serials or caches.
 *
 * ino is the file system's own inode number, below 2^48. Calls come from several threads at once. Strings are
 * pointer and length; names are checked by the session (1..255 bytes, no NUL, no '/'). Errors are -errno.
 */
#ifndef VND_FS_H
#define VND_FS_H
#include <stddef.h>
#include <stdint.h>

#include "store.h"
#include "vnd.h"

struct fs;

/* Directory listing: called per entry; non-zero = no room, the entry was not taken, stop. next_off is the cookie
 * that continues after it. For "." and ".." attr is NULL; others carry attr when want_attr was set. */
typedef int (*fs_dir_put)(void *ctx, uint64_t ino, const char *name, size_t name_len, uint32_t type,
                          uint64_t next_off, const vnd_attr *attr);

struct fs_ops {
    const char *name;               /* "rafs", "pseudo", ... */
    int (*getattr)(struct fs *fs, uint64_t ino, vnd_attr *out);
    int (*lookup)(struct fs *fs, uint64_t dir, const char *name, size_t len, vnd_attr *out);   /* out->ino too */
    int (*readdir)(struct fs *fs, uint64_t dir, uint64_t off, int want_attr, fs_dir_put put, void *ctx);
    /* Copies the target, no NUL: its length, -ERANGE if cap is less. */
    int64_t (*readlink)(struct fs *fs, uint64_t ino, char *buf, size_t cap);
    /* Extents of file bytes [off, off+len) cut at end of file: their number (0 = at or past it); *got their
     * bytes. */
    int (*extents)(struct fs *fs, uint64_t ino, uint64_t off, uint32_t len, struct extent *ext, int max,
                   uint32_t *got);
    /* NUL-ended names; *need always gets the full length. cap 0 asks for it alone; -ERANGE if 0 < cap < *need. */
    int (*listxattr)(struct fs *fs, uint64_t ino, char *buf, size_t cap, size_t *need);
    int (*getxattr)(struct fs *fs, uint64_t ino, const char *name, size_t len, char *buf, size_t cap, size_t *need);
    int (*statfs)(struct fs *fs, uint64_t *blocks, uint64_t *files, uint32_t *bsize);
    uint64_t (*root)(struct fs *fs);
    int (*has_xattr)(struct fs *fs);    /* 0: no inode of it has any */
};

struct fs {
    const struct fs_ops *ops;
    const char *label;              /* what people call it in log lines: the image's path; may be NULL */
};

#endif
