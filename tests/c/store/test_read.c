/* A hit takes no lock, allocates nothing, and makes one data system call per contiguous run. The measurement "cost" prints what it costs beside a
 * plain preadv of the same bytes.
 */
#include <dlfcn.h>
#include <sys/uio.h>

#include "store_fixture.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define COUNTING 0
#else
#define COUNTING 1
#endif

static _Thread_local uint64_t allocations, locks, reads;

#if COUNTING
extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t n, size_t m);
extern void *__libc_realloc(void *p, size_t n);

void *malloc(size_t n)
{
    allocations++;
    return __libc_malloc(n);
}

void *calloc(size_t n, size_t m)
{
    allocations++;
    return __libc_calloc(n, m);
}

void *realloc(void *p, size_t n)
{
    allocations++;
    return __libc_realloc(p, n);
}

int pthread_mutex_lock(pthread_mutex_t *m)
{
    static int (*_Atomic real)(pthread_mutex_t *);
    locks++;
    if (!real)
        real = (int (*)(pthread_mutex_t *))dlsym(RTLD_NEXT, "pthread_mutex_lock");
    return real(m);
}

ssize_t preadv2(int fd, const struct iovec *iov, int n, off_t off, int flags)
{
    static ssize_t (*_Atomic real)(int, const struct iovec *, int, off_t, int);
    reads++;
    if (!real)
        real = (ssize_t (*)(int, const struct iovec *, int, off_t, int))dlsym(RTLD_NEXT, "preadv2");
    return real(fd, iov, n, off, flags);
}
#endif

#define HITS 10000

static void hit(struct fix *f, struct fix_blob *b, uint64_t off, uint32_t len, int pieces, uint64_t runs)
{
    static uint8_t buf[2 << 20];
    struct extent ext[STORE_EXTENTS_MAX];
    struct iovec iov[256];
    struct store_wait w;
    int n = fix_extents(f->h, b, off, len, ext, STORE_EXTENTS_MAX);

    for (int i = 0; i < pieces; i++)
        iov[i] = (struct iovec){ buf + (size_t)i * (len / (uint32_t)pieces), len / (uint32_t)pieces };
    store_wait_init(&w, fix_wake, NULL);
    uint64_t a = allocations, l = locks, r = reads;
    for (int i = 0; i < HITS; i++) {
        CHECK_EQ(store_read(&w, ext, n, iov, pieces), len);
        store_wait_done(&w);
        if (i == 0)
            CHECK(!memcmp(buf, b->plain + off, len));
    }
    CHECK_EQ(allocations - a, 0);
    CHECK_EQ(locks - l, 0);
    CHECK_EQ(reads - r, COUNTING ? runs * HITS : 0);
}

/* Of this thread's processor: a busy machine counts less. */
static int64_t time_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Least and median of 101 rounds each, taken in turn. */
static void bench(struct fix *f, struct fix_blob *b, const char *what, uint32_t len, int pieces, int rounds)
{
    static uint8_t buf[2 << 20];
    struct extent ext[STORE_EXTENTS_MAX];
    struct iovec iov[256];
    struct store_wait w;
    double ours[101], plain[101];
    int n = fix_extents(f->h, b, 0, len, ext, STORE_EXTENTS_MAX);

    for (int i = 0; i < pieces; i++)
        iov[i] = (struct iovec){ buf + (size_t)i * (len / (uint32_t)pieces), len / (uint32_t)pieces };
    store_wait_init(&w, fix_wake, NULL);
    for (int k = 0; k < 101; k++) {
        int64_t t = time_ns();
        for (int i = 0; i < rounds; i++) {
            CHECK_EQ(store_read(&w, ext, n, iov, pieces), len);
            store_wait_done(&w);
        }
        ours[k] = (double)(time_ns() - t) / rounds;
        t = time_ns();
        for (int i = 0; i < rounds; i++)
            CHECK_EQ(preadv2(f->h->cache->data_fd, iov, pieces, 0, RWF_NOWAIT), len);
        plain[k] = (double)(time_ns() - t) / rounds;
    }
    qsort(ours, 101, sizeof *ours, by_value);
    qsort(plain, 101, sizeof *plain, by_value);
    printf("%-30s store_read %7.0f (median %7.0f) ns, preadv2 %7.0f (%7.0f), difference %5.0f (%5.0f)\n", what, ours[0],
           ours[50], plain[0], plain[50], ours[0] - plain[0], ours[50] - plain[50]);
}

/* Two blobs that are wholly warm: one of large chunks, one of small. */
struct warm {
    char dir[200];
    struct fix f, g;
    struct fix_blob *b, *small;
};

static void warm_up(struct warm *w)
{
    memset(w, 0, sizeof *w);
    w->b = fix_blob_new("blob", CODEC_ZSTD, 10, 1 << 20);
    w->small = fix_blob_new("small", CODEC_LZ4_BLOCK, 600, 4096);
    fix_dir_make(w->dir);
    w->f.server.feed_bytes = w->g.server.feed_bytes = 1 << 20;
    fix_up(&w->f, w->dir, w->b, 1);
    fix_up(&w->g, w->dir, w->small, 1);
    fix_check(w->f.h, w->b, 0, 9 << 20);
    for (uint64_t i = 0; i < 2; i++)
        fix_check(w->g.h, w->small, i << 20, 1 << 20);
}

static void warm_down(struct warm *w)
{
    fix_down(&w->f);
    fix_down(&w->g);
    fix_blob_free(w->b);
    fix_blob_free(w->small);
    fix_dir_remove(w->dir);
}

TEST(hits_in_large_chunks)
{
    struct warm w;

    warm_up(&w);
    hit(&w.f, w.b, 4096, 4096, 1, 1);
    hit(&w.f, w.b, 512, 1 << 18, 64, 1);
    warm_down(&w);
}

TEST(hits_in_small_chunks)
{
    struct warm w;

    warm_up(&w);
    hit(&w.g, w.small, 8192, 1 << 16, 16, 1);
    warm_down(&w);
}

MEASURE(cost)
{
    struct warm w;

    warm_up(&w);
    bench(&w.f, w.b, "4 KiB", 4096, 1, 2000);
    bench(&w.f, w.b, "64 KiB, 16 pieces", 65536, 16, 500);
    bench(&w.f, w.b, "1 MiB, 1 piece", 1 << 20, 1, 30);
    bench(&w.f, w.b, "1 MiB, 256 pieces", 1 << 20, 256, 30);
    bench(&w.g, w.small, "1 MiB, 256 chunks and pieces", 1 << 20, 256, 30);
    warm_down(&w);
}
