/* vhost/internal.h -- inside of vhost/: one virtqueue and its thread, which fetches requests, has the device's kind (kind.h)
 * serve them, and answers. No other thread touches its ring or its requests' memory, and it waits in its epoll_wait only.
 *
 * From the bottom: vring.c, guestmem.c and inflight.c (memory, no thread), slot.c (a request's slot: its ranges, parked,
 * woken), ring.c (the ring's life), request.c (from a head to a reply), queue.c (the thread's loop, and what control asks),
 * device.c (all queues of a front-end). None of them uses one that comes later. Beside them the kinds: fs.c and blk.c.
 */
#ifndef VND_QUEUE_H
#define VND_QUEUE_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/base.h"
#include "base/haltpoll.h"
#include "base/parklist.h"
#include "base/slice.h"
#include "base/wakelist.h"
#include "fuse/fuse.h"
#include "vhost/guestmem.h"
#include "vhost/inflight.h"
#include "vhost/kind.h"
#include "vhost/vring.h"

#define QUEUE_SEGS_OWN 36            /* ranges a parked request holds in its slot; more come from the heap */
#define QUEUE_SEGS_BUDGET (8u << 20) /* bytes of such heap memory of one device: a guest cannot have more */

struct queue;

enum slot_state {
    SLOT_FREE,
    SLOT_SERVING,
    SLOT_PARKED,  /* linked in the store, or woken and on the wake list */
    SLOT_EXPIRED, /* its deadline passed while a wake was under way: answered when it is taken off the wake list */
    SLOT_DOOMED,  /* fails when it is taken off the wake list: no memory for its ranges, or a migration waits */
    SLOT_ZOMBIE,  /* given up without an answer; only the wake under way is still awaited */
    SLOT_STAGED   /* answered, used entry not published yet */
};

/* One request; slot i of a ring serves head i. It holds guest addresses, never host addresses. */
struct queue_slot {
    struct req req;
    struct queue *queue;
    uint16_t head;
    uint8_t state; /* enum slot_state */
    bool segs_on_heap;
    uint32_t n_in, n_out;
    const struct vring_seg *segs; /* the queue's scratch while first served, then own or the heap */
    struct vring_seg own[QUEUE_SEGS_OWN];
    struct parked parked; /* on the queue's list; its deadline is set when the head is fetched */
};

/* What a ring makes, at its start, of an in-flight region that another process has used. */
enum recover {
    RECOVER_NOT,       /* nothing: it has looked at it, or the region is its own */
    RECOVER_SAME_BASE, /* goes on with it where the base of the ring agrees, begins anew where not */
    RECOVER_ANY_BASE   /* goes on with it: the base does not count */
};

/* What control wants of a queue: values that the thread makes true and then acknowledges. The thread takes the fds. */
struct queue_conf {
    bool exit; /* end the thread; nothing is written any more */
    bool drop; /* give every request up without an answer */
    enum recover recover;
    bool died;  /* recover: the process that left the region died */
    bool carry; /* requests that wait when a ring stops for a migration go along, in flight */
    bool new_kick, new_call, new_err;
    int kick_fd, call_fd, err_fd;
    struct guestmem *mem;
    struct guestlog *log; /* NULL: not logging */
    struct inflight inflight;
    uint64_t features;
    vnd_ring_state ring; /* its fds are not used; base is written back on a stop */
    int drain_ms;
    int rc; /* result; failure tells what, where that is not 0 */
    struct failure failure;
};

/* What the queues of a device have in common. */
struct queue_common {
    const struct device_kind *kind;
    struct vnd_engine *engine;
    struct vnd_vfs *vfs;
    struct fuse_session *session;  /* kind_fs; else NULL */
    struct vnd_disk *disk;         /* kind_blk; else NULL */
    char blk_id[VND_BLK_ID_BYTES]; /* what GET_ID answers; without a NUL where it is full */
    uintptr_t who;                 /* the guest, among those who share the store's threads; compared only */
    uint32_t number;               /* of the front-end, for log lines; set before the first apply */
    _Atomic bool mem_lost;         /* a memory file was truncated */
    _Atomic uint32_t segs_bytes;   /* the device's use of QUEUE_SEGS_BUDGET */
};

struct queue {
    /* Set once. */
    struct queue_common *common;
    struct vnd_engine *engine;      /* common's */
    struct fuse_session *session;   /* common's */
    const struct device_kind *kind; /* common's */
    uint32_t index;
    pthread_t thread;
    int epoll_fd;
    int64_t deadline_us; /* a request's time to live */

    /* The thread's own. */
    struct vring vring;
    struct guestmem *mem;
    struct guestlog *log;
    uint32_t mem_hint;
    bool running;                 /* started and not stopped */
    bool enabled, broken, polled; /* polled: it was started without a kick fd */
    int poll_ms;                  /* how long a ring without a kick fd is left alone */
    bool start_failed;            /* and said so: each new memory table tries again */
    bool carry;                   /* as in its last conf */
    bool log_all, frozen;         /* frozen: the deadlines of parked requests stand still */
    bool draining;
    int64_t drain_until_us;
    int kick_fd, call_fd, err_fd;
    vnd_ring_state ring; /* as it was started */
    struct inflight inflight;
    struct queue_slot *slots;
    uint32_t n_slots;
    uint32_t n_zombies;
    struct parklist parked;
    uint16_t *resubmit; /* heads of a dead process, oldest first */
    uint32_t n_resubmit, next_resubmit;
    struct haltpoll poll;
    struct slice slice;
    uint32_t publish_batch;      /* so many answers are published together: set by what a fetch finds */
    struct queue_conf *applying; /* taken, not acknowledged */
    struct fuse_worker worker;
    struct vring_chain chain;

    /* Shared with those who wake. */
    struct wakelist wakes;
    /* Shared with control. */
    _Alignas(64) _Atomic(struct queue_conf *) posted;
    pthread_mutex_t lock;
    pthread_cond_t acked;
    bool busy; /* a conf is posted and not acknowledged */
};

/* ---- vhost/queue.c: control's side. 0 or -errno; on failure nothing is left. */
int queue_init(struct queue *q, struct queue_common *common, uint32_t index);
/* After an exit conf was acknowledged. */
void queue_free(struct queue *q);
/* One at a time; c stays the queue's until queue_wait returned. */
void queue_post(struct queue *q, struct queue_conf *c);
void queue_wait(struct queue *q);

/* All that follows: the queue's thread only, but for queue_wake. */

/* ---- vhost/ring.c: the ring's life */
int queue_start(struct queue *q, struct queue_conf *c); /* 0 or -errno, with c->failure */
int queue_resolve(struct queue *q);                     /* ring addresses in the present memory table; 0 or -errno */
/* The guest loses this queue. Once memory is lost that is the reason, whatever is given. */
void queue_break(struct queue *q, int cause, const char *why);
void queue_publish(struct queue *q); /* what is staged becomes visible, without a signal */
void queue_flush(struct queue *q);   /* publishes what is staged, signals once if the guest wants that */
void queue_signal(struct queue *q);
void queue_signal_error(struct queue *q);
/* Forgets every request; the guest is not written to. Returns when all wakes that were under way have arrived. */
void queue_drop_all(struct queue *q);
/* In epoll_wait; the caller has called wakelist_sleep and then looked at everything again. */
void queue_sleep(struct queue *q, int timeout_ms);

/* ---- vhost/request.c: requests */
void queue_fetch_head(struct queue *q, uint16_t head, bool again, int64_t now); /* again: left by a dead process */
void queue_run_woken(struct queue *q);                                          /* serves those that were woken */
void queue_expire(struct queue *q, int64_t now); /* EIO to those whose deadline has passed */
void queue_thaw(struct queue *q, int64_t now);   /* the guest stood still: requests have as much time as at first */
/* Gives up, without a used entry, those that wait for data: they stay in flight for the next start, here or elsewhere. Those
 * that a host call serves end first. */
void queue_set_aside(struct queue *q);
void queue_fail_parked(struct queue *q); /* EIO to all; to those being woken when their wake has arrived */

/* ---- vhost/slot.c: a slot's ranges, parked and woken */
static inline struct queue_slot *slot_of(struct req *r)
{
    return (struct queue_slot *)(void *)((char *)r - offsetof(struct queue_slot, req));
}

static inline struct queue_slot *slot_of_parked(struct parked *p)
{
    return (struct queue_slot *)(void *)((char *)p - offsetof(struct queue_slot, parked));
}

/* The ranges leave the queue's scratch for the slot's own memory. False: no room. */
bool queue_keep_segs(struct queue_slot *s);
/* Keeps only what an error reply needs, of its kind. */
void queue_keep_reply(struct queue_slot *s);
void queue_free_segs(struct queue_slot *s);
void queue_park(struct queue_slot *s);
void queue_unpark(struct queue_slot *s);
/* The head's slot may serve again, without a used entry. */
void queue_release(struct queue_slot *s);
void queue_wake(struct store_wait *w); /* store_wait.wake; any thread */
/* The next woken one in the order of the wakes, NULL: none. */
struct queue_slot *queue_take_woken(struct queue *q);

#endif
