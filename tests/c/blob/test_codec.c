/* Every codec: good, truncated, too long, too short, flipped, garbage. Nothing is written past the stated
 * length. */
#include "store_fixture.h"

#define PLAIN 70000

static void fill(uint8_t *p, size_t n)
{
    uint32_t seed = 3;

    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)(i % 5 ? 'x' : fix_random(&seed));
}

/* Decodes from and into buffers of the exact sizes, so that the sanitizer sees a byte too many. */
static int decode(struct codec *c, uint32_t id, const uint8_t *src, size_t n, const uint8_t *want, size_t want_len)
{
    uint8_t *in = malloc(n ? n : 1), *out = malloc(want_len ? want_len : 1);
    int rc;

    memcpy(in, src, n);
    rc = codec_decode(c, id, in, n, out, want_len);
    if (!rc && want && memcmp(out, want, want_len))
        rc = -EILSEQ;
    free(in);
    free(out);
    return rc;
}

static void test_codec(struct codec *c, uint32_t id)
{
    static uint8_t plain[PLAIN], packed[2 * PLAIN];
    size_t n;
    uint32_t seed = id + 1;

    fill(plain, PLAIN);
    n = fix_compress(id, plain, PLAIN, packed, sizeof packed);
    CHECK_EQ(decode(c, id, packed, n, plain, PLAIN), 0);
    CHECK_EQ(decode(c, id, packed, n, NULL, PLAIN - 1), -EBADMSG);
    CHECK_EQ(decode(c, id, packed, n, NULL, PLAIN + 1), -EBADMSG);
    CHECK_EQ(decode(c, id, packed, n, NULL, 0), -EBADMSG);
    CHECK_EQ(decode(c, id, packed, 0, NULL, PLAIN), -EBADMSG);
    for (size_t cut = 1; cut < n; cut += 1 + n / 97)
        CHECK_EQ(decode(c, id, packed, n - cut, NULL, PLAIN), -EBADMSG);
    /* A flipped bit may decode to other bytes: the digest finds that. It must not crash, nor give our bytes by a
     * miracle of a different length. */
    for (int i = 0; i < 200; i++) {
        size_t at = fix_random(&seed) % n;
        packed[at] ^= (uint8_t)(1 << (i % 8));
        int rc = decode(c, id, packed, n, NULL, PLAIN);
        CHECK(rc == 0 || rc == -EBADMSG);
        packed[at] ^= (uint8_t)(1 << (i % 8));
    }
    /* The state survives damage. */
    CHECK_EQ(decode(c, id, packed, n, plain, PLAIN), 0);
    for (int i = 0; i < 200; i++) {
        uint8_t junk[300];
        for (size_t k = 0; k < sizeof junk; k++)
            junk[k] = (uint8_t)fix_random(&seed);
        int rc = decode(c, id, junk, sizeof junk, NULL, 5000);
        CHECK(rc == -EBADMSG);
    }
}

/* What follows a gzip member is passed over, as nydusd does; it does not continue it. */
static void test_after_member(struct codec *c)
{
    static uint8_t plain[PLAIN], packed[2 * PLAIN];
    size_t n, more;

    fill(plain, PLAIN);
    n = fix_compress(CODEC_GZIP, plain, PLAIN / 2, packed, sizeof packed);
    more = fix_compress(CODEC_GZIP, plain + PLAIN / 2, PLAIN / 2, packed + n, sizeof packed - n);
    CHECK_EQ(decode(c, CODEC_GZIP, packed, n + more, plain, PLAIN / 2), 0);
    CHECK_EQ(decode(c, CODEC_GZIP, packed, n + more, NULL, PLAIN), -EBADMSG);
    memset(packed + n, 0xa5, more);
    CHECK_EQ(decode(c, CODEC_GZIP, packed, n + more, plain, PLAIN / 2), 0);
}

static void test_sha256(void)
{
    static const uint8_t abc[32] = {
        0xba, 0x78, 0x16, 0xbf, 0x8f, 0x01, 0xcf, 0xea, 0x41, 0x41, 0x40, 0xde, 0x5d, 0xae, 0x22, 0x23,
        0xb0, 0x03, 0x61, 0xa3, 0x96, 0x17, 0x7a, 0x9c, 0xb4, 0x10, 0xff, 0x61, 0xf2, 0x00, 0x15, 0xad,
    };
    uint8_t out[32];

    CHECK_EQ(codec_sha256("abc", 3, out), 0);
    CHECK(!memcmp(out, abc, 32));
}

/* ---- tables */

static int table_rc(struct fix_blob *b, struct blobtable **t, char *err)
{
    return blobtable_from_records(t, &b->info, fix_chunks, b, err, VND_ERR_MAX);
}

static void refuse(void (*spoil)(struct fix_blob *b), const char *word)
{
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 6, 8192);
    struct blobtable *t;
    char err[VND_ERR_MAX] = "";

    spoil(b);
    CHECK(table_rc(b, &t, err) < 0);
    if (!strstr(err, word)) {
        fprintf(stderr, "'%s' lacks '%s'\n", err, word);
        abort();
    }
    CHECK(!t);
    fix_blob_free(b);
}

static void spoil_index(struct fix_blob *b)
{
    b->chunk[2].index = 6;
}
static void spoil_usize(struct fix_blob *b)
{
    b->chunk[2].usize = BLOBTABLE_CHUNK_MAX + 1;
}
static void spoil_usize0(struct fix_blob *b)
{
    b->chunk[2].usize = 0;
}
static void spoil_csize(struct fix_blob *b)
{
    b->chunk[5].csize++;
}
static void spoil_coff(struct fix_blob *b)
{
    b->chunk[2].coff = UINT64_MAX - 4;
}
static void spoil_uoff(struct fix_blob *b)
{
    b->chunk[2].uoff = UINT64_MAX - 4096;
}
static void spoil_end(struct fix_blob *b)
{
    b->info.uncompressed_size_bytes = 5 * 8192;
}
static void spoil_raw(struct fix_blob *b)
{
    b->chunk[2].flags = 0;
}
static void spoil_overlap(struct fix_blob *b)
{
    b->chunk[2].uoff -= 1;
}
static void spoil_twice(struct fix_blob *b)
{
    b->chunk[3].index = 2;
}
static void spoil_count(struct fix_blob *b)
{
    b->info.chunk_count = 0;
}

static void test_tables(void)
{
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 6, 8192);
    struct blobtable *t, *half, *all;
    char err[VND_ERR_MAX];
    struct extent x = { .uoff = 8192 + 5, .chunk = 1, .len = 100, .chunk_off = 5 };

    CHECK_EQ(table_rc(b, &t, err), 0);
    CHECK_EQ(t->known, 6);
    CHECK_EQ(t->digests, 6);
    CHECK(blobtable_covers(t, &x));
    x.chunk = 6;
    CHECK(!blobtable_covers(t, &x));
    x.chunk = UINT32_MAX;
    CHECK(!blobtable_covers(t, &x));
    x = (struct extent){ .uoff = 8192, .chunk = 2, .len = 1 };
    CHECK(!blobtable_covers(t, &x));
    x = (struct extent){ .uoff = 8192, .chunk = 1, .len = 8193 };
    CHECK(!blobtable_covers(t, &x));
    x = (struct extent){ .uoff = 8192 + 8, .chunk = 1, .len = UINT32_MAX, .chunk_off = 8 };
    CHECK(!blobtable_covers(t, &x));
    x = (struct extent){ .uoff = 100, .chunk = 0, .len = 1, .chunk_off = 200 };
    CHECK(!blobtable_covers(t, &x));

    /* Two images that name different parts of a blob agree; the union knows all. */
    b->hide_from = 1;
    b->hide_to = 3;
    CHECK_EQ(table_rc(b, &half, err), 0);
    CHECK_EQ(half->known, 4);
    CHECK(!blobtable_equal(t, half));
    CHECK_EQ(blobtable_merge(&all, half, t, err, sizeof err), 0);
    CHECK(blobtable_equal(all, t));
    blobtable_free(all);
    half->digest[0][3] ^= 1;
    CHECK_EQ(blobtable_merge(&all, half, t, err, sizeof err), -EEXIST);
    half->digest[0][3] ^= 1;
    half->chunk[0].usize++; /* now reaches into chunk 1 of the other */
    t->chunk[0].usize = 0;
    CHECK_EQ(blobtable_merge(&all, half, t, err, sizeof err), -EEXIST);
    blobtable_free(half);
    blobtable_free(t);
    b->hide_from = 0;
    b->hide_to = 6;
    CHECK_EQ(table_rc(b, &t, err), -ENODATA);
    b->hide_to = 0;
    /* Any order of offsets is fine as long as nothing overlaps. */
    uint64_t u = b->chunk[1].uoff;
    b->chunk[1].uoff = b->chunk[3].uoff;
    b->chunk[3].uoff = u;
    CHECK_EQ(table_rc(b, &t, err), 0);
    blobtable_free(t);
    fix_blob_free(b);

    refuse(spoil_index, "index");
    refuse(spoil_usize, "uncompressed size");
    refuse(spoil_usize0, "uncompressed size");
    refuse(spoil_csize, "compressed range");
    refuse(spoil_coff, "compressed range");
    refuse(spoil_uoff, "uncompressed range");
    refuse(spoil_end, "uncompressed range");
    refuse(spoil_raw, "two sizes");
    refuse(spoil_overlap, "share bytes");
    refuse(spoil_twice, "twice");
    refuse(spoil_count, "chunks");
}

int main(void)
{
    struct codec *c = codec_new();

    for (uint32_t id = CODEC_LZ4_BLOCK; id <= CODEC_ZSTD; id++)
        test_codec(c, id);
    test_after_member(c);
    CHECK_EQ(decode(c, CODEC_NONE, (const uint8_t *)"abc", 3, (const uint8_t *)"abc", 3), 0);
    CHECK_EQ(decode(c, CODEC_NONE, (const uint8_t *)"abc", 3, NULL, 2), -EBADMSG);
    CHECK_EQ(decode(c, CODEC_NONE, (const uint8_t *)"abc", 3, NULL, 4), -EBADMSG);
    CHECK_EQ(decode(c, 9, (const uint8_t *)"abc", 3, NULL, 3), -ENOTSUP);
    codec_free(c);
    test_sha256();
    test_tables();
    puts("test_codec: ok");
    return 0;
}
