/* Chunks that cannot be written: no room, no permission. Readers get them from memory, and no bit is set. */
#include <signal.h>
#include <sys/resource.h>

#include "store_fixture.h"

#define N 24
#define CHUNK 16384

/* The file size limit stands for a full disk. */
static void set_disk_full(bool full)
{
    struct rlimit limit;

    signal(SIGXFSZ, SIG_IGN);
    CHECK(!getrlimit(RLIMIT_FSIZE, &limit));
    limit.rlim_cur = full ? 0 : limit.rlim_max;
    CHECK(!setrlimit(RLIMIT_FSIZE, &limit));
}

TEST(no_space)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 };

    fix_dir_make(dir);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 20 * CHUNK, 100); /* files exist in full size */
    set_disk_full(true);
    for (int round = 0; round < 2; round++) {
        fix_check(f.h, b, 0, 6 * CHUNK);
        fix_check(f.h, b, 5 * CHUNK + 5, 3 * CHUNK);
        fix_check(f.h, b, 19 * CHUNK, 2 * CHUNK); /* one from memory, one from the file */
    }
    CHECK(fix_said(f.e, VND_CAUSE_SPACE, "memory"));
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

TEST(space_again)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 };

    fix_dir_make(dir);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 20 * CHUNK, 100);
    set_disk_full(true);
    fix_check(f.h, b, 0, 6 * CHUNK);
    CHECK(fix_said(f.e, VND_CAUSE_SPACE, "memory"));
    set_disk_full(false);
    uncached_drop(f.h->core);
    fix_check(f.h, b, 10 * CHUNK, 2 * CHUNK);
    CHECK(fix_said(f.e, VND_CAUSE_NONE, "again"));
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* A real one, where we may mount one. */
TEST(full_file_system)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 };

    fix_dir_make(dir);
    if (mount("none", dir, "tmpfs", 0, "size=32k") == 0) {
        fix_up(&f, dir, b, 1);
        fix_check(f.h, b, 0, 20 * CHUNK);
        fix_check(f.h, b, 0, 20 * CHUNK);
        CHECK(fix_said(f.e, VND_CAUSE_SPACE, "memory"));
        fix_down(&f);
        CHECK(!umount(dir));
    } else {
        CHECK_EQ(errno, EPERM);
    }
    fix_blob_free(b);
    fix_dir_remove(dir);
}

static bool is_fetching(struct fix *f)
{
    bool yes;

    pthread_mutex_lock(&f->e->fetcher->lock);
    yes = f->e->fetcher->sources || f->e->fetcher->running;
    pthread_mutex_unlock(&f->e->fetcher->lock);
    return yes;
}

/* Nothing is fetched ahead that could not be kept; readers are served all the same. */
TEST(no_space_ends_prefetch)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_NONE, 2000, CHUNK);
    struct fix f = { 0 };

    fix_dir_make(dir);
    f.server.feed_bytes = 1 << 20;
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, 100);
    set_disk_full(true);
    CHECK_EQ(vnd_prefetch(f.h, 0, 0, 3), 0);
    CHECK_SOON(!is_fetching(&f));
    CHECK(atomic_load(&f.server.fed_bytes) < 8u << 20); /* of 32 MiB */
    fix_check(f.h, b, 1500 * CHUNK, 4 * CHUNK);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

TEST(empty_dir_that_cannot_be_written)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 };
    uint64_t total;

    fix_dir_make(dir);
    if (fix_dir_read_only(dir)) {
        fix_up(&f, dir, b, 1);
        for (int round = 0; round < 2; round++) {
            fix_check(f.h, b, 0, 6 * CHUNK);
            fix_check(f.h, b, 5 * CHUNK + 5, 3 * CHUNK);
        }
        CHECK_EQ(vnd_blob_ready(f.h, &total), 0);
        CHECK(atomic_load(&f.server.jobs) > 0);
        CHECK(fix_said(f.e, VND_CAUSE_SPACE, "memory"));
        fix_down(&f);
        CHECK(!umount(dir));
    }
    fix_blob_free(b);
    fix_dir_remove(dir);
}
