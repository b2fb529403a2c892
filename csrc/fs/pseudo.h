/* fs/pseudo.h -- the directories that exist only because mounts lie below them: mode 0755, owner root.
 *
 * A tree is immutable. The vfs makes a new one for each change and publishes it, so readers take no lock (they are inside
 * vfs_enter and vfs_leave). The functions that make trees are called under the vfs's lock. An inode number is given to
 * one directory (the root has 1) and never used again.
 */
#ifndef VND_PSEUDO_H
#define VND_PSEUDO_H
#include <stdatomic.h>

#include "fs/fs.h"

#define PSEUDO_ROOT_INO 1

struct pseudo_node {
    uint64_t ino, parent;
    int64_t mtime_s; /* when an entry came or went; a kernel keeps its listing until this changes */
    uint32_t mtime_nsec;
    uint32_t child_count;
    char *name; /* owned by the tree */
    uint32_t name_len;
};
struct pseudo_tree {
    uint32_t count;
    struct pseudo_node nodes[]; /* sorted by ino; nodes[0] is the root */
};
struct pseudo_fs {
    struct fs fs;
    _Atomic(struct pseudo_tree *) tree; /* readers: inside a vfs epoch */
    uint64_t next_ino;                  /* writer only */
};

int pseudo_init(struct pseudo_fs *p); /* 0 or -ENOMEM */
void pseudo_release(struct pseudo_fs *p);
struct pseudo_node *pseudo_find(struct pseudo_tree *t, uint64_t ino);
/* A copy of the tree with one directory more (or less), not yet published; NULL without memory. */
struct pseudo_tree *pseudo_with(struct pseudo_fs *p, const struct pseudo_tree *t, uint64_t dir, const char *name,
                                size_t len, uint64_t *ino);
struct pseudo_tree *pseudo_without(const struct pseudo_tree *t, uint64_t ino);
void pseudo_tree_free(struct pseudo_tree *t);

#endif
