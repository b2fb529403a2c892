/* Sources and sessions: how they share the fetch slots, and what becomes of a fetch that fails in a way that may pass. Jobs
 * are taken by hand: no case depends on how fast anything is.
 */
#include "store_fixture.h"

#define CHUNK 16384u
#define APART 2u /* of chunks that readers want: neighbours would come with one job */
#define BLOBS 40
#define FAR_US 3600000000ll /* later than any test waits */

static struct {
    char dir[200];
    struct fix f;
    struct fix_blob *data;        /* the bytes of all blobs */
    struct vnd_blob *blob[BLOBS]; /* of source number + 1 each, with an id of its own */
    struct fix_reader reader[600];
    int readers;
} t;

static struct vnd_blob *open_blob(uint32_t number)
{
    snprintf(t.data->info.id, sizeof t.data->info.id, "blob%u", number);
    struct vnd_blob *b = fix_open(t.f.s, t.data);
    vnd_blob_set_source(b, number + 1);
    vnd_blob_set_amplify(b, 0); /* a job is a chunk */
    fix_load_blob(b);
    return b;
}

BEFORE_EACH
{
    fix_dir_make(t.dir);
    t.data = fix_blob_new("blob", CODEC_NONE, 400, CHUNK);
    t.f.server.blob = t.data;
    fix_up(&t.f, t.dir, t.data, 0);
    for (uint32_t i = 0; i < 2; i++)
        t.blob[i] = open_blob(i);
}

AFTER_EACH
{
    vnd_engine_shutdown(t.f.e);
    for (int i = 0; i < BLOBS; i++)
        if (t.blob[i])
            blob_close(t.blob[i], NULL);
    fix_down(&t.f);
    fix_blob_free(t.data);
    fix_dir_remove(t.dir);
}

/* A reader of a chunk, in a session; deadline_us 0: the engine's own. Here and below place counts every other chunk. */
static struct fix_reader *park(uint32_t blob, uintptr_t session, uint32_t place, int64_t deadline_us)
{
    uint32_t chunk = place * APART;
    static uint8_t buf[8];
    struct extent x = { .blob = t.blob[blob], .uoff = (uint64_t)chunk * CHUNK, .chunk = chunk, .len = 8 };
    struct iovec iov = { buf, 8 };
    struct fix_reader *r = &t.reader[t.readers++];

    fix_reader_init(r);
    r->w.session = session;
    r->w.deadline_us = deadline_us ? deadline_us : now_us() + FAR_US;
    CHECK_EQ(store_read(&r->w, &x, 1, &iov, 1), -EINPROGRESS);
    return r;
}

static bool next(vnd_job *job)
{
    return vnd_job_next(t.f.e, job, 1, 0) == 0;
}

static uint32_t place_of(const vnd_job *job)
{
    return (uint32_t)(job->coff / CHUNK / APART);
}

/* The next job is of this blob and place. */
static uint64_t expect(uint32_t blob, uint32_t place)
{
    vnd_job job = { .id = 0 };

    CHECK(next(&job));
    CHECK(job.blob == t.blob[blob]);
    CHECK_EQ(place_of(&job), place);
    return job.id;
}

static void expect_none(void)
{
    vnd_job job;

    CHECK(!next(&job));
}

static void serve(uint64_t id, uint32_t place)
{
    CHECK_EQ(vnd_job_feed(t.f.e, id, t.data->stored + place * APART * CHUNK, CHUNK), 1);
    CHECK_EQ(fix_flush(t.f.e, id), 0);
    vnd_job_end(t.f.e, id, 0, 0, NULL);
}

/* ---- shares */

TEST(a_source_holds_its_share_and_no_more)
{
    vnd_job job;

    for (uint32_t i = 0; i < 20; i++)
        park(0, 7, i, 0);
    for (uint32_t i = 0; i < FETCH_SOURCE_SLOTS; i++)
        CHECK(next(&job));
    expect_none();
    park(1, 7, 0, 0);
    expect(1, 0);
    serve(job.id, FETCH_SOURCE_SLOTS - 1);
    expect(0, FETCH_SOURCE_SLOTS);
    expect_none();
}

/* However many servers hang, another one's reader finds a slot. */
TEST(many_sick_sources_leave_a_slot_for_others)
{
    int taken = 0;
    vnd_job job;

    for (uint32_t b = 0; b < BLOBS - 2; b++) {
        if (!t.blob[b])
            t.blob[b] = open_blob(b);
        for (uint32_t i = 0; i < 12; i++)
            park(b, b, i, 0);
    }
    while (next(&job))
        taken++;
    CHECK(taken > 2 * FETCH_SOURCE_SLOTS);
    for (uint32_t b = BLOBS - 2; b < BLOBS; b++) {
        t.blob[b] = open_blob(b);
        park(b, 999, 3, 0);
        expect(b, 3);
    }
    CHECK(t.f.e->fetcher->running < FETCH_SLOTS);
}

TEST(sources_take_turns)
{
    for (uint32_t i = 0; i < 3; i++)
        park(0, 7, i, 0);
    for (uint32_t i = 0; i < 3; i++)
        park(1, 7, i, 0);
    for (uint32_t i = 0; i < 3; i++) {
        expect(0, i);
        expect(1, i);
    }
}

TEST(sessions_of_a_source_take_turns)
{
    for (uint32_t i = 0; i < 20; i++)
        park(0, 7, i, 0);
    park(0, 8, 100, 0);
    park(0, 8, 101, 0);
    park(0, 9, 150, 0);
    expect(0, 0);
    expect(0, 100);
    expect(0, 150);
    expect(0, 1);
    expect(0, 101);
    expect(0, 2);
}

/* A session that floods a source holds all of its share; others find a slot nevertheless. */
TEST(session_with_no_job_there_finds_a_slot)
{
    uint64_t id;

    for (uint32_t i = 0; i < 20; i++)
        park(0, 7, i, 0);
    for (uint32_t i = 0; i < FETCH_SOURCE_SLOTS; i++)
        expect(0, i);
    park(0, 8, 100, 0);
    park(0, 8, 101, 0);
    id = expect(0, 100);
    expect_none(); /* the second of that session waits as the others do */
    serve(id, 100);
    expect(0, 101);
    expect_none();
}

/* A chunk that another session has queued behind much else is fetched when it is this session's turn. */
TEST(chunk_that_another_session_queued)
{
    uint64_t id;

    for (uint32_t i = 0; i < 20; i++)
        park(0, 7, i, 0);
    struct fix_reader *r = park(0, 8, 19, 0);
    expect(0, 0);
    id = expect(0, 19);
    serve(id, 19);
    fix_reader_wait(r);
    CHECK_EQ(r->w.err, 0);
    for (uint32_t i = 1; i < FETCH_SOURCE_SLOTS; i++)
        expect(0, i);
    expect_none();
}

TEST(buffers_of_slots_beyond_one_source_are_freed)
{
    vnd_job job[2 * FETCH_SOURCE_SLOTS];

    for (uint32_t b = 0; b < 2; b++)
        for (uint32_t i = 0; i < FETCH_SOURCE_SLOTS; i++)
            park(b, 7, i, 0);
    for (uint32_t i = 0; i < 2 * FETCH_SOURCE_SLOTS; i++)
        CHECK(next(&job[i]));
    for (uint32_t i = 0; i < 2 * FETCH_SOURCE_SLOTS; i++)
        serve(job[i].id, place_of(&job[i]));
    for (int i = 0; i < FETCH_SLOTS; i++) {
        const struct job *j = &t.f.e->fetcher->slots[i];
        CHECK(i < FETCH_SOURCE_SLOTS || (!j->dec.pend.at && !j->dec.scratch.at && !j->dec.views && !j->dec.codec));
    }
    CHECK(!t.f.e->fetcher->sources); /* nothing is queued or under way */
}

/* ---- failures that may pass */

TEST(fetch_that_is_tried_again_holds_no_slot)
{
    int64_t not_before_us;
    struct fix_reader *r = park(0, 7, 5, 0);

    vnd_job_retry(t.f.e, expect(0, 5), now_us() + FAR_US, 0, VND_CAUSE_NETWORK, "away");
    CHECK_EQ(t.f.e->fetcher->running, 0);
    expect_none();
    CHECK_EQ(r->woken, 0);
    park(0, 7, 6, 0); /* the failure was that chunk's alone */
    vnd_job job = { .id = expect(0, 6) };
    not_before_us = now_us() + 30000;
    vnd_job_retry(t.f.e, job.id, not_before_us, 0, VND_CAUSE_NETWORK, "away");
    CHECK_EQ(vnd_job_next(t.f.e, &job, 0, 10000), 0);
    CHECK(now_us() >= not_before_us);
    CHECK_EQ(place_of(&job), 6);
    serve(job.id, 6);
}

TEST(what_was_committed_stays)
{
    struct fix_reader *r[2];
    vnd_job job;

    vnd_blob_set_amplify(t.blob[0], 1 << 20);
    r[0] = park(0, 7, 20, 0);
    CHECK(next(&job));
    CHECK_EQ(job.chunk_count, 16);
    r[1] = park(0, 7, 25, 0); /* comes with it */
    for (uint32_t i = 40; i < 42; i++) {
        CHECK_EQ(vnd_job_feed(t.f.e, job.id, t.data->stored + i * CHUNK, CHUNK), 1);
        CHECK_EQ(fix_flush(t.f.e, job.id), 0);
    }
    fix_reader_wait(r[0]);
    vnd_job_retry(t.f.e, job.id, 0, 0, VND_CAUSE_NETWORK, "cut off");
    CHECK_EQ(r[1]->woken, 0);
    CHECK(next(&job));
    CHECK_EQ(place_of(&job), 25); /* the others were wanted by no reader */
    fix_serve_now(&t.f, &job);
    fix_reader_wait(r[1]);
    CHECK_EQ(r[1]->w.err, 0);
    CHECK(cachefile_ready(t.blob[0]->cache, 41));
    CHECK(!cachefile_ready(t.blob[0]->cache, 42));
}

/* A server that fails as a whole is left alone, then tried by one job; others are not concerned. */
TEST(server_that_fails_is_probed_by_one_job)
{
    vnd_job job;

    for (uint32_t i = 0; i < 5; i++)
        park(0, 7 + i, i, 0);
    vnd_job_retry(t.f.e, expect(0, 0), 0, now_us() + 30000, VND_CAUSE_NETWORK, "refused");
    expect_none();
    park(1, 7, 0, 0);
    expect(1, 0);
    CHECK_EQ(vnd_job_next(t.f.e, &job, 0, 10000), 0);
    CHECK(job.blob == t.blob[0]);
    expect_none(); /* until that one brings bytes or fails */
    vnd_job_retry(t.f.e, job.id, 0, now_us() + 1000, VND_CAUSE_NETWORK, "refused");
    CHECK_EQ(vnd_job_next(t.f.e, &job, 0, 10000), 0);
    expect_none();
    CHECK_EQ(vnd_job_feed(t.f.e, job.id, t.data->stored + job.coff, 100), 0);
    for (int i = 0; i < 4; i++)
        CHECK(next(&(vnd_job){ .id = 0 }));
    expect_none();
}

/* What the cache holds is checked though its server is away. */
TEST(cached_chunks_are_checked_while_the_server_fails)
{
    char path[300];
    vnd_job job;

    park(0, 7, 3, 0);
    serve(expect(0, 3), 3);
    blob_close(t.blob[0], NULL);
    snprintf(path, sizeof path, "%s/.virtiofsd-nydus/blob0.vnd", t.dir);
    CHECK(!unlink(path));
    t.blob[0] = open_blob(0);
    park(0, 7, 9, 0);
    vnd_job_retry(t.f.e, expect(0, 9), 0, now_us() + FAR_US, VND_CAUSE_NETWORK, "refused");
    struct fix_reader *r = park(0, 7, 3, 0);
    CHECK(next(&job));
    CHECK_EQ(job.kind, VND_JOB_VERIFY);
    CHECK_EQ(fix_flush(t.f.e, job.id), 0);
    vnd_job_end(t.f.e, job.id, 0, 0, NULL);
    fix_reader_wait(r);
    CHECK_EQ(r->w.err, 0);
    expect_none();
}

TEST(expired_reader_is_told_of_the_last_failure)
{
    struct fix_reader *r = park(0, 7, 5, now_us() + 1), *untried = park(0, 7, 6, now_us() - 1);

    vnd_job_retry(t.f.e, expect(0, 5), now_us() + FAR_US, 0, VND_CAUSE_NETWORK, "r:5000: connection refused");
    CHECK(store_wait_expire(&r->w, t.f.e, "guest read", 30000));
    CHECK(fix_said(t.f.e, VND_CAUSE_NETWORK,
                   "guest read answered with EIO: its data did not come within 30000 ms; the last attempt: r:5000: "
                   "connection refused"));
    CHECK(!store_wait_expire(&r->w, t.f.e, "guest read", 30000));
    CHECK(store_wait_expire(&untried->w, t.f.e, "guest read", 30000));
    CHECK(fix_said(t.f.e, VND_CAUSE_DEADLINE, "within 30000 ms"));
    CHECK_EQ(r->woken, 0);
}

/* Nothing is tried again for a reader that is gone. */
TEST(chunk_without_readers_is_not_tried_again)
{
    struct fix_reader *r = park(0, 7, 5, now_us() - 1);
    uint64_t id = expect(0, 5);

    CHECK(store_wait_cancel(&r->w));
    vnd_job_retry(t.f.e, id, 0, 0, VND_CAUSE_NETWORK, "away");
    expect_none();
    CHECK(!t.f.e->fetcher->sources);
}

TEST(failure_that_is_final_ends_all_readers_at_once)
{
    struct fix_reader *r[2] = { park(0, 7, 5, now_us() + FAR_US), park(0, 8, 5, now_us() + 2 * FAR_US) };

    vnd_job_end(t.f.e, expect(0, 5), EIO, VND_CAUSE_MISSING, "the blob is not there");
    for (int i = 0; i < 2; i++) {
        fix_reader_wait(r[i]);
        CHECK_EQ(r[i]->w.err, EIO);
    }
    CHECK(fix_said(t.f.e, VND_CAUSE_MISSING, "the blob is not there"));
    expect_none();
}

TEST(prefetch_that_failed_waits_and_gives_way)
{
    vnd_job job;

    CHECK_EQ(vnd_prefetch(t.blob[0], 0, 10, 4), 0);
    CHECK(next(&job));
    CHECK_EQ(job.prefetch, 1);
    vnd_job_retry(t.f.e, job.id, now_us() + FAR_US, 0, VND_CAUSE_NETWORK, "away");
    expect_none();
    CHECK_EQ(vnd_prefetch_pending(t.f.e, 4), 1);
    park(0, 7, 30, 0); /* a reader's attempt is not held back by it */
    serve(expect(0, 30), 30);
    vnd_prefetch_cancel(t.f.e, 4);
    CHECK_EQ(vnd_prefetch_pending(t.f.e, 4), 0);
    CHECK_EQ(vnd_prefetch(t.blob[0], 0, 10, 5), 0);
    CHECK(next(&job));
    CHECK_EQ(job.coff, 0);
    vnd_job_retry(t.f.e, job.id, 0, 0, VND_CAUSE_NETWORK, "away");
    CHECK(next(&job));
    CHECK_EQ(job.coff, 0);
    CHECK_EQ(job.prefetch, 1);
}
