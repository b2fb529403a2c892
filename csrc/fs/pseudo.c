/* fs/pseudo.c -- see pseudo.h. */
#include "fs/pseudo.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

void pseudo_tree_free(struct pseudo_tree *t)
{
    if (!t)
        return;
    for (uint32_t i = 0; i < t->count; i++)
        free(t->nodes[i].name);
    free(t);
}

static struct pseudo_tree *tree_new(uint32_t count)
{
    struct pseudo_tree *t = calloc(1, sizeof(*t) + (size_t)count * sizeof(struct pseudo_node));

    if (t)
        t->count = count;
    return t;
}

static int node_name(struct pseudo_node *n, const char *name, size_t len)
{
    n->name = malloc(len + 1);
    if (!n->name)
        return -ENOMEM;
    memcpy(n->name, name, len);
    n->name[len] = 0;
    n->name_len = (uint32_t)len;
    return 0;
}

static void node_touch(struct pseudo_node *n)
{
    struct timespec ts;

    clock_gettime(CLOCK_REALTIME, &ts);
    n->mtime_s = ts.tv_sec;
    n->mtime_nsec = (uint32_t)ts.tv_nsec;
}

struct pseudo_node *pseudo_find(struct pseudo_tree *t, uint64_t ino)
{
    uint32_t lo = 0, hi = t->count;

    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;

        if (t->nodes[mid].ino == ino)
            return &t->nodes[mid];
        if (t->nodes[mid].ino < ino)
            lo = mid + 1;
        else
            hi = mid;
    }
    return NULL;
}

static struct pseudo_node *pseudo_child(struct pseudo_tree *t, uint64_t dir, const char *name, size_t len)
{
    for (uint32_t i = 1; i < t->count; i++) {
        struct pseudo_node *n = &t->nodes[i];

        if (n->parent == dir && n->name_len == len && memcmp(n->name, name, len) == 0)
            return n;
    }
    return NULL;
}

/* Copies all nodes but the one whose ino is skip; 0: all. */
static int tree_copy(struct pseudo_tree *to, const struct pseudo_tree *from, uint64_t skip)
{
    uint32_t k = 0;

    for (uint32_t i = 0; i < from->count; i++) {
        const struct pseudo_node *n = &from->nodes[i];

        if (n->ino == skip)
            continue;
        to->nodes[k] = *n;
        if (node_name(&to->nodes[k], n->name, n->name_len))
            return -ENOMEM;
        k++;
    }
    return 0;
}

struct pseudo_tree *pseudo_with(struct pseudo_fs *p, const struct pseudo_tree *t, uint64_t dir, const char *name,
                                size_t len, uint64_t *ino)
{
    struct pseudo_tree *n = tree_new(t->count + 1);
    struct pseudo_node *parent, *last;

    if (!n || tree_copy(n, t, 0)) {
        pseudo_tree_free(n);
        return NULL;
    }
    last = &n->nodes[t->count];
    last->ino = p->next_ino;
    last->parent = dir;
    node_touch(last);
    parent = pseudo_find(n, dir);
    if (!parent || node_name(last, name, len)) {
        pseudo_tree_free(n);
        return NULL;
    }
    parent->child_count++;
    node_touch(parent);
    *ino = p->next_ino++;
    return n;
}

struct pseudo_tree *pseudo_without(const struct pseudo_tree *t, uint64_t ino)
{
    struct pseudo_tree *n = tree_new(t->count - 1);
    const struct pseudo_node *gone = pseudo_find((struct pseudo_tree *)t, ino);
    struct pseudo_node *parent;

    if (!n || !gone || tree_copy(n, t, ino)) {
        pseudo_tree_free(n);
        return NULL;
    }
    parent = pseudo_find(n, gone->parent);
    if (parent) {
        parent->child_count--;
        node_touch(parent);
    }
    return n;
}

static struct pseudo_tree *tree_of(struct fs *fs)
{
    return atomic_load_explicit(&((struct pseudo_fs *)fs)->tree, memory_order_acquire);
}

static void fill_attr(const struct pseudo_node *n, vnd_attr *out)
{
    *out = (vnd_attr){ .ino = n->ino,
                       .mtime_s = (uint64_t)n->mtime_s,
                       .mtime_nsec = n->mtime_nsec,
                       .mode = S_IFDIR | 0755,
                       .nlink = 2 + n->child_count };
}

static int pseudo_getattr(struct fs *fs, uint64_t ino, vnd_attr *out)
{
    struct pseudo_node *n = pseudo_find(tree_of(fs), ino);

    if (!n)
        return -ESTALE;
    fill_attr(n, out);
    return 0;
}

static int pseudo_lookup(struct fs *fs, uint64_t dir, const char *name, size_t len, vnd_attr *out)
{
    struct pseudo_tree *t = tree_of(fs);
    struct pseudo_node *n = pseudo_find(t, dir);

    if (!n)
        return -ESTALE;
    if (len == 2 && memcmp(name, "..", 2) == 0)
        n = pseudo_find(t, n->parent);
    else if (len != 1 || name[0] != '.')
        n = pseudo_child(t, dir, name, len);
    if (!n)
        return -ENOENT;
    fill_attr(n, out);
    return 0;
}

/* A cookie is 1 after ".", 2 after "..", then the inode number + 2, which stays while directories come and go. */
static int pseudo_readdir(struct fs *fs, const struct fs_listing *l)
{
    struct pseudo_tree *t = tree_of(fs);
    struct pseudo_node *d = pseudo_find(t, l->dir);
    vnd_attr attr;

    if (!d)
        return -ESTALE;
    if (l->off < 1 && l->put(l->ctx, &(struct fs_entry){ d->ino, 1, ".", 1, DT_DIR, NULL }))
        return 0;
    if (l->off < 2 && l->put(l->ctx, &(struct fs_entry){ d->parent, 2, "..", 2, DT_DIR, NULL }))
        return 0;
    for (uint32_t i = 1; i < t->count; i++) {
        struct pseudo_node *n = &t->nodes[i];
        struct fs_entry e = { n->ino, n->ino + 2, n->name, n->name_len, DT_DIR, l->want_attr ? &attr : NULL };

        if (n->parent != l->dir || n->ino + 2 <= l->off)
            continue;
        fill_attr(n, &attr);
        if (l->put(l->ctx, &e))
            break;
    }
    return 0;
}

static int64_t pseudo_readlink(struct fs *fs, uint64_t ino, char *buf, size_t cap)
{
    return -EINVAL;
}

static int pseudo_extents(struct fs *fs, uint64_t ino, uint64_t off, uint32_t len, struct fs_extents *out)
{
    return -EISDIR;
}

static int pseudo_listxattr(struct fs *fs, uint64_t ino, struct fs_buf *out)
{
    out->need = 0;
    return 0;
}

static int pseudo_getxattr(struct fs *fs, uint64_t ino, const char *name, size_t len, struct fs_buf *out)
{
    return -ENODATA;
}

static int pseudo_statfs(struct fs *fs, uint64_t *blocks, uint64_t *files, uint32_t *bsize)
{
    *blocks = 0;
    *files = tree_of(fs)->count;
    *bsize = 4096;
    return 0;
}

static uint64_t pseudo_root(struct fs *fs)
{
    return PSEUDO_ROOT_INO;
}

static bool pseudo_has_xattr(struct fs *fs)
{
    return false;
}

static const struct fs_ops pseudo_ops = {
    .name = "pseudo",
    .getattr = pseudo_getattr,
    .lookup = pseudo_lookup,
    .readdir = pseudo_readdir,
    .readlink = pseudo_readlink,
    .extents = pseudo_extents,
    .listxattr = pseudo_listxattr,
    .getxattr = pseudo_getxattr,
    .statfs = pseudo_statfs,
    .root = pseudo_root,
    .has_xattr = pseudo_has_xattr,
};

int pseudo_init(struct pseudo_fs *p)
{
    struct pseudo_tree *t = tree_new(1);

    if (!t || node_name(&t->nodes[0], "", 0)) {
        pseudo_tree_free(t);
        return -ENOMEM;
    }
    t->nodes[0].ino = t->nodes[0].parent = PSEUDO_ROOT_INO;
    node_touch(&t->nodes[0]);
    p->fs.ops = &pseudo_ops;
    p->next_ino = PSEUDO_ROOT_INO + 1;
    atomic_init(&p->tree, t);
    return 0;
}

void pseudo_release(struct pseudo_fs *p)
{
    pseudo_tree_free(atomic_load(&p->tree));
}
