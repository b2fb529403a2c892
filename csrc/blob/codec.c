/* blob/codec.c -- see codec.h. One frame, block or member is one chunk; lengths are known beforehand and must be met. */
#include "blob/codec.h"

#include <errno.h>
#include <limits.h>
#include <lz4.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>

struct codec {
    ZSTD_DCtx *zstd;
    z_stream gz;
    int gz_ready;
};

struct codec *codec_new(void)
{
    return calloc(1, sizeof(struct codec));
}

void codec_free(struct codec *c)
{
    if (!c)
        return;
    ZSTD_freeDCtx(c->zstd);
    if (c->gz_ready)
        inflateEnd(&c->gz);
    free(c);
}

int codec_known(uint32_t id)
{
    return id <= CODEC_ZSTD;
}

static int decode_zstd(struct codec *c, const uint8_t *src, size_t src_len, uint8_t *dst, size_t dst_len)
{
    if (!c->zstd && !(c->zstd = ZSTD_createDCtx()))
        return -ENOMEM;
    /* One-shot decoding holds no window of its own, so a hostile window size costs nothing. */
    size_t n = ZSTD_decompressDCtx(c->zstd, dst, dst_len, src, src_len);
    return ZSTD_isError(n) || n != dst_len ? -EBADMSG : 0;
}

static int decode_lz4(const uint8_t *src, size_t src_len, uint8_t *dst, size_t dst_len)
{
    if (src_len > INT_MAX || dst_len > INT_MAX)
        return -EBADMSG;
    int n = LZ4_decompress_safe((const char *)src, (char *)dst, (int)src_len, (int)dst_len);
    return n < 0 || (size_t)n != dst_len ? -EBADMSG : 0;
}

static int decode_gzip(struct codec *c, const uint8_t *src, size_t src_len, uint8_t *dst, size_t dst_len)
{
    uint8_t probe; /* takes the byte too many that a hostile member may hold */
    int rc;

    if (src_len > UINT_MAX || dst_len > UINT_MAX)
        return -EBADMSG;
    if (!c->gz_ready) {
        if (inflateInit2(&c->gz, 31) != Z_OK)
            return -ENOMEM;
        c->gz_ready = 1;
    } else if (inflateReset(&c->gz) != Z_OK) {
        return -EBADMSG;
    }
    c->gz.next_in = (uint8_t *)(uintptr_t)src;
    c->gz.avail_in = (unsigned)src_len;
    c->gz.next_out = dst_len ? dst : &probe;
    c->gz.avail_out = (unsigned)dst_len;
    rc = inflate(&c->gz, Z_FINISH);
    if (rc == Z_BUF_ERROR && c->gz.avail_out == 0) { /* full: only the trailer may be left */
        c->gz.next_out = &probe;
        c->gz.avail_out = 1;
        rc = inflate(&c->gz, Z_FINISH);
        if (c->gz.avail_out != 1)
            return -EBADMSG;
    }
    return rc == Z_STREAM_END && c->gz.total_out == dst_len ? 0 : -EBADMSG;
}

int codec_decode(struct codec *c, uint32_t id, const uint8_t *src, size_t src_len, uint8_t *dst, size_t dst_len)
{
    switch (id) {
    case CODEC_NONE:
        if (src_len != dst_len)
            return -EBADMSG;
        memcpy(dst, src, dst_len);
        return 0;
    case CODEC_LZ4_BLOCK: return decode_lz4(src, src_len, dst, dst_len);
    case CODEC_GZIP: return decode_gzip(c, src, src_len, dst, dst_len);
    case CODEC_ZSTD: return decode_zstd(c, src, src_len, dst, dst_len);
    default: return -ENOTSUP;
    }
}

int codec_sha256(const void *src, size_t len, uint8_t out[CODEC_DIGEST_BYTES])
{
    return EVP_Digest(src, len, out, NULL, EVP_sha256(), NULL) == 1 ? 0 : -EIO;
}
