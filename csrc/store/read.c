/* store/read.c -- store_read and store_want: is everything ready? If not, the reader is parked on what is missing. */
#include <errno.h>
#include <fcntl.h>
#include <sys/uio.h>

#include "store/fetcher.h"

#define READ_TRIES 64

/* Asks for all missing chunks of the extents, in order, and links w on the first. 1: none is missing after all. */
static int park_missing(struct store_wait *w, const struct extent *ext, int n)
{
    bool linked = false;

    for (int i = 0; i < n; i++) {
        const struct extent *x = &ext[i];
        struct store_buf *b;
        int rc;

        if (!x->blob || cachefile_ready(x->blob->cache, x->chunk))
            continue;
        if (i && ext[i - 1].blob == x->blob && ext[i - 1].chunk == x->chunk)
            continue;
        if ((b = uncached_get(x->blob->core, x->chunk))) {
            store_buf_unref(b);
            continue;
        }
        rc = miss_want(x->blob->core, x->chunk, linked ? NULL : w, w->deadline_us, asker_of(x->blob, w->session));
        if (rc < 0 && !linked)
            return rc == -ESHUTDOWN ? -EIO : rc;
        /* From the first success on w may be woken at any moment. That does no harm: this thread alone runs it
         * again. */
        linked |= rc == 0;
    }
    return linked ? 0 : 1;
}

static int64_t refuse_extent(const struct extent *x)
{
    engine_say(x->blob->core->engine, VND_LEVEL_ERROR, VND_CAUSE_FORMAT,
               "blob %s: a file names chunk %u at %llu, its chunk "
               "table does not: the image is damaged",
               x->blob->info.id, x->chunk, (unsigned long long)x->uoff);
    return -EIO;
}

/* Whether chunks of these blobs are kept in memory only. */
static bool any_uncached(const struct extent *ext, int n)
{
    for (int i = 0; i < n; i++)
        if (ext[i].blob && atomic_load_explicit(&ext[i].blob->core->uncached, memory_order_relaxed))
            return true;
    return false;
}

/* Asks for the next window when a reader in order comes to the window that was fetched ahead. */
static void pass_marks(const struct extent *x, uintptr_t session)
{
    struct blob_core *c = x->blob->core;

    for (int i = 0; i < STREAMS; i++)
        if (atomic_load_explicit(&c->streams[i].mark, memory_order_relaxed) == x->chunk) {
            stream_reached(c, x->chunk, asker_of(x->blob, session));
            return;
        }
}

int64_t store_read(struct store_wait *w, const struct extent *ext, int n, const struct iovec *iov, int iov_n)
{
    if (w->err) {
        int err = w->err;
        w->err = 0;
        return -err;
    }
    if (w->buf) {
        struct cursor cur = { iov, iov_n, 0, 0 };
        int64_t len = (int64_t)w->buf->len;
        int rc = cursor_put(&cur, w->buf->data, w->buf->len);
        store_wait_done(w);
        return rc ? rc : len;
    }
    for (int tries = 0;; tries++) {
        int64_t rc = 0;
        int i, missing = 0;

        for (i = 0; i < n; i++) {
            const struct extent *x = &ext[i];
            struct blobtable *t;
            if (!x->blob)
                continue;
            t = atomic_load_explicit(&x->blob->table, memory_order_acquire);
            if (!t) {
                int parked = blob_park(x->blob, w);
                if (parked <= 0)
                    return parked ? parked : -EINPROGRESS;
                t = atomic_load_explicit(&x->blob->table, memory_order_acquire);
            }
            if (!blobtable_covers(t, x))
                return refuse_extent(x);
            if (atomic_load_explicit(&x->blob->core->marks, memory_order_relaxed))
                pass_marks(x, w->session);
            if (!cachefile_ready(x->blob->cache, x->chunk))
                rc = -ENODATA;
        }
        if (!rc || any_uncached(ext, n))
            rc = store_serve(ext, n, iov, iov_n, true, &missing);
        if (rc >= 0)
            return rc;
        if (rc == -EAGAIN) {
            for (i = 0; i < n && !ext[i].blob; i++)
                ;
            rc = page_park(ext[i].blob->core->engine, w, ext, n);
            return rc ? rc : -EINPROGRESS;
        }
        if (rc != -ENODATA)
            return rc;
        rc = park_missing(w, ext, n);
        if (rc <= 0)
            return rc ? rc : -EINPROGRESS;
        if (tries > READ_TRIES) /* chunks come and go faster than they are read */
            return -EIO;
    }
}

bool store_ready(const struct extent *ext, int n)
{
    for (int i = 0; i < n; i++) {
        const struct blobtable *t;

        if (!ext[i].blob)
            continue;
        t = atomic_load_explicit(&ext[i].blob->table, memory_order_acquire);
        if (!t || !blobtable_covers(t, &ext[i]) || !cachefile_ready(ext[i].blob->cache, ext[i].chunk))
            return false;
    }
    return true;
}

int blob_cache_fd(const struct vnd_blob *b, uint64_t *epoch)
{
    if (!b || !atomic_load_explicit(&b->table, memory_order_acquire) || b->cache->stored)
        return -1;
    *epoch = cachefile_epoch(b->cache);
    return *epoch & 1 ? -1 : b->cache->data_fd;
}

int vnd_blob_data_file(vnd_blob *b)
{
    uint64_t epoch;
    int fd = blob_cache_fd(b, &epoch);

    fd = fd < 0 ? -ENOENT : fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return fd < 0 && fd != -ENOENT ? -errno : fd;
}

int store_want(struct store_wait *w, const struct extent *ext, int n)
{
    for (int tries = 0;; tries++) {
        bool lacks = false;
        int rc = -w->err;

        store_wait_done(w);
        w->err = 0;
        for (int i = 0; i < n && !lacks; i++) {
            if (!blobtable_covers(atomic_load_explicit(&ext[i].blob->table, memory_order_acquire), &ext[i]))
                return (int)refuse_extent(&ext[i]);
            lacks = !cachefile_ready(ext[i].blob->cache, ext[i].chunk);
        }
        if (rc || !lacks)
            return rc;
        rc = park_missing(w, ext, n);
        if (rc <= 0)
            return rc ? rc : -EINPROGRESS;
        if (any_uncached(ext, n))
            return -ENOSPC;
        if (tries > READ_TRIES) /* chunks come and go faster than they can be looked at */
            return -EIO;
    }
}
