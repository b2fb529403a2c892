/* fs/fs.h -- what a file system offers the FUSE session. A file system is one C file and one table of these (law 6);
 * it knows nothing of queues, requests, nodeid serials or caches.
 *
 * ino is the file system's own inode number, below 2^48. Calls come from several threads at once. Strings are
 * pointer and length; names are checked by the session (1..255 bytes, no NUL, no '/'). Errors are -errno.
 */
#ifndef VND_FS_H
#define VND_FS_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>
#include <time.h>

#include "store/store.h"
#include "vnd.h"

struct fs;
struct fs_rw_ops;
struct fs_metrics;
struct statvfs;

/* Directory listing: called per entry; non-zero = no room, the entry was not taken, stop. next_off is the cookie
 * that continues after it. For "." and ".." attr is NULL; others carry attr when want_attr was set. */
typedef int (*fs_dir_put)(void *ctx, uint64_t ino, const char *name, size_t name_len, uint32_t type, uint64_t next_off,
                          const vnd_attr *attr);

struct fs_ops {
    const char *name; /* "rafs", "pseudo", ... */
    int (*getattr)(struct fs *fs, uint64_t ino, vnd_attr *out);
    int (*lookup)(struct fs *fs, uint64_t dir, const char *name, size_t len, vnd_attr *out); /* out->ino too */
    int (*readdir)(struct fs *fs, uint64_t dir, uint64_t off, bool want_attr, fs_dir_put put, void *ctx);
    /* Copies the target, no NUL: its length, -ERANGE if cap is less. */
    int64_t (*readlink)(struct fs *fs, uint64_t ino, char *buf, size_t cap);
    /* Extents of file bytes [off, off+len) cut at end of file: their number (0 = at or past it); *got their
     * bytes. */
    int (*extents)(struct fs *fs, uint64_t ino, uint64_t off, uint32_t len, struct extent *ext, int max, uint32_t *got);
    /* NUL-ended names; *need always gets the full length. cap 0 asks for it alone; -ERANGE if 0 < cap < *need. */
    int (*listxattr)(struct fs *fs, uint64_t ino, char *buf, size_t cap, size_t *need);
    int (*getxattr)(struct fs *fs, uint64_t ino, const char *name, size_t len, char *buf, size_t cap, size_t *need);
    int (*statfs)(struct fs *fs, uint64_t *blocks, uint64_t *files, uint32_t *bsize);
    uint64_t (*root)(struct fs *fs);
    bool (*has_xattr)(struct fs *fs); /* 0: no inode of it has any */
    /* A descriptor, the caller's, that the kernel may read the file's own bytes from at the same offsets, for as long as it
     * likes; -errno: not now. NULL: never. */
    int (*backing_fd)(struct fs *fs, uint64_t ino);
    const struct fs_rw_ops *rw; /* NULL: read-only and immutable */
};

/* Who asks, as the guest kernel says it. umask: of what it makes. */
struct fs_caller {
    uint32_t uid, gid, umask;
};

/* What setattr changes: bits of fs_setattr.valid. */
enum {
    FS_SET_MODE = 1,
    FS_SET_UID = 2,
    FS_SET_GID = 4,
    FS_SET_SIZE = 8,
    FS_SET_ATIME = 16,
    FS_SET_MTIME = 32,
    FS_SET_ATIME_NOW = 64,
    FS_SET_MTIME_NOW = 128,
    FS_SET_KILL = 256 /* clear set-id bits as for a plain user */
};
struct fs_setattr {
    uint32_t valid, mode, uid, gid;
    uint64_t size_bytes;
    struct timespec atime, mtime;
};

/* A file system that is written to and changes by itself. Every entry it gives out (lookup, make_*, create, tmpfile,
 * a readdir entry that was taken) counts once until forget takes it back. fh: an open file, 0 = none. Names end in a
 * NUL. The data calls move as much as the host does; all take kill to clear set-id bits as a plain user's write does. */
struct fs_rw_ops {
    uint32_t valid_ms; /* how long a guest may keep entries and attributes */
    void (*forget)(struct fs *fs, uint64_t ino, uint64_t n);
    void (*reset)(struct fs *fs); /* the session is gone: all counts and open files with it */
    int (*open)(struct fs *fs, uint64_t ino, uint32_t flags, bool dir, bool kill, uint64_t *fh);
    void (*release)(struct fs *fs, uint64_t fh);
    int (*flush)(struct fs *fs, uint64_t fh);
    int (*readdir)(struct fs *fs, uint64_t dir, uint64_t fh, uint64_t off, bool want_attr, fs_dir_put put, void *ctx);
    int (*getattr)(struct fs *fs, uint64_t ino, uint64_t fh, vnd_attr *out);
    int (*setattr)(struct fs *fs, uint64_t ino, uint64_t fh, const struct fs_setattr *set, vnd_attr *out);
    int (*create)(struct fs *fs, const struct fs_caller *who, uint64_t dir, const char *name, uint32_t flags,
                  uint32_t mode, bool kill, vnd_attr *out, uint64_t *fh);
    int (*tmpfile)(struct fs *fs, const struct fs_caller *who, uint64_t dir, uint32_t flags, uint32_t mode,
                   vnd_attr *out, uint64_t *fh);
    int (*mknod)(struct fs *fs, const struct fs_caller *who, uint64_t dir, const char *name, uint32_t mode,
                 uint32_t rdev, vnd_attr *out); /* mkdir too, by the type in mode; rdev as in vnd_attr */
    int (*symlink)(struct fs *fs, const struct fs_caller *who, uint64_t dir, const char *name, const char *target,
                   vnd_attr *out);
    int (*link)(struct fs *fs, uint64_t ino, uint64_t dir, const char *name, vnd_attr *out);
    int (*unlink)(struct fs *fs, uint64_t dir, const char *name, bool is_dir);
    int (*rename)(struct fs *fs, const struct fs_caller *who, uint64_t dir, const char *name, uint64_t new_dir,
                  const char *new_name, uint32_t flags);
    int64_t (*read)(struct fs *fs, uint64_t ino, uint64_t fh, uint64_t off, const struct iovec *iov, int n,
                    struct store_wait *w); /* -EINPROGRESS: w will be woken, call again; w NULL: waits */
    int64_t (*write)(struct fs *fs, uint64_t ino, uint64_t fh, uint64_t off, const struct iovec *iov, int n,
                     bool append, bool kill);
    /* These three may take long. sync: fh 0 means the whole file system. */
    int (*sync)(struct fs *fs, uint64_t ino, uint64_t fh, bool data_only);
    int (*fallocate)(struct fs *fs, uint64_t ino, uint64_t fh, uint32_t mode, uint64_t off, uint64_t len);
    int64_t (*copy)(struct fs *fs, uint64_t fh_in, uint64_t off_in, uint64_t fh_out, uint64_t off_out, uint64_t len);
    int64_t (*lseek)(struct fs *fs, uint64_t ino, uint64_t fh, uint64_t off, uint32_t whence);
    int (*setxattr)(struct fs *fs, const struct fs_caller *who, uint64_t ino, const char *name, const void *value,
                    size_t len, uint32_t flags);
    int (*removexattr)(struct fs *fs, uint64_t ino, const char *name);
    /* Runs fn on a thread that may wait, then wakes w: -EINPROGRESS, or -errno and nothing done. */
    int (*run)(struct fs *fs, struct store_wait *w, void (*fn)(void *arg), void *arg);
    /* Any call on this node may take long: a network or another process answers it, or calls have lately been slow. */
    bool (*may_wait)(struct fs *fs, uint64_t ino);
    void (*note_slow)(struct fs *fs); /* a call was */
    int (*statvfs)(struct fs *fs, uint64_t ino, struct statvfs *out);
};

struct fs {
    const struct fs_ops *ops;
    const char *label;          /* what people call it in log lines: the image's path; may be NULL */
    struct fs_metrics *metrics; /* NULL: its operations are counted by the engine alone */
};

#endif
