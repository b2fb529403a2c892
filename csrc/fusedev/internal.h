/* fusedev/internal.h -- fusedev/: the transport over /dev/fuse, for mounts of this host. No libfuse; the session and the file
 * systems are the same as a guest's. Its functions are vnd.h's; this header is its contract and its inside.
 *
 * Threads: each reader blocks in read(2) on a descriptor of its own (a clone) or on the shared one. A request that can be
 * served is served on the spot: one read, one preadv2 into the reader's reply buffer, one write. A request that parks
 * leaves the reader at once: its slot is listed, and the finisher thread serves it when the store wakes it and answers on
 * the descriptor that it came from, which is where the kernel looks for it. vnd_fusedev_* are control's, one at a time.
 * Locks: parked.lock guards all slots that are listed or free; store_wait_cancel is called under it.
 * Ownership: the device owns its dup of fd, threads, slots and session; engine and mount table outlive it.
 * It may use base, store/store.h, fs and fuse.
 */
#ifndef VND_FUSEDEV_H
#define VND_FUSEDEV_H
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "base/base.h"
#include "base/parklist.h"
#include "base/wakelist.h"
#include "fs/backing.h"
#include "fs/vfs.h"
#include "fuse/fuse.h"

#define FUSEDEV_THREADS_MAX 64
/* Interrupts are kept that came before the request they are for had parked, or after it was answered. Uniques never come
 * back, so those of the second kind do no harm. */
#define FUSEDEV_EARLY_MAX 64
/* The kernel wants room for its largest request: headers and max_write, 8192 at least. Untouched pages cost nothing. */
#define FUSEDEV_IN_BYTES (FUSE_REPLY_MAX + 65536u)
#define FUSEDEV_OUT_BYTES (FUSE_REPLY_MAX + (uint32_t)sizeof(struct fuse_out_header))
/* Ends a blocked read. A real-time signal that nothing else in the process uses. */
#define FUSEDEV_SIGNAL_LEAVE (SIGRTMIN + 3)

struct fusedev_worker;

enum fusedev_state {
    FUSEDEV_SERVING, /* one thread has it */
    FUSEDEV_PARKED,  /* listed: linked in the store, or woken and on the wake list */
    FUSEDEV_EXPIRED  /* listed; its deadline passed or it was interrupted while a wake was under way */
};

/* One request. What is below the line is under parked.lock. */
struct fusedev_slot {
    struct req req;
    struct vnd_fusedev *dev;
    struct fusedev_worker *at; /* whose buffers serve it now */
    int fd;                    /* where it was read */
    /* ---- */
    enum fusedev_state state;
    bool woken;           /* before the thread that parked it had listed it */
    struct parked parked; /* its deadline is set when it is read */
    struct fusedev_slot *next_free;
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
    struct backing *backing; /* NULL: the kernel reads no file by itself */
    int fd;
    int ended_fd;        /* eventfd: the mount is gone, or stop was called */
    bool clones;         /* readers have descriptors of their own */
    int64_t deadline_us; /* a request's time to live */
    uint32_t n_readers;
    struct fusedev_worker readers[FUSEDEV_THREADS_MAX], finisher;
    _Atomic bool stop, abandon; /* readers leave; then the finisher gives up what is parked and leaves */
    struct parklist parked;
    /* Under parked.lock. */
    struct fusedev_slot *free;
    uint64_t early[FUSEDEV_EARLY_MAX]; /* a ring of uniques */
    uint32_t early_at;
    /* Shared with those who wake. */
    struct wakelist wakes;
};

/* fusedev/request.c: the threads' loops; arg: a struct fusedev_worker. */
void *fusedev_reader_main(void *arg);
void *fusedev_finisher_main(void *arg);

#endif
