/* blob/chunk.h -- chunks as file systems name them: in an image's records, and as what a read needs. */
#ifndef VND_CHUNK_H
#define VND_CHUNK_H
#include <stdbool.h>
#include <stdint.h>

#include "vnd.h"

/* Largest number of extents of one read: 1 MiB of 4 KiB chunks and an unaligned edge; on a disk (disk/disk.h) each chunk may
 * be followed by zeroes up to the next block. */
#define STORE_EXTENTS_MAX 514

/* Bytes of one chunk, as a file system names them. blob NULL: zeroes, or the len bytes at `bytes` where that is set, of an
 * image's metadata; they stay there while the image is open. */
struct extent {
    struct vnd_blob *blob;
    uint64_t uoff;  /* where they start in the uncompressed blob = in the cache file */
    uint32_t chunk; /* chunk index in the blob */
    uint32_t len;
    uint32_t chunk_off; /* where they start in the chunk: uoff - chunk_off is the chunk's own start */
    const uint8_t *bytes;
};

struct blob_chunk {                      /* what a bootstrap says of one chunk */
    uint32_t index, csize, usize, flags; /* flags: docs/rafs-format.md 2.6 */
    uint32_t crc32;                      /* CRC-32C, if flagged */
    uint64_t coff, uoff;
    uint8_t digest[32];
};
/* Enumerates a bootstrap's chunk records of one blob: calls put for each until it returns non-zero. May be called
 * from any thread, any time before close; must not block. Returns 0 or what put returned. */
typedef int (*blob_chunks_fn)(void *ctx, uint32_t blob_index, int (*put)(void *put_ctx, const struct blob_chunk *c),
                              void *put_ctx);

/* Whether the id may become part of file names: 1 to VND_ID_MAX letters, digits, _ and -. */
bool blob_id_valid(const char *id);

#endif
