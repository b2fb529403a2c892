/* passthrough/restore.c -- goes on with what another process left in a ledger (passthrough/kept.h).
 *
 * A node comes back by its handle or its place, which nothing opens before it is used. An open file is opened again with its
 * flags and keeps its fh. A mount is found again by its directory and its name there, because another process may see other
 * mount ids. What cannot be found again is ESTALE or EBADF, as if the host had taken it away.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/stat.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "passthrough/internal.h"
#include "passthrough/kept.h"

/* A record as it was found. */
struct left {
    uint32_t at, len;
    uint16_t kind;
    uint8_t *data;
};
struct leavings {
    struct left *all;
    uint32_t n, room;
};

static void take_record(void *ctx, uint32_t at, uint16_t kind, const void *data, uint32_t len)
{
    struct leavings *l = ctx;
    uint8_t *copy;

    if (l->n == l->room) {
        uint32_t room = l->room ? l->room * 2 : 64;
        struct left *more = realloc(l->all, room * sizeof(*more));

        if (!more)
            return;
        l->all = more;
        l->room = room;
    }
    copy = malloc(len ? len : 1);
    if (!copy)
        return;
    memcpy(copy, data, len);
    l->all[l->n++] = (struct left){ at, len, kind, copy };
}

static void free_leavings(struct leavings *l)
{
    for (uint32_t i = 0; i < l->n; i++)
        free(l->all[i].data);
    free(l->all);
}

static struct pt_mount *mount_kept_at(struct vnd_passthrough *p, uint32_t at)
{
    if (!at)
        return p->root->mount;
    for (struct pt_mount *m = p->mounts; m; m = m->next)
        if (m->kept_at == at)
            return m;
    return NULL;
}

/* Under the lock. A node as it was, linked, with no look-up yet. False: the record is not sound, or no memory. */
static bool restore_node(struct vnd_passthrough *p, const struct left *r)
{
    struct kept_node k;
    struct pt_mount *m;
    struct pt_node *n;

    if (r->len < sizeof(k))
        return false;
    memcpy(&k, r->data, sizeof(k));
    if (k.handle_bytes > PT_HANDLE_MAX || k.name_len > 255 || r->len != sizeof(k) + k.handle_bytes + k.name_len ||
        k.device > PT_DEVICES || pt_node_at(p, k.ino) || !(m = mount_kept_at(p, k.mount)))
        return false;
    n = calloc(1, sizeof(*n) + k.handle_bytes);
    if (!n)
        return false;
    if (k.has_place) {
        n->place = calloc(1, sizeof(*n->place) + k.name_len + 1);
        if (!n->place) {
            free(n);
            return false;
        }
        n->place->dir = k.place_dir;
        n->place->born = k.born;
        n->place->birth = (struct statx_timestamp){ .tv_sec = k.birth_s, .tv_nsec = k.birth_nsec };
        n->place->name_len = k.name_len;
        memcpy(n->place->name, r->data + sizeof(k) + k.handle_bytes, k.name_len);
        atomic_store_explicit(&p->has_places, true, memory_order_relaxed);
    }
    m->refs++;
    n->mount = m;
    n->ino = k.ino;
    n->generation = k.generation;
    n->host_ino = k.host_ino;
    n->dev = (dev_t)k.dev;
    n->device = k.device;
    n->type = k.type;
    n->fd = -1;
    n->kept_at = r->at;
    n->handle_type = k.handle_type;
    n->handle_bytes = k.handle_bytes;
    memcpy(n->handle, r->data + sizeof(k), k.handle_bytes);
    if (k.device < PT_DEVICES) {
        struct pt_device *d = &p->devices[k.device];

        *d = (struct pt_device){ m->id, n->dev, d->nodes + 1 };
    }
    pt_node_link(p, n);
    return true;
}

/* The id that a mount has for this process; 0: it is gone. */
static uint64_t ask_mount_id(struct vnd_passthrough *p, const struct kept_mount *k, const char *name)
{
    struct pt_ref above;
    struct statx sx;
    uint64_t id = 0;
    int fd;

    if (pt_get(p, k->above, &above))
        return 0;
    fd = openat(above.fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd >= 0 && pt_stat(fd, &sx) == 0)
        id = sx.stx_mnt_id;
    if (fd >= 0)
        close(fd);
    pt_put(p, &above);
    return id;
}

/* Makes a mount known whose directory is known already. False: not now. */
static bool restore_mount(struct vnd_passthrough *p, const struct left *r)
{
    struct kept_mount k;
    struct pt_node *above;
    struct pt_mount *m = NULL;
    char name[256] = "";
    uint64_t id;

    if (r->len < sizeof(k) || r->len - sizeof(k) > 255)
        return false;
    memcpy(&k, r->data, sizeof(k));
    memcpy(name, r->data + sizeof(k), r->len - sizeof(k));
    id = ask_mount_id(p, &k, name);
    pthread_mutex_lock(&p->lock);
    above = pt_node_at(p, k.above);
    if (above && id) {
        struct ledger *l = p->ledger;

        p->ledger = NULL; /* its record is there already */
        m = pt_mount_add(p, id, above, name, k.remote);
        p->ledger = l;
    }
    if (m) {
        m->no_fd = k.no_fd;
        m->kept_at = r->at;
    }
    pthread_mutex_unlock(&p->lock);
    return m != NULL;
}

/* Nodes of the source's own mount, then mounts below them, then nodes of those, and so on. */
static void restore_tree(struct vnd_passthrough *p, struct leavings *l)
{
    bool more = true;

    while (more) {
        more = false;
        for (uint32_t i = 0; i < l->n; i++) {
            struct left *r = &l->all[i];
            bool done = false;

            if (r->kind == KEPT_NODE) {
                pthread_mutex_lock(&p->lock);
                done = restore_node(p, r);
                pthread_mutex_unlock(&p->lock);
            } else if (r->kind == KEPT_MOUNT) {
                done = restore_mount(p, r);
            }
            if (done)
                r->kind = 0;
            more |= done;
        }
    }
}

static bool is_owner(uint32_t owner, const uint32_t *owners, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        if (owners[i] == owner)
            return true;
    return false;
}

/* Counts what the sessions that are there still hold. */
static void restore_held(struct vnd_passthrough *p, struct leavings *l, const uint32_t *owners, uint32_t n_owners)
{
    for (uint32_t i = 0; i < l->n; i++) {
        struct left *r = &l->all[i];
        struct pt_node *n;
        struct kept_held k;

        if (r->kind != KEPT_HELD || r->len != sizeof(k))
            continue;
        memcpy(&k, r->data, sizeof(k));
        if (!is_owner(k.owner, owners, n_owners))
            continue;
        r->kind = k.file ? r->kind : 0;
        pthread_mutex_lock(&p->lock);
        n = k.file ? NULL : pt_node_at(p, k.id);
        if (n && n != p->root)
            n->nlookup = n->nlookup + k.n < k.n ? UINT64_MAX : n->nlookup + k.n;
        pthread_mutex_unlock(&p->lock);
    }
}

static bool is_held(const struct leavings *l, uint64_t fh, const uint32_t *owners, uint32_t n_owners)
{
    for (uint32_t i = 0; i < l->n; i++) {
        struct kept_held k;

        if (l->all[i].kind != KEPT_HELD || l->all[i].len != sizeof(k))
            continue;
        memcpy(&k, l->all[i].data, sizeof(k));
        if (k.file && k.id == fh && is_owner(k.owner, owners, n_owners))
            return true;
    }
    return false;
}

/* Opens a file again. 0 or -errno. */
static int restore_file(struct vnd_passthrough *p, const struct left *r)
{
    struct kept_file k;
    struct pt_node *n;
    int fd, rc;

    memcpy(&k, r->data, sizeof(k));
    n = pt_node_find(p, k.ino);
    if (!n)
        return -ESTALE;
    fd = pt_open_node(p, n, n->type == S_IFDIR ? O_RDONLY | O_DIRECTORY : pt_open_flags(k.flags) & ~O_TRUNC);
    rc = fd < 0 ? fd : 0;
    if (!rc) {
        pthread_mutex_lock(&p->lock);
        rc = pt_file_restore(p, n, fd, k.fh, r->at);
        pthread_mutex_unlock(&p->lock);
        if (rc)
            close(fd);
    }
    pt_node_put(p, n);
    return rc;
}

/* How many could not be opened again. */
static int restore_files(struct vnd_passthrough *p, struct leavings *l, const uint32_t *owners, uint32_t n_owners)
{
    int lost = 0;

    for (uint32_t i = 0; i < l->n; i++) {
        struct left *r = &l->all[i];
        struct kept_file k;

        if (r->kind != KEPT_FILE || r->len != sizeof(k))
            continue;
        memcpy(&k, r->data, sizeof(k));
        if (!is_held(l, k.fh, owners, n_owners))
            continue;
        if (restore_file(p, r) == 0)
            r->kind = 0;
        else
            lost++;
    }
    return lost;
}

/* Nodes that no session holds any more, and records that led to nothing. */
static void drop_unused(struct vnd_passthrough *p, struct leavings *l, const uint32_t *owners, uint32_t n_owners)
{
    pthread_mutex_lock(&p->lock);
    for (uint64_t i = 0; i < 1ull << p->buckets_log2; i++)
        for (struct pt_node *n = p->by_ino[i], *next; n; n = next) {
            next = n->next_ino;
            if (n != p->root && !n->nlookup && !n->files)
                pt_node_unlink(p, n);
        }
    pthread_mutex_unlock(&p->lock);
    for (uint32_t i = 0; i < l->n; i++) {
        struct kept_held k = { 0 };

        if (l->all[i].kind == KEPT_HELD && l->all[i].len == sizeof(k))
            memcpy(&k, l->all[i].data, sizeof(k));
        if (l->all[i].kind && !is_owner(k.owner, owners, n_owners))
            ledger_drop(p->ledger, &(uint32_t){ l->all[i].at });
    }
}

int vnd_passthrough_keep(vnd_passthrough *p, int fd, const uint32_t *owners, uint32_t n_owners, char *err,
                         size_t err_len)
{
    struct leavings l = { 0 };
    int lost;

    p->ledger = ledger_open(fd);
    if (!p->ledger)
        return fail_line(-EINVAL, err, err_len, "passthrough of %s: what an earlier process left is of no use",
                         p->source);
    p->next_ino = ledger_numbers(p->ledger)[PT_KEPT_NEXT_INO];
    p->next_gen = (uint32_t)ledger_numbers(p->ledger)[PT_KEPT_NEXT_GEN];
    ledger_each(p->ledger, take_record, &l);
    restore_tree(p, &l);
    restore_held(p, &l, owners, n_owners);
    lost = restore_files(p, &l, owners, n_owners);
    drop_unused(p, &l, owners, n_owners);
    free_leavings(&l);
    return lost;
}
