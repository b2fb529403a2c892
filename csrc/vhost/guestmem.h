/* vhost/guestmem.h -- the guest's memory as the front-end shares it: an immutable table of mapped regions, the dirty log,
 * and the only functions that write to the guest.
 *
 * Descriptors carry guest physical addresses (gpa); ring addresses are the front-end's own user addresses (uaddr).
 * Threads: control builds a table, hands it to the queue threads, and frees it when none of them uses it any more; its
 * contents do not change, so the queue threads read it without a lock.
 */
#ifndef VND_GUESTMEM_H
#define VND_GUESTMEM_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "base/error.h"

/* What a front-end may map: its guest's memory, and the dirty log of that (a bit for each 4 KiB page; QEMU makes it as long as
 * the highest address asks for). No virtual machine of today has more; a memfd may be 128 TiB long, which is all of a
 * process's address space. */
#define GUESTMEM_BYTES_MAX (16ull << 40)
#define GUESTLOG_BYTES_MAX (1ull << 30)
/* All front-ends of a daemon together: half its address space, and half the mappings that the kernel gives a process by
 * default (vm.max_map_count is 65,530). */
#define GUESTMEM_ALL_BYTES_MAX (64ull << 40)
#define GUESTMEM_ALL_MAPS_MAX 32768u

/* One guarded shared mmap of a front-end's file. Control thread only. */
struct guestmem_map;
struct guestmem;

/* Bytes [offset, offset+size_bytes) of fd, which stays the caller's. */
struct map_request {
    int fd;
    uint64_t offset, size_bytes;
    struct vnd_engine *engine;  /* counts what all front-ends have mapped; NULL: not counted */
    const char *what;           /* names it in a failure's line */
    _Atomic bool *lost;         /* set when a page of it is found to be truncated away; may be NULL */
    const struct guestmem *old; /* a mapping of this table that holds the same bytes is shared; may be NULL */
};
/* *host gets the address of the first byte. 0 or -errno; -ENOSPC: all front-ends together have too much. */
int guestmem_map_new(const struct map_request *r, struct guestmem_map **out, uint8_t **host, struct failure *f);
void guestmem_map_put(struct guestmem_map *map); /* NULL is fine */

struct guestmem_region {
    uint64_t gpa, size, uaddr;
    uint8_t *host;
    struct guestmem_map *map;
};

struct guestmem {
    uint32_t n;
    struct guestmem_region region[]; /* by gpa, ascending, disjoint */
};

/* Maps the regions (mappings of like->old that fit are shared; old stays valid). No region may wrap, overlap another (in
 * either address space) or reach beyond its file. Of like, engine, lost and old are used. 0 or -errno; -E2BIG: more than
 * GUESTMEM_BYTES_MAX. */
int guestmem_new(const vnd_region *regions, uint32_t n, const struct map_request *like, struct guestmem **out,
                 struct failure *f);
void guestmem_free(struct guestmem *m); /* NULL is fine */
/* True if a page of it was lost to truncation. */
bool guestmem_hit(const struct guestmem *m);

/* Host address of gpa, and in *got how many of len bytes lie there in one piece; NULL: a hole. hint is the
 * caller's index of the last region hit. */
uint8_t *guestmem_find(const struct guestmem *m, uint32_t *hint, uint64_t gpa, uint64_t len, uint64_t *got);
/* The same. Inline, because it is asked some eight times a request and the region of the last time is nearly always right. */
static inline uint8_t *guestmem_host(const struct guestmem *m, uint32_t *hint, uint64_t gpa, uint64_t len,
                                     uint64_t *got)
{
    if (m != NULL && *hint < m->n) {
        const struct guestmem_region *r = &m->region[*hint];
        uint64_t off = gpa - r->gpa;

        if (off < r->size) {
            *got = r->size - off < len ? r->size - off : len;
            return r->host + off;
        }
    }
    return guestmem_find(m, hint, gpa, len, got);
}
/* Host address of [uaddr, uaddr+len), which must lie in one region; else NULL. */
uint8_t *guestmem_ring(const struct guestmem *m, uint64_t uaddr, uint64_t len);
/* Copies from the guest, across regions. 0 or -EFAULT. */
int guestmem_read(const struct guestmem *m, uint32_t *hint, uint64_t gpa, void *dst, uint64_t len);

/* Dirty log of live migration: bit per 4 KiB page of guest physical memory. */
struct guestlog;
/* r->what and r->old are not used. 0 or -errno. */
int guestlog_new(const struct map_request *r, struct guestlog **out, struct failure *f);
void guestlog_free(struct guestlog *l);

/* Bytes [gpa, gpa+len) of the guest have been written. log NULL: nothing is logged. */
void guestmem_mark(struct guestlog *log, uint64_t gpa, uint64_t len);
/* Writes len bytes to the guest. */
static inline void guestmem_write(struct guestlog *log, uint8_t *host, const void *src, uint64_t len, uint64_t gpa)
{
    memcpy(host, src, len);
    if (log != NULL)
        guestmem_mark(log, gpa, len);
}
/* Writes a ring's index, at once and in release order: what was written before is there when it is seen. host is even. */
static inline void guestmem_store16(struct guestlog *log, uint8_t *host, uint16_t value, uint64_t gpa)
{
    __atomic_store_n((uint16_t *)(void *)host, value, __ATOMIC_RELEASE);
    if (log != NULL)
        guestmem_mark(log, gpa, sizeof(value));
}

#endif
