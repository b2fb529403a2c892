/* Fuzzes the chunk table that a blob carries: any header and table, the first bytes choose the image's side of
 * it. */
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "blob/meta.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The table as a file in a work directory, and back. */
static void through_file(const vnd_blob_info *info, const uint8_t *table, const uint8_t *header)
{
    char dir[] = "/tmp/fuzz-blobmeta-XXXXXX";
    uint8_t back[BLOBMETA_HEADER], *plain;
    int fd;

    if (!mkdtemp(dir))
        return;
    fd = open(dir, O_RDONLY | O_DIRECTORY);
    if (blobmeta_file_read(fd, info, &plain, back) == 0)
        abort();
    if (blobmeta_file_write(fd, info, table, header) == 0 && blobmeta_file_read(fd, info, &plain, back) == 0) {
        if (memcmp(plain, table, info->ci_usize_bytes) || memcmp(back, header, sizeof back))
            abort();
        free(plain);
    }
    unlinkat(fd, "fuzz.blob.meta", 0);
    close(fd);
    rmdir(dir);
}

/* Records that the image has of the same chunks; header[6] chooses where they differ. */
static void place(const struct blobtable *t, const vnd_blob_info *info, const uint8_t *header)
{
    struct blobtable *records = blobtable_new(t->n);
    struct failure f = { 0 };

    for (uint32_t i = 0; records && i < t->n; i++) {
        records->chunk[i] = t->chunk[i];
        if (t->chunk[i].batch)
            records->chunk[i].coff = records->chunk[i].csize = 0;
    }
    if (records && t->n && header[6] & 1)
        records->chunk[0].uoff++;
    if (records && t->n && header[6] & 2)
        records->chunk[0].usize = 0;
    if (records)
        blobmeta_place(records, t, info, &f);
    blobtable_free(records);
}

static uint64_t take(const uint8_t **p, size_t *n, size_t bytes)
{
    uint64_t v = 0;

    if (bytes > *n)
        bytes = *n;
    memcpy(&v, *p, bytes);
    *p += bytes;
    *n -= bytes;
    return v;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    vnd_blob_info info = { .id = "fuzz" };
    uint8_t header[BLOBMETA_HEADER] = { 0 }, *table, *plain;
    struct blobtable *t;
    struct failure f = { 0 };
    size_t n;

    info.chunk_count = (uint32_t)take(&data, &size, 1);
    info.features = (uint32_t)take(&data, &size, 1);
    info.compressor = (uint32_t)take(&data, &size, 1) & 3;
    info.compressed_size_bytes = take(&data, &size, 4);
    info.uncompressed_size_bytes = take(&data, &size, 6);
    n = size < 64 ? size : 64;
    memcpy(header, data, n); /* the fields; the rest is reserved */
    data += n;
    size -= n;
    info.ci_compressor = header[8] & 3;
    info.ci_usize_bytes = size;
    info.ci_csize_bytes = size;
    /* Mostly a header that fits, so that the table behind it is looked at. */
    if (header[4] & 1) {
        uint32_t magic = 0xB10BB10B;
        memcpy(header, &magic, 4);
        memcpy(header + 4092, &magic, 4);
        memcpy(header + 8, &info.ci_compressor, 4);
        memcpy(header + 12, &info.chunk_count, 4);
        memcpy(header + 16, &info.ci_offset, 8);
        memcpy(header + 24, &info.ci_csize_bytes, 8);
        memcpy(header + 32, &info.ci_usize_bytes, 8);
    }
    table = malloc(size ? size : 1);
    memcpy(table, data, size);
    info.cipher = header[5] & 1;
    if (header[5] == 0x5a) /* seldom: files are slow */
        through_file(&info, table, header);
    if (!blobmeta_parse(&t, &info, table, header, &f)) {
        /* What passed must be safe to use. */
        for (uint32_t i = 0; i < t->n; i++) {
            const struct blobtable_chunk *c = &t->chunk[i];
            if (c->coff + c->csize > info.compressed_size_bytes || c->uoff + c->usize > info.uncompressed_size_bytes ||
                (c->batch && c->batch_at + c->usize > c->batch_usize))
                abort();
        }
        place(t, &info, header);
        blobtable_free(t);
    }
    if (size >= BLOBMETA_HEADER) {
        info.ci_csize_bytes = size - BLOBMETA_HEADER;
        info.ci_usize_bytes = info.ci_csize_bytes + (header[9] & 15);
        if (!blobmeta_decode(&plain, &info, table, size, &f))
            free(plain);
        blobmeta_decrypt(&info, table, size, &f);
    }
    free(table);
    return 0;
}
