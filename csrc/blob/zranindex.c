/* blob/zranindex.c -- decodes a gzip layer while noting where decoding can begin anew: the zran contexts of an image
 * that refers to its OCI layers (docs/rafs-format.md 4.6).
 *
 * Nothing is decoded beyond what was asked for, so the last block boundary passed is one before the position.
 */
#include "vnd.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#define ZRAN_WINDOW_BYTES 32768u
#define ZRAN_CONTEXT_BYTES 40u
/* A context ends once it takes in or gives out this many bytes: a reader fetches and decodes a whole context. */
#define ZRAN_IN_BYTES (512u << 10)
#define ZRAN_OUT_BYTES (2u << 20)
#define ZRAN_DICT_MAX (1u << 30) /* windows of a layer of 64 GiB: more is a decompression bomb */
#define ZRAN_OUT_MAX (16u << 20) /* readers refuse more */

struct zran_boundary {
    uint64_t in_off, out_off;
    uint32_t window_len;
    uint8_t byte, bits;
    uint8_t window[ZRAN_WINDOW_BYTES];
};

struct zran_context {
    uint64_t in_off, out_off, dict_off;
    uint32_t in_len, out_len, dict_len;
    uint8_t byte, bits;
};

struct vnd_zran {
    z_stream gz;
    uint64_t in, out; /* position, over all members */
    uint32_t chunk_size;
    uint8_t last_byte;
    int in_member, switched, known;
    struct zran_boundary last;
    struct zran_context *contexts;
    size_t count, cap;
    uint64_t dict_len; /* bytes of all windows so far, which the caller has taken */
    uint32_t window_len;
    uint8_t window[ZRAN_WINDOW_BYTES];
};

vnd_zran *vnd_zran_new(uint32_t chunk_size_bytes)
{
    vnd_zran *z = calloc(1, sizeof(*z));

    if (!z)
        return NULL;
    z->chunk_size = chunk_size_bytes;
    if (inflateInit2(&z->gz, 31) != Z_OK) {
        free(z);
        return NULL;
    }
    return z;
}

void vnd_zran_free(vnd_zran *z)
{
    if (!z)
        return;
    inflateEnd(&z->gz);
    free(z->contexts);
    free(z);
}

static int note_boundary(vnd_zran *z)
{
    uInt len = ZRAN_WINDOW_BYTES;

    if (inflateGetDictionary(&z->gz, z->last.window, &len) != Z_OK)
        return -EBADMSG;
    z->last.window_len = len;
    z->last.in_off = z->in;
    z->last.out_off = z->out;
    z->last.bits = (uint8_t)(z->gz.data_type & 7);
    z->last.byte = z->last_byte;
    z->known = 1;
    return 0;
}

/* Inflates up to the next block boundary, the end of the input or the end of the output's room. */
static int inflate_step(vnd_zran *z)
{
    const uint8_t *in = z->gz.next_in;
    uint8_t *out = z->gz.next_out;
    int rc;

    z->in_member = 1;
    rc = inflate(&z->gz, Z_BLOCK);
    if (z->gz.next_in > in)
        z->last_byte = z->gz.next_in[-1];
    z->in += (uint64_t)(z->gz.next_in - in);
    z->out += (uint64_t)(z->gz.next_out - out);
    if (rc == Z_STREAM_END) {
        z->in_member = 0;
        z->switched = 1;
        return inflateReset(&z->gz) == Z_OK ? 0 : -EBADMSG;
    }
    if (rc == Z_BUF_ERROR)
        return 0;
    if (rc != Z_OK)
        return rc == Z_MEM_ERROR ? -ENOMEM : -EBADMSG;
    return (z->gz.data_type & 0xC0) == 0x80 ? note_boundary(z) : 0;
}

int64_t vnd_zran_read(vnd_zran *z, const uint8_t *in, size_t in_len, size_t *used, uint8_t *out, size_t out_len)
{
    int rc;

    *used = 0;
    if (in_len > UINT_MAX || out_len > UINT_MAX)
        return -EINVAL;
    z->gz.next_in = (uint8_t *)(uintptr_t)in;
    z->gz.avail_in = (uInt)in_len;
    z->gz.next_out = out;
    z->gz.avail_out = (uInt)out_len;
    while (z->gz.avail_in && z->gz.avail_out) {
        if (!z->in_member && *z->gz.next_in == 0) { /* padding behind or between members */
            z->gz.next_in++;
            z->gz.avail_in--;
            z->in++;
            continue;
        }
        rc = inflate_step(z);
        if (rc)
            return rc;
    }
    *used = in_len - z->gz.avail_in;
    return (int64_t)(out_len - z->gz.avail_out);
}

int vnd_zran_in_member(const vnd_zran *z)
{
    return z->in_member;
}

static int grow(void **what, size_t *cap, size_t need, size_t each)
{
    size_t wanted = *cap ? *cap : 64;
    void *moved;

    while (wanted < need)
        wanted *= 2;
    if (wanted == *cap)
        return 0;
    moved = realloc(*what, wanted * each);
    if (!moved)
        return -ENOMEM;
    *what = moved;
    *cap = wanted;
    return 0;
}

static int start_context(vnd_zran *z)
{
    const struct zran_boundary *b = &z->last;
    struct zran_context *c;

    if (z->dict_len + b->window_len > ZRAN_DICT_MAX || z->count >= INT_MAX)
        return -E2BIG;
    if (grow((void **)&z->contexts, &z->cap, z->count + 1, sizeof(*z->contexts)))
        return -ENOMEM;
    c = &z->contexts[z->count++];
    *c = (struct zran_context){ .in_off = b->in_off,
                                .out_off = b->out_off,
                                .dict_off = z->dict_len,
                                .dict_len = b->window_len,
                                .byte = b->byte,
                                .bits = b->bits };
    memcpy(z->window, b->window, b->window_len);
    z->window_len = b->window_len;
    z->dict_len += b->window_len;
    z->switched = 0;
    return 0;
}

static int is_due(const vnd_zran *z)
{
    const struct zran_context *c;

    if (!z->count || z->switched)
        return 1;
    c = &z->contexts[z->count - 1];
    return z->last.out_off > c->out_off &&
           (z->in - c->in_off >= ZRAN_IN_BYTES || z->out - c->out_off + z->chunk_size >= ZRAN_OUT_BYTES);
}

int64_t vnd_zran_begin_chunk(vnd_zran *z, uint64_t *in_off, uint64_t *slice)
{
    if (!z->known)
        return -EINVAL;
    if (is_due(z)) {
        int rc = start_context(z);

        if (rc)
            return rc;
    }
    *in_off = z->in;
    *slice = z->out - z->contexts[z->count - 1].out_off;
    return (int64_t)z->count - 1;
}

int vnd_zran_end_chunk(vnd_zran *z, uint64_t *in_off)
{
    struct zran_context *c;

    if (!z->count)
        return -EINVAL;
    c = &z->contexts[z->count - 1];
    if (z->out - c->out_off > ZRAN_OUT_MAX || z->in - c->in_off > UINT32_MAX)
        return -E2BIG;
    c->out_len = (uint32_t)(z->out - c->out_off);
    c->in_len = (uint32_t)(z->in - c->in_off);
    *in_off = z->in;
    return 0;
}

const uint8_t *vnd_zran_window(const vnd_zran *z, uint32_t *len)
{
    *len = z->window_len;
    return z->window;
}

static uint8_t *put_le(uint8_t *at, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        *at++ = (uint8_t)(value >> 8 * i);
    return at;
}

uint64_t vnd_zran_table(const vnd_zran *z, uint8_t *out, size_t out_len, uint32_t *count)
{
    size_t need = z->count * ZRAN_CONTEXT_BYTES;

    *count = (uint32_t)z->count;
    if (out_len < need)
        return need;
    for (size_t i = 0; i < z->count; i++) {
        const struct zran_context *c = &z->contexts[i];

        out = put_le(out, c->in_off, 8);
        out = put_le(out, c->out_off, 8);
        out = put_le(out, c->dict_off, 8);
        out = put_le(out, c->in_len, 4);
        out = put_le(out, c->out_len, 4);
        out = put_le(out, c->dict_len, 4);
        *out++ = c->byte;
        *out++ = c->bits;
        out = put_le(out, 0, 2);
    }
    return need;
}
