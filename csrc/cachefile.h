/* cachefile.h -- one blob's bytes on this node: data file, chunk map R (Nydus's, a hint), side file with T (these
 * bytes matched their digest, in this file, this boot), D (T that survives a power loss) and what each chunk is
 * bound to.
 *
 * Files in the work directory: ID.blob.data, ID.blob.data.chunk_map (rafs-format 6); .virtiofsd-nydus/ID.vnd:
 *   0     header 4096, struct side_header
 *   4096  T, one bit per chunk, LSB first, u64 words; then D alike
 *   up(4096) then one 48-byte struct side_bound per chunk
 * Order in: bytes -> T (release) -> R. Order out: epoch -> T -> bytes -> epoch.
 * Where locks or shared maps do not work across hosts (network file systems), or nothing can be written, T is
 * private memory: everything still works, and is verified again next time.
 */
#ifndef VND_CACHEFILE_H
#define VND_CACHEFILE_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "blobtable.h"

struct vnd_engine;

struct side_bound {         /* what T's bit of a chunk vouches for */
    uint8_t digest[32];
    uint64_t uoff;
    uint32_t usize;
    uint32_t state;         /* 0 nothing yet, 1 bound */
};

struct side_header {
    char magic[8];
    uint32_t version, n;
    char boot_id[40];
    uint64_t dev, ino, btime_ns, size_bytes;    /* of the data file */
    _Atomic uint64_t epoch;                     /* odd: bytes are being taken away */
    _Atomic uint64_t ctime_ns;                  /* of the data file after the last write of ours */
    uint32_t retired, pad;
};

struct cachefile {
    struct vnd_engine *engine;
    char id[VND_ID_MAX + 1];
    int dir_fd;                     /* borrowed */
    int side_dir_fd;                /* borrowed, -1: T is private */
    int data_fd;                    /* -1: nothing on disk, bytes live in memory only */
    int side_fd;                    /* -1: T is private */
    bool writable;
    uint32_t n;
    uint64_t size_bytes;
    struct side_header *head;
    size_t side_map_bytes;
    _Atomic uint64_t *t, *d;
    _Atomic uint8_t *r;             /* NULL: none */
    uint8_t *r_map;
    size_t r_map_bytes;
    struct sigbus_range *guard_side, *guard_r;
    _Atomic bool nowait_missing;    /* RWF_NOWAIT is not supported here */
    _Atomic uint64_t unsynced_bytes, write_behind_bytes;
    _Atomic bool space_said;
    pthread_mutex_t lock;           /* T is set and taken away, and D set, under it */
};

struct cachefile_cfg {
    struct vnd_engine *engine;
    int dir_fd, side_dir_fd;
    bool writable;                  /* the directory is */
    const char *id;
    uint32_t n;
    uint64_t size_bytes;
};

/* 0, or -errno with cause and line. Creates what is missing. */
int cachefile_open(struct cachefile **out, const struct cachefile_cfg *cfg, int *cause, char *err, size_t err_len);
void cachefile_close(struct cachefile *c);
/* With c->lock held: binds T's bits to what a table says of its chunks. -EEXIST with a line: the side file is in
 * use by somebody whose image says otherwise. Without a shared side file: 0. */
int cachefile_bind(struct cachefile *c, const struct blobtable *t, char *err, size_t err_len);

/* The ready test. */
static inline bool cachefile_ready(const struct cachefile *c, uint32_t i)
{
    return atomic_load_explicit(&c->t[i >> 6], memory_order_acquire) >> (i & 63) & 1;
}
static inline uint64_t cachefile_epoch(const struct cachefile *c)
{
    return atomic_load_explicit(&c->head->epoch, memory_order_acquire);
}
/* After the bytes were read: they may be given out only if the epoch is still the (even) one from before. */
static inline bool cachefile_epoch_holds(const struct cachefile *c, uint64_t epoch)
{
    atomic_thread_fence(memory_order_acquire);
    return !(epoch & 1) && atomic_load_explicit(&c->head->epoch, memory_order_relaxed) == epoch;
}
/* R's bit: somebody, perhaps not us, says the chunk is in the data file. */
bool cachefile_doubted(const struct cachefile *c, uint32_t i);
uint64_t cachefile_count_ready(const struct cachefile *c);

/* Writes bytes of chunks at uoff. 0 or -errno (-ENOSPC, -EROFS...: said once). */
int cachefile_write(struct cachefile *c, uint64_t uoff, const void *buf, size_t len);
/* With c->lock held: the chunk's bytes are in the file and were checked, all within the present epoch. */
void cachefile_set_ready(struct cachefile *c, uint32_t i);
/* Call once after a batch of writes in [low, high) of the data file and their set_ready. */
void cachefile_settle(struct cachefile *c, uint64_t low, uint64_t high);
/* 0: all len bytes were read; -EIO otherwise. Blocks. */
int cachefile_read(struct cachefile *c, uint64_t uoff, void *buf, size_t len);
/* The file lost bytes or was changed under us: nothing in it is trusted any more. */
void cachefile_distrust(struct cachefile *c, const char *why);
/* The same without words and with c->lock held (or nobody else there yet); keep_durable: what D holds stays
 * trusted. */
void cachefile_take_away(struct cachefile *c, bool keep_durable);
/* Looks whether the data file still has its size; sizes it anew and distrusts it otherwise. */
void cachefile_examine(struct cachefile *c);
/* Makes what is trusted durable, if there is enough of it or force. */
void cachefile_sync(struct cachefile *c, bool force);

#endif
