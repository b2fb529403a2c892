/* fs/mount.c -- mounts and unmounts: the changes of the mount table; see fs/vfs.h. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "fs/internal.h"

#define VFS_PATH_MAX 4096
#define INO_MAX ((1ull << 48) - 1) /* fs/fs.h */
#define VFS_PSEUDO_MAX 65536       /* pseudo directories: memory bound, far above what a node's containers need */

/* "/a//b/" to "/a/b", "/" to "". 0, -EINVAL. */
static int path_normalise(const char *path, char *out, size_t cap)
{
    size_t n = 0;

    if (path[0] != '/')
        return -EINVAL;
    while (*path) {
        size_t len = strcspn(path, "/");

        if (len) {
            if (len > 255 || n + len + 2 > cap || (len == 1 && path[0] == '.') ||
                (len == 2 && path[0] == '.' && path[1] == '.')) {
                return -EINVAL;
            }
            out[n++] = '/';
            memcpy(out + n, path, len);
            n += len;
        }
        path += len;
        path += *path == '/';
    }
    out[n] = 0;
    return 0;
}

static struct vfs_table *table_copy(const struct vfs_table *t, const struct vfs_mounted *without,
                                    struct vfs_mounted *with, struct pseudo_fs *pseudo)
{
    struct vfs_table *n = malloc(sizeof(*n) + (t->count + 1u) * sizeof(n->mounts[0]));

    if (!n)
        return NULL;
    n->count = 0;
    for (uint32_t i = 0; i < t->count; i++)
        if (t->mounts[i] != without)
            n->mounts[n->count++] = t->mounts[i];
    if (with)
        n->mounts[n->count++] = with;
    n->root = (struct vfs_node){ &pseudo->fs, PSEUDO_ROOT_INO, 0 };
    vfs_table_cover(n, &n->root);
    return n;
}

/* Gives back what a look-up counted. */
static void forget_node(const struct vfs_node *n)
{
    if (n->fs->ops->rw)
        n->fs->ops->rw->forget(n->fs, n->ino, 1);
}

/* Finds the node that path names; of a read-write file system it is counted once. Adds pseudo directories to *tree (made on
 * demand) for what is missing. */
static int mount_point(struct vnd_vfs *v, const char *path, struct vfs_node *node, struct pseudo_tree **tree)
{
    const struct vfs_table *t = vfs_table_of(v);
    struct pseudo_tree *current = atomic_load(&v->pseudo.tree);
    vnd_attr attr = { .mode = S_IFDIR };
    char component[256]; /* a file system takes a name that ends */
    bool counted = false;
    int rc = 0;

    *node = t->root;
    while (*path && !rc) {
        const char *name = path + 1;
        size_t len = strcspn(name, "/");

        path = name + len;
        if (!*tree) {
            struct vfs_node above = *node;

            snprintf(component, sizeof(component), "%.*s", (int)len, name);
            rc = vfs_lookup(v, &(struct vfs_step){ .dir = &above, .name = component, .len = len }, node, &attr);
            if (!rc) {
                if (counted)
                    forget_node(&above);
                counted = true;
            }
            if (rc != -ENOENT || node->serial)
                continue;
        }
        if (current->count >= VFS_PSEUDO_MAX)
            return -ENOSPC;
        current = pseudo_with(&v->pseudo, current, node->ino, name, len, &node->ino);
        pseudo_tree_free(*tree);
        *tree = current;
        rc = current ? 0 : -ENOMEM;
    }
    if (!rc && (attr.mode & S_IFMT) != S_IFDIR)
        rc = -ENOTDIR;
    if (rc && counted)
        forget_node(node);
    return rc;
}

/* What a mount may cover: no mount's root, and no pseudo directory with others below it. */
static int mount_point_free(struct vnd_vfs *v, const struct vfs_node *node)
{
    const struct vfs_mounted *m = node->serial ? vfs_mount_find(vfs_table_of(v), node->serial) : NULL;
    const struct pseudo_node *p;

    if (node->serial)
        return m && m->root_ino == node->ino ? -EEXIST : 0;
    p = pseudo_find(atomic_load(&v->pseudo.tree), node->ino);
    return p && p->child_count ? -EBUSY : 0;
}

static int mount_locked(struct vnd_vfs *v, const char *path, struct fs *fs)
{
    size_t path_bytes = strlen(path) + 1;
    struct vfs_mounted *m = malloc(sizeof(*m) + path_bytes);
    struct pseudo_tree *tree = NULL;
    struct vfs_table *table = NULL;
    int rc = m ? 0 : -ENOMEM;
    bool counted = false;

    if (!rc && v->next_serial > UINT16_MAX)
        rc = -ENOSPC;
    if (!rc) {
        memcpy(m->path, path, path_bytes);
        m->fs = fs;
        m->root_ino = fs->ops->root(fs);
        m->serial = (uint16_t)v->next_serial;
        rc = mount_point(v, path, &m->on, &tree);
        counted = !rc;
    }
    if (!rc && !tree)
        rc = mount_point_free(v, &m->on);
    if (!rc) {
        table = table_copy(vfs_table_of(v), NULL, m, &v->pseudo);
        rc = table ? 0 : -ENOMEM;
    }
    if (!rc && !vfs_publish(v, table, tree, NULL))
        rc = -ENOMEM;
    if (rc) {
        if (counted)
            forget_node(&m->on);
        free(table);
        pseudo_tree_free(tree);
        free(m);
        return rc;
    }
    v->next_serial++;
    return 0;
}

int vfs_mount(struct vnd_vfs *v, const char *path, struct fs *fs)
{
    char clean[VFS_PATH_MAX];
    int rc = path_normalise(path, clean, sizeof(clean));

    if (rc)
        return rc;
    pthread_mutex_lock(&v->lock);
    rc = mount_locked(v, clean, fs);
    pthread_mutex_unlock(&v->lock);
    return rc;
}

/* Takes the pseudo directory ino and its parents away as far as nothing else needs them: the new tree, NULL if
 * nothing changes, or (never fatal: they stay as empty directories) memory is short. */
static struct pseudo_tree *prune(struct vnd_vfs *v, const struct vfs_table *t, uint64_t ino)
{
    struct pseudo_tree *current = atomic_load(&v->pseudo.tree), *made = NULL;

    while (ino != PSEUDO_ROOT_INO) {
        struct vfs_node node = { &v->pseudo.fs, ino, 0 };
        const struct pseudo_node *p = pseudo_find(current, ino);
        struct pseudo_tree *next;
        uint64_t parent;

        if (!p || p->child_count || vfs_table_cover(t, &node))
            break;
        parent = p->parent;
        next = pseudo_without(current, ino);
        if (!next)
            break;
        pseudo_tree_free(made);
        made = current = next;
        ino = parent;
    }
    return made;
}

static int umount_locked(struct vnd_vfs *v, const char *path, struct retired **retired)
{
    struct vfs_table *t = vfs_table_of(v), *table;
    struct pseudo_tree *tree;
    struct vfs_mounted *m = NULL;

    for (uint32_t i = 0; i < t->count; i++)
        if (strcmp(t->mounts[i]->path, path) == 0)
            m = t->mounts[i];
    if (!m)
        return -ENOENT;
    for (uint32_t i = 0; i < t->count; i++)
        if (t->mounts[i]->on.serial == m->serial)
            return -EBUSY;
    table = table_copy(t, m, NULL, &v->pseudo);
    if (!table)
        return -ENOMEM;
    tree = m->on.serial ? NULL : prune(v, table, m->on.ino);
    *retired = vfs_publish(v, table, tree, m);
    if (*retired) {
        forget_node(&m->on);
        return 0;
    }
    free(table);
    pseudo_tree_free(tree);
    return -ENOMEM;
}

int vnd_vfs_umount(vnd_vfs *v, const char *path)
{
    struct retired *retired = NULL;
    char clean[VFS_PATH_MAX];

    if (path_normalise(path, clean, sizeof(clean)))
        return -ENOENT;
    pthread_mutex_lock(&v->lock);
    int rc = umount_locked(v, clean, &retired);
    pthread_mutex_unlock(&v->lock);
    if (retired)
        vfs_wait_until_unused(v, retired);
    return rc;
}

int vnd_vfs_directory(vnd_vfs *v, uint32_t index, vnd_directory *out)
{
    struct pseudo_tree *t;
    int rc = -ENOENT;

    pthread_mutex_lock(&v->lock);
    t = atomic_load(&v->pseudo.tree);
    if (index < t->count - 1) { /* all but the root */
        const struct pseudo_node *n = &t->nodes[index + 1];

        out->ino = n->ino;
        out->parent = n->parent;
        snprintf(out->name, sizeof(out->name), "%s", n->name);
        rc = 0;
    }
    pthread_mutex_unlock(&v->lock);
    return rc;
}

int vnd_vfs_restart(vnd_vfs *v)
{
    int rc;

    pthread_mutex_lock(&v->lock);
    rc = vfs_table_of(v)->count ? -EBUSY : 0;
    if (!rc) {
        v->next_serial = 1;
        v->pseudo.next_ino = PSEUDO_ROOT_INO + 1;
    }
    pthread_mutex_unlock(&v->lock);
    return rc;
}

int vnd_vfs_add_directory(vnd_vfs *v, const vnd_directory *directory)
{
    size_t len = strnlen(directory->name, sizeof(directory->name));
    struct pseudo_tree *current, *tree = NULL;
    struct vfs_table *table = NULL;
    uint64_t ino;
    int rc = 0;

    pthread_mutex_lock(&v->lock);
    current = atomic_load(&v->pseudo.tree);
    if (directory->ino < v->pseudo.next_ino || directory->ino > INO_MAX || !len || len == sizeof(directory->name) ||
        memchr(directory->name, '/', len) || !pseudo_find(current, directory->parent))
        rc = -EINVAL;
    else if (current->count >= VFS_PSEUDO_MAX)
        rc = -ENOSPC;
    if (!rc) {
        v->pseudo.next_ino = directory->ino;
        tree = pseudo_with(&v->pseudo, current, directory->parent, directory->name, len, &ino);
        table = table_copy(vfs_table_of(v), NULL, NULL, &v->pseudo);
        rc = tree && table && vfs_publish(v, table, tree, NULL) ? 0 : -ENOMEM;
    }
    if (rc) {
        pseudo_tree_free(tree);
        free(table);
    }
    pthread_mutex_unlock(&v->lock);
    return rc;
}

uint32_t vnd_vfs_next_serial(vnd_vfs *v)
{
    uint32_t serial;

    pthread_mutex_lock(&v->lock);
    serial = v->next_serial;
    pthread_mutex_unlock(&v->lock);
    return serial;
}

int vnd_vfs_set_next_serial(vnd_vfs *v, uint32_t serial)
{
    int rc = 0;

    pthread_mutex_lock(&v->lock);
    if (serial < v->next_serial || serial > UINT16_MAX)
        rc = -EINVAL;
    else
        v->next_serial = serial;
    pthread_mutex_unlock(&v->lock);
    return rc;
}
