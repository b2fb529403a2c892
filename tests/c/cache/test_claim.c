/* Several processes on one work directory: each chunk is fetched once, a process that dies or fails is replaced,
 * contradicting images are told apart across processes too. Children are forked before this process has threads.
 */
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "store_fixture.h"

#include "base/clock.h"
#include "cache/claim.h"

#define N 200
#define CHUNK 16384
#define PATIENCE_US (30 * 1000 * 1000)

/* What processes tell each other. */
struct board {
    _Atomic uint64_t fetched, jobs, expected_eio;
    _Atomic int started, go, step;
};
static struct board *board; /* shared by the processes of one case */

BEFORE_EACH
{
    board = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(board != MAP_FAILED);
}

static void wait_for(_Atomic int *what, int value)
{
    CHECK_SOON(atomic_load(what) >= value);
}

static pid_t child(void (*run)(const char *dir, struct fix_blob *b, int me), const char *dir, struct fix_blob *b,
                   int me)
{
    pid_t pid = fork();

    CHECK(pid >= 0);
    if (pid == 0) {
        run(dir, b, me);
        _exit(0);
    }
    return pid;
}

static void reap(pid_t pid)
{
    int status;

    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void read_everything(const char *dir, struct fix_blob *b, int me)
{
    struct fix f = { 0 };
    vnd_stats st;

    f.server.feed_bytes = 5000;
    fix_up(&f, dir, b, 2);
    atomic_fetch_add(&board->started, 1);
    wait_for(&board->go, 1);
    for (uint32_t i = 0; i < N - 4; i += 3) {
        uint32_t at = me & 1 ? N - 4 - i : i;
        fix_check(f.h, b, (uint64_t)at * CHUNK, 2 * CHUNK + 9);
    }
    fix_check(f.h, b, 0, 100 * CHUNK);
    fix_check(f.h, b, 100 * CHUNK, 99 * CHUNK);
    fix_check(f.h, b, (N - 1) * CHUNK, 99);
    vnd_engine_stats(f.e, &st);
    atomic_fetch_add(&board->fetched, st.fetched_chunks);
    CHECK_EQ(st.verified_chunks, 0);
    fix_down(&f);
}

TEST(each_chunk_once)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    pid_t pid[3];

    memset(board, 0, sizeof *board);
    fix_dir_make(dir);
    for (int i = 0; i < 3; i++)
        pid[i] = child(read_everything, dir, b, i);
    wait_for(&board->started, 3);
    atomic_store(&board->go, 1);
    for (int i = 0; i < 3; i++)
        reap(pid[i]);
    CHECK_EQ(atomic_load(&board->fetched), N);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Takes the job for chunk 10 and sits on it. */
static void hold_job(const char *dir, struct fix_blob *b, int how)
{
    struct fix f = { 0 };
    struct fix_reader r;
    uint8_t buf[8];
    struct extent x = { .uoff = 10 * CHUNK, .chunk = 10, .len = 8 };
    struct iovec iov = { buf, 8 };
    vnd_job job;

    f.server.blob = b;
    fix_up(&f, dir, b, 0);
    x.blob = f.h;
    fix_reader_init(&r);
    CHECK_EQ(store_read(&r.w, &x, 1, &iov, 1), -EINPROGRESS);
    fix_reader_wait(&r); /* the table is there */
    CHECK_EQ(store_read(&r.w, &x, 1, &iov, 1), -EINPROGRESS);
    CHECK_EQ(vnd_job_next(f.e, &job, 0, 5000), 0);
    atomic_store(&board->step, 1);
    wait_for(&board->go, 1);
    if (how == 1) { /* fails: the error stays in this process */
        vnd_job_end(f.e, job.id, EIO, VND_CAUSE_NETWORK, "gone");
        fix_reader_wait(&r);
        CHECK_EQ(r.w.err, EIO);
        fix_down(&f);
        return;
    }
    if (how == 2) { /* succeeds */
        f.server.e = f.e;
        f.server.feed_bytes = 100000;
        fix_serve(&f.server, &job);
        fix_reader_wait(&r);
        CHECK_EQ(store_read(&r.w, &x, 1, &iov, 1), 8);
        fix_down(&f);
        return;
    }
    pause();
}

static void *read_ten(void *arg)
{
    struct fix *f = arg;

    fix_check(f->h, f->server.blob, 10 * CHUNK, 3 * CHUNK);
    return NULL;
}

static void wait_for_holder(const char *dir, struct fix_blob *b, int how)
{
    struct fix f = { 0 };
    pthread_t t;
    vnd_stats st;
    int64_t until = now_us() + 5000000;

    wait_for(&board->step, 1);
    fix_up(&f, dir, b, 1);
    pthread_create(&t, NULL, read_ten, &f);
    /* It waits as a foreign chunk, and no job is made of it. */
    for (bool waits = false; !waits; usleep(200)) {
        CHECK(now_us() < until);
        pthread_mutex_lock(&f.e->fetcher->foreign_lock);
        waits = f.e->fetcher->foreign_started;
        pthread_mutex_unlock(&f.e->fetcher->foreign_lock);
    }
    CHECK_EQ(atomic_load(&f.server.jobs), 0);
    int64_t start = now_us();
    atomic_store(&board->step, 2);
    pthread_join(t, NULL);
    if (getenv("VERBOSE"))
        fprintf(stderr, "  holder %s: served after %lld us\n",
                how == 0   ? "killed"
                : how == 1 ? "failed"
                           : "done",
                (long long)(now_us() - start));
    vnd_engine_stats(f.e, &st);
    if (how == 2)
        CHECK_EQ(st.fetched_chunks, 0);
    else if (how == 3) /* what it has claimed is not waited for any longer; the rest is not touched */
        CHECK(st.fetched_chunks >= 3);
    else
        CHECK(st.fetched_chunks >= 3);
    fix_down(&f);
}

static void check_holder(int how)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    pid_t holder, waiter;

    memset(board, 0, sizeof *board);
    fix_dir_make(dir);
    holder = child(hold_job, dir, b, how);
    waiter = child(wait_for_holder, dir, b, how);
    wait_for(&board->step, 2);
    if (how == 0) {
        int status;
        CHECK(!kill(holder, SIGKILL));
        CHECK(waitpid(holder, &status, 0) == holder);
    }
    if (how == 3)
        CHECK(!kill(holder, SIGSTOP));
    else
        atomic_store(&board->go, 1);
    reap(waiter);
    if (how == 3) {
        int status;
        CHECK(!kill(holder, SIGKILL));
        CHECK(waitpid(holder, &status, 0) == holder);
    } else if (how) {
        reap(holder);
    }
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* A process whose image contradicts the one in use elsewhere has files of its own and spoils nothing. */
static void use_true(const char *dir, struct fix_blob *b, int me)
{
    struct fix f = { 0 };

    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, 20 * CHUNK);
    atomic_store(&board->step, 1);
    wait_for(&board->go, 1);
    fix_check(f.h, b, 0, 99 * CHUNK);
    fix_down(&f);
}

static void use_false(const char *dir, struct fix_blob *b, int me)
{
    struct fix f = { 0 };
    uint8_t buf[64];

    wait_for(&board->step, 1);
    b->chunk[3].digest[9] ^= 1;
    fix_up(&f, dir, b, 1);
    CHECK_EQ(fix_read(f.h, b, 3 * CHUNK, 64, buf), -EIO);
    fix_check(f.h, b, 4 * CHUNK, 10 * CHUNK);
    fix_down(&f);
    /* The same with a chunk moved over another's bytes. */
    b->chunk[3].digest[9] ^= 1;
    b->hide_from = 4;
    b->hide_to = 5;
    b->chunk[3].uoff += 100;
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 5 * CHUNK, 10 * CHUNK);
    fix_down(&f);
    atomic_store(&board->go, 1);
}

TEST(contradiction)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    pid_t a, c;

    memset(board, 0, sizeof *board);
    fix_dir_make(dir);
    a = child(use_true, dir, b, 0);
    c = child(use_false, dir, b, 1);
    reap(c);
    reap(a);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Locks themselves: prefix, release, freed by death. */
TEST(locks)
{
    char dir[200], path[300];
    int a, b;

    fix_dir_make(dir);
    sprintf(path, "%s/file", dir);
    a = open(path, O_RDWR | O_CREAT, 0600);
    b = open(path, O_RDWR);
    CHECK_EQ(claim_units(a, 10, 5), 5);
    CHECK_EQ(claim_units(a, 30, 5), 5);
    CHECK_EQ(claim_units(b, 0, 40), 10); /* the free prefix, whichever conflict the kernel names */
    claim_release(b, 0, 10);
    CHECK_EQ(claim_units(b, 12, 2), 0);
    CHECK_EQ(claim_units(b, 15, 40), 15);
    CHECK(claim_foreign(b, 12));
    CHECK(!claim_foreign(b, 15));
    CHECK(claim_foreign(a, 15));
    close(b);
    CHECK(!claim_foreign(a, 15));
    close(a);
    fix_dir_remove(dir);
}

/* What ends a holder's claim for who waits: see hold_job. */
TEST(waiter_goes_on_when_the_holder_is_killed)
{
    check_holder(0);
}

TEST(waiter_goes_on_when_the_holder_fails)
{
    check_holder(1);
}

TEST(waiter_reads_what_the_holder_fetched)
{
    check_holder(2);
}

/* A process that is stopped keeps its claims: others take over, well before their readers' deadline. */
TEST(holder_is_stopped)
{
    check_holder(3);
}

/* Another process that waits is woken, long before it would look again by itself. */
static void wait_for_wake(const char *dir, struct fix_blob *b, int me)
{
    struct claim_wake w = { 0 };
    int fd = open(dir, O_RDONLY | O_DIRECTORY);
    int64_t began = now_us();

    CHECK(fd >= 0 && claim_wake_open(&w, fd) == 0 && w.shared);
    uint32_t gen = claim_wake_enter(&w);
    atomic_store(&board->step, 1);
    claim_wake_wait(&w, gen, 60000);
    claim_wake_leave(&w);
    CHECK(now_us() - began < 50 * 1000000);
    claim_wake_close(&w);
    close(fd);
}

TEST(wake_reaches_another_process)
{
    char dir[200];
    struct claim_wake w = { 0 };
    int fd;
    pid_t waiter;

    memset(board, 0, sizeof *board);
    fix_dir_make(dir);
    fd = open(dir, O_RDONLY | O_DIRECTORY);
    CHECK(fd >= 0 && claim_wake_open(&w, fd) == 0 && w.shared);
    waiter = child(wait_for_wake, dir, NULL, 0);
    wait_for(&board->step, 1);
    claim_wake_all(&w);
    reap(waiter);
    claim_wake_close(&w);
    close(fd);
    fix_dir_remove(dir);
}

/* ---- the futex that all processes of a work directory share */

struct sleeper {
    struct claim_wake wake;
    _Atomic int tid;
    int64_t slept_us;
};

static void *sleep_for_a_wake(void *arg)
{
    struct sleeper *s = arg;
    uint32_t gen = claim_wake_enter(&s->wake);
    int64_t began = now_us();

    atomic_store(&s->tid, (int)syscall(SYS_gettid));
    claim_wake_wait(&s->wake, gen, 2 * PATIENCE_US / 1000);
    claim_wake_leave(&s->wake);
    s->slept_us = now_us() - began;
    return NULL;
}

static bool is_in_futex(int tid)
{
    char path[64], line[64] = "";
    FILE *file;

    snprintf(path, sizeof path, "/proc/self/task/%d/syscall", tid);
    file = fopen(path, "r");
    CHECK(file);
    CHECK(fgets(line, sizeof line, file));
    fclose(file);
    return atoi(line) == SYS_futex;
}

TEST(waiters_of_other_processes_are_woken)
{
    char dir[200];
    struct sleeper s = { 0 };
    struct claim_wake here = { 0 };
    pthread_t thread;
    int fd;

    fix_dir_make(dir);
    fd = open(dir, O_RDONLY | O_DIRECTORY);
    CHECK(claim_wake_open(&s.wake, fd) == 0 && claim_wake_open(&here, fd) == 0 && here.shared && s.wake.shared);
    CHECK(pthread_create(&thread, NULL, sleep_for_a_wake, &s) == 0);
    CHECK_SOON(atomic_load(&s.tid) && is_in_futex(atomic_load(&s.tid)));
    claim_wake_all(&here);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(s.slept_us < PATIENCE_US);
    claim_wake_close(&s.wake);
    claim_wake_close(&here);
    close(fd);
    fix_dir_remove(dir);
}
