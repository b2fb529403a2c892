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

/* ---- the image as EROFS sees it, on one device */
/* The bootstrap's own bytes, which stay where they are while the image is open. */
const uint8_t *rafs_metadata(const vnd_rafs *r, uint64_t *bytes);
/* Where the image's device slot says that blob k begins on one flat device, and how many bytes of the device it has: whole
 * blocks. 0; -ENOENT: the image has fewer blobs; -EINVAL: it is no v6 image with blocks of RAFS_FLAT_BLOCK bytes. */
#define RAFS_FLAT_BLOCK 4096u
int rafs_flat_place(const vnd_rafs *r, uint32_t k, uint64_t *at, uint64_t *bytes);

#endif
