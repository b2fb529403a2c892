/* fs/vfs.h -- the mount table: it maps FUSE nodeids to (file system, inode). It is the top of this folder.
 *
 * nodeid = 16-bit mount serial << 48 | 48-bit inode. Serial 0 holds the pseudo directories; FUSE's root is 1. A mount
 * at "/" makes nodeid 1 mean its root. A serial is given to one mount and never used again.
 *
 * Threads: serving threads resolve and look up, between vfs_enter and vfs_leave, with no lock and no allocation.
 * Control threads mount and unmount, one at a time. Locks, held for moments only: `lock` (changes of the table), then
 * `readers_lock` (the list of readers, and what is retired).
 * A request may hang, in a host's storage or in a front-end's memory. So nothing waits for one under a lock: a change
 * publishes a new table and retires the old one, which is freed once every reader that was inside has left. vnd_vfs_umount
 * alone waits, for those readers that may be in the file system which it unmounts.
 * Ownership: the vfs owns its tables and pseudo directories; a file system belongs to who mounted it and must outlive its
 * mount. Uses base/ and the rest of fs/.
 */
#ifndef VND_VFS_H
#define VND_VFS_H
#include <stdatomic.h>

#include "fs/fs.h"

struct vnd_vfs;

/* A serving thread, as the table sees it. The thread owns it and alone writes epoch and only. */
struct vfs_reader {
    _Atomic uint64_t epoch; /* odd while the thread may hold a table */
    /* The serial of the one mount whose file system the thread is in, until it leaves or calls vfs_widen; 0: any. */
    _Atomic uint32_t only;
    uint64_t id;             /* no other reader has or had it */
    struct vfs_reader *next; /* list in the vfs, under readers_lock */
};
struct vfs_node {
    struct fs *fs;
    uint64_t ino;
    uint16_t serial;
};

/* A reader calls these around each request. They do not nest. */
void vfs_enter(struct vfs_reader *w);
void vfs_leave(struct vfs_reader *w);
/* Between them: until vfs_widen the thread calls no other file system than that of the mount with this serial (0 is not one).
 * What it found of others before is not used. */
static inline void vfs_confine(struct vfs_reader *w, uint16_t serial)
{
    atomic_store_explicit(&w->only, serial, memory_order_release);
}
/* What is looked up in the table after this may be used, of every file system. */
static inline void vfs_widen(struct vfs_reader *w)
{
    if (atomic_load_explicit(&w->only, memory_order_relaxed) == 0)
        return;
    atomic_store_explicit(&w->only, 0, memory_order_relaxed);
    /* An unmounter publishes its table and then looks at only: either it sees that we may be anywhere, or we see its table. */
    atomic_thread_fence(memory_order_seq_cst);
}
/* Before its first vfs_enter, and after its last vfs_leave. */
void vfs_reader_add(struct vnd_vfs *v, struct vfs_reader *w);
void vfs_reader_remove(struct vnd_vfs *v, struct vfs_reader *w);

/* The functions from here to vfs_session_kind are called between vfs_enter and vfs_leave only (a test that unmounts nothing
 * needs no reader). */

/* 0 or -ESTALE (no such mount). The file system decides whether the inode exists. */
int vfs_resolve(struct vnd_vfs *v, uint64_t nodeid, struct vfs_node *out);
uint64_t vfs_nodeid(struct vnd_vfs *v, uint16_t serial, uint64_t ino);
/* The inode number that a guest shows of a node: the file system's own where an image is all that is mounted (its numbers
 * may be below 2^32, which 32-bit programs need), else the nodeid. */
uint64_t vfs_shown_ino(struct vnd_vfs *v, uint16_t serial, uint64_t ino);
/* Looks one path component up ("." and ".." too), over mount points in both directions. attr->ino is the file system's
 * own number. Owes what fs_ops.lookup owes. Widens a reader that is confined where the look-up leaves its mount. 0 or
 * -errno. */
struct vfs_step {
    struct vfs_reader *reader; /* who asks; NULL: no reader, nothing is unmounted meanwhile */
    const struct vfs_node *dir;
    const char *name;
    size_t len;
};
int vfs_lookup(struct vnd_vfs *v, const struct vfs_step *step, struct vfs_node *out, vnd_attr *attr);
/* Replaces a node that a mount covers by the root of that mount, and widens w (may be NULL). True if it did. */
bool vfs_cover(struct vnd_vfs *v, struct vfs_reader *w, struct vfs_node *node);
bool vfs_is_mount_root(struct vnd_vfs *v, const struct vfs_node *node);
/* False: something is mounted, and no inode of what is mounted has extended attributes. */
bool vfs_has_xattr(struct vnd_vfs *v);

/* The root of the first read-write file system that was mounted after the one with this serial (0: of all), or false. */
bool vfs_rw_after(struct vnd_vfs *v, uint16_t serial, struct vfs_node *out);
int vfs_session_kind(struct vnd_vfs *v); /* enum vnd_session_kind */
/* Mounts any file system at path. fs must outlive the mount; vnd_vfs_umount ends it. It waits for no request; where path
 * lies in another mount, for that file system's look-up. 0, -EINVAL (path), -EEXIST (mounted there), -ENOENT and -ENOTDIR (no such directory inside
 * another mount), -EBUSY (it would hide other mounts), -ENOSPC (65,535 mounts were made), -ENOMEM. */
int vfs_mount(struct vnd_vfs *v, const char *path, struct fs *fs);

#endif
