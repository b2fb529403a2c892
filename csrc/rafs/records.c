/* rafs/records.c -- what all files of this folder use: the error line of an open, and the chunk records of one blob. */
#include "rafs/internal.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

int rafs_fail(const struct rafs_error *e, int cause, const char *fmt, ...)
{
    int rc = cause == VND_CAUSE_IO ? -EIO : cause == VND_CAUSE_DIGEST ? -EBADMSG : -EINVAL;
    char what[VND_ERR_MAX];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(what, sizeof(what), fmt, ap);
    va_end(ap);
    return failure_set(e->failure, rc, cause, "%s: %s", e->path, what);
}

int rafs_no_memory(const struct rafs_error *e)
{
    return failure_set(e->failure, -ENOMEM, VND_CAUSE_IO, "%s: out of memory", e->path);
}

struct blob_records {
    const vnd_blob_info *info;
    int (*put)(void *put_ctx, const struct blob_chunk *c);
    void *put_ctx;
};

static int put_bounded(void *ctx, uint64_t number, uint32_t blob, const struct blob_chunk *c)
{
    struct blob_records *x = ctx;
    uint64_t end = (x->info->uncompressed_size_bytes + 4095) & ~4095ull;

    if (c->index >= x->info->chunk_count || c->usize == 0 || c->usize > RAFS_CHUNK_SIZE_MAX ||
        c->csize > RAFS_CHUNK_SIZE_MAX || c->uoff > end || c->usize > end - c->uoff || c->coff > RAFS_BLOB_CSIZE_MAX) {
        return 0; /* the chunk then has no digest and is not served */
    }
    return x->put(x->put_ctx, c);
}

int rafs_blob_chunks(void *ctx, uint32_t blob_index, int (*put)(void *put_ctx, const struct blob_chunk *c),
                     void *put_ctx)
{
    struct vnd_rafs *r = ctx;

    if (blob_index >= r->info.blob_count)
        return 0;
    struct blob_records x = { &r->blobs[blob_index].info, put, put_ctx };

    return r->version->records(r, blob_index, put_bounded, &x);
}
