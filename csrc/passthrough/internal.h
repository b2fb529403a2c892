/* passthrough/internal.h -- a host directory as a read-write file system; private to passthrough*.c.
 *
 * passthrough/passthrough.c: life, attributes, xattrs. passthrough/nodes.c: what the guest knows, and how it is reached.
 * passthrough/mounts.c: mounts below the source.
 * passthrough/names.c: names. passthrough/files.c: open files. passthrough/threads.c: calls that may take long.
 *
 * Reach. A guest names one component at a time, below a directory it was given; that is opened O_PATH|O_NOFOLLOW, so
 * that neither "..", a path nor a symlink leads anywhere. Paths are never put together. ".." leads only to a directory
 * that the guest was given before, hence inside the source. Only regular files and directories are ever opened.
 *
 * No descriptor per inode. A node keeps the file handle (name_to_handle_at) and its mount; each use opens it anew
 * (open_by_handle_at, about a microsecond), and recently used directories and files keep an O_PATH descriptor, for
 * PT_CACHE_MAX nodes at most. A handle carries the inode's generation: a file that was deleted and whose number was
 * taken by another is ESTALE, not the other file. Where a file system has no handles (overlayfs, some FUSE) the node
 * keeps its O_PATH descriptor, for a quarter of RLIMIT_NOFILE nodes; more are ENFILE.
 *
 * Mounts. A mount below the source is known by its mount id; handles are opened on a descriptor of the very same mount,
 * so that a read-only bind stays read-only. Cached and mount descriptors pin the mount on the host: they are closed
 * when idle for PT_IDLE_MS and at drop_idle (the API's DELETE), and found again by the mount point's parent and name,
 * where the mount id must agree. Open files pin it, as they do on any host.
 *
 * ino: 0 in the top bit, 7 bits of the mount's slot, 40 of the host's inode number; where either does not fit, a
 * counter under the top bit. So equal while the guest knows the node, unique over mounts, and mostly stable beyond.
 * If the host replaces a node under the same number, the successor takes the ino over with a higher generation.
 *
 * Credentials. The guest kernel has checked permissions; what remains is whose a new object is. Making one runs under
 * the caller's fsuid and fsgid with CAP_DAC_OVERRIDE kept, CAP_FSETID gone (set-group-id directories behave) and no
 * supplementary groups: the request does not tell them. The umask is the guest's, because where a directory has a default
 * ACL it must not count; so each thread has a file system context of its own.
 *
 * Waiting. Almost all calls end in the host's caches within microseconds and run on the queue's thread. What can take
 * long is served by threads of this file system's own (fuse/detach.c), so that a slow disk below it delays neither a warm
 * read of an image nor the image's own pool: fsync, syncfs, fallocate, copy_file_range, large truncations always; every
 * call on a mount that a network or another process answers for (NFS, FUSE...), known by its type; and every call for
 * PT_SLOW_MS after one was slow, as when a disk is so busy that writes are held back. Reads that are not in the page
 * cache are read there once, then again on the queue's thread, which spares a copy.
 */
#ifndef VND_PASSTHROUGH_H
#define VND_PASSTHROUGH_H
#include <pthread.h>
#include <stdatomic.h>
#include <sys/stat.h>

#include "base/base.h"
#include "fs/fs.h"

#define PT_CACHE_MAX 4096 /* and an eighth of RLIMIT_NOFILE */
#define PT_IDLE_MS 1000
#define PT_THREADS 8
#define PT_SLOW_MS 2000
#define PT_BUCKETS 4096
#define PT_MOUNT_SLOTS 128
#define PT_INO_TOP (1ull << 47)
#define PT_ROOT_INO PT_INO_TOP
#define PT_HOST_INO_BITS 40

struct pt_node;

struct pt_mount {
    uint64_t id;   /* the kernel's mount id, unique if it gives that */
    uint32_t slot; /* PT_MOUNT_SLOTS: none */
    uint32_t refs; /* nodes */
    int fd;        /* for open_by_handle_at; -1 */
    uint32_t fd_users;
    bool fd_used, fd_drop;
    bool remote;           /* answers come from a network or another process */
    bool no_fd;            /* its root cannot be opened (a device bound onto a file): nodes keep their own */
    struct pt_node *above; /* directory that the mount point is in; NULL: the source's own */
    struct pt_mount *next;
    char name[256];
};

struct pt_node {
    struct pt_node *next_ino, *next_key;
    struct pt_mount *mount;
    uint64_t ino, host_ino, generation;
    uint64_t nlookup;
    uint32_t refs; /* users, open files, mounts above which it lies; freed at 0 when unlinked */
    uint32_t type; /* S_IFMT bits */
    bool linked;   /* in the table */
    bool fd_kept;  /* fd is all there is: never dropped */
    bool fd_used, fd_drop;
    int fd;            /* O_PATH, -1 */
    uint32_t cache_at; /* where it stands in the cache, if fd is not kept */
    uint32_t fd_users;
    struct pt_file *files;
    int handle_type;
    uint32_t handle_bytes;
    uint8_t handle[];
};

struct pt_file {
    struct pt_file *next; /* of its node */
    struct pt_node *node;
    int fd;
    uint32_t refs; /* 1 while the guest holds it, and users */
    uint32_t gen;  /* half of its fh */
    uint32_t slot;
    bool dir;
    pthread_mutex_t dir_lock; /* position of a directory */
};

struct pt_task {
    struct pt_task *next;
    void (*run)(void *arg);
    void *arg;
    struct store_wait *wait;
};

struct pt_pool {
    pthread_mutex_t lock;
    pthread_cond_t some;
    struct pt_task *head, **tail;
    bool down;
    uint32_t threads, idle, queued; /* one more is started when more is queued than are idle */
    pthread_t thread[PT_THREADS];
};

struct vnd_passthrough {
    struct fs fs; /* first */
    struct vnd_engine *engine;
    char *source;
    uint32_t flags;
    bool handles; /* file handles can be opened at all */
    int root_fd;
    struct pt_node *root;
    struct pt_pool pool;
    _Atomic uint32_t n_remote;     /* mounts that a network or another process answers for */
    _Atomic int64_t slow_until_ms; /* CLOCK_MONOTONIC_COARSE; 0: no call was slow */

    pthread_mutex_t lock; /* all below */
    struct pt_node *by_ino[PT_BUCKETS], *by_key[PT_BUCKETS];
    struct pt_mount *mounts;
    bool slot_taken[PT_MOUNT_SLOTS];
    uint64_t next_ino, n_nodes, n_kept, kept_max;
    struct pt_node *cache[PT_CACHE_MAX]; /* nodes with a cached fd */
    uint32_t hand, n_cached, cache_max;
    struct pt_file **files; /* by slot */
    uint32_t n_slots, n_files, files_max, free_hint, next_gen;
};

static inline struct vnd_passthrough *pt_of(struct fs *fs)
{
    return (struct vnd_passthrough *)(void *)fs;
}

/* A node in use with a descriptor to reach it: O_PATH, borrowed from the node or one's own. */
struct pt_ref {
    struct pt_node *node;
    int fd;
    bool own;
};

/* ---- passthrough/mounts.c */
struct statx;
/* Of an open descriptor, outside the lock: 0, -errno. Basic facts and the mount's id. */
int pt_stat(int fd, struct statx *sx);
/* These under the lock. find: with one ref, or NULL. add: with one ref; NULL: no memory. */
struct pt_mount *pt_mount_find(struct vnd_passthrough *p, uint64_t id);
struct pt_mount *pt_mount_add(struct vnd_passthrough *p, uint64_t id, struct pt_node *above, const char *name,
                              bool remote);
/* Outside the lock; may take as long as such a file system does. */
void pt_mount_put(struct vnd_passthrough *p, struct pt_mount *m);
void pt_mounts_drop_idle(struct vnd_passthrough *p, bool even_used);
/* The mount's descriptor, in use, to be put; outside the lock. -ESTALE: the host has taken the mount away. */
int pt_mount_fd_get(struct vnd_passthrough *p, struct pt_mount *m);
void pt_mount_fd_put(struct vnd_passthrough *p, struct pt_mount *m);

/* ---- passthrough/nodes.c */
int pt_root_open(struct vnd_passthrough *p);
void pt_nodes_free(struct vnd_passthrough *p);
/* 0 or -ESTALE (unknown, gone), -ENFILE, ... To be put. */
int pt_get(struct vnd_passthrough *p, uint64_t ino, struct pt_ref *ref);
void pt_put(struct vnd_passthrough *p, struct pt_ref *ref);
struct pt_node *pt_node_find(struct vnd_passthrough *p, uint64_t ino); /* one ref, or NULL */
void pt_node_put(struct vnd_passthrough *p, struct pt_node *n);
void pt_node_put_locked(struct vnd_passthrough *p, struct pt_node *n);
/* Opens a regular file or directory for real; flags may hold access mode, O_TRUNC, O_DIRECTORY, O_SYNC... -EBADF for
 * anything else. */
int pt_open_node(struct vnd_passthrough *p, struct pt_node *n, int flags);
/* What stands behind fd (any open mode) becomes known: one look-up counted, *out filled. take: fd is closed. above and
 * name: where it was found; above NULL: -ESTALE unless it is known already. */
int pt_learn(struct vnd_passthrough *p, struct pt_node *above, const char *name, int fd, bool take, vnd_attr *out);
/* One node more can become known in that directory: it needs no descriptor, or there is one. */
bool pt_has_room(struct vnd_passthrough *p, const struct pt_node *dir);
void pt_forget(struct vnd_passthrough *p, uint64_t ino, uint64_t n);
void pt_forget_all(struct vnd_passthrough *p);
void pt_drop_idle(struct vnd_passthrough *p, bool even_used); /* false: those not used since the last time */
/* After a failed open: true, once, where the process is out of descriptors and cached ones were closed: try again. */
bool pt_make_room(struct vnd_passthrough *p, bool *tried);
/* The ino that a listing shows for a host inode of that mount. */
uint64_t pt_ino_of(const struct pt_mount *m, uint64_t host_ino);
/* Its mount is remote, or such a mount hangs in it. */
bool pt_is_on_remote(struct vnd_passthrough *p, uint64_t ino);
int pt_fill_attr(const struct pt_node *n, int fd, vnd_attr *out);

/* ---- passthrough/names.c */
int pt_lookup(struct fs *fs, uint64_t dir, const char *name, size_t len, vnd_attr *out);
int pt_readdir(struct fs *fs, uint64_t dir, uint64_t fh, uint64_t off, bool want_attr, fs_dir_put put, void *ctx);
int pt_create(struct fs *fs, const struct fs_caller *who, uint64_t dir, const char *name, uint32_t flags, uint32_t mode,
              bool kill, vnd_attr *out, uint64_t *fh);
int pt_tmpfile(struct fs *fs, const struct fs_caller *who, uint64_t dir, uint32_t flags, uint32_t mode, vnd_attr *out,
               uint64_t *fh);
int pt_mknod(struct fs *fs, const struct fs_caller *who, uint64_t dir, const char *name, uint32_t mode, uint32_t rdev,
             vnd_attr *out);
int pt_symlink(struct fs *fs, const struct fs_caller *who, uint64_t dir, const char *name, const char *target,
               vnd_attr *out);
int pt_link(struct fs *fs, uint64_t ino, uint64_t dir, const char *name, vnd_attr *out);
int pt_unlink(struct fs *fs, uint64_t dir, const char *name, bool is_dir);
int pt_rename(struct fs *fs, const struct fs_caller *who, uint64_t dir, const char *name, uint64_t new_dir,
              const char *new_name, uint32_t flags);

/* ---- passthrough/files.c */
/* 0 with *fh, and fd is taken; -ENFILE, -ENOMEM. */
int pt_file_add(struct vnd_passthrough *p, struct pt_node *n, int fd, uint64_t *fh);
/* An open file in use; NULL: no such, or not of that node (ino 0: of any). */
struct pt_file *pt_file_get(struct vnd_passthrough *p, uint64_t ino, uint64_t fh);
void pt_file_put(struct vnd_passthrough *p, struct pt_file *f);
void pt_files_free(struct vnd_passthrough *p);
int pt_open_flags(uint32_t guest); /* what of a guest's open flags reaches the host */
int pt_open(struct fs *fs, uint64_t ino, uint32_t flags, bool dir, bool kill, uint64_t *fh);
void pt_release(struct fs *fs, uint64_t fh);
int pt_flush(struct fs *fs, uint64_t fh);
int64_t pt_read(struct fs *fs, uint64_t ino, uint64_t fh, uint64_t off, const struct iovec *iov, int n,
                struct store_wait *w);
int64_t pt_write(struct fs *fs, uint64_t ino, uint64_t fh, uint64_t off, const struct iovec *iov, int n, bool append,
                 bool kill);
int pt_sync(struct fs *fs, uint64_t ino, uint64_t fh, bool data_only);
int pt_fallocate(struct fs *fs, uint64_t ino, uint64_t fh, uint32_t mode, uint64_t off, uint64_t len);
int64_t pt_copy(struct fs *fs, uint64_t fh_in, uint64_t off_in, uint64_t fh_out, uint64_t off_out, uint64_t len);
int64_t pt_lseek(struct fs *fs, uint64_t ino, uint64_t fh, uint64_t off, uint32_t whence);

/* ---- passthrough/threads.c */
int pt_pool_start(struct vnd_passthrough *p);
void pt_pool_stop(struct vnd_passthrough *p); /* finishes what was given to it */
/* fs_rw_ops' run, may_wait and note_slow. */
int pt_run(struct fs *fs, struct store_wait *w, void (*fn)(void *arg), void *arg);
bool pt_may_wait(struct fs *fs, uint64_t ino);
void pt_note_slow(struct fs *fs);

/* ---- passthrough/cred.c: of the calling thread alone */
struct pt_cred {
    bool changed;
};
int pt_cred_take(const struct fs_caller *who, struct pt_cred *saved); /* ids and umask: 0, -EPERM */
void pt_cred_back(struct pt_cred *saved);
/* Without CAP_FSETID: what is written next loses its set-id bits, by the host's kernel. */
bool pt_fsetid_drop(void);
void pt_fsetid_back(bool dropped);

#endif
