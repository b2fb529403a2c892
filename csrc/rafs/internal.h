/* rafs/internal.h -- an opened bootstrap, as the files of this folder share it.
 *
 * All values are read in place from the mapping: little-endian, unaligned, and checked where they are used. Opening costs
 * nothing that grows with the tree. A process that can write to the mapped file can change a value between two reads, so
 * a value is loaded once, then checked, and the loaded copy is used.
 *
 * From the bottom: records, xattr, v5_inode, v6_inode, image, check, backing, seek, v5_fs, v6_fs, v6_walk, v5_check, v6_check,
 * v5, v6, rafs, tool.
 */
#ifndef VND_RAFS_INT_H
#define VND_RAFS_INT_H
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "base/base.h"
#include "rafs/rafs.h"

/* Superblock flags, docs/rafs-format.md 2.2. */
#define RAFS_FLAG_NONE 0x1u
#define RAFS_FLAG_LZ4 0x2u
#define RAFS_FLAG_GZIP 0x40u
#define RAFS_FLAG_ZSTD 0x80u
#define RAFS_FLAG_COMPRESS_MASK (RAFS_FLAG_NONE | RAFS_FLAG_LZ4 | RAFS_FLAG_GZIP | RAFS_FLAG_ZSTD)
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
#define RAFS_BLOB_UNKNOWN 0xf000u      /* incompatible bits that are not defined */
#define RAFS_BLOB_INTERNAL 0x80000000u /* must not be on disk */

#define RAFS_CHUNK_RECORD 80 /* bytes, docs/rafs-format.md 2.6 */
#define RAFS_CHUNK_SIZE_MAX (16u << 20)
#define RAFS_CHUNKS_PER_BLOB_MAX (1u << 24)
#define RAFS_BLOB_CSIZE_MAX (1ull << 40)
#define RAFS_BLOB_USIZE_MAX (1ull << 44)
#define RAFS_FILE_MAX (16ull << 30) /* bytes of a bootstrap: far above any real one, and sums cannot overflow */
#define RAFS_NAME_MAX 255
#define RAFS_SYMLINK_MAX 4095

struct rafs_blob {
    vnd_blob_info info;
    struct vnd_blob *blob; /* NULL without a store */
};

/* Where the functions that open an image say what is wrong with it. */
struct rafs_error {
    const char *path;
    struct failure *failure;
};
/* Fills the failure with the cause and "PATH: what". Returns -EINVAL, or -EIO for VND_CAUSE_IO, -EBADMSG for
 * VND_CAUSE_DIGEST. */
int rafs_fail(const struct rafs_error *e, int cause, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
int rafs_no_memory(const struct rafs_error *e); /* the same; -ENOMEM */

/* One chunk of a file, as the file's inode gives it. */
struct rafs_chunk {
    uint64_t uoff, file_off;    /* byte in the uncompressed blob, byte in the file */
    uint32_t blob, index, size; /* size: how many bytes of the file are in it */
    bool hole;                  /* zeroes, in no blob */
    const uint8_t *record;      /* v5: its chunk record, as stored */
};

/* Takes one chunk record, the number-th of the image. Not 0: the walk is to stop. */
typedef int (*rafs_put_record)(void *ctx, uint64_t number, uint32_t blob, const struct blob_chunk *c);

struct rafs_faults; /* rafs/check.c */

/* A version of the format; rafs/rafs.c has a table of them. */
struct rafs_version {
    const char *name;
    bool (*detect)(const uint8_t *base, uint64_t size);
    /* Reads superblock and tables; fills info, blobs and the version's own fields. 0 or -errno with a line. */
    int (*open)(struct vnd_rafs *r, const struct rafs_error *e);
    void (*close)(struct vnd_rafs *r); /* frees the version's own fields; may be NULL */
    const struct fs_ops *fs_ops;
    /* Chunk k of a regular file: 1, 0 behind the last, -errno. */
    int (*chunk)(struct vnd_rafs *r, uint64_t ino, uint64_t k, struct rafs_chunk *out);
    /* Calls put for each chunk record of one blob, or of all blobs (UINT32_MAX), until put stops the walk. Returns what
     * put returned last, or 0. */
    int (*records)(struct vnd_rafs *r, uint32_t only_blob, rafs_put_record put, void *ctx);
    /* v6 only: entry i of the chunk table as stored: 0, -ENOENT behind the last. */
    int (*record)(struct vnd_rafs *r, uint64_t i, uint32_t *blob, struct blob_chunk *out);
    /* Copies at most max inode numbers of the prefetch table. How many. */
    int (*prefetch)(struct vnd_rafs *r, uint64_t *inos, int max);
    /* Walks the whole tree for faults. */
    void (*check)(struct vnd_rafs *r, struct rafs_faults *f);
};
extern const struct rafs_version rafs_v5, rafs_v6;

struct v5_numbers;

struct vnd_rafs {
    struct fs fs; /* first */
    struct vnd_engine *engine;
    const struct rafs_version *version;
    const uint8_t *base; /* the bootstrap's bytes */
    uint64_t size;
    void *map;
    size_t map_len;
    int map_fd; /* the file that is mapped, from map_off on */
    uint64_t map_off;
    struct rafs_backing *backing; /* rafs/backing.c */
    struct sigbus_range *guard;
    bool from_blob; /* the bootstrap was found inside a data blob */
    char *path;
    vnd_store *store;
    vnd_rafs_info info;
    struct rafs_blob *blobs;   /* info.blob_count of them */
    uint32_t own_uid, own_gid; /* owner of all inodes where the image has no owners */
    /* v6 */
    uint64_t meta_off;  /* byte where nid 0 would be */
    uint64_t inode_end; /* inodes and directory data lie below */
    uint64_t inos, fs_blocks;
    uint32_t root_nid;
    uint8_t blkszbits, chunk_bits;
    /* v5 */
    uint64_t inode_table, ext_table; /* bytes where the inode table and the extended blob table start */
    uint32_t slots, ext_count;       /* how many entries each has */
    struct v5_numbers *numbers;      /* one for each blob; NULL: the image numbers its chunks itself */
    /* The tools' index of chunk records by (blob, index), made on first use, under index_lock. */
    pthread_mutex_t index_lock;
    uint32_t *index;
    uint64_t index_count;
    /* rafs/seek.c: blob << 32 | index of chunks of zeroes, sorted; made under index_lock, then unchanged. */
    _Atomic bool zeroes_known;
    uint64_t *zeroes;
    uint32_t zero_count;
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

/* Names of directory entries: how both versions order them, and which names they refuse. */
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

/* ---- rafs/image.c: finds and maps the bootstrap in a file, which is a bootstrap or a data blob that holds one. 0 or
 * -errno with a line. */
int rafs_image_map(struct vnd_rafs *r, const struct rafs_error *e);
void rafs_image_unmap(struct vnd_rafs *r);

/* ---- rafs/backing.c */
int rafs_backing_new(struct vnd_rafs *r); /* 0 or -ENOMEM */
void rafs_backing_free(struct vnd_rafs *r);

/* ---- rafs/records.c */
/* A blob_chunks_fn: gives all chunk records of one blob that lie within the blob. */
int rafs_blob_chunks(void *ctx, uint32_t blob_index, int (*put)(void *put_ctx, const struct blob_chunk *c),
                     void *put_ctx);

/* ---- rafs/seek.c: fs_ops.seek of both versions. */
int64_t rafs_seek(struct fs *fs, uint64_t ino, uint64_t off, bool hole);

/* ---- rafs/xattr.c: EROFS inline xattrs. body: the bytes between the inode's fixed part and its data. */
int rafs_xattr_list(const uint8_t *body, uint32_t body_len, struct fs_buf *out);
/* Gives a value as fs_ops.getxattr does: 0, or -ERANGE where cap is not 0 and too small. */
int rafs_xattr_give(const uint8_t *value, uint32_t len, struct fs_buf *out);
int rafs_xattr_get(const uint8_t *body, uint32_t body_len, const char *name, size_t len, struct fs_buf *out);

#endif
