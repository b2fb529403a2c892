/* Contexts of gzip files: starting at any block, over the ends of members, with left-over bits; what a hostile table
 * may say of them. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "check.h"
#include "vnd.h"
#include "blob/zran.h"

#define PLAIN 900000u
#define MEMBERS 2u

struct file {
    uint8_t *plain, *gz;
    size_t gz_len;
    uint8_t *contexts, *dicts;
    uint32_t n;
    uint64_t out_off[4096];
};

static void put(uint8_t *p, uint64_t v, int bytes)
{
    for (int i = 0; i < bytes; i++)
        p[i] = (uint8_t)(v >> 8 * i);
}

static void make_plain(uint8_t *p)
{
    uint32_t x = 7;

    for (uint32_t i = 0; i < PLAIN; i++) {
        x = x * 1664525 + 1013904223;
        p[i] = i > 100 && x >> 30 ? p[i - 1 - (x >> 8) % 100] : (uint8_t)(x >> 24);
    }
}

static void make_gzip(struct file *f)
{
    f->gz = malloc(2 * PLAIN);
    f->gz_len = 0;
    for (uint32_t m = 0; m < MEMBERS; m++) {
        z_stream s = { .next_in = f->plain + m * (PLAIN / MEMBERS),
                       .avail_in = PLAIN / MEMBERS,
                       .next_out = f->gz + f->gz_len,
                       .avail_out = (unsigned)(2 * PLAIN - f->gz_len) };
        CHECK_EQ(deflateInit2(&s, 6, Z_DEFLATED, 31, 8, Z_DEFAULT_STRATEGY), Z_OK);
        CHECK_EQ(deflate(&s, Z_FINISH), Z_STREAM_END);
        f->gz_len += s.total_out;
        deflateEnd(&s);
    }
}

static void add_context(struct file *f, const z_stream *s, uint64_t out, bool start)
{
    uint8_t *c = f->contexts + (size_t)f->n * ZRAN_CONTEXT;
    uint64_t in = f->gz_len - s->avail_in, dict = start ? 0 : out < ZRAN_WINDOW ? out : ZRAN_WINDOW;

    put(c, in, 8);
    put(c + 8, out, 8);
    put(c + 16, (uint64_t)f->n * ZRAN_WINDOW, 8);
    put(c + 32, dict, 4);
    c[36] = f->gz[in - 1];
    c[37] = (uint8_t)(s->data_type & 7);
    memcpy(f->dicts + (size_t)f->n * ZRAN_WINDOW, f->plain + out - dict, dict);
    f->out_off[f->n++] = out;
}

/* A context at every block of the first member; each goes on for a while, the last ones into the second. */
static void make_contexts(struct file *f)
{
    uint8_t *sink = malloc(PLAIN);
    z_stream s = { .next_in = f->gz, .avail_in = (unsigned)f->gz_len, .next_out = sink, .avail_out = PLAIN };
    int rc;

    f->contexts = calloc(4096, ZRAN_CONTEXT);
    f->dicts = calloc(4096, ZRAN_WINDOW);
    f->n = 0;
    CHECK_EQ(inflateInit2(&s, 31), Z_OK);
    do {
        rc = inflate(&s, Z_BLOCK);
        if (rc == Z_OK && s.data_type & 128 && !(s.data_type & 64))
            add_context(f, &s, s.total_out, s.total_out == 0);
    } while (rc == Z_OK && f->n < 4096);
    inflateEnd(&s);
    free(sink);
    for (uint32_t i = 0; i < f->n; i++) {
        uint8_t *c = f->contexts + (size_t)i * ZRAN_CONTEXT;
        uint64_t in = 0, len;

        memcpy(&in, c, 8);
        len = PLAIN - f->out_off[i];
        put(c + 24, f->gz_len - in, 4);
        put(c + 28, i % 2 ? len : len < 70000 ? len : 70000, 4);
    }
}

static struct file *file_new(void)
{
    struct file *f = calloc(1, sizeof *f);

    f->plain = malloc(PLAIN);
    make_plain(f->plain);
    make_gzip(f);
    make_contexts(f);
    return f;
}

static void file_free(struct file *f)
{
    free(f->plain);
    free(f->gz);
    free(f->contexts);
    free(f->dicts);
    free(f);
}

static int decode(const struct file *f, const struct zran *z, uint32_t i, uint32_t cut)
{
    const struct zran_context *c = zran_at(z, i);
    uint8_t *in = malloc(c->in_len), *out = malloc(c->out_len);
    int rc;

    memcpy(in, f->gz + c->in_off, c->in_len);
    memset(in + c->in_len - cut, 0, cut);
    rc = zran_decode(z, i, in, out);
    if (!rc && memcmp(out, f->plain + f->out_off[i], c->out_len))
        rc = -EILSEQ;
    free(in);
    free(out);
    return rc;
}

TEST(contexts)
{
    struct file *f = file_new();
    const char *why;
    struct zran *z = zran_new(f->contexts, f->n, f->dicts, (size_t)f->n * ZRAN_WINDOW, &why), *same;

    CHECK(z && f->n > 5);
    CHECK_EQ(zran_count(z), f->n);
    for (uint32_t i = 0; i < f->n; i++)
        CHECK_EQ(decode(f, z, i, 0), 0);
    /* Damaged: an error, or other bytes, which their digest tells. */
    CHECK(decode(f, z, 1, zran_at(z, 1)->in_len / 2) < 0);
    same = zran_new(f->contexts, f->n, f->dicts, (size_t)f->n * ZRAN_WINDOW, &why);
    CHECK(zran_equal(z, same) && zran_equal(NULL, NULL) && !zran_equal(z, NULL));
    zran_unref(zran_ref(z));
    zran_unref(z);
    zran_unref(same);
    file_free(f);
}

TEST(hostile)
{
    struct file *f = file_new();
    struct {
        size_t at;
        int bytes;
        uint64_t value;
        const char *word;
    } t[] = {
        { 24, 4, 0, "impossible size" },
        { 28, 4, 0, "impossible size" },
        { 28, 4, ZRAN_OUT_MAX + 1, "impossible" },
        { 37, 1, 8, "7 bits" },
        { 32, 4, ZRAN_WINDOW + 1, "outside" },
        { 16, 8, UINT64_MAX, "outside" },
        { 16, 8, (uint64_t)f->n * ZRAN_WINDOW - 1, "outside" },
    };
    const char *why;
    struct zran *z;

    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        uint8_t *c = f->contexts + 3 * ZRAN_CONTEXT, kept[ZRAN_CONTEXT];

        memcpy(kept, c, sizeof kept);
        put(c + t[i].at, t[i].value, t[i].bytes);
        z = zran_new(f->contexts, f->n, f->dicts, (size_t)f->n * ZRAN_WINDOW, &why);
        CHECK(!z && why && strstr(why, t[i].word));
        memcpy(c, kept, sizeof kept);
    }
    /* A bomb: more comes out than the context says; no byte more is written (the sanitizer's to see). */
    put(f->contexts + 28, 10, 4);
    z = zran_new(f->contexts, f->n, f->dicts, (size_t)f->n * ZRAN_WINDOW, &why);
    CHECK_EQ(decode(f, z, 0, 0), 0);
    zran_unref(z);
    /* More is claimed than comes out. */
    put(f->contexts + 28, PLAIN + 1, 4);
    z = zran_new(f->contexts, f->n, f->dicts, (size_t)f->n * ZRAN_WINDOW, &why);
    uint8_t *out = malloc(PLAIN + 1);
    CHECK_EQ(zran_decode(z, 0, f->gz + zran_at(z, 0)->in_off, out), -EBADMSG);
    free(out);
    zran_unref(z);
    file_free(f);
}
