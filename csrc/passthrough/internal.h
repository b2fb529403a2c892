/* passthrough/internal.h -- what the files of this folder share. From the bottom: cred, mounts, places, nodes, learn, handles,
 * threads, files, names, passthrough.
 */
#ifndef VND_PASSTHROUGH_INTERNAL_H
#define VND_PASSTHROUGH_INTERNAL_H
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/stat.h>

#include "base/base.h"
#include "base/ledger.h"
#include "base/turns.h"
#include "passthrough/passthrough.h"

#define PT_CACHE_MAX 4096 /* cached descriptors; fewer where an eighth of RLIMIT_NOFILE is less */
#define PT_IDLE_MS 1000
#define PT_THREADS 10
/* That one guest may have busy: a host call can take long, and another guest's must not wait for it. */
#define PT_THREADS_EACH 8
#define PT_BUCKETS_LOG2 10 /* of an empty share; the tables grow with the nodes */
#define PT_DEVICES 128     /* numbers of devices that fit into an inode number */
#define PT_HANDLE_MAX 128  /* bytes: the kernel's MAX_HANDLE_SZ */
#define PT_INO_TOP (1ull << 47)
#define PT_ROOT_INO PT_INO_TOP
#define PT_HOST_INO_BITS 40
enum { PT_KEPT_NEXT_INO, PT_KEPT_NEXT_GEN }; /* numbers in the ledger's head */

struct pt_node;

/* A file handle with room for the longest. */
struct pt_fid {
    struct file_handle h;
    uint8_t room[PT_HANDLE_MAX];
};

/* One device that files of one mount are on. A mount may show several: overlayfs gives each layer's files a device of their
 * own, btrfs each subvolume. Its place in the table is its part of inode numbers. */
struct pt_device {
    uint64_t mount_id;
    dev_t dev;
    uint32_t nodes; /* that use the entry; 0: it is free */
};

struct pt_mount {
    uint64_t id;   /* the kernel's mount id; a unique one where the kernel gives that */
    uint32_t refs; /* nodes */
    int fd;        /* for open_by_handle_at; -1 */
    uint32_t fd_users;
    bool fd_used, fd_drop;
    bool remote;           /* a network or another process answers its calls */
    bool no_fd;            /* its root cannot be opened (a device bound onto a file): its nodes keep descriptors */
    struct pt_node *above; /* the directory that holds the mount point; NULL: the source's own mount */
    struct pt_mount *next;
    uint32_t kept_at; /* its record in the ledger; 0: none */
    char name[256];
};

struct pt_node {
    struct pt_node *next_ino, *next_key;
    struct pt_mount *mount;
    uint64_t ino, host_ino, generation;
    dev_t dev;              /* with mount and host_ino: which file of the host it is */
    uint32_t device;        /* entry of the table of devices; PT_DEVICES: none was free */
    uint64_t nlookup;       /* look-ups that guests have not forgotten */
    uint32_t refs;          /* users, open files, the table, mounts whose mount point it holds; freed at 0 */
    uint32_t type;          /* S_IFMT bits */
    bool linked;            /* in the table */
    bool fd_kept;           /* it has no handle: fd stays open while there is room for it */
    struct pt_place *place; /* without a handle: where it is found again; NULL: nowhere, so fd is never closed */
    struct pt_node *next_kept, **prev_kept; /* list of those with fd_kept and a place */
    bool fd_used, fd_drop;
    int fd;            /* O_PATH; -1: none */
    uint32_t cache_at; /* its place in the cache, if fd is not kept */
    uint32_t fd_users;
    struct pt_file *files;
    uint32_t kept_at; /* its record in the ledger; 0: none */
    int handle_type;
    uint32_t handle_bytes;
    uint8_t handle[];
};

/* Where a node without a handle is found again. */
struct pt_place {
    uint64_t dir;                 /* node of the directory */
    struct statx_timestamp birth; /* where the host tells none: the last change that was seen */
    bool born;
    uint32_t name_len;
    char name[];
};

struct pt_file {
    struct pt_file *next; /* the node's list */
    struct pt_node *node;
    int fd;
    uint32_t refs; /* 1 while the guest holds it, and one for each use */
    uint32_t gen;  /* upper half of its fh */
    uint32_t slot;
    uint32_t kept_at; /* its record in the ledger; 0: none */
    bool dir;
    pthread_mutex_t dir_lock; /* of an open directory: its position, and what follows */
    uint8_t *entries;         /* read from the host and not all taken yet, from entries_at to entries_end */
    uint32_t entries_at, entries_end;
    uint64_t entries_off; /* the cookie of entries_at */
};

struct pt_task {
    struct turn_item turn; /* first */
    void (*run)(void *arg);
    void *arg;
    struct store_wait *wait;
};

struct pt_pool {
    pthread_mutex_t lock;
    pthread_cond_t some;
    struct turns tasks;
    bool down;
    uint32_t threads, idle, queued; /* a thread is started when more tasks are queued than threads are idle */
    pthread_t thread[PT_THREADS];
    uintptr_t serves[PT_THREADS]; /* the guest whose task each thread runs; TURNS_NO_GUEST: it runs none */
};

struct vnd_passthrough {
    struct fs fs; /* first */
    struct vnd_engine *engine;
    char *source;
    uint32_t flags;
    bool handles; /* this process may open file handles */
    int root_fd;
    int proc_fd; /* /proc/self/fd: names in it are numbers of descriptors */
    struct pt_node *root;
    struct pt_pool pool;
    struct ledger *ledger;     /* what outlives the process; NULL: nothing. Set before it is mounted */
    _Atomic uint32_t n_remote; /* mounts that a network or another process answers for */
    _Atomic bool has_places;   /* some node has or had one */

    pthread_mutex_t lock;              /* of all that follows */
    struct pt_node **by_ino, **by_key; /* 1 << buckets_log2 lists each; at most one node a list on average */
    uint32_t buckets_log2;
    struct pt_mount *mounts;
    struct pt_device devices[PT_DEVICES];
    uint64_t next_ino, n_nodes;
    uint32_t kept_max, cached_max;       /* of the daemon: engine's kept_fds and cached_fds */
    struct pt_node *kept, **kept_last;   /* oldest first */
    struct pt_node *cache[PT_CACHE_MAX]; /* nodes with a cached fd */
    uint32_t hand, n_cached, cache_max;
    struct pt_file **files; /* by slot */
    uint32_t n_slots, n_files, files_max, free_hint, next_gen;
};

static inline struct vnd_passthrough *pt_of(struct fs *fs)
{
    return (struct vnd_passthrough *)(void *)fs;
}

/* The name of a descriptor in proc_fd, for calls that take no O_PATH descriptor: a magic link to the inode itself. */
static inline const char *pt_fd_name(char name[12], int fd)
{
    snprintf(name, 12, "%d", fd);
    return name;
}

/* A node in use, and a descriptor to reach it: O_PATH, borrowed from the node or (own) to be closed. */
struct pt_ref {
    struct pt_node *node;
    int fd;
    bool own;
};

/* ---- passthrough/mounts.c */
struct statx;
/* Basic facts of an open descriptor, and its mount's id. 0 or -errno. Outside the lock. */
int pt_stat(int fd, struct statx *sx);
dev_t pt_dev_of(const struct statx *sx);
/* The same with the time of birth, where the host tells it: some must ask another process for that. */
int pt_stat_birth(int fd, struct statx *sx);
/* These three under the lock. find: with one ref, or NULL. add: with one ref; NULL: no memory. put gives one ref back;
 * when it was the last, the mount is freed, and its ref on the directory above (or NULL) is the caller's. */
struct pt_mount *pt_mount_find(struct vnd_passthrough *p, uint64_t id);
struct pt_mount *pt_mount_add(struct vnd_passthrough *p, uint64_t id, struct pt_node *above, const char *name,
                              bool remote);
struct pt_node *pt_mount_put(struct vnd_passthrough *p, struct pt_mount *m);
void pt_mounts_drop_idle(struct vnd_passthrough *p, bool even_used); /* under the lock */
/* Outside the lock: the mount's descriptor, in use until pt_mount_fd_put. get: the one that is there, or -ENOENT. open:
 * opens it by its name in the directory above. -ESTALE: the host has taken the mount away. */
int pt_mount_fd_get(struct vnd_passthrough *p, struct pt_mount *m);
int pt_mount_fd_open(struct vnd_passthrough *p, struct pt_mount *m, int above_fd);
void pt_mount_fd_put(struct vnd_passthrough *p, struct pt_mount *m);

/* ---- passthrough/places.c: nodes that have no handle. All under the lock, but pt_place_is */
/* The node is called name in that directory. False: no memory; the place it had stays. */
bool pt_place_set(struct pt_node *n, uint64_t dir, const char *name, const struct statx *sx);
/* False: another file has the node's number by now. */
bool pt_place_holds(const struct pt_node *n, const struct statx *sx);
/* What was found at that place, a copy of the node's, is the node. */
bool pt_place_is(const struct pt_place *p, const struct pt_node *n, const struct statx *sx);
/* The node, which is new, keeps a descriptor of its own; older ones that are idle and have a place lose theirs for it. 0,
 * -ENFILE: no room, or -errno. */
int pt_keep_fd(struct vnd_passthrough *p, struct pt_node *n, int fd);
void pt_unkeep_fd(struct vnd_passthrough *p, struct pt_node *n); /* closes it */

/* ---- passthrough/nodes.c */
int pt_tables_new(struct vnd_passthrough *p);                          /* 0 or -ENOMEM; pt_nodes_free frees them */
void pt_nodes_free(struct vnd_passthrough *p);                         /* when no call is in the file system */
struct pt_node *pt_node_at(struct vnd_passthrough *p, uint64_t ino);   /* under the lock; borrowed, or NULL */
struct pt_node *pt_node_find(struct vnd_passthrough *p, uint64_t ino); /* with one ref, or NULL */
void pt_node_put(struct vnd_passthrough *p, struct pt_node *n);
void pt_node_put_locked(struct vnd_passthrough *p, struct pt_node *n); /* under the lock; n may be NULL */
/* Under the lock: closes the node's cached descriptor, now or when its last user has gone. */
void pt_node_close(struct vnd_passthrough *p, struct pt_node *n);
/* These three under the lock. of: the node of the host's file that statx tells of; borrowed, or NULL. link: into the tables,
 * which take a ref. unlink: out of them, and gives that ref back. */
struct pt_node *pt_node_of(struct vnd_passthrough *p, const struct pt_mount *m, const struct statx *sx);
void pt_node_link(struct vnd_passthrough *p, struct pt_node *n);
void pt_node_unlink(struct vnd_passthrough *p, struct pt_node *n);
void pt_forget(struct vnd_passthrough *p, uint64_t ino, uint64_t n);
void pt_forget_all(struct vnd_passthrough *p);
/* Closes cached descriptors that were not used since the last call, or (even_used) all of them. */
void pt_drop_idle(struct vnd_passthrough *p, bool even_used);
/* After a call failed. True: descriptors were used up and some were closed, so the call is to be tried again. */
bool pt_make_room(struct vnd_passthrough *p, bool *tried);
/* True: a network or another process answers for the node, or for a mount in it. */
bool pt_is_on_remote(struct vnd_passthrough *p, uint64_t ino);

/* ---- passthrough/kept.c: what outlives the process (restore.c goes on with it). All but the last two under the lock */
void pt_keep_mount(struct vnd_passthrough *p, struct pt_mount *m);
void pt_keep_node(struct vnd_passthrough *p, struct pt_node *n);
void pt_keep_file(struct vnd_passthrough *p, struct pt_file *f);
void pt_note_held(struct fs *fs, const struct fs_held *h, uint32_t *at);
void pt_each_held(struct fs *fs, uint32_t owner, fs_take_held take, void *ctx);

/* ---- passthrough/learn.c */
/* Opens the source's own directory as the root: 0 or -errno. */
int pt_root_open(struct vnd_passthrough *p);
/* Makes known what fd (of any open mode) stands for, counts one look-up and fills *out. take: fd is closed. above and
 * name: the directory and the name that led to it; above NULL: -ESTALE unless it is known already. */
int pt_learn(struct vnd_passthrough *p, struct pt_node *above, const char *name, int fd, bool take, vnd_attr *out);
/* The inode number that a listing of dir gives for a number of the host's. */
uint64_t pt_ino_in(const struct pt_node *dir, uint64_t host_ino);
int pt_fill_attr(const struct pt_node *n, int fd, vnd_attr *out);

/* ---- passthrough/handles.c */
/* Under the lock. Keeps an O_PATH descriptor in the node for next time. False: the cache has no place for it. */
bool pt_cache_fd(struct vnd_passthrough *p, struct pt_node *n, int fd);
/* A reference to a node, until pt_put. 0, -ESTALE (not known, or gone), -ENFILE, or another -errno of the host. */
int pt_get(struct vnd_passthrough *p, uint64_t ino, struct pt_ref *ref);
void pt_put(struct vnd_passthrough *p, struct pt_ref *ref);
/* Opens a regular file or directory for real; flags may hold an access mode, O_TRUNC, O_DIRECTORY, O_SYNC and the like.
 * The descriptor, or -errno; -EBADF for a node of another type. */
int pt_open_node(struct vnd_passthrough *p, struct pt_node *n, int flags);

/* ---- passthrough/names.c */
int pt_lookup(struct fs *fs, uint64_t dir, const char *name, size_t len, vnd_attr *out);
int pt_readdir(struct fs *fs, const struct fs_listing *l);
int pt_create(struct fs *fs, const struct fs_make *make, vnd_attr *out, uint64_t *fh);
int pt_tmpfile(struct fs *fs, const struct fs_make *make, vnd_attr *out, uint64_t *fh);
int pt_mknod(struct fs *fs, const struct fs_make *make, vnd_attr *out);
int pt_symlink(struct fs *fs, const struct fs_make *make, const char *target, vnd_attr *out);
int pt_link(struct fs *fs, uint64_t ino, uint64_t dir, const char *name, vnd_attr *out);
int pt_unlink(struct fs *fs, uint64_t dir, const char *name, bool is_dir);
int pt_rename(struct fs *fs, const struct fs_rename *what);

/* ---- passthrough/files.c */
/* 0 with *fh, and fd is taken; -ENFILE, -ENOMEM. */
int pt_file_add(struct vnd_passthrough *p, struct pt_node *n, int fd, uint64_t *fh);
/* Under the lock, for a file that another process had open under that fh: 0 and fd is taken, -EINVAL, -ENOMEM. */
int pt_file_restore(struct vnd_passthrough *p, struct pt_node *n, int fd, uint64_t fh, uint32_t kept_at);
/* An open file in use; NULL: no such, or not of that node (ino 0: of any). */
struct pt_file *pt_file_get(struct vnd_passthrough *p, uint64_t ino, uint64_t fh);
void pt_file_put(struct vnd_passthrough *p, struct pt_file *f);
void pt_files_free(struct vnd_passthrough *p);
int pt_open_flags(uint32_t guest); /* what of a guest's open flags reaches the host */
int pt_open(struct fs *fs, uint64_t ino, uint32_t flags, bool dir, bool kill, uint64_t *fh);
void pt_release(struct fs *fs, uint64_t fh);
int pt_flush(struct fs *fs, uint64_t fh);
int64_t pt_read(struct fs *fs, const struct fs_io *io, struct store_wait *w);
int64_t pt_write(struct fs *fs, const struct fs_io *io);
int pt_sync(struct fs *fs, uint64_t ino, uint64_t fh, bool data_only);
int pt_fallocate(struct fs *fs, uint64_t ino, uint64_t fh, uint32_t mode, uint64_t off, uint64_t len);
int64_t pt_copy(struct fs *fs, uint64_t fh_in, uint64_t off_in, uint64_t fh_out, uint64_t off_out, uint64_t len);
int64_t pt_lseek(struct fs *fs, uint64_t ino, uint64_t fh, uint64_t off, uint32_t whence);

/* ---- passthrough/threads.c */
int pt_pool_start(struct vnd_passthrough *p);
void pt_pool_stop(struct vnd_passthrough *p); /* finishes what was given to it */
/* fs_rw_ops' run and may_wait. */
int pt_run(struct fs *fs, struct store_wait *w, void (*fn)(void *arg), void *arg);
bool pt_may_wait(struct fs *fs, uint64_t ino);

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
