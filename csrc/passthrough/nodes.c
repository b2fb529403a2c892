/* passthrough/nodes.c -- the nodes that a guest knows; see passthrough.h. Table work runs under the lock, calls to the
 * host run outside it.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/stat.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/netfs.h"
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

static dev_t dev_of(const struct statx *sx)
{
    return makedev(sx->stx_dev_major, sx->stx_dev_minor);
}

/* Fits: the number says mount, device and the host's number, so it is unique and stays the same. */
static bool ino_fits(uint32_t device, uint64_t host_ino)
{
    return device < PT_DEVICES && host_ino >> PT_HOST_INO_BITS == 0;
}

static uint64_t ino_of(uint32_t device, uint64_t host_ino)
{
    return (uint64_t)device << PT_HOST_INO_BITS | host_ino;
}

/* An entry does not say its device, so the directory's is taken; nor need the number be unique where it does not fit. */
uint64_t pt_ino_in(const struct pt_node *dir, uint64_t host_ino)
{
    if (ino_fits(dir->device, host_ino))
        return ino_of(dir->device, host_ino);
    return PT_INO_TOP | ((host_ino ^ (uint64_t)dir->device << 32) & (PT_INO_TOP - 1));
}

/* Under the lock. The entry of a device, for one node more; PT_DEVICES: all are in use. */
static uint32_t device_take(struct vnd_passthrough *p, const struct pt_mount *m, dev_t dev)
{
    uint32_t at = PT_DEVICES;

    for (uint32_t i = 0; i < PT_DEVICES; i++) {
        struct pt_device *d = &p->devices[i];

        if (d->nodes && d->mount_id == m->id && d->dev == dev) {
            d->nodes++;
            return i;
        }
        if (!d->nodes && at == PT_DEVICES)
            at = i;
    }
    if (at < PT_DEVICES)
        p->devices[at] = (struct pt_device){ m->id, dev, 1 };
    return at;
}

static void fill(const struct pt_node *n, const struct statx *sx, vnd_attr *out)
{
    *out = (vnd_attr){
        .ino = n->ino,
        .generation = n->generation,
        .size_bytes = sx->stx_size,
        .blocks = sx->stx_blocks,
        .mtime_s = (uint64_t)sx->stx_mtime.tv_sec,
        .mtime_nsec = sx->stx_mtime.tv_nsec,
        .atime_s = (uint64_t)sx->stx_atime.tv_sec,
        .atime_nsec = sx->stx_atime.tv_nsec,
        .ctime_s = (uint64_t)sx->stx_ctime.tv_sec,
        .ctime_nsec = sx->stx_ctime.tv_nsec,
        .mode = sx->stx_mode,
        .nlink = sx->stx_nlink,
        .uid = sx->stx_uid,
        .gid = sx->stx_gid,
        .rdev = (sx->stx_rdev_minor & 0xff) | sx->stx_rdev_major << 8 | (sx->stx_rdev_minor & ~0xffu) << 12,
        .blksize_bytes = sx->stx_blksize ? sx->stx_blksize : 4096,
    };
}

int pt_fill_attr(const struct pt_node *n, int fd, vnd_attr *out)
{
    struct statx sx;
    int rc = pt_stat(fd, &sx);

    if (!rc)
        fill(n, &sx, out);
    return rc;
}

/* ---- nodes */

struct pt_node *pt_node_at(struct vnd_passthrough *p, uint64_t ino)
{
    struct pt_node *n = p->by_ino[bucket_of(p, ino)];

    while (n && n->ino != ino)
        n = n->next_ino;
    return n;
}

/* The node of a file of the host. A descriptor that is kept keeps its inode alive, so that no other file can have its
 * number: a file of another type is another one then, whatever the host says. */
static struct pt_node *find_key(struct vnd_passthrough *p, const struct pt_mount *m, const struct statx *sx)
{
    dev_t dev = dev_of(sx);
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

static void link_node(struct vnd_passthrough *p, struct pt_node *n)
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
    p->nodes_max = PT_NODES_MAX;
    p->by_ino = calloc(1u << PT_BUCKETS_LOG2, sizeof(struct pt_node *));
    p->by_key = calloc(1u << PT_BUCKETS_LOG2, sizeof(struct pt_node *));
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
}

static void unlink_node(struct vnd_passthrough *p, struct pt_node *n)
{
    struct pt_node **at;

    for (at = &p->by_ino[bucket_of(p, n->ino)]; *at != n;)
        at = &(*at)->next_ino;
    *at = n->next_ino;
    for (at = &p->by_key[bucket_of(p, key_of(n->mount, n->dev, n->host_ino))]; *at != n;)
        at = &(*at)->next_key;
    *at = n->next_key;
    n->linked = false;
    p->n_nodes--;
    pt_node_close(p, n);
    pt_node_put_locked(p, n);
}

void pt_node_put_locked(struct vnd_passthrough *p, struct pt_node *n)
{
    while (n && !--n->refs) { /* the last node of a mount lets go of the directory above the mount */
        struct pt_node *gone = n;

        if (gone->fd_kept) {
            close(gone->fd);
            p->n_kept--;
        } else {
            pt_node_close(p, gone);
        }
        if (gone->device < PT_DEVICES)
            p->devices[gone->device].nodes--;
        n = pt_mount_put(p, gone->mount);
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

/* ---- what is found */

static uint64_t choose_ino(struct vnd_passthrough *p, const struct pt_node *n)
{
    uint64_t ino = ino_of(n->device, n->host_ino);

    if (ino_fits(n->device, n->host_ino) && !pt_node_at(p, ino))
        return ino;
    return PT_INO_TOP | ++p->next_ino;
}

/* Under the lock. A node for what was found, with one ref for the caller; it takes the caller's ref on m. NULL: no
 * memory. before: a node under the same number that the host has replaced. */
static struct pt_node *node_add(struct vnd_passthrough *p, struct pt_mount *m, const struct statx *sx,
                                const struct pt_fid *fid, struct pt_node *before)
{
    uint32_t bytes = fid ? fid->h.handle_bytes : 0;
    struct pt_node *n = calloc(1, sizeof(*n) + bytes);

    if (!n)
        return NULL;
    n->mount = m;
    n->host_ino = sx->stx_ino;
    n->dev = dev_of(sx);
    n->device = device_take(p, m, n->dev);
    n->type = sx->stx_mode & S_IFMT;
    n->fd = -1;
    n->handle_bytes = bytes;
    if (fid) {
        n->handle_type = fid->h.handle_type;
        memcpy(n->handle, fid->h.f_handle, bytes);
    }
    if (before) {
        n->ino = before->ino;
        n->generation = before->generation + 1;
        n->nlookup = before->nlookup; /* the guest forgets both under one number */
        unlink_node(p, before);
    } else {
        n->ino = choose_ino(p, n);
    }
    n->refs = 1;
    link_node(p, n);
    return n;
}

static bool same_fid(const struct pt_node *n, const struct pt_fid *fid)
{
    return !fid || (n->handle_bytes == fid->h.handle_bytes && n->handle_type == fid->h.handle_type &&
                    memcmp(n->handle, fid->h.f_handle, n->handle_bytes) == 0);
}

/* Under the lock. Keeps a descriptor in the node, because nothing else leads to it. */
static int keep_fd(struct vnd_passthrough *p, struct pt_node *n, int fd)
{
    int own;

    if (p->n_kept >= p->kept_max)
        return -ENFILE;
    own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own < 0)
        return errno == EMFILE ? -ENFILE : -errno;
    n->fd = own;
    n->fd_kept = true;
    p->n_kept++;
    return 0;
}

bool pt_has_room(struct vnd_passthrough *p, const struct pt_node *dir)
{
    bool room;

    pthread_mutex_lock(&p->lock);
    room = p->n_nodes < p->nodes_max && ((p->handles && dir->handle_bytes) || p->n_kept < p->kept_max);
    pthread_mutex_unlock(&p->lock);
    return room;
}

static bool needs_fd(const struct pt_mount *m, const struct pt_fid *fid)
{
    return !fid || m->no_fd;
}

static int learn_locked(struct vnd_passthrough *p, struct pt_node *above, const char *name, int fd,
                        const struct statx *sx, const struct pt_fid *fid, int remote, vnd_attr *out)
{
    struct pt_mount *m = pt_mount_find(p, sx->stx_mnt_id);
    struct pt_node *n;
    int rc = 0;

    if (!above && (!m || !find_key(p, m, sx))) {
        if (m)
            pt_node_put_locked(p, pt_mount_put(p, m));
        return -ESTALE;
    }
    if (!m && remote < 0)
        return -EINPROGRESS;
    if (!m) {
        m = pt_mount_add(p, sx->stx_mnt_id, above, name, remote);
        if (!m)
            return -ENOMEM;
        m->no_fd = above && !S_ISDIR(sx->stx_mode) && !S_ISREG(sx->stx_mode);
    }
    n = find_key(p, m, sx);
    if (n && n->type == (sx->stx_mode & S_IFMT) && (n->fd_kept || same_fid(n, fid))) {
        n->refs++;
        pt_node_put_locked(p, pt_mount_put(p, m));
    } else {
        if (!n && p->n_nodes >= p->nodes_max) {
            pt_node_put_locked(p, pt_mount_put(p, m));
            return -ENFILE;
        }
        n = node_add(p, m, sx, fid, n);
        if (!n) {
            pt_node_put_locked(p, pt_mount_put(p, m));
            return -ENOMEM;
        }
        if (needs_fd(m, fid))
            rc = keep_fd(p, n, fd);
        if (rc && !n->nlookup)
            unlink_node(p, n);
    }
    if (!rc) {
        if (n->nlookup < UINT64_MAX)
            n->nlookup++;
        fill(n, sx, out);
    }
    pt_node_put_locked(p, n);
    return rc;
}

int pt_learn(struct vnd_passthrough *p, struct pt_node *above, const char *name, int fd, bool take, vnd_attr *out)
{
    struct pt_fid fid;
    struct statx sx;
    int mnt, rc = pt_stat(fd, &sx);
    bool has_fid;

    if (!rc) {
        fid.h.handle_bytes = PT_HANDLE_MAX;
        has_fid = p->handles && name_to_handle_at(fd, "", &fid.h, &mnt, AT_EMPTY_PATH) == 0;
        pthread_mutex_lock(&p->lock);
        rc = learn_locked(p, above, name, fd, &sx, has_fid ? &fid : NULL, -1, out);
        pthread_mutex_unlock(&p->lock);
        if (rc == -EINPROGRESS) { /* the mount is new: its kind is asked for outside the lock */
            int remote = netfs_holds(fd);

            pthread_mutex_lock(&p->lock);
            rc = learn_locked(p, above, name, fd, &sx, has_fid ? &fid : NULL, remote, out);
            pthread_mutex_unlock(&p->lock);
        }
    }
    if (take)
        close(fd);
    return rc;
}

void pt_forget(struct vnd_passthrough *p, uint64_t ino, uint64_t n)
{
    struct pt_node *node;

    pthread_mutex_lock(&p->lock);
    node = pt_node_at(p, ino);
    if (node && node != p->root) {
        node->nlookup = n < node->nlookup ? node->nlookup - n : 0;
        if (!node->nlookup)
            unlink_node(p, node);
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
                unlink_node(p, n);
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

int pt_root_open(struct vnd_passthrough *p)
{
    struct pt_fid fid;
    struct statx sx;
    struct pt_mount *m;
    int mnt, rc = pt_stat(p->root_fd, &sx);
    bool has_fid;

    if (rc)
        return rc;
    fid.h.handle_bytes = PT_HANDLE_MAX;
    has_fid = name_to_handle_at(p->root_fd, "", &fid.h, &mnt, AT_EMPTY_PATH) == 0;
    if (has_fid) { /* without CAP_DAC_READ_SEARCH handles are given but cannot be opened */
        int fd = open_by_handle_at(p->root_fd, &fid.h, O_PATH | O_CLOEXEC);

        p->handles = fd >= 0;
        if (fd >= 0)
            close(fd);
    }
    m = pt_mount_add(p, sx.stx_mnt_id, NULL, "", netfs_holds(p->root_fd));
    p->root = m ? calloc(1, sizeof(*p->root) + (has_fid ? fid.h.handle_bytes : 0)) : NULL;
    if (!p->root)
        return -ENOMEM;
    m->fd = p->root_fd;
    *p->root = (struct pt_node){ .mount = m,
                                 .ino = PT_ROOT_INO,
                                 .host_ino = sx.stx_ino,
                                 .dev = dev_of(&sx),
                                 .device = device_take(p, m, dev_of(&sx)),
                                 .nlookup = 1,
                                 .type = S_IFDIR,
                                 .fd = p->root_fd,
                                 .refs = 1 };
    if (has_fid) {
        p->root->handle_type = fid.h.handle_type;
        p->root->handle_bytes = fid.h.handle_bytes;
        memcpy(p->root->handle, fid.h.f_handle, fid.h.handle_bytes);
    }
    p->root->fd_kept = true;
    p->root->fd_users = 1;
    link_node(p, p->root);
    return 0;
}

void pt_nodes_free(struct vnd_passthrough *p)
{
    pt_forget_all(p);
    if (p->root) {
        pthread_mutex_lock(&p->lock);
        p->n_kept++; /* the root's descriptor is closed with the rest */
        p->root->mount->fd = -1;
        unlink_node(p, p->root);
        pt_node_put_locked(p, p->root);
        p->root_fd = -1;
        pthread_mutex_unlock(&p->lock);
    }
    free(p->by_ino);
    free(p->by_key);
}
