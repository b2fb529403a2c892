/* store/fetcher.h -- the fetcher's own state: queues (store/fetch.c), streams (store/stream.c), merging
 * (store/merge.c), jobs (store/job.c), miss table (store/miss.c), other processes (store/foreign.c), memory for
 * uncached chunks (store/uncached.c).
 */
#ifndef VND_FETCHER_H
#define VND_FETCHER_H
#include "store/internal.h"
#include "blob/codec.h"

#define FETCH_SHARDS 64
#define FETCH_SLOTS 8          /* jobs under way */
#define FETCH_PREFETCH_SLOTS 6 /* of them prefetch */
#define FETCH_JOB_CHUNKS 4096  /* chunks of a job */
#define FETCH_STREAM_SLOTS 3   /* of them ahead of readers who read in order */
#define FETCH_BACK_BYTES (256u << 10)
#define FETCH_PREFETCH_BYTES (2u << 20)
#define FETCH_BRIDGE_BYTES (64u << 10)
#define FETCH_BATCH_BYTES (1u << 20) /* decoded and waiting for commit */
#define FETCH_TRIES 2

enum job_for { FOR_READER, FOR_PREFETCH, FOR_STREAM };
enum job_chunk { JOB_SKIP, JOB_WANT, JOB_DECODED, JOB_DONE, JOB_BAD };

struct job {
    pthread_mutex_t lock; /* held by feed, chunks, commit and end: usually one thread calls them */
    uint64_t id;          /* 0: free or being built; under fetcher->lock */
    bool reserved;        /* under fetcher->lock */
    struct blob_core *core;
    struct asker asker;
    struct vnd_blob *meta; /* META job: whose table it brings; referenced */
    uint64_t tag;
    int64_t deadline_us;
    uint32_t kind;
    enum job_for whom;
    int64_t began_us, first_us; /* dispatched; its first bytes came (first_bytes of them) */
    uint64_t first_bytes;
    _Atomic bool cancelled;
    _Atomic uint32_t preempt_after;  /* the prefetch job ends behind this chunk, for a reader waits; 0: none does */
    uint32_t first, n;               /* chunk indexes [first, first+n) */
    uint8_t state[FETCH_JOB_CHUNKS]; /* enum job_chunk */
    bool claimed;                    /* units [claim_first, + claim_n) are locked against other processes */
    uint32_t claim_first, claim_n;
    bool unspaced;         /* a chunk could not be written */
    bool lost;             /* chunks were invalidated while they were being committed */
    uint64_t verify_epoch; /* VERIFY: the epoch in which the views were read */
    uint64_t mark_moves;   /* VERIFY: the cache's moves before its chunk map was read */
    bool bad;
    uint64_t coff, clen, fed; /* compressed range and how much of it came */
    uint64_t wasted;          /* part of fed that was for nothing */
    uint64_t pos;             /* blob offset of the next byte to decode */
    uint32_t cursor;          /* next chunk to decode, relative to first */
    uint8_t *pend;            /* bytes that are not decoded yet */
    size_t pend_off, pend_len, pend_cap;
    uint8_t *scratch; /* decoded chunks */
    size_t scratch_len, scratch_cap;
    uint8_t *kept; /* the same chunks as they are stored, for a cache that holds them so */
    size_t kept_len, kept_cap;
    uint8_t *batch; /* the last batch that was decoded; batch_id 0: none */
    size_t batch_cap;
    uint8_t *clear; /* an encrypted chunk without its cipher */
    size_t clear_cap;
    uint32_t batch_id;
    struct {
        uint32_t rel, usize;
        size_t at, kept_at;
    } *views;
    uint32_t views_n, views_cap;
    struct codec *codec;
};

struct want_range {
    struct want_range *next;
    struct blob_core *core;
    struct asker asker;
    uint32_t at, end;
    uint64_t tag;
    bool busy, cancelled; /* a thread works on it and holds no lock: it stays in the list */
};

struct foreign {
    struct foreign *next;
    struct blob_core *core;
    uint32_t index;
    struct vnd_blob *meta;                       /* referenced: its stored chunk table, not a chunk */
    void (*done)(struct vnd_blob *b, int error); /* of meta: another process has fetched it, or will not */
};

struct uncached_chunk;

struct fetcher {
    struct vnd_engine *engine;
    pthread_mutex_t lock; /* queues, slots, windows */
    pthread_cond_t some;
    _Atomic bool down;
    struct want *demand, **demand_tail;
    struct want_range *ahead, *prefetch;
    uint32_t running, running_for[3]; /* by enum job_for */
    uint64_t next_id;
    struct job slots[FETCH_SLOTS];
    struct miss_shard shards[FETCH_SHARDS];
    /* store/foreign.c */
    pthread_mutex_t foreign_lock;
    pthread_cond_t foreign_some;
    struct foreign *foreign;
    bool foreign_started, foreign_down;
    pthread_t foreign_thread;
    /* store/uncached.c */
    pthread_mutex_t uncached_lock;
    struct uncached_chunk *uncached, *uncached_last; /* newest first */
    size_t uncached_bytes;
    /* store/upkeep.c */
    pthread_mutex_t upkeep_lock;
    pthread_cond_t upkeep_some;
    bool upkeep_started, upkeep_down;
    pthread_t upkeep_thread;
};

/* store/fetcher.c */
int fetcher_new(struct vnd_engine *e); /* 0 or -errno */
/* From now on vnd_job_next returns -ESHUTDOWN; waiting readers fail with ESHUTDOWN. */
void fetcher_shutdown(struct vnd_engine *e);
void fetcher_free(struct vnd_engine *e);
/* store/foreign.c */
void foreign_add(struct fetcher *f, struct blob_core *c, uint32_t index);
/* done is called once, from the foreign thread or here, with 0 or an errno. */
void foreign_add_meta(struct fetcher *f, struct vnd_blob *b, void (*done)(struct vnd_blob *b, int error));
void foreign_stop(struct fetcher *f);
/* store/upkeep.c */
void upkeep_start(struct fetcher *f);
void upkeep_stop(struct fetcher *f);
/* store/uncached.c */
void uncached_free(struct fetcher *f);
/* store/job.c */
void job_init(struct job *j);
void job_begin(struct job *j, uint64_t id); /* dispatches a job that was built; under fetcher->lock */
void job_wipe(struct job *j);               /* frees its buffers */
/* store/merge.c: makes slot's job of a chunk and its neighbours before chunk end. Returns false if there is nothing
 * to do for the chunk. The caller has reserved the slot. */
bool job_build(struct fetcher *f, int slot, struct blob_core *c, uint32_t index, uint32_t end, bool waited,
               uint32_t window_bytes);
/* store/want.c */
void want_free(struct want *w);            /* drops its references */
void ranges_free(struct want_range *list); /* likewise */
/* Slots; fetcher->lock is held. */
bool slot_free(const struct fetcher *f, enum job_for whom); /* whether a slot is free */
int slot_reserve(struct fetcher *f, enum job_for whom);     /* its number, or -1 */
void slot_release(struct fetcher *f, struct job *j);
void want_release_slot(struct fetcher *f, struct job *j);
void want_drop_ranges(struct blob_core *c);
/* Queues a range of chunks that no reader waits for. 0 or -ENOMEM. */
int want_later(struct blob_core *c, enum job_for whom, uint32_t first, uint32_t end, uint64_t tag, struct asker asker,
               bool head);
/* The same for a stream, with fetcher->lock held. */
int want_stream(struct blob_core *c, uint32_t first, uint32_t end, struct asker asker);
void want_wake(struct fetcher *f); /* wakes threads in vnd_job_next after a change */

#endif
