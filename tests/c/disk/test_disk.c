/* The flat disk of an image: what lies where, which extents a range of it is, and which images are none. */
#include "disk_rig.h"

static struct disk_rig g;
static uint8_t got[DISK_BYTES];

/* The extents of [off, off+len) with the blob's table loaded and room for max. */
static int extents(uint64_t off, uint32_t len, struct extent *at, int max, uint32_t *bytes)
{
    struct fs_extents x = { at, max, 0, NULL };
    int n;

    fix_load_blob(g.blob);
    n = disk_extents(g.disk, off, len, &x);
    *bytes = x.bytes;
    return n;
}

TEST(ends_where_its_blob_ends)
{
    disk_rig_new(&g);
    CHECK_EQ(vnd_disk_bytes(g.disk), DISK_BYTES);
    disk_rig_free(&g);
}

TEST(begins_with_the_bootstrap)
{
    disk_rig_new(&g);
    CHECK_EQ(disk_rig_read(&g, NULL, 0, IMG_SIZE, got), IMG_SIZE);
    CHECK(memcmp(got, g.img.b, IMG_SIZE) == 0);
    disk_rig_free(&g);
}

TEST(has_zeroes_between_bootstrap_and_blob)
{
    static const uint8_t zeroes[BLOB_AT * BLOCK - IMG_SIZE];

    disk_rig_new(&g);
    memset(got, 0xee, sizeof(got));
    CHECK_EQ(disk_rig_read(&g, NULL, IMG_SIZE, sizeof(zeroes), got), sizeof(zeroes));
    CHECK(memcmp(got, zeroes, sizeof(zeroes)) == 0);
    disk_rig_free(&g);
}

TEST(has_each_chunk_at_its_place)
{
    disk_rig_new(&g);
    for (uint32_t i = FIRST_CHUNK; i <= LAST_CHUNK; i++) {
        uint32_t usize = g.source->chunk[i].usize;

        CHECK_EQ(disk_rig_read(&g, NULL, (BLOB_AT + i) * BLOCK, usize, got), usize);
        CHECK(memcmp(got, g.source->plain + i * IMG_CHUNK, usize) == 0);
    }
    disk_rig_free(&g);
}

TEST(is_one_run_of_bytes_from_its_start_to_its_end)
{
    disk_rig_new(&g);
    memset(got, 0xee, sizeof(got));
    CHECK_EQ(disk_rig_read(&g, NULL, 0, DISK_BYTES, got), DISK_BYTES);
    CHECK(memcmp(got, g.want, DISK_BYTES) == 0);
    disk_rig_free(&g);
}

/* No piece but the first begins at a block, and many lie across a border. */
TEST(is_the_same_in_odd_pieces)
{
    const uint32_t piece = 1777;

    disk_rig_new(&g);
    memset(got, 0xee, sizeof(got));
    for (uint32_t off = 0; off < DISK_BYTES; off += piece) {
        uint32_t left = DISK_BYTES - off, due = left < piece ? left : piece;

        CHECK_EQ(disk_rig_read(&g, NULL, off, piece, got + off), due);
    }
    CHECK(memcmp(got, g.want, DISK_BYTES) == 0);
    disk_rig_free(&g);
}

TEST(has_nothing_at_its_end)
{
    const uint64_t offs[] = { DISK_BYTES, DISK_BYTES + 1, UINT64_MAX };
    struct extent at[4];
    uint32_t bytes;

    disk_rig_new(&g);
    for (size_t i = 0; i < sizeof(offs) / sizeof(offs[0]); i++) {
        CHECK_EQ(extents(offs[i], BLOCK, at, 4, &bytes), 0);
        CHECK_EQ(bytes, 0);
    }
    disk_rig_free(&g);
}

TEST(an_extent_of_the_bootstrap_is_its_mapped_bytes)
{
    struct extent at[4];
    uint64_t size;
    uint32_t bytes;

    disk_rig_new(&g);
    CHECK_EQ(extents(100, 50, at, 4, &bytes), 1);
    CHECK_EQ(bytes, 50);
    CHECK(at[0].blob == NULL);
    CHECK(at[0].bytes == rafs_metadata(g.image, &size) + 100);
    CHECK_EQ(at[0].len, 50);
    disk_rig_free(&g);
}

TEST(an_extent_of_a_blob_names_its_chunk)
{
    struct extent at[4];
    uint32_t bytes;

    disk_rig_new(&g);
    CHECK_EQ(extents((BLOB_AT + 5) * BLOCK + 100, 50, at, 4, &bytes), 1);
    CHECK_EQ(bytes, 50);
    CHECK(at[0].blob == g.blob && at[0].bytes == NULL);
    CHECK_EQ(at[0].chunk, 5);
    CHECK_EQ(at[0].uoff, 5 * BLOCK + 100);
    CHECK_EQ(at[0].chunk_off, 100);
    CHECK_EQ(at[0].len, 50);
    disk_rig_free(&g);
}

TEST(what_no_chunk_holds_is_an_extent_of_zeroes)
{
    struct extent at[4];
    uint32_t bytes;

    disk_rig_new(&g);
    CHECK_EQ(extents(BLOB_AT * BLOCK, 4 * BLOCK, at, 4, &bytes), 2);
    CHECK(at[0].blob == NULL && at[0].bytes == NULL);
    CHECK_EQ(at[0].len, FIRST_CHUNK * BLOCK);
    CHECK_EQ(at[1].chunk, FIRST_CHUNK);
    CHECK_EQ(bytes, 4 * BLOCK);
    disk_rig_free(&g);
}

TEST(a_chunk_that_is_no_whole_block_is_followed_by_zeroes)
{
    struct extent at[4];
    uint32_t bytes, usize;

    disk_rig_new(&g);
    usize = g.source->chunk[LAST_CHUNK].usize;
    CHECK(usize < BLOCK);
    CHECK_EQ(extents((BLOB_AT + LAST_CHUNK) * BLOCK, BLOCK, at, 4, &bytes), 2);
    CHECK_EQ(at[0].len, usize);
    CHECK(at[1].blob == NULL && at[1].bytes == NULL);
    CHECK_EQ(at[1].len, BLOCK - usize);
    disk_rig_free(&g);
}

TEST(extents_end_where_there_is_no_more_room)
{
    struct extent at[2];
    uint32_t bytes;

    disk_rig_new(&g);
    CHECK_EQ(extents(0, DISK_BYTES, at, 1, &bytes), 1);
    CHECK_EQ(bytes, IMG_SIZE);
    CHECK_EQ(extents(0, DISK_BYTES, at, 2, &bytes), 2);
    CHECK_EQ(bytes, BLOB_AT * BLOCK);
    CHECK_EQ(extents((BLOB_AT + 4) * BLOCK, 8 * BLOCK, at, 2, &bytes), 2);
    CHECK_EQ(bytes, 2 * BLOCK);
    CHECK_EQ(extents(0, DISK_BYTES, at, 0, &bytes), 0);
    CHECK_EQ(bytes, 0);
    disk_rig_free(&g);
}

TEST(a_device_alone_counts_from_its_own_start)
{
    disk_rig_new(&g);
    CHECK_EQ(disk_rig_read(&g, &g.disk->parts[1], FIRST_CHUNK * BLOCK, BLOCK, got), BLOCK);
    CHECK(memcmp(got, g.source->plain + FIRST_CHUNK * IMG_CHUNK, BLOCK) == 0);
    CHECK_EQ(disk_rig_read(&g, &g.disk->parts[0], 1024, BLOCK, got), BLOCK);
    CHECK(memcmp(got, g.img.b + 1024, BLOCK) == 0);
    disk_rig_free(&g);
}

TEST(a_device_alone_is_cut_at_its_own_end)
{
    disk_rig_new(&g);
    CHECK_EQ(disk_rig_read(&g, &g.disk->parts[0], IMG_SIZE - 10, BLOCK, got), 10);
    CHECK_EQ(disk_rig_read(&g, &g.disk->parts[0], IMG_SIZE, BLOCK, got), 0);
    CHECK_EQ(disk_rig_read(&g, &g.disk->parts[1], (uint64_t)IMG_BLOB_CHUNKS * BLOCK - 10, BLOCK, got), 10);
    CHECK_EQ(disk_rig_read(&g, &g.disk->parts[1], UINT64_MAX, BLOCK, got), 0);
    disk_rig_free(&g);
}

TEST(a_reader_that_cannot_wait_is_told_to_come_again)
{
    struct extent at[4];
    struct fs_extents x = { at, 4, 0, NULL };

    disk_rig_new(&g);
    CHECK_EQ(disk_extents(g.disk, BLOB_AT * BLOCK, BLOCK, &x), -EAGAIN);
    disk_rig_free(&g);
}

/* The first two chunks share bytes: the blob has no table that could be right. The bootstrap is there all the same. */
TEST(a_blob_without_a_good_table_fails_its_own_bytes_alone)
{
    disk_rig_make(&g, 0);
    img_64(&g.img, IMG_CHUNKS_OFF + 80 + 56, FIRST_CHUNK * IMG_CHUNK + 8);
    disk_rig_up(&g);
    CHECK(g.disk);
    CHECK_EQ(disk_rig_read(&g, NULL, BLOB_AT * BLOCK, BLOCK, got), -EIO);
    CHECK_EQ(disk_rig_read(&g, NULL, 0, BLOCK, got), BLOCK);
    disk_rig_free(&g);
}

/* ---- refused */

TEST(places_that_cannot_be_are_refused)
{
    const struct {
        uint32_t mapped, blocks;
        const char *line;
    } cases[] = {
        { 0, IMG_BLOB_CHUNKS, "blob 0 has no place on a flat disk" },
        { 1, IMG_BLOB_CHUNKS, "overlaps another part" },
        { IMG_SIZE / BLOCK - 1, IMG_BLOB_CHUNKS, "overlaps another part" },
        { BLOB_AT, IMG_BLOB_CHUNKS - 1, "less than the blob" },
        { BLOB_AT, 0, "less than the blob" },
        { UINT32_MAX, IMG_BLOB_CHUNKS, "the image is damaged" },
        { UINT32_MAX - IMG_BLOB_CHUNKS + 2, IMG_BLOB_CHUNKS, "the image is damaged" },
    };

    disk_rig_make(&g, 0);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        img_32(&g.img, SLOT_MAPPED, cases[i].mapped);
        img_32(&g.img, SLOT_BLOCKS, cases[i].blocks);
        disk_rig_up(&g);
        CHECK(!g.disk);
        CHECK_HAS(g.err, cases[i].line);
        vnd_rafs_free(g.image);
        g.image = NULL;
    }
    disk_rig_free(&g);
}

TEST(a_blob_may_begin_where_the_bootstrap_ends)
{
    disk_rig_make(&g, 0);
    img_32(&g.img, SLOT_MAPPED, IMG_SIZE / BLOCK);
    disk_rig_up(&g);
    CHECK(g.disk);
    CHECK_EQ(vnd_disk_bytes(g.disk), IMG_SIZE + IMG_BLOB_CHUNKS * BLOCK);
    disk_rig_free(&g);
}

TEST(a_blob_may_end_where_the_last_block_ends)
{
    disk_rig_make(&g, 0);
    img_32(&g.img, SLOT_MAPPED, UINT32_MAX - IMG_BLOB_CHUNKS + 1);
    disk_rig_up(&g);
    CHECK(g.disk);
    CHECK_EQ(vnd_disk_bytes(g.disk), (uint64_t)BLOCK << 32);
    disk_rig_free(&g);
}

TEST(an_image_without_blobs_to_read_is_no_disk)
{
    disk_rig_make(&g, 0);
    g.image = disk_rig_open(&g, g.img.b, sizeof(g.img.b), NULL);
    CHECK(!vnd_disk_new(g.image, g.err, sizeof(g.err)));
    CHECK_HAS(g.err, "opened for its metadata alone");
    disk_rig_free(&g);
}

TEST(an_image_of_v5_is_no_disk)
{
    static uint8_t boot[32768];
    FILE *f = fopen("tests/c/rafs/v5.boot", "rb");
    size_t n;

    CHECK(f);
    n = fread(boot, 1, sizeof(boot), f);
    fclose(f);
    disk_rig_make(&g, 0);
    g.image = disk_rig_open(&g, boot, n, NULL);
    CHECK(!vnd_disk_new(g.image, g.err, sizeof(g.err)));
    CHECK_HAS(g.err, "an image of RAFS v5");
    disk_rig_free(&g);
}
