/* precontent/internal.h -- precontent/: a kernel file system (EROFS) reads our cache files itself and waits for us where bytes
 * are lacking, by fanotify's pre-content events (Linux 6.14; fanotify(7), fanotify_init(2), fanotify_mark(2)). Its functions
 * are vnd.h's; this header is its contract and its inside.
 *
 * The file system opens each data file through a private clone of the file's mount, and the mark is on that mount: only
 * its own reads raise events, those of daemons that share the cache directory never do. An event names a range. It is
 * answered at once when every chunk in it is ready; else its request is parked in the store and answered when woken.
 * The kernel keeps the file that it has opened. When the cache's own file is removed or replaced (cache/move.c), bytes come
 * into the new one, and what is read is copied from there into the old.
 *
 * Threads: one thread serves (serve_main); it never reads a data file in a way that raises events. vnd_precontent_* are
 * control's, one at a time; blobs are added before the thread starts. The store's threads call a request's wake.
 * Locks: none; the parked list is the serving thread's alone.
 * Ownership: the files that the kernel reads are dupped here; group, state memfd and blobs are borrowed.
 * It may use base, cache and store.
 */
#ifndef VND_PRECONTENT_H
#define VND_PRECONTENT_H
#include <pthread.h>
#include <sys/types.h>

#include "base/base.h"
#include "base/parklist.h"
#include "base/wakelist.h"
#include "precontent/state.h"
#include "store/store.h"

#define PRECONTENT_BLOBS_MAX 4096u
#define PRECONTENT_EXTENTS 64

struct precontent_blob {
    struct vnd_blob *blob;
    int fd; /* the file that the kernel reads, opened before there was a mark */
    dev_t dev;
    ino_t ino;
    uint64_t moves;     /* cachefile's, when that was last seen to be its file too; 1: never */
    uint32_t *order, n; /* chunk indexes by their place in the data file */
};

/* An event in hand; as many as slots. The serving thread's alone but for wait. */
struct precontent_request {
    struct store_wait wait;
    struct vnd_precontent *p;
    struct precontent_slot *slot;
    uint32_t blob; /* that is looked at, counted up where the slot names none */
    uint64_t at;   /* all before it is ready */
    struct parked parked;
    struct precontent_request *next_free;
};

struct vnd_precontent {
    struct vnd_engine *engine; /* NULL: only refuses */
    int group_fd, ended_fd;
    struct precontent_state *state;
    struct precontent_blob *blobs;
    uint32_t n_blobs;
    struct precontent_request *requests, *free;
    struct parklist parked;
    struct engine_counters counters;
    pthread_t thread;
    bool started;
    int64_t ttl_us; /* a request's time to live */
    _Atomic bool stop;
    struct wakelist wakes;
};

/* ---- precontent/blobs.c: which bytes of a file are ready */
/* Where the range that the slot names ends in the blob. */
uint64_t precontent_end(const struct precontent_slot *s, const struct precontent_blob *b);
/* Chunks of [*at, end), at most PRECONTENT_EXTENTS, into ext: their number; *at moves behind them. -EIO: bytes of it belong
 * to no chunk of the image (with gaps, these are passed over). */
int precontent_gather(const struct precontent_blob *b, uint64_t *at, uint64_t end, bool gaps, struct extent *ext);
/* The extents are ready in the cache; in the kernel's file too, once this has returned 0. -EAGAIN: no longer ready; or
 * another -errno. */
int precontent_copy(struct precontent_blob *b, const struct extent *ext, int n);
/* The blob whose file fd is, or PRECONTENT_ANY_BLOB. */
uint32_t precontent_blob_of(const struct vnd_precontent *p, int fd);
void precontent_blobs_free(struct vnd_precontent *p);

#endif
