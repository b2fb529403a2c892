/* base/netfs.h -- which file systems are shared with other hosts. Stateless: any thread. */
#ifndef VND_NETFS_H
#define VND_NETFS_H
#include <stdbool.h>

/* Whether the file lies on a file system that other hosts may change, or that another process serves (FUSE): locks,
 * shared mappings and futexes need not reach all who use it, and a call may wait for a network. True as well where the
 * kernel does not say. */
bool netfs_holds(int fd);

#endif
