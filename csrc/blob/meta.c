/* blob/meta.c -- see blob/meta.h. */
#include "blob/meta.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "blob/cipher.h"
#include "blob/codec.h"
#include "base/base.h"
#include "blob/zran.h"

/* docs/rafs-format.md 4.2 to 4.5 */
#define META_MAGIC 0xB10BB10Bu
#define ENTRY_V1 16u
#define ENTRY_V2 24u
#define CONTEXT 40u                 /* of a batch as of a gzip context */
#define ZRAN_TABLE_MAX (1ull << 30) /* with the dictionaries: 16 times that of a layer of 100 GiB */
#define TABLE_MAX (128ull << 20)    /* decoded; 5 million chunks */
#define V2_COMPRESSED 1u
#define V2_ZRAN 2u
#define V2_BATCH 4u
#define V2_ENCRYPTED 8u

static uint32_t le32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return le32toh(v);
}

static uint64_t le64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return le64toh(v);
}

static uint32_t entry_size(const vnd_blob_info *info)
{
    return info->features & BLOBMETA_CHUNK_INFO_V2 ? ENTRY_V2 : ENTRY_V1;
}

bool blobmeta_possible(const vnd_blob_info *info)
{
    uint64_t n = info->chunk_count, least = n * entry_size(info), most = least + n * CONTEXT;

    if (info->features & BLOBMETA_ZRAN && (most += n * ZRAN_WINDOW) > ZRAN_TABLE_MAX)
        most = ZRAN_TABLE_MAX;

    return n && n <= BLOBTABLE_COUNT_MAX && info->ci_csize_bytes && info->ci_csize_bytes <= info->ci_usize_bytes &&
           info->ci_usize_bytes >= least && info->ci_usize_bytes <= most && info->ci_usize_bytes <= TABLE_MAX &&
           codec_known(info->ci_compressor) && info->ci_offset <= 1ull << 40;
}

static int bad(const vnd_blob_info *info, const char *what, struct failure *f)
{
    return failure_set(f, -EINVAL, VND_CAUSE_FORMAT, "chunk table of blob %s: %s; the blob or the image is damaged",
                       info->id, what);
}

static int check_header(const vnd_blob_info *info, const uint8_t *h, struct failure *f)
{
    if (le32(h) != META_MAGIC || le32(h + BLOBMETA_HEADER - 4) != META_MAGIC)
        return bad(info, "no header where it should be", f);
    /* Features are not compared: builders of several generations differ. */
    if (le32(h + 12) != info->chunk_count || le32(h + 8) != info->ci_compressor || le64(h + 16) != info->ci_offset ||
        le64(h + 24) != info->ci_csize_bytes || le64(h + 32) != info->ci_usize_bytes)
        return bad(info, "its header and the image's blob table differ", f);
    return 0;
}

/* Where the contexts lie in the table; count 0: none. */
struct contexts {
    const uint8_t *at;
    uint32_t count;
    struct zran *zran; /* they are those of a gzip file */
};

static int find_contexts(const vnd_blob_info *info, const uint8_t *table, const uint8_t *h, struct contexts *ctx,
                         struct failure *f)
{
    uint64_t offset = le64(h + 40), size = le64(h + 48), least = (uint64_t)info->chunk_count * entry_size(info);

    const char *why;

    *ctx = (struct contexts){ NULL, 0, NULL };
    if (!(info->features & (BLOBMETA_BATCH | BLOBMETA_ZRAN)))
        return 0;
    ctx->count = le32(h + 56);
    if (offset < least || offset > info->ci_usize_bytes || size > info->ci_usize_bytes - offset ||
        (uint64_t)ctx->count * CONTEXT > size)
        return bad(info, "batch or gzip contexts beyond its end", f);
    ctx->at = table + offset;
    if (!(info->features & BLOBMETA_ZRAN))
        return 0;
    ctx->zran = zran_new(ctx->at, ctx->count, ctx->at + (size_t)ctx->count * CONTEXT,
                         size - (size_t)ctx->count * CONTEXT, &why);
    if (!ctx->zran)
        return why ? bad(info, why, f)
                   : failure_set(f, -ENOMEM, VND_CAUSE_FORMAT, "chunk table of blob %s: no memory", info->id);
    return 0;
}

static void entry_v1(const uint8_t *p, struct blobtable_chunk *c)
{
    uint64_t w0 = le64(p), w1 = le64(p + 8);

    c->uoff = w0 & 0xFFFFFFFF000ull;
    c->usize = (uint32_t)((w0 >> 44 | (w0 >> 8 & 0xf) << 20) + 1);
    c->coff = w1 & 0xFFFFFFFFFFull;
    c->csize = (uint32_t)((w1 >> 44 | (w1 >> 40 & 0xf) << 20) + 1);
    c->flags = c->csize != c->usize ? BLOBTABLE_COMPRESSED : 0;
}

/* NULL, or what is wrong. */
static const char *entry_v2(const uint8_t *p, const struct contexts *ctx, struct blobtable_chunk *c)
{
    uint64_t w0 = le64(p), w1 = le64(p + 8), w2 = le64(p + 16);
    uint32_t flags = (uint32_t)(w0 >> 56);

    c->uoff = (w0 & 0xFFFFFFFFull) << 12;
    c->usize = (uint32_t)(w0 >> 32 & 0xFFFFFF) + 1;
    c->coff = w1 & 0xFFFFFFFFFFull;
    c->csize = (uint32_t)(w1 >> 40);
    c->flags = flags & V2_COMPRESSED ? BLOBTABLE_COMPRESSED : 0;
    if (flags & V2_ENCRYPTED)
        c->flags |= BLOBTABLE_ENCRYPTED;
    if (!(flags & V2_ZRAN) != !ctx->zran)
        return "a chunk in a gzip layer in a blob that is none, or the reverse";
    if (flags & V2_ZRAN) {
        uint64_t index = w2 >> 32;
        if (index >= ctx->count)
            return "a chunk in a gzip context that is not there";
        const struct zran_context *x = zran_at(ctx->zran, (uint32_t)index);
        c->coff = x->in_off;
        c->csize = x->in_len;
        c->batch_usize = x->out_len;
        c->batch_at = (uint32_t)w2;
        c->batch = (uint32_t)index + 1;
        c->flags = BLOBTABLE_COMPRESSED;
    } else if (flags & V2_BATCH) {
        uint64_t index = w2 >> 32;
        if (index >= ctx->count)
            return "a chunk in a batch that is not there";
        const uint8_t *x = ctx->at + index * CONTEXT;
        c->csize = le32(x);
        c->batch_usize = le32(x + 4);
        c->batch_at = (uint32_t)w2;
        c->batch = (uint32_t)index + 1;
        c->flags &= ~BLOBTABLE_COMPRESSED;
        c->flags |= c->csize != c->batch_usize ? BLOBTABLE_COMPRESSED : 0;
    }
    return NULL;
}

int blobmeta_parse(struct blobtable **out, const vnd_blob_info *info, const uint8_t *table, const uint8_t *header,
                   struct failure *f)
{
    struct contexts ctx;
    struct blobtable *t;
    uint32_t size = entry_size(info), x, y;
    const char *why = NULL;
    int rc;

    *out = NULL;
    if (!blobmeta_possible(info))
        return bad(info, "sizes that cannot be", f);
    rc = check_header(info, header, f);
    if (!rc)
        rc = find_contexts(info, table, header, &ctx, f);
    if (rc)
        return rc;
    t = blobtable_new(info->chunk_count);
    if (!t) {
        zran_unref(ctx.zran);
        return failure_set(f, -ENOMEM, VND_CAUSE_FORMAT, "chunk table of blob %s: no memory", info->id);
    }
    t->zran = ctx.zran;
    for (uint32_t i = 0; i < t->n && !why; i++) {
        const uint8_t *p = table + (size_t)i * size;
        struct blobtable_chunk *c = &t->chunk[i];
        if (size == ENTRY_V1)
            entry_v1(p, c);
        else
            why = entry_v2(p, &ctx, c);
        if (!why)
            why = blobtable_check(info, c);
        t->known++;
    }
    if (!why && blobtable_overlap(t, &x, &y))
        why = "chunks that share bytes";
    if (why) {
        blobtable_free(t);
        return bad(info, why, f);
    }
    *out = t;
    return 0;
}

int blobmeta_decrypt(const vnd_blob_info *info, uint8_t *stored, size_t len, struct failure *f)
{
    size_t table_len = 0, header_len = 0;

    if (len != info->ci_csize_bytes + BLOBMETA_HEADER ||
        cipher_decrypt(info->cipher_key, info->cipher_iv, stored, info->ci_csize_bytes, stored, &table_len) ||
        cipher_decrypt(info->cipher_key, info->cipher_iv, stored + info->ci_csize_bytes, BLOBMETA_HEADER,
                       stored + info->ci_csize_bytes, &header_len) ||
        table_len != info->ci_csize_bytes) {
        bad(info, "it cannot be decrypted", f);
        return -EBADMSG;
    }
    return 0;
}

int blobmeta_decode(uint8_t **plain, const vnd_blob_info *info, const uint8_t *stored, size_t len, struct failure *f)
{
    struct codec *c;
    uint32_t id = info->ci_csize_bytes == info->ci_usize_bytes ? CODEC_NONE : info->ci_compressor;
    int rc;

    *plain = NULL;
    if (!blobmeta_possible(info) || len != info->ci_csize_bytes + BLOBMETA_HEADER)
        return bad(info, "sizes that cannot be", f);
    c = codec_new();
    *plain = malloc(info->ci_usize_bytes);
    rc = c && *plain ? codec_decode(c, id, stored, info->ci_csize_bytes, *plain, info->ci_usize_bytes) : -ENOMEM;
    codec_free(c);
    if (rc) {
        free(*plain);
        *plain = NULL;
        bad(info, rc == -ENOMEM ? "no memory" : "it does not decode", f);
    }
    return rc;
}

int blobmeta_place(struct blobtable *records, const struct blobtable *meta, const vnd_blob_info *info,
                   struct failure *f)
{
    for (uint32_t i = 0; i < records->n; i++) {
        struct blobtable_chunk *r = &records->chunk[i];
        const struct blobtable_chunk *m = &meta->chunk[i];
        if (!r->usize)
            continue;
        /* A bootstrap does not say where a batched chunk lies (csize 0); of all others it does. */
        if (r->uoff != m->uoff || r->usize != m->usize ||
            (!m->batch && r->csize &&
             (r->coff != m->coff || r->csize != m->csize || (r->flags ^ m->flags) & BLOBTABLE_COMPRESSED)))
            return failure_set(f, -EINVAL, VND_CAUSE_FORMAT,
                               "chunk table of blob %s and the image differ about chunk %u; "
                               "one of them is damaged",
                               info->id, i);
        /* A record's flags say whether the chunk is encrypted only where the record has the chunk's place. */
        if (!r->csize)
            r->flags |= m->flags & BLOBTABLE_ENCRYPTED;
        r->coff = m->coff;
        r->csize = m->csize;
        r->batch = m->batch;
        r->batch_at = m->batch_at;
        r->batch_usize = m->batch_usize;
        r->flags = (r->flags & ~BLOBTABLE_COMPRESSED) | (m->flags & BLOBTABLE_COMPRESSED);
    }
    if (!records->zran)
        records->zran = zran_ref(meta->zran);
    return 0;
}

/* ---------------------------------------------------------------- ID.blob.meta */

static uint64_t file_table_bytes(const vnd_blob_info *info)
{
    return (info->ci_usize_bytes + 4095) / 4096 * 4096;
}

int blobmeta_file_read(int dir_fd, const vnd_blob_info *info, uint8_t **plain, uint8_t header[BLOBMETA_HEADER])
{
    char name[VND_ID_MAX + 16];
    uint64_t at = file_table_bytes(info);
    struct stat st;
    int fd, rc = 0;

    *plain = NULL;
    if (!blobmeta_possible(info))
        return -EINVAL;
    snprintf(name, sizeof name, "%s.blob.meta", info->id);
    fd = openat(dir_fd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return -errno;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode) || (uint64_t)st.st_size != at + BLOBMETA_HEADER)
        rc = -EINVAL;
    else if (!(*plain = malloc(info->ci_usize_bytes)))
        rc = -ENOMEM;
    else if (pread(fd, *plain, info->ci_usize_bytes, 0) != (ssize_t)info->ci_usize_bytes ||
             pread(fd, header, BLOBMETA_HEADER, (off_t)at) != BLOBMETA_HEADER)
        rc = -EIO;
    close(fd);
    if (rc) {
        free(*plain);
        *plain = NULL;
    }
    return rc;
}

int blobmeta_file_write(int dir_fd, const vnd_blob_info *info, const uint8_t *plain, const uint8_t *header)
{
    char name[VND_ID_MAX + 16], tmp[VND_ID_MAX + 64];
    uint64_t at = file_table_bytes(info);
    int fd, rc = 0;

    snprintf(name, sizeof name, "%s.blob.meta", info->id);
    snprintf(tmp, sizeof tmp, "%s.%d.tmp", name, (int)getpid());
    fd = openat(dir_fd, tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)(at + BLOBMETA_HEADER)) ||
        pwrite(fd, plain, info->ci_usize_bytes, 0) != (ssize_t)info->ci_usize_bytes ||
        pwrite(fd, header, BLOBMETA_HEADER, (off_t)at) != BLOBMETA_HEADER || renameat(dir_fd, tmp, dir_fd, name))
        rc = errno ? -errno : -EIO;
    if (rc)
        unlinkat(dir_fd, tmp, 0);
    close(fd);
    return rc;
}

void blobmeta_file_remove(int dir_fd, const vnd_blob_info *info)
{
    char name[VND_ID_MAX + 16];

    snprintf(name, sizeof name, "%s.blob.meta", info->id);
    unlinkat(dir_fd, name, 0);
}
