/* store/store.h -- blobs by (cache directory, id), for all images and all sessions: is a chunk ready? Read it. If not, the
 * reader is parked, the chunk is fetched, checked, written, and the reader is woken.
 *
 * Threads: any C thread may call what is here. A call whose chunks are all ready allocates nothing, takes no lock and makes
 * one system call for each run of bytes; no call waits for a network or for another process.
 * Locks, in the order in which they may be held together: a job's; core->load_lock; engine->lock; a shard's or
 * fetcher->lock; store->lock; core->lock or cachefile->lock. A waiter is woken with none of them held.
 * Ownership: an image holds its struct vnd_blob from blob_open to blob_close. All images that name a blob share its core,
 * and that holds the cache files and the store. A struct store_wait is its request's own (wait.h).
 * May use: base, blob, cache. Inside (internal.h, fetcher.h) files use only what stands before them: wait, uncached, store,
 * want, stream, miss, serve, upkeep, page, foreign, blob, merge, load, job, read, decode, fetcher, fetch, engine.
 * Python's fetch threads come in by vnd.h's vnd_job_*.
 */
#ifndef VND_STORE_H
#define VND_STORE_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/error.h"
#include "blob/chunk.h"
#include "store/wait.h"

/* Reads the extents, in order, into iov (their lengths sum to the iov's or less than it). Returns bytes read (all
 * of them), -EINPROGRESS when w was linked (will wake; then call again with the same extents and a fresh iov), or
 * -errno. Restartable: what an earlier attempt wrote is written again. A woken w with err fails here. */
int64_t store_read(struct store_wait *w, const struct extent *ext, int n, const struct iovec *iov, int iov_n);

/* The same without bytes: 0 when every chunk is ready in its cache file, for a caller that reads the file itself;
 * -ENOSPC: a chunk came and could not be written. The blobs' tables are loaded. */
int store_want(struct store_wait *w, const struct extent *ext, int n);

/* ---- for file systems that open blobs */
/* One per image that names the blob. All of them share its cache file, as long as they agree on its chunks: an
 * image that contradicts one in use gets EIO at first use, and the other goes on. chunks/ctx are used until
 * blob_close. Opening touches no network and does no work that grows with the blob. */
struct vnd_blob *blob_open(vnd_store *s, const vnd_blob_info *info, blob_chunks_fn chunks, void *ctx,
                           struct failure *f);
/* ID.blob.meta may lie in this directory too: beside the bootstrap, where its layer brought it. */
void blob_meta_beside(struct vnd_blob *b, const char *dir);
void blob_close(struct vnd_blob *b, void *ctx);
uint64_t blob_uncompressed_size(const struct vnd_blob *b);

/* ---- for those who have the kernel read cache files (precontent/) */
struct blobtable;
struct cachefile;
const char *blob_id(const struct vnd_blob *b);
/* Links w until the blob's chunk table is loaded. 0; 1: it is loaded already; -errno: it cannot be. */
int blob_park(struct vnd_blob *b, struct store_wait *w);
/* This image's table of the blob's chunks (blob/table.h) and the blob's cache file (cache/cache.h), for as long as
 * the blob is open; NULL until the table is loaded. */
struct blobtable *blob_table(const struct vnd_blob *b);
struct cachefile *blob_cachefile(const struct vnd_blob *b);

/* ---- for who reads cache files past us (rafs/backing.c) */
/* True: the extents' bytes are all in the cache files, and were verified. */
bool store_ready(const struct extent *ext, int n);
/* The blob's data file, borrowed; -1 while it has none, or one of stored chunks. *epoch: which state of it; what was
 * ready stays there until that changes. */
int blob_cache_fd(const struct vnd_blob *b, uint64_t *epoch);

#endif
