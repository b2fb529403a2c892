/* precontent/internal.h -- a kernel file system (EROFS) reads our cache files itself, and waits for us where bytes are lacking:
 * fanotify's pre-content events (Linux 6.14; fanotify(7), fanotify_init(2), fanotify_mark(2)).
 *
 * The file system opens each data file through a private clone of the file's mount, and the mark is on that mount: only
 * its own reads raise events, those of daemons that share the cache directory never do. An event names a range; it is
 * answered at once when every chunk in it is ready, else its request is parked in the store and answered when woken.
 * One thread does both; it never reads a data file in a way that raises events.
 *
 * The kernel keeps the file that it has opened. When the cache's own is removed or replaced (cache/move.c), bytes come into
 * the new one, and what is read is copied from there into the old.
 *
 * The kernel keeps an event that was read and not answered for as long as the group lives, under the number that its
 * descriptor had; when the last descriptor of the group is closed it lets every reader go on. So the group is held by
 * two processes, and what is read lies in memory that both have, from within read(2) on: whoever goes on answers it.
 */
#ifndef VND_PRECONTENT_H
#define VND_PRECONTENT_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/base.h"
#include "store/store.h"

#define PRECONTENT_SLOTS 1024u /* events read and not answered; the rest waits in the kernel */
#define PRECONTENT_BLOBS_MAX 4096u
#define PRECONTENT_EXTENTS 64
/* One event with a range has 48 bytes, one without 24: no two that wait for an answer fit. */
#define PRECONTENT_BUFFER 64u
#define PRECONTENT_ANY_BLOB UINT32_MAX /* read by a process that died before it looked whose event it was */

/* include/uapi/linux/fanotify.h of 6.14, which C libraries of today lack */
#define PRECONTENT_OPEN 0x20u
#define PRECONTENT_CLOSE 0x10u      /* FAN_CLOSE_NOWRITE */
#define PRECONTENT_ACCESS 0x100000u /* FAN_PRE_ACCESS */
#define PRECONTENT_ALLOW 1u
#define PRECONTENT_DENY(error) (2u | (uint32_t)(error) << 24) /* EPERM EIO EBUSY ETXTBSY EAGAIN ENOSPC EDQUOT */

struct precontent_event {
    uint64_t mask, offset, count; /* no range given: the whole file */
    int32_t fd;
};
/* Takes one event off the front: its length, or 0: there is no whole, well-formed one. */
size_t precontent_parse(const uint8_t *buf, size_t len, struct precontent_event *out);

/* What both processes share (a memfd). */
struct precontent_slot {
    _Atomic uint32_t waits; /* 1: read, not answered */
    int32_t fd;             /* its number in the process that read it */
    uint32_t blob;          /* index in order of adding, or PRECONTENT_ANY_BLOB */
    uint32_t held;          /* the number is a descriptor of the serving process, to be closed */
    uint64_t offset, count;
};
struct precontent_state {
    char magic[8];
    _Atomic int32_t opens;             /* devices that the file system has open */
    _Atomic uint32_t ended;            /* it had some and has none: it is gone */
    uint8_t buffer[PRECONTENT_BUFFER]; /* read(2)'s; zeroes but for events that have no slot yet */
    struct precontent_slot slots[PRECONTENT_SLOTS];
};

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
    int64_t deadline_us;
    bool listed;
    struct precontent_request *prev, *next;
};

struct vnd_precontent {
    struct vnd_engine *engine; /* NULL: only refuses */
    int group_fd, wake_fd, ended_fd;
    struct precontent_state *state;
    struct precontent_blob *blobs;
    uint32_t n_blobs;
    struct precontent_request *requests, *free, *first, *last; /* parked, oldest first */
    struct engine_counters counters;
    pthread_t thread;
    bool started;
    int64_t ttl_us;
    _Atomic bool stop;
    _Alignas(64) _Atomic(struct store_wait *) done; /* woken, newest first */
    _Atomic int sleeping, wakers;
};

#endif
