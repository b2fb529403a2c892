/* Counters of an image: shards, buckets, records of inodes, and many threads at once. */
#include "fs/metrics.h"

#include <pthread.h>
#include <string.h>

#include "check.h"

#define READ_FOP 4
#define GETATTR_FOP 0
#define THREADS 4
#define OPS 20000

static void count_read(struct fs_metrics *m, uint32_t shard, uint64_t ino, uint32_t bytes, int64_t took_us)
{
    metrics_count(
        m, shard,
        &(struct metrics_op){
            .ino = ino, .fop = READ_FOP, .read = true, .bytes = bytes, .took_us = took_us, .waited = took_us > 1000 });
}

/* nydusd's bounds: a size belongs to the bucket that begins at it, a latency to the one that ends at it. */
TEST(buckets)
{
    static const uint32_t kib[VND_READ_SIZES - 1] = { 1, 4, 16, 64, 128, 512, 1024 };
    static const int64_t us[VND_LATENCIES - 1] = { 200, 1000, 20000, 50000, 500000, 1000000, 2000000 };
    struct fs_metrics *m = metrics_new(10);
    vnd_mount_stats sum;

    CHECK_EQ(metrics_size_bucket(0), 0);
    CHECK_EQ(metrics_size_bucket(UINT64_MAX), VND_READ_SIZES - 1);
    for (uint32_t i = 0; i < VND_READ_SIZES - 1; i++) {
        CHECK_EQ(metrics_size_bucket(kib[i] * 1024 - 1), i);
        CHECK_EQ(metrics_size_bucket(kib[i] * 1024), i + 1);
    }
    for (uint32_t i = 0; i < VND_LATENCIES - 1; i++) {
        count_read(m, 0, 1, 1, us[i]);
        count_read(m, 0, 1, 1, us[i] + 1);
    }
    metrics_sum(m, &sum);
    CHECK_EQ(sum.read_latencies[0], 1);
    for (uint32_t i = 1; i < VND_LATENCIES - 1; i++)
        CHECK_EQ(sum.read_latencies[i], 2);
    CHECK_EQ(sum.read_latencies[VND_LATENCIES - 1], 1);
    CHECK_EQ(sum.reads_at_once, 3);
    CHECK_EQ(sum.reads_waited, 11);
    metrics_free(m);
}

/* The end of a file is a read, and nothing else. */
TEST(empty_read)
{
    struct fs_metrics *m = metrics_new(10);
    vnd_mount_stats sum;

    count_read(m, 3, 1, 0, 0);
    metrics_sum(m, &sum);
    CHECK_EQ(sum.fops.hits[READ_FOP], 1);
    CHECK_EQ(sum.fops.read_sizes[0], 1);
    CHECK_EQ(sum.reads_at_once + sum.reads_waited + sum.read_latencies[0] + sum.read_bytes, 0);
    metrics_free(m);
}

TEST(shards)
{
    uint64_t taken = 0;

    for (uint32_t i = 0; i < METRICS_SHARDS - 1; i++)
        CHECK_EQ(metrics_take_shard(&taken), i);
    CHECK_EQ(metrics_take_shard(&taken), METRICS_SHARDS - 1); /* shared */
    CHECK_EQ(metrics_take_shard(&taken), METRICS_SHARDS - 1);
    metrics_give_shard(&taken, METRICS_SHARDS - 1);
    metrics_give_shard(&taken, 5);
    CHECK_EQ(metrics_take_shard(&taken), 5);
}

/* Inodes that a guest made up leave nothing behind, however many; real ones are bounded by the image's. */
TEST(records)
{
    struct fs_metrics *m = metrics_new(300);
    vnd_file_stats out[400];
    uint64_t inos[7], n = 0, got;

    count_read(m, 0, 77, 10, 1);
    CHECK_EQ(metrics_files(m, NULL, 0), 0); /* not asked for */
    metrics_keep(m, true);
    for (uint64_t i = 0; i < 100000; i++)
        metrics_count(m, 0, &(struct metrics_op){ .ino = i << 8, .fop = GETATTR_FOP, .failed = true });
    CHECK_EQ(metrics_files(m, NULL, 0), 0);
    for (uint64_t i = 0; i < 1000; i++)
        count_read(m, 0, i << 12, 10, 1);
    CHECK_EQ(metrics_files(m, out, 400), 300);
    for (uint32_t i = 0; i < 300; i++) {
        CHECK_EQ(out[i].reads, 1);
        CHECK_EQ(out[i].data_read, 10);
        CHECK_EQ(out[i].hits[READ_FOP], 1);
        CHECK(out[i].first_read_s > 1600000000);
    }
    metrics_count(m, 0, &(struct metrics_op){ .ino = 0, .fop = GETATTR_FOP, .failed = true });
    metrics_count(m, 1, &(struct metrics_op){ .ino = 0, .fop = GETATTR_FOP });
    CHECK_EQ(metrics_files(m, out, 1), 301); /* more than there is room for are told */
    while ((got = metrics_latest(m, inos, 7)))
        n += got;
    CHECK_EQ(n, 300);
    count_read(m, 0, 5 << 12, 10, 1);
    CHECK_EQ(metrics_latest(m, inos, 7), 1);
    CHECK_EQ(inos[0], 5 << 12);
    metrics_free(m);
}

struct counting {
    struct fs_metrics *m;
    uint32_t shard;
};

static void *count_many(void *arg)
{
    struct counting *c = arg;

    for (uint64_t i = 0; i < OPS; i++)
        count_read(c->m, c->shard, i % 50, 100, 1);
    return NULL;
}

/* Threads with shards of their own, two that share the last one, and one that asks meanwhile. */
TEST(threads)
{
    struct fs_metrics *m = metrics_new(50);
    struct counting c[THREADS] = { { m, 0 }, { m, 1 }, { m, METRICS_SHARDS - 1 }, { m, METRICS_SHARDS - 1 } };
    static vnd_file_stats out[THREADS * 50];
    pthread_t t[THREADS];
    vnd_mount_stats sum;
    uint64_t before = 0, n, reads = 0;

    metrics_keep(m, true);
    for (int i = 0; i < THREADS; i++)
        CHECK_EQ(pthread_create(&t[i], NULL, count_many, &c[i]), 0);
    do {
        metrics_sum(m, &sum);
        CHECK(sum.fops.hits[READ_FOP] >= before);
        before = sum.fops.hits[READ_FOP];
        metrics_files(m, out, THREADS * 50);
    } while (before < THREADS * OPS);
    for (int i = 0; i < THREADS; i++)
        pthread_join(t[i], NULL);
    metrics_sum(m, &sum);
    CHECK_EQ(sum.fops.hits[READ_FOP], THREADS * OPS);
    CHECK_EQ(sum.read_bytes, 100ull * THREADS * OPS);
    CHECK_EQ(sum.read_latency_us, THREADS * OPS);
    n = metrics_files(m, out, THREADS * 50);
    CHECK_EQ(n, 3 * 50);
    for (uint64_t i = 0; i < n; i++)
        reads += out[i].reads;
    CHECK_EQ(reads, THREADS * OPS);
    metrics_free(m);
}
