/* A blob's chunk table that has to be fetched: batches read end to end, the file kept in the work directory, tables that are
 * wrong, servers that are away, two processes that want it at once.
 */
#include <stdarg.h>
#include <sys/syscall.h>

#include "batched_blob.h"

static _Atomic int looks_at_claims;

/* In the place of the system's: how often is it looked whether another process still has its claim on a table? */
int openat(int fd, const char *path, int flags, ...)
{
    mode_t mode = 0;

    if (flags & O_CREAT) {
        va_list rest;

        va_start(rest, flags);
        mode = va_arg(rest, mode_t);
        va_end(rest);
    }
    if (!strcmp(path, "meta"))
        atomic_fetch_add(&looks_at_claims, 1);
    return (int)syscall(SYS_openat, fd, path, flags, mode);
}

/* One user of a work directory, as one daemon is, with a server of the blob. */
static void start(struct fix *f, const char *dir, struct fix_blob *b)
{
    memset(f, 0, sizeof *f);
    f->server.feed_bytes = 1000000;
    fix_up(f, dir, b, 1);
}

static void read_chunk(struct vnd_blob *h, struct fix_blob *b, uint32_t i)
{
    uint8_t buf[SLOT];

    CHECK_EQ(fix_read(h, b, (uint64_t)i * SLOT, b->chunk[i].usize, buf), b->chunk[i].usize);
    CHECK(!memcmp(buf, b->plain + i * SLOT, b->chunk[i].usize));
}

static void read_all(struct vnd_blob *h, struct fix_blob *b)
{
    for (uint32_t i = N; i-- > 0;)
        read_chunk(h, b, i);
}

/* A batched blob in a work directory of its own. */
struct table {
    struct fix f;
    struct fix_blob *b;
    char dir[200], kept[300]; /* kept: where its table is kept */
};

static void table_new(struct table *t, uint32_t codec)
{
    memset(t, 0, sizeof *t);
    t->b = batched_blob_new(codec, NULL);
    fix_dir_make(t->dir);
    snprintf(t->kept, sizeof t->kept, "%s/batched.blob.meta", t->dir);
}

static void table_free(struct table *t)
{
    fix_blob_free(t->b);
    fix_dir_remove(t->dir);
}

/* All that is decoded with a chunk becomes ready, and every chunk is fetched once. */
static void check_batches(uint32_t codec, uint32_t feed_bytes)
{
    struct table t;
    vnd_stats s;
    uint64_t total;

    table_new(&t, codec);
    t.f.server.feed_bytes = feed_bytes;
    fix_up(&t.f, t.dir, t.b, 1);
    read_chunk(t.f.h, t.b, 7); /* in the middle of a batch */
    CHECK_EQ(atomic_load(&t.f.server.meta_jobs), 1);
    CHECK_SOON(vnd_blob_ready(t.f.h, &total) >= PER_BATCH);
    for (uint32_t i = 5; i < 10; i++)
        CHECK(cachefile_ready(t.f.h->cache, i));
    read_all(t.f.h, t.b);
    vnd_engine_stats(t.f.e, &s);
    CHECK_EQ(s.fetched_chunks, N);
    CHECK_EQ(s.digest_failures, 0);
    fix_down(&t.f);
    table_free(&t);
}

TEST(batches_of_zstd)
{
    check_batches(CODEC_ZSTD, 100000);
}

TEST(batches_of_lz4_that_come_in_small_pieces)
{
    check_batches(CODEC_LZ4_BLOCK, 5);
}

TEST(batches_that_are_not_compressed)
{
    check_batches(CODEC_NONE, 5);
}

/* In Nydus's layout, and it saves the next fetch. */
TEST(table_is_kept)
{
    struct table t;
    struct stat st;

    table_new(&t, CODEC_ZSTD);
    start(&t.f, t.dir, t.b);
    read_all(t.f.h, t.b);
    fix_down(&t.f);
    CHECK(!stat(t.kept, &st));
    CHECK_EQ(st.st_size, (t.b->info.ci_usize_bytes + 4095) / 4096 * 4096 + 4096);
    start(&t.f, t.dir, t.b);
    read_chunk(t.f.h, t.b, 3);
    CHECK_EQ(atomic_load(&t.f.server.jobs), 0);
    fix_down(&t.f);
    table_free(&t);
}

TEST(kept_table_with_damage_is_fetched_anew)
{
    struct table t;

    table_new(&t, CODEC_ZSTD);
    start(&t.f, t.dir, t.b);
    read_all(t.f.h, t.b);
    fix_down(&t.f);
    int fd = open(t.kept, O_WRONLY);
    CHECK(pwrite(fd, "damage", 6, 24 * 3) == 6);
    close(fd);
    start(&t.f, t.dir, t.b);
    read_chunk(t.f.h, t.b, 3);
    CHECK_EQ(atomic_load(&t.f.server.meta_jobs), 1);
    fix_down(&t.f);
    table_free(&t);
}

/* It is sound, and wrong: the next load fetches it anew. */
TEST(kept_table_with_wrong_places)
{
    struct table t;
    char path[300];
    uint8_t word[8], buf[SLOT];

    table_new(&t, CODEC_NONE);
    start(&t.f, t.dir, t.b);
    read_chunk(t.f.h, t.b, 0);
    fix_down(&t.f);
    int fd = open(t.kept, O_RDWR);
    for (int i = 5; i < 10; i++) { /* the second batch lies a byte off */
        CHECK(pread(fd, word, 8, i * 24 + 8) == 8);
        word[0] ^= 1;
        CHECK(pwrite(fd, word, 8, i * 24 + 8) == 8);
    }
    close(fd);
    snprintf(path, sizeof path, "%s/batched.blob.data", t.dir); /* what was fetched with chunk 0 */
    CHECK(!unlink(path));
    start(&t.f, t.dir, t.b);
    CHECK_EQ(fix_read(t.f.h, t.b, 6 * SLOT, 100, buf), -EIO);
    CHECK_EQ(atomic_load(&t.f.server.meta_jobs), 0); /* it was used */
    CHECK(fix_said(t.f.e, VND_CAUSE_DIGEST, "batched.blob.meta in the cache directory, which is removed"));
    fix_down(&t.f);
    start(&t.f, t.dir, t.b);
    read_chunk(t.f.h, t.b, 6);
    CHECK_EQ(atomic_load(&t.f.server.meta_jobs), 1);
    fix_down(&t.f);
    table_free(&t);
}

/* ---- a flipped byte: asked for once more, then EIO, never a wrong byte. Job 0 brings the table, 1 the first batch. */

static void start_with_flips(struct table *t, int from, int to)
{
    table_new(t, CODEC_ZSTD);
    t->f.server.feed_bytes = 1000000;
    t->f.server.flip_from = from;
    t->f.server.flip_to = to;
    fix_up(&t->f, t->dir, t->b, 1);
}

TEST(table_that_comes_wrong_once)
{
    struct table t;

    start_with_flips(&t, 0, 1);
    read_all(t.f.h, t.b);
    CHECK_EQ(atomic_load(&t.f.server.meta_jobs), 2);
    fix_down(&t.f);
    table_free(&t);
}

TEST(table_that_always_comes_wrong)
{
    struct table t;
    uint8_t buf[16];

    start_with_flips(&t, 0, 99);
    CHECK_EQ(fix_read(t.f.h, t.b, 0, 16, buf), -EIO);
    CHECK(fix_said(t.f.e, VND_CAUSE_DIGEST, "cannot be served"));
    fix_down(&t.f);
    table_free(&t);
}

TEST(batch_that_comes_wrong_once)
{
    struct table t;

    start_with_flips(&t, 1, 2);
    read_all(t.f.h, t.b);
    fix_down(&t.f);
    table_free(&t);
}

TEST(batches_that_always_come_wrong)
{
    struct table t;
    int failed = 0;

    start_with_flips(&t, 1, 1000);
    for (uint32_t i = 0; i < N; i++) { /* a flip may spare some of a batch; what is given out is right */
        uint8_t all[SLOT];
        int64_t n = fix_read(t.f.h, t.b, (uint64_t)i * SLOT, t.b->chunk[i].usize, all);

        CHECK(n == -EIO || !memcmp(all, t.b->plain + i * SLOT, t.b->chunk[i].usize));
        failed += n == -EIO;
    }
    CHECK(failed > 0);
    CHECK(fix_said(t.f.e, VND_CAUSE_DIGEST, "readers get EIO"));
    fix_down(&t.f);
    table_free(&t);
}

/* ---- images without records, and servers that are away */

/* A blob whose table has entries of the first form, and whose image names no chunk. */
static struct fix_blob *plain_blob_new(void)
{
    struct fix_blob *b = fix_blob_new("plainv1", CODEC_ZSTD, 40, 16384);
    uint8_t table[40 * 16];

    for (int i = 0; i < 40; i++) {
        const struct blob_chunk *c = &b->chunk[i];
        uint64_t u = c->usize - 1, z = c->csize - 1;

        put64(table + i * 16, c->uoff | (u >> 20) << 8 | (u & 0xfffff) << 44);
        put64(table + i * 16 + 8, c->coff | (z >> 20) << 40 | (z & 0xfffff) << 44);
    }
    seal(b, table, sizeof table, 0, 0);
    b->hide_to = 40;
    return b;
}

TEST(image_without_digests_is_not_served_unasked)
{
    struct fix_blob *b = plain_blob_new();
    struct fix f;
    char dir[200];
    uint8_t buf[8];

    fix_dir_make(dir);
    start(&f, dir, b);
    CHECK_EQ(fix_read(f.h, b, 0, 8, buf), -EIO);
    CHECK(fix_said(f.e, VND_CAUSE_DIGEST, "--allow-unverified"));
    CHECK_EQ(atomic_load(&f.server.jobs), 0);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

TEST(image_without_records_is_read_by_the_blobs_table)
{
    vnd_engine_cfg cfg = { .allow_unverified = 1 };
    struct fix_blob *b = plain_blob_new();
    struct fix f = { 0 };
    char dir[200], err[VND_ERR_MAX];

    fix_dir_make(dir);
    f.e = vnd_engine_new(&cfg);
    f.s = vnd_store_open(f.e, dir, 0, err, sizeof err);
    f.h = fix_open(f.s, b);
    fix_server_start(&f.server, f.e, b, 1);
    fix_check(f.h, b, 0, 39 * 16384);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

TEST(server_that_was_away_is_asked_again)
{
    struct table t;
    uint8_t buf[8];

    table_new(&t, CODEC_ZSTD);
    t.f.server.fail_errno = EIO;
    fix_up(&t.f, t.dir, t.b, 1);
    CHECK_EQ(fix_read(t.f.h, t.b, 0, 8, buf), -EIO);
    CHECK(fix_said(t.f.e, VND_CAUSE_NETWORK, "away"));
    atomic_store(&t.f.server.fail_errno, 0);
    CHECK_SOON(fix_read(t.f.h, t.b, 0, 8, buf) == 8);
    fix_down(&t.f);
    table_free(&t);
}

static bool is_asked(struct fix *f)
{
    bool asked;

    pthread_mutex_lock(&f->e->fetcher->lock);
    asked = f->e->fetcher->sources != NULL;
    pthread_mutex_unlock(&f->e->fetcher->lock);
    return asked;
}

/* A reader that waits for the table of a server that does not answer. */
static void park_on_table(struct table *t, struct fix_reader *r)
{
    static uint8_t buf[8];
    struct extent x = { .len = 8 };
    struct iovec iov = { buf, 8 };

    table_new(t, CODEC_ZSTD);
    t->f.server.hold = 1;
    fix_up(&t->f, t->dir, t->b, 1);
    x.blob = t->f.h;
    fix_reader_init(r);
    CHECK_EQ(store_read(&r->w, &x, 1, &iov, 1), -EINPROGRESS);
    CHECK_SOON(is_asked(&t->f));
}

TEST(shutdown_does_not_wait_for_a_table)
{
    struct fix_reader r;
    struct table t;

    park_on_table(&t, &r);
    fix_down(&t.f);
    fix_reader_wait(&r);
    CHECK(r.w.err != 0);
    table_free(&t);
}

TEST(unmount_does_not_wait_for_a_table)
{
    struct fix_reader r;
    struct table t;

    park_on_table(&t, &r);
    blob_close(t.f.h, NULL);
    fix_reader_wait(&r);
    CHECK(r.w.err != 0);
    t.f.h = fix_open(t.f.s, t.b);
    fix_down(&t.f);
    table_free(&t);
}

/* ---- two users of one directory, as two processes are */

struct first_read {
    struct fix *f;
    struct fix_blob *b;
    pthread_t thread;
    int64_t rc;
};

static void *first_read_run(void *arg)
{
    struct first_read *r = arg;
    uint8_t buf[SLOT];

    r->rc = fix_read(r->f->h, r->b, 3 * SLOT, r->b->chunk[3].usize, buf);
    if (r->rc >= 0)
        CHECK(!memcmp(buf, r->b->plain + 3 * SLOT, r->b->chunk[3].usize));
    return NULL;
}

static void first_read_start(struct first_read *r, struct fix *f, struct fix_blob *b)
{
    *r = (struct first_read){ .f = f, .b = b };
    CHECK(!pthread_create(&r->thread, NULL, first_read_run, r));
}

static bool is_fetching(struct vnd_blob *h)
{
    struct miss_shard *s = miss_shard_of(h->core->engine->fetcher, h, 0);
    bool fetching;

    pthread_mutex_lock(&s->lock);
    fetching = h->load.fetching;
    pthread_mutex_unlock(&s->lock);
    return fetching;
}

/* One fetches the table, the other waits for it; if the one ends without it, the other fetches. */
static void check_fetched_once(bool ends)
{
    struct table t;
    struct fix g = { 0 };
    struct first_read one, two;

    table_new(&t, CODEC_ZSTD);
    t.f.server.feed_bytes = g.server.feed_bytes = 100000;
    atomic_init(&t.f.server.hold, 1);
    fix_up(&t.f, t.dir, t.b, 1);
    fix_up(&g, t.dir, t.b, 1);
    first_read_start(&one, &t.f, t.b);
    CHECK_SOON(is_fetching(t.f.h));
    first_read_start(&two, &g, t.b);
    CHECK_SOON(is_fetching(g.h));
    int looks = atomic_load(&looks_at_claims);
    CHECK_SOON(atomic_load(&looks_at_claims) >= looks + 3); /* by the other, which must not fetch */
    CHECK_EQ(atomic_load(&g.server.meta_jobs), 0);
    if (ends)
        vnd_engine_shutdown(t.f.e);
    else
        atomic_store(&t.f.server.hold, 0);
    CHECK(!pthread_join(one.thread, NULL) && !pthread_join(two.thread, NULL));
    CHECK_EQ(two.rc, t.b->chunk[3].usize);
    CHECK_EQ(one.rc < 0, ends);
    CHECK_EQ(atomic_load(&t.f.server.meta_jobs), !ends);
    CHECK_EQ(atomic_load(&g.server.meta_jobs), ends);
    fix_down(&t.f);
    fix_down(&g);
    table_free(&t);
}

TEST(fetched_once)
{
    check_fetched_once(false);
}

TEST(fetched_once_where_the_first_process_ends)
{
    check_fetched_once(true);
}
