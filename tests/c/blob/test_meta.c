/* Chunk tables that the blob itself carries: both entry forms, and everything in a table that can be wrong. */
#include "batched_blob.h"

static void refuse(const struct fix_blob *b, const uint8_t *table, const uint8_t *header, const char *word)
{
    struct blobtable *t;
    struct failure failure = { 0 };
    uint8_t *copy = malloc(b->info.ci_usize_bytes); /* of the exact size, for the sanitizer */

    memcpy(copy, table, b->info.ci_usize_bytes);
    CHECK_EQ(blobmeta_parse(&t, &b->info, copy, header, &failure), -EINVAL);
    free(copy);
    if (!strstr(failure.line, word)) {
        fprintf(stderr, "'%s' lacks '%s'\n", failure.line, word);
        check_fail();
    }
}

TEST(batches_are_parsed)
{
    uint8_t *table, h[4096];
    struct fix_blob *b = batched_blob_new(CODEC_ZSTD, &table);
    struct blobtable *t;
    struct failure failure = { 0 };

    copy_header(b, h);
    CHECK_EQ(blobmeta_parse(&t, &b->info, table, h, &failure), 0);
    CHECK_EQ(t->known, N);
    CHECK_EQ(t->chunk[10].batch, 0);
    CHECK(t->chunk[9].batch != 0 && t->chunk[9].batch == t->chunk[5].batch);
    blobtable_free(t);
    fix_blob_free(b);
    free(table);
}

TEST(records_and_table_must_agree)
{
    uint8_t *table, h[4096];
    struct fix_blob *b = batched_blob_new(CODEC_ZSTD, &table);
    struct blobtable *t, *rec;
    struct failure failure = { 0 };

    copy_header(b, h);
    CHECK_EQ(blobmeta_parse(&t, &b->info, table, h, &failure), 0);
    CHECK_EQ(blobtable_from_records(&rec, &b->info, fix_chunks, b, &failure), 0);
    CHECK_EQ(blobmeta_place(rec, t, &b->info, &failure), 0);
    t->chunk[10].coff++;
    CHECK_EQ(blobmeta_place(rec, t, &b->info, &failure), -EINVAL);
    t->chunk[10].coff--;
    t->chunk[3].uoff += 4096;
    CHECK_EQ(blobmeta_place(rec, t, &b->info, &failure), -EINVAL);
    blobtable_free(t);
    blobtable_free(rec);
    fix_blob_free(b);
    free(table);
}

/* One fault: bytes [at, at + len) of header or table, little-endian. */
struct fault {
    uint32_t at, len;
    uint64_t value;
    const char *word; /* of the refusal */
};

static void check_faults(bool in_header, const struct fault *faults, size_t n)
{
    uint8_t *table, h[4096], was[8];
    struct fix_blob *b = batched_blob_new(CODEC_ZSTD, &table);

    copy_header(b, h);
    for (const struct fault *f = faults; f < faults + n; f++) {
        uint8_t *at = (in_header ? h : table) + f->at;

        memcpy(was, at, f->len);
        memcpy(at, &f->value, f->len);
        CHECK(memcmp(was, at, f->len));
        refuse(b, table, h, f->word);
        memcpy(at, was, f->len);
    }
    fix_blob_free(b);
    free(table);
}

TEST(headers_with_a_fault_are_refused)
{
    static const struct fault faults[] = {
        { 0, 1, 0x0c, "no header" },
        { 4092, 1, 0x0c, "no header" },
        { 12, 1, N + 1, "differ" },
        { 16, 1, 1, "differ" },
        { 24, 1, 1, "differ" },
        { 32, 1, 1, "differ" },
        { 40, 8, 8, "contexts" },
        { 40, 8, UINT64_MAX, "contexts" },
        { 48, 8, UINT64_MAX, "contexts" },
        { 56, 4, UINT32_MAX, "contexts" },
        { 56, 4, 1, "not there" },
    };

    check_faults(true, faults, sizeof faults / sizeof faults[0]);
}

TEST(tables_with_a_fault_are_refused)
{
    static const struct fault faults[] = {
        { 16 + 4, 4, 9999, "not there" },
        { 16, 4, 60000, "beyond its batch" },
        { 16, 4, UINT32_MAX, "beyond its batch" },
        { TABLE_BYTES, 4, 0, "compressed size" },
        { TABLE_BYTES + 4, 4, 1u << 30, "beyond its batch" },
        { 8, 5, UINT64_MAX, "compressed range" },
        { 0, 4, UINT32_MAX, "uncompressed range" },
        { 0, 4, 1, "share bytes" },
        { 7, 1, 1 | 4 | 2, "gzip layer" },
        { 7, 1, 1 | 4 | 8, "encrypted" },
    };

    check_faults(false, faults, sizeof faults / sizeof faults[0]);
}

TEST(sizes_that_no_table_has_are_impossible)
{
    struct fix_blob *b = batched_blob_new(CODEC_ZSTD, NULL);

    b->info.ci_usize_bytes = TABLE_BYTES - 1;
    CHECK(!blobmeta_possible(&b->info));
    b->info.ci_usize_bytes = UINT64_MAX;
    CHECK(!blobmeta_possible(&b->info));
    fix_blob_free(b);
}

/* First form: vectors from a real image (docs/rafs-format.md, Appendix A). */
TEST(first_form_of_entries_is_parsed)
{
    static const uint8_t vectors[32] = {
        0x00, 0x00, 0x00, 0x00, 0x00, 0x20, 0x22, 0x04, 0x00, 0x00, 0x00, 0x00, 0x00, 0xb0, 0x2d, 0x01,
        0x00, 0x50, 0x00, 0x00, 0x00, 0x70, 0x45, 0x03, 0xdc, 0x12, 0x00, 0x00, 0x00, 0xd0, 0xb9, 0x00,
    };
    vnd_blob_info info = { .id = "real",
                           .chunk_count = 2,
                           .compressor = CODEC_ZSTD,
                           .features = 1,
                           .ci_compressor = 3,
                           .compressed_size_bytes = 7802,
                           .uncompressed_size_bytes = 36864,
                           .ci_offset = 7802,
                           .ci_csize_bytes = 30,
                           .ci_usize_bytes = 32 };
    uint8_t h[4096] = { 0 };
    struct blobtable *t;
    struct failure failure = { 0 };

    put32(h, 0xB10BB10B);
    put32(h + 8, 3);
    put32(h + 12, 2);
    put64(h + 16, 7802);
    put64(h + 24, 30);
    put64(h + 32, 32);
    put32(h + 4092, 0xB10BB10B);
    CHECK_EQ(blobmeta_parse(&t, &info, vectors, h, &failure), 0);
    CHECK_EQ(t->chunk[0].uoff, 0);
    CHECK_EQ(t->chunk[0].usize, 16931);
    CHECK_EQ(t->chunk[0].coff, 0);
    CHECK_EQ(t->chunk[0].csize, 4828);
    CHECK_EQ(t->chunk[1].uoff, 20480);
    CHECK_EQ(t->chunk[1].usize, 13400);
    CHECK_EQ(t->chunk[1].coff, 4828);
    CHECK_EQ(t->chunk[1].csize, 2974);
    blobtable_free(t);
}
