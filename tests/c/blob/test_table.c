/* The chunk table of a blob: what it covers, how the tables of two images join, and which records it refuses. */
#include "store_fixture.h"

#include "blob/table.h"

static int table_rc(struct fix_blob *b, struct blobtable **t, struct failure *f)
{
    return blobtable_from_records(t, &b->info, fix_chunks, b, f);
}

static struct fix_blob *new_blob(void)
{
    return fix_blob_new("blob", CODEC_ZSTD, 6, 8192);
}

TEST(covers_extents_inside_their_chunk_alone)
{
    static const struct {
        struct extent x;
        bool covered;
    } cases[] = {
        { { .uoff = 8192 + 5, .chunk = 1, .len = 100, .chunk_off = 5 }, true },
        { { .uoff = 8192 + 5, .chunk = 6, .len = 100, .chunk_off = 5 }, false },
        { { .uoff = 8192 + 5, .chunk = UINT32_MAX, .len = 100, .chunk_off = 5 }, false },
        { { .uoff = 8192, .chunk = 2, .len = 1 }, false },
        { { .uoff = 8192, .chunk = 1, .len = 8193 }, false },
        { { .uoff = 8192 + 8, .chunk = 1, .len = UINT32_MAX, .chunk_off = 8 }, false },
        { { .uoff = 100, .chunk = 0, .len = 1, .chunk_off = 200 }, false },
    };
    struct fix_blob *b = new_blob();
    struct blobtable *t;
    struct failure f = { 0 };

    CHECK_EQ(table_rc(b, &t, &f), 0);
    CHECK_EQ(t->known, 6);
    CHECK_EQ(t->digests, 6);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK_EQ(blobtable_covers(t, &cases[i].x), cases[i].covered);
    blobtable_free(t);
    fix_blob_free(b);
}

/* Two images that name different parts of a blob agree; the union knows all. */
TEST(merges_tables_that_agree)
{
    struct fix_blob *b = new_blob();
    struct blobtable *t, *half, *all;
    struct failure f = { 0 };

    CHECK_EQ(table_rc(b, &t, &f), 0);
    b->hide_from = 1;
    b->hide_to = 3;
    CHECK_EQ(table_rc(b, &half, &f), 0);
    CHECK_EQ(half->known, 4);
    CHECK(!blobtable_equal(t, half));
    CHECK_EQ(blobtable_merge(&all, half, t, &f), 0);
    CHECK(blobtable_equal(all, t));
    blobtable_free(all);
    blobtable_free(half);
    blobtable_free(t);
    fix_blob_free(b);
}

TEST(refuses_tables_that_contradict)
{
    struct fix_blob *b = new_blob();
    struct blobtable *t, *half, *all;
    struct failure f = { 0 };

    CHECK_EQ(table_rc(b, &t, &f), 0);
    b->hide_from = 1;
    b->hide_to = 3;
    CHECK_EQ(table_rc(b, &half, &f), 0);
    half->digest[0][3] ^= 1;
    CHECK_EQ(blobtable_merge(&all, half, t, &f), -EEXIST);
    half->digest[0][3] ^= 1;
    half->chunk[0].usize++; /* now reaches into chunk 1 of the other */
    t->chunk[0].usize = 0;
    CHECK_EQ(blobtable_merge(&all, half, t, &f), -EEXIST);
    blobtable_free(half);
    blobtable_free(t);
    fix_blob_free(b);
}

/* One image, one chunk, two records: alike or refused. */
static int put_twice(void *ctx, uint32_t blob_index, int (*put)(void *, const struct blob_chunk *), void *put_ctx)
{
    struct fix_blob *b = ctx;
    int rc = fix_chunks(ctx, blob_index, put, put_ctx);
    struct blob_chunk again = b->chunk[2];

    again.digest[5] ^= b->hide_from; /* 0: none is hidden */
    b->hide_from = 0;
    return rc ? rc : put(put_ctx, &again);
}

TEST(a_chunk_described_twice)
{
    for (uint32_t differs = 0; differs < 2; differs++) {
        struct fix_blob *b = new_blob();
        struct blobtable *t;
        struct failure f = { 0 };

        b->hide_from = differs; /* hide_to is 0: nothing is hidden */
        CHECK_EQ(blobtable_from_records(&t, &b->info, put_twice, b, &f), differs ? -EINVAL : 0);
        CHECK(!differs || strstr(f.line, "twice"));
        blobtable_free(t);
        fix_blob_free(b);
    }
}

TEST(an_image_that_names_no_chunk_has_no_table)
{
    struct fix_blob *b = new_blob();
    struct blobtable *t;
    struct failure f = { 0 };

    b->hide_from = 0;
    b->hide_to = 6;
    CHECK_EQ(table_rc(b, &t, &f), -ENODATA);
    fix_blob_free(b);
}

TEST(any_order_of_offsets_without_overlap_is_fine)
{
    struct fix_blob *b = new_blob();
    struct blobtable *t;
    struct failure f = { 0 };
    uint64_t u = b->chunk[1].uoff;

    b->chunk[1].uoff = b->chunk[3].uoff;
    b->chunk[3].uoff = u;
    CHECK_EQ(table_rc(b, &t, &f), 0);
    blobtable_free(t);
    fix_blob_free(b);
}

static void spoil_index(struct fix_blob *b)
{
    b->chunk[2].index = 6;
}
static void spoil_usize(struct fix_blob *b)
{
    b->chunk[2].usize = BLOBTABLE_CHUNK_MAX + 1;
}
static void spoil_usize0(struct fix_blob *b)
{
    b->chunk[2].usize = 0;
}
static void spoil_csize(struct fix_blob *b)
{
    b->chunk[5].csize++;
}
static void spoil_coff(struct fix_blob *b)
{
    b->chunk[2].coff = UINT64_MAX - 4;
}
static void spoil_uoff(struct fix_blob *b)
{
    b->chunk[2].uoff = UINT64_MAX - 4096;
}
static void spoil_end(struct fix_blob *b)
{
    b->info.uncompressed_size_bytes = 5 * 8192;
}
static void spoil_raw(struct fix_blob *b)
{
    b->chunk[2].flags = 0;
}
static void spoil_overlap(struct fix_blob *b)
{
    b->chunk[2].uoff -= 1;
}
static void spoil_twice(struct fix_blob *b)
{
    b->chunk[3].index = 2;
}
static void spoil_count(struct fix_blob *b)
{
    b->info.chunk_count = 0;
}

TEST(refuses_records_and_says_why)
{
    static const struct {
        void (*spoil)(struct fix_blob *b);
        const char *line_has;
    } cases[] = {
        { spoil_index, "index" },
        { spoil_usize, "uncompressed size" },
        { spoil_usize0, "uncompressed size" },
        { spoil_csize, "compressed range" },
        { spoil_coff, "compressed range" },
        { spoil_uoff, "uncompressed range" },
        { spoil_end, "uncompressed range" },
        { spoil_raw, "two sizes" },
        { spoil_overlap, "share bytes" },
        { spoil_twice, "twice" },
        { spoil_count, "chunks" },
    };

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct fix_blob *b = new_blob();
        struct blobtable *t;
        struct failure f = { 0 };

        cases[i].spoil(b);
        CHECK(table_rc(b, &t, &f) < 0);
        CHECK_HAS(f.line, cases[i].line_has);
        CHECK(!t);
        fix_blob_free(b);
    }
}
