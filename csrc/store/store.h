/* store/store.h -- what file systems and transports may ask of the blob store.
 *
 * A store is one cache directory. A blob is one data file in it with three bits a chunk: trusted, durable, marked
 * (cache/cache.h, docs/datapath.md 2). Everything here may be called from any C thread. Calls on the way of a read
 * allocate nothing and take no lock when all is ready.
 */
#ifndef VND_STORE_H
#define VND_STORE_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

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
struct vnd_blob *blob_open(vnd_store *s, const vnd_blob_info *info, blob_chunks_fn chunks, void *ctx, int *cause,
                           char *err, size_t err_len);
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
