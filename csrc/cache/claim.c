/* cache/claim.c -- see claim.h. */
#include "cache/claim.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/sigbus.h"

static int lock_set(int fd, short type, int64_t start, int64_t len)
{
    struct flock l = { .l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = len };
    int rc;

    do
        rc = fcntl(fd, F_OFD_SETLK, &l);
    while (rc < 0 && errno == EINTR);
    return rc < 0 ? (errno == EACCES ? -EAGAIN : -errno) : 0;
}

/* First byte of [start, start+len) that another process holds, or start + len. */
static int64_t lock_first(int fd, int64_t start, int64_t len)
{
    int64_t first = start + len;

    /* The kernel names one conflicting lock, not the lowest one: look again before it until nothing is left. */
    while (first > start) {
        struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = start, .l_len = first - start };
        if (fcntl(fd, F_OFD_GETLK, &l) < 0 || l.l_type == F_UNLCK)
            break;
        if (l.l_start >= first)
            break;
        first = l.l_start > start ? l.l_start : start;
    }
    return first;
}

int claim_units(int fd, uint32_t first, uint32_t n)
{
    int64_t start = CLAIM_UNITS + first;

    /* Another process may claim units between the question and the lock: ask again, a few times. */
    for (int i = 0; i < 8 && n; i++) {
        int rc = lock_set(fd, F_WRLCK, start, n);
        if (rc == 0)
            return (int)n;
        if (rc != -EAGAIN)
            return rc;
        int64_t held = lock_first(fd, start, n);
        if (held - start < (int64_t)n)
            n = (uint32_t)(held - start);
    }
    return 0;
}

void claim_release(int fd, uint32_t first, uint32_t n)
{
    lock_set(fd, F_UNLCK, CLAIM_UNITS + first, n);
}

bool claim_foreign(int fd, uint32_t unit)
{
    int64_t start = CLAIM_UNITS + unit;
    return lock_first(fd, start, 1) == start;
}

int claim_byte(int fd, int64_t at, bool exclusive, int wait_ms)
{
    /* Never F_OFD_SETLKW: a stuck holder must not take a thread with it. */
    for (;;) {
        int rc = lock_set(fd, exclusive ? F_WRLCK : F_RDLCK, at, 1);
        if (rc != -EAGAIN || wait_ms <= 0)
            return rc;
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
        wait_ms--;
    }
}

void claim_byte_release(int fd, int64_t at)
{
    lock_set(fd, F_UNLCK, at, 1);
}

int claim_meta(int side_dir_fd, const char *id)
{
    uint64_t at = 0xCBF29CE484222325u; /* FNV-1a; two ids with one hash wait for each other, no more */
    int fd, rc;

    if (side_dir_fd < 0)
        return -EROFS;
    while (*id)
        at = (at ^ (uint8_t)*id++) * 0x100000001B3u;
    fd = openat(side_dir_fd, "meta", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (fd < 0)
        return -errno;
    rc = claim_byte(fd, (int64_t)(at >> 2), true, 0);
    if (rc) {
        close(fd);
        return rc;
    }
    return fd;
}

int claim_reserve(int fd, int64_t len)
{
    struct stat st;

    if (!fallocate(fd, 0, 0, len))
        return 0;
    if (errno != EOPNOTSUPP || fstat(fd, &st))
        return -errno;
    return st.st_size >= len || !ftruncate(fd, len) ? 0 : -errno;
}

/* Maps the file; MAP_FAILED without. */
static void *wake_map(struct claim_wake *w, int dir_fd)
{
    int fd = dir_fd < 0 ? -1 : openat(dir_fd, "wake", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
    void *page = MAP_FAILED;
    struct stat st;

    if (fd >= 0) {
        if (!fstat(fd, &st) && S_ISREG(st.st_mode) && !claim_reserve(fd, 4096))
            page = mmap(NULL, sizeof *w->page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (page != MAP_FAILED) {
            w->dev = st.st_dev;
            w->ino = st.st_ino;
        }
        close(fd);
    }
    return page;
}

int claim_wake_open(struct claim_wake *w, int dir_fd)
{
    w->page = wake_map(w, dir_fd);
    w->shared = w->page != MAP_FAILED;
    if (!w->shared)
        w->page = mmap(NULL, sizeof *w->page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (w->page == MAP_FAILED)
        return -ENOMEM;
    w->guard = sigbus_add(w->page, 4096, 4096, false, NULL);
    return 0;
}

void claim_wake_follow(struct claim_wake *w, int dir_fd)
{
    size_t len = sizeof *w->page;
    struct stat st;
    void *page;

    if (dir_fd < 0 ||
        (w->shared && !fstatat(dir_fd, "wake", &st, AT_SYMLINK_NOFOLLOW) && st.st_dev == w->dev && st.st_ino == w->ino))
        return;
    page = wake_map(w, dir_fd);
    if (page == MAP_FAILED)
        return;
    /* Exchanged in one step. A process that waits on the old page wakes when its time is over. */
    if (mremap(page, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, w->page) == w->page)
        w->shared = true;
    else
        munmap(page, len);
}

void claim_wake_close(struct claim_wake *w)
{
    sigbus_remove(w->guard);
    w->guard = NULL;
    if (w->page && w->page != MAP_FAILED)
        munmap(w->page, sizeof *w->page);
    w->page = NULL;
}

static void futex(struct claim_wake *w, int op, uint32_t val, const struct timespec *ts)
{
    syscall(SYS_futex, &w->page->gen, op, val, ts, NULL, 0);
}

void claim_wake_all(struct claim_wake *w)
{
    atomic_fetch_add(&w->page->gen, 1); /* seq_cst: before the look at waiters */
    if (atomic_load(&w->page->waiters))
        futex(w, FUTEX_WAKE, INT_MAX, NULL);
}

uint32_t claim_wake_enter(struct claim_wake *w)
{
    atomic_fetch_add(&w->page->waiters, 1);
    return atomic_load(&w->page->gen);
}

void claim_wake_leave(struct claim_wake *w)
{
    uint32_t had = atomic_load(&w->page->waiters);

    /* Not below 0: the page may have been exchanged since we entered. */
    while (had && !atomic_compare_exchange_weak(&w->page->waiters, &had, had - 1))
        ;
}

void claim_wake_wait(struct claim_wake *w, uint32_t gen, int timeout_ms)
{
    struct timespec ts = { .tv_sec = timeout_ms / 1000, .tv_nsec = (long)(timeout_ms % 1000) * 1000000 };
    futex(w, FUTEX_WAIT, gen, &ts);
}
