/* Cache files that vanish or are replaced under readers (nydus-snapshotter's garbage collection, people): every read is
 * right at every moment, and a moment later the files are shared again.
 */
#include <signal.h>

#include "store_fixture.h"

#include <sys/syscall.h>

static _Atomic int looks_at_data, looks_at_dir;
static _Atomic int dir_fd = -1;

/* In the place of the system's: how often are names looked up? */
int fstatat(int fd, const char *path, struct stat *st, int flags)
{
    if (strstr(path, ".blob.data"))
        atomic_fetch_add(&looks_at_data, 1);
    return (int)syscall(SYS_newfstatat, fd, path, st, flags);
}

int fstat(int fd, struct stat *st)
{
    if (fd == atomic_load(&dir_fd))
        atomic_fetch_add(&looks_at_dir, 1);
    return (int)syscall(SYS_fstat, fd, st);
}

#define N 24
#define CHUNK 16384
#define ROUNDS 40
#define READERS 3

/* Where a file of the blob is now: one that a stranger replaced is left, for one that is named after the table. */
static void path_now(struct fix *f, const char *path, char out[400])
{
    const char *name = strstr(path, "/blob.");
    struct blob_core *c = f->h->core;

    if (atomic_load(&c->apart))
        snprintf(out, 400, "%.*s/blob.%s%s", (int)(name - path), path, c->table_name, name + 5);
    else
        snprintf(out, 400, "%s", path);
}

/* Looks at once rather than within the second, until the file of that name is the one that f has open. */
static void follow(struct fix *f, const char *name, _Atomic int *fd)
{
    struct stat a, b;
    char path[400];

    for (int64_t until = now_us() + 20000000;; usleep(500)) {
        path_now(f, name, path);
        uint64_t moves = atomic_load(&f->h->cache->moves);
        if (!(moves & 1) && !stat(path, &a) && *fd >= 0 && !fstat(*fd, &b) && a.st_ino == b.st_ino &&
            moves == atomic_load(&f->h->cache->moves))
            return;
        CHECK(now_us() < until);
        pthread_mutex_lock(&f->e->fetcher->upkeep_lock);
        pthread_cond_signal(&f->e->fetcher->upkeep_some);
        pthread_mutex_unlock(&f->e->fetcher->upkeep_lock);
    }
}

struct paths {
    size_t whole; /* size of the data file */
    char data[300], map[300], side[300], side_dir[300], wake[300], other[300];
};

static void paths_of(struct paths *p, const char *dir, int compressed)
{
    sprintf(p->data, "%s/blob.blob.%s", dir, compressed ? "raw" : "data");
    sprintf(p->map, "%s/blob.blob.data.chunk_map", dir);
    sprintf(p->side_dir, "%s/.virtiofsd-nydus", dir);
    sprintf(p->side, "%s/.virtiofsd-nydus/blob.%s", dir, compressed ? "raw.vnd" : "vnd");
    sprintf(p->wake, "%s/.virtiofsd-nydus/wake", dir);
    sprintf(p->other, "%s/other", dir);
}

static void remove_tree(const char *dir)
{
    char cmd[700], gone[320];

    snprintf(gone, sizeof gone, "%s.gone", dir); /* at once: what is made anew meanwhile is not in the way */
    CHECK(!rename(dir, gone) || errno == ENOENT);
    snprintf(cmd, sizeof cmd, "rm -rf '%s'", gone);
    CHECK(system(cmd) == 0);
}

static void put_file(const char *path, size_t len, uint8_t fill)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    uint8_t *p = malloc(len);

    memset(p, fill, len);
    CHECK(fd >= 0 && write(fd, p, len) == (ssize_t)len);
    free(p);
    close(fd);
}

enum { NO, YES, ANY };

/* What is not trusted after a look: fetched (jobs) or found right on disk (verify jobs). */
static void expect_jobs(struct fix *f, struct fix_blob *b, int fetches, int verifies)
{
    uint64_t jobs = atomic_load(&f->server.jobs), verify = atomic_load(&f->server.verify_jobs);

    fix_check(f->h, b, 0, (N - 1) * CHUNK);
    verify = atomic_load(&f->server.verify_jobs) - verify;
    jobs = atomic_load(&f->server.jobs) - jobs - verify;
    CHECK(fetches == ANY || (jobs > 0) == fetches);
    CHECK(verifies == ANY || (verify > 0) == verifies);
}

/* Another process comes, shares what there is and fetches nothing. */
static void expect_shared(const char *dir, struct fix_blob *b, int compressed)
{
    struct fix g = { .compressed = compressed };

    fix_up(&g, dir, b, 1);
    fix_check(g.h, b, 0, (N - 1) * CHUNK);
    CHECK_EQ(atomic_load(&g.server.jobs), 0);
    fix_down(&g);
}

TEST(data_removed)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 };
    struct paths p;

    fix_dir_make(dir);
    paths_of(&p, dir, 0);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    /* As the snapshotter does it: the map first. */
    CHECK(!unlink(p.map) && !unlink(p.data));
    fix_check(f.h, b, 0, (N - 1) * CHUNK); /* mostly not looked yet: the open file serves on */
    follow(&f, p.data, &f.h->cache->data_fd);
    CHECK(fix_said(f.e, VND_CAUSE_IO, "data file was removed"));
    expect_jobs(&f, b, YES, ANY); /* it may have looked between the two, and told a new map */
    expect_jobs(&f, b, NO, NO);
    expect_shared(dir, b, 0);
    /* Another file is put in its place, with the map that says all is there. */
    put_file(p.other, 5 * CHUNK, 0xa5);
    CHECK(!rename(p.other, p.data));
    follow(&f, p.data, &f.h->cache->data_fd);
    expect_jobs(&f, b, YES, YES);
    expect_shared(dir, b, 0);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* A file that cannot be this table's is left alone: the chunks go to a file of their own, which others share. */
TEST(data_replaced_by_a_stranger)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 };
    struct paths p;
    struct stat st;

    fix_dir_make(dir);
    paths_of(&p, dir, 0);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, 5 * CHUNK);
    put_file(p.other, (size_t)b->plain_len + 1, 0xa5);
    CHECK(!rename(p.other, p.data));
    for (int64_t until = now_us() + 20000000; !fix_said(f.e, VND_CAUSE_DIGEST, "left alone"); usleep(500)) {
        CHECK(now_us() < until);
        pthread_cond_signal(&f.e->fetcher->upkeep_some);
    }
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    CHECK(!stat(p.data, &st) && st.st_size == (off_t)b->plain_len + 1);
    follow(&f, p.data, &f.h->cache->data_fd);
    expect_shared(dir, b, 0);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

TEST(maps_removed)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 };
    struct paths p;
    struct stat st;
    uint8_t bits[3];
    int fd;

    fix_dir_make(dir);
    paths_of(&p, dir, 0);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    /* The chunk map alone: made anew with what we know. */
    CHECK(!unlink(p.map));
    for (int64_t until = now_us() + 20000000; !fix_said(f.e, VND_CAUSE_IO, "chunk map was removed"); usleep(500)) {
        CHECK(now_us() < until);
        pthread_cond_signal(&f.e->fetcher->upkeep_some);
    }
    fd = open(p.map, O_RDONLY);
    CHECK(fd >= 0 && !fstat(fd, &st) && st.st_size == 4096 + (N + 7) / 8);
    CHECK(pread(fd, bits, sizeof bits, 4096) == sizeof bits);
    CHECK(bits[0] == 0xff && bits[1] == 0xff && (bits[2] & 0xfe) == 0xfe);
    close(fd);
    expect_jobs(&f, b, NO, NO);
    /* Our own alone: what is there is verified, not fetched. */
    CHECK(!unlink(p.side));
    follow(&f, p.side, &f.h->cache->side_fd);
    expect_jobs(&f, b, NO, YES);
    expect_jobs(&f, b, NO, NO);
    /* All that is ours. */
    remove_tree(p.side_dir);
    follow(&f, p.side, &f.h->cache->side_fd);
    expect_jobs(&f, b, NO, YES);
    CHECK(!stat(p.wake, &st) && st.st_ino == f.s->wake.ino);
    expect_shared(dir, b, 0);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

TEST(directory_removed)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 };
    struct paths p;
    struct stat st;

    fix_dir_make(dir);
    paths_of(&p, dir, 0);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, 5 * CHUNK);
    remove_tree(dir);
    for (int64_t until = now_us() + 20000000; !fix_said(f.e, VND_CAUSE_IO, "is gone"); usleep(500)) {
        CHECK(now_us() < until);
        pthread_cond_signal(&f.e->fetcher->upkeep_some);
    }
    fix_check(f.h, b, 0, 10 * CHUNK); /* what is fetched now goes to the removed file */
    CHECK(stat(dir, &st));            /* and no directory comes from nowhere: a disk may be about to be mounted */
    CHECK(!mkdir(dir, 0700));
    follow(&f, p.data, &f.h->cache->data_fd);
    expect_jobs(&f, b, YES, NO);
    expect_shared(dir, b, 0);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* A chunk map said that a chunk is there, and the files are exchanged before it is verified: that its bytes are not in the
 * new file is no damage, so none is told and none is counted. */
TEST(files_replaced_before_a_verify_job)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 }, by_hand = { .server.blob = b };
    struct fix_reader r;
    struct paths p;
    vnd_stats stats;
    vnd_event ev;
    vnd_job job;

    fix_dir_make(dir);
    paths_of(&p, dir, 0);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    fix_down(&f);
    CHECK(!unlink(p.side)); /* so nothing is trusted, and the chunk map is asked */
    fix_up(&by_hand, dir, b, 0);
    fix_load_table(&by_hand);
    fix_park(&by_hand, b, &r, 3);
    fix_next_job(&by_hand, &job);
    CHECK_EQ(job.kind, VND_JOB_VERIFY);
    CHECK(!unlink(p.map) && !unlink(p.data));
    follow(&by_hand, p.data, &by_hand.h->cache->data_fd);
    fix_serve_now(&by_hand, &job);
    fix_next_job(&by_hand, &job);
    CHECK_EQ(job.kind, VND_JOB_FETCH);
    fix_serve_now(&by_hand, &job);
    fix_reader_wait(&r);
    CHECK_EQ(r.w.err, 0);
    vnd_engine_stats(by_hand.e, &stats);
    CHECK_EQ(stats.digest_failures, 0);
    while (vnd_event_next(by_hand.e, &ev, 0) == 0)
        CHECK(ev.cause != VND_CAUSE_DIGEST);
    fix_down(&by_hand);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* ---------------------------------------------------------------- live reads */

struct reader {
    struct fix *f;
    struct fix_blob *b;
    uint32_t seed;
    pthread_t thread;
    _Atomic bool *stop;
    _Atomic uint64_t reads;
};

static void *read_on(void *arg)
{
    struct reader *r = arg;

    while (!atomic_load(r->stop)) {
        uint32_t at = fix_random(&r->seed) % ((N - 2) * CHUNK), len = 1 + fix_random(&r->seed) % CHUNK;
        fix_check(r->f->h, r->b, at, len);
        atomic_fetch_add(&r->reads, 1);
    }
    return NULL;
}

static void vanish(struct paths *p, const char *dir, uint32_t how)
{
    switch (how % 8) {
    case 0:
        unlink(p->map);
        /* fallthrough */
    case 1: unlink(p->data); break;
    case 2: unlink(p->map); break;
    case 3: unlink(p->side); break;
    case 4:
        put_file(p->other, 3 * CHUNK, 0x5a);
        CHECK(!rename(p->other, p->data));
        break;
    case 5: remove_tree(p->side_dir); break;
    case 6:
        put_file(p->other, p->whole, 0x5a);
        CHECK(!rename(p->other, p->data));
        break;
    default: remove_tree(dir); CHECK(!mkdir(dir, 0700));
    }
}

/* Two users of one directory, as two processes are, with readers that compare every byte while files vanish. */
static void check_under_readers(int compressed)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { .compressed = compressed }, g = { .compressed = compressed };
    struct reader r[2 * READERS];
    _Atomic bool stop = false;
    struct paths p;
    uint32_t seed = 5;

    fix_dir_make(dir);
    paths_of(&p, dir, compressed);
    p.whole = compressed ? b->stored_len : b->plain_len;
    fix_up(&f, dir, b, 2);
    fix_up(&g, dir, b, 2);
    fix_check(f.h, b, 0, 100);
    fix_check(g.h, b, 0, 100);
    for (int i = 0; i < 2 * READERS; i++) {
        r[i] = (struct reader){ .f = i & 1 ? &g : &f, .b = b, .seed = (uint32_t)i, .stop = &stop };
        CHECK(!pthread_create(&r[i].thread, NULL, read_on, &r[i]));
    }
    for (uint32_t round = 0; round < ROUNDS; round++) {
        vanish(&p, dir, round < 8 ? round : fix_random(&seed));
        if (round & 1) { /* else the next thing goes while this one is being followed */
            follow(&f, p.data, &f.h->cache->data_fd);
            follow(&g, p.data, &g.h->cache->data_fd);
        }
        usleep(fix_random(&seed) % 3000);
    }
    for (int followed = 0; followed < 3; followed++) { /* each may yet replace what the other has just made */
        follow(&f, p.side, &f.h->cache->side_fd);
        follow(&g, p.side, &g.h->cache->side_fd);
    }
    atomic_store(&stop, true);
    for (int i = 0; i < 2 * READERS; i++) {
        CHECK(!pthread_join(r[i].thread, NULL));
        CHECK(atomic_load(&r[i].reads) > 0);
    }
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    fix_check(g.h, b, 0, (N - 1) * CHUNK);
    /* A stranger's file may be gone by now that one of them had to leave. */
    if (!atomic_load(&((struct blob_core *)f.h->core)->apart) && !atomic_load(&((struct blob_core *)g.h->core)->apart))
        expect_shared(dir, b, compressed);
    fix_down(&f);
    fix_down(&g);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

TEST(under_readers)
{
    check_under_readers(0);
}

TEST(under_readers_of_stored_chunks)
{
    check_under_readers(1);
}

/* While nothing changes in the directories no file is looked for, however many blobs there are. */
TEST(idle_blobs_are_not_looked_for)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct timespec old[2] = { { .tv_sec = 1000000000 }, { .tv_sec = 1000000000 } };
    struct fix f = { 0 };
    struct paths p;
    int looks;

    fix_dir_make(dir);
    paths_of(&p, dir, 0);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    CHECK(!utimensat(AT_FDCWD, dir, old, 0) && !utimensat(AT_FDCWD, p.side_dir, old, 0)); /* all of it long ago */
    atomic_store(&dir_fd, f.s->dir_fd);
    for (int round = 0; round < 2; round++) { /* the first notes the times, the second has nothing to do */
        looks = atomic_load(&looks_at_data);
        int rounds = atomic_load(&looks_at_dir);
        for (int64_t until = now_us() + 20000000; atomic_load(&looks_at_dir) < rounds + 3; usleep(500)) {
            CHECK(now_us() < until);
            pthread_cond_signal(&f.e->fetcher->upkeep_some);
        }
    }
    CHECK_EQ(atomic_load(&looks_at_data), looks);
    CHECK(!unlink(p.data)); /* which is a change */
    follow(&f, p.data, &f.h->cache->data_fd);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}
