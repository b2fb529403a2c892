/* How far a fetch reaches and what is fetched ahead of a reader who reads in order: when that begins, how
 * it goes on, that demand goes before it, that it ends with its blob, that other readers get nothing of it.
 */
#include "store_fixture.h"

#define CHUNK 16384u
#define PER_MIB 64u

/* The link's pace is the machine's mood here: windows are what the image asks for. */
static void forget_pace(struct fix *f)
{
    atomic_store(&f->h->core->pace.latency_us, 0);
    atomic_store(&f->h->core->pace.bytes_per_s, 0);
}

static void serve(struct fix *f, const vnd_job *job)
{
    fix_serve_now(f, job);
    forget_pace(f);
}

static void check_none(struct fix *f)
{
    vnd_job job;
    CHECK_EQ(vnd_job_next(f->e, &job, 1, 0), -ETIMEDOUT);
}

/* A chunk that is missing is asked for; its job is this one. */
static void check_miss(struct fix *f, struct fix_blob *b, uint32_t chunk, uint32_t chunks)
{
    struct fix_reader r;
    vnd_job job;

    fix_park(f, b, &r, chunk);
    fix_next_job(f, &job);
    CHECK_EQ(job.coff, b->chunk[chunk].coff);
    CHECK_EQ(job.chunk_count, chunks);
    CHECK_EQ(job.prefetch, 0);
    serve(f, &job);
    fix_reader_wait(&r);
}

/* Reads in order until something is fetched ahead; the first chunk of that. */
static uint32_t read_till_ahead(struct fix *f, struct fix_blob *b, uint32_t from)
{
    check_miss(f, b, from, PER_MIB / 4);
    check_none(f);
    check_miss(f, b, from + PER_MIB / 4, PER_MIB / 2);
    check_none(f);
    from += PER_MIB * 3 / 4;
    for (int i = 0; i < 3; i++, from += PER_MIB) {
        check_none(f);
        check_miss(f, b, from, PER_MIB);
    }
    check_none(f);
    check_miss(f, b, from, PER_MIB); /* with this, more than 4 MiB */
    return from + PER_MIB;
}

static void up(struct fix *f, char *dir, struct fix_blob **b, uint32_t n)
{
    *b = fix_blob_new("blob", CODEC_NONE, n, CHUNK);
    fix_dir_make(dir);
    f->server.blob = *b;
    fix_up(f, dir, *b, 0);
    fix_load_table(f);
}

static void down(struct fix *f, const char *dir, struct fix_blob *b)
{
    fix_down(f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

TEST(ahead)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b;
    struct fix_reader r[2];
    vnd_job job, other;

    up(&f, dir, &b, 1000);
    uint32_t at = read_till_ahead(&f, b, 10);
    fix_next_job(&f, &job); /* by a thread that takes no prefetch */
    CHECK_EQ(job.coff, b->chunk[at].coff);
    CHECK_EQ(job.chunk_count, PER_MIB);
    CHECK_EQ(job.prefetch, 0);
    check_none(&f);
    serve(&f, &job);
    fix_check(f.h, b, (uint64_t)(at + 1) * CHUNK, 8); /* not its start */
    check_none(&f);
    fix_check(f.h, b, (uint64_t)at * CHUNK + 9, 8); /* a hit there asks for the next one */
    fix_check(f.h, b, (uint64_t)at * CHUNK, 8);     /* once */

    /* A miss in what is ahead and under way waits for it; what is behind is asked for then; demand goes first. */
    at += PER_MIB;
    fix_next_job(&f, &job);
    CHECK_EQ(job.coff, b->chunk[at].coff);
    fix_park(&f, b, &r[0], at);
    fix_park(&f, b, &r[1], 900);
    fix_next_job(&f, &other);
    CHECK_EQ(other.coff, b->chunk[900].coff);
    CHECK_EQ(other.chunk_count, PER_MIB / 4);
    serve(&f, &other);
    fix_reader_wait(&r[1]);
    serve(&f, &job);
    fix_reader_wait(&r[0]);
    fix_next_job(&f, &job);
    CHECK_EQ(job.coff, b->chunk[at + PER_MIB].coff);
    check_none(&f);

    /* One that ends without bytes costs its reader a wait, not the bytes. */
    fix_park(&f, b, &r[0], at + PER_MIB);
    vnd_job_end(f.e, job.id, EIO, VND_CAUSE_NETWORK, "the server is away");
    fix_next_job(&f, &job);
    CHECK_EQ(job.coff, b->chunk[at + PER_MIB].coff);
    serve(&f, &job);
    fix_reader_wait(&r[0]);
    CHECK_EQ(r[0].w.err, 0);
    down(&f, dir, b);
}

/* What is ahead stops at the blob's end; no read fails there. */
TEST(end)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b;
    vnd_job job;

    up(&f, dir, &b, 10 + 4 * PER_MIB + PER_MIB * 3 / 4 + PER_MIB + 5);
    uint32_t at = read_till_ahead(&f, b, 10);
    fix_next_job(&f, &job);
    CHECK_EQ(job.chunk_count, PER_MIB);
    serve(&f, &job);
    fix_check(f.h, b, (uint64_t)at * CHUNK, 8);
    fix_next_job(&f, &job);
    CHECK_EQ(job.coff, b->chunk[at + PER_MIB].coff);
    CHECK_EQ(job.chunk_count, 5);
    serve(&f, &job);
    fix_check(f.h, b, (uint64_t)(at + PER_MIB) * CHUNK, 8);
    check_none(&f);
    CHECK_EQ(atomic_load(&f.h->core->marks), 0);
    down(&f, dir, b);
}

/* Several readers in order are told apart; one who jumps about gets the smallest window and nothing ahead. */
TEST(apart)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b;
    vnd_job job;
    uint32_t seed = 3;

    up(&f, dir, &b, 4000);
    check_miss(&f, b, 100, PER_MIB / 4);
    check_miss(&f, b, 2000, PER_MIB / 4);
    check_miss(&f, b, 100 + PER_MIB / 4, PER_MIB / 2);
    check_miss(&f, b, 2000 + PER_MIB / 4, PER_MIB / 2);
    for (int i = 0; i < 100; i++) {
        uint32_t chunk = 2400 + fix_random(&seed) % 1500;
        struct fix_reader r;
        if (cachefile_ready(f.h->cache, chunk))
            continue;
        fix_park(&f, b, &r, chunk);
        fix_next_job(&f, &job);
        CHECK(job.clen <= 512 << 10); /* by chance where another has ended */
        serve(&f, &job);
        fix_reader_wait(&r);
        check_none(&f);
    }
    down(&f, dir, b);
}

/* Closing takes what is ahead away; so does the end of the engine (in down). */
TEST(closed)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b;
    vnd_job job;

    up(&f, dir, &b, 1000);
    uint32_t at = read_till_ahead(&f, b, 10);
    fix_next_job(&f, &job);
    fix_check(f.h, b, (uint64_t)(at - 1) * CHUNK, 8);
    struct vnd_blob *held = f.h;
    blob_close(held, NULL);
    CHECK_EQ(vnd_job_feed(f.e, job.id, b->stored, 100), -ECANCELED);
    vnd_job_end(f.e, job.id, 0, 0, NULL);
    check_none(&f);
    f.h = fix_open(f.s, b);
    down(&f, dir, b);
}

/* What the image wants of a miss; 0: nothing but what is asked for, however it is read. */
TEST(amplify)
{
    static const struct {
        uint32_t amplify, chunks;
    } cases[] = { { 0, 1 }, { 1, 8 }, { 128 << 10, 8 }, { 512 << 10, 8 }, { 1 << 20, 16 }, { 4 << 20, 64 } };

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char dir[200];
        struct fix f = { 0 };
        struct fix_blob *b;
        up(&f, dir, &b, 600);
        vnd_blob_set_amplify(f.h, cases[i].amplify);
        check_miss(&f, b, 300, cases[i].chunks);
        down(&f, dir, b);
    }
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b;
    up(&f, dir, &b, 1000);
    vnd_blob_set_amplify(f.h, 0);
    for (uint32_t chunk = 0; chunk < 600; chunk++)
        check_miss(&f, b, chunk, 1);
    check_none(&f);
    down(&f, dir, b);
}

/* Windows follow the link: sixteen times what it could send while one waits for it, within bounds. */
TEST(pace)
{
    struct link_pace p = { 0 };

    CHECK_EQ(stream_window_max(&p, 1 << 20), 1 << 20);
    stream_pace(&p, 20000, 4 << 20, 400000); /* 20 ms, 10 MiB/s */
    CHECK(stream_window_max(&p, 1 << 20) > 32 * 100000 && stream_window_max(&p, 1 << 20) < 34 * 100000);
    CHECK_EQ(stream_window_max(&p, 4 << 20), 4 << 20);
    CHECK_EQ(stream_window_max(&p, 128 << 10), stream_window_max(&p, 1 << 20));
    for (int i = 0; i < 40; i++)
        stream_pace(&p, 100000, 100 << 20, 1000000); /* far and wide */
    CHECK_EQ(stream_window_max(&p, 1 << 20), STREAM_WINDOW_MAX);
    for (int i = 0; i < 40; i++)
        stream_pace(&p, 100, 10 << 20, 1000000); /* next door */
    CHECK_EQ(stream_window_max(&p, 1 << 20), 1 << 20);
    uint64_t had = atomic_load(&p.bytes_per_s);
    stream_pace(&p, 100, 1000, 1); /* too little to tell a rate */
    stream_pace(&p, 100, 1 << 20, 0);
    CHECK_EQ(atomic_load(&p.bytes_per_s), had);
}

/* Readers in order and servers at once, for the sanitizers; every byte is right. */
static void *read_all(void *arg)
{
    void **p = arg;
    struct fix_blob *b = p[1];

    for (uint64_t off = (uintptr_t)p[2] * CHUNK; off + 2 * CHUNK < b->plain_len; off += CHUNK)
        fix_check(p[0], b, off, CHUNK);
    return NULL;
}

TEST(at_once)
{
    char dir[200];
    struct fix f = { .server.feed_bytes = 200000 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_LZ4_BLOCK, 1500, CHUNK);
    pthread_t thread[4];
    void *args[4][3];

    fix_dir_make(dir);
    fix_up(&f, dir, b, 4);
    for (int i = 0; i < 4; i++) {
        args[i][0] = f.h;
        args[i][1] = b;
        args[i][2] = (void *)(uintptr_t)(i * 350);
        CHECK(!pthread_create(&thread[i], NULL, read_all, args[i]));
    }
    for (int i = 0; i < 4; i++)
        pthread_join(thread[i], NULL);
    CHECK(atomic_load(&f.server.fed_bytes) <= b->stored_len); /* each chunk once */
    down(&f, dir, b);
}
