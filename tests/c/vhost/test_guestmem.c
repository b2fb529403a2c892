/* A guest's memory: regions found, read and refused, pages lost, the log of dirty pages. */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>

#include "base/sigbus.h"
#include "ring_guest.h"

TEST(memory)
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

TEST(memory_refused)
{
    static const struct {
        const char *what;
        vnd_region r[2];
        uint32_t n;
    } bad[] = {
        { "beyond the file", { { .gpa = 0, .size_bytes = 0x41000, .user_addr = USER } }, 1 },
        { "offset beyond the file",
          { { .gpa = 0, .size_bytes = PAGE, .user_addr = USER, .mmap_offset = 1 << 20 } },
          1 },
        { "empty", { { .gpa = 0, .size_bytes = 0, .user_addr = USER } }, 1 },
        { "gpa wraps", { { .gpa = UINT64_MAX - 10, .size_bytes = PAGE, .user_addr = USER } }, 1 },
        { "user address wraps", { { .gpa = 0, .size_bytes = PAGE, .user_addr = UINT64_MAX - 10 } }, 1 },
        { "offset wraps", { { .size_bytes = PAGE, .user_addr = USER, .mmap_offset = UINT64_MAX - 10 } }, 1 },
        { "gpa overlap",
          { { .gpa = 0, .size_bytes = 2 * PAGE, .user_addr = USER },
            { .gpa = PAGE, .size_bytes = PAGE, .user_addr = 2 * USER } },
          2 },
        { "user overlap",
          { { .gpa = 0, .size_bytes = 2 * PAGE, .user_addr = USER },
            { .gpa = 4 * PAGE, .size_bytes = PAGE, .user_addr = USER + PAGE } },
          2 },
    };
    struct guest g;
    struct guestmem *m = NULL;
    struct failure failure = { 0 };
    int pipe_fds[2];
    vnd_region r = layout[0];

    guest_open(&g, true);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        if (map_layout(&g, bad[i].r, bad[i].n, &m) == 0) {
            fprintf(stderr, "accepted: %s\n", bad[i].what);
            check_fail();
        }
    CHECK(pipe(pipe_fds) == 0);
    r.fd = pipe_fds[0];
    CHECK(guestmem_new(&r, 1, &(struct map_request){ .lost = &g.lost }, &m, &failure) < 0);
    r.fd = 9999;
    CHECK(guestmem_new(&r, 1, &(struct map_request){ .lost = &g.lost }, &m, &failure) == -EBADF);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
    CHECK(map_layout(&g, layout, 0, &m) == 0); /* none at all is a table */
    guestmem_free(m);
    guest_close(&g);
}

/* A second table takes mappings over; an odd offset is mapped from the page below. */
TEST(memory_again)
{
    struct guest g;
    struct guestmem *m;
    struct failure failure = { 0 };
    uint64_t got;
    uint32_t hint = 0;
    vnd_region r = { .gpa = 0x100, .size_bytes = 0x100, .user_addr = USER, .mmap_offset = 0x30200 };

    guest_open(&g, true);
    memcpy(g.low + 0x200, "here", 4);
    r.fd = g.fd;
    CHECK(guestmem_new(&r, 1, &(struct map_request){ .lost = &g.lost, .old = g.mem }, &m, &failure) == 0);
    uint8_t *host = guestmem_host(m, &hint, 0x100, 4, &got);
    CHECK(host != NULL && memcmp(host, "here", 4) == 0);
    guestmem_free(m);
    vnd_region same[3];
    memcpy(same, layout, sizeof(same));
    for (int i = 0; i < 3; i++)
        same[i].fd = g.fd;
    CHECK(guestmem_new(same, 3, &(struct map_request){ .lost = &g.lost, .old = g.mem }, &m, &failure) == 0);
    CHECK(guestmem_ring(m, USER, 1) == guestmem_ring(g.mem, USER, 1));
    guestmem_free(g.mem);
    g.mem = m;
    CHECK(*guestmem_ring(m, USER + 0x200, 1) == 'h');
    guest_close(&g);
}

TEST(truncated)
{
    struct guest g;
    char buf[8] = "x";
    uint32_t hint = 0;

    guest_open(&g, true);
    sigbus_unblock();
    CHECK(!guestmem_hit(g.mem));
    CHECK(ftruncate(g.fd, 0x30000) == 0); /* the first region is gone */
    CHECK(guestmem_read(g.mem, &hint, 0x100, buf, sizeof(buf)) == 0 && buf[0] == 0);
    CHECK(guestmem_hit(g.mem) && g.lost == 1);
    CHECK(guestmem_read(g.mem, &hint, LOW, buf, sizeof(buf)) == 0); /* the others live */
    guest_close(&g);
}

static sigjmp_buf back;

static void older_handler(int sig)
{
    siglongjmp(back, 1);
}

/* A SIGBUS that is none of ours reaches the handler that was there before. */
TEST(other_sigbus)
{
    struct sigaction sa = { .sa_handler = older_handler };
    struct guest g;
    volatile bool reached = false;
    int fd = memfd_create("other", MFD_CLOEXEC);

    CHECK(sigaction(SIGBUS, &sa, NULL) == 0);
    guest_open(&g, true); /* guards its regions */
    const volatile uint8_t *other = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
    if (sigsetjmp(back, 1) == 0)
        CHECK(*other == 1); /* an empty file: no such byte */
    else
        reached = true;
    CHECK(reached && !guestmem_hit(g.mem));
    munmap((void *)(uintptr_t)other, PAGE);
    close(fd);
    guest_close(&g);
}

static int make_log(struct guest *g, int fd, uint64_t offset, uint64_t size_bytes, struct guestlog **out)
{
    struct map_request r = { .fd = fd, .offset = offset, .size_bytes = size_bytes, .lost = &g->lost };

    return guestlog_new(&r, out, NULL);
}

TEST(log)
{
    struct guest g;
    struct guestlog *log;
    uint8_t bits[8] = { 0 };
    int fd = memfd_create("log", MFD_CLOEXEC);
    uint32_t word = 1;

    guest_open(&g, true);
    CHECK(ftruncate(fd, 4096) == 0);
    CHECK(make_log(&g, fd, 0, 8192, &log) < 0);
    CHECK(make_log(&g, fd, 0, 0, &log) < 0);
    CHECK(make_log(&g, fd, 8, 2, &log) == 0);
    guestmem_mark(log, 0xfff, 2); /* pages 0 and 1 */
    guestmem_write(log, g.mem->region[0].host, &word, 4, 9 * PAGE);
    guestmem_mark(log, 16 * PAGE, 1); /* beyond the log: nothing */
    guestmem_mark(log, UINT64_MAX - 3, 100);
    guestmem_mark(log, 3 * PAGE, 0);
    CHECK(pread(fd, bits, 8, 6) == 8);
    CHECK(bits[0] == 0 && bits[1] == 0 && bits[2] == 3 && bits[3] == 2 && bits[4] == 0);
    guestlog_free(log);
    close(fd);
    guest_close(&g);
}
