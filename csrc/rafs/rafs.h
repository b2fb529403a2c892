/* rafs/rafs.h -- the one reader of RAFS images, v5 and v6: as a file system, and as a tool (the vnd_rafs_* functions of
 * vnd.h).
 *
 * Input is hostile: a bootstrap's bytes are read in place from a mapping and checked where they are used; what is wrong
 * is -EIO or a refused mount, never a crash or an endless walk. The reader gives extents (which bytes of which chunk),
 * never bytes: store/ has them. Inode numbers are the image's own: nid in v6, the inode's number in v5.
 *
 * Threads: any may call an opened image, at the same time. Locks: index_lock (the tools' index) and the lock of
 * backing.c, each alone; the second is held while the store is asked and while the kernel mounts. Hot-path calls take no
 * lock and allocate nothing. Ownership: an image owns its mapping, its blobs' references and its metrics; the store must
 * outlive it. Uses base/, blob/, store/store.h and fs/.
 */
#ifndef VND_RAFS_H
#define VND_RAFS_H
#include "fs/fs.h"

/* The file system of an opened bootstrap; lives as long as it. */
struct fs *rafs_fs(vnd_rafs *r);

#endif
