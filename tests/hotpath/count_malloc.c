/* count_malloc.c -- an LD_PRELOAD library that counts each thread's calls of the allocator while a flag is up.
 *
 * The file named by COUNT_MALLOC_FILE is mapped: a flag (set by the test) and a row a thread. Calls go on to
 * glibc's own names, so nothing here needs the dynamic linker.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define ROWS 511

struct row {
    _Atomic uint32_t thread, allocations, frees, pad;
};
struct table {
    _Atomic uint32_t enabled, pad[3];
    struct row rows[ROWS];
};

extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *p, size_t n);
extern void *__libc_memalign(size_t align, size_t n);
extern void __libc_free(void *p);

static struct table *_Atomic table;
static __thread struct row *own __attribute__((tls_model("initial-exec")));

__attribute__((constructor)) static void map_table(void)
{
    const char *path = getenv("COUNT_MALLOC_FILE");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *at = mmap(NULL, sizeof(struct table), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (at != MAP_FAILED)
        atomic_store(&table, at);
}

static struct row *counted(void)
{
    struct table *t = atomic_load_explicit(&table, memory_order_acquire);
    if (!t || !atomic_load_explicit(&t->enabled, memory_order_relaxed))
        return NULL;
    for (int i = 0; !own && i < ROWS; i++) {
        uint32_t none = 0;
        if (atomic_compare_exchange_strong(&t->rows[i].thread, &none, (uint32_t)gettid()))
            own = &t->rows[i];
    }
    return own;
}

static void count_allocation(void)
{
    struct row *r = counted();
    if (r)
        atomic_fetch_add_explicit(&r->allocations, 1, memory_order_relaxed);
}

void *malloc(size_t n)
{
    count_allocation();
    return __libc_malloc(n);
}
void *calloc(size_t n, size_t size)
{
    count_allocation();
    return __libc_calloc(n, size);
}
void *realloc(void *p, size_t n)
{
    count_allocation();
    return __libc_realloc(p, n);
}
void *memalign(size_t align, size_t n)
{
    count_allocation();
    return __libc_memalign(align, n);
}
void *aligned_alloc(size_t align, size_t n)
{
    count_allocation();
    return __libc_memalign(align, n);
}

int posix_memalign(void **out, size_t align, size_t n)
{
    count_allocation();
    *out = __libc_memalign(align, n);
    return *out ? 0 : ENOMEM;
}

void free(void *p)
{
    struct row *r = p ? counted() : NULL;
    if (r)
        atomic_fetch_add_explicit(&r->frees, 1, memory_order_relaxed);
    __libc_free(p);
}
