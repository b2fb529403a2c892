/* passthrough/handles.c -- reaches a node: by its cached descriptor, by its file handle or place, or by a file that is
 * open; see passthrough.h.
 */
#include "passthrough/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/stat.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The descriptor of a node's mount, in use. Outside the lock. -ESTALE: the host has taken the mount away. */
static int mount_fd(struct vnd_passthrough *p, struct pt_mount *m)
{
    struct pt_ref above;
    int fd = pt_mount_fd_get(p, m), rc;

    if (fd != -ENOENT)
        return fd;
    if (!m->above || m->no_fd)
        return -ESTALE;
    rc = pt_get(p, m->above->ino, &above);
    if (rc)
        return rc;
    fd = pt_mount_fd_open(p, m, above.fd);
    pt_put(p, &above);
    return fd;
}

/* Opens a node, which is in use, by its handle. Outside the lock. */
static int open_handle(struct vnd_passthrough *p, struct pt_node *n, int flags)
{
    struct pt_fid fid;
    bool tried = false;
    int mfd, fd;

    if (!n->handle_bytes || !p->handles || n->mount->no_fd)
        return -ESTALE;
    mfd = mount_fd(p, n->mount);
    if (mfd < 0)
        return mfd;
    fid.h.handle_bytes = n->handle_bytes;
    fid.h.handle_type = n->handle_type;
    memcpy(fid.h.f_handle, n->handle, n->handle_bytes);
    do {
        fd = open_by_handle_at(mfd, &fid.h, flags | O_CLOEXEC);
    } while (fd < 0 && pt_make_room(p, &tried));
    if (fd < 0)
        fd = errno == EMFILE ? -ENFILE : -errno;
    pt_mount_fd_put(p, n->mount);
    return fd;
}

bool pt_cache_fd(struct vnd_passthrough *p, struct pt_node *n, int fd)
{
    _Atomic uint32_t *all = &p->engine->cached_fds; /* other host directories have some too */

    for (uint32_t i = 0; i < 8; i++) {
        uint32_t at = p->hand++ % p->cache_max;
        struct pt_node *old = p->cache[at];

        if (old && (old->fd_used || old->fd_users)) {
            old->fd_used = false;
            continue;
        }
        if (old)
            pt_node_close(p, old);
        if (atomic_fetch_add_explicit(all, 1, memory_order_relaxed) >= p->cached_max) {
            atomic_fetch_sub_explicit(all, 1, memory_order_relaxed);
            continue;
        }
        p->cache[at] = n;
        n->cache_at = at;
        p->n_cached++;
        n->fd = fd;
        n->fd_drop = false;
        n->fd_used = true;
        return true;
    }
    return false;
}

/* ---- by a place */

/* Directories above a node of which none has a descriptor, at most: more is a circle of places that the host has
 * changed. */
#define DEPTH_MAX 4096

/* A node to be opened below the one before it. */
struct step {
    struct pt_node *node;   /* with a ref */
    struct pt_place *place; /* a copy */
};

struct path {
    struct step *steps; /* the node that is wanted first, then its directories */
    uint32_t n, room;
};

static struct pt_place *copy_place(const struct pt_place *p)
{
    size_t bytes = sizeof(*p) + p->name_len + 1;
    struct pt_place *copy = malloc(bytes);

    if (copy)
        memcpy(copy, p, bytes);
    return copy;
}

/* Under the lock. */
static int push(struct path *path, struct pt_node *n)
{
    if (path->n == DEPTH_MAX)
        return -ESTALE;
    if (path->n == path->room) {
        uint32_t room = path->room ? path->room * 2 : 8;
        struct step *steps = realloc(path->steps, room * sizeof(*steps));

        if (!steps)
            return -ENOMEM;
        path->steps = steps;
        path->room = room;
    }
    path->steps[path->n] = (struct step){ n, copy_place(n->place) };
    if (!path->steps[path->n].place)
        return -ENOMEM;
    n->refs++;
    path->n++;
    return 0;
}

/* Under the lock. The steps from n up to the first directory that is reached otherwise: by its descriptor, which *top then
 * uses, or by a handle (top->node NULL, *ino is its number). 0 or -errno. */
static int climb(struct vnd_passthrough *p, struct pt_node *n, struct path *path, struct pt_ref *top, uint64_t *ino)
{
    while (n->place) {
        int rc = push(path, n);

        if (rc)
            return rc;
        n = pt_node_at(p, n->place->dir);
        if (!n || n->type != S_IFDIR)
            return -ESTALE;
        *ino = n->ino;
        if (n->fd >= 0) {
            n->refs++;
            n->fd_users++;
            n->fd_used = true;
            *top = (struct pt_ref){ n, n->fd, false };
            return 0;
        }
    }
    return 0;
}

/* Opens one step below dir. The descriptor or -errno. */
static int open_step(struct vnd_passthrough *p, int dir, const struct step *s)
{
    struct statx sx;
    bool tried = false;
    int fd, rc;

    do {
        fd = openat(dir, s->place->name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    } while (fd < 0 && pt_make_room(p, &tried));
    if (fd < 0)
        return errno == EMFILE ? -ENFILE : errno == ENOENT || errno == ENOTDIR ? -ESTALE : -errno;
    rc = pt_stat_birth(fd, &sx);
    if (!rc && !pt_place_is(s->place, s->node, &sx))
        rc = -ESTALE;
    if (!rc)
        return fd;
    close(fd);
    return rc;
}

/* A directory on the way keeps its descriptor where the cache has room: its other entries are likely to be next. */
static struct pt_ref keep_step(struct vnd_passthrough *p, struct pt_node *n, int fd)
{
    struct pt_ref ref = { n, fd, true };

    pthread_mutex_lock(&p->lock);
    n->refs++;
    if (n->fd < 0 && n->linked && pt_cache_fd(p, n, fd)) {
        n->fd_users++;
        ref.own = false;
    }
    pthread_mutex_unlock(&p->lock);
    return ref;
}

static int descend(struct vnd_passthrough *p, const struct path *path, struct pt_ref *dir)
{
    int fd = -ESTALE;

    for (uint32_t i = path->n; i-- > 0;) {
        fd = open_step(p, dir->fd, &path->steps[i]);
        if (fd < 0 || i == 0)
            return fd;
        pt_put(p, dir);
        *dir = keep_step(p, path->steps[i].node, fd);
    }
    return fd;
}

static void free_path(struct vnd_passthrough *p, struct path *path)
{
    pthread_mutex_lock(&p->lock);
    for (uint32_t i = 0; i < path->n; i++)
        pt_node_put_locked(p, path->steps[i].node);
    pthread_mutex_unlock(&p->lock);
    for (uint32_t i = 0; i < path->n; i++)
        free(path->steps[i].place);
    free(path->steps);
}

/* Opens a node, which is in use, O_PATH by its place: the descriptor, or -ESTALE where its name leads to it no more. */
static int open_place(struct vnd_passthrough *p, struct pt_node *n)
{
    struct path path = { 0 };
    struct pt_ref top = { 0 };
    uint64_t ino = 0;
    int rc, fd;

    pthread_mutex_lock(&p->lock);
    rc = climb(p, n, &path, &top, &ino);
    pthread_mutex_unlock(&p->lock);
    if (!rc && !top.node)
        rc = path.n ? pt_get(p, ino, &top) : -ESTALE;
    fd = rc ? rc : descend(p, &path, &top);
    if (top.node)
        pt_put(p, &top);
    free_path(p, &path);
    return fd;
}

/* ---- by any way */

int pt_get(struct vnd_passthrough *p, uint64_t ino, struct pt_ref *ref)
{
    struct pt_node *n;
    int fd;

    pthread_mutex_lock(&p->lock);
    n = pt_node_at(p, ino);
    if (!n) {
        pthread_mutex_unlock(&p->lock);
        return -ESTALE;
    }
    n->refs++;
    *ref = (struct pt_ref){ n, n->fd, false };
    if (n->fd >= 0) {
        n->fd_users++;
        n->fd_used = true;
        pthread_mutex_unlock(&p->lock);
        return 0;
    }
    pthread_mutex_unlock(&p->lock);
    fd = n->handle_bytes && !n->mount->no_fd ? open_handle(p, n, O_PATH) : open_place(p, n);
    pthread_mutex_lock(&p->lock);
    if (fd < 0 && n->files) { /* its handle no longer opens it, but the guest has it open */
        int other = fcntl(n->files->fd, F_DUPFD_CLOEXEC, 0);

        fd = other < 0 ? fd : other;
    } else if (fd >= 0 && n->fd < 0 && n->linked && pt_cache_fd(p, n, fd)) {
        n->fd_users++;
        ref->fd = fd;
        pthread_mutex_unlock(&p->lock);
        return 0;
    }
    if (fd < 0) {
        pt_node_put_locked(p, n);
        pthread_mutex_unlock(&p->lock);
        return fd;
    }
    pthread_mutex_unlock(&p->lock);
    ref->fd = fd;
    ref->own = true;
    return 0;
}

void pt_put(struct vnd_passthrough *p, struct pt_ref *ref)
{
    struct pt_node *n = ref->node;

    if (ref->own)
        close(ref->fd);
    pthread_mutex_lock(&p->lock);
    if (!ref->own && --n->fd_users == 0 && n->fd_drop)
        pt_node_close(p, n);
    pt_node_put_locked(p, n);
    pthread_mutex_unlock(&p->lock);
}

int pt_open_node(struct vnd_passthrough *p, struct pt_node *n, int flags)
{
    struct pt_ref ref;
    char name[12];
    int fd, rc;

    if (n->type != S_IFREG && n->type != S_IFDIR)
        return -EBADF;
    /* A handle stands for this very inode, so its type cannot have changed. */
    fd = open_handle(p, n, flags | O_NONBLOCK | O_NOCTTY);
    if (fd >= 0 || fd != -ESTALE)
        return fd;
    rc = pt_get(p, n->ino, &ref);
    if (rc)
        return rc;
    fd = openat(p->proc_fd, pt_fd_name(name, ref.fd), flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        fd = errno == EMFILE ? -ENFILE : -errno;
    pt_put(p, &ref);
    return fd;
}
