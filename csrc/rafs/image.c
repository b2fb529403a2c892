/* rafs/image.c -- finds the bootstrap in a file and maps it.
 *
 * A file is a bootstrap, or a data blob with a bootstrap inside (docs/rafs-format.md 1.2): sections back to back, each
 * followed by a tar header, so it is read from its end. There stands the table of contents, or the raw bootstrap
 * of older blobs. A compressed one is unpacked into a sealed memory file.
 */
#include <errno.h>
#include <fcntl.h>
#include <openssl/sha.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

#include "base/sigbus.h"
#include "rafs/v5.h"
#include "rafs/v6.h"

#define TAR_BLOCK 512
#define TOC_ENTRY 128
#define TOC_WINDOW 4096              /* a table of contents and its header lie in the last so many bytes of a blob */
#define INLINE_BOOT_MAX (1ull << 30) /* bytes of an unpacked bootstrap: bounds what a hostile blob makes us write */

struct section {
    uint64_t off, csize, usize;
    uint32_t codec;
    uint8_t digest[32];
};

/* The value of a numeric tar field of n bytes: octal digits, or base 256 when the first bit is set. UINT64_MAX: it is
 * malformed. */
static uint64_t tar_number(const uint8_t *p, int n)
{
    uint64_t v = 0;

    if (p[0] & 0x80) {
        for (int i = 1; i < n; i++) {
            if (v >> 55)
                return UINT64_MAX;
            v = v << 8 | p[i];
        }
        return v;
    }
    for (int i = 0; i < n && p[i] && p[i] != ' '; i++) {
        if (p[i] < '0' || p[i] > '7')
            return UINT64_MAX;
        v = v << 3 | (uint64_t)(p[i] - '0');
    }
    return v;
}

/* The size field of a GNU tar header of a plain file with a right checksum; UINT64_MAX: it is no such header. */
static uint64_t tar_header_size(const uint8_t h[TAR_BLOCK])
{
    uint64_t sum = 0;

    for (int i = 0; i < TAR_BLOCK; i++)
        sum += i >= 148 && i < 156 ? ' ' : h[i];
    if (memcmp(h + 257, "ustar  ", 8) != 0 || (h[156] != '0' && h[156] != 0) || tar_number(h + 148, 8) != sum)
        return UINT64_MAX;
    return tar_number(h + 124, 12);
}

static bool tar_header_named(const uint8_t h[TAR_BLOCK], const char *name)
{
    return strncmp((const char *)h, name, 100) == 0;
}

static bool read_all(int fd, void *buf, size_t len, uint64_t off)
{
    while (len) {
        ssize_t n = pread(fd, buf, len, (off_t)off);

        if (n <= 0) {
            if (n < 0 && errno == EINTR)
                continue;
            return false;
        }
        buf = (uint8_t *)buf + n;
        len -= (size_t)n;
        off += (uint64_t)n;
    }
    return true;
}

/* Finds the section that holds the bootstrap: 1, 0 where the file is no data blob, or -errno with a line. */
static int find_section(int fd, uint64_t size, struct section *s, const struct rafs_error *e)
{
    uint8_t win[TOC_WINDOW];
    uint64_t win_len = size < TOC_WINDOW ? size & ~127ull : TOC_WINDOW, len;
    const uint8_t *header = win + win_len - TAR_BLOCK;

    if (win_len < TAR_BLOCK || !read_all(fd, win, win_len, size - win_len))
        return 0;
    len = tar_header_size(header);
    if (len == UINT64_MAX)
        return 0;
    if (tar_header_named(header, "image.boot")) {
        if (len > size - TAR_BLOCK)
            return rafs_fail(e, VND_CAUSE_FORMAT, "the blob's inlined bootstrap is longer than the blob");
        *s = (struct section){ .off = size - TAR_BLOCK - len, .csize = len, .usize = len, .codec = 1 };
        return 1;
    }
    if (!tar_header_named(header, "rafs.blob.toc"))
        return 0;
    if (len > win_len - TAR_BLOCK || len % TOC_ENTRY) {
        return rafs_fail(e, VND_CAUSE_FORMAT, "the blob's table of contents has a bad size %llu",
                         (unsigned long long)len);
    }
    for (const uint8_t *t = header - len; t < header; t += TOC_ENTRY) {
        if (strncmp((const char *)t + 8, "image.boot", 16) != 0) /* NOLINT(bugprone-not-null-terminated-result) */
            continue;
        *s = (struct section){ .codec = rafs_le32(t) & 0xf,
                               .off = rafs_le64(t + 56),
                               .csize = rafs_le64(t + 64),
                               .usize = rafs_le64(t + 72) };
        memcpy(s->digest, t + 24, sizeof(s->digest));
        if (s->off > size || s->csize > size - s->off || s->usize > INLINE_BOOT_MAX ||
            (s->codec == 1 && s->csize != s->usize) || (s->codec != 1 && s->codec != 2)) {
            return rafs_fail(e, VND_CAUSE_FORMAT, "the blob's table of contents places its bootstrap badly");
        }
        return 1;
    }
    return rafs_fail(e, VND_CAUSE_FORMAT, "a data blob without an inlined bootstrap: give the bootstrap file");
}

static int map_range(struct vnd_rafs *r, int fd, uint64_t off, uint64_t len, const struct rafs_error *e)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), lead = off % page;

    r->map_len = (size_t)(lead + len);
    r->map = mmap(NULL, r->map_len, PROT_READ, MAP_PRIVATE, fd, (off_t)(off - lead));
    if (r->map == MAP_FAILED) {
        r->map = NULL;
        return rafs_fail(e, VND_CAUSE_IO, "cannot be mapped: %s", strerror(errno));
    }
    r->map_off = off;
    r->map_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (r->map_fd < 0)
        return rafs_fail(e, VND_CAUSE_IO, "out of descriptors: %s", strerror(errno));
    /* The file's owner may cut the file short under us. The lost part then reads as zeroes, which no check
     * accepts. */
    r->guard = sigbus_add(r->map, r->map_len, page, false, NULL);
    if (!r->guard)
        return rafs_no_memory(e);
    r->base = (const uint8_t *)r->map + lead;
    r->size = len;
    return 0;
}

/* Unpacks the section into out. False unless it gives exactly usize bytes. */
static bool unpack_zstd(int fd, const struct section *s, uint8_t *out)
{
    ZSTD_DStream *z = ZSTD_createDStream();
    uint8_t *in = malloc(1 << 16);
    ZSTD_outBuffer o = { out, s->usize, 0 };
    uint64_t done = 0;
    size_t left = 1;
    bool good = z && in;

    while (good && done < s->csize) {
        size_t n = s->csize - done < 1 << 16 ? s->csize - done : 1 << 16;
        ZSTD_inBuffer i = { in, n, 0 };

        good = read_all(fd, in, n, s->off + done);
        done += n;
        while (good && i.pos < i.size) {
            size_t before_in = i.pos, before_out = o.pos;

            left = ZSTD_decompressStream(z, &o, &i);
            good = !ZSTD_isError(left) && (i.pos != before_in || o.pos != before_out);
        }
    }
    ZSTD_freeDStream(z);
    free(in);
    return good && left == 0 && o.pos == s->usize;
}

static int map_unpacked(struct vnd_rafs *r, int fd, const struct section *s, const struct rafs_error *e)
{
    int mem = memfd_create("rafs-bootstrap", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    uint8_t *out = MAP_FAILED;
    bool good = false;

    if (mem >= 0 && ftruncate(mem, (off_t)s->usize) == 0)
        out = mmap(NULL, s->usize, PROT_READ | PROT_WRITE, MAP_SHARED, mem, 0);
    if (out != MAP_FAILED) {
        good = unpack_zstd(fd, s, out);
        munmap(out, s->usize);
        fcntl(mem, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    }
    if (!good) {
        if (mem >= 0)
            close(mem);
        return rafs_fail(e, VND_CAUSE_FORMAT, "the blob's inlined bootstrap cannot be unpacked");
    }
    int rc = map_range(r, mem, 0, s->usize, e);

    close(mem);
    return rc;
}

static int map_section(struct vnd_rafs *r, int fd, const struct section *s, const struct rafs_error *e)
{
    static const uint8_t unset[32];
    uint8_t digest[32];
    int rc = s->usize < 4096 ? rafs_fail(e, VND_CAUSE_FORMAT, "the blob's inlined bootstrap is too short")
             : s->codec == 2 ? map_unpacked(r, fd, s, e)
                             : map_range(r, fd, s->off, s->usize, e);

    if (rc || memcmp(s->digest, unset, 32) == 0)
        return rc;
    SHA256(r->base, r->size, digest);
    if (memcmp(digest, s->digest, 32) != 0)
        return rafs_fail(e, VND_CAUSE_DIGEST, "the blob's inlined bootstrap does not match its digest");
    return 0;
}

static bool is_bootstrap(int fd)
{
    uint8_t head[V6_SB + 4];

    return read_all(fd, head, sizeof(head), 0) && (rafs_le32(head) == V5_MAGIC || rafs_le32(head + V6_SB) == V6_MAGIC);
}

int rafs_image_map(struct vnd_rafs *r, const struct rafs_error *e)
{
    int fd = open(r->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), rc;
    struct section s = { 0 };
    struct stat st;

    if (fd < 0)
        return rafs_fail(e, VND_CAUSE_IO, "cannot be opened: %s", strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        rc = rafs_fail(e, VND_CAUSE_IO, "not a regular file");
    } else if (is_bootstrap(fd)) {
        rc = (uint64_t)st.st_size > RAFS_FILE_MAX ? rafs_fail(e, VND_CAUSE_FORMAT, "too large for a bootstrap")
                                                  : map_range(r, fd, 0, (uint64_t)st.st_size, e);
    } else {
        rc = find_section(fd, (uint64_t)st.st_size, &s, e);
        r->from_blob = rc == 1;
        rc = rc == 1   ? map_section(r, fd, &s, e)
             : rc == 0 ? rafs_fail(e, VND_CAUSE_FORMAT, "not a RAFS bootstrap, nor a data blob that holds one")
                       : rc;
    }
    close(fd);
    return rc;
}

void rafs_image_unmap(struct vnd_rafs *r)
{
    if (r->map) {
        sigbus_remove(r->guard);
        munmap(r->map, r->map_len);
        r->map = NULL;
    }
    if (r->map_fd >= 0) {
        close(r->map_fd);
        r->map_fd = -1;
    }
}
