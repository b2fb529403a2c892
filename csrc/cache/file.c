/* cache/file.c -- opens and closes the three files of a blob; see cache/cache.h. */
#include "cache/cache.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "cache/claim.h"
#include "base/base.h"
#include "base/sigbus.h"

#define SIDE_MAGIC "VNDSIDE\1"
#define SIDE_VERSION 1
#define SIDE_HEADER 4096u
#define WRITE_LAG_NS 20000000u /* died_writing: a write takes at most so long */
#define WRITE_NS 1000000000u
/* docs/rafs-format.md 6.2 */
#define MAP_MAGIC 0x424D4150u
#define MAP_MAGIC2 0x434D4150u

static size_t up(size_t x, size_t a)
{
    return (x + a - 1) / a * a;
}

static size_t bits_bytes(uint32_t n)
{
    return up((n + 7) / 8, 8);
}

size_t cachefile_bound_offset(uint32_t n)
{
    return up(SIDE_HEADER + 2 * bits_bytes(n), 4096);
}

void cachefile_names(struct cachefile_names *out, const char *id, bool stored)
{
    snprintf(out->data, sizeof out->data, "%s.blob.%s", id, stored ? "raw" : "data");
    snprintf(out->map, sizeof out->map, "%s.blob.data.chunk_map", id);
    snprintf(out->side, sizeof out->side, stored ? "%s.raw.vnd" : "%s.vnd", id);
}

static int io_fail(const struct cachefile *c, const char *what, int rc, struct failure *f)
{
    bool space = rc == -ENOSPC || rc == -EROFS || rc == -EDQUOT;

    return failure_set(f, rc, space ? VND_CAUSE_SPACE : VND_CAUSE_IO, "cache of blob %s: %s: %s", c->id, what,
                       strerror(-rc));
}

static void boot_id_get(char out[40])
{
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, out, 36);

    if (fd >= 0)
        close(fd);
    memset(out + (n == 36 ? 36 : 0), 0, n == 36 ? 4 : 40);
}

/* The file that the trusted bits are bound to. Its change time tells whether another program wrote while no process
 * of ours had it open. */
struct identity {
    uint64_t dev, ino, btime_ns, ctime_ns;
};

static int identity_get(int fd, struct identity *id)
{
    struct statx sx;

    if (statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, &sx))
        return -errno;
    id->dev = makedev(sx.stx_dev_major, sx.stx_dev_minor);
    id->ino = sx.stx_ino;
    id->btime_ns = sx.stx_mask & STATX_BTIME ? (uint64_t)sx.stx_btime.tv_sec * 1000000000u + sx.stx_btime.tv_nsec : 0;
    id->ctime_ns = (uint64_t)sx.stx_ctime.tv_sec * 1000000000u + sx.stx_ctime.tv_nsec;
    return 0;
}

/* ---------------------------------------------------------------- data file */

static int data_open(struct cachefile *c, struct failure *f)
{
    struct cachefile_names names;
    const char *name = names.data;
    struct stat st;

    cachefile_names(&names, c->id, c->stored);
    if (c->writable) {
        c->data_fd = openat(c->dir_fd, name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
        c->lack_errno = c->data_fd < 0 ? errno : 0;
    }
    if (c->data_fd < 0 && (!c->writable || errno == EROFS || errno == EACCES || errno == EPERM)) {
        c->writable = false;
        c->data_fd = openat(c->dir_fd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
        if (c->data_fd < 0 && errno == ENOENT)
            return 0;
    }
    if (c->data_fd < 0 && (errno == ENOSPC || errno == EDQUOT)) {
        c->writable = false;
        return 0;
    }
    if (c->data_fd < 0)
        return io_fail(c, "cannot open its data file", -errno, f);
    if (fstat(c->data_fd, &st))
        return io_fail(c, "cannot stat its data file", -errno, f);
    if (!S_ISREG(st.st_mode))
        return failure_set(f, -EIO, VND_CAUSE_IO, "cache of blob %s: %s is no file; remove it", c->id, name);
    if ((uint64_t)st.st_size > c->size_bytes)
        return failure_set(f, -EEXIST, VND_CAUSE_IO,
                           "cache of blob %s: %s is larger than this image says: it is another's", c->id, name);
    c->data_at = (struct cachefile_at){ st.st_dev, st.st_ino };
    return 0;
}

/* Gives the data file its size. Returns true if it was shorter, so that bytes may be gone. CLAIM_INIT is held where
 * there is a side file: otherwise a file that another process has just created would look like one that was cut. */
static bool data_size(struct cachefile *c)
{
    struct stat st;

    if (c->data_fd < 0 || fstat(c->data_fd, &st) || (uint64_t)st.st_size >= c->size_bytes)
        return false;
    if (c->writable && ftruncate(c->data_fd, (off_t)c->size_bytes)) {
        c->lack_errno = errno;
        c->writable = false; /* no room for it: bytes are kept in memory */
    }
    return true;
}

/* ---------------------------------------------------------------- chunk map R */

static void map_open(struct cachefile *c)
{
    struct cachefile_names names;
    const char *name = names.map;
    size_t len = CACHE_MAP_HEADER + (c->n + 7) / 8;
    void *m;
    uint32_t head[4] = { MAP_MAGIC, 1, MAP_MAGIC2, 0 }, have[4];
    struct stat st;
    int fd;

    cachefile_names(&names, c->id, c->stored);
    fd = openat(c->dir_fd, name,
                c->writable ? O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW : O_RDONLY | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (fd < 0 || fstat(fd, &st) || !S_ISREG(st.st_mode))
        goto out;
    if (st.st_size == 0 && c->writable) {
        if (ftruncate(fd, (off_t)len) || pwrite(fd, head, sizeof head, 0) != sizeof head)
            goto out;
        st.st_size = (off_t)len;
    }
    if ((uint64_t)st.st_size != len || pread(fd, have, sizeof have, 0) != sizeof have) {
        engine_say(c->engine, VND_LEVEL_WARNING, VND_CAUSE_IO,
                   "cache of blob %s: %s has %lld bytes, not %zu: it is left alone", c->id, name, (long long)st.st_size,
                   len);
        goto out;
    }
    if (!have[0] && !have[1] && !have[2] && c->writable) { /* its creator was interrupted */
        if (pwrite(fd, head, sizeof head, 0) != sizeof head)
            goto out;
    } else if (have[0] != MAP_MAGIC || have[1] > 1) {
        engine_say(c->engine, VND_LEVEL_WARNING, VND_CAUSE_IO, "cache of blob %s: %s is no chunk map: it is left alone",
                   c->id, name);
        goto out;
    }
    if (c->writable && claim_reserve(fd, (int64_t)len))
        goto out;
    /* Mapped over the private memory, which stays in use where the file cannot be opened. */
    m = mmap(c->marked_map, len, c->writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0);
    if (m != MAP_FAILED)
        c->map_at = (struct cachefile_at){ st.st_dev, st.st_ino };
out:
    if (fd >= 0)
        close(fd);
}

static int map_reserve(struct cachefile *c)
{
    size_t len = CACHE_MAP_HEADER + (c->n + 7) / 8;
    void *m = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (m == MAP_FAILED)
        return -errno;
    c->marked_map = m;
    c->marked_map_bytes = len;
    c->marked = (_Atomic uint8_t *)(c->marked_map + CACHE_MAP_HEADER);
    c->guard_marked = sigbus_add(c->marked_map, up(len, 4096), 4096, false, NULL);
    return c->guard_marked ? 0 : -ENOMEM;
}

/* ---------------------------------------------------------------- side file */

/* No side file speaks of the data file. Whether it is this table's all the same: it is named after it, or new (a nydusd sizes
 * a file as it makes it), or says so, or says that it is the first one's. */
static bool data_is_ours(const struct cachefile *c, const struct blobtable *t)
{
    char has[BLOBTABLE_NAME_LEN + 1] = "", name[BLOBTABLE_NAME_LEN + 1];
    struct stat st;

    if (c->named || (!fstat(c->data_fd, &st) && !st.st_size))
        return true;
    if (fgetxattr(c->data_fd, CACHE_XATTR, has, BLOBTABLE_NAME_LEN) <= 0)
        return false;
    return !strcmp(has, CACHE_XATTR_OPEN) || (t && !blobtable_name(c->info, t, name) && !strcmp(has, name));
}

/* The side file speaks of this very data file, and of another table of the blob. */
static bool side_differs(const struct cachefile *c, const struct side_header *h, const struct identity *id)
{
    return !memcmp(h->magic, SIDE_MAGIC, 8) && h->version == SIDE_VERSION && h->dev == id->dev && h->ino == id->ino &&
           h->btime_ns == id->btime_ns && (h->n != c->n || h->size_bytes != c->size_bytes);
}

static bool side_matches(const struct cachefile *c, const struct side_header *h, const struct identity *id)
{
    return !memcmp(h->magic, SIDE_MAGIC, 8) && h->version == SIDE_VERSION && h->n == c->n && !h->retired &&
           !h->adopted && h->dev == id->dev && h->ino == id->ino && h->btime_ns == id->btime_ns &&
           h->size_bytes == c->size_bytes;
}

/* Makes a new side file and then gives it the name. replace: the caller holds the lock of the present one; other
 * processes keep that one open. Without replace the first process to name its file wins. */
static int side_create(struct cachefile *c, const char *name, const struct identity *id, bool replace)
{
    char tmp[CACHE_NAME_MAX + 48];
    struct side_header h = { .version = SIDE_VERSION,
                             .n = c->n,
                             .dev = id->dev,
                             .ino = id->ino,
                             .btime_ns = id->btime_ns,
                             .size_bytes = c->size_bytes };
    size_t len = cachefile_bound_offset(c->n) + (size_t)c->n * sizeof(struct side_bound);
    int fd, rc = 0;

    memcpy(h.magic, SIDE_MAGIC, 8);
    boot_id_get(h.boot_id);
    atomic_init(&h.ctime_ns, id->ctime_ns);
    snprintf(tmp, sizeof tmp, "%s.%d.%p.tmp", name, (int)getpid(), (void *)c);
    fd = openat(c->side_dir_fd, tmp, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)len) || claim_reserve(fd, (int64_t)cachefile_bound_offset(c->n)) ||
        pwrite(fd, &h, sizeof h, 0) != sizeof h)
        rc = errno ? -errno : -EIO;
    else if (replace ? renameat(c->side_dir_fd, tmp, c->side_dir_fd, name)
                     : linkat(c->side_dir_fd, tmp, c->side_dir_fd, name, 0))
        rc = errno == EEXIST ? 0 : -errno;
    if (rc || !replace)
        unlinkat(c->side_dir_fd, tmp, 0);
    close(fd);
    return rc;
}

static bool same_file(const struct cachefile *c, int fd, const char *name)
{
    struct stat a, b;

    return !fstat(fd, &a) && !fstatat(c->side_dir_fd, name, &b, AT_SYMLINK_NOFOLLOW) && a.st_dev == b.st_dev &&
           a.st_ino == b.st_ino;
}

/* Opens the current side file with CLAIM_INIT held. The file may be replaced between open and lock: look again. */
static int side_open_locked(struct cachefile *c, const char *name, const struct identity *id, const struct blobtable *t)
{
    int rc;

    for (int i = 0; i < 16; i++) {
        int fd = openat(c->side_dir_fd, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
        if (fd < 0 && errno == ENOENT) {
            rc = data_is_ours(c, t) ? side_create(c, name, id, false) : -EBUSY;
            if (rc)
                return rc;
            continue;
        }
        if (fd < 0)
            return -errno;
        rc = claim_byte(fd, CLAIM_INIT, true, CLAIM_INIT_WAIT_MS);
        if (rc) {
            close(fd);
            return rc;
        }
        if (same_file(c, fd, name)) {
            struct side_header h;
            struct stat st;
            size_t len = cachefile_bound_offset(c->n) + (size_t)c->n * sizeof(struct side_bound);
            bool whole = !fstat(fd, &st) && pread(fd, &h, sizeof h, 0) == sizeof h;
            if (whole && (uint64_t)st.st_size == len && side_matches(c, &h, id)) {
                c->side_fd = fd;
                c->side_at = (struct cachefile_at){ st.st_dev, st.st_ino };
                return 0;
            }
            if (whole && side_differs(c, &h, id))
                rc = -EEXIST;
            else if (!data_is_ours(c, t))
                rc = -EBUSY;
            else
                rc = side_create(c, name, id, true); /* a process that waits for this lock will see the new file */
            close(fd);
            if (rc)
                return rc;
            continue;
        }
        close(fd);
    }
    return -EAGAIN;
}

static int side_map(struct cachefile *c)
{
    size_t tb = bits_bytes(c->n);
    void *m;

    c->side_map_bytes = SIDE_HEADER + 2 * tb;
    m = mmap(NULL, c->side_map_bytes, PROT_READ | PROT_WRITE,
             c->side_fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, c->side_fd, 0);
    if (m == MAP_FAILED)
        return -errno;
    c->head = m;
    c->trusted = (_Atomic uint64_t *)((uint8_t *)m + SIDE_HEADER);
    c->durable = (_Atomic uint64_t *)((uint8_t *)m + SIDE_HEADER + tb);
    /* Cut under us, the pages read as zeroes: nothing is ready, nothing is wrong. */
    c->guard_side = sigbus_add(m, up(c->side_map_bytes, 4096), 4096, false, NULL);
    return c->guard_side ? 0 : -ENOMEM;
}

/* Whether a change time that was not noted is that of a write of ours whose process died over it: it only went to a
 * chunk that was not trusted. Coarse clocks of file systems lag a tick behind. */
static bool died_writing(const struct cachefile *c, uint64_t ctime_ns)
{
    uint64_t began = atomic_load(&c->head->write_ns);

    return atomic_load(&c->head->writing) && ctime_ns + WRITE_LAG_NS >= began && ctime_ns <= began + WRITE_NS;
}

/* Opens, binds and maps the side file. If that fails the trusted bits are private memory. Where there could be one, nothing is
 * written without it: it is what keeps another table's writers away. */
static int side_open(struct cachefile *c, const struct cachefile_cfg *cfg)
{
    struct cachefile_names names;
    char boot[40];
    struct identity id = { 0 };
    int rc = -ENOENT;

    if (c->side_dir_fd >= 0 && c->data_fd >= 0 && c->writable) {
        cachefile_names(&names, c->id, c->stored);
        rc = identity_get(c->data_fd, &id);
        if (!rc)
            rc = side_open_locked(c, names.side, &id, cfg->table);
        if (rc == -EEXIST || rc == -EBUSY)
            return rc;
        if (rc) {
            if (!cfg->quiet)
                engine_say(c->engine, VND_LEVEL_WARNING, VND_CAUSE_IO,
                           "cache of blob %s: cannot make .virtiofsd-nydus/%s (%s): what is not here is served from "
                           "memory only and fetched again; %s",
                           c->id, names.side, strerror(-rc), cachefile_cure(-rc));
            c->lack_errno = -rc;
            c->writable = false;
        }
    }
    bool grown = data_size(c);
    rc = side_map(c);
    if (c->side_fd < 0)
        return rc;
    if (!rc)
        rc = identity_get(c->data_fd, &id); /* sizing has changed its time */
    if (rc)
        return rc;
    boot_id_get(boot);
    /* Alone here: no process of ours writes, so a change since the last known state is another program's or a
     * crash's. */
    bool alone = claim_byte(c->side_fd, CLAIM_ATTACH, true, 0) == 0;
    if (grown)
        cachefile_invalidate(c, false);
    if (alone) {
        bool rebooted =
            !boot[0] || memcmp(boot, c->head->boot_id, sizeof boot) != 0; /* not readable: not known to be the same */
        if (rebooted) {
            cachefile_invalidate(c, true);
            memcpy(c->head->boot_id, boot, sizeof boot);
        } else if (atomic_load(&c->head->epoch) & 1) {
            cachefile_invalidate(c, false);
        }
        if (!grown && atomic_load(&c->head->ctime_ns) != id.ctime_ns && !died_writing(c, id.ctime_ns))
            cachefile_invalidate(c, false);
        atomic_store(&c->head->ctime_ns, id.ctime_ns);
        atomic_store(&c->head->writing, 0);
    }
    rc = claim_byte(c->side_fd, CLAIM_ATTACH, false, CLAIM_INIT_WAIT_MS);
    claim_byte_release(c->side_fd, CLAIM_INIT);
    return rc;
}

/* ---------------------------------------------------------------- another program's files */

static int lower_reserve(struct cachefile *c)
{
    size_t len = CACHE_MAP_HEADER + (c->n + 7) / 8;
    void *m = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (m == MAP_FAILED)
        return -errno;
    c->lower_map = m;
    c->guard_lower = sigbus_add(m, up(len, 4096), 4096, false, NULL);
    return c->guard_lower ? 0 : -ENOMEM;
}

/* Files that cannot be of as many chunks are not looked at. */
static void lower_open(struct cachefile *c, const char *id)
{
    size_t len = CACHE_MAP_HEADER + (c->n + 7) / 8;
    struct cachefile_names names;
    struct stat st;
    int fd, map_fd;

    cachefile_names(&names, id, c->stored);
    fd = openat(c->dir_fd, names.data, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    map_fd = openat(c->dir_fd, names.map, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd >= 0 && map_fd >= 0 && !fstat(fd, &st) && S_ISREG(st.st_mode) && (uint64_t)st.st_size <= c->size_bytes &&
        !fstat(map_fd, &st) && S_ISREG(st.st_mode) && (uint64_t)st.st_size == len &&
        mmap(c->lower_map, len, PROT_READ, MAP_SHARED | MAP_FIXED, map_fd, 0) != MAP_FAILED) {
        c->lower_fd = fd;
        fd = -1;
    }
    if (fd >= 0)
        close(fd);
    if (map_fd >= 0)
        close(map_fd);
}

int cachefile_open(struct cachefile **out, const struct cachefile_cfg *cfg, struct failure *f)
{
    struct cachefile *c = calloc(1, sizeof *c);
    int rc;

    *out = NULL;
    if (!c)
        return failure_set(f, -ENOMEM, VND_CAUSE_IO, "cache of blob %s: no memory", cfg->id);
    c->engine = cfg->engine;
    c->dir_fd = cfg->dir_fd;
    c->side_dir_fd = cfg->side_dir_fd;
    c->writable = cfg->writable;
    c->stored = cfg->stored;
    c->named = cfg->named;
    c->info = cfg->info;
    c->n = cfg->n;
    c->size_bytes = cfg->size_bytes;
    c->data_fd = c->side_fd = c->lower_fd = -1;
    snprintf(c->id, sizeof c->id, "%s", cfg->id);
    pthread_mutex_init(&c->lock, NULL);
    pthread_mutex_init(&c->write_lock, NULL);
    rc = data_open(c, f);
    if (!rc) {
        rc = side_open(c, cfg);
        if (rc == -EEXIST)
            failure_set(f, rc, VND_CAUSE_IO, "cache of blob %s: its files are those of another table of chunks", c->id);
        else if (rc == -EBUSY)
            failure_set(f, rc, VND_CAUSE_IO, "cache of blob %s: its files are another program's, which may use them",
                        c->id);
        else if (rc)
            io_fail(c, "cannot map its side file", rc, f);
    }
    if (!rc && ((rc = map_reserve(c)) || (rc = lower_reserve(c))))
        io_fail(c, "no memory for its chunk map", rc, f);
    if (!rc && c->data_fd >= 0)
        map_open(c);
    if (!rc && cfg->lower_id)
        lower_open(c, cfg->lower_id);
    if (rc) {
        cachefile_close(c);
        return rc;
    }
    *out = c;
    return 0;
}

void cachefile_close(struct cachefile *c)
{
    if (!c)
        return;
    sigbus_remove(c->guard_side);
    sigbus_remove(c->guard_marked);
    sigbus_remove(c->guard_lower);
    if (c->head)
        munmap(c->head, c->side_map_bytes);
    if (c->marked_map)
        munmap(c->marked_map, c->marked_map_bytes);
    if (c->lower_map)
        munmap(c->lower_map, CACHE_MAP_HEADER + (c->n + 7) / 8);
    if (c->lower_fd >= 0)
        close(c->lower_fd);
    if (c->side_fd >= 0)
        close(c->side_fd);
    if (c->data_fd >= 0)
        close(c->data_fd);
    pthread_mutex_destroy(&c->lock);
    pthread_mutex_destroy(&c->write_lock);
    free(c);
}
