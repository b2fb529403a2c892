/* cache/move.c -- a cache file that was removed or replaced under us (nydus-snapshotter's garbage collection does
 * that): the files that the names lead to now are exchanged for the open ones.
 *
 * Readers need not stop. The descriptor keeps its number and the maps their addresses (dup3, mremap: the kernel
 * exchanges the files behind them in one step and keeps the old one for a call under way). Between the steps maps
 * and data belong to different files: moves is odd then, and a read that began before the end reads again.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cache/cache.h"
#include "base/base.h"

static bool replaced(int dir_fd, const char *name, const struct cachefile_at *at)
{
    struct stat st;

    if (!at->ino) /* it was never opened */
        return false;
    if (fstatat(dir_fd, name, &st, AT_SYMLINK_NOFOLLOW))
        return errno == ENOENT;
    return st.st_dev != at->dev || st.st_ino != at->ino;
}

enum cachefile_replaced cachefile_find_replaced(const struct cachefile *c, const struct cachefile_cfg *cfg)
{
    struct cachefile_names names;

    cachefile_names(&names, cfg->id, c->stored);
    if (replaced(cfg->dir_fd, names.data, &c->data_at))
        return CACHEFILE_DATA_REPLACED;
    if (cfg->side_dir_fd >= 0 && replaced(cfg->side_dir_fd, names.side, &c->side_at))
        return CACHEFILE_SIDE_REPLACED;
    return replaced(cfg->dir_fd, names.map, &c->map_at) ? CACHEFILE_MAP_REPLACED : CACHEFILE_IN_PLACE;
}

bool cachefile_lacks(const struct cachefile *c, const struct cachefile_cfg *cfg)
{
    return c->data_fd < 0 || !c->writable || (cfg->side_dir_fd >= 0 && c->side_fd < 0);
}

static void put_fd(_Atomic int *to, _Atomic int *from)
{
    int fd = atomic_load(from);

    if (fd < 0)
        return;
    if (atomic_load(to) < 0) {
        atomic_store(to, fd);
        atomic_store(from, -1);
        return;
    }
    while (dup3(fd, atomic_load(to), O_CLOEXEC) < 0 && (errno == EINTR || errno == EBUSY))
        ;
}

/* Both maps have the same size, so the kernel needs no memory for the move. The first call tells whether from is one
 * mapping: if it were not, the move would fail after it has cleared its target. */
static bool put_map(void *to, void *from, size_t len)
{
    return mremap(from, len, len, 0) == from && mremap(from, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to;
}

/* Marks the trusted chunks in a chunk map that was made anew. */
static void tell_map(struct cachefile *c)
{
    for (uint32_t w = 0; w < (c->n + 63) / 64; w++) {
        uint64_t bits = atomic_load_explicit(&c->trusted[w], memory_order_acquire);
        for (; bits; bits &= bits - 1) {
            uint32_t i = w * 64 + (uint32_t)__builtin_ctzll(bits);
            atomic_fetch_or_explicit(&c->marked[i >> 3], (uint8_t)(0x80 >> (i & 7)), memory_order_release);
        }
    }
}

static bool is_better(const struct cachefile *fresh, const struct cachefile *c)
{
    return (fresh->data_fd >= 0 && c->data_fd < 0) || (fresh->writable && !c->writable) ||
           (fresh->side_fd >= 0 && c->side_fd < 0);
}

static bool is_worse(const struct cachefile *fresh, const struct cachefile *c)
{
    return (fresh->data_fd < 0 && c->data_fd >= 0) || (!fresh->writable && c->writable) ||
           (fresh->side_fd < 0 && c->side_fd >= 0);
}

static int exchange(struct cachefile *c, struct cachefile *fresh)
{
    int rc = 0;

    pthread_mutex_lock(&c->lock); /* no thread sets or clears bits */
    atomic_fetch_add(&c->moves, 1);
    if (put_map(c->head, fresh->head, c->side_map_bytes)) {
        fresh->head = NULL;
        put_fd(&c->side_fd, &fresh->side_fd);
        put_fd(&c->data_fd, &fresh->data_fd);
        if (put_map(c->marked_map, fresh->marked_map, c->marked_map_bytes)) {
            fresh->marked_map = NULL;
            c->map_at = fresh->map_at;
        }
        if (fresh->lower_fd >= 0 && put_map(c->lower_map, fresh->lower_map, c->marked_map_bytes)) {
            fresh->lower_map = NULL;
            put_fd(&c->lower_fd, &fresh->lower_fd);
        }
        c->named = fresh->named;
        c->data_at = fresh->data_at;
        c->side_at = fresh->side_at;
        atomic_store(&c->writable, atomic_load(&fresh->writable));
        atomic_store(&c->lack_errno, atomic_load(&fresh->lack_errno));
        atomic_store(&c->unsynced_bytes, 0);
        atomic_store(&c->nowait_missing, false);
        if (c->writable)
            tell_map(c);
    } else {
        rc = -errno;
    }
    atomic_fetch_add(&c->moves, 1);
    pthread_mutex_unlock(&c->lock);
    return rc;
}

int cachefile_move(struct cachefile *c, const struct cachefile_cfg *cfg, const struct blobtable *t,
                   enum cachefile_move_how how, struct failure *f)
{
    struct failure why = { 0 };
    struct cachefile *fresh;
    int rc = cachefile_open(&fresh, cfg, f);

    if (rc)
        return rc;
    if (how == CACHEFILE_MOVE_IF_BETTER && !is_better(fresh, c)) {
        rc = 1;
    } else if (is_worse(fresh, c)) {
        rc = failure_set(f, -ENOSPC, VND_CAUSE_SPACE,
                         "cache of blob %s: cannot make its files anew: no space, or not writable", c->id);
    } else if ((rc = cachefile_bind(fresh, t, &why))) {
        failure_set(f, rc, why.cause, "cache of blob %s: %s", c->id, why.line);
    } else {
        rc = exchange(c, fresh);
        if (rc)
            failure_set(f, rc, VND_CAUSE_IO, "cache of blob %s: cannot map its side file", c->id);
    }
    cachefile_close(fresh);
    return rc;
}
