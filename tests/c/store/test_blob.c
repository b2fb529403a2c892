/* One blob id, two tables: each image is read by its own, whichever image comes first, in one process and in two, and no file that
 * holds one's bytes is written for the other.
 */
#include "store_fixture.h"

#define N 24
#define CHUNK 16384

/* The same blob on the server; two of its chunks are the other way round in the files of this image. */
static struct fix_blob *swapped_blob(void)
{
    struct fix_blob *b = fix_blob_new("blob", CODEC_LZ4_BLOCK, N, CHUNK);
    struct blob_chunk three = b->chunk[3];
    uint8_t plain[CHUNK];

    b->chunk[3] = b->chunk[4];
    b->chunk[4] = three;
    b->chunk[3].index = 3;
    b->chunk[3].uoff = 3 * CHUNK;
    b->chunk[4].index = 4;
    b->chunk[4].uoff = 4 * CHUNK;
    memcpy(plain, b->plain + 3 * CHUNK, CHUNK);
    memcpy(b->plain + 3 * CHUNK, b->plain + 4 * CHUNK, CHUNK);
    memcpy(b->plain + 4 * CHUNK, plain, CHUNK);
    return b;
}

/* Where the blob's data file is. */
static void data_path(struct vnd_blob *b, const char *dir, char out[400])
{
    char name[CORE_NAME_MAX];

    core_name(b->core, name);
    snprintf(out, 400, "%s/%s.blob.data", dir, name);
}

static uint8_t *data_of(const char *path, size_t len)
{
    uint8_t *p = malloc(len);
    int fd = open(path, O_RDONLY);

    CHECK(fd >= 0 && pread(fd, p, len, 0) == (ssize_t)len);
    close(fd);
    return p;
}

static void make_dir(char dir[200], bool private)
{
    char path[300];

    fix_dir_make(dir);
    snprintf(path, sizeof path, "%s/.virtiofsd-nydus", dir);
    if (private) /* as on a network file system: no side file */
        close(open(path, O_RDWR | O_CREAT, 0644));
}

static void both(bool private, bool compressed)
{
    char dir[200], path[400];
    struct fix f = { .compressed = compressed }, g = { .compressed = compressed };
    struct fix_blob *b = fix_blob_new("blob", CODEC_LZ4_BLOCK, N, CHUNK), *other = swapped_blob();
    struct vnd_blob *second;
    uint8_t *before = NULL, *after;

    make_dir(dir, private);
    fix_up(&f, dir, b, 2);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    data_path(f.h, dir, path);
    if (!compressed)
        before = data_of(path, b->plain_len);
    second = fix_open(f.s, other); /* in the same process */
    fix_check(second, other, 0, (N - 1) * CHUNK);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    fix_up(&g, dir, other, 2); /* and in another */
    fix_check(g.h, other, 0, (N - 1) * CHUNK);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    blob_close(f.h, NULL); /* the first has no user any more, which changes nothing */
    f.h = second;
    fix_check(f.h, other, 0, (N - 1) * CHUNK);
    fix_down(&f);
    fix_check(g.h, other, 0, (N - 1) * CHUNK);
    fix_down(&g);
    if (!compressed) {
        after = data_of(path, b->plain_len);
        CHECK(
            !memcmp(before, after, (N - 1) * CHUNK)); /* the last chunk may come along with a job, whenever it likes */
        free(after);
    }
    free(before);
    /* Afterwards, each finds what is there. */
    for (int i = 0; i < 2 && !private; i++) {
        struct fix h = { .compressed = compressed };
        fix_up(&h, dir, i ? other : b, 1);
        fix_check(h.h, i ? other : b, 0, (N - 1) * CHUNK);
        CHECK_EQ(atomic_load(&h.server.jobs), 0);
        fix_down(&h);
    }
    fix_blob_free(b);
    fix_blob_free(other);
    fix_dir_remove(dir);
}

TEST(two_tables_share_no_file)
{
    both(false, false);
}

TEST(two_tables_share_no_file_without_side_files)
{
    both(true, false);
}

TEST(two_tables_share_no_file_of_stored_chunks)
{
    both(false, true);
}

/* A third image that agrees with both holds the blob open: it does not hand one's bits to the other. */
TEST(a_third_image_hands_nothing_over)
{
    for (int private = 0; private < 2; private ++) {
        char dir[200];
        struct fix f = { 0 };
        struct fix_blob *b = fix_blob_new("blob", CODEC_LZ4_BLOCK, N, CHUNK), *other = swapped_blob();
        struct fix_blob *part = fix_blob_new("blob", CODEC_LZ4_BLOCK, N, CHUNK);
        struct vnd_blob *first, *last;

        part->hide_from = 3;
        part->hide_to = 5;
        make_dir(dir, private);
        fix_up(&f, dir, part, 2);
        fix_check(f.h, part, 5 * CHUNK, 10 * CHUNK);
        first = fix_open(f.s, other);
        fix_check(first, other, 0, (N - 1) * CHUNK);
        blob_close(first, NULL);
        last = fix_open(f.s, b);
        fix_check(last, b, 0, (N - 1) * CHUNK);
        blob_close(last, NULL);
        fix_down(&f);
        fix_blob_free(b);
        fix_blob_free(other);
        fix_blob_free(part);
        fix_dir_remove(dir);
    }
}

/* As a nydusd leaves them that has fetched every second chunk, and perhaps runs: nothing of ours beside them. */
static void make_strangers_files(const char *dir, const struct fix_blob *b)
{
    static const uint32_t head[4] = { 0x424D4150, 1, 0x434D4150, 0 };
    uint8_t bits[N / 8];
    char path[300];
    int fd;

    memset(bits, 0xaa, sizeof bits);
    snprintf(path, sizeof path, "%s/blob.blob.data", dir);
    fd = open(path, O_RDWR | O_CREAT, 0644);
    CHECK(fd >= 0 && !ftruncate(fd, (off_t)b->plain_len));
    for (int i = 0; i < N; i += 2)
        CHECK(pwrite(fd, b->plain + i * CHUNK, CHUNK, i * CHUNK) == CHUNK);
    close(fd);
    snprintf(path, sizeof path, "%s/blob.blob.data.chunk_map", dir);
    fd = open(path, O_RDWR | O_CREAT, 0644);
    CHECK(fd >= 0 && pwrite(fd, head, sizeof head, 0) == sizeof head);
    CHECK(pwrite(fd, bits, sizeof bits, 4096) == sizeof bits);
    close(fd);
}

/* What they hold is used by those whose it is. No byte and no bit of them is written: their program may read on, and trusts all
 * that is marked. */
TEST(files_of_a_stranger_are_read_and_never_written)
{
    for (int how = 0; how < 4; how++) {
        bool private = how & 1, right = how & 2;
        char dir[200], data[300], map[300];
        struct fix f = { 0 };
        struct fix_blob *b = fix_blob_new("blob", CODEC_LZ4_BLOCK, N, CHUNK), *other = swapped_blob();
        struct fix_blob *mine = right ? b : other;
        uint8_t *before[2], *after[2];
        size_t map_len = 4096 + N / 8;

        make_dir(dir, private);
        snprintf(data, sizeof data, "%s/blob.blob.data", dir);
        snprintf(map, sizeof map, "%s/blob.blob.data.chunk_map", dir);
        make_strangers_files(dir, b);
        before[0] = data_of(data, b->plain_len);
        before[1] = data_of(map, map_len);
        for (int i = 0; i < 2; i++) {
            f = (struct fix){ 0 };
            fix_up(&f, dir, mine, 2);
            fix_check(f.h, mine, 0, (N - 1) * CHUNK);
            fix_check(f.h, mine, 0, (N - 1) * CHUNK);
            if (!i) {
                CHECK(atomic_load(&f.server.verify_jobs) > 0);
                CHECK(atomic_load(&f.server.fed_bytes) <= b->stored_len * 6 / 10);
            } else if (!private) { /* all is in files of our own now */
                CHECK_EQ(atomic_load(&f.server.jobs), 0);
            }
            fix_down(&f);
        }
        after[0] = data_of(data, b->plain_len);
        after[1] = data_of(map, map_len);
        CHECK(!memcmp(before[0], after[0], b->plain_len) && !memcmp(before[1], after[1], map_len));
        for (int i = 0; i < 2; i++) {
            free(before[i]);
            free(after[i]);
        }
        fix_blob_free(b);
        fix_blob_free(other);
        fix_dir_remove(dir);
    }
}

/* Images that come and go beside one that stays leave no tables behind. */
TEST(tables_of_closed_images_are_freed)
{
    char dir[200];
    struct fix f = { 0 };
    struct fix_blob *b = fix_blob_new("blob", CODEC_LZ4_BLOCK, N, CHUNK);
    struct fix_blob *part = fix_blob_new("blob", CODEC_LZ4_BLOCK, N, CHUNK);
    int tables = 0;

    part->hide_from = 3;
    part->hide_to = 5;
    fix_dir_make(dir);
    fix_up(&f, dir, b, 1);
    fix_check(f.h, b, 0, CHUNK);
    for (int i = 0; i < 10; i++) {
        struct vnd_blob *h = fix_open(f.s, part);
        fix_check(h, part, 0, CHUNK);
        blob_close(h, NULL);
    }
    for (const struct blobtable *t = f.h->core->tables; t; t = t->next)
        tables++;
    CHECK_EQ(tables, 1);
    fix_down(&f);
    fix_blob_free(b);
    fix_blob_free(part);
    fix_dir_remove(dir);
}
