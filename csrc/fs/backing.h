/* fs/backing.h -- FUSE passthrough (Linux 6.9): open files that the kernel reads without us.
 *
 * The kernel wants all opens of an inode to agree: while a file is open through its page cache it must not be opened by a
 * backing file, nor the reverse, nor by two backing files; an open that is answered otherwise fails with EIO. So every
 * open file of the session is counted here, and the first open decides for all that come before the last release.
 */
#ifndef VND_BACKING_H
#define VND_BACKING_H
#include <stdint.h>

#include "fs/fs.h"

struct backing;

/* fuse_fd: of the connection, borrowed. NULL: out of memory. */
struct backing *backing_new(int fuse_fd);
/* The kernel keeps what is open by itself. */
void backing_free(struct backing *b);
/* Counts an open of a regular file. The number of its backing file, or 0: to be read through us. Any thread. */
int32_t backing_open(struct backing *b, uint64_t nodeid, struct fs *fs, uint64_t ino);
/* Takes one back; of a node that nothing is known of it does nothing. */
void backing_release(struct backing *b, uint64_t nodeid);

#endif
