/* Who waits for chunks, and what is fetched for them: cancellation against wake-ups, ends, merge windows, deadlines, slots,
 * and a seam that is used wrongly.
 */
#include "store_fixture.h"

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
            cachefile_invalidate(me->f->h->cache, false);
            pthread_mutex_unlock(&me->f->h->cache->lock);
        }
    }
    free(buf);
    return NULL;
}

TEST(cancel_races)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_LZ4_BLOCK, 40, 16384);
    struct racer racer[3];
    pthread_t t[3];
    int served = 0;

    fix_dir_make(dir);
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

/* A blob with one reader parked on its last chunk, behind a server that is held. */
struct parked {
    char dir[200];
    struct fix f;
    struct fix_blob *b;
    struct fix_reader r;
};

static void park_one(struct parked *p)
{
    memset(p, 0, sizeof *p);
    p->b = fix_blob_new("blob", CODEC_LZ4_BLOCK, 40, 16384);
    fix_dir_make(p->dir);
    fix_up(&p->f, p->dir, p->b, 1);
    fix_check(p->f.h, p->b, 0, 100);
    atomic_store(&p->f.server.hold, 1);
    fix_park(&p->f, p->b, &p->r, 39);
}

static void parked_free(struct parked *p)
{
    fix_blob_free(p->b);
    fix_dir_remove(p->dir);
}

TEST(shutdown_wakes_who_waits)
{
    struct parked p;

    park_one(&p);
    fix_down(&p.f);
    fix_reader_wait(&p.r);
    CHECK_EQ(p.r.w.err, ESHUTDOWN);
    parked_free(&p);
}

TEST(last_image_that_names_a_blob_wakes_who_waits)
{
    struct parked p;

    park_one(&p);
    blob_close(p.f.h, NULL);
    fix_reader_wait(&p.r);
    CHECK_EQ(p.r.w.err, EIO);
    p.f.h = fix_open(p.f.s, p.b);
    fix_down(&p.f);
    parked_free(&p);
}

TEST(image_that_leaves_lets_another_be_fetched_on)
{
    struct parked p;
    struct vnd_blob *other;

    park_one(&p);
    other = fix_open(p.f.s, p.b);
    blob_close(p.f.h, NULL);
    atomic_store(&p.f.server.hold, 0);
    fix_reader_wait(&p.r);
    CHECK_EQ(p.r.w.err, 0);
    fix_check(other, p.b, 39 * 16384, 100);
    p.f.h = other;
    fix_down(&p.f);
    parked_free(&p);
}

/* ---- what is fetched together */

/* 600 chunks of 16 KiB that a case serves by hand: no server thread takes a job. */
struct by_hand {
    char dir[200];
    struct fix f;
    struct fix_blob *b;
};

static void hand_up(struct by_hand *h)
{
    memset(h, 0, sizeof *h);
    h->b = fix_blob_new("blob", CODEC_NONE, 600, 16384);
    fix_dir_make(h->dir);
    h->f.server.blob = h->b;
    fix_up(&h->f, h->dir, h->b, 0);
    fix_load_table(&h->f);
}

static void hand_down(struct by_hand *h)
{
    fix_down(&h->f);
    fix_blob_free(h->b);
    fix_dir_remove(h->dir);
}

/* Parks r on the chunk; the job that this makes must begin there and have wanted_bytes. */
static void miss(struct by_hand *h, struct fix_reader *r, uint32_t chunk, uint32_t wanted_bytes, vnd_job *job)
{
    fix_park(&h->f, h->b, r, chunk);
    fix_next_job(&h->f, job);
    CHECK_EQ(job->coff, chunk * 16384);
    CHECK_EQ(job->clen, wanted_bytes);
}

TEST(first_miss_fetches_256_kib)
{
    struct by_hand h;
    struct fix_reader r;
    vnd_job job;

    hand_up(&h);
    miss(&h, &r, 100, 256 << 10, &job);
    CHECK_EQ(job.prefetch, 0);
    CHECK_EQ(job.chunk_count, 16);
    fix_serve_now(&h.f, &job);
    fix_reader_wait(&r);
    hand_down(&h);
}

TEST(second_reader_of_a_chunk_under_way_adds_no_job)
{
    struct by_hand h;
    struct fix_reader r[2];
    vnd_job job, none;

    hand_up(&h);
    miss(&h, &r[0], 100, 256 << 10, &job);
    fix_park(&h.f, h.b, &r[1], 110);
    CHECK_EQ(vnd_job_next(h.f.e, &none, 0, 0), -ETIMEDOUT);
    fix_serve_now(&h.f, &job);
    fix_reader_wait(&r[0]);
    fix_reader_wait(&r[1]);
    hand_down(&h);
}

TEST(window_stops_where_another_job_begins)
{
    struct by_hand h;
    struct fix_reader r[2];
    vnd_job first, before;

    hand_up(&h);
    miss(&h, &r[0], 100, 256 << 10, &first);
    miss(&h, &r[1], 90, 10 * 16384, &before);
    fix_serve_now(&h.f, &first);
    fix_reader_wait(&r[0]);
    fix_serve_now(&h.f, &before);
    fix_reader_wait(&r[1]);
    hand_down(&h);
}

/* Misses that follow each other double the window up to what the image wants; a jump begins anew. */
TEST(window_doubles_for_misses_in_order)
{
    static const struct {
        uint32_t chunk, wanted_bytes;
    } misses[] = { { 200, 256 << 10 }, { 216, 512 << 10 }, { 248, 1024 << 10 } };
    struct by_hand h;
    struct fix_reader r;
    vnd_job job;

    hand_up(&h);
    for (size_t i = 0; i < sizeof misses / sizeof *misses; i++) {
        miss(&h, &r, misses[i].chunk, misses[i].wanted_bytes, &job);
        fix_serve_now(&h.f, &job);
    }
    while (vnd_job_next(h.f.e, &job, 0, 0) == 0) /* what is ahead of that stream */
        fix_serve_now(&h.f, &job);
    miss(&h, &r, 460, 256 << 10, &job);
    fix_serve_now(&h.f, &job);
    hand_down(&h);
}

/* Small ready gaps are bridged; they count as waste, 12 % at most. Sixteen ready chunks are no small gap. */
TEST(window_stops_at_a_large_ready_gap)
{
    struct by_hand h;
    struct fix_reader r;
    vnd_job job;

    hand_up(&h);
    miss(&h, &r, 520, 256 << 10, &job);
    fix_serve_now(&h.f, &job); /* 520..535 are ready */
    miss(&h, &r, 510, 10 * 16384, &job);
    fix_serve_now(&h.f, &job);
    hand_down(&h);
}

TEST(demand_goes_before_prefetch)
{
    struct by_hand h;
    struct fix_reader r;
    vnd_job job;

    hand_up(&h);
    CHECK_EQ(vnd_prefetch(h.f.h, 0, 90, 7), 0);
    fix_park(&h.f, h.b, &r, 590);
    CHECK_EQ(vnd_job_next(h.f.e, &job, 1, 1000), 0);
    CHECK_EQ(job.prefetch, 0);
    CHECK_EQ(job.coff, 590 * 16384);
    fix_serve_now(&h.f, &job);
    CHECK_EQ(vnd_job_next(h.f.e, &job, 0, 0), -ETIMEDOUT);
    CHECK_EQ(vnd_job_next(h.f.e, &job, 1, 1000), 0);
    CHECK_EQ(job.prefetch, 1);
    CHECK_EQ(job.coff, 0);
    CHECK(job.clen <= 2 << 20);
    fix_serve_now(&h.f, &job);
    hand_down(&h);
}

TEST(cancelled_prefetch_ends_in_the_middle_of_a_job)
{
    struct by_hand h;
    vnd_job job;

    hand_up(&h);
    CHECK_EQ(vnd_prefetch(h.f.h, 0, 90, 7), 0);
    CHECK_EQ(vnd_job_next(h.f.e, &job, 1, 1000), 0);
    vnd_prefetch_cancel(h.f.e, 7);
    CHECK_EQ(vnd_job_feed(h.f.e, job.id, h.b->stored, 100), -ECANCELED);
    vnd_job_end(h.f.e, job.id, 0, 0, NULL);
    CHECK_EQ(vnd_job_next(h.f.e, &job, 1, 0), -ETIMEDOUT);
    CHECK_EQ(vnd_job_feed(h.f.e, job.id, h.b->stored, 100), -EINVAL);
    hand_down(&h);
}

/* A reader that comes to a running prefetch waits for it, and what is behind is put off for other demand. */
TEST(prefetch_that_a_reader_waits_for_yields_to_other_demand)
{
    struct by_hand h;
    struct fix_reader in_prefetch, elsewhere;
    vnd_job job;

    hand_up(&h);
    CHECK_EQ(vnd_prefetch(h.f.h, 0, 90, 8), 0);
    CHECK_EQ(vnd_job_next(h.f.e, &job, 1, 1000), 0);
    fix_park(&h.f, h.b, &in_prefetch, 1);
    fix_park(&h.f, h.b, &elsewhere, 480);
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(vnd_job_feed(h.f.e, job.id, h.b->stored + i * 16384, 16384), 1);
        CHECK_EQ(fix_flush(h.f.e, job.id), 0);
    }
    fix_reader_wait(&in_prefetch);
    CHECK_EQ(vnd_job_feed(h.f.e, job.id, h.b->stored + 2 * 16384, 16384), -ECANCELED);
    vnd_job_end(h.f.e, job.id, 0, 0, NULL);
    CHECK_EQ(vnd_job_next(h.f.e, &job, 1, 1000), 0);
    CHECK_EQ(job.coff, 480 * 16384);
    fix_serve_now(&h.f, &job);
    fix_reader_wait(&elsewhere);
    CHECK_EQ(vnd_job_next(h.f.e, &job, 1, 1000), 0); /* then the prefetch goes on where it was */
    CHECK_EQ(job.prefetch, 1);
    CHECK_EQ(job.coff, 2 * 16384);
    fix_serve_now(&h.f, &job);
    hand_down(&h);
}

/* Demand that no reader waits for any more goes behind demand that one waits for. */
TEST(expired_demand)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_NONE, 600, 16384);
    struct fix_reader r[2];
    vnd_job job;
    uint8_t buf[8];
    struct extent x = { .uoff = 100 * 16384, .chunk = 100, .len = 8 };
    struct iovec iov = { buf, 8 };

    fix_dir_make(dir);
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

/* A fetch that ends at the deadline of who asked first is tried again for who came later. */
TEST(late_comers)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_NONE, 600, 16384);
    struct fix_reader r[2];
    vnd_job job;
    uint8_t buf[2][8];
    struct extent x = { .uoff = 100 * 16384, .chunk = 100, .len = 8 };

    fix_dir_make(dir);
    f.server.blob = b;
    fix_up(&f, dir, b, 0);
    fix_load_table(&f);
    x.blob = f.h;
    for (int i = 0; i < 2; i++) {
        struct iovec iov = { buf[i], 8 };
        fix_reader_init(&r[i]);
        r[i].w.deadline_us = now_us() + i * 30000000ll; /* the first one's is now */
        CHECK_EQ(store_read(&r[i].w, &x, 1, &iov, 1), -EINPROGRESS);
    }
    CHECK_EQ(vnd_job_next(f.e, &job, 0, 1000), 0);
    CHECK_EQ(job.deadline_us, r[0].w.deadline_us);
    CHECK(store_wait_expire(&r[0].w, f.e, "guest read", 30000));
    vnd_job_retry(f.e, job.id, 0, 0, VND_CAUSE_NETWORK, "the server hangs");
    CHECK_EQ(r[0].woken, 0);
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
TEST(slots)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_NONE, 2000, 16384);
    struct fix_reader r[10];
    vnd_job job[8], more;

    fix_dir_make(dir);
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
TEST(seam_misuse)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, 40, 16384);
    struct fix_reader r;
    vnd_job job;
    vnd_chunk_view v[4];

    fix_dir_make(dir);
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
