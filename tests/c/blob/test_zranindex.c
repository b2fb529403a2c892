/* The index of a gzip stream that a writer makes: contexts that a reader can start from. */
#include "check.h"
#include "vnd.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#define CHUNK 65536u
#define PLAIN_BYTES (5u << 20)

static uint32_t seed = 7;

static uint32_t next_random(void)
{
    seed = seed * 1664525u + 1013904223u;
    return seed >> 8;
}

static uint8_t *make_plain(void)
{
    uint8_t *plain = malloc(PLAIN_BYTES);

    for (uint32_t i = 0; i < PLAIN_BYTES; i++) {
        /* text-like, with a stretch that cannot be compressed: blocks of every kind */
        plain[i] = (uint8_t)(i / CHUNK % 8 == 3 ? next_random() : (uint32_t)"etaoin shrdlu"[next_random() % 13]);
    }
    return plain;
}

static size_t pack(const uint8_t *plain, size_t len, uint8_t *out, size_t room)
{
    z_stream z = { 0 };
    size_t size;

    CHECK(deflateInit2(&z, 6, Z_DEFLATED, 31, 8, Z_DEFAULT_STRATEGY) == Z_OK);
    z.next_in = (uint8_t *)(uintptr_t)plain;
    z.avail_in = (uInt)len;
    z.next_out = out;
    z.avail_out = (uInt)room;
    CHECK(deflate(&z, Z_FINISH) == Z_STREAM_END);
    size = room - z.avail_out;
    deflateEnd(&z);
    return size;
}

/* Reads len bytes in order; 0 or the error. Gives the decoder its input in pieces. */
static int64_t read_all(vnd_zran *z, const uint8_t *gz, size_t gz_len, size_t *at, uint8_t *out, size_t len)
{
    size_t have = 0, used, piece;
    int64_t got;

    while (have < len) {
        if (*at == gz_len)
            return -ENODATA;
        piece = gz_len - *at < 10007 ? gz_len - *at : 10007;
        got = vnd_zran_read(z, gz + *at, piece, &used, out + have, len - have);
        if (got < 0)
            return got;
        *at += used;
        have += (size_t)got;
    }
    return 0;
}

static uint64_t get_le(const uint8_t *at, int bytes)
{
    uint64_t value = 0;

    while (bytes--)
        value = value << 8 | at[bytes];
    return value;
}

static void check_context(const uint8_t *c, const uint8_t *dict, const uint8_t *gz, const uint8_t *plain)
{
    uint64_t in_off = get_le(c, 8), out_off = get_le(c + 8, 8);
    uint32_t in_len = (uint32_t)get_le(c + 24, 4), out_len = (uint32_t)get_le(c + 28, 4);
    uint32_t dict_len = (uint32_t)get_le(c + 32, 4);
    uint8_t *out = malloc(out_len);
    z_stream z = { 0 };

    CHECK(inflateInit2(&z, -15) == Z_OK);
    if (c[37])
        CHECK(inflatePrime(&z, c[37], c[36] >> (8 - c[37])) == Z_OK);
    if (dict_len)
        CHECK(inflateSetDictionary(&z, dict + get_le(c + 16, 8), dict_len) == Z_OK);
    z.next_in = (uint8_t *)(uintptr_t)(gz + in_off);
    z.avail_in = in_len;
    z.next_out = out;
    z.avail_out = out_len;
    inflate(&z, Z_SYNC_FLUSH);
    CHECK(z.avail_out == 0);
    CHECK(memcmp(out, plain + out_off, out_len) == 0);
    inflateEnd(&z);
    free(out);
}

#define WINDOWS_MAX (64u * 32768)

TEST(index)
{
    uint8_t *plain = make_plain(), *gz = malloc(PLAIN_BYTES + 4096), *out = malloc(CHUNK), *table;
    size_t gz_len = pack(plain, PLAIN_BYTES, gz, PLAIN_BYTES + 4096), at = 0;
    vnd_zran *z = vnd_zran_new(CHUNK);
    uint8_t *windows = malloc(WINDOWS_MAX);
    uint64_t in_off, slice, need;
    size_t windows_len = 0;
    uint32_t count, len;
    int64_t known = 0;

    CHECK(vnd_zran_begin_chunk(z, &in_off, &slice) == -EINVAL); /* nothing read: no boundary yet */
    CHECK(vnd_zran_end_chunk(z, &in_off) == -EINVAL);
    CHECK(read_all(z, gz, gz_len, &at, out, 512) == 0);
    for (uint32_t pos = 512; pos + CHUNK <= PLAIN_BYTES; pos += CHUNK) {
        int64_t context = vnd_zran_begin_chunk(z, &in_off, &slice);
        const uint8_t *window = vnd_zran_window(z, &len);

        CHECK(context == known || context == known - 1);
        if (context == known) {
            CHECK(windows_len + len <= WINDOWS_MAX);
            memcpy(windows + windows_len, window, len);
            windows_len += len;
            known++;
        }
        CHECK(read_all(z, gz, gz_len, &at, out, CHUNK) == 0);
        CHECK(memcmp(out, plain + pos, CHUNK) == 0);
        CHECK(vnd_zran_end_chunk(z, &in_off) == 0 && in_off <= gz_len);
    }
    need = vnd_zran_table(z, NULL, 0, &count);
    CHECK(count > 3 && count == known && need == 40ull * count);
    table = malloc(need);
    CHECK(vnd_zran_table(z, table, need, &count) == need);
    for (uint32_t i = 0; i < count; i++)
        check_context(table + 40 * i, windows, gz, plain);
    vnd_zran_free(z);
    free(windows);
    free(table);
    free(out);
    free(gz);
    free(plain);
}

/* Damage anywhere ends in an error or in other bytes, never in worse. */
TEST(damage)
{
    uint32_t len = 200000;
    uint8_t *plain = make_plain(), *gz = malloc(len + 4096), *out = malloc(len);
    size_t gz_len = pack(plain, len, gz, len + 4096);

    for (int round = 0; round < 200; round++) {
        size_t hit = next_random() % gz_len, at = 0;
        uint8_t old = gz[hit];
        vnd_zran *z = vnd_zran_new(4096);
        uint64_t in_off, slice;

        gz[hit] ^= (uint8_t)(1 + next_random() % 255);
        for (size_t pos = 0; pos < len; pos += 4096) {
            vnd_zran_begin_chunk(z, &in_off, &slice);
            if (read_all(z, gz, gz_len, &at, out, 4096))
                break;
            vnd_zran_end_chunk(z, &in_off);
        }
        gz[hit] = old;
        vnd_zran_free(z);
    }
    free(out);
    free(gz);
    free(plain);
}
