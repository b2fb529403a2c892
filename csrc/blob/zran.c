/* blob/zran.c -- see zran.h. */
#include "blob/zran.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#define GZIP_TRAILER 8u

struct zran {
    _Atomic uint32_t refs;
    uint32_t n;
    struct zran_context *context;
    uint8_t *dicts;
    size_t dicts_len;
};

static uint32_t le32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t le64(const uint8_t *p)
{
    return le32(p) | (uint64_t)le32(p + 4) << 32;
}

/* NULL, or what is wrong with it. */
static const char *read_context(const uint8_t *p, size_t dicts_len, struct zran_context *c)
{
    *c = (struct zran_context){ .in_off = le64(p),
                                .dict_off = le64(p + 16),
                                .in_len = le32(p + 24),
                                .out_len = le32(p + 28),
                                .dict_len = le32(p + 32),
                                .byte = p[36],
                                .bits = p[37] };
    if (!c->in_len || !c->out_len || c->out_len > ZRAN_OUT_MAX)
        return "a gzip context of impossible size";
    if (c->bits > 7)
        return "a gzip context with more than 7 bits left over";
    if (c->dict_len > ZRAN_WINDOW || c->dict_off > dicts_len || c->dict_len > dicts_len - c->dict_off)
        return "a gzip context whose dictionary lies outside the table";
    return NULL;
}

struct zran *zran_new(const uint8_t *stored, uint32_t n, const uint8_t *dicts, size_t dicts_len, const char **why)
{
    struct zran *z = calloc(1, sizeof *z);

    *why = NULL;
    if (!z)
        return NULL;
    atomic_init(&z->refs, 1);
    z->n = n;
    z->dicts_len = dicts_len;
    z->context = calloc(n ? n : 1, sizeof *z->context);
    z->dicts = malloc(dicts_len ? dicts_len : 1);
    if (!z->context || !z->dicts) {
        zran_unref(z);
        return NULL;
    }
    if (dicts_len)
        memcpy(z->dicts, dicts, dicts_len);
    for (uint32_t i = 0; i < n && !*why; i++)
        *why = read_context(stored + (size_t)i * ZRAN_CONTEXT, dicts_len, &z->context[i]);
    if (*why) {
        zran_unref(z);
        return NULL;
    }
    return z;
}

struct zran *zran_ref(struct zran *z)
{
    if (z)
        atomic_fetch_add_explicit(&z->refs, 1, memory_order_relaxed);
    return z;
}

void zran_unref(struct zran *z)
{
    if (!z || atomic_fetch_sub(&z->refs, 1) != 1)
        return;
    free(z->context);
    free(z->dicts);
    free(z);
}

_Static_assert(sizeof(struct zran_context) == 32, "contexts are compared as bytes, so none may be padding");

bool zran_equal(const struct zran *a, const struct zran *b)
{
    if (a == b)
        return true;
    return a && b && a->n == b->n && a->dicts_len == b->dicts_len &&
           !memcmp(a->context, b->context, (size_t)a->n * sizeof *a->context) &&
           !memcmp(a->dicts, b->dicts, a->dicts_len);
}

uint32_t zran_count(const struct zran *z)
{
    return z->n;
}

const uint8_t *zran_dicts(const struct zran *z, size_t *len)
{
    *len = z->dicts_len;
    return z->dicts;
}

const struct zran_context *zran_at(const struct zran *z, uint32_t i)
{
    return &z->context[i];
}

/* Goes from the end of one gzip member to the data of the next. The rest of the input begins with the member's
 * trailer, which raw inflating does not read. false: there is no next member. */
static bool next_member(z_stream *s, bool *raw)
{
    if (*raw) {
        if (s->avail_in < GZIP_TRAILER)
            return false;
        s->next_in += GZIP_TRAILER;
        s->avail_in -= GZIP_TRAILER;
    }
    *raw = false; /* zlib reads header and trailer of those that follow */
    return s->avail_in && inflateReset2(s, 15 + 16) == Z_OK;
}

int zran_decode(const struct zran *z, uint32_t i, const uint8_t *src, uint8_t *dst)
{
    const struct zran_context *c = &z->context[i];
    z_stream s = {
        .next_in = (uint8_t *)(uintptr_t)src, .avail_in = c->in_len, .next_out = dst, .avail_out = c->out_len
    };
    bool raw = true, good;

    if (inflateInit2(&s, -15) != Z_OK)
        return -ENOMEM;
    good = (!c->bits || inflatePrime(&s, c->bits, c->byte >> (8 - c->bits)) == Z_OK) &&
           (!c->dict_len || inflateSetDictionary(&s, z->dicts + c->dict_off, c->dict_len) == Z_OK);
    while (good && s.avail_out) {
        int rc = inflate(&s, Z_SYNC_FLUSH);

        if (rc == Z_STREAM_END)
            good = !s.avail_out || next_member(&s, &raw);
        else
            good = rc == Z_OK && (s.avail_in || !s.avail_out);
    }
    inflateEnd(&s);
    return good ? 0 : -EBADMSG;
}
