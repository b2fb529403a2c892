/* test_vring.c -- guest memory, split rings and the in-flight region, without threads. A small guest writes rings by
 * hand. */
#include <errno.h>
#include <limits.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guestmem.h"
#include "inflight.h"
#include "sigbus.h"
#include "vring.h"

static int failures;

#define CHECK(cond) \
    do { \
        if (!(cond)) { \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, __func__, #cond); \
            failures++; \
        } \
    } while (0)

#define PAGE 4096ull
#define RING_NUM 8u
#define DESC 0x0ull         /* guest addresses of the parts */
#define AVAIL 0x1000ull
#define USED 0x2000ull
#define TABLE 0x3000ull
#define LOW 0x10000ull      /* first region: [0, LOW) */
#define HIGH 0x20000ull     /* second: [LOW, HIGH), adjacent, elsewhere in the file; third after a hole at HIGH2 */
#define HIGH2 0x40000ull
#define USER 0x7000000000ull

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };

struct guest {
    int fd;
    uint8_t *low, *high, *far;
    struct guestmem *mem;
    struct vring ring;
    _Atomic int lost;
    uint16_t avail_idx;
};

static const vnd_region layout[] = {
    { .gpa = 0, .size_bytes = LOW, .user_addr = USER, .mmap_offset = 0x30000 },
    { .gpa = LOW, .size_bytes = HIGH - LOW, .user_addr = USER + HIGH2, .mmap_offset = 0x10000 },
    { .gpa = HIGH2, .size_bytes = PAGE, .user_addr = USER + 8 * HIGH2, .mmap_offset = 0 },
};

static int map_layout(struct guest *g, const vnd_region *regions, uint32_t n, struct guestmem **out)
{
    vnd_region with_fd[3];
    char err[VND_ERR_MAX];
    int rc;

    memcpy(with_fd, regions, n * sizeof(*regions));
    for (uint32_t i = 0; i < n; i++)
        with_fd[i].fd = g->fd;
    rc = guestmem_new(with_fd, n, NULL, &g->lost, out, err, sizeof(err));
    if (rc != 0)
        CHECK(strlen(err) > 0);
    return rc;
}

static void guest_open(struct guest *g, bool event_idx)
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

static void guest_close(struct guest *g)
{
    guestmem_free(g->mem);
    munmap(g->low, LOW);
    munmap(g->high, HIGH - LOW);
    munmap(g->far, PAGE);
    close(g->fd);
}

static void put_desc(struct guest *g, uint32_t i, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
    struct desc d = { addr, len, flags, next };

    memcpy(g->low + DESC + 16 * i, &d, 16);
}

static void put_table(struct guest *g, uint32_t i, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
    struct desc d = { addr, len, flags, next };

    memcpy(g->low + TABLE + 16 * i, &d, 16);
}

static void put16(uint8_t *at, uint16_t v)
{
    memcpy(at, &v, 2);
}

static uint16_t get16(const uint8_t *at)
{
    uint16_t v;

    memcpy(&v, at, 2);
    return v;
}

static void offer(struct guest *g, uint16_t head)
{
    put16(g->low + AVAIL + 4 + 2 * (g->avail_idx % RING_NUM), head);
    put16(g->low + AVAIL + 2, ++g->avail_idx);
}

static int walk(struct guest *g, uint16_t head, struct vring_chain *c)
{
    uint32_t hint = 0;
    const char *why = NULL;
    int rc = vring_walk(&g->ring, g->mem, &hint, head, c, &why);

    CHECK((rc == 0) == (why == NULL));
    return rc;
}

static struct vring_chain chain;

static void test_memory(void)
{
    struct guest g;
    uint64_t got;
    uint32_t hint = 0;
    char buf[64];

    guest_open(&g, true);
    CHECK(guestmem_host(g.mem, &hint, LOW - 16, 64, &got) != NULL && got == 16);
    CHECK(guestmem_host(g.mem, &hint, LOW, 64, &got) != NULL && got == 64 && hint == 1);
    CHECK(guestmem_host(g.mem, &hint, HIGH, 1, &got) == NULL);
    CHECK(guestmem_host(g.mem, &hint, HIGH2 + PAGE - 1, 9, &got) != NULL && got == 1);
    CHECK(guestmem_host(g.mem, &hint, UINT64_MAX, 1, &got) == NULL);
    /* Across two regions that are not neighbours in the file. */
    memset(g.low + LOW - 3, 'a', 3);
    memset(g.high, 'b', 3);
    CHECK(guestmem_read(g.mem, &hint, LOW - 3, buf, 6) == 0 && memcmp(buf, "aaabbb", 6) == 0);
    CHECK(guestmem_read(g.mem, &hint, HIGH - 3, buf, 6) == -EFAULT);
    CHECK(guestmem_read(g.mem, &hint, UINT64_MAX - 2, buf, 6) == -EFAULT);
    /* A ring may not cross regions, even adjacent ones. */
    CHECK(guestmem_ring(g.mem, USER + LOW - 16, 16) != NULL);
    CHECK(guestmem_ring(g.mem, USER + LOW - 16, 17) == NULL);
    CHECK(guestmem_ring(g.mem, USER + LOW, 1) == NULL);
    CHECK(guestmem_ring(g.mem, USER - 1, 1) == NULL);
    guest_close(&g);
}

static void test_memory_refused(void)
{
    static const struct { const char *what; vnd_region r[2]; uint32_t n; } bad[] = {
        { "beyond the file", { { .gpa = 0, .size_bytes = 0x41000, .user_addr = USER } }, 1 },
        { "offset beyond the file", { { .gpa = 0, .size_bytes = PAGE, .user_addr = USER, .mmap_offset = 1 << 20 } },
          1 },
        { "empty", { { .gpa = 0, .size_bytes = 0, .user_addr = USER } }, 1 },
        { "gpa wraps", { { .gpa = UINT64_MAX - 10, .size_bytes = PAGE, .user_addr = USER } }, 1 },
        { "user address wraps", { { .gpa = 0, .size_bytes = PAGE, .user_addr = UINT64_MAX - 10 } }, 1 },
        { "offset wraps", { { .size_bytes = PAGE, .user_addr = USER, .mmap_offset = UINT64_MAX - 10 } }, 1 },
        { "gpa overlap", { { .gpa = 0, .size_bytes = 2 * PAGE, .user_addr = USER },
                           { .gpa = PAGE, .size_bytes = PAGE, .user_addr = 2 * USER } }, 2 },
        { "user overlap", { { .gpa = 0, .size_bytes = 2 * PAGE, .user_addr = USER },
                            { .gpa = 4 * PAGE, .size_bytes = PAGE, .user_addr = USER + PAGE } }, 2 },
    };
    struct guest g;
    struct guestmem *m = NULL;
    char err[VND_ERR_MAX];
    int pipe_fds[2];
    vnd_region r = layout[0];

    guest_open(&g, true);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        if (map_layout(&g, bad[i].r, bad[i].n, &m) == 0) {
            fprintf(stderr, "accepted: %s\n", bad[i].what);
            failures++;
        }
    CHECK(pipe(pipe_fds) == 0);
    r.fd = pipe_fds[0];
    CHECK(guestmem_new(&r, 1, NULL, &g.lost, &m, err, sizeof(err)) < 0);
    r.fd = 9999;
    CHECK(guestmem_new(&r, 1, NULL, &g.lost, &m, err, sizeof(err)) == -EBADF);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
    CHECK(map_layout(&g, layout, 0, &m) == 0);    /* none at all is a table */
    guestmem_free(m);
    guest_close(&g);
}

/* A second table takes mappings over; an odd offset is mapped from the page below. */
static void test_memory_again(void)
{
    struct guest g;
    struct guestmem *m;
    char err[VND_ERR_MAX];
    uint64_t got;
    uint32_t hint = 0;
    vnd_region r = { .gpa = 0x100, .size_bytes = 0x100, .user_addr = USER, .mmap_offset = 0x30200 };

    guest_open(&g, true);
    memcpy(g.low + 0x200, "here", 4);
    r.fd = g.fd;
    CHECK(guestmem_new(&r, 1, g.mem, &g.lost, &m, err, sizeof(err)) == 0);
    uint8_t *host = guestmem_host(m, &hint, 0x100, 4, &got);
    CHECK(host != NULL && memcmp(host, "here", 4) == 0);
    guestmem_free(m);
    vnd_region same[3];
    memcpy(same, layout, sizeof(same));
    for (int i = 0; i < 3; i++)
        same[i].fd = g.fd;
    CHECK(guestmem_new(same, 3, g.mem, &g.lost, &m, err, sizeof(err)) == 0);
    CHECK(guestmem_ring(m, USER, 1) == guestmem_ring(g.mem, USER, 1));
    guestmem_free(g.mem);
    g.mem = m;
    CHECK(*guestmem_ring(m, USER + 0x200, 1) == 'h');
    guest_close(&g);
}

static void test_truncated(void)
{
    struct guest g;
    char buf[8] = "x";
    uint32_t hint = 0;

    guest_open(&g, true);
    sigbus_unblock();
    CHECK(!guestmem_hit(g.mem));
    CHECK(ftruncate(g.fd, 0x30000) == 0);       /* the first region is gone */
    CHECK(guestmem_read(g.mem, &hint, 0x100, buf, sizeof(buf)) == 0 && buf[0] == 0);
    CHECK(guestmem_hit(g.mem) && g.lost == 1);
    CHECK(guestmem_read(g.mem, &hint, LOW, buf, sizeof(buf)) == 0);     /* the others live */
    guest_close(&g);
}

static sigjmp_buf back;

static void older_handler(int sig)
{
    siglongjmp(back, 1);
}

/* A SIGBUS that is none of ours reaches whoever was there before. First of all tests: handlers are installed once. */
static void test_other_sigbus(void)
{
    struct sigaction sa = { .sa_handler = older_handler };
    struct guest g;
    volatile bool reached = false;
    int fd = memfd_create("other", MFD_CLOEXEC);

    CHECK(sigaction(SIGBUS, &sa, NULL) == 0);
    guest_open(&g, true);                       /* guards its regions */
    const volatile uint8_t *other = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
    if (sigsetjmp(back, 1) == 0)
        CHECK(*other == 1);                     /* an empty file: no such byte */
    else
        reached = true;
    CHECK(reached && !guestmem_hit(g.mem));
    munmap((void *)(uintptr_t)other, PAGE);
    close(fd);
    guest_close(&g);
}

static void test_log(void)
{
    struct guest g;
    struct guestlog *log;
    char err[VND_ERR_MAX];
    uint8_t bits[8] = { 0 };
    int fd = memfd_create("log", MFD_CLOEXEC);
    uint32_t word = 1;

    guest_open(&g, true);
    CHECK(ftruncate(fd, 4096) == 0);
    CHECK(guestlog_new(fd, 0, 8192, &g.lost, &log, err, sizeof(err)) < 0);
    CHECK(guestlog_new(fd, 0, 0, &g.lost, &log, err, sizeof(err)) < 0);
    CHECK(guestlog_new(fd, 8, 2, &g.lost, &log, err, sizeof(err)) == 0);
    guestmem_mark(log, 0xfff, 2);               /* pages 0 and 1 */
    guestmem_write(log, g.mem->region[0].host, &word, 4, 9 * PAGE);
    guestmem_mark(log, 16 * PAGE, 1);           /* beyond the log: nothing */
    guestmem_mark(log, UINT64_MAX - 3, 100);
    guestmem_mark(log, 3 * PAGE, 0);
    CHECK(pread(fd, bits, 8, 6) == 8);
    CHECK(bits[0] == 0 && bits[1] == 0 && bits[2] == 3 && bits[3] == 2 && bits[4] == 0);
    guestlog_free(log);
    close(fd);
    guest_close(&g);
}

static void test_resolve(void)
{
    struct guest g;
    struct vring r;

    guest_open(&g, true);
    CHECK(vring_resolve(&r, g.mem, 0, USER, USER + AVAIL, USER + USED) == -EINVAL);
    CHECK(vring_resolve(&r, g.mem, 6, USER, USER + AVAIL, USER + USED) == -EINVAL);
    CHECK(vring_resolve(&r, g.mem, 2048, USER, USER + AVAIL, USER + USED) == -EINVAL);
    CHECK(vring_resolve(&r, g.mem, 8, USER + 8, USER + AVAIL, USER + USED) == -EINVAL);
    CHECK(vring_resolve(&r, g.mem, 8, USER, USER + AVAIL + 1, USER + USED) == -EINVAL);
    CHECK(vring_resolve(&r, g.mem, 8, USER, USER + AVAIL, USER + USED + 2) == -EINVAL);
    CHECK(vring_resolve(&r, g.mem, 8, USER + LOW - 64, USER + AVAIL, USER + USED) == -EFAULT);
    CHECK(vring_resolve(&r, g.mem, 8, USER, USER + LOW - 16, USER + USED) == -EFAULT);
    CHECK(vring_resolve(&r, g.mem, 8, USER, USER + AVAIL, USER + LOW - 64) == -EFAULT);
    CHECK(vring_resolve(&r, g.mem, 8, 0, 0, 0) == -EFAULT);
    CHECK(r.used == NULL);
    guest_close(&g);
}

static void test_chain(void)
{
    struct guest g;

    guest_open(&g, true);
    put_desc(&g, 0, 0x5000, 40, 1, 3);
    put_desc(&g, 3, 0x5028, 10, 1, 4);                  /* adjoins: one segment */
    put_desc(&g, 4, 0x5900, 0, 1, 5);                   /* empty: skipped */
    put_desc(&g, 5, 0x6000, 16, 3, 6);
    put_desc(&g, 6, 0x7000, 4096, 3, 7);
    put_desc(&g, 7, 0x8000, 4096, 2, 0xffff);           /* adjoins; next means nothing here */
    CHECK(walk(&g, 0, &chain) == 0);
    CHECK(chain.n_in == 1 && chain.in_bytes == 50 && chain.n_out == 2 && chain.out_bytes == 16 + 8192);
    CHECK(chain.seg[0].gpa == 0x5000 && chain.seg[1].gpa == 0x6000 && chain.seg[2].len == 8192);
    /* Readable and writable neighbours stay apart. */
    put_desc(&g, 1, 0x5000, 16, 1, 2);
    put_desc(&g, 2, 0x5010, 16, 2, 0);
    CHECK(walk(&g, 1, &chain) == 0 && chain.n_in == 1 && chain.n_out == 1);
    guest_close(&g);
}

static void test_indirect(void)
{
    struct guest g;

    guest_open(&g, true);
    put_table(&g, 0, 0x5000, 40, 1, 2);
    put_table(&g, 2, 0x6000, 16, 3, 1);
    put_table(&g, 1, 0x7000, 8, 2, 0);
    put_desc(&g, 0, TABLE, 48, 4, 0);
    CHECK(walk(&g, 0, &chain) == 0 && chain.in_bytes == 40 && chain.out_bytes == 24 && chain.n_out == 2);
    put_desc(&g, 0, TABLE, 0, 4, 0);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, TABLE, 47, 4, 0);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, TABLE, 16 * 2048, 4, 0);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, TABLE, 32, 4, 0);                   /* entry 2 lies beyond the table */
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, TABLE, 48, 4 | 1, 1);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, 0x5000, 8, 1, 1);
    put_desc(&g, 1, TABLE, 48, 4, 0);                   /* not first */
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, TABLE, 48, 4, 0);
    put_table(&g, 1, TABLE, 48, 4, 0);                  /* a table in a table */
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_table(&g, 1, 0x7000, 8, 3, 0);                  /* a loop */
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, HIGH, 48, 4, 0);                    /* a hole: this request only */
    CHECK(walk(&g, 0, &chain) == -EFAULT);
    /* A table that lies across two regions. */
    put_table(&g, 1, 0x7000, 8, 2, 0);
    memcpy(g.low + LOW - 24, g.low + TABLE, 24);
    memcpy(g.high, g.low + TABLE + 24, 24);
    put_desc(&g, 0, LOW - 24, 48, 4, 0);
    CHECK(walk(&g, 0, &chain) == 0 && chain.in_bytes == 40 && chain.out_bytes == 24);
    guest_close(&g);
}

static void test_hostile_chain(void)
{
    struct guest g;
    uint16_t head;

    guest_open(&g, true);
    put_desc(&g, 0, 0x5000, 8, 1, RING_NUM);            /* next beyond the ring */
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, 0x5000, 8, 1, 0);                   /* a loop of one */
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, 0x5000, 0, 1, 1);                   /* of two, empty ones */
    put_desc(&g, 1, 0x5000, 0, 1, 0);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, 0x5000, 8, 3, 1);                   /* readable after writable */
    put_desc(&g, 1, 0x5000, 8, 0, 0);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, UINT64_MAX - 4, 8, 0, 0);           /* wraps */
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, 0, UINT32_MAX, 1, 1);               /* sums to more than 32 bits */
    put_desc(&g, 1, 0, UINT32_MAX, 0, 0);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    /* The longest possible chain is fine. */
    for (uint16_t i = 0; i < RING_NUM; i++)
        put_desc(&g, i, 0x5000 + 0x20u * i, 8, i + 1u < RING_NUM, (uint16_t)(i + 1));
    CHECK(walk(&g, 0, &chain) == 0 && chain.n_in == RING_NUM);
    /* Heads and indices. */
    offer(&g, RING_NUM);
    CHECK(vring_pending(&g.ring) == 1 && vring_next(&g.ring, &head) == -EBADMSG);
    put16(g.low + AVAIL + 2, RING_NUM + 1);
    CHECK(vring_pending(&g.ring) == -EBADMSG);
    put16(g.low + AVAIL + 2, 0xffff);                   /* going back */
    CHECK(vring_pending(&g.ring) == -EBADMSG);
    put16(g.low + AVAIL + 2, RING_NUM);
    CHECK(vring_pending(&g.ring) == RING_NUM);
    guest_close(&g);
}

/* Indices pass 65,535 in both rings, with every signalling decision as the guest's used_event asks. */
static void test_wrap(void)
{
    struct guest g;
    uint16_t start = 65530, head;

    guest_open(&g, true);
    g.avail_idx = g.ring.last_avail = g.ring.used_idx = g.ring.signalled_used = start;
    put16(g.low + USED + 2, start);
    put16(g.low + AVAIL + 2, start);
    CHECK(vring_used_now(&g.ring) == start);
    for (uint32_t i = 0; i < 16; i++) {
        bool wanted = i % 3 == 0;

        offer(&g, (uint16_t)(i % RING_NUM));
        CHECK(vring_pending(&g.ring) == 1);
        CHECK(vring_next(&g.ring, &head) == 0 && head == i % RING_NUM);
        vring_stage(&g.ring, head, 100 + i);
        /* used_event names the entry after which to signal. */
        put16(g.low + AVAIL + 4 + 2 * RING_NUM, (uint16_t)(start + i + (wanted ? 0 : 5)));
        CHECK(vring_publish(&g.ring) == wanted);
        CHECK(get16(g.low + USED + 2) == (uint16_t)(start + i + 1));
        struct vring_used_elem e;
        memcpy(&e, g.low + USED + 4 + 8 * ((start + i) % RING_NUM), 8);
        CHECK(e.id == i % RING_NUM && e.len == 100 + i);
        CHECK(!vring_arm(&g.ring));
        CHECK(get16(g.low + USED + 4 + 8 * RING_NUM) == (uint16_t)(start + i + 1));
    }
    offer(&g, 1);
    CHECK(vring_arm(&g.ring));
    guest_close(&g);
}

/* need_event over a whole batch, and the first batch of a ring. */
static void test_batch_event(void)
{
    struct guest g;

    guest_open(&g, true);
    put16(g.low + AVAIL + 4 + 2 * RING_NUM, 2);
    for (uint16_t i = 0; i < 4; i++)
        vring_stage(&g.ring, i, 0);
    CHECK(vring_publish(&g.ring));              /* entries 0..3 pass 2 */
    vring_stage(&g.ring, 4, 0);
    CHECK(!vring_publish(&g.ring));
    g.ring.force_signal = true;
    vring_stage(&g.ring, 5, 0);
    CHECK(vring_publish(&g.ring));
    vring_stage(&g.ring, 6, 0);
    CHECK(!vring_publish(&g.ring));
    CHECK(!vring_publish(&g.ring));             /* nothing staged */
    guest_close(&g);
}

static void test_flags(void)
{
    struct guest g;

    guest_open(&g, false);
    vring_stage(&g.ring, 0, 0);
    CHECK(vring_publish(&g.ring));
    put16(g.low + AVAIL, 1);                    /* no interrupts, please */
    vring_stage(&g.ring, 1, 0);
    CHECK(!vring_publish(&g.ring));
    vring_disarm(&g.ring);
    CHECK(get16(g.low + USED) == 1);
    CHECK(!vring_arm(&g.ring) && get16(g.low + USED) == 0);
    guest_close(&g);
}

static void test_inflight(void)
{
    uint64_t size;
    int fd = vnd_inflight_create(2, 8, &size);
    uint16_t heads[8];
    struct inflight f = { .num = 8 };
    struct vring_used_elem batch[2] = { { .id = 3 }, { .id = 5 } };

    CHECK(fd >= 0 && size == 2 * inflight_stride(8) && inflight_stride(8) == 192 && inflight_stride(3) == 64);
    CHECK(ftruncate(fd, 0) < 0);                /* sealed */
    f.region = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    inflight_reset(&f, 8, 7);
    CHECK(f.region->version == 1 && f.region->desc_num == 8);
    CHECK(inflight_recover(&f, 8, 7, heads) == 0 && f.region->used_idx == 7);
    inflight_begin(&f, 6);
    inflight_begin(&f, 3);
    inflight_begin(&f, 5);
    inflight_begin(&f, 1);
    CHECK(inflight_busy(&f, 3) && !inflight_busy(&f, 0));
    /* Died before used.idx moved: all four, in the order of fetching. */
    inflight_stage(&f, batch, 2);
    struct inflight again = { .region = f.region, .num = 8 };
    CHECK(inflight_recover(&again, 8, 7, heads) == 4);
    CHECK(heads[0] == 6 && heads[1] == 3 && heads[2] == 5 && heads[3] == 1 && again.counter == 4);
    /* Died after it and before they were struck off: the batch is done. */
    CHECK(inflight_recover(&again, 8, 9, heads) == 2 && heads[0] == 6 && heads[1] == 1);
    CHECK(f.region->used_idx == 9);
    inflight_drop(&f, 6);
    batch[0].id = 1;
    inflight_stage(&f, batch, 1);
    inflight_finish(&f, batch, 1, 10);
    CHECK(inflight_recover(&again, 8, 10, heads) == 0);
    /* What a hostile front-end might leave there. */
    f.region->last_batch_head = 60000;
    CHECK(inflight_recover(&again, 8, 13, heads) == 0);
    f.region->desc[0].next = 60000;
    f.region->last_batch_head = 0;
    CHECK(inflight_recover(&again, 8, 18, heads) == 0);
    f.region->desc_num = 4;
    CHECK(inflight_recover(&again, 8, 18, heads) == -EINVAL);
    f.region->version = 2;
    CHECK(inflight_recover(&again, 8, 18, heads) == -EINVAL);
    munmap(f.region, size);
    close(fd);
    CHECK(vnd_inflight_create(0, 8, &size) == -EINVAL && vnd_inflight_create(2, 1 << 20, &size) == -EINVAL);
}

/* ---- a process killed at any instruction of fetching and completing */

static const uint16_t offered[] = { 2, 0, 1, 3, 5 };

static void fetch_one(struct guest *g, struct inflight *f)
{
    uint16_t head;

    CHECK(vring_next(&g->ring, &head) == 0);
    inflight_begin(f, head);
}

static void complete(struct guest *g, struct inflight *f, uint16_t first, uint32_t n)
{
    struct vring_used_elem *batch = g->ring.staged;

    for (uint32_t i = 0; i < n; i++)
        vring_stage(&g->ring, offered[first + i], 0);
    inflight_stage(f, batch, n);
    vring_publish(&g->ring);
    inflight_finish(f, batch, n, g->ring.used_idx);
}

/* What the killed process does, from a fresh ring. */
static void live(struct guest *g, struct inflight *f)
{
    fetch_one(g, f);
    fetch_one(g, f);
    fetch_one(g, f);
    complete(g, f, 0, 2);
    fetch_one(g, f);
    complete(g, f, 2, 2);
    fetch_one(g, f);
}

/* Steps a child that lives through it; kills it after `steps`. Steps taken until its end or death, -1: cannot. */
static long run_and_kill(struct guest *g, struct inflight *f, long steps)
{
    int status = 0;
    long n = 0;
    pid_t child = fork();

    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0)
            _exit(2);
        raise(SIGSTOP);
        live(g, f);
        raise(SIGSTOP);
        _exit(0);
    }
    if (child < 0 || waitpid(child, &status, 0) != child || !WIFSTOPPED(status))
        return -1;
    while (n < steps) {
        if (ptrace(PTRACE_SINGLESTEP, child, NULL, NULL) != 0 || waitpid(child, &status, 0) != child)
            return -1;
        if (WSTOPSIG(status) == SIGSTOP)
            break;                  /* through with it */
        n++;
    }
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    return n;
}

/* Every head that was fetched is used or comes again, none twice, and fetching goes on behind them. */
static void check_after_death(struct guest *g, struct inflight *f)
{
    uint16_t used = get16(g->low + USED + 2), heads[RING_NUM];
    struct inflight next = { .region = f->region, .num = RING_NUM };
    uint32_t seen = 0, wanted = 0;
    int n = inflight_recover(&next, RING_NUM, used, heads);

    CHECK(n >= 0 && used + n <= 5);
    for (uint16_t i = 0; i < used; i++)
        seen += 1u << 4 * *(g->low + USED + 4 + 8 * i);
    for (int i = 0; i < n; i++)
        seen += 1u << 4 * heads[i];
    for (int i = 0; i < used + n; i++)
        wanted += 1u << 4 * offered[i];
    CHECK(seen == wanted);
}

static void test_killed_anywhere(void)
{
    struct guest g;
    struct inflight f = { .num = RING_NUM };
    long total = LONG_MAX, budget = 60000;     /* steps in all: sanitizers make many more of them */

    guest_open(&g, true);
    f.region = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (uint32_t i = 0; i < 5; i++)
        put16(g.low + AVAIL + 4 + 2 * i, offered[i]);
    put16(g.low + AVAIL + 2, 5);
    for (long at = 0, stride = 1; at <= total; at += stride) {
        memset(g.low + USED, 0, 4 + 8 * RING_NUM);
        inflight_reset(&f, RING_NUM, 0);
        long n = run_and_kill(&g, &f, at ? at : LONG_MAX);
        if (n < 0) {
            fprintf(stderr, "test_killed_anywhere: no ptrace here, left out\n");
            break;
        }
        if (at == 0) {
            total = n;
            stride = 1 + total * total / 2 / budget;
        }
        check_after_death(&g, &f);
    }
    munmap(f.region, 4096);
    guest_close(&g);
}

int main(void)
{
    test_other_sigbus();
    test_memory();
    test_memory_refused();
    test_memory_again();
    test_truncated();
    test_log();
    test_resolve();
    test_chain();
    test_indirect();
    test_hostile_chain();
    test_wrap();
    test_batch_event();
    test_flags();
    test_inflight();
    test_killed_anywhere();
    return failures != 0;
}
