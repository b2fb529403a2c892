/* fs/vfs.c -- mount table and pseudo directories; see vfs.h.
 *
 * Readers see one immutable table. A change builds the next table, publishes it, and retires the old one together with a
 * note of the readers that were inside then: it is freed by a later change, once each of these has left the request that it
 * was in. Changes are rare (a container's start) and serial.
 */
#include "fs/vfs.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "fs/pseudo.h"

#define VFS_INO_BITS 48
#define VFS_INO_MASK ((1ull << VFS_INO_BITS) - 1)
#define VFS_PATH_MAX 4096
#define VFS_PSEUDO_MAX 65536 /* pseudo directories: memory bound, far above what a node's containers need */

struct vfs_mount {
    struct fs *fs;
    uint64_t root_ino;
    struct vfs_node on; /* what it covers */
    uint16_t serial;
    char path[]; /* normalised */
};
struct vfs_table {
    struct vfs_node root; /* what nodeid 1 means */
    uint32_t count;
    struct vfs_mount *mounts[]; /* by serial: ascending, since serials only grow */
};
/* A reader that was inside when a table was retired. */
struct inside {
    uint64_t id, epoch;
};
/* What a change replaced. */
struct retired {
    struct retired *next;
    struct vfs_table *table;
    struct pseudo_tree *tree;
    struct vfs_mount *mount; /* NULL: none was unmounted */
    bool waited_for;         /* vnd_vfs_umount still looks at it */
    uint32_t n;
    struct inside inside[];
};
struct vnd_vfs {
    vnd_engine *engine;
    int kind;
    struct pseudo_fs pseudo;
    _Atomic(struct vfs_table *) table;
    uint32_t next_serial;
    pthread_mutex_t lock; /* mount and umount */
    pthread_mutex_t workers_lock;
    /* Under it. */
    struct vfs_reader *workers;
    uint32_t n_workers;
    uint64_t next_id;
    struct retired *retired;
};

void vfs_enter(struct vfs_reader *w)
{
    uint64_t e = atomic_load_explicit(&w->epoch, memory_order_relaxed);

    atomic_store_explicit(&w->only, 0, memory_order_relaxed);
    atomic_store_explicit(&w->epoch, e + 1, memory_order_release);
    /* The mark must be seen before the table is read: pairs with the fence in publish. */
    atomic_thread_fence(memory_order_seq_cst);
}

void vfs_leave(struct vfs_reader *w)
{
    uint64_t e = atomic_load_explicit(&w->epoch, memory_order_relaxed);

    atomic_store_explicit(&w->epoch, e + 1, memory_order_release);
}

void vfs_reader_add(struct vnd_vfs *v, struct vfs_reader *w)
{
    pthread_mutex_lock(&v->workers_lock);
    w->id = v->next_id++;
    w->next = v->workers;
    v->workers = w;
    v->n_workers++;
    pthread_mutex_unlock(&v->workers_lock);
}

void vfs_reader_remove(struct vnd_vfs *v, struct vfs_reader *w)
{
    pthread_mutex_lock(&v->workers_lock);
    for (struct vfs_reader **p = &v->workers; *p; p = &(*p)->next) {
        if (*p == w) {
            *p = w->next;
            v->n_workers--;
            break;
        }
    }
    pthread_mutex_unlock(&v->workers_lock);
}

/* A reader that was inside when r was retired is so still, and may be in the mount with this serial (0: whatever mount).
 * With workers_lock held. */
static bool is_in_use(const struct vnd_vfs *v, const struct retired *r, uint32_t serial)
{
    for (struct vfs_reader *w = v->workers; w; w = w->next)
        for (uint32_t i = 0; i < r->n; i++)
            if (r->inside[i].id == w->id &&
                r->inside[i].epoch == atomic_load_explicit(&w->epoch, memory_order_acquire)) {
                uint32_t only = atomic_load_explicit(&w->only, memory_order_acquire);

                if (!serial || !only || only == serial)
                    return true;
            }
    return false;
}

static void retired_free(struct retired *r)
{
    free(r->table);
    pseudo_tree_free(r->tree);
    free(r->mount);
    free(r);
}

/* Frees what is retired and no longer in use. */
static void reclaim(struct vnd_vfs *v)
{
    pthread_mutex_lock(&v->workers_lock);
    for (struct retired **p = &v->retired; *p;) {
        struct retired *r = *p;

        if (r->waited_for || is_in_use(v, r, 0)) {
            p = &r->next;
            continue;
        }
        *p = r->next;
        retired_free(r);
    }
    pthread_mutex_unlock(&v->workers_lock);
}

static struct vfs_table *table_of(struct vnd_vfs *v)
{
    return atomic_load_explicit(&v->table, memory_order_acquire);
}

static struct vfs_mount *mount_find(const struct vfs_table *t, uint16_t serial)
{
    uint32_t lo = 0, hi = t->count;

    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;

        if (t->mounts[mid]->serial == serial)
            return t->mounts[mid];
        if (t->mounts[mid]->serial < serial)
            lo = mid + 1;
        else
            hi = mid;
    }
    return NULL;
}

/* A mount covers an older one or a pseudo directory, so the chain ends. */
static bool table_cover(const struct vfs_table *t, struct vfs_node *node)
{
    bool any = false;

    for (uint32_t i = 0; i < t->count; i++) {
        const struct vfs_mount *m = t->mounts[i];

        if (m->on.ino == node->ino && m->on.serial == node->serial) {
            *node = (struct vfs_node){ m->fs, m->root_ino, m->serial };
            any = true;
        }
    }
    return any;
}

bool vfs_cover(struct vnd_vfs *v, struct vfs_reader *w, struct vfs_node *node)
{
    struct vfs_node covered = *node;

    if (!table_cover(table_of(v), node))
        return false;
    if (!w || atomic_load_explicit(&w->only, memory_order_relaxed) == 0)
        return true;
    vfs_widen(w);
    *node = covered; /* what was found before may be unmounted by now */
    return table_cover(table_of(v), node);
}

bool vfs_is_mount_root(struct vnd_vfs *v, const struct vfs_node *node)
{
    const struct vfs_mount *m = node->serial ? mount_find(table_of(v), node->serial) : NULL;

    return m && m->root_ino == node->ino;
}

int vfs_resolve(struct vnd_vfs *v, uint64_t nodeid, struct vfs_node *out)
{
    const struct vfs_table *t = table_of(v);
    uint16_t serial = (uint16_t)(nodeid >> VFS_INO_BITS);
    const struct vfs_mount *m;

    if (nodeid == PSEUDO_ROOT_INO) {
        *out = t->root;
        return 0;
    }
    if (!serial) {
        *out = (struct vfs_node){ &v->pseudo.fs, nodeid, 0 };
        return 0;
    }
    m = mount_find(t, serial);
    if (!m)
        return -ESTALE;
    *out = (struct vfs_node){ m->fs, nodeid & VFS_INO_MASK, serial };
    return 0;
}

uint64_t vfs_nodeid(struct vnd_vfs *v, uint16_t serial, uint64_t ino)
{
    const struct vfs_table *t = table_of(v);

    if (serial == t->root.serial && ino == t->root.ino)
        return PSEUDO_ROOT_INO;
    return (uint64_t)serial << VFS_INO_BITS | (ino & VFS_INO_MASK);
}

uint64_t vfs_shown_ino(struct vnd_vfs *v, uint16_t serial, uint64_t ino)
{
    const struct vfs_table *t = table_of(v);

    if (v->kind == VND_SESSION_RAFS && t->count == 1 && serial && t->root.serial == serial)
        return ino;
    return vfs_nodeid(v, serial, ino);
}

int vfs_lookup(struct vnd_vfs *v, const struct vfs_step *step, struct vfs_node *out, vnd_attr *attr)
{
    const struct vfs_table *t;
    const char *name = step->name;
    struct vfs_node d = *step->dir;
    const struct vfs_mount *m;
    size_t len = step->len;
    int rc;

    if (len == 1 && name[0] == '.') {
        *out = d;
        return d.fs->ops->rw ? d.fs->ops->lookup(d.fs, d.ino, name, len, attr) /* counted, as each look-up */
                             : d.fs->ops->getattr(d.fs, d.ino, attr);
    }
    if (len == 2 && memcmp(name, "..", 2) == 0 && vfs_is_mount_root(v, &d)) {
        if (step->reader)
            vfs_widen(step->reader);
        t = table_of(v);
        while (d.serial && (m = mount_find(t, d.serial)) && m->root_ino == d.ino)
            d = m->on;
    }
    rc = d.fs->ops->lookup(d.fs, d.ino, name, len, attr);
    if (rc)
        return rc;
    struct vfs_node found = { d.fs, attr->ino, d.serial };

    *out = found;
    if (!vfs_cover(v, step->reader, out))
        return 0;
    if (found.fs->ops->rw) /* what is covered was looked up, and is not what the guest hears of */
        found.fs->ops->rw->forget(found.fs, found.ino, 1);
    return out->fs->ops->getattr(out->fs, out->ino, attr);
}

int vfs_session_kind(struct vnd_vfs *v)
{
    return v->kind;
}

bool vfs_has_xattr(struct vnd_vfs *v)
{
    const struct vfs_table *t = table_of(v);

    for (uint32_t i = 0; i < t->count; i++)
        if (t->mounts[i]->fs->ops->has_xattr(t->mounts[i]->fs))
            return true;
    return t->count == 0;
}

bool vfs_rw_mount(struct vnd_vfs *v, uint32_t index, struct vfs_node *out)
{
    const struct vfs_table *t = table_of(v);

    for (uint32_t i = 0; i < t->count; i++) {
        const struct vfs_mount *m = t->mounts[i];

        if (m->fs->ops->rw && !index--) {
            *out = (struct vfs_node){ m->fs, m->root_ino, m->serial };
            return true;
        }
    }
    return false;
}

/* ---- changes */

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

static struct vfs_table *table_copy(const struct vfs_table *t, const struct vfs_mount *without, struct vfs_mount *with,
                                    struct pseudo_fs *pseudo)
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
    table_cover(n, &n->root);
    return n;
}

/* Publishes the table, and the tree if it is not NULL. Retires what they replace, and mount. waited_for as in the struct.
 * NULL: no memory, and nothing was done. */
static struct retired *publish(struct vnd_vfs *v, struct vfs_table *table, struct pseudo_tree *tree,
                               struct vfs_mount *mount)
{
    struct retired *r;

    pthread_mutex_lock(&v->workers_lock);
    r = malloc(sizeof(*r) + v->n_workers * sizeof(r->inside[0]));
    if (r) {
        *r = (struct retired){ .next = v->retired, .mount = mount, .waited_for = mount != NULL };
        r->tree = tree ? atomic_exchange(&v->pseudo.tree, tree) : NULL;
        r->table = atomic_exchange(&v->table, table);
        v->retired = r;
        atomic_thread_fence(memory_order_seq_cst);
        for (struct vfs_reader *w = v->workers; w; w = w->next) {
            uint64_t e = atomic_load_explicit(&w->epoch, memory_order_acquire);

            if (e & 1)
                r->inside[r->n++] = (struct inside){ w->id, e };
        }
    }
    pthread_mutex_unlock(&v->workers_lock);
    reclaim(v);
    return r;
}

/* Returns once no request is in the mount that was retired. No lock is held: a request may take as long as it does. */
static void wait_until_unused(struct vnd_vfs *v, struct retired *r)
{
    const struct timespec pause = { .tv_nsec = 50000 };
    uint32_t serial = r->mount->serial;
    bool in_use;

    for (;;) {
        pthread_mutex_lock(&v->workers_lock);
        in_use = is_in_use(v, r, serial);
        r->waited_for = in_use;
        pthread_mutex_unlock(&v->workers_lock);
        if (!in_use)
            break;
        nanosleep(&pause, NULL);
    }
    reclaim(v);
}

/* Finds the node that path names, adding pseudo directories to *tree (made on demand) for what is missing. */
static int mount_point(struct vnd_vfs *v, const char *path, struct vfs_node *node, struct pseudo_tree **tree)
{
    const struct vfs_table *t = table_of(v);
    struct pseudo_tree *current = atomic_load(&v->pseudo.tree);
    vnd_attr attr = { .mode = S_IFDIR };
    int rc = 0;

    *node = t->root;
    while (*path && !rc) {
        const char *name = path + 1;
        size_t len = strcspn(name, "/");

        path = name + len;
        if (!*tree) {
            rc = vfs_lookup(v, &(struct vfs_step){ .dir = node, .name = name, .len = len }, node, &attr);
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
    return rc;
}

/* What a mount may cover: no mount's root, and no pseudo directory with others below it. */
static int mount_point_free(struct vnd_vfs *v, const struct vfs_node *node)
{
    const struct vfs_mount *m = node->serial ? mount_find(table_of(v), node->serial) : NULL;
    const struct pseudo_node *p;

    if (node->serial)
        return m && m->root_ino == node->ino ? -EEXIST : 0;
    p = pseudo_find(atomic_load(&v->pseudo.tree), node->ino);
    return p && p->child_count ? -EBUSY : 0;
}

static int mount_locked(struct vnd_vfs *v, const char *path, struct fs *fs)
{
    size_t path_bytes = strlen(path) + 1;
    struct vfs_mount *m = malloc(sizeof(*m) + path_bytes);
    struct pseudo_tree *tree = NULL;
    struct vfs_table *table = NULL;
    int rc = m ? 0 : -ENOMEM;

    if (!rc && v->next_serial > UINT16_MAX)
        rc = -ENOSPC;
    if (!rc) {
        memcpy(m->path, path, path_bytes);
        m->fs = fs;
        m->root_ino = fs->ops->root(fs);
        m->serial = (uint16_t)v->next_serial;
        rc = mount_point(v, path, &m->on, &tree);
    }
    if (!rc && !tree)
        rc = mount_point_free(v, &m->on);
    if (!rc) {
        table = table_copy(table_of(v), NULL, m, &v->pseudo);
        rc = table ? 0 : -ENOMEM;
    }
    if (!rc && !publish(v, table, tree, NULL))
        rc = -ENOMEM;
    if (rc) {
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

        if (!p || p->child_count || table_cover(t, &node))
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
    struct vfs_table *t = table_of(v), *table;
    struct pseudo_tree *tree;
    struct vfs_mount *m = NULL;

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
    *retired = publish(v, table, tree, m);
    if (*retired)
        return 0;
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
        wait_until_unused(v, retired);
    return rc;
}

vnd_vfs *vnd_vfs_new(vnd_engine *e, int session_kind)
{
    struct vnd_vfs *v = calloc(1, sizeof(*v));
    struct vfs_table *t = calloc(1, sizeof(*t));

    if (!v || !t || pseudo_init(&v->pseudo)) {
        free(v);
        free(t);
        return NULL;
    }
    v->engine = e;
    v->kind = session_kind;
    v->next_serial = 1;
    t->root = (struct vfs_node){ &v->pseudo.fs, PSEUDO_ROOT_INO, 0 };
    atomic_init(&v->table, t);
    pthread_mutex_init(&v->lock, NULL);
    pthread_mutex_init(&v->workers_lock, NULL);
    return v;
}

void vnd_vfs_free(vnd_vfs *v)
{
    if (!v)
        return;
    struct vfs_table *t = table_of(v);

    for (uint32_t i = 0; i < t->count; i++)
        free(t->mounts[i]);
    free(t);
    for (struct retired *r = v->retired, *next; r; r = next) {
        next = r->next;
        retired_free(r);
    }
    pseudo_release(&v->pseudo);
    pthread_mutex_destroy(&v->lock);
    pthread_mutex_destroy(&v->workers_lock);
    free(v);
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
