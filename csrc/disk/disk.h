/* disk/disk.h -- an opened image as what the kernel's EROFS reads: one flat disk, or a file for each of its devices.
 *
 * What it is: the bootstrap as it is, and each blob's uncompressed bytes, at the places that the bootstrap's device slots
 * tell. Bytes that belong to no chunk are zeroes. It gives extents (blob/chunk.h), which the store reads as it reads
 * those of a file: checked, lazily, once for all guests. disk.c is the disk; files.c a file system (fs/fs.h) that shows
 * it and the devices.
 * Threads: any, at the same time. Locks: `lock`, while the order of a blob's chunks is made, at the first read of a blob.
 * After that a call takes no lock and allocates nothing.
 * Ownership: the image (rafs/rafs.h) is borrowed and must outlive the disk. Uses base, blob, store/store.h, fs, rafs/rafs.h.
 */
#ifndef VND_DISK_H
#define VND_DISK_H
#include <pthread.h>
#include <stdatomic.h>

#include "fs/fs.h"
#include "rafs/rafs.h"

#define DISK_SECTOR 512u /* bytes; what virtio-blk counts in */

/* One of the devices: the bootstrap (blob NULL) or a blob. */
struct disk_part {
    uint64_t at, bytes; /* on the flat disk; whole blocks */
    struct vnd_blob *blob;
    const uint8_t *metadata; /* of the bootstrap */
    /* The numbers of the blob's chunks that the image names, by where they lie; NULL until its table is loaded. */
    _Atomic(uint32_t *) order;
    uint32_t n; /* of them; set before order */
};

struct vnd_disk {
    struct fs fs; /* first; files.c */
    uint64_t bytes;
    uint32_t n_parts;
    struct disk_part *parts; /* in the order of their places, which is that of the image's blob table */
    pthread_mutex_t lock;
};

/* The extents of bytes [off, off+len) of the flat disk, cut at its end, and where out has no more room. Their number, or
 * -EINPROGRESS (out->wait is linked: it waits for a blob's chunk table), -EAGAIN (the same, without out->wait), -errno. */
int disk_extents(struct vnd_disk *d, uint64_t off, uint32_t len, struct fs_extents *out);
/* The same of one device; off counts from its start. */
int disk_part_extents(struct vnd_disk *d, struct disk_part *p, uint64_t off, uint32_t len, struct fs_extents *out);

/* disk/files.c: a directory of the flat disk ("disk") and the devices ("bootstrap", and blobs by their ids). */
extern const struct fs_ops disk_fs_ops;

#endif
