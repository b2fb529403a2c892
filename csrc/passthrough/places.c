/* passthrough/places.c -- nodes without a file handle: found again by their directory and their name there.
 *
 * All of this is table work, under the lock; handles.c opens what a place leads to. A place says which node the directory is
 * (a number, so that the guest may forget that one), the name, and when the file was born. What is found there is the node
 * only if mount, device, number, type and birth are the same. A name that leads to another file by now is ESTALE: a guest's
 * kernel then looks the name up anew.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/stat.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "passthrough/internal.h"

static bool tells_birth(const struct statx *sx)
{
    return sx->stx_mask & STATX_BTIME;
}

static bool same_birth(const struct pt_place *p, const struct statx *sx)
{
    const struct statx_timestamp *t = p->born ? &sx->stx_btime : &sx->stx_ctime;

    return (!p->born || tells_birth(sx)) && t->tv_sec == p->birth.tv_sec && t->tv_nsec == p->birth.tv_nsec;
}

bool pt_place_set(struct pt_node *n, uint64_t dir, const char *name, const struct statx *sx)
{
    uint32_t len = (uint32_t)strlen(name);
    struct pt_place *p = n->place, *grown;

    if (!p || p->name_len != len) {
        grown = realloc(p, sizeof(*p) + len + 1);
        if (!grown)
            return false;
        n->place = p = grown;
        p->name_len = len;
    }
    p->dir = dir;
    memcpy(p->name, name, len + 1);
    p->born = tells_birth(sx);
    p->birth = p->born ? sx->stx_btime : sx->stx_ctime;
    return true;
}

bool pt_place_is(const struct pt_place *p, const struct pt_node *n, const struct statx *sx)
{
    return sx->stx_mnt_id == n->mount->id && pt_dev_of(sx) == n->dev && sx->stx_ino == n->host_ino &&
           (sx->stx_mode & S_IFMT) == n->type && same_birth(p, sx);
}

/* ---- descriptors that nodes keep */

#define LOOKS 8 /* at nodes that were used lately, for one that was not */

static void append_kept(struct vnd_passthrough *p, struct pt_node *n)
{
    n->next_kept = NULL;
    n->prev_kept = p->kept_last;
    *p->kept_last = n;
    p->kept_last = &n->next_kept;
}

static void remove_kept(struct vnd_passthrough *p, struct pt_node *n)
{
    *n->prev_kept = n->next_kept;
    *(n->next_kept ? &n->next_kept->prev_kept : &p->kept_last) = n->prev_kept;
    n->prev_kept = NULL;
}

void pt_unkeep_fd(struct vnd_passthrough *p, struct pt_node *n)
{
    if (n->prev_kept)
        remove_kept(p, n);
    close(n->fd);
    n->fd = -1;
    n->fd_kept = false;
    atomic_fetch_sub_explicit(&p->engine->kept_fds, 1, memory_order_relaxed);
}

/* True: there is a descriptor less. */
static bool unkeep_oldest(struct vnd_passthrough *p)
{
    for (int i = 0; i < LOOKS && p->kept; i++) {
        struct pt_node *n = p->kept;

        if (!n->fd_users && !n->fd_used) {
            pt_unkeep_fd(p, n);
            return true;
        }
        n->fd_used = false;
        remove_kept(p, n);
        append_kept(p, n);
    }
    return false;
}

int pt_keep_fd(struct vnd_passthrough *p, struct pt_node *n, int fd)
{
    _Atomic uint32_t *kept = &p->engine->kept_fds; /* other host directories keep some too */
    int own;

    while (atomic_fetch_add_explicit(kept, 1, memory_order_relaxed) >= p->kept_max) {
        atomic_fetch_sub_explicit(kept, 1, memory_order_relaxed);
        if (!unkeep_oldest(p))
            return -ENFILE;
    }
    own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own < 0) {
        atomic_fetch_sub_explicit(kept, 1, memory_order_relaxed);
        return errno == EMFILE ? -ENFILE : -errno;
    }
    n->fd = own;
    n->fd_kept = true;
    if (n->place)
        append_kept(p, n);
    return 0;
}

/* ---- places */

bool pt_place_holds(const struct pt_node *n, const struct statx *sx)
{
    /* A descriptor keeps the number the node's. Without a birth the same number is all that can be asked for. */
    return !n->place || n->fd >= 0 || !n->place->born || same_birth(n->place, sx);
}
