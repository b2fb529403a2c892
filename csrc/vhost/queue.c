/* vhost/queue.c -- the queue's thread: its loop, and what control asks of it. See queue.h. */
#include "vhost/internal.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/sigbus.h"

#define FETCH_BUDGET 64 /* heads between two looks at the woken */
#define POLL_MS 1       /* a ring without a kick fd is looked at this often */
#define VHOST_F_LOG_ALL (1ull << 26)

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* May requests be fetched? */
static bool is_active(const struct queue *q)
{
    return q->running && q->enabled && !q->broken && !q->draining && q->vring.used != NULL;
}

/* May requests be answered? */
static bool may_answer(const struct queue *q)
{
    return q->running && (q->enabled || q->draining) && !q->broken && q->vring.used != NULL;
}

static void acknowledge(struct queue *q)
{
    pthread_mutex_lock(&q->lock);
    q->applying = NULL;
    q->busy = false;
    pthread_cond_signal(&q->acked);
    pthread_mutex_unlock(&q->lock);
}

/* ---- control's wishes */

static void swap_kick(struct queue *q, struct queue_conf *c)
{
    struct epoll_event ev = { .events = EPOLLIN | EPOLLET };

    /* Other processes hold the same open file: closing alone would leave it in the set. */
    if (q->kick_fd >= 0)
        epoll_ctl(q->epoll_fd, EPOLL_CTL_DEL, q->kick_fd, NULL);
    close_fd(&q->kick_fd);
    if (c->kick_fd >= 0 && epoll_ctl(q->epoll_fd, EPOLL_CTL_ADD, c->kick_fd, &ev) != 0) {
        c->rc = fail_line(-errno, c->err, sizeof(c->err), "ring %u: its kick fd cannot be waited on: %s", q->index,
                          strerror(errno));
        close_fd(&c->kick_fd);
    }
    q->kick_fd = c->kick_fd;
}

static void swap_fds(struct queue *q, struct queue_conf *c)
{
    if (c->new_kick)
        swap_kick(q, c);
    if (c->new_err) {
        close_fd(&q->err_fd);
        q->err_fd = c->err_fd;
    }
    if (c->new_call) {
        close_fd(&q->call_fd);
        q->call_fd = c->call_fd;
        /* A signal may have gone to the old one after the front-end had stopped to listen there. */
        if (q->running)
            queue_signal(q);
    }
}

static void swap_memory(struct queue *q, struct queue_conf *c)
{
    bool was = q->vring.used != NULL;

    q->mem = c->mem;
    q->mem_hint = 0;
    q->log = c->log;
    q->log_all = c->log != NULL && (c->features & VHOST_F_LOG_ALL) != 0;
    if (!q->log_all)
        q->log = NULL;
    if (!q->running)
        return;
    q->ring.flags = c->ring.flags;
    q->ring.log_addr = c->ring.log_addr;
    q->ring.desc_addr = c->ring.desc_addr;
    q->ring.avail_addr = c->ring.avail_addr;
    q->ring.used_addr = c->ring.used_addr;
    if (queue_resolve(q) != 0 && was)
        engine_say(q->engine, VND_LEVEL_WARNING, VND_CAUSE_GUEST,
                   "queue %u pauses: its ring is not in the guest's new memory", q->index);
}

static bool is_configured(const struct queue_conf *c)
{
    return c->ring.num != 0 && c->mem != NULL && (c->ring.desc_addr | c->ring.avail_addr | c->ring.used_addr) != 0;
}

/* Everything but a stop is done on the spot. */
static void take_conf(struct queue *q, struct queue_conf *c)
{
    int rc;

    q->applying = c;
    if (may_answer(q) && !c->exit)
        queue_flush(q);
    if (c->exit || c->drop)
        queue_drop_all(q);
    if (c->exit)
        return;
    if (c->inflight.region != q->inflight.region) {
        queue_drop_all(q); /* the requests held are marked in the old region */
        q->inflight = c->inflight;
    }
    swap_memory(q, c);
    if (!c->ring.started && q->running) {
        bool drain = may_answer(q) || (!q->broken && q->vring.used != NULL);

        q->draining = true;
        q->drain_until_us = drain ? now_us() + (int64_t)c->drain_ms * 1000 : 0;
    } else {
        swap_fds(q, c);
    }
    q->enabled = c->ring.enabled;
    if (!c->ring.started || c->new_kick)
        q->start_failed = false;
    q->polled = c->ring.started && q->kick_fd < 0;
    if (c->ring.started && !q->running && c->rc == 0 && is_configured(c)) {
        rc = queue_start(q, c);
        if (rc != 0)
            c->rc = rc;
        if (rc != 0 && !q->start_failed)
            queue_signal_error(q);
        q->start_failed = rc != 0;
    }
    if (!q->draining)
        acknowledge(q);
}

/* True once the ring is stopped. What is still parked is held, silently: the guest may go on later (QEMU's stop and
 * cont), and EIO would kill what it runs. Only a migration cannot take them along. */
static bool finish_stop(struct queue *q)
{
    if (may_answer(q)) {
        if (q->log_all && q->n_parked > 0) {
            queue_fail_parked(q);
            if (q->n_parked > 0 && !q->broken)
                return false; /* being woken: a moment */
        }
        queue_flush(q);
    }
    q->applying->ring.base = q->vring.last_avail;
    q->draining = false;
    q->running = false;
    swap_fds(q, q->applying);
    acknowledge(q);
    return true;
}

/* ---- the loop */

static bool fetch(struct queue *q)
{
    int64_t now;
    uint16_t head;
    int n;

    if (q->next_resubmit < q->n_resubmit) {
        now = q->worker.now_us = now_us();
        for (n = 0; n < FETCH_BUDGET && q->next_resubmit < q->n_resubmit && !q->broken; n++)
            queue_fetch_head(q, q->resubmit[q->next_resubmit++], true, now);
        return true;
    }
    n = vring_pending(&q->vring);
    if (n == 0)
        return false;
    if (n < 0) {
        queue_break(q, VND_CAUSE_GUEST, "more requests are said to be available than the ring has entries");
        return false;
    }
    vring_disarm(&q->vring);
    now = q->worker.now_us = now_us();
    for (n = n < FETCH_BUDGET ? n : FETCH_BUDGET; n > 0 && !q->broken; n--)
        if (vring_next(&q->vring, &head) != 0)
            queue_break(q, VND_CAUSE_GUEST, "a head beyond the ring was offered");
        else
            queue_fetch_head(q, head, false, now);
    return true;
}

static int ms_until(int64_t when_us, int64_t now)
{
    int64_t ms = when_us > now ? (when_us - now + 999) / 1000 : 0;

    return ms < 1000000 ? (int)ms : 1000000;
}

/* How long the thread may sleep; -1: until it is woken. */
static int sleep_ms(const struct queue *q)
{
    int ms = -1, m;

    if (q->draining)
        ms = q->n_parked > 0 ? ms_until(q->drain_until_us, now_us()) : 0;
    if (q->polled && is_active(q) && (ms < 0 || ms > POLL_MS))
        ms = POLL_MS;
    if (may_answer(q)) {
        for (const struct queue_slot *s = q->first; s != NULL; s = s->next) {
            if (s->state != SLOT_PARKED)
                continue;
            m = ms_until(s->deadline_us, now_us());
            return ms < 0 || m < ms ? m : ms;
        }
    }
    return ms;
}

/* Whether there is something to do now, asked after `sleeping` was set. */
static bool must_stay_awake(struct queue *q)
{
    if (atomic_load(&q->posted) != NULL)
        return true;
    if (may_answer(q) && (q->todo != NULL || atomic_load(&q->done) != NULL))
        return true;
    return is_active(q) && vring_arm(&q->vring);
}

static void run(struct queue *q)
{
    struct queue_conf *c;

    for (;;) {
        bool work = false;

        if (atomic_load_explicit(&q->posted, memory_order_relaxed) != NULL) {
            c = atomic_exchange_explicit(&q->posted, NULL, memory_order_acquire);
            take_conf(q, c);
            if (c == q->applying && c->exit)
                return;
        }
        if (may_answer(q)) {
            if (q->frozen)
                queue_thaw(q, now_us());
            q->frozen = false;
            if (atomic_load_explicit(q->mem_lost, memory_order_relaxed))
                queue_break(q, VND_CAUSE_IO, NULL);
            queue_run_done(q);
            if (q->first != NULL)
                queue_expire(q, now_us());
        } else {
            q->frozen = true;
        }
        if (is_active(q))
            work = fetch(q);
        if (q->draining && (q->n_parked == 0 || !may_answer(q) || now_us() >= q->drain_until_us) && finish_stop(q))
            continue;
        if (work)
            continue;
        if (may_answer(q))
            queue_flush(q);
        atomic_store(&q->sleeping, 1);
        if (!must_stay_awake(q))
            queue_sleep(q, sleep_ms(q));
        atomic_store_explicit(&q->sleeping, 0, memory_order_relaxed);
    }
}

static void *queue_main(void *arg)
{
    struct queue *q = arg;

    sigbus_unblock();
    run(q);
    /* A waker that has delivered may still be about to look at the eventfd. */
    while (atomic_load_explicit(&q->wakers, memory_order_acquire) != 0)
        sched_yield();
    acknowledge(q);
    return NULL;
}

/* ---- control's side */

int queue_init(struct queue *q, struct vnd_engine *e, struct vnd_vfs *v, struct fuse_session *s, uint32_t index,
               _Atomic int *mem_lost, _Atomic uint32_t *segs_bytes)
{
    struct epoll_event ev = { .events = EPOLLIN | EPOLLET };
    char name[16];
    int rc;

    q->engine = e;
    q->session = s;
    q->index = index;
    q->mem_lost = mem_lost;
    q->segs_bytes = segs_bytes;
    q->deadline_us = (int64_t)e->cfg.read_deadline_ms * 1000;
    q->kick_fd = q->call_fd = q->err_fd = q->epoll_fd = q->wake_fd = -1;
    pthread_mutex_init(&q->lock, NULL);
    pthread_cond_init(&q->acked, NULL);
    pthread_mutex_init(&q->parked_lock, NULL);
    rc = fuse_worker_init(&q->worker, e, v);
    if (rc != 0)
        return rc;
    atomic_store(&q->worker.counters.waiting, queue_list_waiting);
    q->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    q->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (q->epoll_fd < 0 || q->wake_fd < 0 || epoll_ctl(q->epoll_fd, EPOLL_CTL_ADD, q->wake_fd, &ev) != 0) {
        rc = -errno;
    } else {
        snprintf(name, sizeof(name), "vnd-queue%u", index);
        rc = thread_start(&q->thread, name, queue_main, q);
        if (rc > 0)
            rc = -rc;
    }
    if (rc != 0) {
        close_fd(&q->epoll_fd);
        close_fd(&q->wake_fd);
        fuse_worker_free(&q->worker, v);
    }
    return rc;
}

void queue_post(struct queue *q, struct queue_conf *c)
{
    uint64_t one = 1;

    pthread_mutex_lock(&q->lock);
    q->busy = true;
    pthread_mutex_unlock(&q->lock);
    atomic_store(&q->posted, c);
    if (write(q->wake_fd, &one, sizeof(one)) < 0) {
        /* A full eventfd still raises an edge when it is written or found readable; it cannot fill in practice. */
    }
}

void queue_wait(struct queue *q)
{
    pthread_mutex_lock(&q->lock);
    while (q->busy)
        pthread_cond_wait(&q->acked, &q->lock);
    pthread_mutex_unlock(&q->lock);
}

void queue_free(struct queue *q, struct vnd_vfs *v)
{
    pthread_join(q->thread, NULL);
    fuse_worker_free(&q->worker, v);
    free(q->slots);
    free(q->resubmit);
    close_fd(&q->kick_fd);
    close_fd(&q->call_fd);
    close_fd(&q->err_fd);
    close_fd(&q->epoll_fd);
    close_fd(&q->wake_fd);
    pthread_mutex_destroy(&q->lock);
    pthread_mutex_destroy(&q->parked_lock);
    pthread_cond_destroy(&q->acked);
}
