/* fs/internal.h -- the mount table, as the files of this folder share it: fs/readers.c knows which readers are inside and
 * frees what was replaced, fs/vfs.c looks up, fs/mount.c mounts and unmounts. Each uses those before it. Threads and locks:
 * fs/vfs.h.
 *
 * Readers see one immutable table. A change builds the next table, publishes it, and retires the old one together with a
 * note of the readers that were inside then: it is freed by a later change, once each of these has left the request that it
 * was in. Changes are rare (a container's start) and serial.
 */
#ifndef VND_FS_INTERNAL_H
#define VND_FS_INTERNAL_H
#include <pthread.h>

#include "fs/pseudo.h"
#include "fs/vfs.h"

struct vfs_mounted {
    struct fs *fs;
    uint64_t root_ino;
    struct vfs_node on; /* what it covers */
    uint16_t serial;
    char path[]; /* normalised */
};
struct vfs_table {
    struct vfs_node root; /* what nodeid 1 means */
    uint32_t count;
    struct vfs_mounted *mounts[]; /* by serial: ascending, since serials only grow */
};
/* A reader that was inside when a table was retired. */
struct inside {
    uint64_t id, epoch;
};
/* What a change replaced. */
struct retired {
    struct retired *next;
    struct vfs_table *table;
    struct pseudo_tree *tree;
    struct vfs_mounted *mount; /* NULL: none was unmounted */
    bool waited_for;           /* vnd_vfs_umount still looks at it */
    uint32_t n;
    struct inside inside[];
};
struct vnd_vfs {
    vnd_engine *engine;
    int kind;
    struct pseudo_fs pseudo;
    _Atomic(struct vfs_table *) table;
    uint32_t next_serial;
    pthread_mutex_t lock; /* mount and umount */
    pthread_mutex_t readers_lock;
    /* Under it. */
    struct vfs_reader *readers;
    uint32_t n_readers;
    uint64_t next_id;
    struct retired *retired;
};

static inline struct vfs_table *vfs_table_of(struct vnd_vfs *v)
{
    return atomic_load_explicit(&v->table, memory_order_acquire);
}

/* ---- fs/readers.c */
/* Publishes the table, and the tree if it is not NULL. Retires what they replace, and mount (NULL: none was unmounted),
 * which vfs_wait_until_unused must then wait for. NULL: no memory, and nothing was done. With `lock` held. */
struct retired *vfs_publish(struct vnd_vfs *v, struct vfs_table *table, struct pseudo_tree *tree,
                            struct vfs_mounted *mount);
/* Returns once no request is in the mount that was retired. No lock is held: a request may take as long as it does. */
void vfs_wait_until_unused(struct vnd_vfs *v, struct retired *r);
/* Frees all that was retired; no reader is left. */
void vfs_retired_free(struct vnd_vfs *v);

/* ---- fs/vfs.c */
struct vfs_mounted *vfs_mount_find(const struct vfs_table *t, uint16_t serial); /* NULL: there is none */
/* Replaces a node that mounts of t cover by the root of the uppermost. True: it did. A mount covers an older one or a
 * pseudo directory, so the chain ends. */
bool vfs_table_cover(const struct vfs_table *t, struct vfs_node *node);

#endif
