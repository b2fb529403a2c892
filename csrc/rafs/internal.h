/* rafs/internal.h -- the opened bootstrap, shared by the rafs_*.c files.
 *
 * Everything is read in place from the mapping, little-endian, unaligned, and checked where it is used: opening
 * costs nothing that grows with the tree. Whoever can write to the file while it is mapped can make values
 * change between two reads, so a value is loaded once, checked, and the loaded copy used.
 */
#ifndef VND_RAFS_INT_H
#define VND_RAFS_INT_H
#include <pthread.h>
#include <string.h>

#include "base/base.h"
#include "rafs/rafs.h"

/* Superblock flags, docs/rafs-format.md 2.2. */
#define RAFS_FLAG_COMPRESS_MASK 0xc3u /* none 1, lz4_block 2, gzip 0x40, zstd 0x80 */
#define RAFS_FLAG_BLAKE3 0x4u
#define RAFS_FLAG_SHA256 0x8u
#define RAFS_FLAG_EXPLICIT_UID_GID 0x10u
#define RAFS_FLAG_HAS_XATTR 0x20u
#define RAFS_FLAG_TARFS 0x200u
#define RAFS_FLAG_AES_XTS 0x2000000u
#define RAFS_FLAG_KNOWN 0x30003ffull
#define RAFS_FLAG_COMPAT 0xfc000000ull /* reserved, harmless */

/* Blob features, docs/rafs-format.md 4.1. */
#define RAFS_BLOB_INLINED_FS_META 0x2u
#define RAFS_BLOB_CHUNK_INFO_V2 0x4u
#define RAFS_BLOB_ZRAN 0x8u
#define RAFS_BLOB_SEPARATE 0x10u
#define RAFS_BLOB_INLINED_DIGEST 0x20u
#define RAFS_BLOB_TARFS 0x40u
#define RAFS_BLOB_BATCH 0x80u
#define RAFS_BLOB_ENCRYPTED 0x100u
#define RAFS_BLOB_EXTERNAL 0x800u
#define RAFS_BLOB_UNKNOWN 0xf000u      /* incompatible bits nobody has defined */
#define RAFS_BLOB_INTERNAL 0x80000000u /* must not be on disk */

#define RAFS_CHUNK_RECORD 80 /* bytes, docs/rafs-format.md 2.6 */
#define RAFS_CHUNK_SIZE_MAX (16u << 20)
#define RAFS_CHUNKS_PER_BLOB_MAX (1u << 24)
#define RAFS_BLOB_CSIZE_MAX (1ull << 40)
#define RAFS_BLOB_USIZE_MAX (1ull << 44)
#define RAFS_FILE_MAX (16ull << 30) /* of a bootstrap: far above any real one, keeps sums small */
#define RAFS_NAME_MAX 255
#define RAFS_SYMLINK_MAX 4095

struct rafs_blob {
    vnd_blob_info info;
    struct vnd_blob *blob; /* NULL without a store */
};

/* One error line on its way out of an open. */
struct rafs_error {
    const char *path;
    int *cause;
    char *text;
    size_t len;
};
/* "PATH: what"; sets the cause. Returns -1. */
int rafs_fail(const struct rafs_error *e, int cause, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

struct rafs_chunk { /* one chunk of a file, as its inode tells */
    uint64_t uoff, file_off;
    uint32_t blob, index, size; /* size: bytes of the file in it */
    bool hole;                  /* zeroes, in no blob */
    const uint8_t *record;      /* v5: its chunk record, as stored */
};

/* Takes one chunk record, the number-th of the image. Non-zero: enough. */
typedef int (*rafs_put_record)(void *ctx, uint64_t number, uint32_t blob, const struct blob_chunk *c);

struct rafs_faults; /* rafs/check.c */

/* A version of the format: one C file, one entry of rafs/rafs.c's table. */
struct rafs_version {
    const char *name;
    int (*detect)(const uint8_t *base, uint64_t size);
    /* Superblock and tables; fills info, blobs and the version's own fields. 0 or -1 with a line. */
    int (*open)(struct vnd_rafs *r, const struct rafs_error *e);
    void (*close)(struct vnd_rafs *r); /* frees the version's own fields; may be NULL */
    const struct fs_ops *fs_ops;
    /* Chunk k of a regular file: 1, 0 behind the last, -errno. */
    int (*chunk)(struct vnd_rafs *r, uint64_t ino, uint64_t k, struct rafs_chunk *out);
    /* Calls put for each chunk record of a blob, or (UINT32_MAX) of all. Returns what put returned, 0 at the
     * end. */
    int (*records)(struct vnd_rafs *r, uint32_t only_blob, rafs_put_record put, void *ctx);
    /* v6: entry i of the chunk table as stored: 0, -ENOENT behind the last. */
    int (*record)(struct vnd_rafs *r, uint64_t i, uint32_t *blob, struct blob_chunk *out);
    int (*prefetch)(struct vnd_rafs *r, uint64_t *inos, int max);
    void (*check)(struct vnd_rafs *r, struct rafs_faults *f);
};
extern const struct rafs_version rafs_v5, rafs_v6;

struct v5_numbers;

struct vnd_rafs {
    struct fs fs; /* first: the file system face */
    struct vnd_engine *engine;
    const struct rafs_version *version;
    const uint8_t *base; /* the bootstrap's bytes */
    uint64_t size;
    void *map;
    size_t map_len;
    int map_fd; /* what is mapped, from map_off on */
    uint64_t map_off;
    struct rafs_backing *backing; /* rafs/backing.c */
    struct sigbus_range *guard;
    int from_blob; /* found inside a data blob */
    char *path;
    vnd_store *store;
    vnd_rafs_info info;
    struct rafs_blob *blobs;   /* info.blob_count of them */
    uint32_t own_uid, own_gid; /* of all inodes, unless the image says its own */
    /* v6 */
    uint64_t meta_off;  /* where nid 0 would be */
    uint64_t inode_end; /* inodes and directory data lie below */
    uint64_t inos, fs_blocks;
    uint32_t root_nid;
    uint8_t blkszbits, chunk_bits;
    /* v5 */
    uint64_t inode_table, ext_table; /* where they lie */
    uint32_t slots, ext_count;       /* entries of either */
    struct v5_numbers *numbers;      /* one a blob, NULL: the image numbers its chunks itself */
    /* The tools' index of chunk records by (blob, index), made on first use. */
    pthread_mutex_t index_lock;
    uint32_t *index;
    uint64_t index_count;
};

static inline uint16_t rafs_le16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}
static inline uint32_t rafs_le32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}
static inline uint64_t rafs_le64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}
/* The len bytes at off of the bootstrap, or NULL if they are not all in it. */
static inline const uint8_t *rafs_at(const struct vnd_rafs *r, uint64_t off, uint64_t len)
{
    return off <= r->size && len <= r->size - off ? r->base + off : NULL;
}

/* Names of directory entries, as both versions order and refuse them. */
static inline int rafs_name_compare(const char *a, size_t a_len, const char *b, size_t b_len)
{
    int c = memcmp(a, b, a_len < b_len ? a_len : b_len);

    return c ? c : (a_len > b_len) - (a_len < b_len);
}
static inline bool rafs_name_broken(const char *name, size_t len)
{
    return memchr(name, '/', len) || memchr(name, 0, len);
}
static inline bool rafs_name_is_dots(const char *name, size_t len)
{
    return name[0] == '.' && (len == 1 || (len == 2 && name[1] == '.'));
}

/* ---- rafs/image.c: finds and maps the bootstrap of a file, be it one or a data blob that holds one. */
int rafs_image_map(struct vnd_rafs *r, const struct rafs_error *e);
void rafs_image_unmap(struct vnd_rafs *r);

/* ---- rafs/backing.c */
int rafs_backing_new(struct vnd_rafs *r); /* 0 or -ENOMEM */
void rafs_backing_free(struct vnd_rafs *r);

/* ---- rafs/rafs.c */
/* All chunk records of one blob that pass the bounds (blob_chunks_fn). */
int rafs_blob_chunks(void *ctx, uint32_t blob_index, int (*put)(void *put_ctx, const struct blob_chunk *c),
                     void *put_ctx);

/* ---- rafs/xattr.c: EROFS inline xattrs. body: all bytes between inode and what follows it. */
int rafs_xattr_list(const uint8_t *body, uint32_t body_len, char *buf, size_t cap, size_t *need);
/* Gives a value to getxattr(2)'s caller: 0, or -ERANGE where cap is not 0 and too small. */
int rafs_xattr_give(const uint8_t *value, uint32_t len, char *buf, size_t cap, size_t *need);
int rafs_xattr_get(const uint8_t *body, uint32_t body_len, const char *name, size_t len, char *buf, size_t cap,
                   size_t *need);

#endif
