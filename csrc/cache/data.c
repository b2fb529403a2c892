/* cache/data.c -- the bytes behind a cachefile: written, read, made durable. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "cache/cache.h"
#include "cache/claim.h"
#include "base/base.h"

#define SYNC_BYTES (256ull << 20)

/* A write is announced in the side file, and its change time noted there. So a later start can tell whether another
 * program wrote to the file meanwhile, or one of our processes died in a write. */
static void write_begin(struct cachefile *c)
{
    struct timespec ts;

    clock_gettime(CLOCK_REALTIME, &ts);
    atomic_store(&c->head->write_ns, (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec);
    atomic_fetch_add(&c->head->writing, 1);
}

static void write_end(struct cachefile *c)
{
    struct stat st;
    uint64_t now, had;
    uint32_t writing;

    pthread_mutex_lock(&c->lock); /* this file's change time belongs in this file's header */
    if (!fstat(c->data_fd, &st)) {
        now = (uint64_t)st.st_ctim.tv_sec * 1000000000u + (uint64_t)st.st_ctim.tv_nsec;
        had = atomic_load(&c->head->ctime_ns);
        while (had < now && !atomic_compare_exchange_weak(&c->head->ctime_ns, &had, now))
            ;
    }
    writing = atomic_load(&c->head->writing); /* 0: the files were exchanged meanwhile */
    while (writing && !atomic_compare_exchange_weak(&c->head->writing, &writing, writing - 1))
        ;
    pthread_mutex_unlock(&c->lock);
}

int cachefile_write(struct cachefile *c, uint64_t off, const void *buf, size_t len)
{
    const uint8_t *p = buf;
    int rc = c->data_fd >= 0 && c->writable ? 0 : c->lack_errno ? -c->lack_errno : -EROFS;
    struct stat st;

    /* A write beyond the end of a file that was cut would turn what is missing into zeroes that look whole. */
    if (!rc && !fstat(c->data_fd, &st) && (uint64_t)st.st_size < c->size_bytes)
        cachefile_examine(c);
    bool begun = !rc;
    if (begun)
        write_begin(c);
    pthread_mutex_lock(&c->write_lock);
    while (!rc && len) {
        ssize_t n = pwrite(c->data_fd, p, len, (off_t)off);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            rc = n < 0 ? -errno : -EIO;
            break;
        }
        p += n;
        off += (uint64_t)n;
        len -= (size_t)n;
    }
    pthread_mutex_unlock(&c->write_lock);
    if (begun)
        write_end(c);
    if (rc && !atomic_exchange(&c->space_said, true))
        engine_say(c->engine, VND_LEVEL_ERROR, VND_CAUSE_SPACE,
                   "cache of blob %s: %s.blob.%s cannot be written (%s): its chunks "
                   "are served from memory and fetched again; %s",
                   c->id, c->id, c->stored ? "raw" : "data", strerror(-rc), cachefile_cure(-rc));
    if (!rc && atomic_load_explicit(&c->space_said, memory_order_relaxed) && atomic_exchange(&c->space_said, false))
        engine_say(c->engine, VND_LEVEL_INFO, VND_CAUSE_NONE, "cache of blob %s is written again", c->id);
    return rc;
}

void cachefile_set_ready(struct cachefile *c, uint32_t i)
{
    atomic_fetch_or_explicit(&c->trusted[i >> 6], 1ull << (i & 63), memory_order_release);
    if (c->writable)
        atomic_fetch_or_explicit(&c->marked[i >> 3], (uint8_t)(0x80 >> (i & 7)), memory_order_release);
}

/* No write-out is begun here: readers wait for this thread. */
void cachefile_note_written(struct cachefile *c, uint64_t bytes)
{
    atomic_fetch_add_explicit(&c->unsynced_bytes, bytes, memory_order_relaxed);
}

int cachefile_read(struct cachefile *c, uint64_t off, void *buf, size_t len)
{
    return cachefile_read_marked(c, false, off, buf, len);
}

int cachefile_read_marked(struct cachefile *c, bool below, uint64_t off, void *buf, size_t len)
{
    _Atomic int *fd = below ? &c->lower_fd : &c->data_fd; /* its number may change under us */
    uint8_t *p = buf;

    if (*fd < 0)
        return -EIO;
    while (len) {
        ssize_t n = pread(*fd, p, len, (off_t)off);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return -EIO;
        p += n;
        off += (uint64_t)n;
        len -= (size_t)n;
    }
    return 0;
}

bool cachefile_write_out(struct cachefile *c, bool force)
{
    uint64_t bytes = atomic_load(&c->unsynced_bytes);

    if (c->side_fd < 0 || !bytes || (!force && bytes < SYNC_BYTES))
        return false;
    sync_file_range(c->data_fd, 0, 0, SYNC_FILE_RANGE_WRITE); /* where it is not supported fdatasync does it all */
    return true;
}

void cachefile_sync(struct cachefile *c)
{
    size_t words = ((size_t)c->n + 63) / 64;
    uint64_t *ready, epoch, bytes = atomic_load(&c->unsynced_bytes);

    if (c->side_fd < 0 || !bytes)
        return;
    if (claim_byte(c->side_fd, CLAIM_SYNC, true, 0))
        return; /* another process syncs now what it sees; ours is synced next time */
    ready = malloc(words * sizeof *ready);
    if (!ready) {
        claim_byte_release(c->side_fd, CLAIM_SYNC);
        return;
    }
    epoch = cachefile_epoch(c);
    for (size_t i = 0; i < words; i++)
        ready[i] = atomic_load_explicit(&c->trusted[i], memory_order_acquire);
    atomic_fetch_sub(&c->unsynced_bytes, bytes);
    int rc = fdatasync(c->data_fd) ? errno : 0;
    pthread_mutex_lock(&c->lock);
    if (rc) {
        /* The kernel has marked the lost pages clean: what is not known to be durable may be gone. */
        cachefile_invalidate(c, true);
    } else if (cachefile_epoch_holds(c, epoch)) {
        for (size_t i = 0; i < words; i++)
            atomic_fetch_or_explicit(&c->durable[i], ready[i], memory_order_relaxed);
    }
    pthread_mutex_unlock(&c->lock);
    if (rc)
        engine_say(c->engine, VND_LEVEL_ERROR, VND_CAUSE_IO,
                   "cache of blob %s: cannot make it durable: %s; its newest chunks "
                   "are checked again",
                   c->id, strerror(rc));
    else if (fdatasync(c->side_fd))
        atomic_fetch_add(&c->unsynced_bytes, bytes);
    free(ready);
    claim_byte_release(c->side_fd, CLAIM_SYNC);
}
