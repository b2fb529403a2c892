/* passthrough/handles.c -- reaches a node: by its cached descriptor, by its file handle, or by a file that is open; see
 * passthrough.h.
 */
#include "passthrough/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
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

    if (!n->handle_bytes || !p->handles)
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

/* Under the lock. Keeps an O_PATH descriptor in the node for next time. False: the cache has no place for it. */
static bool cache_fd(struct vnd_passthrough *p, struct pt_node *n, int fd)
{
    for (uint32_t i = 0; i < 8; i++) {
        uint32_t at = p->hand++ % p->cache_max;
        struct pt_node *old = p->cache[at];

        if (old && (old->fd_used || old->fd_users)) {
            old->fd_used = false;
            continue;
        }
        if (old)
            pt_node_close(p, old);
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
    fd = open_handle(p, n, O_PATH);
    pthread_mutex_lock(&p->lock);
    if (fd < 0 && n->files) { /* its handle no longer opens it, but the guest has it open */
        int other = fcntl(n->files->fd, F_DUPFD_CLOEXEC, 0);

        fd = other < 0 ? fd : other;
    } else if (fd >= 0 && n->fd < 0 && n->linked && cache_fd(p, n, fd)) {
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
    char path[32];
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
    snprintf(path, sizeof(path), "/proc/self/fd/%d", ref.fd);
    fd = open(path, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        fd = errno == EMFILE ? -ENFILE : -errno;
    pt_put(p, &ref);
    return fd;
}
