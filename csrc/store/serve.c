/* store/serve.c -- the way from a cache file into a reader's memory.
 *
 * When all is ready it allocates nothing, takes no lock and makes one data system call per run of bytes that lie
 * together in one file.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "store/fetcher.h"

#define IOV_MAX_RUN 272 /* a whole reply (fuse/req.h: 264) in one call */

#define EPOCH_TRIES 3

/* The next len bytes of the reader's memory as at most max pieces; *got: bytes in them. */
static int cursor_take(struct cursor *c, size_t len, struct iovec *out, int max, size_t *got)
{
    int k = 0;

    *got = 0;
    while (len && k < max && c->i < c->n) {
        size_t left = c->iov[c->i].iov_len - c->off, n = left < len ? left : len;
        if (n) {
            out[k].iov_base = (uint8_t *)c->iov[c->i].iov_base + c->off;
            out[k++].iov_len = n;
        }
        c->off += n;
        len -= n;
        *got += n;
        if (c->off == c->iov[c->i].iov_len) {
            c->i++;
            c->off = 0;
        }
    }
    return k;
}

int cursor_put(struct cursor *c, const uint8_t *src, size_t len)
{
    while (len) {
        struct iovec v;
        size_t got;
        if (cursor_take(c, len, &v, 1, &got) != 1)
            return -EINVAL;
        if (src) {
            memcpy(v.iov_base, src, got);
            src += got;
        } else {
            memset(v.iov_base, 0, got);
        }
        len -= got;
    }
    return 0;
}

/* Reads len bytes at uoff. 0, -EAGAIN, -EIO, -EFAULT. */
static int read_run(struct cachefile *c, uint64_t uoff, size_t len, struct cursor *cur, bool nowait)
{
    struct iovec iov[IOV_MAX_RUN];

    while (len) {
        size_t want;
        int k = cursor_take(cur, len, iov, IOV_MAX_RUN, &want);
        ssize_t n;
        if (!k)
            return -EINVAL;
        bool flag = nowait && !atomic_load_explicit(&c->nowait_missing, memory_order_relaxed);
        do
            n = preadv2(c->data_fd, iov, k, (off_t)uoff, flag ? RWF_NOWAIT : 0);
        while (n < 0 && errno == EINTR);
        if (n < 0 && errno == EOPNOTSUPP && flag) {
            atomic_store_explicit(&c->nowait_missing, true, memory_order_relaxed);
            do
                n = preadv2(c->data_fd, iov, k, (off_t)uoff, 0);
            while (n < 0 && errno == EINTR);
        }
        if (n < 0)
            return errno == EAGAIN ? -EAGAIN : errno == EFAULT ? -EFAULT : -EIO;
        if ((size_t)n < want) /* some pages are not there; or the file was cut, which a blocking read tells */
            return nowait ? -EAGAIN : -EIO;
        uoff += want;
        len -= want;
    }
    return 0;
}

/* Reads one extent's bytes from memory: the chunk could not be written. */
static int read_uncached(const struct extent *x, struct cursor *cur)
{
    struct store_buf *b = uncached_get(x->blob->core, x->chunk);
    int rc = -ENODATA;

    if (b && (size_t)x->chunk_off + x->len <= b->len)
        rc = cursor_put(cur, b->data + x->chunk_off, x->len);
    store_buf_unref(b);
    return rc;
}

/* Reads one extent from a file that holds chunks as they are stored. The whole chunk is decoded; its digest was
 * compared when it came. 0 or -errno. */
static int read_stored(struct cachefile *c, const struct extent *x, struct cursor *cur)
{
    const struct blobtable *t = atomic_load_explicit(&x->blob->table, memory_order_acquire);
    const struct blobtable_chunk *k = &t->chunk[x->chunk]; /* blobtable_covers: there is one */
    uint32_t codec = k->flags & BLOBTABLE_COMPRESSED ? x->blob->info.compressor : CODEC_NONE;
    uint8_t *stored = malloc(k->csize), *plain = malloc(k->usize);
    struct codec *state = codec_new();
    int rc = stored && plain && state ? cachefile_read(c, k->coff, stored, k->csize) : -ENOMEM;

    if (!rc && codec_decode(state, codec, stored, k->csize, plain, k->usize))
        rc = -EIO;
    if (!rc)
        rc = cursor_put(cur, plain + x->chunk_off, x->len);
    codec_free(state);
    free(plain);
    free(stored);
    return rc;
}

int64_t store_serve(const struct extent *ext, int n, const struct iovec *iov, int iov_n, bool nowait, int *missing)
{
    struct cursor cur = { iov, iov_n, 0, 0 };
    int64_t total = 0;
    int tries = 0;

    for (int i = 0; i < n;) {
        const struct extent *x = &ext[i];
        struct cursor at = cur;
        int j = i, rc;

        if (!x->blob) {
            if ((rc = cursor_put(&cur, x->bytes, x->len)))
                return rc;
            total += x->len;
            i++;
            continue;
        }
        struct cachefile *c = x->blob->cache;
        uint64_t epoch = cachefile_epoch(c);
        size_t len = 0;
        /* Extends the run over chunks that are ready and lie one behind the other. */
        while (j < n && ext[j].blob == x->blob && ext[j].uoff == x->uoff + len && cachefile_ready(c, ext[j].chunk))
            len += ext[j++].len;
        if (j == i) {
            *missing = i;
            rc = read_uncached(x, &cur);
            if (rc)
                return rc;
            total += x->len;
            i++;
            continue;
        }
        if (c->data_fd < 0)
            return -EIO;
        if (c->stored) {
            if (nowait) /* nothing is decoded on a queue's thread */
                return -EAGAIN;
            j = i + 1;
            len = x->len;
            rc = read_stored(c, x, &cur);
        } else {
            rc = read_run(c, x->uoff, len, &cur, nowait);
        }
        bool holds = cachefile_epoch_holds(c, epoch);
        if (rc == -EIO && !nowait && holds) {
            cachefile_examine(c);
            *missing = i;
            return cachefile_ready(c, x->chunk) ? -EIO : -ENODATA;
        }
        if (rc && (rc != -EIO || holds))
            return rc;
        if (!holds) { /* chunks were invalidated meanwhile: look again */
            if (++tries >= EPOCH_TRIES)
                return -EAGAIN;
            cur = at;
            continue;
        }
        total += (int64_t)len;
        i = j;
    }
    return total;
}
