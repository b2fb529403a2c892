/* fs/fs.h -- what a file system offers to the FUSE session: a table of operations. rafs/, passthrough/ and fs/pseudo.c each
 * have one; the mount table over them is fs/vfs.h.
 *
 * Threads: serving threads call the operations, several at once, while the file system is mounted. Locks: the caller
 * holds none. Ownership: who made a struct fs frees it, after it is unmounted; strings and buffers are borrowed for the
 * call. A file system knows no queue, request or serial, and may use base/, blob/ and store/.
 *
 * ino is the file system's own inode number, below 2^48. The session has checked names: 1 to 255 bytes, no NUL, no '/'.
 * Errors are -errno. "May block": the call may wait for a disk or a network; all others end within microseconds and
 * neither allocate nor lock.
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

/* One entry of a listing. attr is NULL for "." and "..", and where it was not asked for. */
struct fs_entry {
    uint64_t ino, next_off; /* next_off: the cookie of what follows */
    const char *name;
    size_t len;
    uint32_t type; /* DT_* */
    const vnd_attr *attr;
};
/* Takes an entry. Not 0: it has no room and was not taken; the listing ends there. */
typedef int (*fs_put_entry)(void *ctx, const struct fs_entry *e);

struct fs_listing {
    uint64_t dir, fh, off; /* fh: of an open directory, 0 in an image; off: a cookie, 0 the start */
    bool want_attr;
    fs_put_entry put;
    void *ctx;
};

/* Where names or a value of extended attributes go. cap 0 asks for the length alone; need always gets the full length. */
struct fs_buf {
    char *at;
    size_t cap, need;
};

/* Where extents go. */
struct fs_extents {
    struct extent *at;
    int max;
    uint32_t bytes; /* out: how many bytes of the file they hold */
    /* For a file whose extents are known only when a blob's chunk table is loaded: linked, where extents gives -EINPROGRESS.
     * NULL: the caller cannot wait. */
    struct store_wait *wait;
};

struct fs_ops {
    const char *name; /* "rafs", "pseudo", "passthrough" */
    /* For GETATTR, and when a mount covers a name. */
    int (*getattr)(struct fs *fs, uint64_t ino, vnd_attr *out);
    /* For LOOKUP; "." and ".." too. name is NUL-ended. out->ino is the entry's. In a read-write file system it owes one count: the entry
     * stays known until forget takes the count back. -ENOENT; -ESTALE where dir is not known; -EIO where an image is
     * malformed. In a read-write file system it may block. */
    int (*lookup)(struct fs *fs, uint64_t dir, const char *name, size_t len, vnd_attr *out);
    /* For READDIR and READDIRPLUS: gives entries from l->off on. In a read-write file system each entry with attributes
     * that was taken owes one count, as lookup does, and the call may block. 0 at the end or when put had no room. */
    int (*readdir)(struct fs *fs, const struct fs_listing *l);
    /* Copies the target without a NUL: its length; -ERANGE if cap is less; -EINVAL if ino is no symlink. */
    int64_t (*readlink)(struct fs *fs, uint64_t ino, char *buf, size_t cap);
    /* For READ in an image: the extents of file bytes [off, off+len), cut at the end of the file. Their number; 0 when off
     * is at or past the end; -EINPROGRESS: out->wait will be woken, then call again. */
    int (*extents)(struct fs *fs, uint64_t ino, uint64_t off, uint32_t len, struct fs_extents *out);
    /* For LSEEK of a regular file: the first byte from off on that is in a hole, or (hole false) in data; off is below the
     * file's size. More than the size is its end. -ENXIO: no data follows. The first call for an image reads its chunk
     * records and allocates. NULL: the file system knows no holes. */
    int64_t (*seek)(struct fs *fs, uint64_t ino, uint64_t off, bool hole);
    /* Names, each with its NUL. 0, or -ERANGE where cap is not 0 and too small. */
    int (*listxattr)(struct fs *fs, uint64_t ino, struct fs_buf *out);
    /* 0, -ENODATA, or -ERANGE as listxattr. */
    int (*getxattr)(struct fs *fs, uint64_t ino, const char *name, size_t len, struct fs_buf *out);
    int (*statfs)(struct fs *fs, uint64_t *blocks, uint64_t *files, uint32_t *bsize);
    uint64_t (*root)(struct fs *fs);
    bool (*has_xattr)(struct fs *fs); /* false: no inode of it has extended attributes */
    /* At OPEN where the kernel reads files by itself (fs/backing.h): a descriptor, the caller's, whose bytes are the
     * file's at the same offsets for as long as it is open. May block. -errno: not now. NULL: never. */
    int (*backing_fd)(struct fs *fs, uint64_t ino);
    const struct fs_rw_ops *rw; /* NULL: read-only and immutable */
};

/* Who asks, as the guest's kernel says it. umask: for what the caller makes. */
struct fs_caller {
    uint32_t uid, gid, umask;
};

/* A name to be made. */
struct fs_make {
    struct fs_caller who;
    uint64_t dir;
    const char *name;    /* NUL-ended; "" for tmpfile */
    uint32_t mode, rdev; /* mode with its type; rdev as in vnd_attr */
    uint32_t flags;      /* create, tmpfile: of the guest's open */
    bool kill;           /* create: O_TRUNC clears set-id bits */
};

struct fs_rename {
    struct fs_caller who;
    uint64_t dir, new_dir;
    const char *name, *new_name; /* NUL-ended */
    uint32_t flags;              /* of renameat2 */
};

/* Bytes of an open file, from off on. */
struct fs_io {
    uint64_t ino, fh, off;
    const struct iovec *iov;
    int n;
    bool append; /* write: at the end, wherever that is */
    bool kill;   /* write: clears set-id bits, as a plain user's write does */
};

struct fs_xattr {
    const char *name; /* NUL-ended */
    const void *value;
    size_t len;
    uint32_t flags; /* of setxattr */
};

/* What one session holds of a file system: so many look-ups of an inode, or an open file (n is 1). owner: the number of the
 * session's front-end, which is the same in every process that serves it. */
struct fs_held {
    uint32_t owner;
    bool file;
    uint64_t id, n; /* inode number, or fh */
};
typedef void (*fs_take_held)(void *ctx, const struct fs_held *h, uint32_t at);

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

/* A file system that is written to and that changes by itself. Each entry that it gives out (lookup, make, link, a
 * readdir entry with attributes) counts once until forget takes that back. fh names an open file; 0 is none. Every
 * operation but forget, release, run and may_wait may block: the session serves those that are known to take long
 * on run's threads. */
struct fs_rw_ops {
    uint32_t valid_ms; /* how long a guest may keep entries and attributes */
    /* For FORGET and BATCH_FORGET, and for an entry that was not taken. More than was counted is all of it. */
    void (*forget)(struct fs *fs, uint64_t ino, uint64_t n);
    /* For OPEN and OPENDIR: *fh is owed a release. kill: O_TRUNC clears set-id bits. */
    int (*open)(struct fs *fs, uint64_t ino, uint32_t flags, bool dir, bool kill, uint64_t *fh);
    void (*release)(struct fs *fs,
                    uint64_t fh);             /* for RELEASE and RELEASEDIR; calls that still use the file end first */
    int (*flush)(struct fs *fs, uint64_t fh); /* at each close of a guest's: gives what close(2) would give */
    int (*getattr)(struct fs *fs, uint64_t ino, uint64_t fh, vnd_attr *out); /* by an open file */
    int (*setattr)(struct fs *fs, uint64_t ino, uint64_t fh, const struct fs_setattr *set, vnd_attr *out);
    /* These give an entry (one count); create and tmpfile also an open file (one release). Where one fails, nothing is
     * made. create opens what is there already unless O_EXCL is given. */
    int (*create)(struct fs *fs, const struct fs_make *make, vnd_attr *out, uint64_t *fh);
    int (*tmpfile)(struct fs *fs, const struct fs_make *make, vnd_attr *out, uint64_t *fh);
    int (*mknod)(struct fs *fs, const struct fs_make *make, vnd_attr *out); /* for MKDIR too, by the type in mode */
    int (*symlink)(struct fs *fs, const struct fs_make *make, const char *target, vnd_attr *out);
    int (*link)(struct fs *fs, uint64_t ino, uint64_t dir, const char *name, vnd_attr *out);
    int (*unlink)(struct fs *fs, uint64_t dir, const char *name, bool is_dir);
    int (*rename)(struct fs *fs, const struct fs_rename *what);
    /* These move as much as the host does. read with w: -EINPROGRESS means that w will be woken, and the call is to be
     * made again; with w NULL it blocks instead. */
    int64_t (*read)(struct fs *fs, const struct fs_io *io, struct store_wait *w);
    int64_t (*write)(struct fs *fs, const struct fs_io *io);
    /* These three may take seconds. sync with fh 0: the whole file system. */
    int (*sync)(struct fs *fs, uint64_t ino, uint64_t fh, bool data_only);
    int (*fallocate)(struct fs *fs, uint64_t ino, uint64_t fh, uint32_t mode, uint64_t off, uint64_t len);
    int64_t (*copy)(struct fs *fs, uint64_t fh_in, uint64_t off_in, uint64_t fh_out, uint64_t off_out, uint64_t len);
    int64_t (*lseek)(struct fs *fs, uint64_t ino, uint64_t fh, uint64_t off, uint32_t whence);
    int (*setxattr)(struct fs *fs, const struct fs_caller *who, uint64_t ino, const struct fs_xattr *x);
    int (*removexattr)(struct fs *fs, uint64_t ino, const char *name);
    int (*statvfs)(struct fs *fs, uint64_t ino, struct statvfs *out);
    /* Runs fn(arg) on a thread that may block, then wakes w. -EINPROGRESS, or another -errno and fn is not run. */
    int (*run)(struct fs *fs, struct store_wait *w, void (*fn)(void *arg), void *arg);
    /* Notes what a session holds in memory that outlives the process, where there is such; h->n 0: nothing any more. *at is the
     * note's, and 0 at first. */
    void (*note_held)(struct fs *fs, const struct fs_held *h, uint32_t *at);
    /* Gives what a session of that owner held in another process. */
    void (*each_held)(struct fs *fs, uint32_t owner, fs_take_held take, void *ctx);
    /* True: any call on this node may take long, because a network or another process answers it. */
    bool (*may_wait)(struct fs *fs, uint64_t ino);
};

struct fs {
    const struct fs_ops *ops;
    const char *label;          /* its name in log lines: the image's path; may be NULL */
    struct fs_metrics *metrics; /* NULL: its operations are counted by the engine alone */
};

#endif
