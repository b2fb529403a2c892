/* cache/trust.c -- which chunks are trusted, and when they no longer are. */
#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/base.h"
#include "cache/cache.h"
#include "cache/claim.h"

static bool marked_in(const uint8_t *map, uint32_t i)
{
    const _Atomic uint8_t *bits = map ? (const _Atomic uint8_t *)(map + CACHE_MAP_HEADER) : NULL;

    return bits && atomic_load_explicit(&bits[i >> 3], memory_order_acquire) & (0x80 >> (i & 7));
}

bool cachefile_marked(const struct cachefile *c, uint32_t i)
{
    return (c->data_fd >= 0 && marked_in(c->marked_map, i)) || (c->lower_fd >= 0 && marked_in(c->lower_map, i));
}

bool cachefile_is_below(const struct cachefile *c, uint32_t i)
{
    return !(c->data_fd >= 0 && marked_in(c->marked_map, i)) && c->lower_fd >= 0 && marked_in(c->lower_map, i);
}

uint64_t cachefile_count_ready(const struct cachefile *c)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < (c->n + 63) / 64; i++)
        sum += (uint64_t)__builtin_popcountll(atomic_load_explicit(&c->trusted[i], memory_order_relaxed));
    return sum;
}

void cachefile_invalidate(struct cachefile *c, bool keep_durable)
{
    bool was_durable = false;

    /* Waits for another process that invalidates or commits; one that died over it has left the byte free. One that was
     * stopped within a commit finds the epoch changed when it goes on. */
    if (c->side_fd >= 0)
        claim_byte(c->side_fd, CLAIM_EVICT, true, 1000);
    atomic_fetch_or(&c->head->epoch, 1);
    for (size_t i = 0; i < ((size_t)c->n + 63) / 64; i++) {
        if (keep_durable) {
            atomic_fetch_and(&c->trusted[i], atomic_load(&c->durable[i]));
        } else {
            was_durable |= atomic_load(&c->durable[i]) != 0;
            atomic_store(&c->trusted[i], 0);
            atomic_store(&c->durable[i], 0);
        }
    }
    /* On disk too before the bytes change: a power cut must not leave the old bits over half of the new bytes. */
    if (was_durable && c->side_fd >= 0 && fdatasync(c->side_fd))
        engine_say(c->engine, VND_LEVEL_WARNING, VND_CAUSE_IO, "cache of blob %s: cannot sync its side file: %s", c->id,
                   strerror(errno));
    atomic_fetch_add(&c->head->epoch, 1);
    if (c->side_fd >= 0)
        claim_byte_release(c->side_fd, CLAIM_EVICT);
}

bool cachefile_commit_begin(struct cachefile *c, uint64_t epoch)
{
    bool holds;

    pthread_mutex_lock(&c->lock);
    /* Against other processes: between the look at the epoch and the last bit none invalidates. */
    holds = c->side_fd < 0 || claim_byte(c->side_fd, CLAIM_EVICT, false, 1000) == 0;
    if (holds && cachefile_epoch_holds(c, epoch)) {
        c->commit_epoch = epoch;
        return true;
    }
    if (holds && c->side_fd >= 0)
        claim_byte_release(c->side_fd, CLAIM_EVICT);
    pthread_mutex_unlock(&c->lock);
    return false;
}

void cachefile_commit_end(struct cachefile *c)
{
    bool late = !cachefile_epoch_holds(c, c->commit_epoch); /* this process was stopped, and the other did not wait */

    if (c->side_fd >= 0)
        claim_byte_release(c->side_fd, CLAIM_EVICT);
    if (late)
        cachefile_invalidate(c, false);
    pthread_mutex_unlock(&c->lock);
}

void cachefile_distrust(struct cachefile *c, const char *why)
{
    pthread_mutex_lock(&c->lock);
    cachefile_invalidate(c, false);
    pthread_mutex_unlock(&c->lock);
    engine_say(c->engine, VND_LEVEL_WARNING, VND_CAUSE_IO, "cache of blob %s: %s; every chunk in it is checked again",
               c->id, why);
}

void cachefile_examine(struct cachefile *c)
{
    struct stat st;

    /* Odd with no process at work: one has died while it invalidated chunks. */
    pthread_mutex_lock(&c->lock);
    if (cachefile_epoch(c) & 1)
        cachefile_invalidate(c, false);
    pthread_mutex_unlock(&c->lock);
    if (c->data_fd < 0 || fstat(c->data_fd, &st) || (uint64_t)st.st_size >= c->size_bytes)
        return;
    cachefile_distrust(c, "its data file was cut short by another program");
    if (c->writable && ftruncate(c->data_fd, (off_t)c->size_bytes))
        engine_say(c->engine, VND_LEVEL_ERROR, VND_CAUSE_IO, "cache of blob %s: cannot size its data file: %s", c->id,
                   strerror(errno));
}

const char *cachefile_cure(int err)
{
    switch (err) {
    case ENOSPC: return "free space in the cache directory";
    case EDQUOT: return "free space in the cache directory or raise its owner's quota";
    case EFBIG: return "raise the file size limit (ulimit -f)";
    case EROFS: return "mount its file system read-write, and look in the kernel's log why it is not";
    case EACCES:
    case EPERM: return "give the daemon's user the right to write there";
    default: return "look in the kernel's log for errors of its disk";
    }
}
