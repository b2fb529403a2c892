/* vfs.h -- the mount table: maps FUSE nodeids to (file system, inode).
 *
 * nodeid = 16-bit mount serial << 48 | 48-bit inode. Serial 0 holds the pseudo directories; FUSE root is 1. A mount at "/"
 * makes nodeid 1 mean its root. Serials are handed out once and never reused. Lookups take no lock: workers mark
 * themselves inside (fuse_worker.epoch) and umount waits for each to pass.
 */
#ifndef VND_VFS_H
#define VND_VFS_H
#include "fs.h"
#include "fuse_session.h"

struct vnd_vfs;
struct vfs_node { struct fs *fs; uint64_t ino; uint16_t serial; };

void vfs_enter(struct fuse_worker *w);      /* around each request */
void vfs_leave(struct fuse_worker *w);
void vfs_worker_add(struct vnd_vfs *v, struct fuse_worker *w);
void vfs_worker_remove(struct vnd_vfs *v, struct fuse_worker *w);
/* 0 or -ESTALE/-ENOENT. */
int vfs_resolve(struct vnd_vfs *v, uint64_t nodeid, struct vfs_node *out);
uint64_t vfs_nodeid(struct vnd_vfs *v, uint16_t serial, uint64_t ino);
int vfs_session_kind(struct vnd_vfs *v);
/* Generic mount for any file system; close is called after umount's grace period, may be NULL. */
int vfs_mount(struct vnd_vfs *v, const char *path, struct fs *fs);
int vfs_has_xattr(struct vnd_vfs *v);       /* any mounted file system has some */

#endif
