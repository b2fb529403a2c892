/* precontent/blobs.c -- the files that the kernel reads: which of their bytes are ready, and bytes that came into another
 * file since. See precontent/internal.h. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "blob/table.h"
#include "cache/cache.h"
#include "precontent/internal.h"

#define BLOCK 4096u /* EROFS maps and reads whole blocks */

struct load_wait {
    struct store_wait wait;
    int fd;
};

static void wake_load(struct store_wait *w)
{
    event_raise(((struct load_wait *)w->owner)->fd);
}

/* Blocks until the blob's chunk table is here. */
static int load_table(struct vnd_precontent *p, struct vnd_blob *b)
{
    struct load_wait l = { .fd = eventfd(0, EFD_CLOEXEC) };
    struct pollfd wait = { .fd = l.fd, .events = POLLIN };
    int rc;

    if (l.fd < 0)
        return -errno;
    store_wait_init(&l.wait, wake_load, &l);
    l.wait.deadline_us = now_us() + p->ttl_us;
    rc = blob_park(b, &l.wait);
    if (rc == 0) {
        while (poll(&wait, 1, (int)(p->ttl_us / 1000)) < 0 && errno == EINTR)
            ;
        if (!(wait.revents & POLLIN) &&
            store_wait_expire(&l.wait, p->engine, "the first read of a blob", p->ttl_us / 1000)) {
            rc = -ETIMEDOUT;
        } else { /* its wake has been or is being called */
            uint64_t count;
            while (read(l.fd, &count, sizeof count) < 0 && errno == EINTR)
                ;
            rc = l.wait.err ? -l.wait.err : blob_table(b) ? 0 : -EIO;
            store_wait_done(&l.wait);
        }
    }
    close(l.fd);
    return rc < 0 ? rc : 0;
}

static int compare_places(const void *a, const void *b, void *ctx)
{
    const struct blobtable *t = ctx;
    uint64_t x = t->chunk[*(const uint32_t *)a].uoff, y = t->chunk[*(const uint32_t *)b].uoff;

    return (x > y) - (x < y);
}

int vnd_precontent_add(vnd_precontent *p, vnd_blob *b, int fd, char *err, size_t err_len)
{
    struct precontent_blob *more, *mine;
    struct blobtable *t;
    struct cachefile *c;
    struct stat st;
    int rc = p->started || p->n_blobs == PRECONTENT_BLOBS_MAX ? -EINVAL : load_table(p, b);

    if (rc)
        return fail_line(rc, err, err_len, "blob %s: its chunk table cannot be had: %s", blob_id(b), strerror(-rc));
    t = blob_table(b);
    c = blob_cachefile(b);
    if (c->stored)
        return fail_line(-EINVAL, err, err_len, "blob %s: its cache is compressed", blob_id(b));
    if (c->data_fd < 0 || !c->writable)
        return fail_line(-EROFS, err, err_len, "blob %s: its cache file cannot be written", blob_id(b));
    fd = fcntl(fd < 0 ? c->data_fd : fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0 || fstat(fd, &st))
        return fail_line(-errno, err, err_len, "blob %s: its cache file: %s", blob_id(b), strerror(errno));
    more = realloc(p->blobs, (p->n_blobs + 1) * sizeof *more);
    if (more)
        p->blobs = more;
    mine = more ? &more[p->n_blobs] : NULL;
    if (!mine || !(mine->order = malloc((t->known + 1) * sizeof *mine->order))) {
        close(fd);
        return fail_line(-ENOMEM, err, err_len, "blob %s: no memory", blob_id(b));
    }
    mine->blob = b;
    mine->fd = fd;
    mine->moves = 1;
    mine->dev = st.st_dev;
    mine->ino = st.st_ino;
    mine->n = 0;
    for (uint32_t i = 0; i < t->n && mine->n < t->known; i++)
        if (t->chunk[i].usize)
            mine->order[mine->n++] = i;
    qsort_r(mine->order, mine->n, sizeof *mine->order, compare_places, t);
    p->n_blobs++;
    return 0;
}

int vnd_precontent_fd(vnd_precontent *p, uint32_t index)
{
    return index < p->n_blobs ? p->blobs[index].fd : -EINVAL;
}

/* True: the cache's file is the one that the kernel reads, and has been since the cache file's moves had this value. */
static bool is_same_file(const struct precontent_blob *b, uint64_t moves)
{
    const struct cachefile *c = blob_cachefile(b->blob);
    struct stat st;

    return !(moves & 1) && !fstat(c->data_fd, &st) && st.st_dev == b->dev && st.st_ino == b->ino &&
           atomic_load(&c->moves) == moves;
}

int vnd_precontent_complete(vnd_precontent *p, uint32_t index)
{
    const struct precontent_blob *b = index < p->n_blobs ? &p->blobs[index] : NULL;
    uint64_t moves = b ? atomic_load(&blob_cachefile(b->blob)->moves) : 1, total;

    return b && vnd_blob_ready(b->blob, &total) == total && is_same_file(b, moves);
}

/* The index in b->order of the first chunk whose last block ends behind at. */
static uint32_t find_chunk(const struct precontent_blob *b, const struct blobtable *t, uint64_t at)
{
    uint32_t low = 0, high = b->n;

    while (low < high) {
        uint32_t mid = low + (high - low) / 2;
        const struct blobtable_chunk *c = &t->chunk[b->order[mid]];
        if ((c->uoff + c->usize + BLOCK - 1) / BLOCK * BLOCK > at)
            high = mid;
        else
            low = mid + 1;
    }
    return low;
}

int precontent_gather(const struct precontent_blob *b, uint64_t *at, uint64_t end, bool gaps, struct extent *ext)
{
    struct blobtable *t = blob_table(b->blob);
    uint32_t i = find_chunk(b, t, *at);
    int n = 0;

    while (*at < end && n < PRECONTENT_EXTENTS) {
        const struct blobtable_chunk *c = i < b->n ? &t->chunk[b->order[i]] : NULL;
        if (!c || c->uoff > *at) {
            if (!gaps)
                return -EIO;
            if (!c || c->uoff >= end) {
                *at = end;
                break;
            }
        }
        ext[n++] = (struct extent){ .blob = b->blob, .uoff = c->uoff, .chunk = b->order[i], .len = c->usize };
        *at = (c->uoff + c->usize + BLOCK - 1) / BLOCK * BLOCK;
        i++;
    }
    return n;
}

int precontent_copy(struct precontent_blob *b, const struct extent *ext, int n)
{
    struct cachefile *c = blob_cachefile(b->blob);
    uint64_t moves = atomic_load(&c->moves), epoch;
    uint8_t *buf;
    int rc = 0;

    if (moves == b->moves)
        return 0;
    if (is_same_file(b, moves)) {
        b->moves = moves;
        return -EAGAIN; /* what was ready may have been so in another */
    }
    for (int i = 0; i < n && !rc; i++) {
        epoch = cachefile_epoch(c);
        buf = malloc(ext[i].len);
        rc = !buf                                ? -ENOMEM
             : !cachefile_ready(c, ext[i].chunk) ? -EAGAIN
                                                 : cachefile_read(c, ext[i].uoff, buf, ext[i].len);
        if (!rc && !cachefile_epoch_holds(c, epoch))
            rc = -EAGAIN;
        if (!rc && pwrite(b->fd, buf, ext[i].len, (off_t)ext[i].uoff) != (ssize_t)ext[i].len)
            rc = errno == ENOSPC || errno == EDQUOT ? -errno : -EIO;
        free(buf);
    }
    return rc;
}

uint64_t precontent_end(const struct precontent_slot *s, const struct precontent_blob *b)
{
    uint64_t size = blob_uncompressed_size(b->blob), end = s->offset + s->count;

    return end < s->offset || end > size ? size : end;
}

uint32_t precontent_blob_of(const struct vnd_precontent *p, int fd)
{
    struct stat st;

    if (!fstat(fd, &st))
        for (uint32_t i = 0; i < p->n_blobs; i++)
            if (p->blobs[i].ino == st.st_ino && p->blobs[i].dev == st.st_dev)
                return i;
    return PRECONTENT_ANY_BLOB;
}

void precontent_blobs_free(struct vnd_precontent *p)
{
    for (uint32_t i = 0; i < p->n_blobs; i++) {
        free(p->blobs[i].order);
        close(p->blobs[i].fd);
    }
    free(p->blobs);
}
