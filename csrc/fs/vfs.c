/* fs/vfs.c -- what a nodeid or a name means, over all mounts; see fs/vfs.h. */
#include "fs/vfs.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fs/internal.h"

#define VFS_INO_BITS 48
#define VFS_INO_MASK ((1ull << VFS_INO_BITS) - 1)

struct vfs_mounted *vfs_mount_find(const struct vfs_table *t, uint16_t serial)
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

bool vfs_table_cover(const struct vfs_table *t, struct vfs_node *node)
{
    bool any = false;

    for (uint32_t i = 0; i < t->count; i++) {
        const struct vfs_mounted *m = t->mounts[i];

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

    if (!vfs_table_cover(vfs_table_of(v), node))
        return false;
    if (!w || atomic_load_explicit(&w->only, memory_order_relaxed) == 0)
        return true;
    vfs_widen(w);
    *node = covered; /* what was found before may be unmounted by now */
    return vfs_table_cover(vfs_table_of(v), node);
}

bool vfs_is_mount_root(struct vnd_vfs *v, const struct vfs_node *node)
{
    const struct vfs_mounted *m = node->serial ? vfs_mount_find(vfs_table_of(v), node->serial) : NULL;

    return m && m->root_ino == node->ino;
}

int vfs_resolve(struct vnd_vfs *v, uint64_t nodeid, struct vfs_node *out)
{
    const struct vfs_table *t = vfs_table_of(v);
    uint16_t serial = (uint16_t)(nodeid >> VFS_INO_BITS);
    const struct vfs_mounted *m;

    if (nodeid == PSEUDO_ROOT_INO) {
        *out = t->root;
        return 0;
    }
    if (!serial) {
        *out = (struct vfs_node){ &v->pseudo.fs, nodeid, 0 };
        return 0;
    }
    m = vfs_mount_find(t, serial);
    if (!m)
        return -ESTALE;
    *out = (struct vfs_node){ m->fs, nodeid & VFS_INO_MASK, serial };
    return 0;
}

uint64_t vfs_nodeid(struct vnd_vfs *v, uint16_t serial, uint64_t ino)
{
    const struct vfs_table *t = vfs_table_of(v);

    if (serial == t->root.serial && ino == t->root.ino)
        return PSEUDO_ROOT_INO;
    return (uint64_t)serial << VFS_INO_BITS | (ino & VFS_INO_MASK);
}

uint64_t vfs_shown_ino(struct vnd_vfs *v, uint16_t serial, uint64_t ino)
{
    const struct vfs_table *t = vfs_table_of(v);

    if (v->kind == VND_SESSION_RAFS && t->count == 1 && serial && t->root.serial == serial)
        return ino;
    return vfs_nodeid(v, serial, ino);
}

int vfs_lookup(struct vnd_vfs *v, const struct vfs_step *step, struct vfs_node *out, vnd_attr *attr)
{
    const struct vfs_table *t;
    const char *name = step->name;
    struct vfs_node d = *step->dir;
    const struct vfs_mounted *m;
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
        t = vfs_table_of(v);
        while (d.serial && (m = vfs_mount_find(t, d.serial)) && m->root_ino == d.ino)
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
    const struct vfs_table *t = vfs_table_of(v);

    for (uint32_t i = 0; i < t->count; i++)
        if (t->mounts[i]->fs->ops->has_xattr(t->mounts[i]->fs))
            return true;
    return t->count == 0;
}

bool vfs_rw_after(struct vnd_vfs *v, uint16_t serial, struct vfs_node *out)
{
    const struct vfs_table *t = vfs_table_of(v);

    for (uint32_t i = 0; i < t->count; i++) {
        const struct vfs_mounted *m = t->mounts[i];

        if (m->fs->ops->rw && m->serial > serial) {
            *out = (struct vfs_node){ m->fs, m->root_ino, m->serial };
            return true;
        }
    }
    return false;
}

/* ---- life */

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
    pthread_mutex_init(&v->readers_lock, NULL);
    return v;
}

void vnd_vfs_free(vnd_vfs *v)
{
    if (!v)
        return;
    struct vfs_table *t = vfs_table_of(v);

    for (uint32_t i = 0; i < t->count; i++)
        free(t->mounts[i]);
    free(t);
    vfs_retired_free(v);
    pseudo_release(&v->pseudo);
    pthread_mutex_destroy(&v->lock);
    pthread_mutex_destroy(&v->readers_lock);
    free(v);
}
