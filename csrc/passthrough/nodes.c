/* passthrough/nodes.c -- the nodes that a guest knows: found by inode number and by the host's file, counted, forgotten; see
 * passthrough.h. How a file of the host becomes one is passthrough/learn.c's.
 */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "passthrough/internal.h"

/* The upper bits of the product are the best mixed. */
static uint64_t bucket_of(const struct vnd_passthrough *p, uint64_t v)
{
    return v * 0x9e3779b97f4a7c15ull >> (64 - p->buckets_log2);
}

static uint64_t key_of(const struct pt_mount *m, dev_t dev, uint64_t host_ino)
{
    return host_ino ^ m->id << 44 ^ (uint64_t)dev << 24;
}

struct pt_node *pt_node_at(struct vnd_passthrough *p, uint64_t ino)
{
    struct pt_node *n = p->by_ino[bucket_of(p, ino)];

    while (n && n->ino != ino)
        n = n->next_ino;
    return n;
}

/* A descriptor that is kept keeps its inode alive, so that no other file can have its number: a file of another type is
 * another one then, whatever the host says. */
struct pt_node *pt_node_of(struct vnd_passthrough *p, const struct pt_mount *m, const struct statx *sx)
{
    dev_t dev = pt_dev_of(sx);
    struct pt_node *n = p->by_key[bucket_of(p, key_of(m, dev, sx->stx_ino))];

    while (n && (n->mount != m || n->host_ino != sx->stx_ino || n->dev != dev ||
                 (n->fd_kept && n->type != (sx->stx_mode & S_IFMT)))) {
        n = n->next_key;
    }
    return n;
}

static void link_lists(struct vnd_passthrough *p, struct pt_node *n)
{
    struct pt_node **a = &p->by_ino[bucket_of(p, n->ino)];
    struct pt_node **b = &p->by_key[bucket_of(p, key_of(n->mount, n->dev, n->host_ino))];

    n->next_ino = *a;
    *a = n;
    n->next_key = *b;
    *b = n;
}

/* Twice as many lists. Without memory they stay as they are, and get longer. */
static void grow_tables(struct vnd_passthrough *p)
{
    struct pt_node **old = p->by_ino, **old_key = p->by_key;
    uint64_t lists = 1ull << p->buckets_log2;
    struct pt_node **by_ino = calloc(2 * lists, sizeof(struct pt_node *));
    struct pt_node **by_key = calloc(2 * lists, sizeof(struct pt_node *));

    if (!by_ino || !by_key) {
        free(by_ino);
        free(by_key);
        return;
    }
    p->by_ino = by_ino;
    p->by_key = by_key;
    p->buckets_log2++;
    for (uint64_t i = 0; i < lists; i++) {
        for (struct pt_node *n = old[i], *next; n; n = next) {
            next = n->next_ino;
            link_lists(p, n);
        }
    }
    free(old);
    free(old_key);
}

void pt_node_link(struct vnd_passthrough *p, struct pt_node *n)
{
    if (p->n_nodes >> p->buckets_log2)
        grow_tables(p);
    link_lists(p, n);
    n->linked = true;
    n->refs++;
    p->n_nodes++;
}

int pt_tables_new(struct vnd_passthrough *p)
{
    p->buckets_log2 = PT_BUCKETS_LOG2;
    p->by_ino = calloc(1u << PT_BUCKETS_LOG2, sizeof(struct pt_node *));
    p->by_key = calloc(1u << PT_BUCKETS_LOG2, sizeof(struct pt_node *));
    p->kept_last = &p->kept;
    return p->by_ino && p->by_key ? 0 : -ENOMEM;
}

void pt_node_close(struct vnd_passthrough *p, struct pt_node *n)
{
    if (n->fd < 0 || n->fd_kept)
        return;
    if (n->fd_users) {
        n->fd_drop = true;
        return;
    }
    close(n->fd);
    n->fd = -1;
    n->fd_drop = false;
    p->cache[n->cache_at] = NULL;
    p->n_cached--;
    atomic_fetch_sub_explicit(&p->engine->cached_fds, 1, memory_order_relaxed);
}

void pt_node_unlink(struct vnd_passthrough *p, struct pt_node *n)
{
    struct pt_node **at;

    for (at = &p->by_ino[bucket_of(p, n->ino)]; *at != n;)
        at = &(*at)->next_ino;
    *at = n->next_ino;
    for (at = &p->by_key[bucket_of(p, key_of(n->mount, n->dev, n->host_ino))]; *at != n;)
        at = &(*at)->next_key;
    *at = n->next_key;
    n->linked = false;
    ledger_drop(p->ledger, &n->kept_at);
    p->n_nodes--;
    pt_node_close(p, n);
    pt_node_put_locked(p, n);
}

void pt_node_put_locked(struct vnd_passthrough *p, struct pt_node *n)
{
    while (n && !--n->refs) { /* the last node of a mount lets go of the directory above the mount */
        struct pt_node *gone = n;

        if (gone->fd_kept)
            pt_unkeep_fd(p, gone);
        else
            pt_node_close(p, gone);
        if (gone->device < PT_DEVICES)
            p->devices[gone->device].nodes--;
        n = pt_mount_put(p, gone->mount);
        free(gone->place);
        free(gone);
    }
}

void pt_node_put(struct vnd_passthrough *p, struct pt_node *n)
{
    pthread_mutex_lock(&p->lock);
    pt_node_put_locked(p, n);
    pthread_mutex_unlock(&p->lock);
}

struct pt_node *pt_node_find(struct vnd_passthrough *p, uint64_t ino)
{
    struct pt_node *n;

    pthread_mutex_lock(&p->lock);
    n = pt_node_at(p, ino);
    if (n)
        n->refs++;
    pthread_mutex_unlock(&p->lock);
    return n;
}

bool pt_is_on_remote(struct vnd_passthrough *p, uint64_t ino)
{
    struct pt_node *n;
    bool yes;

    pthread_mutex_lock(&p->lock);
    n = pt_node_at(p, ino);
    yes = n && n->mount->remote;
    for (struct pt_mount *m = p->mounts; n && !yes && m; m = m->next)
        yes = m->remote && m->above == n;
    pthread_mutex_unlock(&p->lock);
    return yes;
}

void pt_forget(struct vnd_passthrough *p, uint64_t ino, uint64_t n)
{
    struct pt_node *node;

    pthread_mutex_lock(&p->lock);
    node = pt_node_at(p, ino);
    if (node && node != p->root) {
        node->nlookup = n < node->nlookup ? node->nlookup - n : 0;
        if (!node->nlookup)
            pt_node_unlink(p, node);
    }
    pthread_mutex_unlock(&p->lock);
}

void pt_forget_all(struct vnd_passthrough *p)
{
    pthread_mutex_lock(&p->lock);
    for (uint64_t i = 0; p->by_ino && i < 1ull << p->buckets_log2; i++) {
        struct pt_node *next;

        for (struct pt_node *n = p->by_ino[i]; n; n = next) {
            next = n->next_ino;
            if (n != p->root)
                pt_node_unlink(p, n);
        }
    }
    pthread_mutex_unlock(&p->lock);
}

void pt_drop_idle(struct vnd_passthrough *p, bool even_used)
{
    pthread_mutex_lock(&p->lock);
    for (uint32_t i = 0; i < p->cache_max; i++) {
        struct pt_node *n = p->cache[i];

        if (n && (even_used || !n->fd_used))
            pt_node_close(p, n);
        else if (n)
            n->fd_used = false;
    }
    pt_mounts_drop_idle(p, even_used);
    pthread_mutex_unlock(&p->lock);
}

bool pt_make_room(struct vnd_passthrough *p, bool *tried)
{
    int saved = errno;

    if (saved != EMFILE || *tried)
        return false;
    *tried = true;
    pt_drop_idle(p, true);
    errno = saved;
    return true;
}

void pt_nodes_free(struct vnd_passthrough *p)
{
    pt_forget_all(p);
    if (p->root) {
        pthread_mutex_lock(&p->lock);
        atomic_fetch_add(&p->engine->kept_fds, 1); /* the root's descriptor is closed with the rest */
        p->root->mount->fd = -1;
        pt_node_unlink(p, p->root);
        pt_node_put_locked(p, p->root);
        p->root_fd = -1;
        pthread_mutex_unlock(&p->lock);
    }
    free(p->by_ino);
    free(p->by_key);
}
