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

static uint8_t *data_of(const char *dir, size_t len)
{
    char path[300];
    uint8_t *p = malloc(len);
    int fd;

    snprintf(path, sizeof path, "%s/blob.blob.data", dir);
    fd = open(path, O_RDONLY);
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
    char dir[200];
    struct fix f = { .compressed = compressed }, g = { .compressed = compressed };
    struct fix_blob *b = fix_blob_new("blob", CODEC_LZ4_BLOCK, N, CHUNK), *other = swapped_blob();
    struct vnd_blob *second;
    uint8_t *before = NULL, *after;

    make_dir(dir, private);
    fix_up(&f, dir, b, 2);
    fix_check(f.h, b, 0, (N - 1) * CHUNK);
    if (!compressed)
        before = data_of(dir, b->plain_len);
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
        after = data_of(dir, b->plain_len);
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

/* Files that no side file speaks of (nydusd's): the marked chunks are another table's, whose reader goes on. */
TEST(files_of_a_stranger_are_not_written_for_another_table)
{
    for (int private = 0; private < 2; private ++) {
        char dir[200], path[300];
        struct fix f = { 0 };
        struct fix_blob *b = fix_blob_new("blob", CODEC_LZ4_BLOCK, N, CHUNK), *other = swapped_blob();
        uint8_t *before, *after;

        make_dir(dir, private);
        fix_up(&f, dir, b, 2);
        fix_check(f.h, b, 0, (N - 1) * CHUNK);
        fix_down(&f);
        snprintf(path, sizeof path, "%s/.virtiofsd-nydus/blob.vnd", dir);
        CHECK(private || !unlink(path));
        before = data_of(dir, b->plain_len);
        memset(&f, 0, sizeof f);
        fix_up(&f, dir, other, 2);
        fix_check(f.h, other, 0, (N - 1) * CHUNK);
        fix_check(f.h, other, 0, (N - 1) * CHUNK);
        fix_down(&f);
        after = data_of(dir, b->plain_len);
        CHECK(!memcmp(before, after, b->plain_len));
        free(before);
        free(after);
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
