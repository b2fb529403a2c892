/* ring_guest.h -- a small guest for tests without threads: three regions of one file, one ring, written by hand. */
#ifndef RING_GUEST_H
#define RING_GUEST_H
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "vhost/guestmem.h"
#include "vhost/vring.h"

#define PAGE 4096ull
#define RING_NUM 8u
#define DESC 0x0ull /* guest addresses of the parts */
#define AVAIL 0x1000ull
#define USED 0x2000ull
#define TABLE 0x3000ull
#define LOW 0x10000ull  /* first region: [0, LOW) */
#define HIGH 0x20000ull /* second: [LOW, HIGH), adjacent, elsewhere in the file; third after a hole at HIGH2 */
#define HIGH2 0x40000ull
#define USER 0x7000000000ull

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

struct guest {
    int fd;
    uint8_t *low, *high, *far;
    struct guestmem *mem;
    struct vring ring;
    _Atomic bool lost;
    uint16_t avail_idx;
};

static const vnd_region layout[] = {
    { .gpa = 0, .size_bytes = LOW, .user_addr = USER, .mmap_offset = 0x30000 },
    { .gpa = LOW, .size_bytes = HIGH - LOW, .user_addr = USER + HIGH2, .mmap_offset = 0x10000 },
    { .gpa = HIGH2, .size_bytes = PAGE, .user_addr = USER + 8 * HIGH2, .mmap_offset = 0 },
};

static inline int map_layout(struct guest *g, const vnd_region *regions, uint32_t n, struct guestmem **out)
{
    vnd_region with_fd[3];
    struct failure failure = { 0 };
    int rc;

    memcpy(with_fd, regions, n * sizeof(*regions));
    for (uint32_t i = 0; i < n; i++)
        with_fd[i].fd = g->fd;
    rc = guestmem_new(with_fd, n, &(struct map_request){ .lost = &g->lost }, out, &failure);
    if (rc != 0)
        CHECK(failure.line[0] && failure.cause);
    return rc;
}

static inline void guest_open(struct guest *g, bool event_idx)
{
    memset(g, 0, sizeof(*g));
    g->fd = memfd_create("guest", MFD_CLOEXEC);
    CHECK(ftruncate(g->fd, 0x40000) == 0);
    g->low = mmap(NULL, LOW, PROT_READ | PROT_WRITE, MAP_SHARED, g->fd, 0x30000);
    g->high = mmap(NULL, HIGH - LOW, PROT_READ | PROT_WRITE, MAP_SHARED, g->fd, 0x10000);
    g->far = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, g->fd, 0);
    CHECK(map_layout(g, layout, 3, &g->mem) == 0);
    CHECK(vring_resolve(&g->ring, g->mem, RING_NUM, USER + DESC, USER + AVAIL, USER + USED) == 0);
    g->ring.event_idx = event_idx;
}

static inline void guest_close(struct guest *g)
{
    guestmem_free(g->mem);
    munmap(g->low, LOW);
    munmap(g->high, HIGH - LOW);
    munmap(g->far, PAGE);
    close(g->fd);
}

static inline void put_desc(struct guest *g, uint32_t i, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
    struct desc d = { addr, len, flags, next };

    memcpy(g->low + DESC + 16 * i, &d, 16);
}

static inline void put_table(struct guest *g, uint32_t i, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
    struct desc d = { addr, len, flags, next };

    memcpy(g->low + TABLE + 16 * i, &d, 16);
}

static inline void put16(uint8_t *at, uint16_t v)
{
    memcpy(at, &v, 2);
}

static inline uint16_t get16(const uint8_t *at)
{
    uint16_t v;

    memcpy(&v, at, 2);
    return v;
}

static inline void offer(struct guest *g, uint16_t head)
{
    put16(g->low + AVAIL + 4 + 2 * (g->avail_idx % RING_NUM), head);
    put16(g->low + AVAIL + 2, ++g->avail_idx);
}

#endif
