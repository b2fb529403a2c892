/* fuzz_batch.c -- a blob whose chunks are stored in batches, as a fetch thread takes it in, and what it decoded read
 * back: the first bytes say how many chunks and contexts there are and how the blob comes, then entries, contexts and
 * the blob's bytes. A blob without batches may go into a cache that holds chunks as they are stored. */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "blob/meta.h"
#include "blob/cipher.h"
#include "blob/codec.h"
#include "base/base.h"
#include "store/fetcher.h"
#include "store/job.h"

#define HEAD 8u
#define ENTRY 24u
#define CONTEXT 40u
#define BATCH_MAX (1u << 22) /* larger ones are only parsed */
#define ENCRYPTED 0x100u     /* features of the blob table */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct vnd_engine *engine;
static struct side_header head;
static struct cachefile cache = { .head = &head };

static struct blobtable *parse(const vnd_blob_info *info, const uint8_t *table, uint32_t contexts)
{
    static uint8_t header[BLOBMETA_HEADER];
    const uint32_t magic = 0xB10BB10B;
    const uint64_t at = (uint64_t)info->chunk_count * ENTRY, len = (uint64_t)contexts * CONTEXT;
    struct blobtable *t = NULL;
    struct failure f = { 0 };

    memcpy(header, &magic, 4);
    memcpy(header + 8, &info->ci_compressor, 4);
    memcpy(header + 12, &info->chunk_count, 4);
    memcpy(header + 24, &info->ci_csize_bytes, 8);
    memcpy(header + 32, &info->ci_usize_bytes, 8);
    memcpy(header + 40, &at, 8);
    memcpy(header + 48, &len, 8);
    memcpy(header + 56, &contexts, 4);
    memcpy(header + BLOBMETA_HEADER - 4, &magic, 4);
    return blobmeta_parse(&t, info, table, header, &f) ? NULL : t;
}

/* What was decoded: all of it the table's, and readable. It goes into the cache's file as a commit would put it. */
static int take(struct job *j, const struct blobtable *t)
{
    vnd_chunk_view view;
    uint32_t bad = 0;
    int n;

    while ((n = vnd_job_chunks(engine, j->id, &view, 1)) > 0 || n == -EBADMSG) {
        if (n < 0) {
            if (++bad > t->n)
                abort(); /* a chunk that is bad must be passed over */
            continue;
        }
        if (view.chunk_index >= t->n || view.usize_bytes != t->chunk[view.chunk_index].usize)
            abort();
        const struct blobtable_chunk *k = &t->chunk[view.chunk_index];
        const uint8_t *bytes = cache.stored ? j->dec.kept.at + j->dec.views[0].kept_at : view.data;

        if (j->kind == VND_JOB_FETCH &&
            pwrite(cache.data_fd, bytes, cachefile_len(&cache, k), (off_t)cachefile_off(&cache, k)) < 0) {
            abort();
        }
        if (!--j->dec.views_n) /* as a commit of all of them leaves it */
            j->dec.scratch.len = j->dec.kept.len = 0;
        memmove(j->dec.views, j->dec.views + 1, j->dec.views_n * sizeof(*j->dec.views));
    }
    return n;
}

static void begin(struct job *j, const struct blobtable *t, uint32_t kind)
{
    j->kind = kind;
    j->whom = FOR_READER;
    j->n = t->n;
    memset(j->state, JOB_WANT, t->n);
    job_begin(j, FETCH_SLOTS); /* its slot is the first */
}

static void run(const vnd_blob_info *info, struct blobtable *t, const uint8_t *blob, size_t step)
{
    struct job *j = &engine->fetcher->slots[0];
    struct blob_core core = { .info = *info, .engine = engine, .cache = &cache };

    atomic_init(&core.table, t);
    j->core = &core;
    j->coff = t->chunk[0].coff;
    j->clen = info->compressed_size_bytes - j->coff;
    begin(j, t, VND_JOB_FETCH);
    for (uint64_t at = 0; at < j->clen; at += step) {
        size_t n = j->clen - at < step ? (size_t)(j->clen - at) : step;
        uint8_t *piece = malloc(n); /* exactly as long: a read past it shows */
        int rc;

        memcpy(piece, blob + j->coff + at, n);
        rc = vnd_job_feed(engine, j->id, piece, n);
        free(piece);
        if ((rc < 0 && rc != -EBADMSG) || take(j, t) < 0)
            break;
    }
    begin(j, t, VND_JOB_VERIFY);
    take(j, t);
    codec_free(j->dec.codec);
    j->dec.codec = NULL;
    j->id = 0;
    j->core = NULL;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    vnd_blob_info info = { .id = "fuzz", .features = BLOBMETA_CHUNK_INFO_V2 | BLOBMETA_BATCH };
    struct blobtable *t;
    uint8_t *table;
    uint32_t contexts;
    size_t step, len;

    if (!engine) {
        engine = vnd_engine_new(&(vnd_engine_cfg){ 0 });
        cache.data_fd = memfd_create("fuzz", MFD_CLOEXEC);
    }
    if (size < HEAD)
        return 0;
    info.chunk_count = data[0];
    contexts = data[1];
    info.compressor = data[2] & 7; /* 4 to 7: there is none */
    step = 1 + (size_t)data[3] * 64;
    info.uncompressed_size_bytes = ((uint64_t)data[5] << 8 | data[4]) << 12;
    if (data[6] & 1) {
        info.cipher = 1;
        info.features |= ENCRYPTED;
        memset(info.cipher_key, 1, 16);
        memset(info.cipher_key + 16, 2, 16);
        if (!cipher_key_valid(info.cipher_key))
            abort();
    }
    cache.stored = data[6] & 2;
    data += HEAD;
    size -= HEAD;
    len = (size_t)info.chunk_count * ENTRY + (size_t)contexts * CONTEXT;
    if (!info.chunk_count || len > size)
        return 0;
    info.ci_csize_bytes = info.ci_usize_bytes = len;
    info.compressed_size_bytes = size - len;
    table = malloc(len);
    memcpy(table, data, len);
    t = parse(&info, table, contexts);
    for (uint32_t i = 0; t && i < t->n; i++) {
        if (t->chunk[i].batch_usize > BATCH_MAX || t->chunk[i].usize > BATCH_MAX)
            info.chunk_count = 0;
        cache.stored &= !t->chunk[i].batch && !info.cipher; /* blobtable_unstorable */
    }
    if (t && info.chunk_count && !ftruncate(cache.data_fd, 0))
        run(&info, t, data + len, step);
    blobtable_free(t);
    free(table);
    return 0;
}
