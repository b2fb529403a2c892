/* Reads through the store in one process: every codec, misses, hits, merges, errors. */
#include "store_fixture.h"

static void test_reads_every_codec(const char *under)
{
    static const uint32_t codecs[] = { CODEC_NONE, CODEC_LZ4_BLOCK, CODEC_GZIP, CODEC_ZSTD };

    for (size_t k = 0; k < 4; k++) {
        char dir[200];
        struct fix f = { 0 };
        struct fix_blob *b = fix_blob_new("blob", codecs[k], 40, 16384);
        fix_dir_make(dir, under);
        f.server.feed_bytes = k & 1 ? 7 : 100000;
        fix_up(&f, dir, b, 2);
        fix_check(f.h, b, 5 * 16384 + 17, 30000);
        fix_check(f.h, b, 0, 39 * 16384);
        fix_check(f.h, b, 39 * 16384, b->chunk[39].usize);
        uint64_t jobs = atomic_load(&f.server.jobs), total;
        fix_check(f.h, b, 0, 39 * 16384);
        CHECK_EQ(atomic_load(&f.server.jobs), jobs);
        CHECK_EQ(vnd_blob_ready(f.h, &total), 40);
        CHECK_EQ(total, 40);
        fix_down(&f);
        fix_blob_free(b);
        fix_dir_remove(dir);
    }
}

int main(int argc, char **argv)
{
    const char *under = argc > 1 ? argv[1] : getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";

    test_reads_every_codec(under);
    puts("test_store: ok");
    return 0;
}
