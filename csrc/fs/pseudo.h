/* fs/pseudo.h -- the directories that exist only because mounts lie below them.
 *
 * A tree is immutable: the vfs builds a new one for each change and publishes it, so that readers take no lock.
 * Inode numbers are given once (root is 1) and never reused. Directories only; mode 0755, owner root.
 */
#ifndef VND_PSEUDO_H
#define VND_PSEUDO_H
#include <stdatomic.h>

#include "fs/fs.h"

#define PSEUDO_ROOT_INO 1

struct pseudo_node {
    uint64_t ino, parent;
    int64_t mtime_s; /* when an entry came or went: the kernel's listing cache hangs on it */
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
struct pseudo_node *pseudo_child(struct pseudo_tree *t, uint64_t dir, const char *name, size_t len);
/* A copy of the tree with one directory more (or less), not yet published; NULL without memory. */
struct pseudo_tree *pseudo_with(struct pseudo_fs *p, const struct pseudo_tree *t, uint64_t dir, const char *name,
                                size_t len, uint64_t *ino);
struct pseudo_tree *pseudo_without(const struct pseudo_tree *t, uint64_t ino);
void pseudo_tree_free(struct pseudo_tree *t);

#endif
