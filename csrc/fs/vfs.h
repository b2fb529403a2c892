/* fs/vfs.h -- the mount table: maps FUSE nodeids to (file system, inode).
 *
 * nodeid = 16-bit mount serial << 48 | 48-bit inode. Serial 0 holds the pseudo directories; FUSE root is 1. A
 * mount at "/" makes nodeid 1 mean its root. Serials are handed out once and never reused. Lookups take no lock:
 * workers mark themselves inside (fuse_worker.epoch) and umount waits for each to pass.
 */
#ifndef VND_VFS_H
#define VND_VFS_H
#include "fs/fs.h"
#include "fuse/fuse.h"

struct vnd_vfs;
struct vfs_node {
    struct fs *fs;
    uint64_t ino;
    uint16_t serial;
};

void vfs_enter(struct fuse_worker *w); /* around each request */
void vfs_leave(struct fuse_worker *w);
void vfs_worker_add(struct vnd_vfs *v, struct fuse_worker *w);
void vfs_worker_remove(struct vnd_vfs *v, struct fuse_worker *w);

/* All below up to vfs_session_kind only inside enter/leave (or holding no worker while nobody unmounts: tests). */
/* 0 or -ESTALE. The file system decides whether the inode exists. */
int vfs_resolve(struct vnd_vfs *v, uint64_t nodeid, struct vfs_node *out);
uint64_t vfs_nodeid(struct vnd_vfs *v, uint16_t serial, uint64_t ino);
/* One path component ("." and ".." too), over mount points in both directions. attr->ino is the file system's own.
 * 0 or -errno. */
int vfs_lookup(struct vnd_vfs *v, const struct vfs_node *dir, const char *name, size_t len, struct vfs_node *out,
               vnd_attr *attr);
/* Replaces a node that something is mounted on by the root of that mount: true if it did. */
bool vfs_cover(struct vnd_vfs *v, struct vfs_node *node);
bool vfs_is_mount_root(struct vnd_vfs *v, const struct vfs_node *node);
int vfs_has_xattr(struct vnd_vfs *v); /* 0: something is mounted and none of it has any */

/* The index-th mount of a read-write file system: its root, or false. */
bool vfs_rw_mount(struct vnd_vfs *v, uint32_t index, struct vfs_node *out);
/* Counts the guests that are past INIT: the number after adding change. Several may share a read-write file system, which
 * then keeps what any of them knew until the last is gone. */
int vfs_sessions(struct vnd_vfs *v, int change);
/* The last guest is gone: read-write file systems drop what it knew and had open. vfs_reset: not inside a request. */
void vfs_reset_inside(struct vnd_vfs *v);
void vfs_reset(struct vnd_vfs *v);

int vfs_session_kind(struct vnd_vfs *v);
/* Generic mount for any file system, which must outlive it; unmounted by vnd_vfs_umount. -EINVAL (path), -EEXIST
 * (mounted there), -ENOENT and -ENOTDIR (no such directory inside another mount), -EBUSY (would hide other mounts),
 * -ENOSPC (65535 mounts done), -ENOMEM. */
int vfs_mount(struct vnd_vfs *v, const char *path, struct fs *fs);

#endif
