/* fs/readers.c -- which readers are inside the mount table, and when what a change replaced is freed; see fs/internal.h. */
#include <stdlib.h>
#include <time.h>

#include "fs/internal.h"

void vfs_enter(struct vfs_reader *w)
{
    uint64_t e = atomic_load_explicit(&w->epoch, memory_order_relaxed);

    atomic_store_explicit(&w->only, 0, memory_order_relaxed);
    atomic_store_explicit(&w->epoch, e + 1, memory_order_release);
    /* The mark must be seen before the table is read: pairs with the fence in vfs_publish. */
    atomic_thread_fence(memory_order_seq_cst);
}

void vfs_leave(struct vfs_reader *w)
{
    uint64_t e = atomic_load_explicit(&w->epoch, memory_order_relaxed);

    atomic_store_explicit(&w->epoch, e + 1, memory_order_release);
}

void vfs_reader_add(struct vnd_vfs *v, struct vfs_reader *w)
{
    pthread_mutex_lock(&v->readers_lock);
    w->id = v->next_id++;
    w->next = v->readers;
    v->readers = w;
    v->n_readers++;
    pthread_mutex_unlock(&v->readers_lock);
}

void vfs_reader_remove(struct vnd_vfs *v, struct vfs_reader *w)
{
    pthread_mutex_lock(&v->readers_lock);
    for (struct vfs_reader **p = &v->readers; *p; p = &(*p)->next) {
        if (*p == w) {
            *p = w->next;
            v->n_readers--;
            break;
        }
    }
    pthread_mutex_unlock(&v->readers_lock);
}

/* A reader that was inside when r was retired is so still, and may be in the mount with this serial (0: whatever mount).
 * With readers_lock held. */
static bool is_in_use(const struct vnd_vfs *v, const struct retired *r, uint32_t serial)
{
    for (struct vfs_reader *w = v->readers; w; w = w->next)
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
    pthread_mutex_lock(&v->readers_lock);
    for (struct retired **p = &v->retired; *p;) {
        struct retired *r = *p;

        if (r->waited_for || is_in_use(v, r, 0)) {
            p = &r->next;
            continue;
        }
        *p = r->next;
        retired_free(r);
    }
    pthread_mutex_unlock(&v->readers_lock);
}

struct retired *vfs_publish(struct vnd_vfs *v, struct vfs_table *table, struct pseudo_tree *tree,
                            struct vfs_mounted *mount)
{
    struct retired *r;

    pthread_mutex_lock(&v->readers_lock);
    r = malloc(sizeof(*r) + v->n_readers * sizeof(r->inside[0]));
    if (r) {
        *r = (struct retired){ .next = v->retired, .mount = mount, .waited_for = mount != NULL };
        r->tree = tree ? atomic_exchange(&v->pseudo.tree, tree) : NULL;
        r->table = atomic_exchange(&v->table, table);
        v->retired = r;
        atomic_thread_fence(memory_order_seq_cst);
        for (struct vfs_reader *w = v->readers; w; w = w->next) {
            uint64_t e = atomic_load_explicit(&w->epoch, memory_order_acquire);

            if (e & 1)
                r->inside[r->n++] = (struct inside){ w->id, e };
        }
    }
    pthread_mutex_unlock(&v->readers_lock);
    reclaim(v);
    return r;
}

void vfs_wait_until_unused(struct vnd_vfs *v, struct retired *r)
{
    const struct timespec pause = { .tv_nsec = 50000 };
    uint32_t serial = r->mount->serial;
    bool in_use;

    for (;;) {
        pthread_mutex_lock(&v->readers_lock);
        in_use = is_in_use(v, r, serial);
        r->waited_for = in_use;
        pthread_mutex_unlock(&v->readers_lock);
        if (!in_use)
            break;
        nanosleep(&pause, NULL);
    }
    reclaim(v);
}

void vfs_retired_free(struct vnd_vfs *v)
{
    for (struct retired *r = v->retired, *next; r; r = next) {
        next = r->next;
        retired_free(r);
    }
    v->retired = NULL;
}
