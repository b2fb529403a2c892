/* A cache that holds chunks as their blob stores them (ID.blob.raw): the same promises as of the plain one, and every read
 * decodes.
 */
#include "store_fixture.h"

#define N 24
#define CHUNK 16384

static const uint32_t CODECS[] = { CODEC_NONE, CODEC_LZ4_BLOCK, CODEC_GZIP, CODEC_ZSTD };

static void read_file(const char *dir, const char *name, uint8_t *buf, size_t len)
{
    char path[300];
    struct stat st;
    int fd;

    snprintf(path, sizeof path, "%s/%s", dir, name);
    fd = open(path, O_RDONLY);
    CHECK(fd >= 0 && !fstat(fd, &st));
    CHECK_EQ(st.st_size, len);
    CHECK(read(fd, buf, len) == (ssize_t)len);
    close(fd);
}

static void flip(const char *dir, const char *name, off_t at)
{
    char path[300];
    uint8_t byte;
    int fd;

    snprintf(path, sizeof path, "%s/%s", dir, name);
    fd = open(path, O_RDWR);
    CHECK(fd >= 0 && pread(fd, &byte, 1, at) == 1);
    byte ^= 0x10;
    CHECK(pwrite(fd, &byte, 1, at) == 1);
    close(fd);
}

static void read_all(const char *dir, struct fix_blob *b, int compressed, uint64_t *fetches, uint64_t *verifies)
{
    struct fix f = { .compressed = compressed };

    fix_up(&f, dir, b, 2);
    fix_check(f.h, b, 0, N * CHUNK - 4096 + 123);
    *verifies = atomic_load(&f.server.verify_jobs);
    *fetches = atomic_load(&f.server.jobs) - *verifies;
    fix_down(&f);
}

/* The file is the blob itself, its map Nydus's; what comes next is there without the network. */
TEST(holds_what_is_stored)
{
    for (size_t k = 0; k < 4; k++) {
        char dir[200];
        struct fix_blob *b = fix_blob_new("blob", CODECS[k], N, CHUNK);
        uint8_t *found = malloc(b->stored_len), map[4096 + (N + 7) / 8];
        uint64_t fetches, verifies;
        struct fix f = { .compressed = 1 };

        fix_dir_make(dir);
        f.server.feed_bytes = k & 1 ? 7 : 100000;
        fix_up(&f, dir, b, 2);
        fix_check(f.h, b, 5 * CHUNK + 17, 30000);
        fix_check(f.h, b, 3, 1);
        fix_check(f.h, b, 0, N * CHUNK - 4096 + 123);
        uint64_t jobs = atomic_load(&f.server.jobs);
        fix_check(f.h, b, 7 * CHUNK + 1, 3 * CHUNK);
        CHECK_EQ(atomic_load(&f.server.jobs), jobs);
        fix_down(&f);
        read_file(dir, "blob.blob.raw", found, b->stored_len);
        CHECK(!memcmp(found, b->stored, b->stored_len));
        read_file(dir, "blob.blob.data.chunk_map", map, sizeof map);
        CHECK(map[4096] == 0xff && map[4097] == 0xff && map[4098] == 0xff);
        read_all(dir, b, 1, &fetches, &verifies);
        CHECK_EQ(fetches + verifies, 0);
        free(found);
        fix_blob_free(b);
        fix_dir_remove(dir);
    }
}

/* After a reboot, and by the bits of a stranger, chunks are verified; a flipped byte is found and fetched again. */
TEST(doubt)
{
    for (size_t k = 0; k < 4; k++) {
        char dir[200];
        struct fix_blob *b = fix_blob_new("blob", CODECS[k], N, CHUNK);
        struct fix f = { .compressed = 1 };
        uint64_t fetches, verifies;

        fix_dir_make(dir);
        read_all(dir, b, 1, &fetches, &verifies);
        flip(dir, ".virtiofsd-nydus/blob.raw.vnd", 16);
        read_all(dir, b, 1, &fetches, &verifies);
        CHECK_EQ(fetches, 0);
        CHECK(verifies > 0);
        flip(dir, "blob.blob.raw", (off_t)(b->chunk[7].coff + b->chunk[7].csize / 2));
        fix_up(&f, dir, b, 1);
        fix_check(f.h, b, 0, (N - 1) * CHUNK);
        CHECK(fix_said(f.e, VND_CAUSE_DIGEST, "chunk 7"));
        CHECK_EQ(atomic_load(&f.server.jobs) - atomic_load(&f.server.verify_jobs), 1);
        fix_down(&f);
        fix_blob_free(b);
        fix_dir_remove(dir);
    }
}

/* Wrong bytes from the server never get into it. */
TEST(wrong_bytes)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { .compressed = 1 };
    uint64_t total;
    uint8_t buf[16];

    fix_dir_make(dir);
    f.server.flip_to = 1 << 30;
    f.server.feed_bytes = 1 << 20;
    fix_up(&f, dir, b, 1);
    CHECK_EQ(fix_read(f.h, b, 0, sizeof buf, buf), -EIO);
    atomic_store(&f.server.flip_to, 0);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    CHECK(vnd_blob_ready(f.h, &total) >= N - 1);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Both kinds in one directory, at the same time, share nothing but the chunk map, whose bits are hints. */
TEST(beside_the_plain_one)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_LZ4_BLOCK, N, CHUNK);
    struct fix f = { .compressed = 1 }, g = { 0 };
    uint64_t fetches, verifies;

    fix_dir_make(dir);
    fix_up(&f, dir, b, 1);
    fix_up(&g, dir, b, 1);
    for (uint32_t i = 0; i + 1 < N; i++) {
        fix_check(i & 1 ? f.h : g.h, b, (uint64_t)i * CHUNK, CHUNK);
        fix_check(i & 1 ? g.h : f.h, b, (uint64_t)i * CHUNK + 9, 100);
    }
    fix_down(&f);
    fix_down(&g);
    for (int compressed = 0; compressed < 2; compressed++) {
        read_all(dir, b, compressed, &fetches, &verifies);
        read_all(dir, b, compressed, &fetches, &verifies);
        CHECK_EQ(fetches + verifies, 0);
    }
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Chunks that share stored bytes would overwrite each other there: kept uncompressed, and said so. */
TEST(unstorable)
{
    char dir[200], path[300];
    struct fix_blob *b = fix_blob_new("blob", CODEC_NONE, N, CHUNK);
    struct fix f = { .compressed = 1 };

    memcpy(b->plain + 5 * CHUNK, b->plain + 4 * CHUNK, CHUNK);
    memcpy(b->chunk[5].digest, b->chunk[4].digest, 32);
    b->chunk[5].coff = b->chunk[4].coff;
    fix_dir_make(dir);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    CHECK(fix_said(f.e, VND_CAUSE_NONE, "kept uncompressed"));
    snprintf(path, sizeof path, "%s/blob.blob.raw", dir);
    CHECK(access(path, F_OK));
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}
