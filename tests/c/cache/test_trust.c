/* What is trusted, and when no longer: the moments at which another process, a power cut or a stranger comes in between. The
 * C library's calls are put in the place of the system's here, so that each test can be in that moment.
 */
#include <sys/syscall.h>
#include <sys/uio.h>

#include "store_fixture.h"

#define N 24
#define CHUNK 16384

static void (*in_preadv2)(void), (*in_fdatasync)(int fd), (*in_claim)(void);
static int sync_errno;
static bool no_boot_id;
static struct fix *it;
static uint64_t durable_at_sync;
static int syncs_of_side;

ssize_t preadv2(int fd, const struct iovec *iov, int n, off_t off, int flags)
{
    ssize_t got = syscall(SYS_preadv2, fd, iov, n, off, 0, flags);

    if (in_preadv2)
        in_preadv2();
    return got;
}

int fdatasync(int fd)
{
    if (in_fdatasync)
        in_fdatasync(fd);
    if (sync_errno) {
        errno = sync_errno;
        return -1;
    }
    return (int)syscall(SYS_fdatasync, fd);
}

int fcntl(int fd, int cmd, ...)
{
    va_list ap;
    void *arg;
    int rc;

    va_start(ap, cmd);
    arg = va_arg(ap, void *);
    va_end(ap);
    rc = (int)syscall(SYS_fcntl, fd, cmd, arg);
    if (!rc && cmd == F_OFD_SETLK && in_claim && ((struct flock *)arg)->l_type == F_WRLCK &&
        ((struct flock *)arg)->l_start < CLAIM_INIT)
        in_claim();
    return rc;
}

int open(const char *path, int flags, ...)
{
    va_list ap;
    int mode;

    va_start(ap, flags);
    mode = flags & O_CREAT ? va_arg(ap, int) : 0;
    va_end(ap);
    if (no_boot_id && !strcmp(path, "/proc/sys/kernel/random/boot_id")) {
        errno = EACCES;
        return -1;
    }
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

static void up(struct fix *f, char dir[200], struct fix_blob **b)
{
    *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    fix_dir_make(dir);
    memset(f, 0, sizeof *f);
    fix_up(f, dir, *b, 1);
    fix_check(f->h, *b, 0, (N - 1) * CHUNK);
    it = f;
}

static void down(struct fix *f, const char *dir, struct fix_blob *b)
{
    in_preadv2 = NULL;
    in_fdatasync = NULL;
    fix_down(f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

static void invalidate_once(void)
{
    struct cachefile *c = it->h->cache;

    in_preadv2 = NULL;
    pthread_mutex_lock(&c->lock);
    cachefile_invalidate(c, false);
    pthread_mutex_unlock(&c->lock);
}

TEST(bytes_read_while_they_are_invalidated_are_not_served)
{
    static const uint8_t wrong[100];
    char dir[200];
    struct fix f;
    struct fix_blob *b;

    up(&f, dir, &b);
    /* The bytes change, and only then the epoch: what the read has got is wrong. */
    CHECK(pwrite(f.h->cache->data_fd, wrong, sizeof wrong, 5 * CHUNK) == sizeof wrong);
    in_preadv2 = invalidate_once;
    fix_check(f.h, b, 5 * CHUNK, 4096);
    down(&f, dir, b);
}

static void invalidate_in_sync(int fd)
{
    in_fdatasync = NULL;
    invalidate_once();
}

TEST(chunks_invalidated_during_a_sync_do_not_become_durable)
{
    char dir[200];
    struct fix f;
    struct fix_blob *b;

    up(&f, dir, &b);
    in_fdatasync = invalidate_in_sync;
    cachefile_sync(f.h->cache);
    CHECK(!in_fdatasync);
    CHECK_EQ(atomic_load(&f.h->cache->durable[0]), 0);
    down(&f, dir, b);
}

/* The kernel has dropped the pages that it could not write, and says so once. */
TEST(what_could_not_be_synced_is_not_trusted)
{
    char dir[200];
    struct fix f;
    struct fix_blob *b;

    up(&f, dir, &b);
    CHECK(cachefile_ready(f.h->cache, 0));
    sync_errno = EIO;
    cachefile_sync(f.h->cache);
    sync_errno = 0;
    CHECK(!cachefile_ready(f.h->cache, 0));
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    down(&f, dir, b);
}

static void finish_chunk_3(void)
{
    struct cachefile *c = it->h->cache;

    in_claim = NULL;
    CHECK(pwrite(c->data_fd, it->server.blob->plain + 3 * CHUNK, CHUNK, 3 * CHUNK) == CHUNK);
    cachefile_set_ready(c, 3);
}

/* The last holder finished between our look and our claim: there is no job, and no claim stays. */
TEST(a_claim_for_nothing_is_given_back)
{
    char dir[200], path[300];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix_reader r;
    vnd_job job;
    int fd;

    fix_dir_make(dir);
    fix_up(&f, dir, b, 0);
    fix_load_table(&f);
    f.server.blob = b;
    it = &f;
    vnd_blob_set_amplify(f.h, 0);
    for (uint32_t i = 0; i < N; i++) /* no neighbour is worth taking along */
        if (i != 3)
            cachefile_set_ready(f.h->cache, i);
    snprintf(path, sizeof path, "%s/.virtiofsd-nydus/blob.vnd", dir);
    fd = open(path, O_RDWR);
    fix_park(&f, b, &r, 3);
    in_claim = finish_chunk_3;
    CHECK_EQ(vnd_job_next(f.e, &job, 0, 50), -ETIMEDOUT);
    CHECK(!in_claim);
    fix_reader_wait(&r);
    CHECK(!claim_foreign(fd, 3));
    close(fd);
    down(&f, dir, b);
}

/* Cut while another process has it open, so that no change is looked for at the start: what was there may be gone. */
TEST(a_cut_file_is_not_trusted_beside_another_process)
{
    char dir[200], path[300];
    struct fix f, g = { 0 };
    struct fix_blob *b;

    up(&f, dir, &b);
    snprintf(path, sizeof path, "%s/blob.blob.data", dir);
    CHECK(!truncate(path, 3 * CHUNK));
    fix_up(&g, dir, b, 1);
    fix_check(g.h, b, 0, (N - 1) * CHUNK);
    fix_down(&g);
    down(&f, dir, b);
}

static void note_durable(int fd)
{
    if (fd != it->h->cache->side_fd)
        return;
    syncs_of_side++;
    durable_at_sync = atomic_load(&it->h->cache->durable[0]);
    CHECK(atomic_load(&it->h->cache->head->epoch) & 1); /* nothing may be written yet */
}

TEST(cleared_durable_bits_are_synced_before_bytes_change)
{
    char dir[200];
    struct fix f;
    struct fix_blob *b;

    up(&f, dir, &b);
    cachefile_sync(f.h->cache);
    CHECK(atomic_load(&f.h->cache->durable[0]) != 0);
    durable_at_sync = 1;
    in_fdatasync = note_durable;
    invalidate_once();
    CHECK_EQ(syncs_of_side, 1);
    CHECK_EQ(durable_at_sync, 0);
    down(&f, dir, b);
}

/* Another process invalidates between the look at the epoch and the bits. */
TEST(commit_and_invalidation_exclude_each_other)
{
    char dir[200];
    struct fix f, g = { 0 };
    struct fix_blob *b;
    uint64_t epoch;
    int fd;

    up(&f, dir, &b);
    fix_up(&g, dir, b, 1);
    fix_check(g.h, b, 0, CHUNK);
    epoch = cachefile_epoch(f.h->cache);
    fd = g.h->cache->side_fd;
    CHECK(cachefile_commit_begin(f.h->cache, epoch));
    CHECK_EQ(claim_byte(fd, CLAIM_EVICT, true, 0), -EAGAIN);
    cachefile_commit_end(f.h->cache);
    CHECK_EQ(claim_byte(fd, CLAIM_EVICT, true, 0), 0); /* the other is within an invalidation */
    CHECK(!cachefile_commit_begin(f.h->cache, epoch));
    claim_byte_release(fd, CLAIM_EVICT);
    pthread_mutex_lock(&g.h->cache->lock);
    cachefile_invalidate(g.h->cache, false);
    pthread_mutex_unlock(&g.h->cache->lock);
    CHECK(!cachefile_commit_begin(f.h->cache, epoch));
    fix_down(&g);
    down(&f, dir, b);
}

/* Stopped for longer than the other waits, within a commit: the bits that it sets afterwards do not stay. */
TEST(a_commit_that_was_overtaken_takes_its_bits_back)
{
    char dir[200];
    struct fix f;
    struct fix_blob *b;

    up(&f, dir, &b);
    CHECK(cachefile_commit_begin(f.h->cache, cachefile_epoch(f.h->cache)));
    atomic_fetch_add(&f.h->cache->head->epoch, 2);
    cachefile_set_ready(f.h->cache, 3);
    cachefile_commit_end(f.h->cache);
    CHECK(!cachefile_ready(f.h->cache, 3));
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    down(&f, dir, b);
}

TEST(unreadable_boot_id_is_no_same_boot)
{
    char dir[200];
    struct fix f;
    struct fix_blob *b;

    no_boot_id = true;
    up(&f, dir, &b);
    fix_down(&f);
    memset(&f, 0, sizeof f);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, CHUNK);
    CHECK(atomic_load(&f.server.verify_jobs) > 0); /* nothing was durable, so nothing is trusted */
    down(&f, dir, b);
}

TEST(side_file_of_another_size_is_another_table)
{
    char dir[200], path[300];
    struct side_header h;
    struct fix f;
    struct fix_blob *b;
    int fd;

    up(&f, dir, &b);
    fix_down(&f);
    snprintf(path, sizeof path, "%s/.virtiofsd-nydus/blob.vnd", dir);
    fd = open(path, O_RDWR);
    CHECK(fd >= 0 && pread(fd, &h, sizeof h, 0) == sizeof h);
    h.size_bytes -= 1;
    CHECK(pwrite(fd, &h, sizeof h, 0) == sizeof h);
    close(fd);
    memset(&f, 0, sizeof f);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, CHUNK);
    CHECK(atomic_load(&((struct blob_core *)f.h->core)->apart));
    down(&f, dir, b);
}

TEST(a_chunk_without_a_place_is_not_ready)
{
    char dir[200];
    struct fix f;
    struct fix_blob *b;
    struct fix_reader r;
    struct extent ext[1];

    up(&f, dir, &b);
    fix_extents(f.h, b, 0, CHUNK, ext, 1);
    CHECK(store_ready(ext, 1));
    fix_reader_init(&r);
    ext[0].uoff += 4096; /* not where the chunk is */
    CHECK(!store_ready(ext, 1));
    CHECK_EQ(store_want(&r.w, ext, 1), -EIO);
    ext[0].uoff -= 4096;
    ext[0].chunk = N + 1000;
    CHECK(!store_ready(ext, 1));
    CHECK_EQ(store_want(&r.w, ext, 1), -EIO);
    down(&f, dir, b);
}

/* After a job has ended, however it ended, its units are free for other processes. */
TEST(an_ended_job_holds_no_claims)
{
    for (int error = 0; error < 2; error++) {
        char dir[200], path[300];
        struct fix f = { 0 };
        struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
        struct fix_reader r;
        vnd_job job;
        int fd;

        fix_dir_make(dir);
        fix_up(&f, dir, b, 0);
        fix_load_table(&f);
        f.server.blob = b;
        snprintf(path, sizeof path, "%s/.virtiofsd-nydus/blob.vnd", dir);
        fd = open(path, O_RDWR);
        CHECK(fd >= 0);
        fix_park(&f, b, &r, 3);
        fix_next_job(&f, &job);
        CHECK(claim_foreign(fd, 3));
        if (error)
            vnd_job_end(f.e, job.id, EIO, VND_CAUSE_NETWORK, "away");
        else
            fix_serve_now(&f, &job);
        CHECK(!claim_foreign(fd, 3));
        close(fd);
        fix_down(&f);
        fix_blob_free(b);
        fix_dir_remove(dir);
    }
}

/* Each field by which a side file says what it belongs to: where one is another's, nothing is taken from it. */
TEST(a_side_file_of_another_data_file)
{
    static const off_t field[] = { offsetof(struct side_header, magic),     offsetof(struct side_header, version),
                                   offsetof(struct side_header, n),         offsetof(struct side_header, dev),
                                   offsetof(struct side_header, ino),       offsetof(struct side_header, btime_ns),
                                   offsetof(struct side_header, size_bytes) };

    for (size_t i = 0; i < sizeof field / sizeof *field; i++) {
        char dir[200], path[300];
        struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
        struct fix f = { 0 };
        uint8_t byte;
        int fd;

        fix_dir_make(dir);
        fix_up(&f, dir, b, 1);
        fix_check(f.h, b, 0, (N - 1) * CHUNK);
        fix_down(&f);
        snprintf(path, sizeof path, "%s/.virtiofsd-nydus/blob.vnd", dir);
        fd = open(path, O_RDWR);
        CHECK(fd >= 0 && pread(fd, &byte, 1, field[i]) == 1);
        byte ^= 1;
        CHECK(pwrite(fd, &byte, 1, field[i]) == 1);
        close(fd);
        f = (struct fix){ 0 };
        fix_up(&f, dir, b, 1);
        fix_check(f.h, b, 0, (N - 1) * CHUNK);
        CHECK(atomic_load(&f.server.jobs) > 0);
        fix_down(&f);
        fix_blob_free(b);
        fix_dir_remove(dir);
    }
}
