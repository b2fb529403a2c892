/* store/fetcher.h -- the fetcher's own state: queues (store/fetch.c), streams (store/stream.c), merging
 * (store/merge.c), jobs (store/job.c), miss table (store/miss.c), other processes (store/foreign.c), memory for
 * uncached chunks (store/uncached.c).
 */
#ifndef VND_FETCHER_H
#define VND_FETCHER_H
#include "store/internal.h"
#include "blob/codec.h"

#define FETCH_SHARDS 64
#define FETCH_SLOTS 64         /* jobs under way, of all sources */
#define FETCH_SOURCE_SLOTS 8   /* of one source */
#define FETCH_FIRST_SLOTS 1    /* more, for a reader whose session has no job under way there */
#define FETCH_PREFETCH_SLOTS 6 /* of a source's: prefetch */
#define FETCH_STREAM_SLOTS 3   /* of a source's: ahead of readers who read in order */
#define FETCH_JOB_CHUNKS 4096  /* chunks of a job */
#define FETCH_BACK_BYTES (256u << 10)
#define FETCH_PREFETCH_BYTES (2u << 20)
#define FETCH_BRIDGE_BYTES (64u << 10)
#define FETCH_BATCH_BYTES (1u << 20) /* decoded and waiting for commit */
#define FETCH_TRIES 2
#define SOURCE_CACHE UINT32_MAX   /* number of the source of jobs that check what is in the cache: no server is asked */
#define SOURCE_NO_MEMORY_US 10000 /* a want that no lane could be made for is tried again after this */

enum job_for { FOR_READER, FOR_PREFETCH, FOR_STREAM };
enum job_chunk { JOB_SKIP, JOB_WANT, JOB_DECODED, JOB_DONE, JOB_BAD };

/* Memory that grows with what is put there. */
struct buffer {
    uint8_t *at;
    size_t len, cap;
};

/* How far a job's bytes are decoded: bytes that came (pend), then chunks that wait for their digests (views of scratch).
 * Under the job's lock. The buffers stay with the slot. */
struct decoding {
    uint64_t pos;       /* blob offset of the next byte to decode */
    uint32_t cursor;    /* next chunk to decode, relative to the job's first */
    struct buffer pend; /* bytes that are not decoded yet, from pend_off on */
    size_t pend_off;
    struct buffer scratch; /* decoded chunks */
    struct buffer kept;    /* the same chunks as they are stored, for a cache that holds them so */
    struct buffer batch;   /* the last batch that was decoded; batch_id 0: none */
    struct buffer clear;   /* an encrypted chunk without its cipher */
    uint32_t batch_id;
    struct {
        uint32_t rel, usize;
        size_t at, kept_at; /* in scratch and kept */
        bool below;         /* its bytes are in the lower file alone */
    } *views;
    uint32_t views_n, views_cap;
    struct codec *codec;
};

struct source;
struct lane;

struct job {
    pthread_mutex_t lock; /* held by feed, chunks, commit and end: usually one thread calls them */
    uint64_t id;          /* 0: free or being built; under fetcher->lock, as the next three are */
    bool reserved;
    struct source *source; /* referenced while reserved: whose slot it is */
    struct lane *lane;     /* a reader's job: the session that it counts for */
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
    struct decoding dec;
};

struct want_range {
    struct want_range *next;
    struct blob_core *core;
    struct source *source; /* referenced */
    struct asker asker;
    uint32_t at, end;
    uint64_t tag;
    int64_t not_before_us; /* it failed: not tried again before */
    bool busy, cancelled;  /* a thread works on it and holds no lock: it stays in the list */
};

/* What one session waits for at a source and has under way there. Freed with the last of both. */
struct lane {
    struct lane *next;
    uintptr_t session; /* compared only; 0: no session */
    uint32_t running;  /* jobs */
    struct want *first, **last;
};

/* One server that fetches are made from. It is there while something is queued or under way. */
struct source {
    struct source *next;
    uint32_t number, refs;            /* a reference of each want, range and job */
    uint32_t running, running_for[3]; /* jobs; by enum job_for */
    uint32_t queued;                  /* wants in lanes */
    struct lane *lanes, **lanes_tail; /* whose turn it is, first */
    struct want *later, **later_tail; /* wants that failed, in order of their times */
    int64_t later_last_us;
    struct want_range *ranges[3]; /* by enum job_for; none of FOR_READER */
    int64_t not_before_us;        /* nothing is asked of it before */
    bool doubtful;                /* after that, one job at a time until one brings bytes: */
    struct job *trial;            /* this one */
};

struct foreign {
    struct foreign *next;
    struct blob_core *core;
    uint32_t index;
    int64_t since_us;                            /* when this process began to wait */
    struct vnd_blob *meta;                       /* referenced: its stored chunk table, not a chunk */
    void (*done)(struct vnd_blob *b, int error); /* of meta: another process has fetched it, or will not */
};

struct uncached_chunk;

struct fetcher {
    struct vnd_engine *engine;
    pthread_mutex_t lock; /* queues, slots, windows */
    pthread_cond_t some;
    _Atomic bool down;
    struct source *sources; /* whose turn it is, first */
    uint32_t running;       /* jobs */
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
/* store/merge.c */
struct job_plan {
    struct blob_core *core;
    uint32_t index, end;   /* the first chunk; none from end on is taken */
    bool waited;           /* a reader waits for the first chunk */
    uint32_t window_bytes; /* of neighbours that may be taken along */
};
/* Makes slot's job of a chunk and its neighbours. Returns false if there is nothing to do for the chunk. The caller has
 * reserved the slot. */
bool job_build(struct fetcher *f, int slot, const struct job_plan *plan);
/* store/source.c; fetcher->lock is held in all but source_answers. Wants and ranges hold a reference that their functions
 * neither take nor give back. */
struct source *source_ref(struct fetcher *f, uint32_t number); /* made if need be; NULL: no memory */
void source_unref(struct fetcher *f, struct source *s);
void sources_free(struct fetcher *f);                    /* at the engine's end, when wants and ranges are gone */
void source_rotate(struct fetcher *f, struct source *s); /* the others' turn */
/* Nothing is asked of it before not_before_us, then one job at a time until one brings bytes. */
void source_pause(struct source *s, int64_t not_before_us);
void source_answers(struct fetcher *f, struct job *j); /* bytes have come; takes the lock */
/* Queues a want in its session's lane. false: no memory. */
bool source_push(struct source *s, struct want *w, bool head);
struct want *source_pop(struct source *s, struct lane *l); /* its first; the lane's turn is over */
void source_defer(struct source *s, struct want *w);       /* until w->not_before_us */
void source_resume(struct source *s, int64_t now);         /* deferred wants whose time has come go before all others */
/* Takes out the wants of a core, or with NULL all. */
struct want *source_take(struct source *s, const struct blob_core *c);
/* Whether a job may begin there. For a reader: one of source_next_lane, which may be none. */
bool source_may(const struct fetcher *f, const struct source *s, enum job_for whom, int64_t now);
struct lane *source_next_lane(const struct fetcher *f, const struct source *s);
/* Slots. slot_reserve after source_may; lane: of a reader's job. */
struct job *slot_reserve(struct fetcher *f, struct source *s, enum job_for whom, struct lane *l);
void slot_move(struct fetcher *f, struct job *j, uint32_t number); /* it turned out to be another source's */
void slot_release(struct fetcher *f, struct job *j);
/* store/want.c */
struct want *want_take(struct fetcher *f, const struct blob_core *c); /* out of the queues: a core's, with NULL all */
void wants_free(struct fetcher *f, struct want *list);
void want_free(struct fetcher *f, struct want *w);            /* gives its references back */
void ranges_free(struct fetcher *f, struct want_range *list); /* likewise */
void want_release_slot(struct fetcher *f, struct job *j);
void want_drop_ranges(struct blob_core *c);
/* Queues a range of chunks that no reader waits for. range: at, end, tag, asker, not_before_us. head: before what is queued.
 * 0 or -ENOMEM. */
int want_later(struct blob_core *c, enum job_for whom, struct want_range range, bool head);
/* The same for a stream, with fetcher->lock held. */
int want_stream(struct blob_core *c, uint32_t first, uint32_t end, struct asker asker);
void want_wake(struct fetcher *f); /* wakes threads in vnd_job_next after a change */

#endif
