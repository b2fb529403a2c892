/* vhost/guestmem.c -- see guestmem.h. */
#include "vhost/guestmem.h"

#include <errno.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "base/base.h"
#include "base/engine.h"
#include "base/sigbus.h"

#define GUESTLOG_PAGE_SHIFT 12 /* vhost's dirty log page, whatever the guest's own pages are */

struct guestmem_map {
    int refs;
    struct vnd_engine *engine; /* NULL: not counted */
    uint8_t *addr;
    uint64_t len, offset; /* of the mapping, block aligned */
    dev_t dev;
    ino_t ino;
    struct sigbus_range *guard;
};

static void uncount(struct vnd_engine *e, uint64_t bytes)
{
    if (e == NULL)
        return;
    atomic_fetch_sub(&e->guest_bytes, bytes);
    atomic_fetch_sub(&e->guest_maps, 1);
}

/* False: all front-ends together would have mapped too much. */
static bool count(struct vnd_engine *e, uint64_t bytes)
{
    if (e == NULL)
        return true;
    bool fits = atomic_fetch_add(&e->guest_bytes, bytes) + bytes <= GUESTMEM_ALL_BYTES_MAX;

    fits &= atomic_fetch_add(&e->guest_maps, 1) < GUESTMEM_ALL_MAPS_MAX;
    if (!fits)
        uncount(e, bytes);
    return fits;
}

void guestmem_map_put(struct guestmem_map *map)
{
    if (map == NULL || --map->refs > 0)
        return;
    sigbus_remove(map->guard);
    munmap(map->addr, map->len);
    uncount(map->engine, map->len);
    free(map);
}

/* Offsets of huge page files must be aligned to their page, which only statfs tells. */
static uint64_t block_bytes(int fd)
{
    struct statfs fs;

    if (fstatfs(fd, &fs) == 0 && fs.f_type == HUGETLBFS_MAGIC && fs.f_bsize > 0)
        return (uint64_t)fs.f_bsize;
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

/* The file's size and identity, once the range is found to lie in it. 0 or -errno. */
static int check_range(const struct map_request *r, struct stat *st, struct failure *f)
{
    uint64_t end;

    if (r->size_bytes == 0 || __builtin_add_overflow(r->offset, r->size_bytes, &end) || end > INT64_MAX)
        return failure_set(f, -EINVAL, VND_CAUSE_FORMAT, "%s: 0x%llx bytes at file offset 0x%llx make no range",
                           r->what, (unsigned long long)r->size_bytes, (unsigned long long)r->offset);
    if (fstat(r->fd, st) != 0)
        return failure_set(f, -errno, VND_CAUSE_IO, "%s: fd %d: %s", r->what, r->fd, strerror(errno));
    if (!S_ISREG(st->st_mode))
        return failure_set(f, -EINVAL, VND_CAUSE_FORMAT, "%s: fd %d is not a file; share a memfd or a file", r->what,
                           r->fd);
    if ((uint64_t)st->st_size < end)
        return failure_set(f, -EINVAL, VND_CAUSE_FORMAT, "%s: the range ends at 0x%llx, its file at 0x%llx", r->what,
                           (unsigned long long)end, (unsigned long long)st->st_size);
    return 0;
}

static struct guestmem_map *find_mapping(const struct guestmem *m, const struct guestmem_map *like)
{
    for (uint32_t i = 0; m != NULL && i < m->n; i++) {
        struct guestmem_map *map = m->region[i].map;

        if (map->dev == like->dev && map->ino == like->ino && map->offset == like->offset && map->len == like->len &&
            !sigbus_hit(map->guard))
            return map;
    }
    return NULL;
}

/* map's offset, len, dev and ino are filled in; block is the page size. */
static int map_file(const struct map_request *r, struct guestmem_map *map, uint64_t block, struct failure *f)
{
    int rc;

    if (!count(r->engine, map->len))
        return failure_set(f, -ENOSPC, VND_CAUSE_GUEST,
                           "%s: 0x%llx bytes more than all front-ends of this daemon may share with it", r->what,
                           (unsigned long long)map->len);
    map->engine = r->engine;
    map->addr = mmap(NULL, map->len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, r->fd, (off_t)map->offset);
    if (map->addr == MAP_FAILED) {
        rc = failure_set(f, -errno, VND_CAUSE_IO, "%s: mapping 0x%llx bytes at 0x%llx: %s", r->what,
                         (unsigned long long)map->len, (unsigned long long)map->offset, strerror(errno));
        uncount(map->engine, map->len);
        return rc;
    }
    madvise(map->addr, map->len, MADV_DONTDUMP);
    /* A front-end that truncates its file loses its device: nothing of the mapping is used any more. */
    map->guard = sigbus_add(map->addr, map->len, block, true, r->lost);
    if (map->guard != NULL)
        return 0;
    munmap(map->addr, map->len);
    uncount(map->engine, map->len);
    return failure_set(f, -ENOMEM, VND_CAUSE_IO, "%s: out of memory", r->what);
}

int guestmem_map_new(const struct map_request *r, struct guestmem_map **out, uint8_t **host, struct failure *f)
{
    struct guestmem_map like = { .refs = 1 }, *map;
    uint64_t block;
    struct stat st = { 0 };
    int rc = check_range(r, &st, f);

    if (rc != 0)
        return rc;
    block = block_bytes(r->fd);
    like.offset = r->offset / block * block;
    like.len = (r->offset + r->size_bytes - like.offset + block - 1) / block * block;
    like.dev = st.st_dev;
    like.ino = st.st_ino;
    map = find_mapping(r->old, &like);
    if (map != NULL) {
        map->refs++;
    } else {
        map = malloc(sizeof(*map));
        if (map == NULL)
            return failure_set(f, -ENOMEM, VND_CAUSE_IO, "%s: out of memory", r->what);
        *map = like;
        rc = map_file(r, map, block, f);
        if (rc != 0) {
            free(map);
            return rc;
        }
    }
    *out = map;
    *host = map->addr + (r->offset - map->offset); /* NOLINT(clang-analyzer-core.NullPointerArithm): it is mapped */
    return 0;
}

static int compare_gpa(const void *a, const void *b)
{
    const struct guestmem_region *x = a, *y = b;

    return (x->gpa > y->gpa) - (x->gpa < y->gpa);
}

static int compare_uaddr(const void *a, const void *b)
{
    const struct guestmem_region *x = a, *y = b;

    return (x->uaddr > y->uaddr) - (x->uaddr < y->uaddr);
}

/* Sizes, sums and overlaps in both address spaces, on a scratch copy. */
static int check_regions(const vnd_region *regions, uint32_t n, struct failure *f)
{
    struct guestmem_region *r = calloc(n ? n : 1, sizeof(*r));
    uint64_t all = 0;
    int rc = 0;

    if (r == NULL)
        return failure_set(f, -ENOMEM, VND_CAUSE_IO, "guest memory: out of memory");
    for (uint32_t i = 0; i < n && rc == 0; i++) {
        uint64_t end;

        r[i] = (struct guestmem_region){ .gpa = regions[i].gpa,
                                         .size = regions[i].size_bytes,
                                         .uaddr = regions[i].user_addr };
        if (r[i].size == 0 || __builtin_add_overflow(r[i].gpa, r[i].size, &end) ||
            __builtin_add_overflow(r[i].uaddr, r[i].size, &end))
            rc = failure_set(f, -EINVAL, VND_CAUSE_FORMAT,
                             "guest memory: region %u (0x%llx bytes at 0x%llx) is empty or wraps", i,
                             (unsigned long long)r[i].size, (unsigned long long)r[i].gpa);
    }
    for (uint32_t i = 0; i < n && rc == 0; i++)
        if (r[i].size > GUESTMEM_BYTES_MAX || (all += r[i].size) > GUESTMEM_BYTES_MAX)
            rc = failure_set(f, -E2BIG, VND_CAUSE_GUEST,
                             "guest memory: more than %llu TiB; a front-end may not share that much",
                             GUESTMEM_BYTES_MAX >> 40);
    qsort(r, n, sizeof(*r), compare_uaddr);
    for (uint32_t i = 1; i < n && rc == 0; i++)
        if (r[i - 1].uaddr + r[i - 1].size > r[i].uaddr)
            rc = failure_set(f, -EINVAL, VND_CAUSE_FORMAT, "guest memory: regions overlap at user address 0x%llx",
                             (unsigned long long)r[i].uaddr);
    qsort(r, n, sizeof(*r), compare_gpa);
    for (uint32_t i = 1; i < n && rc == 0; i++)
        if (r[i - 1].gpa + r[i - 1].size > r[i].gpa)
            rc = failure_set(f, -EINVAL, VND_CAUSE_FORMAT, "guest memory: regions overlap at guest address 0x%llx",
                             (unsigned long long)r[i].gpa);
    free(r);
    return rc;
}

int guestmem_new(const vnd_region *regions, uint32_t n, const struct map_request *like, struct guestmem **out,
                 struct failure *f)
{
    struct guestmem *m;
    int rc;

    if (n > VND_REGION_MAX)
        return failure_set(f, -EINVAL, VND_CAUSE_FORMAT, "guest memory: %u regions, at most %d", n, VND_REGION_MAX);
    rc = check_regions(regions, n, f);
    if (rc != 0)
        return rc;
    m = calloc(1, sizeof(*m) + n * sizeof(m->region[0]));
    if (m == NULL)
        return failure_set(f, -ENOMEM, VND_CAUSE_IO, "guest memory: out of memory");
    for (; m->n < n; m->n++) {
        const vnd_region *in = &regions[m->n];
        struct guestmem_region *r = &m->region[m->n];

        struct map_request map = *like;

        map.fd = in->fd;
        map.offset = in->mmap_offset;
        map.size_bytes = in->size_bytes;
        map.what = "guest memory";

        rc = guestmem_map_new(&map, &r->map, &r->host, f);
        if (rc != 0) {
            guestmem_free(m);
            return rc;
        }
        r->gpa = in->gpa;
        r->size = in->size_bytes;
        r->uaddr = in->user_addr;
    }
    qsort(m->region, n, sizeof(m->region[0]), compare_gpa);
    *out = m;
    return 0;
}

void guestmem_free(struct guestmem *m)
{
    if (m == NULL)
        return;
    for (uint32_t i = 0; i < m->n; i++)
        guestmem_map_put(m->region[i].map);
    free(m);
}

bool guestmem_hit(const struct guestmem *m)
{
    for (uint32_t i = 0; m != NULL && i < m->n; i++)
        if (sigbus_hit(m->region[i].map->guard))
            return true;
    return false;
}

uint8_t *guestmem_find(const struct guestmem *m, uint32_t *hint, uint64_t gpa, uint64_t len, uint64_t *got)
{
    uint32_t lo = 0, hi;

    if (m == NULL)
        return NULL;
    hi = m->n;
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        const struct guestmem_region *r = &m->region[mid];

        if (gpa < r->gpa) {
            hi = mid;
        } else if (gpa - r->gpa >= r->size) {
            lo = mid + 1;
        } else {
            *hint = mid;
            *got = r->size - (gpa - r->gpa);
            if (*got > len)
                *got = len;
            return r->host + (gpa - r->gpa);
        }
    }
    return NULL;
}

uint8_t *guestmem_ring(const struct guestmem *m, uint64_t uaddr, uint64_t len)
{
    for (uint32_t i = 0; m != NULL && i < m->n; i++) {
        const struct guestmem_region *r = &m->region[i];

        if (uaddr - r->uaddr < r->size)
            return r->size - (uaddr - r->uaddr) >= len ? r->host + (uaddr - r->uaddr) : NULL;
    }
    return NULL;
}

int guestmem_read(const struct guestmem *m, uint32_t *hint, uint64_t gpa, void *dst, uint64_t len)
{
    uint8_t *to = dst;

    while (len > 0) {
        uint64_t got;
        const uint8_t *host = guestmem_host(m, hint, gpa, len, &got);

        if (host == NULL)
            return -EFAULT;
        memcpy(to, host, got);
        to += got;
        len -= got;
        if (len > 0 && __builtin_add_overflow(gpa, got, &gpa))
            return -EFAULT;
    }
    /* The guest may write on: nothing after this line may be fetched from it anew. */
    atomic_signal_fence(memory_order_seq_cst);
    return 0;
}

struct guestlog {
    uint8_t *bits;
    uint64_t size_bytes;
    struct guestmem_map *map;
};

int guestlog_new(const struct map_request *r, struct guestlog **out, struct failure *f)
{
    struct map_request map = *r;
    struct guestlog *l;
    int rc;

    if (r->size_bytes > GUESTLOG_BYTES_MAX)
        return failure_set(f, -E2BIG, VND_CAUSE_GUEST, "dirty log: more than %llu MiB", GUESTLOG_BYTES_MAX >> 20);
    l = calloc(1, sizeof(*l));
    if (l == NULL)
        return failure_set(f, -ENOMEM, VND_CAUSE_IO, "dirty log: out of memory");
    map.what = "dirty log";
    map.old = NULL;
    rc = guestmem_map_new(&map, &l->map, &l->bits, f);
    if (rc != 0) {
        free(l);
        return rc;
    }
    l->size_bytes = r->size_bytes;
    *out = l;
    return 0;
}

void guestlog_free(struct guestlog *l)
{
    if (l == NULL)
        return;
    guestmem_map_put(l->map);
    free(l);
}

void guestmem_mark(struct guestlog *log, uint64_t gpa, uint64_t len)
{
    uint64_t last;

    if (log == NULL || len == 0)
        return;
    if (__builtin_add_overflow(gpa, len - 1, &last))
        last = UINT64_MAX;
    last >>= GUESTLOG_PAGE_SHIFT;
    for (uint64_t page = gpa >> GUESTLOG_PAGE_SHIFT; page <= last && page / 8 < log->size_bytes; page++)
        __atomic_fetch_or(&log->bits[page / 8], (uint8_t)(1u << (page % 8)), __ATOMIC_SEQ_CST);
}
