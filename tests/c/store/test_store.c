/* Reads through the store in one process: every codec, misses, hits, hostile extents, contradicting images, errors, what
 * left the page cache. What is fetched when is test_fetch.c's.
 */
#include "store_fixture.h"

TEST(reads_every_codec)
{
    static const uint32_t codecs[] = { CODEC_NONE, CODEC_LZ4_BLOCK, CODEC_GZIP, CODEC_ZSTD };

    for (size_t k = 0; k < 4; k++) {
        char dir[200];
        struct fix f = { 0 };
        struct fix_blob *b = fix_blob_new("blob", codecs[k], 40, 16384);
        fix_dir_make(dir);
        f.server.feed_bytes = k & 1 ? 7 : 100000;
        fix_up(&f, dir, b, 2);
        fix_check(f.h, b, 5 * 16384 + 17, 30000);
        fix_check(f.h, b, 0, 39 * 16384);
        fix_check(f.h, b, 39 * 16384, b->chunk[39].usize);
        uint64_t jobs = atomic_load(&f.server.jobs), total;
        fix_check(f.h, b, 0, 39 * 16384);
        CHECK_EQ(atomic_load(&f.server.jobs), jobs);
        CHECK_EQ(vnd_blob_ready(f.h, &total), 40);
        CHECK_EQ(total, 40);
        fix_down(&f);
        fix_blob_free(b);
        fix_dir_remove(dir);
    }
}

/* A flipped byte in what the server sends: asked for once more; then EIO and one clear line. Never a wrong byte. */
TEST(wrong_bytes)
{
    static const uint32_t codecs[] = { CODEC_NONE, CODEC_LZ4_BLOCK, CODEC_GZIP, CODEC_ZSTD };

    for (size_t k = 0; k < 4; k++) {
        char dir[200];
        struct fix f = { 0 };
        uint8_t buf[4096];
        vnd_stats st;
        struct fix_blob *b = fix_blob_new("blob", codecs[k], 40, 16384);
        fix_dir_make(dir);
        f.server.feed_bytes = 1000000;
        f.server.flip_to = 1;
        fix_up(&f, dir, b, 1);
        fix_check(f.h, b, 0, 39 * 16384);
        CHECK(fix_said(f.e, VND_CAUSE_DIGEST, "once more"));
        CHECK(atomic_load(&f.server.jobs) > 1);
        fix_down(&f);
        fix_dir_remove(dir);

        fix_dir_make(dir);
        memset(&f, 0, sizeof f);
        f.server.flip_to = 1 << 30;
        f.server.feed_bytes = 1000000;
        fix_up(&f, dir, b, 1);
        CHECK_EQ(fix_read(f.h, b, 0, 4096, buf), -EIO);
        CHECK(fix_said(f.e, VND_CAUSE_DIGEST, "readers get EIO"));
        vnd_engine_stats(f.e, &st);
        CHECK_EQ(st.fetched_chunks + st.digest_failures > 0, 1);
        atomic_store(&f.server.flip_to, 0);
        fix_check(f.h, b, 0, 39 * 16384);
        fix_down(&f);
        fix_blob_free(b);
        fix_dir_remove(dir);
    }
}

TEST(server_away)
{
    char dir[200];
    struct fix f = { 0 };
    uint8_t buf[4096];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 40, 16384);

    fix_dir_make(dir);
    fix_up(&f, dir, b, 2);
    fix_check(f.h, b, 0, 4096);
    atomic_store(&f.server.fail_errno, EIO);
    CHECK_EQ(fix_read(f.h, b, 39 * 16384, 4096, buf), -EIO);
    CHECK(fix_said(f.e, VND_CAUSE_NETWORK, "away"));
    fix_check(f.h, b, 0, 4096); /* what is there is served on */
    atomic_store(&f.server.fail_errno, 0);
    fix_check(f.h, b, 39 * 16384, 4096);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

static int64_t read_extent(struct extent x)
{
    uint8_t buf[64];
    struct iovec iov = { buf, sizeof buf };
    struct fix_reader r;
    int64_t rc;

    CHECK(x.len <= sizeof buf);
    fix_reader_init(&r);
    while ((rc = store_read(&r.w, &x, 1, &iov, 1)) == -EINPROGRESS)
        fix_reader_wait(&r);
    return rc;
}

/* Extents that the chunk table does not vouch for: EIO, ready or not, near or far. */
TEST(hostile_extents)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 40, 16384);

    b->hide_from = 30;
    b->hide_to = 32;
    fix_dir_make(dir);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, 20 * 16384);
    struct extent ok = { .blob = f.h, .uoff = 16384 + 8, .chunk = 1, .len = 64, .chunk_off = 8 }, x;
    CHECK_EQ(read_extent(ok), 64);
    x = ok;
    x.chunk = 2;
    CHECK_EQ(read_extent(x), -EIO);
    x = ok;
    x.chunk = 40;
    CHECK_EQ(read_extent(x), -EIO);
    x = ok;
    x.chunk = UINT32_MAX;
    CHECK_EQ(read_extent(x), -EIO);
    x = ok;
    x.uoff = 0;
    CHECK_EQ(read_extent(x), -EIO);
    x = ok;
    x.uoff += 1;
    CHECK_EQ(read_extent(x), -EIO);
    x = ok;
    x.uoff = 30 * 16384;
    x.chunk_off = 29 * 16384;
    CHECK_EQ(read_extent(x), -EIO);
    x = ok;
    x.uoff = 16384 * 2 - 8;
    x.chunk_off = 16384 - 8;
    CHECK_EQ(read_extent(x), -EIO);
    x = ok;
    x.chunk = 30;
    x.uoff = 30 * 16384 + 8;
    CHECK_EQ(read_extent(x), -EIO);
    x = ok;
    x.blob = NULL;
    CHECK_EQ(read_extent(x), 64);
    CHECK(fix_said(f.e, VND_CAUSE_FORMAT, "chunk table"));
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Several extents, holes, scattered memory, chunks out of order. */
TEST(scattered)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_LZ4_BLOCK, 40, 16384);
    struct extent ext[] = {
        { .uoff = 9 * 16384 + 100, .chunk = 9, .len = 5000, .chunk_off = 100 },
        { .len = 3000 },
        { .uoff = 3 * 16384, .chunk = 3, .len = 16384 },
        { .uoff = 4 * 16384, .chunk = 4, .len = 1 },
        { .uoff = 3 * 16384 + 1, .chunk = 3, .len = 7, .chunk_off = 1 },
    };
    uint8_t want[5000 + 3000 + 16385 + 7], buf[2 * sizeof want];
    struct iovec iov[400];
    size_t total = sizeof want, at = 0, k = 0;
    struct fix_reader r;
    int64_t rc;

    memcpy(want, b->plain + 9 * 16384 + 100, 5000);
    memset(want + 5000, 0, 3000);
    memcpy(want + 8000, b->plain + 3 * 16384, 16385);
    memcpy(want + 8000 + 16385, b->plain + 3 * 16384 + 1, 7);
    memset(buf, 0xee, sizeof buf);
    for (size_t left = total; left; k++) { /* pieces with a byte between them that must stay */
        size_t n = left < 70 ? left : 70;
        iov[k] = (struct iovec){ buf + at, n };
        at += n + 1;
        left -= n;
    }
    fix_dir_make(dir);
    fix_up(&f, dir, b, 2);
    ext[0].blob = ext[2].blob = ext[3].blob = ext[4].blob = f.h;
    for (int round = 0; round < 2; round++) {
        fix_reader_init(&r);
        while ((rc = store_read(&r.w, ext, 5, iov, (int)k)) == -EINPROGRESS)
            fix_reader_wait(&r);
        CHECK_EQ(rc, total);
        at = 0;
        for (size_t i = 0; i < k; i++) {
            CHECK(!memcmp(iov[i].iov_base, want + at, iov[i].iov_len));
            at += iov[i].iov_len;
            CHECK_EQ(((uint8_t *)iov[i].iov_base)[iov[i].iov_len], 0xee);
        }
    }
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Two images name one blob id. The second says otherwise of a chunk: each is read by its own table. Images that name
 * different parts agree, and share. */
TEST(contradicting_images)
{
    char dir[200];
    struct fix f = { 0 };
    uint8_t buf[64];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 40, 16384);
    struct fix_blob *evil = fix_blob_new("blob", CODEC_ZSTD, 40, 16384);
    struct fix_blob *part = fix_blob_new("blob", CODEC_ZSTD, 40, 16384);

    part->hide_from = 10;
    part->hide_to = 20;
    evil->chunk[5].digest[0] ^= 1;
    fix_dir_make(dir);
    fix_up(&f, dir, part, 2);
    fix_check(f.h, b, 0, 10 * 16384);
    struct vnd_blob *whole = fix_open(f.s, b), *bad = fix_open(f.s, evil);
    CHECK_EQ(fix_read(bad, evil, 5 * 16384, 64, buf), -EIO);
    fix_check(bad, b, 6 * 16384, 64);
    CHECK(fix_said(f.e, VND_CAUSE_NONE, "chunk 5 differs"));
    fix_check(f.h, b, 0, 10 * 16384);
    fix_check(whole, b, 0, 39 * 16384);
    CHECK(whole->cache == f.h->cache && bad->cache != f.h->cache);
    /* Ready through the other image, but this one does not name it. */
    CHECK_EQ(fix_read(f.h, b, 12 * 16384, 64, buf), -EIO);
    blob_close(bad, NULL);
    blob_close(whole, NULL);
    fix_check(f.h, b, 0, 10 * 16384);
    blob_close(f.h, NULL);
    f.h = fix_open(f.s, evil);
    CHECK_EQ(fix_read(f.h, evil, 5 * 16384, 64, buf), -EIO);
    fix_down(&f);

    /* Once no image uses it the other image may be served, and nothing of before is trusted for it. */
    memset(&f, 0, sizeof f);
    fix_up(&f, dir, evil, 1);
    CHECK_EQ(fix_read(f.h, evil, 5 * 16384, 64, buf), -EIO);
    fix_check(f.h, b, 0, 5 * 16384);
    fix_down(&f);
    memset(&f, 0, sizeof f);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, 39 * 16384);
    fix_down(&f);
    fix_blob_free(b);
    fix_blob_free(evil);
    fix_blob_free(part);
    fix_dir_remove(dir);
}

/* An image that claims 16 million chunks and names forty costs neither time nor memory. */
TEST(claims_many_chunks)
{
    char dir[200], line[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 40, 16384);
    long before = 0, after = 0;
    FILE *status;

    b->info.chunk_count = 1 << 24;
    b->hide_from = 40;
    b->hide_to = 1 << 24;
    fix_dir_make(dir);
    for (int round = 0; round < 2; round++) {
        status = fopen("/proc/self/status", "r");
        while (fgets(line, sizeof line, status))
            sscanf(line, "VmRSS: %ld", round ? &after : &before);
        fclose(status);
        if (round)
            break;
        fix_up(&f, dir, b, 1);
        fix_check(f.h, b, 0, 39 * 16384);
    }
    if (getenv("VERBOSE"))
        fprintf(stderr, "  resident %ld, then %ld KiB\n", before, after);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    CHECK(after - before < 65536);
#endif
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Without digests nothing is served, unless that was asked for. */
TEST(no_digests)
{
    char dir[200], err[VND_ERR_MAX];
    struct fix f = { 0 };
    uint8_t buf[64];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 40, 16384);

    for (int i = 0; i < 40; i++)
        memset(b->chunk[i].digest, 0, 32);
    fix_dir_make(dir);
    fix_up(&f, dir, b, 1);
    CHECK_EQ(fix_read(f.h, b, 0, 64, buf), -EIO);
    CHECK(fix_said(f.e, VND_CAUSE_DIGEST, "--allow-unverified"));
    fix_down(&f);
    vnd_engine_cfg cfg = { .allow_unverified = 1 };
    memset(&f, 0, sizeof f);
    f.e = vnd_engine_new(&cfg);
    f.s = vnd_store_open(f.e, dir, 0, err, sizeof err);
    f.h = fix_open(f.s, b);
    fix_server_start(&f.server, f.e, b, 1);
    fix_check(f.h, b, 0, 39 * 16384);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

TEST(refused_by_name)
{
    char dir[200], err[VND_ERR_MAX];
    struct fix f = { 0 };
    struct failure failure = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 4, 16384);
    vnd_blob_info bad;

    fix_dir_make(dir);
    fix_up(&f, dir, b, 1);
    bad = b->info;
    bad.features |= 0x800;
    CHECK(!blob_open(f.s, &bad, fix_chunks, b, &failure) && strstr(failure.line, "EXTERNAL"));
    CHECK_EQ(failure.cause, VND_CAUSE_FORMAT);
    bad = b->info;
    strcpy(bad.id, "../../etc/passwd");
    CHECK(!blob_open(f.s, &bad, fix_chunks, b, &failure));
    strcpy(bad.id, "");
    CHECK(!blob_open(f.s, &bad, fix_chunks, b, &failure));
    CHECK(!vnd_store_open(f.e, "/nonexistent/dir", 0, err, sizeof err) && strstr(err, "/nonexistent/dir"));
    vnd_store *again = vnd_store_open(f.e, dir, 0, err, sizeof err);
    CHECK(again == f.s);
    vnd_store_free(again);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Ready but not in the page cache: the pool fetches it, the reader never blocks. */
TEST(page_cache_miss)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 40, 16384);
    vnd_stats st;

    fix_dir_make(dir);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, 39 * 16384);
    fdatasync(f.h->cache->data_fd);
    CHECK(!posix_fadvise(f.h->cache->data_fd, 0, 0, POSIX_FADV_DONTNEED));
    fix_check(f.h, b, 0, 39 * 16384);
    vnd_engine_stats(f.e, &st);
    if (!f.h->cache->nowait_missing)
        CHECK(st.pool_reads > 0);

    /* Pages that go faster than the reader comes: it gets the bytes themselves. One that gives up is left in peace. */
    for (int round = 0; round < 20; round++) {
        static uint8_t buf[3 * 16384];
        struct extent ext[4];
        struct iovec iov = { buf, sizeof buf - 5 };
        struct fix_reader r;
        int n = fix_extents(f.h, b, 7 * 16384 + 5, sizeof buf - 5, ext, 4);
        CHECK(!posix_fadvise(f.h->cache->data_fd, 0, 0, POSIX_FADV_DONTNEED));
        memset(buf, 0, sizeof buf);
        fix_reader_init(&r);
        r.w.again = 5;
        int64_t rc = store_read(&r.w, ext, n, &iov, 1);
        if (rc == -EINPROGRESS && round % 2 && store_wait_cancel(&r.w)) {
            CHECK(!r.w.buf);
            continue;
        }
        if (rc == -EINPROGRESS) {
            fix_reader_wait(&r);
            CHECK(r.w.buf);
            rc = store_read(&r.w, ext, n, &iov, 1);
            CHECK(!r.w.buf);
        }
        CHECK_EQ(rc, sizeof buf - 5);
        CHECK(!memcmp(buf, b->plain + 7 * 16384 + 5, sizeof buf - 5));
    }
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}
