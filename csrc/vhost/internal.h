/* vhost/internal.h -- one virtqueue and its thread: it fetches, has the FUSE session serve, and answers. Nobody else touches
 * its ring or its requests' memory, and the thread waits in its epoll only.
 *
 * vhost/queue.c: the loop and what control asks. vhost/ring.c: the ring's life. vhost/request.c: requests.
 */
#ifndef VND_QUEUE_H
#define VND_QUEUE_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "fuse/fuse.h"
#include "vhost/guestmem.h"
#include "vhost/inflight.h"
#include "fuse/req.h"
#include "vhost/vring.h"

#define QUEUE_SEGS_OWN 36            /* ranges a parked request holds in its slot; more come from the heap */
#define QUEUE_SEGS_BUDGET (8u << 20) /* bytes of such heap memory of one device: a guest cannot have more */

struct queue;

enum slot_state {
    SLOT_FREE,
    SLOT_SERVING,
    SLOT_PARKED,  /* linked in the store, or woken and on the done list */
    SLOT_EXPIRED, /* its deadline passed while a wake was under way: answered when it is popped */
    SLOT_DOOMED,  /* fails when it is popped: no memory for its ranges, or a migration waits */
    SLOT_ZOMBIE,  /* given up without an answer; only the wake under way is still awaited */
    SLOT_STAGED   /* answered, used entry not published yet */
};

/* One request; slot i of a ring serves head i. Holds guest addresses, never host ones. */
struct queue_slot {
    struct req req;
    struct queue *queue;
    uint16_t head;
    uint8_t state;
    uint8_t segs_on_heap;
    uint32_t n_in, n_out;
    const struct vring_seg *segs; /* the queue's scratch while first served, then own or the heap */
    struct vring_seg own[QUEUE_SEGS_OWN];
    int64_t deadline_us, parked_us;
    struct queue_slot *prev, *next; /* parked, oldest first */
};

/* What control wants of a queue: a value that the thread makes true, then acknowledges. fds are given away. */
struct queue_conf {
    bool exit;    /* end the thread; nothing is written any more */
    bool drop;    /* give every request up silently */
    bool recover; /* at start, take over what is in the front-end's in-flight region */
    bool new_kick, new_call, new_err;
    int kick_fd, call_fd, err_fd;
    struct guestmem *mem;
    struct guestlog *log; /* NULL: not logging */
    struct inflight inflight;
    uint64_t features;
    vnd_ring_state ring; /* its fds are not used; base is written back on a stop */
    int drain_ms;
    int rc; /* result, with its line */
    char err[VND_ERR_MAX];
};

struct queue {
    /* Set once. */
    struct vnd_engine *engine;
    struct fuse_session *session;
    _Atomic int *mem_lost;        /* the device's: a memory file was truncated */
    _Atomic uint32_t *segs_bytes; /* the device's use of QUEUE_SEGS_BUDGET */
    uint32_t index;
    pthread_t thread;
    int epoll_fd, wake_fd;
    int64_t deadline_us; /* a request's time to live */

    /* The thread's own. */
    struct vring vring;
    struct guestmem *mem;
    struct guestlog *log;
    uint32_t mem_hint;
    bool running;                 /* started and not stopped */
    bool enabled, broken, polled; /* polled: it was started without a kick fd */
    bool start_failed;            /* and said so: each new memory table tries again */
    bool log_all, frozen;         /* frozen: parked requests' clocks stand still */
    bool draining;
    int64_t drain_until_us;
    int kick_fd, call_fd, err_fd;
    vnd_ring_state ring; /* as it was started */
    struct inflight inflight;
    struct queue_slot *slots;
    uint32_t n_slots;
    uint32_t n_parked, n_zombies;
    pthread_mutex_t parked_lock;     /* the thread changes the list under it, others read it under it */
    struct queue_slot *first, *last; /* parked */
    struct store_wait *todo;         /* taken from done, oldest first */
    uint16_t *resubmit;              /* heads of a dead process, oldest first */
    uint32_t n_resubmit, next_resubmit;
    struct queue_conf *applying; /* taken, not acknowledged */
    struct fuse_worker worker;
    struct vring_chain chain;

    /* Shared with wakers. */
    _Alignas(64) _Atomic(struct store_wait *) done; /* stack, newest first */
    _Atomic int sleeping;
    _Atomic int wakers; /* threads inside the wake call */
    /* Shared with control. */
    _Alignas(64) _Atomic(struct queue_conf *) posted;
    pthread_mutex_t lock;
    pthread_cond_t acked;
    bool busy; /* a conf is posted and not acknowledged */
};

/* Starts the thread. */
int queue_init(struct queue *q, struct vnd_engine *e, struct vnd_vfs *v, struct fuse_session *s, uint32_t index,
               _Atomic int *mem_lost, _Atomic uint32_t *segs_bytes);
/* After an exit conf was acknowledged. */
void queue_free(struct queue *q, struct vnd_vfs *v);
/* One at a time; c stays the queue's until queue_wait returned. */
void queue_post(struct queue *q, struct queue_conf *c);
void queue_wait(struct queue *q);

/* vhost/ring.c: the ring's life. Like all below, the queue's thread only. */
int queue_start(struct queue *q, struct queue_conf *c); /* 0 or -errno, line in c->err */
int queue_resolve(struct queue *q);                     /* ring addresses in the present table */
/* The guest loses this queue. Once memory is lost that is the reason, whatever is given. */
void queue_break(struct queue *q, int cause, const char *why);
void queue_flush(struct queue *q); /* publish what is staged, signal once */
void queue_signal(struct queue *q);
void queue_signal_error(struct queue *q);
void queue_drop_all(struct queue *q);              /* forget every request; the guest is not written to */
void queue_sleep(struct queue *q, int timeout_ms); /* epoll; sleeping is set and all was looked at again */

/* vhost/request.c: requests. */
void queue_fetch_head(struct queue *q, uint16_t head, bool again, int64_t now); /* again: left by a dead process */
struct queue_slot *queue_take_done(struct queue *q);
void queue_run_done(struct queue *q);            /* serve the woken */
void queue_expire(struct queue *q, int64_t now); /* EIO to those whose deadline has passed */
void queue_thaw(struct queue *q, int64_t now);
void queue_fail_parked(struct queue *q); /* EIO to all, those being woken when they are popped */
void queue_release(struct queue *q, struct queue_slot *s);
void queue_unpark(struct queue *q, struct queue_slot *s);
void queue_wake(struct store_wait *w);                                                     /* any thread */
int queue_list_waiting(struct engine_counters *c, vnd_waiting *out, int max, int64_t now); /* any thread */

#endif
