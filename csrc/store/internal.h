/* store/internal.h -- inside of the blob store: what store/store.c, store/miss.c, store/fetch.c, store/job.c and
 * store/page.c share.
 *
 * Three layers: a blob_core per (work directory, blob id) with the cache file and the union of what the images say of
 * the blob; a vnd_blob per image that names it, with that image's own chunk table, so that no image is given bytes that
 * were checked against another image's digest; store_units, the chunks that a reader waits for or a job fetches.
 *
 * Locks, in the order in which they may be held together: a job's lock; core->load_lock; engine->lock; a shard's
 * lock or fetcher->lock; store->lock; core->lock. store_wait.wake is called with no lock held that a reader's thread
 * may take.
 */
#ifndef VND_BLOB_H
#define VND_BLOB_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "blob/table.h"
#include "cache/cache.h"
#include "cache/claim.h"
#include "base/base.h"
#include "store/store.h"
#include "store/stream.h"

struct vnd_store {
    struct vnd_store *next; /* engine's list, under its lock */
    struct vnd_engine *engine;
    uint32_t refs; /* under the engine's lock */
    char *path;
    int dir_fd;              /* its number stays when the directory is exchanged */
    _Atomic int side_dir_fd; /* likewise; -1: nothing can be shared */
    _Atomic bool writable;
    bool network;      /* on a network file system */
    bool compressed;   /* chunks are kept as they are stored, where that is possible */
    uint64_t dev, ino; /* under the engine's lock */
    struct store_seen {
        uint64_t ino;
        int64_t mtime_ns;
    } dir_seen, side_seen;     /* when the files were last looked at; store/upkeep.c's */
    bool gone_said, side_said; /* store/upkeep.c's */
    pthread_mutex_t lock;
    struct blob_core *cores;
    struct claim_wake wake;
};

enum unit_state { UNIT_QUEUED, UNIT_CLAIMED, UNIT_FOREIGN, UNIT_OTHER };

/* A chunk that is not ready and that a reader wants or a job fetches. Under its shard's lock. */
struct store_unit {
    struct store_unit *next; /* bucket */
    struct blob_core *core;
    uint32_t index;
    uint8_t state;    /* enum unit_state */
    uint8_t tries;    /* how often its bytes were wrong or did not come */
    bool wanted;      /* a reader asked for it, not only a merge or prefetch */
    bool overdue;     /* the process that has claimed it takes too long: it is fetched without a claim */
    bool force_fetch; /* the data file's bytes of it were found wrong */
    bool failed;      /* an attempt failed that another may mend: core->last_failure says how */
    int16_t slot;     /* the job that has it, -1 none */
    int64_t deadline_us;
    struct asker asker; /* the image that asked first */
    uintptr_t session;  /* the one that asked last: the chunk stands in its lane too */
    struct store_wait *waiters;
};

struct miss_shard {
    pthread_mutex_t lock;
    struct store_unit *bucket[16];
} __attribute__((aligned(64)));

struct blob_core {
    struct blob_core *next; /* store's list */
    struct vnd_store *store;
    struct vnd_engine *engine;
    vnd_blob_info info; /* as the first image has it */
    char table_name[BLOBTABLE_NAME_LEN +
                    1];       /* of the table whose files it has; "": the files with the blob's own name */
    _Atomic bool meta_cached; /* the places of its chunks come from ID.blob.meta of the cache directory */
    _Atomic bool apart;       /* table_name is set: does not change but once, with load_lock held */
    bool below;          /* the files with the blob's own name are another program's, and are read; set before apart */
    uint32_t refs;       /* under store->lock */
    _Atomic bool closed; /* no image names it any more */
    pthread_mutex_t load_lock; /* one table is loaded at a time */
    pthread_mutex_t lock;      /* of the next two */
    struct vnd_blob *blobs;
    struct failure last_failure;       /* of a fetch that is tried again */
    struct cachefile *cache;           /* set once, before table */
    bool stored;                       /* likewise: the cache holds chunks as they are stored */
    _Atomic(struct blobtable *) table; /* union of all images' tables */
    struct blobtable *tables;          /* all that were ever published there; freed with the core */
    struct stream streams[STREAMS];
    uint64_t stream_clock;  /* under fetcher->lock */
    _Atomic uint32_t marks; /* streams that have one: a read that meets none looks no further */
    struct link_pace pace;
    _Atomic uint32_t uncached; /* chunks held in memory because they could not be written */
};

/* How a blob's chunk table is loaded (store/load.c). Under the lock of the unit's shard, but for what is the load's:
 * one load runs at a time, on a pool thread. */
struct table_load {
    struct store_unit unit; /* pseudo-unit META(blob): readers wait on it for the table */
    bool running;           /* a pool thread is in the image's chunks function */
    bool fetching;          /* the stored chunk table is asked for */
    uint8_t *raw;           /* the stored chunk table as it came, for the load that asked for it */
    size_t raw_len;
    uint8_t raw_tries;  /* stored tables asked for again since a load last ended for good; the load's */
    bool claim_overdue; /* the process that has claimed the stored table takes too long; the load's */
    int claim_fd;       /* our claim, held while the stored table is fetched; -1: none; the load's */
    char *beside;       /* a directory that may hold the blob's ID.blob.meta, or NULL; set before the first load */
    int failed_errno;   /* why the table cannot be used; 0: no reason known */
    int64_t retry_us;   /* a table that failed is not looked at again before this */
    pthread_cond_t ended;
};

struct vnd_blob {
    _Atomic(struct blobtable *) table; /* this image's; NULL until loaded and found free of contradiction */
    struct blobtable *own;             /* table, where it is not one of the core's: freed with the blob */
    struct cachefile *cache;           /* set before table */
    _Atomic(struct blob_core *) core;  /* changes before table is set, never after: blob_set_apart */
    struct vnd_blob *next;             /* core's list */
    _Atomic uint32_t refs;
    vnd_blob_info info;
    _Atomic uint32_t amplify_bytes; /* stream_miss */
    _Atomic uint32_t source;        /* vnd_blob_set_source */
    blob_chunks_fn chunks;
    void *ctx;
    struct table_load load;
    bool detached; /* no image holds it any more; under the lock of the load's shard */
};

static inline struct asker asker_of(const struct vnd_blob *b, uintptr_t session)
{
    return (struct asker){ (uintptr_t)b, session, atomic_load_explicit(&b->source, memory_order_relaxed) };
}

/* ---- store/store.c */
/* Returns whether the work directory exists. If the directory, or our side directory in it, was removed and made
 * anew, uses the new one from now on. retry: tries again to open or make what is missing. One thread at a time. */
bool store_follow(struct vnd_store *s, bool retry);
void core_ref(struct blob_core *c);
void core_unref(struct blob_core *c);
void blob_ref(struct vnd_blob *b);
void blob_unref(struct vnd_blob *b);
/* What the core's files are called. */
#define CORE_NAME_MAX (CACHE_NAME_MAX + 1)
void core_name(const struct blob_core *c, char out[CORE_NAME_MAX]);
/* ---- store/blob.c */
/* The image's table contradicts what the blob's files are bound to: gives b a core whose files are named after own as well.
 * The load's thread. 0 or -errno. */
int blob_set_apart(struct vnd_blob *b, const struct blobtable *own, bool below);
/* The core's files were found to be another's: makes files named after its own table, and reads and writes those from now on.
 * below: the others are another program's, and what they hold is of use. With core->load_lock held, on a core that is not
 * apart. 0, or -errno with cause and line. */
int core_set_apart(struct blob_core *c, bool below, struct failure *f);
/* ---- store/load.c */
/* Has the blob's chunk table loaded by a pool thread, unless it is loaded. */
void blob_want_load(struct vnd_blob *b);
/* A chunk has wrong bytes for good: if its place comes from the cached table, that is removed. True: it was. */
bool core_drop_meta(struct blob_core *c);
/* Takes over the stored chunk table that a META job brought, or the job's errno. raw NULL and error 0: another
 * process has fetched it, look again. */
void blob_take_raw(struct vnd_blob *b, uint8_t *raw, size_t len, int error);
/* A META job failed in a way that may pass: its table is asked for again, not before not_before_us. 0 or -errno. */
int blob_defer_raw(struct vnd_blob *b, int64_t not_before_us);
/* name is cfg's: it lives as long. */
void core_cache_cfg(const struct blob_core *c, char name[CORE_NAME_MAX], struct cachefile_cfg *cfg);
/* ---- store/serve.c */
/* A place in the reader's memory. */
struct cursor {
    const struct iovec *iov;
    int n, i;
    size_t off;
};
/* Puts len bytes of src there; src NULL: zeroes. 0, or -EINVAL: there is no room. */
int cursor_put(struct cursor *c, const uint8_t *src, size_t len);
/* Reads extents whose blobs' tables are loaded. Returns the bytes read, -EAGAIN (not in the page cache; with nowait
 * alone), -ENODATA (extent *missing is not ready), or -errno. */
int64_t store_serve(const struct extent *ext, int n, const struct iovec *iov, int iov_n, bool nowait, int *missing);

/* ---- store/miss.c: units and waiters */
struct fetcher;
struct miss_shard *miss_shard_of(struct fetcher *f, const void *key, uint32_t index);
/* Links w (may be NULL) on a chunk and asks for the chunk if no reader has. 0; 1: the chunk is ready after all and w
 * is not linked; or -ENOMEM, -ESHUTDOWN. */
int miss_want(struct blob_core *c, uint32_t index, struct store_wait *w, int64_t deadline_us, struct asker asker);
/* Links w on a pseudo-unit whose shard's lock is held. */
void miss_link(struct miss_shard *s, struct store_unit *u, struct store_wait *w);
/* Detaches all waiters of a unit, its shard's lock held; miss_wake calls them after it was released. */
struct store_wait *miss_detach(struct store_unit *u, int err);
void miss_wake(struct store_wait *list);
/* The job in slot takes the chunk. create: also a chunk that no reader asked for. */
enum miss_take { MISS_TAKEN, MISS_READY, MISS_BUSY, MISS_ABSENT };
enum miss_take miss_take(struct blob_core *c, uint32_t index, int slot, bool create, bool *wanted, bool *force_fetch);
/* Whether a chunk is to be fetched without a claim. */
bool miss_is_overdue(struct blob_core *c, uint32_t index);
/* The chunk is ready (err 0) or given up: wakes its waiters, forgets the unit. */
void miss_finish(struct blob_core *c, uint32_t index, int err);
/* Gives a chunk back. If a reader wants it and it was tried less than max_tries times, asks for it again and returns
 * true. Otherwise its readers fail with err (0: they look again); returns false. */
#define MISS_ANY_TRIES UINT32_MAX
enum miss_flags {
    MISS_COUNTS = 1,  /* this try counts: its bytes were wrong, or did not come */
    MISS_OVERDUE = 4, /* the process that has claimed it takes too long: do not wait for it any more */
    MISS_FORCE = 2    /* the data file's bytes are wrong: fetch, do not verify */
};
bool miss_retry(struct blob_core *c, uint32_t index, uint32_t max_tries, uint32_t flags, int err);
/* An attempt failed that another may mend: the chunk is asked for again, not before not_before_us, if a reader still has
 * time for it. */
void miss_defer(struct blob_core *c, uint32_t index, int64_t not_before_us);
/* Looks up a chunk that was queued. Forgets it if its deadline has passed and no reader waits for it any more. */
enum miss_state { MISS_QUEUED, MISS_EXPIRED, MISS_GONE };
enum miss_state miss_look(struct blob_core *c, uint32_t index, int64_t now);
/* Another process fetches the chunk. Returns true if readers wait for it here; false: none does, and it is
 * forgotten. */
bool miss_leave(struct blob_core *c, uint32_t index);
void miss_fail_core(struct blob_core *c, int err);
void miss_fail_all(struct fetcher *f, int err);

/* ---- store/want.c: queues */
struct want {
    struct want *next;
    struct blob_core *core;
    uint32_t index;
    int64_t deadline_us, not_before_us;
    struct source *source; /* referenced */
    struct asker asker;
    struct vnd_blob *meta; /* referenced: its stored chunk table is wanted, not a chunk */
};
/* Asks for a blob's stored chunk table, before everything else: readers of all its chunks wait for it. not_before_us: not
 * before then (0: now). 0 or -ENOMEM. */
int want_push_meta(struct vnd_blob *b, int64_t not_before_us);
/* Asks for a chunk; head: before what its session has asked for already. 0 or -ENOMEM. */
int want_push(struct blob_core *c, uint32_t index, int64_t deadline_us, struct asker asker, bool head);
/* The same, not before not_before_us. */
int want_defer(struct blob_core *c, uint32_t index, int64_t deadline_us, struct asker asker, int64_t not_before_us);
/* Drops what is queued for a closed core. Its jobs see for themselves that it is closed. */
void want_purge(struct blob_core *c);
/* The ranges that asker's image has queued for a core are another core's. The caller holds references on both. */
void want_move_ranges(struct blob_core *from, struct blob_core *to, struct asker asker);
void want_promote(struct fetcher *f, int slot, uint32_t index);

/* ---- store/page.c */
/* Parks w until the extents' bytes were read off the queue thread. 0 or -ENOMEM. */
int page_park(struct vnd_engine *e, struct store_wait *w, const struct extent *ext, int n);

/* ---- store/uncached.c: chunks that could not be written, kept for a moment */
int uncached_put(struct blob_core *c, uint32_t index, const uint8_t *data, size_t len);
struct store_buf *uncached_get(struct blob_core *c, uint32_t index); /* referenced, or NULL */
void uncached_drop(struct blob_core *c);
/* Writes the chunks in memory to the cache file, as far as there is room. core->load_lock is held. */
void uncached_flush(struct blob_core *c);

#endif
