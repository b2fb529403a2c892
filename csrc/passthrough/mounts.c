/* passthrough/mounts.c -- the mounts that a guest was led into, and the descriptors that file handles are opened on; see
 * passthrough.h.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/stat.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "passthrough/internal.h"

#ifndef STATX_MNT_ID_UNIQUE
#define STATX_MNT_ID_UNIQUE 0x4000u /* linux 6.8; before it, mount ids are reused */
#endif

static int stat_fd(int fd, struct statx *sx, unsigned int more)
{
    unsigned int what = STATX_BASIC_STATS | STATX_MNT_ID | STATX_MNT_ID_UNIQUE | more;

    return statx(fd, "", AT_EMPTY_PATH | AT_STATX_SYNC_AS_STAT, what, sx) ? -errno : 0;
}

int pt_stat(int fd, struct statx *sx)
{
    return stat_fd(fd, sx, 0);
}

int pt_stat_birth(int fd, struct statx *sx)
{
    return stat_fd(fd, sx, STATX_BTIME);
}

dev_t pt_dev_of(const struct statx *sx)
{
    return makedev(sx->stx_dev_major, sx->stx_dev_minor);
}

struct pt_node *pt_mount_put(struct vnd_passthrough *p, struct pt_mount *m)
{
    struct pt_node *above = m->above;

    if (--m->refs)
        return NULL;
    p->n_remote -= m->remote;
    ledger_drop(p->ledger, &m->kept_at);
    for (struct pt_mount **at = &p->mounts; *at; at = &(*at)->next) {
        if (*at == m) {
            *at = m->next;
            break;
        }
    }
    if (m->fd >= 0 && m->fd != p->root_fd)
        close(m->fd);
    free(m);
    return above;
}

struct pt_mount *pt_mount_find(struct vnd_passthrough *p, uint64_t id)
{
    for (struct pt_mount *m = p->mounts; m; m = m->next) {
        if (m->id == id) {
            m->refs++;
            return m;
        }
    }
    return NULL;
}

struct pt_mount *pt_mount_add(struct vnd_passthrough *p, uint64_t id, struct pt_node *above, const char *name,
                              bool remote)
{
    struct pt_mount *m = calloc(1, sizeof(*m));

    if (!m)
        return NULL;
    m->id = id;
    m->remote = remote;
    p->n_remote += remote;
    m->refs = 1;
    m->fd = -1;
    m->above = above;
    if (above)
        above->refs++;
    snprintf(m->name, sizeof(m->name), "%s", name);
    m->next = p->mounts;
    p->mounts = m;
    pt_keep_mount(p, m);
    return m;
}

int pt_mount_fd_get(struct vnd_passthrough *p, struct pt_mount *m)
{
    int fd = -ENOENT;

    pthread_mutex_lock(&p->lock);
    if (m->fd >= 0) {
        m->fd_users++;
        m->fd_used = true;
        fd = m->fd;
    }
    pthread_mutex_unlock(&p->lock);
    return fd;
}

int pt_mount_fd_open(struct vnd_passthrough *p, struct pt_mount *m, int above_fd)
{
    struct statx sx;
    char name[12];
    int fd = openat(above_fd, m->name, O_PATH | O_NOFOLLOW | O_CLOEXEC), real = -1;
    int rc = fd < 0 ? -errno : pt_stat(fd, &sx);

    if (!rc && (sx.stx_mnt_id != m->id || !(S_ISDIR(sx.stx_mode) || S_ISREG(sx.stx_mode))))
        rc = -ESTALE;
    if (!rc) {
        real = openat(p->proc_fd, pt_fd_name(name, fd), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
        rc = real < 0 ? -errno : 0;
    }
    if (fd >= 0)
        close(fd);
    if (rc)
        return rc == -EMFILE ? -ENFILE : rc == -ENOENT ? -ESTALE : rc;
    pthread_mutex_lock(&p->lock);
    if (m->fd >= 0) { /* another thread was faster */
        close(real);
    } else {
        m->fd = real;
        m->fd_drop = false;
    }
    m->fd_users++;
    m->fd_used = true;
    fd = m->fd;
    pthread_mutex_unlock(&p->lock);
    return fd;
}

void pt_mount_fd_put(struct vnd_passthrough *p, struct pt_mount *m)
{
    pthread_mutex_lock(&p->lock);
    if (--m->fd_users == 0 && m->fd_drop && m->above && m->fd >= 0) {
        close(m->fd);
        m->fd = -1;
        m->fd_drop = false;
    }
    pthread_mutex_unlock(&p->lock);
}

void pt_mounts_drop_idle(struct vnd_passthrough *p, bool even_used)
{
    for (struct pt_mount *m = p->mounts; m; m = m->next) {
        if (!m->above || m->fd < 0)
            continue;
        if (m->fd_users) {
            m->fd_drop = even_used;
        } else if (even_used || !m->fd_used) {
            close(m->fd);
            m->fd = -1;
        }
        m->fd_used = false;
    }
}
