/* Mapped files that lose pages: what is read then, and how many of the process's mappings that costs. */
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/sigbus.h"
#include "check.h"

#define PAGE 4096u
#define PAGES 2048u

struct lost_file {
    int fd;
    volatile uint8_t *map;
    struct sigbus_range *guard;
    _Atomic bool hit;
};

static void make_file(struct lost_file *l, bool whole)
{
    memset(l, 0, sizeof(*l));
    l->fd = memfd_create("lost", MFD_CLOEXEC);
    CHECK(ftruncate(l->fd, PAGES * PAGE) == 0);
    l->map = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, l->fd, 0);
    CHECK(l->map != MAP_FAILED);
    l->guard = sigbus_add((void *)(uintptr_t)l->map, PAGES * PAGE, PAGE, whole, &l->hit);
    CHECK(l->guard);
    for (uint32_t i = 0; i < PAGES; i++)
        l->map[i * PAGE] = (uint8_t)(i + 1) | 1;
    sigbus_unblock();
}

static void drop_file(struct lost_file *l)
{
    sigbus_remove(l->guard);
    munmap((void *)(uintptr_t)l->map, PAGES * PAGE);
    close(l->fd);
}

static uint32_t count_mappings(void)
{
    char line[512];
    uint32_t n = 0;
    FILE *f = fopen("/proc/self/maps", "r");

    while (fgets(line, sizeof(line), f))
        n++;
    fclose(f);
    return n;
}

/* A front-end chooses which pages are read: every second one would cost two mappings each. */
static void check_mappings(bool whole, uint32_t more)
{
    struct lost_file l;

    make_file(&l, whole);
    uint32_t before = count_mappings();
    CHECK(ftruncate(l.fd, 0) == 0);
    for (uint32_t i = 0; i < PAGES; i += 2)
        CHECK_EQ(l.map[i * PAGE], 0);
    CHECK(l.hit && sigbus_hit(l.guard));
    CHECK(count_mappings() <= before + more);
    drop_file(&l);
}

TEST(lost_guest_memory_costs_no_mapping)
{
    check_mappings(true, 2);
}

TEST(lost_cache_file_costs_few_mappings)
{
    check_mappings(false, 2 * SIGBUS_PAGES_MAX + 2);
}

TEST(pages_beside_a_lost_one_stay)
{
    struct lost_file l;

    make_file(&l, false);
    CHECK(ftruncate(l.fd, PAGES / 2 * PAGE) == 0);
    CHECK_EQ(l.map[(PAGES - 1) * PAGE], 0);
    for (uint32_t i = 0; i < PAGES / 2; i++)
        CHECK_EQ(l.map[i * PAGE], (uint8_t)(i + 1) | 1);
    drop_file(&l);
}
