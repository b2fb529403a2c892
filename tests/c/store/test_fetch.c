/* Who waits for chunks, and what is fetched for them: cancellation against wake-ups, ends, merge windows, deadlines, slots,
 * and a seam that is used wrongly.
 */
#include "store_fixture.h"

static const char *under;

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
        if (i % 8 == 0) { /* take it all away again, so that there is something to wait for */
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
            if (how == 1) { /* the last image that names it */
                blob_put(f.h, NULL);
                fix_reader_wait(&r);
                CHECK_EQ(r.w.err, EIO);
            } else { /* another still does: it is fetched on */
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

    fix_park(&f, b, &r[0], 100); /* first miss: 256 KiB */
    fix_next_job(&f, &job);
    CHECK_EQ(job.coff, 100 * 16384);
    CHECK_EQ(job.clen, 256 << 10);
    CHECK_EQ(job.prefetch, 0);
    CHECK_EQ(job.chunk_count, 16);
    /* A second reader of a chunk that is being fetched adds no job; one of another chunk does. */
    fix_park(&f, b, &r[1], 110);
    CHECK_EQ(vnd_job_next(f.e, &job, 0, 0), -ETIMEDOUT);
    fix_park(&f, b, &r[2], 90); /* stops where the other job begins */
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
    while (vnd_job_next(f.e, &job, 0, 0) == 0) /* what is ahead of that stream */
        fix_serve_now(&f, &job);
    fix_park(&f, b, &r[3], 460);
    fix_next_job(&f, &job);
    CHECK_EQ(job.clen, 256 << 10);
    fix_serve_now(&f, &job);

    /* Small ready gaps are bridged; they count as waste, 12 % at most. */
    fix_park(&f, b, &r[4], 520);
    fix_next_job(&f, &job);
    fix_serve_now(&f, &job); /* 520..535 ready (window 256 KiB) */
    CHECK_EQ(job.clen, 256 << 10);
    fix_park(&f, b, &r[4], 510);
    fix_next_job(&f, &job);
    CHECK_EQ(job.clen, 10 * 16384); /* 16 ready ones are no small gap */
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
    CHECK_EQ(vnd_job_next(f.e, &job, 1, 1000), 0); /* then the prefetch goes on where it was */
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
    vnd_job_end(f.e, job.id, 0, 0, NULL); /* the rest was never committed: only who waits is served again */
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

int main(int argc, char **argv)
{
    under = argc > 1 ? argv[1] : getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";
    test_cancel_races();
    test_ends_wake();
    test_windows();
    test_expired_demand();
    test_late_comers();
    test_slots();
    test_seam_misuse();
    puts("test_fetch: ok");
    return 0;
}
