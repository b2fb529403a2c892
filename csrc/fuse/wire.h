/* fuse/wire.h -- the FUSE protocol's structures and numbers (kernel's include/uapi/linux/fuse.h, protocol 7.45),
 * as far as a server needs them. Sizes are asserted; everything is little-endian on the hosts we build for.
 */
#ifndef VND_FUSE_WIRE_H
#define VND_FUSE_WIRE_H
#include <assert.h>
#include <stdint.h>

#define FUSE_WIRE_MAJOR 7
#define FUSE_WIRE_MINOR 38 /* what we implement and answer at most */

struct fuse_in_header {
    uint32_t len, opcode;
    uint64_t unique, nodeid;
    uint32_t uid, gid, pid;
    uint16_t total_extlen, padding;
};
struct fuse_out_header {
    uint32_t len;
    int32_t error;
    uint64_t unique;
};

enum fuse_wire_op {
    FUSE_OP_LOOKUP = 1,
    FUSE_OP_FORGET = 2,
    FUSE_OP_GETATTR = 3,
    FUSE_OP_SETATTR = 4,
    FUSE_OP_READLINK = 5,
    FUSE_OP_SYMLINK = 6,
    FUSE_OP_MKNOD = 8,
    FUSE_OP_MKDIR = 9,
    FUSE_OP_UNLINK = 10,
    FUSE_OP_RMDIR = 11,
    FUSE_OP_RENAME = 12,
    FUSE_OP_LINK = 13,
    FUSE_OP_OPEN = 14,
    FUSE_OP_READ = 15,
    FUSE_OP_WRITE = 16,
    FUSE_OP_STATFS = 17,
    FUSE_OP_RELEASE = 18,
    FUSE_OP_FSYNC = 20,
    FUSE_OP_SETXATTR = 21,
    FUSE_OP_GETXATTR = 22,
    FUSE_OP_LISTXATTR = 23,
    FUSE_OP_REMOVEXATTR = 24,
    FUSE_OP_FLUSH = 25,
    FUSE_OP_INIT = 26,
    FUSE_OP_OPENDIR = 27,
    FUSE_OP_READDIR = 28,
    FUSE_OP_RELEASEDIR = 29,
    FUSE_OP_FSYNCDIR = 30,
    FUSE_OP_GETLK = 31,
    FUSE_OP_SETLK = 32,
    FUSE_OP_SETLKW = 33,
    FUSE_OP_ACCESS = 34,
    FUSE_OP_CREATE = 35,
    FUSE_OP_INTERRUPT = 36,
    FUSE_OP_BMAP = 37,
    FUSE_OP_DESTROY = 38,
    FUSE_OP_IOCTL = 39,
    FUSE_OP_POLL = 40,
    FUSE_OP_NOTIFY_REPLY = 41,
    FUSE_OP_BATCH_FORGET = 42,
    FUSE_OP_FALLOCATE = 43,
    FUSE_OP_READDIRPLUS = 44,
    FUSE_OP_RENAME2 = 45,
    FUSE_OP_LSEEK = 46,
    FUSE_OP_COPY_FILE_RANGE = 47,
    FUSE_OP_SETUPMAPPING = 48,
    FUSE_OP_REMOVEMAPPING = 49,
    FUSE_OP_SYNCFS = 50,
    FUSE_OP_TMPFILE = 51,
    FUSE_OP_STATX = 52,
    FUSE_OP_MAX = 53
};

struct fuse_attr {
    uint64_t ino, size, blocks, atime, mtime, ctime;
    uint32_t atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags;
};
struct fuse_entry_out {
    uint64_t nodeid, generation, entry_valid, attr_valid;
    uint32_t entry_valid_nsec, attr_valid_nsec;
    struct fuse_attr attr;
};
struct fuse_attr_out {
    uint64_t attr_valid;
    uint32_t attr_valid_nsec, dummy;
    struct fuse_attr attr;
};
struct fuse_getattr_in {
    uint32_t flags, dummy;
    uint64_t fh;
};
struct fuse_open_in {
    uint32_t flags, open_flags;
};
struct fuse_open_out {
    uint64_t fh;
    uint32_t open_flags;
    int32_t backing_id;
};
struct fuse_read_in {
    uint64_t fh, offset;
    uint32_t size, read_flags;
    uint64_t lock_owner;
    uint32_t flags, padding;
};
struct fuse_getxattr_in {
    uint32_t size, padding;
};
struct fuse_getxattr_out {
    uint32_t size, padding;
};
struct fuse_access_in {
    uint32_t mask, padding;
};
struct fuse_forget_in {
    uint64_t nlookup;
};
struct fuse_batch_forget_in {
    uint32_t count, dummy;
};
struct fuse_forget_one {
    uint64_t nodeid, nlookup;
};
struct fuse_setattr_in {
    uint32_t valid, padding;
    uint64_t fh, size, lock_owner, atime, mtime, ctime;
    uint32_t atimensec, mtimensec, ctimensec, mode, unused4, uid, gid, unused5;
};
struct fuse_create_in {
    uint32_t flags, mode, umask, open_flags;
}; /* CREATE, TMPFILE; name follows */
struct fuse_mknod_in {
    uint32_t mode, rdev, umask, padding;
}; /* name follows */
struct fuse_mkdir_in {
    uint32_t mode, umask;
}; /* name follows */
struct fuse_rename_in {
    uint64_t newdir;
}; /* two names follow */
struct fuse_rename2_in {
    uint64_t newdir;
    uint32_t flags, padding;
}; /* two names follow */
struct fuse_link_in {
    uint64_t oldnodeid;
}; /* name follows */
struct fuse_write_in {
    uint64_t fh, offset;
    uint32_t size, write_flags;
    uint64_t lock_owner;
    uint32_t flags, padding;
}; /* data follows */
struct fuse_write_out {
    uint32_t size, padding;
};
struct fuse_release_in {
    uint64_t fh;
    uint32_t flags, release_flags;
    uint64_t lock_owner;
};
struct fuse_flush_in {
    uint64_t fh;
    uint32_t unused, padding;
    uint64_t lock_owner;
};
struct fuse_fsync_in {
    uint64_t fh;
    uint32_t fsync_flags, padding;
};
struct fuse_setxattr_in {
    uint32_t size, flags;
}; /* name, then value follow */
struct fuse_fallocate_in {
    uint64_t fh, offset, length;
    uint32_t mode, padding;
};
struct fuse_copy_file_range_in {
    uint64_t fh_in, off_in, nodeid_out, fh_out, off_out, len, flags;
};
struct fuse_lseek_in {
    uint64_t fh, offset;
    uint32_t whence, padding;
};
struct fuse_lseek_out {
    uint64_t offset;
};
struct fuse_kstatfs {
    uint64_t blocks, bfree, bavail, files, ffree;
    uint32_t bsize, namelen, frsize, padding, spare[6];
};
struct fuse_dirent {
    uint64_t ino, off;
    uint32_t namelen, type;
}; /* name follows, padded to 8 */
struct fuse_init_in {
    uint32_t major, minor, max_readahead, flags, flags2, unused[11];
};
struct fuse_init_out {
    uint32_t major, minor, max_readahead, flags;
    uint16_t max_background, congestion_threshold;
    uint32_t max_write, time_gran;
    uint16_t max_pages, map_alignment;
    uint32_t flags2, max_stack_depth;
    uint16_t request_timeout, unused[11];
};

#define FUSE_INIT_ASYNC_READ (1ull << 0)
#define FUSE_INIT_ATOMIC_O_TRUNC (1ull << 3)
#define FUSE_INIT_EXPORT_SUPPORT (1ull << 4)
#define FUSE_INIT_BIG_WRITES (1ull << 5)
#define FUSE_INIT_DONT_MASK (1ull << 6)
#define FUSE_INIT_AUTO_INVAL_DATA (1ull << 12)
#define FUSE_INIT_DO_READDIRPLUS (1ull << 13)
#define FUSE_INIT_READDIRPLUS_AUTO (1ull << 14)
#define FUSE_INIT_ASYNC_DIO (1ull << 15)
#define FUSE_INIT_PARALLEL_DIROPS (1ull << 18)
#define FUSE_INIT_POSIX_ACL (1ull << 20)
#define FUSE_INIT_MAX_PAGES (1ull << 22)
#define FUSE_INIT_CACHE_SYMLINKS (1ull << 23)
#define FUSE_INIT_EXPLICIT_INVAL_DATA (1ull << 25)
#define FUSE_INIT_HANDLE_KILLPRIV_V2 (1ull << 28)
#define FUSE_INIT_INIT_EXT (1ull << 30)
#define FUSE_INIT_PASSTHROUGH (1ull << 37)
#define FUSE_INIT_NO_EXPORT_SUPPORT (1ull << 38)

#define FUSE_OPEN_KILL_SUIDGID (1u << 0) /* in OPEN's and CREATE's request */
#define FUSE_WRITE_CACHE (1u << 0)       /* a page of the guest's cache: its place is offset, O_APPEND or not */
#define FUSE_WRITE_KILL_SUIDGID (1u << 2)
#define FUSE_GETATTR_FH (1u << 0)
#define FUSE_FSYNC_FDATASYNC (1u << 0)
#define FUSE_SET_SIZE (1u << 3)
#define FUSE_SET_FH (1u << 6) /* in SETATTR's valid; 0..5 as fs/fs.h's, then */
#define FUSE_SET_ATIME_NOW (1u << 7)
#define FUSE_SET_MTIME_NOW (1u << 8)
#define FUSE_SET_KILL_SUIDGID (1u << 11)

#define FUSE_OPEN_KEEP_CACHE (1u << 1)
#define FUSE_OPEN_CACHE_DIR (1u << 3)
#define FUSE_OPEN_NOFLUSH (1u << 5)
#define FUSE_OPEN_PASSTHROUGH (1u << 7)

static_assert(sizeof(struct fuse_in_header) == 40, "in header");
static_assert(sizeof(struct fuse_out_header) == 16, "out header");
static_assert(sizeof(struct fuse_attr) == 88, "attr");
static_assert(sizeof(struct fuse_entry_out) == 128, "entry");
static_assert(sizeof(struct fuse_attr_out) == 104, "attr_out");
static_assert(sizeof(struct fuse_read_in) == 40, "read_in");
static_assert(sizeof(struct fuse_setattr_in) == 88, "setattr_in");
static_assert(sizeof(struct fuse_write_in) == 40, "write_in");
static_assert(sizeof(struct fuse_copy_file_range_in) == 56, "copy_file_range_in");
static_assert(sizeof(struct fuse_kstatfs) == 80, "statfs");
static_assert(sizeof(struct fuse_init_in) == 64, "init_in");
static_assert(sizeof(struct fuse_init_out) == 64, "init_out");

#endif
