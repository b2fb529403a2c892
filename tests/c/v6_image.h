/* v6_image.h -- makes small RAFS v6 bootstraps in memory, byte by byte, for the C tests and fuzzers.
 *
 * Layout: superblocks and device slot in the first block, blob table at 4096, nid 0 at 8192, inodes from 12288
 * (nid 128, the root), flat data blocks from BLOCKS_OFF, chunk table at CHUNKS_OFF.
 */
#ifndef V6_IMAGE_H
#define V6_IMAGE_H
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define IMG_META 8192
#define IMG_ROOT 128
#define IMG_BLOCKS_OFF (24 << 10)
#define IMG_CHUNKS_OFF (56 << 10)
#define IMG_SIZE (60 << 10)
#define IMG_CHUNK 4096u
#define IMG_BLOB_CHUNKS 64
#define IMG_XATTR_ROOM 64

struct img {
    uint8_t b[IMG_SIZE];
    uint32_t next_nid, next_block, records;
};
struct img_name {
    const char *name;
    uint64_t nid;
    uint8_t type;
};

static inline void img_16(struct img *m, uint32_t at, uint32_t v)
{
    uint16_t x = (uint16_t)v;
    memcpy(m->b + at, &x, 2);
}
static inline void img_32(struct img *m, uint32_t at, uint32_t v)
{
    memcpy(m->b + at, &v, 4);
}
static inline void img_64(struct img *m, uint32_t at, uint64_t v)
{
    memcpy(m->b + at, &v, 8);
}
static inline uint32_t img_off(uint64_t nid)
{
    return (uint32_t)(IMG_META + nid * 32);
}

/* flags as in the ext superblock; one blob. */
static inline void img_init(struct img *m, uint64_t flags)
{
    memset(m, 0, sizeof(*m));
    img_32(m, 1024, 0xe0f5e1e2);
    img_32(m, 1024 + 8, 0x40000000);
    m->b[1024 + 12] = 12;
    img_16(m, 1024 + 14, IMG_ROOT);
    img_64(m, 1024 + 16, 10);
    img_64(m, 1024 + 24, 1234); /* build time: mtime of compact inodes */
    img_32(m, 1024 + 36, 4096);
    img_32(m, 1024 + 40, IMG_META / 4096);
    img_32(m, 1024 + 80, 0xc);
    img_16(m, 1024 + 86, 1);
    img_16(m, 1024 + 88, 11);
    img_64(m, 1152, flags);
    img_64(m, 1152 + 8, 4096);
    img_32(m, 1152 + 16, 256);
    img_32(m, 1152 + 20, IMG_CHUNK);
    img_64(m, 1152 + 24, IMG_CHUNKS_OFF);
    memset(m->b + 1408, 'a', 64);
    img_32(m, 1408 + 64, IMG_BLOB_CHUNKS);
    memset(m->b + 4096, 'a', 64);
    img_32(m, 4096 + 68, IMG_CHUNK);
    img_32(m, 4096 + 72, IMG_BLOB_CHUNKS);
    img_32(m, 4096 + 84, 1);
    img_64(m, 4096 + 88, IMG_BLOB_CHUNKS * IMG_CHUNK);
    img_64(m, 4096 + 96, IMG_BLOB_CHUNKS * IMG_CHUNK);
    m->next_nid = IMG_ROOT;
    m->next_block = IMG_BLOCKS_OFF / 4096;
}

/* Writes an extended inode; layout 0 plain, 2 inline, 4 chunked. */
static inline void img_inode(struct img *m, uint64_t nid, uint32_t layout, uint32_t mode, uint32_t nlink, uint64_t size,
                             uint32_t u)
{
    uint32_t at = img_off(nid);

    img_16(m, at, 1 | layout << 1);
    img_16(m, at + 4, mode);
    img_64(m, at + 8, size);
    img_32(m, at + 16, u);
    img_32(m, at + 24, 1000);
    img_32(m, at + 28, 100000);
    img_64(m, at + 32, 1600000000);
    img_32(m, at + 40, 123456789);
    img_32(m, at + 44, nlink);
}

/* Room for an inode and extra bytes behind it, not across a block. */
static inline uint64_t img_alloc(struct img *m, uint32_t extra)
{
    uint32_t need = (64 + extra + 31) / 32, in_block = (IMG_META + m->next_nid * 32) % 4096 / 32;

    if (in_block + need > 128)
        m->next_nid += 128 - in_block;
    m->next_nid += need;
    return m->next_nid - need;
}

/* Packs names (sorted, with "." and "..") as a directory's data: bytes used; out must hold 4096 * blocks. */
static inline uint64_t img_pack_dir(uint8_t *out, const struct img_name *names, uint32_t n)
{
    uint64_t block = 0, used = 0;

    for (uint32_t i = 0; i < n;) {
        uint32_t count = 0, bytes = 0;
        uint8_t *b = out + block * 4096;

        while (i + count < n && bytes + 12 + strlen(names[i + count].name) <= 4096)
            bytes += 12 + (uint32_t)strlen(names[i + count++].name);
        for (uint32_t k = 0, name_at = 12 * count; k < count; k++) {
            uint16_t off = (uint16_t)name_at;

            memcpy(b + 12 * k, &names[i + k].nid, 8);
            memcpy(b + 12 * k + 8, &off, 2);
            b[12 * k + 10] = names[i + k].type;
            memcpy(b + name_at, names[i + k].name, strlen(names[i + k].name));
            name_at += (uint32_t)strlen(names[i + k].name);
        }
        i += count;
        used = block * 4096 + bytes;
        block++;
    }
    return used;
}

static inline void img_dir(struct img *m, uint64_t nid, uint32_t nlink, const struct img_name *names, uint32_t n)
{
    uint8_t *tmp = calloc(8, 4096);
    uint64_t size = img_pack_dir(tmp, names, n);

    if (size <= 1024) {
        img_inode(m, nid, 2, S_IFDIR | 0755, nlink, size, 0);
        memcpy(m->b + img_off(nid) + 64, tmp, size);
    } else {
        img_inode(m, nid, 0, S_IFDIR | 0755, nlink, size, m->next_block);
        memcpy(m->b + m->next_block * 4096, tmp, (size + 4095) / 4096 * 4096);
        m->next_block += (uint32_t)((size + 4095) / 4096);
    }
    free(tmp);
}

static inline void img_record(struct img *m, uint32_t blob, uint32_t index, uint32_t usize)
{
    uint32_t at = IMG_CHUNKS_OFF + 80 * m->records++;

    memset(m->b + at, (int)(index + 1), 32);
    img_32(m, at + 32, blob);
    img_32(m, at + 40, usize);
    img_32(m, at + 44, usize);
    img_64(m, at + 48, (uint64_t)index * IMG_CHUNK);
    img_64(m, at + 56, (uint64_t)index * IMG_CHUNK);
    img_32(m, at + 72, index);
    img_64(m, 1152 + 32, 80ull * m->records);
}

/* A file over consecutive chunks from index first on. */
static inline void img_file(struct img *m, uint64_t nid, uint32_t nlink, uint64_t size, uint32_t first, bool records)
{
    uint32_t n = (uint32_t)((size + IMG_CHUNK - 1) / IMG_CHUNK);

    img_inode(m, nid, 4, S_IFREG | 0644, nlink, size, 0x20);
    for (uint32_t k = 0; k < n; k++) {
        uint32_t at = img_off(nid) + 64 + 8 * k;

        img_16(m, at, first + k);
        img_16(m, at + 2, 1);
        img_32(m, at + 4, first + k);
        if (records) {
            uint64_t left = size - (uint64_t)k * IMG_CHUNK;

            img_record(m, 0, first + k, left < IMG_CHUNK ? (uint32_t)left : IMG_CHUNK);
        }
    }
}

enum {
    IMG_MANY = 400, /* names of the large directory: five blocks */
    IMG_NAME = 40,  /* room for one of them */
    IMG_FILE_SIZE = 10 * 4096 + 100,
};
/* Name i of the large directory: 36 bytes, ascending. */
static inline void img_many_name(char out[IMG_NAME], int i)
{
    snprintf(out, IMG_NAME, "n%03d-%s", i % 1000, "of-many-with-a-rather-long-name");
}

struct img_nids {
    uint64_t big, dev, empty, file, link, sub, deep, xfile;
};

/* The tree of the tests: / { big/ n000..n399, dev, empty, file, hard -> file, link, sub/ { deep/ }, xfile }. */
static inline struct img_nids img_tree(struct img *m)
{
    struct img_nids n;
    static char names[IMG_MANY][IMG_NAME];
    struct img_name *many = calloc(IMG_MANY + 2, sizeof(*many));
    uint64_t root = img_alloc(m, 1024), one;

    n.big = img_alloc(m, 0);
    n.dev = img_alloc(m, 0);
    n.empty = img_alloc(m, 0);
    n.file = img_alloc(m, 11 * 8);
    n.link = img_alloc(m, 32);
    n.sub = img_alloc(m, 256);
    n.deep = img_alloc(m, 256);
    n.xfile = img_alloc(m, IMG_XATTR_ROOM);
    one = img_alloc(m, 0);
    img_dir(m, root, 4,
            (const struct img_name[]){ { ".", root, 2 },
                                       { "..", root, 2 },
                                       { "big", n.big, 2 },
                                       { "dev", n.dev, 3 },
                                       { "empty", n.empty, 1 },
                                       { "file", n.file, 1 },
                                       { "hard", n.file, 1 },
                                       { "link", n.link, 7 },
                                       { "sub", n.sub, 2 },
                                       { "xfile", n.xfile, 1 } },
            10);
    img_dir(m, n.sub, 3, (const struct img_name[]){ { ".", n.sub, 2 }, { "..", root, 2 }, { "deep", n.deep, 2 } }, 3);
    img_dir(m, n.deep, 2, (const struct img_name[]){ { ".", n.deep, 2 }, { "..", n.sub, 2 } }, 2);
    many[0] = (struct img_name){ ".", n.big, 2 };
    many[1] = (struct img_name){ "..", root, 2 };
    for (int i = 0; i < IMG_MANY; i++) {
        img_many_name(names[i], i);
        many[i + 2] = (struct img_name){ names[i], one, 1 };
    }
    img_dir(m, n.big, 2, many, IMG_MANY + 2);
    free(many);
    img_inode(m, n.dev, 0, S_IFCHR | 0600, 1, 0, 5 << 8 | 1);
    img_inode(m, n.empty, 4, S_IFREG | 0644, 1, 0, 0x20);
    img_file(m, n.file, 2, IMG_FILE_SIZE, 3, true);
    img_inode(m, n.link, 2, S_IFLNK | 0777, 1, 11, 0);
    memcpy(m->b + img_off(n.link) + 64, "target/path", 11);
    img_inode(m, n.xfile, 4, S_IFREG | 0644, 1, 0, 0x20);
    img_16(m, img_off(n.xfile) + 2, (36 - 12) / 4 + 1);
    memcpy(m->b + img_off(n.xfile) + 64 + 12, "\3\1\5\0foohello\3\6\4\0cap\1\2\3\4", 24);
    img_inode(m, one, 4, S_IFREG | 0600, IMG_MANY, 0, 0x20);
    return n;
}

/* The image as a file that can be opened by name: /proc/self/fd/N. */
static inline int img_fd(const void *bytes, size_t len, char path[32])
{
    int fd = memfd_create("image", MFD_CLOEXEC);

    if (fd < 0 || write(fd, bytes, len) != (ssize_t)len)
        abort();
    snprintf(path, 32, "/proc/self/fd/%d", fd);
    return fd;
}

#endif
