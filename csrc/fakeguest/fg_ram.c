/* fg_ram.c -- guest memory and the pattern of test files. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fg_internal.h"

#define GUARD_BYTES (64u << 10)
#define GAP_FILL 0xc3

struct mapped {
    fg_region r;
    uint8_t *reserve, *host; /* reserve: guard, region, guard */
};
struct fg_ram {
    int fd, n;
    uint64_t file_bytes;
    struct mapped map[];
};

static int map_region(fg_ram *m, struct mapped *p)
{
    uint8_t *at =
        mmap(NULL, p->r.size_bytes + 2 * GUARD_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        return -errno;
    p->reserve = at;
    p->host = mmap(at + GUARD_BYTES, p->r.size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, m->fd,
                   (off_t)p->r.file_offset);
    return p->host == MAP_FAILED ? -errno : 0;
}

/* Calls fn for each range of the file that no region covers. */
static int each_gap(fg_ram *m, int (*fn)(fg_ram *m, uint64_t off, uint64_t len))
{
    uint64_t at = 0;
    while (at < m->file_bytes) {
        uint64_t next = m->file_bytes;
        bool inside = false;
        for (int i = 0; i < m->n; i++) {
            uint64_t from = m->map[i].r.file_offset, to = from + m->map[i].r.size_bytes;
            if (at >= from && at < to) {
                at = to;
                inside = true;
                break;
            }
            if (from > at && from < next)
                next = from;
        }
        if (inside)
            continue;
        int rc = fn(m, at, next - at);
        if (rc)
            return rc;
        at = next;
    }
    return 0;
}

static int fill_gap(fg_ram *m, uint64_t off, uint64_t len)
{
    uint8_t page[FG_PAGE];
    memset(page, GAP_FILL, sizeof page);
    for (uint64_t i = 0; i < len; i += FG_PAGE)
        if (pwrite(m->fd, page, FG_PAGE, (off_t)(off + i)) != FG_PAGE)
            return -errno;
    return 0;
}

static int check_gap(fg_ram *m, uint64_t off, uint64_t len)
{
    uint8_t page[FG_PAGE];
    for (uint64_t i = 0; i < len; i += FG_PAGE) {
        if (pread(m->fd, page, FG_PAGE, (off_t)(off + i)) != FG_PAGE)
            return -EIO;
        for (uint32_t j = 0; j < FG_PAGE; j++)
            if (page[j] != GAP_FILL)
                return -FG_OVERRUN;
    }
    return 0;
}

fg_ram *fg_ram_new(const fg_region *regions, int n, int seal)
{
    fg_ram *m = calloc(1, sizeof *m + (size_t)n * sizeof m->map[0]);
    if (!m)
        return NULL;
    m->n = n;
    m->fd = memfd_create("fakeguest", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int rc = m->fd < 0 ? -errno : 0;
    for (int i = 0; i < n; i++) {
        m->map[i].r = regions[i];
        uint64_t end = regions[i].file_offset + regions[i].size_bytes;
        m->file_bytes = end > m->file_bytes ? end : m->file_bytes;
    }
    if (!rc && ftruncate(m->fd, (off_t)m->file_bytes) < 0)
        rc = -errno;
    for (int i = 0; !rc && i < n; i++)
        rc = map_region(m, &m->map[i]);
    if (!rc)
        rc = each_gap(m, fill_gap);
    if (!rc && seal && fcntl(m->fd, F_ADD_SEALS, F_SEAL_SHRINK) < 0)
        rc = -errno;
    if (rc) {
        fg_ram_free(m);
        errno = -rc;
        return NULL;
    }
    return m;
}

void fg_ram_free(fg_ram *m)
{
    if (!m)
        return;
    for (int i = 0; i < m->n; i++)
        if (m->map[i].reserve)
            munmap(m->map[i].reserve, m->map[i].r.size_bytes + 2 * GUARD_BYTES);
    if (m->fd >= 0)
        close(m->fd);
    free(m);
}

int fg_ram_fd(fg_ram *m)
{
    return m->fd;
}

uint8_t *fg_ram_at(fg_ram *m, uint64_t gpa, uint64_t len)
{
    for (int i = 0; i < m->n; i++) {
        const fg_region *r = &m->map[i].r;
        if (gpa >= r->gpa && gpa - r->gpa < r->size_bytes && len <= r->size_bytes - (gpa - r->gpa))
            return m->map[i].host + (gpa - r->gpa);
    }
    return NULL;
}

int fg_ram_check_gaps(fg_ram *m)
{
    return each_gap(m, check_gap);
}

/* splitmix64's finaliser: neighbouring offsets share nothing, so no chunk repeats and nothing compresses. */
static uint64_t pattern_word(uint64_t offset, uint64_t seed)
{
    uint64_t z = offset + seed * 0x9e3779b97f4a7c15ull + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

void fg_pattern_fill(uint8_t *buf, uint64_t len, uint64_t offset, uint64_t seed)
{
    for (uint64_t i = 0; i < len; i += 8) {
        uint64_t w = pattern_word(offset + i, seed);
        memcpy(buf + i, &w, len - i < 8 ? len - i : 8);
    }
}

int fg_pattern_check(const uint8_t *buf, uint64_t len, uint64_t offset, uint64_t seed)
{
    for (uint64_t i = 0; i < len; i += 8) {
        uint64_t w = pattern_word(offset + i, seed);
        if (memcmp(buf + i, &w, len - i < 8 ? len - i : 8) != 0)
            return -FG_BAD_DATA;
    }
    return 0;
}
