/* fusedev/internal.h -- the transport over /dev/fuse: no libfuse, the same session and file systems as the guests'.
 *
 * Readers: one thread each, blocked in read(2) on a descriptor of its own (a clone) or on the shared one; a request
 * that can be served is served on the spot: read, one preadv2 into the reader's reply buffer, one write. One that
 * parks leaves the thread at once: its slot is listed, the finisher thread serves it when the store wakes it and
 * answers on the descriptor that it came from, which is where the kernel looks for it.
 */
#ifndef VND_FUSEDEV_H
#define VND_FUSEDEV_H
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "fuse/internal.h"

#define FUSEDEV_THREADS_MAX 64
/* Interrupts that came before the request they are for had parked, or after it was answered; uniques do not come back. */
#define FUSEDEV_EARLY_MAX 64
/* The kernel wants room for its largest request: headers and max_write, 8192 at least. Untouched pages cost nothing. */
#define FUSEDEV_IN_BYTES (FUSE_REPLY_MAX + 65536u)
#define FUSEDEV_OUT_BYTES (FUSE_REPLY_MAX + (uint32_t)sizeof(struct fuse_out_header))
/* Ends a blocked read. A real-time signal that nobody else has a use for. */
#define FUSEDEV_SIGNAL_LEAVE (SIGRTMIN + 3)

struct fusedev_worker;

enum fusedev_state {
    FUSEDEV_SERVING, /* one thread has it */
    FUSEDEV_PARKED,  /* listed: linked in the store, or woken and on the done list */
    FUSEDEV_EXPIRED  /* listed; its deadline passed or it was interrupted while a wake was under way */
};

/* One request, from a free list. What is below the line is under the lock. */
struct fusedev_slot {
    struct req req;
    struct vnd_fusedev *dev;
    struct fusedev_worker *at; /* whose buffers serve it now */
    int fd;                    /* where it was read */
    int64_t deadline_us, parked_us;
    /* ---- */
    enum fusedev_state state;
    bool woken;                       /* before the thread that parked it had listed it */
    struct fusedev_slot *prev, *next; /* listed, oldest first; next alone: free */
};

struct fusedev_worker {
    struct vnd_fusedev *dev;
    struct fuse_worker fuse;
    pthread_t thread;
    bool started;
    _Atomic bool left; /* its loop is over */
    int fd;            /* -1: the finisher */
    uint8_t *in;       /* NULL: the finisher */
    uint32_t in_len;
    uint8_t *out;              /* a whole reply; the payload begins at a page */
    struct fusedev_slot *slot; /* the one in hand */
};

struct vnd_fusedev {
    struct vnd_engine *engine;
    struct vnd_vfs *vfs;
    struct fuse_session *session;
    struct backing *backing; /* NULL: no passthrough */
    int fd, wake_fd, ended_fd;
    bool clones;         /* readers have descriptors of their own */
    int64_t deadline_us; /* a request's time to live */
    uint32_t n_readers;
    struct fusedev_worker readers[FUSEDEV_THREADS_MAX], finisher;
    _Atomic bool stop, abandon; /* readers leave; then the finisher gives up what is parked and leaves */
    pthread_mutex_t lock;
    struct fusedev_slot *first, *last, *free;
    uint32_t n_parked;
    uint64_t early[FUSEDEV_EARLY_MAX]; /* a ring of uniques */
    uint32_t early_at;
    _Alignas(64) _Atomic(struct store_wait *) done; /* stack, newest first */
    _Atomic int sleeping;
    _Atomic int wakers; /* threads inside the wake call */
};

/* fusedev/request.c: the threads' loops; arg: a struct fusedev_worker. */
void *fusedev_reader_main(void *arg);
void *fusedev_finisher_main(void *arg);
/* Of the finisher's counters; any thread. */
int fusedev_list_waiting(struct engine_counters *c, vnd_waiting *out, int max, int64_t now);
/* An eventfd that is full is readable all the same. */
void fusedev_raise(int fd);

#endif
