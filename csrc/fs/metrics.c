/* fs/metrics.c -- counters of one mounted image; see metrics.h. */
#include "fs/metrics.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SHARED_SHARD (METRICS_SHARDS - 1)
#define RECORDS_MIN 64u /* slots of a record table at first; a power of two, as ever after */

/* An inode that an operation of this shard's thread succeeded on. */
struct record {
    uint64_t ino, data_read, reads, first_read_s;
    uint32_t first_read_ns;
    uint32_t hits[VND_FOPS], errors[VND_FOPS], read_sizes[VND_READ_SIZES];
    bool used, latest;
};

struct shard {
    _Alignas(64) _Atomic uint64_t hits[VND_FOPS];
    _Atomic uint64_t errors[VND_FOPS], read_sizes[VND_READ_SIZES], latencies[VND_LATENCIES];
    _Atomic uint64_t latency_us, read_bytes, reads_at_once, reads_waited;
    pthread_mutex_t lock;   /* what follows */
    struct record *records; /* open addressing by ino */
    uint64_t n, cap;
};

struct fs_metrics {
    uint64_t max_inodes;
    _Atomic bool keep;                              /* records of inodes */
    _Atomic(struct shard *) shards[METRICS_SHARDS]; /* made by their thread, at its first operation */
};

struct fs_metrics *metrics_new(uint64_t max_inodes)
{
    struct fs_metrics *m = calloc(1, sizeof(*m));

    if (m)
        m->max_inodes = max_inodes;
    return m;
}

void metrics_free(struct fs_metrics *m)
{
    for (uint32_t i = 0; m && i < METRICS_SHARDS; i++) {
        struct shard *s = atomic_load(&m->shards[i]);

        if (s) {
            pthread_mutex_destroy(&s->lock);
            free(s->records);
            free(s);
        }
    }
    free(m);
}

uint32_t metrics_take_shard(uint64_t *taken)
{
    for (uint32_t i = 0; i < SHARED_SHARD; i++) {
        if (!(*taken & 1ull << i)) {
            *taken |= 1ull << i;
            return i;
        }
    }
    return SHARED_SHARD;
}

void metrics_give_shard(uint64_t *taken, uint32_t shard)
{
    if (shard < SHARED_SHARD)
        *taken &= ~(1ull << shard);
}

uint32_t metrics_size_bucket(uint64_t bytes)
{
    static const uint32_t kib[VND_READ_SIZES - 1] = { 1, 4, 16, 64, 128, 512, 1024 };
    uint32_t i = 0;

    while (i < VND_READ_SIZES - 1 && bytes >= kib[i] * 1024ull)
        i++;
    return i;
}

static uint32_t latency_bucket(int64_t us)
{
    static const int32_t bounds[VND_LATENCIES - 1] = { 200, 1000, 20000, 50000, 500000, 1000000, 2000000 };
    uint32_t i = 0;

    while (i < VND_LATENCIES - 1 && us > bounds[i])
        i++;
    return i;
}

static struct shard *make_shard(struct fs_metrics *m, uint32_t number)
{
    struct shard *s = aligned_alloc(64, (sizeof(*s) + 63) / 64 * 64), *other = NULL;

    if (!s)
        return NULL;
    memset(s, 0, sizeof(*s));
    pthread_mutex_init(&s->lock, NULL);
    if (!atomic_compare_exchange_strong(&m->shards[number], &other, s)) {
        pthread_mutex_destroy(&s->lock);
        free(s);
        return other;
    }
    return s;
}

/* ---- records of inodes; all under the shard's lock */

static struct record *find_slot(const struct shard *s, uint64_t ino)
{
    uint64_t i = ino * 0x9E3779B97F4A7C15ull >> 32;

    for (i &= s->cap - 1; s->records[i].used && s->records[i].ino != ino; i = (i + 1) & (s->cap - 1)) {}
    return &s->records[i];
}

static bool grow(struct shard *s)
{
    struct shard next = { .cap = s->cap ? s->cap * 2 : RECORDS_MIN };

    next.records = calloc(next.cap, sizeof(*next.records));
    if (!next.records)
        return false;
    for (uint64_t i = 0; i < s->cap; i++)
        if (s->records[i].used)
            *find_slot(&next, s->records[i].ino) = s->records[i];
    free(s->records);
    s->records = next.records;
    s->cap = next.cap;
    return true;
}

/* The record of an inode; NULL: there is none and none is to be made, or no memory. */
static struct record *get_record(const struct fs_metrics *m, struct shard *s, uint64_t ino, bool make)
{
    struct record *r = s->cap ? find_slot(s, ino) : NULL;

    if (r && r->used)
        return r;
    if (!make || s->n >= m->max_inodes || ((s->n + 1) * 4 > s->cap * 3 && !grow(s)))
        return NULL;
    r = find_slot(s, ino);
    r->used = true;
    r->ino = ino;
    s->n++;
    return r;
}

/* A guest may name inodes that do not exist: only what succeeded makes a record. */
static void count_inode(const struct fs_metrics *m, struct shard *s, const struct metrics_op *op)
{
    struct record *r;

    pthread_mutex_lock(&s->lock);
    r = get_record(m, s, op->ino, !op->failed);
    if (r) {
        if (op->failed)
            r->errors[op->fop]++;
        else
            r->hits[op->fop]++;
        if (op->read) {
            r->data_read += op->bytes;
            r->read_sizes[metrics_size_bucket(op->bytes)]++;
            r->latest = true;
            if (!r->reads++) {
                struct timespec now;

                clock_gettime(CLOCK_REALTIME, &now);
                r->first_read_s = (uint64_t)now.tv_sec;
                r->first_read_ns = (uint32_t)now.tv_nsec;
            }
        }
    }
    pthread_mutex_unlock(&s->lock);
}

/* ---- counting */

static void add(_Atomic uint64_t *counter, uint64_t n, bool shared)
{
    if (shared)
        atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
    else
        atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n, memory_order_relaxed);
}

void metrics_count(struct fs_metrics *m, uint32_t number, const struct metrics_op *op)
{
    struct shard *s = atomic_load_explicit(&m->shards[number], memory_order_acquire);
    bool shared = number == SHARED_SHARD;

    if (!s && !(s = make_shard(m, number)))
        return;
    add(op->failed ? &s->errors[op->fop] : &s->hits[op->fop], 1, shared);
    if (op->read) {
        add(&s->read_sizes[metrics_size_bucket(op->bytes)], 1, shared);
        if (op->bytes) {
            add(&s->read_bytes, op->bytes, shared);
            add(op->waited ? &s->reads_waited : &s->reads_at_once, 1, shared);
            add(&s->latencies[latency_bucket(op->took_us)], 1, shared);
            add(&s->latency_us, (uint64_t)op->took_us, shared);
        }
    }
    if (atomic_load_explicit(&m->keep, memory_order_relaxed))
        count_inode(m, s, op);
}

/* ---- asking */

void metrics_keep(struct fs_metrics *m, bool records)
{
    atomic_store_explicit(&m->keep, records, memory_order_relaxed);
}

static void sum(uint64_t *to, const _Atomic uint64_t *from, int n)
{
    for (int i = 0; i < n; i++)
        to[i] += atomic_load_explicit(&from[i], memory_order_relaxed);
}

void metrics_sum(struct fs_metrics *m, vnd_mount_stats *out)
{
    memset(out, 0, sizeof(*out));
    for (uint32_t i = 0; i < METRICS_SHARDS; i++) {
        const struct shard *s = atomic_load_explicit(&m->shards[i], memory_order_acquire);

        if (s) {
            sum(out->fops.hits, s->hits, VND_FOPS);
            sum(out->fops.errors, s->errors, VND_FOPS);
            sum(out->fops.read_sizes, s->read_sizes, VND_READ_SIZES);
            sum(out->read_latencies, s->latencies, VND_LATENCIES);
            sum(&out->read_latency_us, &s->latency_us, 1);
            sum(&out->read_bytes, &s->read_bytes, 1);
            sum(&out->reads_at_once, &s->reads_at_once, 1);
            sum(&out->reads_waited, &s->reads_waited, 1);
        }
    }
}

static void give_record(const struct record *r, vnd_file_stats *out)
{
    *out = (vnd_file_stats){ .ino = r->ino,
                             .data_read = r->data_read,
                             .reads = r->reads,
                             .first_read_s = r->first_read_s,
                             .first_read_ns = r->first_read_ns };
    memcpy(out->hits, r->hits, sizeof(out->hits));
    memcpy(out->errors, r->errors, sizeof(out->errors));
    memcpy(out->read_sizes, r->read_sizes, sizeof(out->read_sizes));
}

uint64_t metrics_files(struct fs_metrics *m, vnd_file_stats *out, uint64_t max)
{
    uint64_t n = 0;

    for (uint32_t i = 0; i < METRICS_SHARDS; i++) {
        struct shard *s = atomic_load_explicit(&m->shards[i], memory_order_acquire);

        if (!s)
            continue;
        pthread_mutex_lock(&s->lock);
        for (uint64_t k = 0; k < s->cap; k++) {
            if (s->records[k].used) {
                if (n < max)
                    give_record(&s->records[k], &out[n]);
                n++;
            }
        }
        pthread_mutex_unlock(&s->lock);
    }
    return n;
}

uint64_t metrics_latest(struct fs_metrics *m, uint64_t *inos, uint64_t max)
{
    uint64_t n = 0;

    for (uint32_t i = 0; i < METRICS_SHARDS && n < max; i++) {
        struct shard *s = atomic_load_explicit(&m->shards[i], memory_order_acquire);

        if (!s)
            continue;
        pthread_mutex_lock(&s->lock);
        for (uint64_t k = 0; k < s->cap && n < max; k++) {
            if (s->records[k].latest) {
                s->records[k].latest = false;
                inos[n++] = s->records[k].ino;
            }
        }
        pthread_mutex_unlock(&s->lock);
    }
    return n;
}
