/* Every codec: good, truncated, too long, too short, flipped, garbage. Nothing is written past the stated
 * length. */
#include "store_fixture.h"

#define PLAIN 70000

static struct codec *c;

BEFORE_EACH
{
    c = codec_new();
}

AFTER_EACH
{
    codec_free(c);
}

static void fill(uint8_t *p, size_t n)
{
    uint32_t seed = 3;

    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)(i % 5 ? 'x' : fix_random(&seed));
}

/* Decodes from and into buffers of the exact sizes, so that the sanitizer sees a byte too many. */
static int decode(uint32_t id, const uint8_t *src, size_t n, const uint8_t *want, size_t want_len)
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

static void check_good_and_cut(uint32_t id)
{
    static uint8_t plain[PLAIN], packed[2 * PLAIN];
    size_t n;

    fill(plain, PLAIN);
    n = fix_compress(id, plain, PLAIN, packed, sizeof packed);
    CHECK_EQ(decode(id, packed, n, plain, PLAIN), 0);
    CHECK_EQ(decode(id, packed, n, NULL, PLAIN - 1), -EBADMSG);
    CHECK_EQ(decode(id, packed, n, NULL, PLAIN + 1), -EBADMSG);
    CHECK_EQ(decode(id, packed, n, NULL, 0), -EBADMSG);
    CHECK_EQ(decode(id, packed, 0, NULL, PLAIN), -EBADMSG);
    for (size_t cut = 1; cut < n; cut += 1 + n / 97)
        CHECK_EQ(decode(id, packed, n - cut, NULL, PLAIN), -EBADMSG);
}

/* A flipped bit may decode to other bytes: the digest finds that. The decoder must not crash, and its state must survive. */
static void check_flips_and_junk(uint32_t id)
{
    static uint8_t plain[PLAIN], packed[2 * PLAIN];
    size_t n;
    uint32_t seed = id + 1;

    fill(plain, PLAIN);
    n = fix_compress(id, plain, PLAIN, packed, sizeof packed);
    for (int i = 0; i < 200; i++) {
        size_t at = fix_random(&seed) % n;
        packed[at] ^= (uint8_t)(1 << (i % 8));
        int rc = decode(id, packed, n, NULL, PLAIN);
        CHECK(rc == 0 || rc == -EBADMSG);
        packed[at] ^= (uint8_t)(1 << (i % 8));
    }
    CHECK_EQ(decode(id, packed, n, plain, PLAIN), 0);
    for (int i = 0; i < 200; i++) {
        uint8_t junk[300];
        for (size_t k = 0; k < sizeof junk; k++)
            junk[k] = (uint8_t)fix_random(&seed);
        CHECK_EQ(decode(id, junk, sizeof junk, NULL, 5000), -EBADMSG);
    }
}

TEST(lz4_good_and_cut)
{
    check_good_and_cut(CODEC_LZ4_BLOCK);
}

TEST(gzip_good_and_cut)
{
    check_good_and_cut(CODEC_GZIP);
}

TEST(zstd_good_and_cut)
{
    check_good_and_cut(CODEC_ZSTD);
}

TEST(lz4_flips_and_junk)
{
    check_flips_and_junk(CODEC_LZ4_BLOCK);
}

TEST(gzip_flips_and_junk)
{
    check_flips_and_junk(CODEC_GZIP);
}

TEST(zstd_flips_and_junk)
{
    check_flips_and_junk(CODEC_ZSTD);
}

TEST(stored_bytes_must_be_of_the_stated_length)
{
    const uint8_t *abc = (const uint8_t *)"abc";

    CHECK_EQ(decode(CODEC_NONE, abc, 3, abc, 3), 0);
    CHECK_EQ(decode(CODEC_NONE, abc, 3, NULL, 2), -EBADMSG);
    CHECK_EQ(decode(CODEC_NONE, abc, 3, NULL, 4), -EBADMSG);
}

TEST(unknown_codec_is_refused)
{
    CHECK_EQ(decode(9, (const uint8_t *)"abc", 3, NULL, 3), -ENOTSUP);
}

/* What follows a gzip member is passed over, as nydusd does; it does not continue it. */
TEST(bytes_after_a_gzip_member_are_passed_over)
{
    static uint8_t plain[PLAIN], packed[2 * PLAIN];
    size_t n, more;

    fill(plain, PLAIN);
    n = fix_compress(CODEC_GZIP, plain, PLAIN / 2, packed, sizeof packed);
    more = fix_compress(CODEC_GZIP, plain + PLAIN / 2, PLAIN / 2, packed + n, sizeof packed - n);
    CHECK_EQ(decode(CODEC_GZIP, packed, n + more, plain, PLAIN / 2), 0);
    CHECK_EQ(decode(CODEC_GZIP, packed, n + more, NULL, PLAIN), -EBADMSG);
    memset(packed + n, 0xa5, more);
    CHECK_EQ(decode(CODEC_GZIP, packed, n + more, plain, PLAIN / 2), 0);
}

TEST(sha256)
{
    static const uint8_t abc[32] = {
        0xba, 0x78, 0x16, 0xbf, 0x8f, 0x01, 0xcf, 0xea, 0x41, 0x41, 0x40, 0xde, 0x5d, 0xae, 0x22, 0x23,
        0xb0, 0x03, 0x61, 0xa3, 0x96, 0x17, 0x7a, 0x9c, 0xb4, 0x10, 0xff, 0x61, 0xf2, 0x00, 0x15, 0xad,
    };
    uint8_t out[32];

    CHECK_EQ(codec_sha256("abc", 3, out), 0);
    CHECK(!memcmp(out, abc, 32));
}
