/* base/hostmount.h -- mounts that are the daemon's own, attached to no directory. */
#ifndef VND_HOSTMOUNT_H
#define VND_HOSTMOUNT_H
#include <stdint.h>

#include "base/error.h"

#define HOSTMOUNT_PARTS_MAX 33 /* loop devices for one image: its bootstrap and its blobs */

/* An open file from offset to its end, as a block device sees it: in whole sectors of 512 bytes. */
struct hostmount_part {
    int fd;
    uint64_t offset;
};

/* Mounts EROFS read-only over parts[0] (the bootstrap) with parts[1..n) as its devices, in the superblock's order, and
 * attaches it nowhere. Loop devices carry the parts and end with the mount. So the file system lies at the bottom of
 * the kernel's stack of file systems, as the backing files of FUSE passthrough must when something is to be stacked on
 * the FUSE mount. Returns a descriptor of its root, open for reading, or -errno with a line. Linux 5.8 (LOOP_CONFIGURE). */
int hostmount_erofs(const struct hostmount_part *parts, int n, struct failure *f);

#endif
