/* Reads through the store in one process: every codec, misses, hits, hostile extents, contradicting images, errors,
 * cancellation against wake-ups, prefetch, merge windows.
 */
#include "store_fixture.h"

static const char *under;

static void test_reads_every_codec(void)
{
    static const uint32_t codecs[] = { CODEC_NONE, CODEC_LZ4_BLOCK, CODEC_GZIP, CODEC_ZSTD };

    for (size_t k = 0; k < 4; k++) {
        char dir[200];
        struct fix f = { 0 };
        struct fix_blob *b = fix_blob_new("blob", codecs[k], 40, 16384);
        fix_dir_make(dir, under);
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
static void test_wrong_bytes(void)
{
    static const uint32_t codecs[] = { CODEC_NONE, CODEC_LZ4_BLOCK, CODEC_GZIP, CODEC_ZSTD };

    for (size_t k = 0; k < 4; k++) {
        char dir[200];
        struct fix f = { 0 };
        uint8_t buf[4096];
        vnd_stats st;
        struct fix_blob *b = fix_blob_new("blob", codecs[k], 40, 16384);
        fix_dir_make(dir, under);
        f.server.feed_bytes = 1000000;
        f.server.flip_to = 1;
        fix_up(&f, dir, b, 1);
        fix_check(f.h, b, 0, 39 * 16384);
        CHECK(fix_said(f.e, VND_CAUSE_DIGEST, "once more"));
        CHECK(atomic_load(&f.server.jobs) > 1);
        fix_down(&f);
        fix_dir_remove(dir);

        fix_dir_make(dir, under);
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

static void test_server_away(void)
{
    char dir[200];
    struct fix f = { 0 };
    uint8_t buf[4096];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 40, 16384);

    fix_dir_make(dir, under);
    fix_up(&f, dir, b, 2);
    fix_check(f.h, b, 0, 4096);
    atomic_store(&f.server.fail_errno, EIO);
    CHECK_EQ(fix_read(f.h, b, 39 * 16384, 4096, buf), -EIO);
    CHECK(fix_said(f.e, VND_CAUSE_NETWORK, "away"));
    fix_check(f.h, b, 0, 4096);         /* what is there is served on */
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
static void test_hostile_extents(void)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 40, 16384);

    b->hide_from = 30;
    b->hide_to = 32;
    fix_dir_make(dir, under);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, 20 * 16384);
    struct extent ok = { .blob = f.h, .uoff = 16384 + 8, .chunk = 1, .len = 64, .chunk_off = 8 }, x;
    CHECK_EQ(read_extent(ok), 64);
    x = ok; x.chunk = 2;                                                CHECK_EQ(read_extent(x), -EIO);
    x = ok; x.chunk = 40;                                               CHECK_EQ(read_extent(x), -EIO);
    x = ok; x.chunk = UINT32_MAX;                                       CHECK_EQ(read_extent(x), -EIO);
    x = ok; x.uoff = 0;                                                 CHECK_EQ(read_extent(x), -EIO);
    x = ok; x.uoff += 1;                                                CHECK_EQ(read_extent(x), -EIO);
    x = ok; x.uoff = 30 * 16384; x.chunk_off = 29 * 16384;              CHECK_EQ(read_extent(x), -EIO);
    x = ok; x.uoff = 16384 * 2 - 8; x.chunk_off = 16384 - 8;            CHECK_EQ(read_extent(x), -EIO);
    x = ok; x.chunk = 30; x.uoff = 30 * 16384 + 8;                      CHECK_EQ(read_extent(x), -EIO);
    x = ok; x.blob = NULL;                                              CHECK_EQ(read_extent(x), 64);
    CHECK(fix_said(f.e, VND_CAUSE_FORMAT, "chunk table"));
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Several extents, holes, scattered memory, chunks out of order. */
static void test_scattered(void)
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
    for (size_t left = total; left; k++) {      /* pieces with a byte between them that must stay */
        size_t n = left < 70 ? left : 70;
        iov[k] = (struct iovec){ buf + at, n };
        at += n + 1;
        left -= n;
    }
    fix_dir_make(dir, under);
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

/* Two images name one blob id. The second says otherwise of a chunk: it gets nothing, the first goes on. Images
 * that name different parts agree. */
static void test_contradicting_images(void)
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
    fix_dir_make(dir, under);
    fix_up(&f, dir, part, 2);
    fix_check(f.h, b, 0, 10 * 16384);
    struct vnd_blob *whole = fix_open(f.s, b), *bad = fix_open(f.s, evil);
    CHECK_EQ(fix_read(bad, evil, 0, 64, buf), -EIO);
    CHECK(fix_said(f.e, VND_CAUSE_DIGEST, "chunk 5 differs"));
    fix_check(f.h, b, 0, 10 * 16384);
    fix_check(whole, b, 0, 39 * 16384);
    /* Ready through the other image, but this one does not name it. */
    CHECK_EQ(fix_read(f.h, b, 12 * 16384, 64, buf), -EIO);
    CHECK_EQ(fix_read(bad, evil, 0, 64, buf), -EIO);
    blob_put(bad, NULL);
    blob_put(whole, NULL);
    fix_check(f.h, b, 0, 10 * 16384);
    fix_down(&f);

    /* Also while the second image stays attached: once the first is gone it is served. */
    memset(&f, 0, sizeof f);
    fix_up(&f, dir, b, 2);
    fix_check(f.h, b, 0, 10 * 16384);
    b->chunk[5].digest[1] ^= 1;         /* what the second image says of it */
    bad = fix_open(f.s, b);
    CHECK_EQ(fix_read(bad, b, 0, 64, buf), -EIO);
    blob_put(f.h, NULL);
    f.h = bad;
    for (int64_t until = now_us() + 10000000; fix_read(bad, b, 0, 64, buf) != 64; usleep(50000))
        CHECK(now_us() < until);
    CHECK_EQ(fix_read(bad, b, 5 * 16384, 64, buf), -EIO);
    fix_check(bad, b, 6 * 16384, 64);
    b->chunk[5].digest[1] ^= 1;
    fix_down(&f);

    /* Once nobody uses it the other image may be served, and nothing of before is trusted for it. */
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
static void test_claims_many_chunks(void)
{
    char dir[200], line[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 40, 16384);
    long before = 0, after = 0;
    FILE *status;

    b->info.chunk_count = 1 << 24;
    b->hide_from = 40;
    b->hide_to = 1 << 24;
    fix_dir_make(dir, under);
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
static void test_no_digests(void)
{
    char dir[200], err[VND_ERR_MAX];
    struct fix f = { 0 };
    uint8_t buf[64];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 40, 16384);

    for (int i = 0; i < 40; i++)
        memset(b->chunk[i].digest, 0, 32);
    fix_dir_make(dir, under);
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

static void test_refused_by_name(void)
{
    char dir[200], err[VND_ERR_MAX];
    struct fix f = { 0 };
    int cause;
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 4, 16384);
    vnd_blob_info bad;

    fix_dir_make(dir, under);
    fix_up(&f, dir, b, 1);
    bad = b->info;
    bad.features |= 0x800;
    CHECK(!blob_get(f.s, &bad, fix_chunks, b, &cause, err, sizeof err) && strstr(err, "EXTERNAL"));
    CHECK_EQ(cause, VND_CAUSE_FORMAT);
    bad = b->info;
    strcpy(bad.id, "../../etc/passwd");
    CHECK(!blob_get(f.s, &bad, fix_chunks, b, &cause, err, sizeof err));
    strcpy(bad.id, "");
    CHECK(!blob_get(f.s, &bad, fix_chunks, b, &cause, err, sizeof err));
    CHECK(!vnd_store_open(f.e, "/nonexistent/dir", 0, err, sizeof err) && strstr(err, "/nonexistent/dir"));
    vnd_store *again = vnd_store_open(f.e, dir, 0, err, sizeof err);
    CHECK(again == f.s);
    vnd_store_free(again);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* ---- cancel against wake, from several threads */

struct racer {
    struct fix *f;
    struct fix_blob *b;
    uint32_t seed;
    int cancelled, served;
};

static void *race_run(void *arg)
{
    struct racer *me = arg;
    uint8_t *buf = malloc(3 * 16384);

    for (int i = 0; i < 300; i++) {
        uint64_t off = (uint64_t)(fix_random(&me->seed) % 37) * 16384;
        struct extent ext[8];
        int n = fix_extents(me->f->h, me->b, off, 3 * 16384 - 100, ext, 8);
        struct iovec iov = { buf, 3 * 16384 - 100 };
        struct fix_reader r;
        int64_t rc;
        fix_reader_init(&r);
        r.w.deadline_us = now_us() + 1000000;
        while ((rc = store_read(&r.w, ext, n, &iov, 1)) == -EINPROGRESS) {
            if (fix_random(&me->seed) % 2) {
                if (store_wait_cancel(&r.w)) {
                    me->cancelled++;
                    break;
                }
            }
            fix_reader_wait(&r);
        }
        store_wait_done(&r.w);
        if (rc >= 0) {
            CHECK(!memcmp(buf, me->b->plain + off, iov.iov_len));
            me->served++;
        } else {
            CHECK(rc == -EINPROGRESS || rc == -EIO);
        }
        pthread_mutex_lock(&r.lock);
        CHECK_EQ(r.woken, 0);
        pthread_mutex_unlock(&r.lock);
        if (i % 8 == 0) {           /* take it all away again, so that there is something to wait for */
            pthread_mutex_lock(&me->f->h->cache->lock);
            cachefile_take_away(me->f->h->cache, false);
            pthread_mutex_unlock(&me->f->h->cache->lock);
        }
    }
    free(buf);
    return NULL;
}

static void test_cancel_races(void)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_LZ4_BLOCK, 40, 16384);
    struct racer racer[3];
    pthread_t t[3];
    int served = 0;

    fix_dir_make(dir, under);
    f.server.feed_bytes = 50000;
    fix_up(&f, dir, b, 3);
    fix_check(f.h, b, 0, 1);
    for (int i = 0; i < 3; i++) {
        racer[i] = (struct racer){ .f = &f, .b = b, .seed = (uint32_t)i };
        pthread_create(&t[i], NULL, race_run, &racer[i]);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(t[i], NULL);
        served += racer[i].served;
    }
    CHECK(served > 0);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Shutdown and unmount wake who waits. */
static void test_ends_wake(void)
{
    for (int how = 0; how < 3; how++) {
        char dir[200];
        struct fix f = { 0 };
        struct fix_blob *b = fix_blob_new("blob", CODEC_LZ4_BLOCK, 40, 16384);
        struct fix_reader r;
        struct extent ext[4];
        uint8_t buf[100];
        struct iovec iov = { buf, sizeof buf };
        fix_dir_make(dir, under);
        fix_up(&f, dir, b, 1);
        fix_check(f.h, b, 0, 100);
        atomic_store(&f.server.hold, 1);
        int n = fix_extents(f.h, b, 39 * 16384, 100, ext, 4);
        fix_reader_init(&r);
        CHECK_EQ(store_read(&r.w, ext, n, &iov, 1), -EINPROGRESS);
        struct vnd_blob *other = how == 2 ? fix_open(f.s, b) : NULL;
        if (how == 0) {
            fix_down(&f);
            fix_reader_wait(&r);
            CHECK_EQ(r.w.err, ESHUTDOWN);
        } else {
            CHECK(how == 1 || other);
            if (how == 1) {         /* the last image that names it */
                blob_put(f.h, NULL);
                fix_reader_wait(&r);
                CHECK_EQ(r.w.err, EIO);
            } else {                /* another still does: it is fetched on */
                blob_put(f.h, NULL);
                atomic_store(&f.server.hold, 0);
                fix_reader_wait(&r);
                CHECK_EQ(r.w.err, 0);
                fix_check(other, b, 39 * 16384, 100);
            }
            f.h = how == 2 ? other : fix_open(f.s, b);
            fix_down(&f);
        }
        fix_blob_free(b);
        fix_dir_remove(dir);
    }
}

/* ---- what is fetched together */

static void test_windows(void)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_NONE, 600, 16384);
    struct fix_reader r[8];
    vnd_job job;

    fix_dir_make(dir, under);
    f.server.blob = b;
    fix_up(&f, dir, b, 0);
    fix_load_table(&f);

    fix_park(&f, b, &r[0], 100);                     /* first miss: 256 KiB */
    fix_next_job(&f, &job);
    CHECK_EQ(job.coff, 100 * 16384);
    CHECK_EQ(job.clen, 256 << 10);
    CHECK_EQ(job.prefetch, 0);
    CHECK_EQ(job.chunk_count, 16);
    /* A second reader of a chunk that is being fetched adds no job; one of another chunk does. */
    fix_park(&f, b, &r[1], 110);
    CHECK_EQ(vnd_job_next(f.e, &job, 0, 0), -ETIMEDOUT);
    fix_park(&f, b, &r[2], 90);                      /* stops where the other job begins */
    vnd_job before;
    fix_next_job(&f, &before);
    CHECK_EQ(before.coff, 90 * 16384);
    CHECK_EQ(before.clen, 10 * 16384);
    job.id = before.id - 1;
    vnd_job first = { .id = 0 };
    for (uint64_t id = 0; id < FETCH_SLOTS; id++)
        if (f.e->fetcher->slots[id].id && f.e->fetcher->slots[id].first == 100)
            first.id = f.e->fetcher->slots[id].id;
    first.coff = 100 * 16384;
    first.clen = 256 << 10;
    fix_serve_now(&f, &first);
    fix_reader_wait(&r[0]);
    fix_reader_wait(&r[1]);
    fix_serve_now(&f, &before);
    fix_reader_wait(&r[2]);

    /* Misses that follow each other double the window up to what the image wants; a jump begins anew. */
    fix_park(&f, b, &r[3], 200);
    fix_next_job(&f, &job);
    CHECK_EQ(job.clen, 256 << 10);
    fix_serve_now(&f, &job);
    fix_park(&f, b, &r[3], 216);
    fix_next_job(&f, &job);
    CHECK_EQ(job.clen, 512 << 10);
    fix_serve_now(&f, &job);
    fix_park(&f, b, &r[3], 248);
    fix_next_job(&f, &job);
    CHECK_EQ(job.clen, 1024 << 10);
    fix_serve_now(&f, &job);
    while (vnd_job_next(f.e, &job, 0, 0) == 0)      /* what is ahead of that stream */
        fix_serve_now(&f, &job);
    fix_park(&f, b, &r[3], 460);
    fix_next_job(&f, &job);
    CHECK_EQ(job.clen, 256 << 10);
    fix_serve_now(&f, &job);

    /* Small ready gaps are bridged; they count as waste, 12 % at most. */
    fix_park(&f, b, &r[4], 520);
    fix_next_job(&f, &job);
    fix_serve_now(&f, &job);                            /* 520..535 ready (window 256 KiB) */
    CHECK_EQ(job.clen, 256 << 10);
    fix_park(&f, b, &r[4], 510);
    fix_next_job(&f, &job);
    CHECK_EQ(job.clen, 10 * 16384);                 /* 16 ready ones are no small gap */
    fix_serve_now(&f, &job);

    /* Demand goes before prefetch; prefetch comes in pieces and can be cancelled. */
    CHECK_EQ(vnd_prefetch(f.h, 0, 90, 7), 0);
    fix_park(&f, b, &r[5], 590);
    CHECK_EQ(vnd_job_next(f.e, &job, 1, 1000), 0);
    CHECK_EQ(job.prefetch, 0);
    CHECK_EQ(job.coff, 590 * 16384);
    fix_serve_now(&f, &job);
    CHECK_EQ(vnd_job_next(f.e, &job, 0, 0), -ETIMEDOUT);
    CHECK_EQ(vnd_job_next(f.e, &job, 1, 1000), 0);
    CHECK_EQ(job.prefetch, 1);
    CHECK_EQ(job.coff, 0);
    CHECK(job.clen <= 2 << 20);
    vnd_prefetch_cancel(f.e, 7);
    CHECK_EQ(vnd_job_feed(f.e, job.id, b->stored, 100), -ECANCELED);
    vnd_job_end(f.e, job.id, 0, 0, NULL);
    CHECK_EQ(vnd_job_next(f.e, &job, 1, 0), -ETIMEDOUT);
    CHECK_EQ(vnd_job_feed(f.e, job.id, b->stored, 100), -EINVAL);

    /* A reader that comes to a running prefetch waits for it, and what is behind is put off for other demand. */
    CHECK_EQ(vnd_prefetch(f.h, 0, 90, 8), 0);
    CHECK_EQ(vnd_job_next(f.e, &job, 1, 1000), 0);
    fix_park(&f, b, &r[6], 1);
    fix_park(&f, b, &r[7], 480);
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(vnd_job_feed(f.e, job.id, b->stored + i * 16384, 16384), 1);
        CHECK_EQ(fix_settle(f.e, job.id), 0);
    }
    fix_reader_wait(&r[6]);
    CHECK_EQ(vnd_job_feed(f.e, job.id, b->stored + 2 * 16384, 16384), -ECANCELED);
    vnd_job_end(f.e, job.id, 0, 0, NULL);
    CHECK_EQ(vnd_job_next(f.e, &job, 1, 1000), 0);
    CHECK_EQ(job.coff, 480 * 16384);
    fix_serve_now(&f, &job);
    fix_reader_wait(&r[7]);
    CHECK_EQ(vnd_job_next(f.e, &job, 1, 1000), 0);  /* then the prefetch goes on where it was */
    CHECK_EQ(job.prefetch, 1);
    CHECK_EQ(job.coff, 2 * 16384);
    fix_serve_now(&f, &job);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Demand that nobody waits for any more goes behind demand that somebody does. */
static void test_expired_demand(void)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_NONE, 600, 16384);
    struct fix_reader r[2];
    vnd_job job;
    uint8_t buf[8];
    struct extent x = { .uoff = 100 * 16384, .chunk = 100, .len = 8 };
    struct iovec iov = { buf, 8 };

    fix_dir_make(dir, under);
    f.server.blob = b;
    fix_up(&f, dir, b, 0);
    fix_load_table(&f);
    x.blob = f.h;
    fix_reader_init(&r[0]);
    r[0].w.deadline_us = now_us() - 1;
    CHECK_EQ(store_read(&r[0].w, &x, 1, &iov, 1), -EINPROGRESS);
    CHECK(store_wait_cancel(&r[0].w));
    CHECK(!store_wait_cancel(&r[0].w));
    fix_park(&f, b, &r[1], 300);
    CHECK_EQ(vnd_job_next(f.e, &job, 1, 1000), 0);
    CHECK_EQ(job.coff, 300 * 16384);
    fix_serve_now(&f, &job);
    fix_reader_wait(&r[1]);
    CHECK_EQ(vnd_job_next(f.e, &job, 0, 0), -ETIMEDOUT);
    CHECK_EQ(vnd_job_next(f.e, &job, 1, 1000), 0);
    CHECK_EQ(job.prefetch, 1);
    CHECK_EQ(job.coff, 100 * 16384);
    fix_serve_now(&f, &job);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* A fetch that fails at the deadline of who asked first fails him alone: who came later has time left, and is served by
 * another fetch. */
static void test_late_comers(void)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_NONE, 600, 16384);
    struct fix_reader r[2];
    vnd_job job;
    uint8_t buf[2][8];
    struct extent x = { .uoff = 100 * 16384, .chunk = 100, .len = 8 };

    fix_dir_make(dir, under);
    f.server.blob = b;
    fix_up(&f, dir, b, 0);
    fix_load_table(&f);
    x.blob = f.h;
    for (int i = 0; i < 2; i++) {
        struct iovec iov = { buf[i], 8 };
        fix_reader_init(&r[i]);
        r[i].w.deadline_us = now_us() + (1 + i) * 30000000ll;
        CHECK_EQ(store_read(&r[i].w, &x, 1, &iov, 1), -EINPROGRESS);
    }
    CHECK_EQ(vnd_job_next(f.e, &job, 0, 1000), 0);
    CHECK_EQ(job.deadline_us, r[0].w.deadline_us);
    vnd_job_end(f.e, job.id, EIO, VND_CAUSE_NETWORK, "the server hangs");
    fix_reader_wait(&r[0]);
    CHECK_EQ(r[0].w.err, EIO);
    CHECK_EQ(r[1].woken, 0);
    CHECK_EQ(vnd_job_next(f.e, &job, 0, 1000), 0);
    CHECK_EQ(job.coff, 100 * 16384);
    CHECK_EQ(job.deadline_us, r[1].w.deadline_us);
    fix_serve_now(&f, &job);
    fix_reader_wait(&r[1]);
    CHECK_EQ(r[1].w.err, 0);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Never more than 8 jobs, never more than 6 of them prefetch. */
static void test_slots(void)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_NONE, 2000, 16384);
    struct fix_reader r[10];
    vnd_job job[8], more;

    fix_dir_make(dir, under);
    f.server.blob = b;
    fix_up(&f, dir, b, 0);
    CHECK_EQ(vnd_prefetch(f.h, 0, 0, 1), 0);
    for (int i = 0; i < 6; i++)
        CHECK_EQ(vnd_job_next(f.e, &job[i], 1, 2000), 0);
    CHECK_EQ(vnd_job_next(f.e, &more, 1, 0), -ETIMEDOUT);
    for (int i = 0; i < 3; i++)
        fix_park(&f, b, &r[i], 1500 + (uint32_t)i * 100);
    for (int i = 6; i < 8; i++)
        CHECK_EQ(vnd_job_next(f.e, &job[i], 1, 2000), 0);
    CHECK_EQ(vnd_job_next(f.e, &more, 1, 0), -ETIMEDOUT);
    for (int i = 0; i < 8; i++)
        fix_serve_now(&f, &job[i]);
    CHECK_EQ(vnd_job_next(f.e, &more, 0, 2000), 0);
    fix_serve_now(&f, &more);
    for (int i = 0; i < 3; i++)
        fix_reader_wait(&r[i]);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* The job seam is robust against its caller. */
static void test_seam_misuse(void)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 40, 16384);
    struct fix_reader r;
    vnd_job job;
    vnd_chunk_view v[4];

    fix_dir_make(dir, under);
    f.server.blob = b;
    fix_up(&f, dir, b, 0);
    CHECK_EQ(vnd_job_next(f.e, &job, 1, 0), -ETIMEDOUT);
    CHECK_EQ(vnd_job_feed(f.e, 0, b->stored, 1), -EINVAL);
    CHECK_EQ(vnd_job_feed(f.e, 12345, b->stored, 1), -EINVAL);
    CHECK_EQ(vnd_job_commit(f.e, 12345, NULL, 1), -EINVAL);
    vnd_job_end(f.e, 12345, 0, 0, NULL);
    fix_load_table(&f);
    fix_park(&f, b, &r, 0);
    fix_next_job(&f, &job);
    CHECK_EQ(vnd_job_commit(f.e, job.id, NULL, 1), -EINVAL);
    CHECK_EQ(vnd_job_chunks(f.e, job.id, v, 4), 0);
    CHECK_EQ(vnd_job_feed(f.e, job.id, b->stored, job.clen + 1), -EINVAL);
    CHECK_EQ(vnd_job_feed(f.e, job.id, b->stored, job.clen), job.chunk_count);
    CHECK_EQ(vnd_job_feed(f.e, job.id, b->stored, 1), -EINVAL);
    CHECK_EQ(vnd_job_chunks(f.e, job.id, v, 4), 4);
    CHECK_EQ(v[3].chunk_index, 3);
    CHECK(!memcmp(v[3].data, b->plain + 3 * 16384, 16384));
    CHECK_EQ(vnd_job_commit(f.e, job.id, NULL, 3), 3);
    vnd_job_end(f.e, job.id, 0, 0, NULL);   /* the rest was never committed: only who waits is served again */
    fix_reader_wait(&r);
    CHECK_EQ(vnd_job_next(f.e, &job, 1, 0), -ETIMEDOUT);
    /* Ended over and over without a byte: the reader gets EIO in the end, not an endless loop. */
    fix_park(&f, b, &r, 30);
    for (int i = 0; i < 10 && vnd_job_next(f.e, &job, 1, 0) == 0; i++)
        vnd_job_end(f.e, job.id, 0, 0, NULL);
    fix_reader_wait(&r);
    CHECK_EQ(r.w.err, EIO);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Ready but not in the page cache: the pool fetches it, the reader never blocks. */
static void test_page_cache_miss(void)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 40, 16384);
    vnd_stats st;

    fix_dir_make(dir, under);
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

int main(int argc, char **argv)
{
    under = argc > 1 ? argv[1] : getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";
    test_reads_every_codec();
    test_wrong_bytes();
    test_server_away();
    test_hostile_extents();
    test_scattered();
    test_contradicting_images();
    test_claims_many_chunks();
    test_no_digests();
    test_refused_by_name();
    test_cancel_races();
    test_ends_wake();
    test_windows();
    test_expired_demand();
    test_late_comers();
    test_slots();
    test_seam_misuse();
    test_page_cache_miss();
    puts("test_store: ok");
    return 0;
}
