/* The cache on disk: what survives a restart, a kill, a reboot; what strangers do to the files. */
#include <signal.h>
#include <sys/wait.h>

#include "store_fixture.h"

#define N 24
#define CHUNK 16384

static void path_of(char *out, const char *dir, const char *name)
{
    sprintf(out, "%s/%s", dir, name);
}

static void poke(const char *dir, const char *name, off_t at, uint8_t xor)
{
    char path[300];
    uint8_t byte;
    int fd;

    path_of(path, dir, name);
    fd = open(path, O_RDWR);
    CHECK(fd >= 0);
    CHECK(pread(fd, &byte, 1, at) == 1);
    byte ^= xor;
    CHECK(pwrite(fd, &byte, 1, at) == 1);
    close(fd);
}

static uint8_t peek(const char *dir, const char *name, off_t at)
{
    char path[300];
    uint8_t byte;
    int fd;

    path_of(path, dir, name);
    fd = open(path, O_RDONLY);
    CHECK(fd >= 0);
    CHECK(pread(fd, &byte, 1, at) == 1);
    close(fd);
    return byte;
}

static void fill_cache(const char *dir, struct fix_blob *b)
{
    struct fix f = { 0 };

    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    fix_down(&f);
}

/* Reads everything; says how many jobs of either kind that took. */
static void read_all(const char *dir, struct fix_blob *b, uint64_t *fetches, uint64_t *verifies)
{
    struct fix f = { 0 };

    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    *verifies = atomic_load(&f.server.verify_jobs);
    *fetches = atomic_load(&f.server.jobs) - *verifies;
    fix_down(&f);
}

TEST(restart_uses_cache)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    uint64_t fetches, verifies;
    struct stat st;
    char path[300];

    fix_dir_make(dir);
    fill_cache(dir, b);
    /* Nydus's layout: sizes, magics, bits from the top. */
    path_of(path, dir, "blob.blob.data");
    CHECK(!stat(path, &st) && st.st_size == (off_t)b->plain_len);
    path_of(path, dir, "blob.blob.data.chunk_map");
    CHECK(!stat(path, &st) && st.st_size == 4096 + (N + 7) / 8);
    CHECK_EQ(peek(dir, "blob.blob.data.chunk_map", 0), 0x50);
    CHECK_EQ(peek(dir, "blob.blob.data.chunk_map", 4096), 0xff);
    CHECK_EQ(peek(dir, "blob.blob.data.chunk_map", 4096 + 2) & 0xfe, 0xfe);
    read_all(dir, b, &fetches, &verifies);
    CHECK_EQ(fetches + verifies, 0);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* A reboot: other boot id, nothing durable yet. R's bits lead to verification, not to the network. */
TEST(reboot_verifies)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_LZ4_BLOCK, N, CHUNK);
    uint64_t fetches, verifies;

    fix_dir_make(dir);
    fill_cache(dir, b);
    poke(dir, ".virtiofsd-nydus/blob.vnd", 16, 1);
    read_all(dir, b, &fetches, &verifies);
    CHECK_EQ(fetches, 0);
    CHECK(verifies > 0);
    read_all(dir, b, &fetches, &verifies);
    CHECK_EQ(fetches + verifies, 0);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Losing the side file costs verification only. */
TEST(side_file_lost)
{
    char dir[200], path[300];
    struct fix_blob *b = fix_blob_new("blob", CODEC_NONE, N, CHUNK);
    uint64_t fetches, verifies;

    fix_dir_make(dir);
    fill_cache(dir, b);
    path_of(path, dir, ".virtiofsd-nydus/blob.vnd");
    CHECK(!unlink(path));
    read_all(dir, b, &fetches, &verifies);
    CHECK_EQ(fetches, 0);
    CHECK(verifies > 0);
    /* Garbage and a foreign size in its place. */
    CHECK(!truncate(path, 100));
    read_all(dir, b, &fetches, &verifies);
    CHECK_EQ(fetches, 0);
    CHECK(verifies > 0);
    poke(dir, ".virtiofsd-nydus/blob.vnd", 2, 0xff);
    read_all(dir, b, &fetches, &verifies);
    CHECK_EQ(fetches, 0);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* A byte flipped in a stopped daemon's cache file, its bits set: found, fetched anew, never given out. */
TEST(flip_while_stopped)
{
    static const uint32_t codecs[] = { CODEC_NONE, CODEC_LZ4_BLOCK, CODEC_ZSTD };

    for (int k = 0; k < 3; k++) {
        char dir[200];
        struct fix_blob *b = fix_blob_new("blob", codecs[k], N, CHUNK);
        struct fix f = { 0 };

        fix_dir_make(dir);
        fill_cache(dir, b);
        poke(dir, "blob.blob.data", 7 * CHUNK + 99, 0x10);
        fix_up(&f, dir, b, 2);
        fix_check(f.h, b, 0, (N - 1) * CHUNK);
        CHECK(atomic_load(&f.server.verify_jobs) > 0);
        CHECK_EQ(atomic_load(&f.server.jobs) - atomic_load(&f.server.verify_jobs), 1);
        CHECK(fix_said(f.e, VND_CAUSE_DIGEST, "chunk 7"));
        fix_down(&f);
        fix_check((fix_up(&f, dir, b, 1), f.h), b, 7 * CHUNK, CHUNK);
        fix_down(&f);
        fix_blob_free(b);
        fix_dir_remove(dir);
    }
}

/* Bits that a stranger set over holes are hints. */
TEST(foreign_bits)
{
    char dir[200], path[300];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    uint32_t head[4] = { 0x424D4150, 1, 0x434D4150, 0x4D4D4150 };
    uint8_t bits[3] = { 0xff, 0xff, 0xff };
    uint64_t fetches, verifies;
    int fd;

    fix_dir_make(dir);
    path_of(path, dir, "blob.blob.data.chunk_map");
    fd = open(path, O_RDWR | O_CREAT, 0644);
    CHECK(pwrite(fd, head, 16, 0) == 16 && pwrite(fd, bits, 3, 4096) == 3);
    close(fd);
    read_all(dir, b, &fetches, &verifies);
    CHECK(verifies > 0);
    CHECK(fetches > 0);
    read_all(dir, b, &fetches, &verifies);
    CHECK_EQ(fetches + verifies, 0);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* A chunk map of another size or of another kind is left as it is; reading works without. */
TEST(foreign_map_size)
{
    char dir[200], path[300];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 };
    struct stat st;

    fix_dir_make(dir);
    path_of(path, dir, "blob.blob.data.chunk_map");
    close(open(path, O_RDWR | O_CREAT, 0644));
    CHECK(!truncate(path, 5000));
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, 5 * CHUNK);
    CHECK(fix_said(f.e, VND_CAUSE_IO, "chunk_map"));
    fix_down(&f);
    CHECK(!stat(path, &st) && st.st_size == 5000);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* A data file larger than the blob is another table's: left alone. A symbolic link is not followed: EIO. */
TEST(wrong_data_file)
{
    char dir[200], path[300];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 };
    uint8_t buf[16];
    struct stat st;

    fix_dir_make(dir);
    path_of(path, dir, "blob.blob.data");
    close(open(path, O_RDWR | O_CREAT, 0644));
    CHECK(!truncate(path, (off_t)b->plain_len + 1));
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, 5 * CHUNK);
    fix_down(&f);
    CHECK(!stat(path, &st) && st.st_size == (off_t)b->plain_len + 1 && !st.st_blocks);
    CHECK(!unlink(path));
    CHECK(!symlink("/etc/hostname", path));
    fix_up(&f, dir, b, 1);
    CHECK_EQ(fix_read(f.h, b, 0, sizeof buf, buf), -EIO);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* The data file is cut under a running daemon: bytes are fetched again, none is wrong. */
TEST(cut_while_running)
{
    char dir[200], path[300];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 };

    fix_dir_make(dir);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    path_of(path, dir, "blob.blob.data");
    CHECK(!truncate(path, 3 * CHUNK));
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    CHECK(fix_said(f.e, VND_CAUSE_IO, "cut short"));
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    /* Unlinked: the open file serves on. */
    CHECK(!unlink(path));
    fix_check(f.h, b, 0, N * CHUNK - 4096 + 123);
    fix_down(&f);
    fix_check((fix_up(&f, dir, b, 1), f.h), b, 0, (N - 1) * CHUNK);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Side file and chunk map cut under a running daemon: no SIGBUS, no wrong byte. */
TEST(maps_cut_while_running)
{
    char dir[200], path[300];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 };

    fix_dir_make(dir);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, 10 * CHUNK);
    path_of(path, dir, ".virtiofsd-nydus/blob.vnd");
    CHECK(!truncate(path, 0));
    path_of(path, dir, "blob.blob.data.chunk_map");
    CHECK(!truncate(path, 0));
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    fix_down(&f);
    fix_check((fix_up(&f, dir, b, 1), f.h), b, 0, (N - 1) * CHUNK);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* A work directory that cannot be written: what is in it is verified and used. */
TEST(read_only_dir)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 };

    fix_dir_make(dir);
    fill_cache(dir, b);
    if (fix_dir_read_only(dir)) {
        fix_up(&f, dir, b, 1);
        fix_check(f.h, b, 0, (N - 1) * CHUNK);
        CHECK_EQ(atomic_load(&f.server.jobs), atomic_load(&f.server.verify_jobs));
        fix_check(f.h, b, 0, (N - 1) * CHUNK + 5);
        fix_down(&f);
        CHECK(!umount(dir));
    }
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Killed at any moment, many times: the cache stays right and keeps what it had. */
TEST(sigkill)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    uint32_t seed = 11;

    fix_dir_make(dir);
    for (int round = 0; round < 12; round++) {
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
            struct fix f = { 0 };
            f.server.feed_bytes = 300;
            fix_up(&f, dir, b, 2);
            for (;;)
                for (uint32_t i = 0; i < N - 1; i++)
                    fix_check(f.h, b, (uint64_t)((i * 7 + (uint32_t)round) % (N - 1)) * CHUNK, CHUNK);
        }
        usleep(1000 + fix_random(&seed) % 9000);
        CHECK(!kill(pid, SIGKILL));
        int status;
        CHECK(waitpid(pid, &status, 0) == pid);
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        struct fix f = { 0 };
        fix_up(&f, dir, b, 1);
        fix_check(f.h, b, 0, (uint32_t)(1 + round) * CHUNK);
        fix_down(&f);
    }
    uint64_t fetches, verifies;
    read_all(dir, b, &fetches, &verifies);
    read_all(dir, b, &fetches, &verifies);
    CHECK_EQ(fetches + verifies, 0);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Bytes written, no bit yet, then killed: as if nothing had come. And T without R is fine. */
TEST(killed_between_write_and_bit)
{
    char dir[200], path[300];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 };
    uint64_t fetches, verifies;
    int fd;

    fix_dir_make(dir);
    fix_up(&f, dir, b, 0);
    fix_load_table(&f);
    fix_down(&f);
    path_of(path, dir, "blob.blob.data");
    fd = open(path, O_RDWR);
    CHECK(pwrite(fd, b->plain, CHUNK / 2, 0) == CHUNK / 2);
    close(fd);
    read_all(dir, b, &fetches, &verifies);
    CHECK(fetches > 0);
    poke(dir, "blob.blob.data.chunk_map", 4096, 0xff); /* R loses eight chunks */
    read_all(dir, b, &fetches, &verifies);
    CHECK_EQ(fetches + verifies, 0);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* Killed in the middle of a write: what was trusted stays so. A file that changed without such a write, or later, is
 * verified. */
TEST(killed_while_writing)
{
    for (int how = 0; how < 3; how++) {
        char dir[200], path[300];
        struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
        struct side_header h;
        struct timespec now;
        uint64_t fetches, verifies;
        int fd;

        fix_dir_make(dir);
        fill_cache(dir, b);
        path_of(path, dir, ".virtiofsd-nydus/blob.vnd");
        fd = open(path, O_RDWR);
        CHECK(pread(fd, &h, sizeof h, 0) == sizeof h);
        CHECK_EQ(atomic_load(&h.writing), 0);
        clock_gettime(CLOCK_REALTIME, &now);
        atomic_store(&h.writing, how != 1);
        atomic_store(&h.write_ns, ((uint64_t)now.tv_sec - (how == 2 ? 5 : 0)) * 1000000000u + (uint64_t)now.tv_nsec);
        CHECK(pwrite(fd, &h, sizeof h, 0) == sizeof h);
        close(fd);
        path_of(path, dir, "blob.blob.data");
        fd = open(path, O_RDWR);
        CHECK(pwrite(fd, b->plain, 100, (N - 1) * CHUNK + 7) == 100);
        close(fd);
        read_all(dir, b, &fetches, &verifies);
        CHECK_EQ(fetches, 0);
        CHECK_EQ(verifies > 0, how != 0);
        read_all(dir, b, &fetches, &verifies);
        CHECK_EQ(fetches + verifies, 0);
        fix_blob_free(b);
        fix_dir_remove(dir);
    }
}

/* D: what was synced survives a reboot without verification. */
TEST(durable)
{
    char dir[200];
    struct fix_blob *b = fix_blob_new("blob", CODEC_ZSTD, N, CHUNK);
    struct fix f = { 0 };
    uint64_t fetches, verifies;

    fix_dir_make(dir);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    cachefile_sync(f.h->cache);
    fix_down(&f);
    poke(dir, ".virtiofsd-nydus/blob.vnd", 16, 1);
    read_all(dir, b, &fetches, &verifies);
    CHECK_EQ(fetches + verifies, 0);
    fix_blob_free(b);
    fix_dir_remove(dir);
}
