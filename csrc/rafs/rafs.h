/* rafs/rafs.h -- the RAFS reader as a file system and as a tool. Read in place from the mapped bootstrap. */
#ifndef VND_RAFS_H
#define VND_RAFS_H
#include "fs/fs.h"

/* The file system face of an opened bootstrap; lives as long as it. */
struct fs *rafs_fs(vnd_rafs *r);

#endif
