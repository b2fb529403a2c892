/* cache/cache.h -- one blob's files on this node, and which chunks in them are trusted.
 *
 * Files in the cache directory: ID.blob.data, or ID.blob.raw when it holds chunks as the blob stores them, at the blob's own
 * offsets; ID.blob.data.chunk_map for either, as Nydus has it (docs/rafs-format.md): a chunk's bit there says "marked", a
 * hint that the bytes may be there. .virtiofsd-nydus/ID.vnd, or ID.raw.vnd, is ours, the side file:
 *   0     header, 4096 bytes: struct side_header
 *   4096  trusted bits, one a chunk, LSB first, words of 64; then durable bits alike
 *   up(4096) then one struct side_bound (48 bytes) a chunk: what its trusted bit vouches for
 * Trusted: these bytes matched their digest, in this file, since this boot. Durable: trusted, and a power cut does not
 * change that. Where locks and shared mappings do not work across hosts (network file systems), or nothing can be written,
 * the bits are private memory: all works, and is checked again by the next process.
 *
 * A file of the blob's own name is written only by those that know it to be their table's: the side file says so, or where that
 * was lost an attribute of the data file (CACHE_XATTR), or it is new. Else it is another program's (nydusd's), which may serve
 * from it: it is read (lower files), and chunks go to files that are named after the table.
 *
 * Order in: bytes, trusted bit (release), mark. Order out: epoch odd, trusted bit, bytes, epoch even.
 * Threads: any. cachefile_ready and cachefile_epoch take no lock. One thread at a time moves (move.c).
 * Locks: c->lock (bits are set and cleared under it), then the side file's claims (claim.h). c->write_lock alone.
 * Ownership: the store's core owns its cachefile; directories are borrowed from the store.
 * May use: base, blob.
 */
#ifndef VND_CACHEFILE_H
#define VND_CACHEFILE_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "blob/table.h"

struct vnd_engine;

struct side_bound { /* what a chunk's trusted bit vouches for */
    uint8_t digest[32];
    uint64_t off; /* in the data file */
    uint32_t len;
    uint32_t state; /* 0 nothing yet, 1 bound; of a stored chunk also 2 if it is compressed, and usize << 2 */
};

struct side_header {
    char magic[8];
    uint32_t version, n;
    char boot_id[40];
    uint64_t dev, ino, btime_ns, size_bytes; /* of the data file */
    _Atomic uint64_t epoch;                  /* odd: chunks are being invalidated */
    _Atomic uint64_t ctime_ns;               /* change time of the data file after our last write */
    uint32_t retired;                        /* of earlier versions, likewise adopted: not 0: another program's file */
    _Atomic uint32_t writing;                /* our writes under way, and those whose process died */
    _Atomic uint64_t write_ns;               /* wall clock when the latest of them began */
    uint32_t adopted;
};

struct cachefile_at { /* which file a name led to when it was opened; all 0: none */
    uint64_t dev, ino;
};

/* What the files are called: the blob's id, or ID.NAME where another table has the files of that name (NAME: blobtable_name). */
#define CACHE_NAME_MAX (VND_ID_MAX + 1 + BLOBTABLE_NAME_LEN)
#define CACHE_MAP_HEADER 4096u /* bytes before the bits of a chunk map, docs/rafs-format.md 6.2 */
#define CACHE_XATTR \
    "user.virtiofsd-nydus.table" /* of a data file with the blob's own name: blobtable_name of its table */
#define CACHE_XATTR_OPEN "-" /* its value while it has none: made by oci/cachefill.py, for the first table that comes */

struct cachefile {
    struct vnd_engine *engine;
    char id[CACHE_NAME_MAX + 1]; /* as it was opened */
    bool stored;                 /* it holds chunks as the blob stores them: every read decodes */
    int dir_fd;                  /* borrowed */
    int side_dir_fd;             /* borrowed, -1: the trusted bits are private */
    /* A descriptor's number and a map's address stay when the files behind them are exchanged (cache/move.c). */
    _Atomic int data_fd; /* -1: nothing on disk, bytes live in memory only */
    _Atomic int side_fd; /* -1: the trusted bits are private */
    _Atomic bool writable;
    _Atomic int lack_errno;                       /* why it is not */
    struct cachefile_at data_at, side_at, map_at; /* for cachefile_open and the one thread that moves */
    bool replaced_said;                           /* likewise */
    _Atomic uint64_t moves;                       /* odd: files are being exchanged */
    bool named;                                   /* after its table: no other table has files of that name */
    const vnd_blob_info *info;                    /* borrowed */
    uint32_t n;
    uint64_t size_bytes;
    struct side_header *head;
    size_t side_map_bytes;
    _Atomic uint64_t *trusted, *durable;
    _Atomic uint8_t *marked; /* private memory where there is no file */
    uint8_t *marked_map;
    size_t marked_map_bytes;
    /* Another program's files, read only: what is marked there is checked and then copied. */
    _Atomic int lower_fd; /* -1: none */
    uint8_t *lower_map;   /* its chunk map; private memory where there is none */
    struct sigbus_range *guard_side, *guard_marked, *guard_lower;
    _Atomic bool nowait_missing; /* RWF_NOWAIT is not supported here */
    _Atomic uint64_t unsynced_bytes;
    bool sync_due; /* write-out has begun; for the upkeep thread */
    _Atomic bool space_said;
    pthread_mutex_t lock;       /* trusted is set and cleared, and durable set, under it */
    uint64_t commit_epoch;      /* under lock: that of the commit under way */
    pthread_mutex_t write_lock; /* one thread writes at a time: others would spin in the kernel */
};

struct cachefile_cfg {
    struct vnd_engine *engine;
    int dir_fd, side_dir_fd;
    bool writable; /* the directory is */
    const char *id;
    const char *lower_id;          /* of another program's files that may hold chunks, NULL: there are none */
    bool named;                    /* id is ID.NAME */
    const vnd_blob_info *info;     /* borrowed for the cachefile's life */
    const struct blobtable *table; /* the one that cachefile_bind gets first */
    bool stored;
    bool quiet; /* what is missing was said before */
    uint32_t n;
    uint64_t size_bytes; /* of the data file */
};

struct cachefile_names {
    char data[CACHE_NAME_MAX + 16], map[CACHE_NAME_MAX + 32], side[CACHE_NAME_MAX + 16];
};
void cachefile_names(struct cachefile_names *out, const char *id, bool stored);

/* 0, or -errno with cause and line. Creates what is missing. The files are left as they are with -EEXIST: they are those of
 * another table of the blob; and with -EBUSY: it is not known whose table they are for, so another program may use them. */
int cachefile_open(struct cachefile **out, const struct cachefile_cfg *cfg, struct failure *f);
void cachefile_close(struct cachefile *c);
/* Where the bindings begin in the side file of a blob of n chunks. */
size_t cachefile_bound_offset(uint32_t n);
/* With c->lock held: binds the trusted bits to what a table says of its chunks. -EEXIST with a line: they are bound to what
 * another table says, or its chunks share bytes with bound ones. Nothing is ever bound anew: the kernel or another process
 * may read the file. Without a shared side file: 0. */
int cachefile_bind(struct cachefile *c, const struct blobtable *t, struct failure *f);

/* Where a chunk's bytes are in the data file. */
static inline uint64_t cachefile_off(const struct cachefile *c, const struct blobtable_chunk *k)
{
    return c->stored ? k->coff : k->uoff;
}
static inline uint32_t cachefile_len(const struct cachefile *c, const struct blobtable_chunk *k)
{
    return c->stored ? k->csize : k->usize;
}

/* The ready test. */
static inline bool cachefile_ready(const struct cachefile *c, uint32_t i)
{
    return atomic_load_explicit(&c->trusted[i >> 6], memory_order_acquire) >> (i & 63) & 1;
}
/* A number that changes when chunks are invalidated (the side file's epoch, by any process) and when the files
 * themselves are exchanged (moves, of this process: another side file may well have the same epoch). Odd: trust
 * nothing. */
static inline uint64_t cachefile_epoch(const struct cachefile *c)
{
    uint64_t moves = atomic_load_explicit(&c->moves, memory_order_acquire);
    return (atomic_load_explicit(&c->head->epoch, memory_order_acquire) + (moves << 32)) | (moves & 1);
}
/* After the bytes were read: they may be given out only if the epoch is still the (even) one from before. */
static inline bool cachefile_epoch_holds(const struct cachefile *c, uint64_t epoch)
{
    atomic_thread_fence(memory_order_acquire);
    return !(epoch & 1) && cachefile_epoch(c) == epoch;
}
/* Whether the chunk is marked: a process, perhaps a nydusd, says that it is in the data file or in the lower one. */
bool cachefile_marked(const struct cachefile *c, uint32_t i);
/* The chunk is marked, and its bytes are in the lower file. */
bool cachefile_is_below(const struct cachefile *c, uint32_t i);
uint64_t cachefile_count_ready(const struct cachefile *c);

/* What to do about an errno of the cache's disk, as the end of a line. */
const char *cachefile_cure(int err);
/* Writes bytes of chunks at off. 0 or -errno (-ENOSPC, -EROFS...: said once). */
int cachefile_write(struct cachefile *c, uint64_t off, const void *buf, size_t len);
/* Between the two calls chunks are made ready whose bytes are in the file and were checked, all within epoch: true. No
 * process invalidates meanwhile. false: the epoch has changed, nothing is held. c->lock is held in between. */
bool cachefile_commit_begin(struct cachefile *c, uint64_t epoch);
void cachefile_set_ready(struct cachefile *c, uint32_t i);
void cachefile_commit_end(struct cachefile *c);
/* Call once after a batch of writes of so many bytes and their set_ready. */
void cachefile_note_written(struct cachefile *c, uint64_t bytes);
/* 0: all len bytes were read; -EIO otherwise. Blocks. below: from the lower file. */
int cachefile_read(struct cachefile *c, uint64_t off, void *buf, size_t len);
int cachefile_read_marked(struct cachefile *c, bool below, uint64_t off, void *buf, size_t len);
/* The file lost bytes or was changed under us: nothing in it is trusted any more. */
void cachefile_distrust(struct cachefile *c, const char *why);
/* The same without a line in the log. c->lock is held, or no other thread has c yet. keep_durable: durable chunks
 * stay trusted. */
void cachefile_invalidate(struct cachefile *c, bool keep_durable);
/* If the data file no longer has its size: gives it its size again and invalidates all chunks. */
void cachefile_examine(struct cachefile *c);
/* Begins to write out bytes that are not durable, if there are enough of them or force is set. True: call
 * cachefile_sync a while later. An fdatasync that has much to write delays threads that write meanwhile. */
bool cachefile_write_out(struct cachefile *c, bool force);
/* Makes what is trusted durable. */
void cachefile_sync(struct cachefile *c);

/* ---- cache/move.c: the files were removed or replaced */
enum cachefile_replaced {
    CACHEFILE_IN_PLACE,
    CACHEFILE_DATA_REPLACED,
    CACHEFILE_SIDE_REPLACED,
    CACHEFILE_MAP_REPLACED
};
/* Tells which of the names in cfg's directories no longer leads to the open file. A few fstatat; one thread at a
 * time. */
enum cachefile_replaced cachefile_find_replaced(const struct cachefile *c, const struct cachefile_cfg *cfg);
/* Whether a file could not be opened or made, because space or rights were missing, and could be now. */
bool cachefile_lacks(const struct cachefile *c, const struct cachefile_cfg *cfg);
enum cachefile_move_how {
    CACHEFILE_MOVE,
    CACHEFILE_MOVE_IF_BETTER /* only if the new files have what c lacks */
};
/* Opens the files that the names lead to now (makes missing ones), binds them to t, and exchanges them for those of
 * c. Readers of c go on meanwhile: a read that meets the exchange is done again. 0: exchanged; 1: not; -errno with cause
 * and line: c stays as it is. Blocks. */
int cachefile_move(struct cachefile *c, const struct cachefile_cfg *cfg, const struct blobtable *t,
                   enum cachefile_move_how how, struct failure *f);

#endif
