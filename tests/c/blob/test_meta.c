/* Chunk tables that the blob itself carries: parsing both entry forms, batches read end to end, a META job, the
 * file in the work directory, and everything in a table that can be wrong.
 */
#include "blob/meta.h"
#include "store_fixture.h"

#define N 60
#define PER_BATCH 5
#define SLOT 4096

static void put32(uint8_t *p, uint32_t v)
{
    memcpy(p, &v, 4);
}
static void put64(uint8_t *p, uint64_t v)
{
    memcpy(p, &v, 8);
}

/* Appends the stored form of a table with its header to the blob, and states it in the blob table. */
static void seal(struct fix_blob *b, const uint8_t *table, size_t len, uint32_t ctx_offset, uint32_t ctx_count)
{
    uint8_t *h, *packed = malloc(len + 1024);
    size_t n = ZSTD_compress(packed, len + 1024, table, len, 3);

    b->info.ci_compressor = CODEC_ZSTD;
    if (n >= len) {
        memcpy(packed, table, len);
        n = len;
        b->info.ci_compressor = CODEC_NONE;
    }
    b->info.ci_offset = b->stored_len;
    b->info.ci_csize_bytes = n;
    b->info.ci_usize_bytes = len;
    b->stored = realloc(b->stored, b->stored_len + n + 4096);
    memcpy(b->stored + b->stored_len, packed, n);
    h = b->stored + b->stored_len + n;
    memset(h, 0, 4096);
    put32(h, 0xB10BB10B);
    put32(h + 4, b->info.features);
    put32(h + 8, b->info.ci_compressor);
    put32(h + 12, b->info.chunk_count);
    put64(h + 16, b->info.ci_offset);
    put64(h + 24, n);
    put64(h + 32, len);
    put64(h + 40, ctx_offset);
    put64(h + 48, (uint64_t)ctx_count * 40);
    put32(h + 56, ctx_count);
    put32(h + 4092, 0xB10BB10B);
    b->stored_len += n + 4096;
    free(packed);
}

/* Small chunks, five of them decoded together; every eleventh stands alone. */
static struct fix_blob *batch_blob(uint32_t codec, uint8_t **table_out)
{
    struct fix_blob *b = calloc(1, sizeof *b);
    uint8_t *table = calloc(1, N * 24 + N * 40), *buffer = malloc(PER_BATCH * SLOT);
    uint32_t seed = 5, contexts = 0, in_batch = 0, from = 0;
    size_t used = 0;

    b->chunk = calloc(N, sizeof *b->chunk);
    b->plain_len = N * SLOT;
    b->plain = calloc(1, b->plain_len);
    b->stored = malloc(4 * N * SLOT);
    b->info = (vnd_blob_info){ .chunk_size_bytes = SLOT,
                               .chunk_count = N,
                               .compressor = codec,
                               .digester = 1,
                               .features = 1 | BLOBMETA_CHUNK_INFO_V2 | BLOBMETA_BATCH,
                               .uncompressed_size_bytes = b->plain_len };
    strcpy(b->info.id, "batched");
    for (uint32_t i = 0; i <= N; i++) {
        bool alone = i < N && i % 11 == 10;
        if (in_batch == PER_BATCH || i == N || (alone && in_batch)) { /* flush */
            size_t n = fix_compress(codec, buffer, used, b->stored + b->stored_len, 2 * PER_BATCH * SLOT);
            if (n >= used) {
                memcpy(b->stored + b->stored_len, buffer, used);
                n = used;
            }
            put32(table + N * 24 + contexts * 40, (uint32_t)n);
            put32(table + N * 24 + contexts * 40 + 4, (uint32_t)used);
            for (uint32_t k = from; k < i; k++)
                put64(table + k * 24 + 8, b->stored_len);
            b->stored_len += n;
            contexts++;
            in_batch = 0;
            used = 0;
        }
        if (i == N)
            break;
        struct blob_chunk *c = &b->chunk[i];
        uint8_t *p = b->plain + i * SLOT;
        *c = (struct blob_chunk){ .index = i, .usize = 1000 + i * 40, .uoff = (uint64_t)i * SLOT };
        for (uint32_t k = 0; k < c->usize; k++)
            p[k] = (uint8_t)(k % 3 ? 'a' + i % 26 : fix_random(&seed));
        CHECK(codec_sha256(p, c->usize, c->digest) == 0);
        uint64_t flags = 1;
        if (alone) {
            c->coff = b->stored_len;
            c->csize = (uint32_t)fix_compress(codec, p, c->usize, b->stored + b->stored_len, 2 * SLOT);
            c->flags = codec ? 1 : 0;
            flags = c->flags;
            put64(table + i * 24 + 8, c->coff | (uint64_t)c->csize << 40);
            b->stored_len += c->csize;
            from = i + 1;
        } else {
            if (!in_batch)
                from = i;
            c->flags = 0x10; /* no place and no mark, as real bootstraps have it */
            flags = 1 | 4;
            put64(table + i * 24 + 16, used | (uint64_t)contexts << 32);
            memcpy(buffer + used, p, c->usize);
            used += c->usize;
            in_batch++;
        }
        put64(table + i * 24, (uint64_t)i | (uint64_t)(c->usize - 1) << 32 | flags << 56);
    }
    b->info.compressed_size_bytes = b->stored_len;
    seal(b, table, N * 24 + contexts * 40, N * 24, contexts);
    b->info.compressed_size_bytes = b->stored_len;
    free(buffer);
    if (table_out)
        *table_out = table;
    else
        free(table);
    return b;
}

static void read_chunk(struct vnd_blob *h, struct fix_blob *b, uint32_t i)
{
    uint8_t buf[SLOT];

    CHECK_EQ(fix_read(h, b, (uint64_t)i * SLOT, b->chunk[i].usize, buf), b->chunk[i].usize);
    CHECK(!memcmp(buf, b->plain + i * SLOT, b->chunk[i].usize));
}

TEST(batches)
{
    static const uint32_t codecs[] = { CODEC_ZSTD, CODEC_LZ4_BLOCK, CODEC_NONE };

    for (int k = 0; k < 3; k++) {
        char dir[200], path[300];
        struct fix f = { 0 };
        struct stat st;
        struct fix_blob *b = batch_blob(codecs[k], NULL);
        vnd_stats s;
        uint64_t total;

        fix_dir_make(dir);
        f.server.feed_bytes = k ? 5 : 100000;
        fix_up(&f, dir, b, 1);
        read_chunk(f.h, b, 7); /* in the middle of a batch */
        CHECK_EQ(atomic_load(&f.server.meta_jobs), 1);
        /* All that was decoded with it becomes ready. */
        for (int64_t until = now_us() + 5000000; vnd_blob_ready(f.h, &total) < PER_BATCH; usleep(100))
            CHECK(now_us() < until);
        for (uint32_t i = 5; i < 10; i++)
            CHECK(cachefile_ready(f.h->cache, i));
        for (uint32_t i = N; i-- > 0;)
            read_chunk(f.h, b, i);
        vnd_engine_stats(f.e, &s);
        CHECK_EQ(s.fetched_chunks, N);
        CHECK_EQ(s.digest_failures, 0);
        fix_down(&f);
        /* The table was kept in Nydus's layout and saves the next fetch of it. */
        sprintf(path, "%s/batched.blob.meta", dir);
        CHECK(!stat(path, &st));
        CHECK_EQ(st.st_size, (b->info.ci_usize_bytes + 4095) / 4096 * 4096 + 4096);
        memset(&f, 0, sizeof f);
        fix_up(&f, dir, b, 1);
        read_chunk(f.h, b, 3);
        CHECK_EQ(atomic_load(&f.server.jobs), 0);
        fix_down(&f);
        /* Damaged, it is fetched anew. */
        int fd = open(path, O_WRONLY);
        CHECK(pwrite(fd, "damage", 6, 24 * 3) == 6);
        close(fd);
        memset(&f, 0, sizeof f);
        fix_up(&f, dir, b, 1);
        read_chunk(f.h, b, 3);
        CHECK_EQ(atomic_load(&f.server.meta_jobs), 1);
        fix_down(&f);
        fix_blob_free(b);
        fix_dir_remove(dir);
    }
}

/* A kept table that is sound, and wrong: the next load fetches it anew. */
TEST(kept_table_with_wrong_places)
{
    char dir[200], path[300];
    struct fix f = { 0 };
    uint8_t word[8], buf[SLOT];
    struct fix_blob *b = batch_blob(CODEC_NONE, NULL);

    fix_dir_make(dir);
    fix_up(&f, dir, b, 1);
    read_chunk(f.h, b, 0);
    fix_down(&f);
    snprintf(path, sizeof path, "%s/batched.blob.meta", dir);
    int fd = open(path, O_RDWR);
    for (int i = 5; i < 10; i++) { /* the second batch lies a byte off */
        CHECK(pread(fd, word, 8, i * 24 + 8) == 8);
        word[0] ^= 1;
        CHECK(pwrite(fd, word, 8, i * 24 + 8) == 8);
    }
    close(fd);
    snprintf(path, sizeof path, "%s/batched.blob.data", dir); /* what was fetched with chunk 0 */
    CHECK(!unlink(path));
    memset(&f, 0, sizeof f);
    fix_up(&f, dir, b, 1);
    CHECK_EQ(fix_read(f.h, b, 6 * SLOT, 100, buf), -EIO);
    CHECK_EQ(atomic_load(&f.server.meta_jobs), 0); /* it was used */
    CHECK(fix_said(f.e, VND_CAUSE_DIGEST, "batched.blob.meta in the cache directory, which is removed"));
    fix_down(&f);
    memset(&f, 0, sizeof f);
    fix_up(&f, dir, b, 1);
    read_chunk(f.h, b, 6);
    CHECK_EQ(atomic_load(&f.server.meta_jobs), 1);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* A flipped byte in a batch or in the stored table: asked for once more, then EIO, never a wrong byte. */
TEST(flips)
{
    for (int until = 1; until < 100; until += 98) {
        char dir[200];
        struct fix f = { 0 };
        uint8_t buf[16];
        struct fix_blob *b = batch_blob(CODEC_ZSTD, NULL);

        fix_dir_make(dir);
        f.server.feed_bytes = 1000000;
        f.server.flip_to = until; /* the table first */
        fix_up(&f, dir, b, 1);
        if (until == 1) {
            for (uint32_t i = 0; i < N; i++)
                read_chunk(f.h, b, i);
            CHECK_EQ(atomic_load(&f.server.meta_jobs), 2);
        } else {
            CHECK_EQ(fix_read(f.h, b, 0, 16, buf), -EIO);
            CHECK(fix_said(f.e, VND_CAUSE_DIGEST, "cannot be served"));
        }
        fix_down(&f);
        memset(&f, 0, sizeof f);
        f.server.flip_from = 1;
        f.server.flip_to = until == 1 ? 2 : 1000;
        f.server.feed_bytes = 1000000;
        fix_dir_remove(dir);
        fix_dir_make(dir);
        fix_up(&f, dir, b, 1);
        if (until == 1) {
            for (uint32_t i = 0; i < N; i++)
                read_chunk(f.h, b, i);
        } else {
            int failed = 0; /* a flip may spare some of a batch; what is given out is right */
            for (uint32_t i = 0; i < N; i++) {
                uint8_t all[SLOT];
                int64_t n = fix_read(f.h, b, (uint64_t)i * SLOT, b->chunk[i].usize, all);
                CHECK(n == -EIO || !memcmp(all, b->plain + i * SLOT, b->chunk[i].usize));
                failed += n == -EIO;
            }
            CHECK(failed > 0);
            CHECK(fix_said(f.e, VND_CAUSE_DIGEST, "readers get EIO"));
        }
        fix_down(&f);
        fix_blob_free(b);
        fix_dir_remove(dir);
    }
}

static void refuse(struct fix_blob *b, const uint8_t *table, const uint8_t *header, const char *word)
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

TEST(refuses)
{
    uint8_t *table, h[4096], was[40];
    struct fix_blob *b = batch_blob(CODEC_ZSTD, &table);
    struct blobtable *t, *rec;
    struct failure failure = { 0 };

    memcpy(h, b->stored + b->stored_len - 4096, 4096);
    CHECK_EQ(blobmeta_parse(&t, &b->info, table, h, &failure), 0);
    CHECK_EQ(t->known, N);
    CHECK_EQ(t->chunk[10].batch, 0);
    CHECK(t->chunk[9].batch != 0 && t->chunk[9].batch == t->chunk[5].batch);
    CHECK_EQ(blobtable_from_records(&rec, &b->info, fix_chunks, b, &failure), 0);
    CHECK_EQ(blobmeta_place(rec, t, &b->info, &failure), 0);
    t->chunk[10].coff++;
    CHECK_EQ(blobmeta_place(rec, t, &b->info, &failure), -EINVAL);
    t->chunk[10].coff--;
    t->chunk[3].uoff += 4096;
    CHECK_EQ(blobmeta_place(rec, t, &b->info, &failure), -EINVAL);
    blobtable_free(t);
    blobtable_free(rec);

#define TRY(at, len, change, word) \
    do {                           \
        memcpy(was, at, len);      \
        change;                    \
        refuse(b, table, h, word); \
        memcpy(at, was, len);      \
    } while (0)
    TRY(h, 4, h[0]++, "no header");
    TRY(h + 4092, 4, h[4092]++, "no header");
    TRY(h + 12, 4, h[12]++, "differ");
    TRY(h + 16, 4, h[16]++, "differ");
    TRY(h + 24, 4, h[24]++, "differ");
    TRY(h + 32, 4, h[32]++, "differ");
    TRY(h + 40, 8, put64(h + 40, 8), "contexts");
    TRY(h + 40, 8, put64(h + 40, UINT64_MAX), "contexts");
    TRY(h + 48, 8, put64(h + 48, UINT64_MAX), "contexts");
    TRY(h + 56, 4, put32(h + 56, UINT32_MAX), "contexts");
    TRY(h + 56, 4, put32(h + 56, 1), "not there");
    TRY(table + 16 + 4, 4, put32(table + 16 + 4, 9999), "not there");
    TRY(table + 16, 4, put32(table + 16, 60000), "beyond its batch");
    TRY(table + 16, 4, put32(table + 16, UINT32_MAX), "beyond its batch");
    TRY(table + N * 24, 4, put32(table + N * 24, 0), "compressed size");
    TRY(table + N * 24 + 4, 4, put32(table + N * 24 + 4, 1u << 30), "beyond its batch");
    TRY(table + 8, 5, memset(table + 8, 0xff, 5), "compressed range");
    TRY(table, 4, put32(table, UINT32_MAX), "uncompressed range");
    TRY(table, 4, put32(table, 1), "share bytes");
    TRY(table + 7, 1, table[7] |= 2, "gzip layer");
    TRY(table + 7, 1, table[7] |= 8, "encrypted");
    b->info.ci_usize_bytes = N * 24 - 1;
    CHECK(!blobmeta_possible(&b->info));
    b->info.ci_usize_bytes = UINT64_MAX;
    CHECK(!blobmeta_possible(&b->info));
    fix_blob_free(b);
    free(table);
}

/* First form: vectors from a real image (docs/rafs-format.md, Appendix A). And an image without records, allowed
 * unverified. */
TEST(v1)
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
    char err[VND_ERR_MAX], dir[200];
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

    struct fix_blob *b = fix_blob_new("plainv1", CODEC_ZSTD, 40, 16384);
    uint8_t table[40 * 16];
    for (int i = 0; i < 40; i++) {
        const struct blob_chunk *c = &b->chunk[i];
        uint64_t u = c->usize - 1, z = c->csize - 1;
        put64(table + i * 16, c->uoff | (u >> 20) << 8 | (u & 0xfffff) << 44);
        put64(table + i * 16 + 8, c->coff | (z >> 20) << 40 | (z & 0xfffff) << 44);
    }
    seal(b, table, sizeof table, 0, 0);
    b->hide_to = 40;
    vnd_engine_cfg cfg = { .allow_unverified = 1 };
    struct fix f = { 0 };
    uint8_t buf[8];
    fix_dir_make(dir);
    fix_up(&f, dir, b, 1);
    CHECK_EQ(fix_read(f.h, b, 0, 8, buf), -EIO); /* not without being asked */
    CHECK(fix_said(f.e, VND_CAUSE_DIGEST, "--allow-unverified"));
    CHECK_EQ(atomic_load(&f.server.jobs), 0);
    fix_down(&f);
    memset(&f, 0, sizeof f);
    f.e = vnd_engine_new(&cfg);
    f.s = vnd_store_open(f.e, dir, 0, err, sizeof err);
    f.h = fix_open(f.s, b);
    fix_server_start(&f.server, f.e, b, 1);
    fix_check(f.h, b, 0, 39 * 16384);
    fix_down(&f);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

/* The server is away when the table is wanted: EIO, and later it works. Unmount and shutdown do not wait for it. */
TEST(table_unreachable)
{
    for (int how = 0; how < 3; how++) {
        char dir[200];
        struct fix f = { 0 };
        uint8_t buf[8];
        struct fix_blob *b = batch_blob(CODEC_ZSTD, NULL);
        struct fix_reader r;
        struct extent x = { .len = 8 };
        struct iovec iov = { buf, 8 };

        fix_dir_make(dir);
        f.server.fail_errno = how ? 0 : EIO;
        f.server.hold = how != 0;
        fix_up(&f, dir, b, 1);
        x.blob = f.h;
        if (how == 0) {
            CHECK_EQ(fix_read(f.h, b, 0, 8, buf), -EIO);
            CHECK(fix_said(f.e, VND_CAUSE_NETWORK, "away"));
            atomic_store(&f.server.fail_errno, 0);
            for (int64_t until = now_us() + 10000000; fix_read(f.h, b, 0, 8, buf) != 8;) {
                CHECK(now_us() < until);
                usleep(50000);
            }
            fix_down(&f);
        } else {
            fix_reader_init(&r);
            CHECK_EQ(store_read(&r.w, &x, 1, &iov, 1), -EINPROGRESS);
            for (int64_t until = now_us() + 5000000;;) {
                pthread_mutex_lock(&f.e->fetcher->lock);
                bool asked = f.e->fetcher->sources != NULL;
                pthread_mutex_unlock(&f.e->fetcher->lock);
                if (asked)
                    break;
                CHECK(now_us() < until);
                usleep(200);
            }
            if (how == 1) {
                fix_down(&f);
                fix_reader_wait(&r);
            } else {
                blob_close(f.h, NULL);
                fix_reader_wait(&r);
                f.h = fix_open(f.s, b);
                fix_down(&f);
            }
            CHECK(r.w.err != 0);
        }
        fix_blob_free(b);
        fix_dir_remove(dir);
    }
}

struct first_read {
    struct fix *f;
    struct fix_blob *b;
    pthread_t thread;
    int64_t rc;
};

static void *first_read_run(void *arg)
{
    struct first_read *r = arg;
    uint8_t buf[SLOT];

    r->rc = fix_read(r->f->h, r->b, 3 * SLOT, r->b->chunk[3].usize, buf);
    if (r->rc >= 0)
        CHECK(!memcmp(buf, r->b->plain + 3 * SLOT, r->b->chunk[3].usize));
    return NULL;
}

static void first_read_start(struct first_read *r, struct fix *f, struct fix_blob *b)
{
    *r = (struct first_read){ .f = f, .b = b };
    CHECK(!pthread_create(&r->thread, NULL, first_read_run, r));
}

static bool is_fetching(struct vnd_blob *h)
{
    struct miss_shard *s = miss_shard_of(h->core->engine->fetcher, h, 0);
    bool fetching;

    pthread_mutex_lock(&s->lock);
    fetching = h->load.fetching;
    pthread_mutex_unlock(&s->lock);
    return fetching;
}

/* Two users of one directory, as two processes are: one fetches the table, the other waits for it; if the one ends
 * without it, the other fetches. */
static void check_fetched_once(bool ends)
{
    char dir[200];
    struct fix f = { 0 }, g = { 0 };
    struct fix_blob *b = batch_blob(CODEC_ZSTD, NULL);
    struct first_read one, two;

    fix_dir_make(dir);
    f.server.feed_bytes = g.server.feed_bytes = 100000;
    atomic_init(&f.server.hold, 1);
    fix_up(&f, dir, b, 1);
    fix_up(&g, dir, b, 1);
    first_read_start(&one, &f, b);
    while (!is_fetching(f.h))
        usleep(200);
    first_read_start(&two, &g, b);
    while (!is_fetching(g.h))
        usleep(200);
    usleep(30000); /* some ticks, in which it must not fetch */
    CHECK_EQ(atomic_load(&g.server.meta_jobs), 0);
    if (ends)
        vnd_engine_shutdown(f.e);
    else
        atomic_store(&f.server.hold, 0);
    CHECK(!pthread_join(one.thread, NULL) && !pthread_join(two.thread, NULL));
    CHECK_EQ(two.rc, b->chunk[3].usize);
    CHECK_EQ(one.rc < 0, ends);
    CHECK_EQ(atomic_load(&f.server.meta_jobs), !ends);
    CHECK_EQ(atomic_load(&g.server.meta_jobs), ends);
    fix_down(&f);
    fix_down(&g);
    fix_blob_free(b);
    fix_dir_remove(dir);
}

TEST(fetched_once)
{
    check_fetched_once(false);
}

TEST(fetched_once_where_the_first_process_ends)
{
    check_fetched_once(true);
}
