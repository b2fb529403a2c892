/* blob/chunk.h -- chunks as file systems name them: in an image's records, and as what a read needs. */
#ifndef VND_CHUNK_H
#define VND_CHUNK_H
#include <stdbool.h>
#include <stdint.h>

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
