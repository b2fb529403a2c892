/* passthrough/learn.c -- a file of the host becomes a node, with an inode number for the guest; see passthrough.h. Table
 * work runs under the lock, calls to the host run outside it.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/stat.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/netfs.h"
#include "passthrough/internal.h"

/* What a descriptor of the host leads to. */
struct found {
    struct pt_node *above; /* the directory that led to it, and the name there; NULL: it must be known already */
    const char *name;
    int fd; /* borrowed */
    struct statx sx;
    struct pt_fid fid;
    bool has_fid; /* fid is set */
};

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

static uint64_t choose_ino(struct vnd_passthrough *p, const struct pt_node *n)
{
    uint64_t ino = ino_of(n->device, n->host_ino);

    if (ino_fits(n->device, n->host_ino) && !pt_node_at(p, ino))
        return ino;
    p->next_ino++;
    if (p->ledger)
        ledger_numbers(p->ledger)[PT_KEPT_NEXT_INO] = p->next_ino;
    return PT_INO_TOP | p->next_ino;
}

/* The file handle of fd. False: its file system gives none. */
static bool ask_fid(int fd, struct pt_fid *fid)
{
    int mount;

    fid->h.handle_bytes = PT_HANDLE_MAX;
    return name_to_handle_at(fd, "", &fid->h, &mount, AT_EMPTY_PATH) == 0;
}

/* Under the lock. A node for what was found, not linked and without a number; it takes the caller's ref on m. NULL: no
 * memory. */
static struct pt_node *node_new(struct vnd_passthrough *p, struct pt_mount *m, const struct found *what)
{
    uint32_t bytes = what->has_fid ? what->fid.h.handle_bytes : 0;
    struct pt_node *n = calloc(1, sizeof(*n) + bytes);

    if (!n)
        return NULL;
    n->mount = m;
    n->host_ino = what->sx.stx_ino;
    n->dev = pt_dev_of(&what->sx);
    n->device = device_take(p, m, n->dev);
    n->type = what->sx.stx_mode & S_IFMT;
    n->fd = -1;
    n->refs = 1;
    n->handle_bytes = bytes;
    if (what->has_fid) {
        n->handle_type = what->fid.h.handle_type;
        memcpy(n->handle, what->fid.h.f_handle, bytes);
    }
    return n;
}

/* Under the lock. Adds the node of what was found, with one ref for the caller; it takes the caller's ref on m. NULL: no
 * memory. before: a node under the same number that the host has replaced. */
static struct pt_node *node_add(struct vnd_passthrough *p, struct pt_mount *m, const struct found *what,
                                struct pt_node *before)
{
    struct pt_node *n = node_new(p, m, what);

    if (!n)
        return NULL;
    if (before) {
        n->ino = before->ino;
        n->generation = before->generation + 1;
        n->nlookup = before->nlookup; /* the guest forgets both under one number */
        pt_node_unlink(p, before);
    } else {
        n->ino = choose_ino(p, n);
    }
    pt_node_link(p, n);
    return n;
}

static bool same_fid(const struct pt_node *n, const struct found *what)
{
    const struct file_handle *h = &what->fid.h;

    return !what->has_fid || (n->handle_bytes == h->handle_bytes && n->handle_type == h->handle_type &&
                              memcmp(n->handle, h->f_handle, n->handle_bytes) == 0);
}

/* Under the lock. Sees that a new node without a handle is found again: by a descriptor of its own while there is room, and
 * by its name. */
static int find_again(struct vnd_passthrough *p, struct pt_node *n, const struct found *what)
{
    int rc;

    if (what->above && !pt_place_set(n, what->above->ino, what->name, &what->sx))
        return -ENOMEM;
    if (n->place)
        atomic_store_explicit(&p->has_places, true, memory_order_relaxed);
    rc = pt_keep_fd(p, n, what->fd);
    return rc == -ENFILE && n->place ? 0 : rc;
}

/* Under the lock. remote: whether a network or another process answers for the mount, should it be a new one; -1: not known
 * yet, and -EINPROGRESS where that must be asked first. */
static int learn_locked(struct vnd_passthrough *p, const struct found *what, int remote, vnd_attr *out)
{
    struct pt_mount *m = pt_mount_find(p, what->sx.stx_mnt_id);
    struct pt_node *n;
    int rc = 0;

    if (!what->above && (!m || !pt_node_of(p, m, &what->sx))) {
        if (m)
            pt_node_put_locked(p, pt_mount_put(p, m));
        return -ESTALE;
    }
    if (!m && remote < 0)
        return -EINPROGRESS;
    if (!m) {
        m = pt_mount_add(p, what->sx.stx_mnt_id, what->above, what->name, remote);
        if (!m)
            return -ENOMEM;
        m->no_fd = what->above && !S_ISDIR(what->sx.stx_mode) && !S_ISREG(what->sx.stx_mode);
    }
    n = pt_node_of(p, m, &what->sx);
    if (n && n->type == (what->sx.stx_mode & S_IFMT) &&
        (n->fd_kept || (same_fid(n, what) && pt_place_holds(n, &what->sx)))) {
        n->refs++;
        if (n->place && what->above) {
            pt_place_set(n, what->above->ino, what->name, &what->sx); /* without memory the old place stays */
            pt_keep_node(p, n);
        }
        pt_node_put_locked(p, pt_mount_put(p, m));
    } else {
        n = node_add(p, m, what, n);
        if (!n) {
            pt_node_put_locked(p, pt_mount_put(p, m));
            return -ENOMEM;
        }
        if (!what->has_fid || m->no_fd)
            rc = find_again(p, n, what);
        if (rc && !n->nlookup)
            pt_node_unlink(p, n);
        else
            pt_keep_node(p, n);
    }
    if (!rc) {
        if (n->nlookup < UINT64_MAX)
            n->nlookup++;
        fill(n, &what->sx, out);
    }
    pt_node_put_locked(p, n);
    return rc;
}

int pt_learn(struct vnd_passthrough *p, struct pt_node *above, const char *name, int fd, bool take, vnd_attr *out)
{
    struct found what = { .above = above, .name = name, .fd = fd };
    int rc;

    what.has_fid = p->handles && ask_fid(fd, &what.fid);
    rc = what.has_fid ? pt_stat(fd, &what.sx) : pt_stat_birth(fd, &what.sx);
    if (!rc) {
        pthread_mutex_lock(&p->lock);
        rc = learn_locked(p, &what, -1, out);
        pthread_mutex_unlock(&p->lock);
        if (rc == -EINPROGRESS) { /* the mount is new: its kind is asked for outside the lock */
            int remote = netfs_holds(fd);

            pthread_mutex_lock(&p->lock);
            rc = learn_locked(p, &what, remote, out);
            pthread_mutex_unlock(&p->lock);
        }
    }
    if (take)
        close(fd);
    return rc;
}

int pt_root_open(struct vnd_passthrough *p)
{
    struct found what = { .name = "", .fd = p->root_fd };
    struct pt_mount *m;
    int rc = pt_stat(p->root_fd, &what.sx);

    if (rc)
        return rc;
    what.has_fid = ask_fid(p->root_fd, &what.fid);
    if (what.has_fid) { /* without CAP_DAC_READ_SEARCH handles are given but cannot be opened */
        int fd = open_by_handle_at(p->root_fd, &what.fid.h, O_PATH | O_CLOEXEC);

        p->handles = fd >= 0;
        if (fd >= 0)
            close(fd);
    }
    m = pt_mount_add(p, what.sx.stx_mnt_id, NULL, what.name, netfs_holds(p->root_fd));
    p->root = m ? node_new(p, m, &what) : NULL;
    if (!p->root)
        return -ENOMEM;
    m->fd = p->root_fd;
    p->root->ino = PT_ROOT_INO;
    p->root->type = S_IFDIR;
    p->root->nlookup = 1;
    p->root->fd = p->root_fd;
    p->root->fd_kept = true;
    p->root->fd_users = 1;
    pt_node_link(p, p->root);
    return 0;
}
