/* store/store.h -- what file systems and transports may ask of the blob store.
 *
 * A store is one cache directory. A blob is one data file of it, its maps (datapath (b)): T, our own "these bytes
 * matched their digest in this file"; D, the durable subset; R, Nydus's chunk_map, a hint. Everything here may be
 * called from any C thread; hot-path calls allocate nothing and take no lock when all is ready.
 */
#ifndef VND_STORE_H
#define VND_STORE_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/wakelist.h"
#include "vnd.h"

/* Largest number of chunks one read can touch: 1 MiB of 4 KiB chunks and an unaligned edge. */
#define STORE_EXTENTS_MAX 257

/* Bytes of one chunk, as a file system names them. Never bytes themselves (law 6). blob NULL: zeroes. */
struct extent {
    struct vnd_blob *blob;
    uint64_t uoff;  /* where they start in the uncompressed blob = in the cache file */
    uint32_t chunk; /* chunk index in the blob */
    uint32_t len;
    uint32_t chunk_off; /* where they start in the chunk: uoff - chunk_off is the chunk's own start */
};

struct store_buf; /* refcounted bytes for what could not come from the cache file */

/* What another thread made for a waiter. */
struct store_answer {
    void (*drop)(struct store_answer *a);
};

/* A waiter: embedded in whatever waits, owned by it. Only the store touches the fields above the line while
 * linked. */
struct store_wait {
    struct store_wait *next, **prev; /* shard list */
    struct store_unit *unit;         /* the unit it is linked on, NULL = not linked */
    void *shard;                     /* whose lock guards the link */
    struct store_buf *buf;           /* set by the waker: the wanted bytes, served by the next store_read */
    struct store_answer *answer;     /* set by a waker that is not the store: what it waited for */
    int32_t err;                     /* set by the waker: positive errno to fail with */
    uint8_t again;                   /* EAGAINs so far (page cache) */
    uint8_t parked_once;             /* for the statistics */
    /* ---- the owner's */
    int64_t deadline_us;                /* CLOCK_MONOTONIC; orders demand */
    void (*wake)(struct store_wait *w); /* called once per park, any thread, no store lock held; must not block */
    struct store_wait *done_next;       /* free for the owner's done list */
    struct wake_item done;              /* the same as an item of a wakelist */
    void *owner;
};

/* The waiter that an item of a wakelist is embedded in. */
static inline struct store_wait *store_wait_of(struct wake_item *item)
{
    return (struct store_wait *)((char *)item - offsetof(struct store_wait, done));
}

/* Clears the store's part for a new request. */
void store_wait_init(struct store_wait *w, void (*wake)(struct store_wait *), void *owner);

/* Reads the extents, in order, into iov (their lengths sum to the iov's or less than it). Returns bytes read (all
 * of them), -EINPROGRESS when w was linked (will wake; then call again with the same extents and a fresh iov), or
 * -errno. Restartable: what an earlier attempt wrote is written again. A woken w with err fails here. */
int64_t store_read(struct store_wait *w, const struct extent *ext, int n, const struct iovec *iov, int iov_n);

/* The same without bytes: 0 when every chunk is ready in its cache file, for whoever reads that itself; -ENOSPC: one is
 * here and could not be written. The blobs' tables are loaded. */
int store_want(struct store_wait *w, const struct extent *ext, int n);

/* Unlinks a waiter (deadline, hang-up). true: it was linked and will not be woken; false: wake has been or is being
 * called. Also drops w->buf. */
bool store_wait_cancel(struct store_wait *w);
/* After the last store_read, whatever its result: drops w->buf and w->answer. */
void store_wait_done(struct store_wait *w);

/* ---- for file systems that open blobs */
struct blob_chunk {                      /* what a bootstrap says of one chunk */
    uint32_t index, csize, usize, flags; /* flags: rafs-format 2.6 */
    uint32_t crc32;                      /* CRC-32C, if flagged */
    uint64_t coff, uoff;
    uint8_t digest[32];
};
/* Enumerates a bootstrap's chunk records of one blob: calls put for each until it returns non-zero. May be called
 * from any thread, any time before close; must not block. Returns 0 or what put returned. */
typedef int (*blob_chunks_fn)(void *ctx, uint32_t blob_index, int (*put)(void *put_ctx, const struct blob_chunk *c),
                              void *put_ctx);
/* One per image that names the blob. All of them share its cache file, as long as they agree on its chunks: an
 * image that contradicts one in use gets EIO at first use, and the other goes on. chunks/ctx are used until
 * blob_put. Opening touches no network and does no work that grows with the blob. */
struct vnd_blob *blob_get(vnd_store *s, const vnd_blob_info *info, blob_chunks_fn chunks, void *ctx, int *cause,
                          char *err, size_t err_len);
/* ID.blob.meta may lie in this directory too: beside the bootstrap, where its layer brought it. */
void blob_meta_beside(struct vnd_blob *b, const char *dir);
void blob_put(struct vnd_blob *b, void *ctx);
uint64_t blob_uncompressed_size(const struct vnd_blob *b);

/* ---- for who reads cache files past us (rafs/backing.c) */
/* True: the extents' bytes are all in the cache files, and were verified. */
bool store_ready(const struct extent *ext, int n);
/* The blob's data file, borrowed; -1 while it has none, or one of stored chunks. *epoch: which state of it; what was ready stays there until
 * that changes. */
int blob_cache_fd(const struct vnd_blob *b, uint64_t *epoch);

#endif
