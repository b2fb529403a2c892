/* vhost/queue.c -- the queue's thread: its loop, and what control asks of it. See vhost/internal.h. */
#include "vhost/internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "base/seccomp.h"
#include "base/sigbus.h"

#define FETCH_BUDGET 64      /* heads between two looks at the woken */
#define PENDING_AN_ANSWER 16 /* heads that a fetch finds for each answer that may wait for another one (measured) */
/* A ring without a kick fd is looked at this often while it is used; while it is not, each time after twice as long, up to
 * the maximum, because a front-end has many rings and a daemon many front-ends. */
#define POLL_MS 1
#define POLL_MAX_MS 64
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
        c->rc = failure_set(&c->failure, -errno, VND_CAUSE_IO, "ring %u: its kick fd cannot be waited on: %s", q->index,
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
                   "front-end %u: queue %u pauses: its ring is not in the guest's new memory", q->common->number,
                   q->index);
}

static bool is_configured(const struct queue_conf *c)
{
    return c->ring.num != 0 && c->mem != NULL && (c->ring.desc_addr | c->ring.avail_addr | c->ring.used_addr) != 0;
}

/* Makes the queue be as c says. All but the end of a stop is done on the spot; finish_stop acknowledges that. */
static void take_conf(struct queue *q, struct queue_conf *c)
{
    int rc;

    q->applying = c;
    q->carry = c->carry;
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
        /* What goes along need not be waited for. */
        q->drain_until_us = drain && !(q->carry && q->log_all) ? now_us() + (int64_t)c->drain_ms * 1000 : 0;
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
 * cont), and EIO would kill what it runs. A migration takes them along where the front-end takes our state. */
static bool finish_stop(struct queue *q)
{
    if (may_answer(q)) {
        if (q->log_all && q->parked.n > 0) {
            if (q->carry)
                queue_set_aside(q);
            else
                queue_fail_parked(q);
            if (q->parked.n > 0 && !q->broken)
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

/* A front-end with few requests in flight waits for each answer: it sees each at once. One with many has others to go on
 * with, and moving used.idx for each would pass its cache line between the two processors each time. */
static uint32_t batch_for(uint32_t pending)
{
    uint32_t n = pending / PENDING_AN_ANSWER;

    return n < 1 ? 1 : n < VRING_BATCH ? n : VRING_BATCH;
}

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
    q->publish_batch = batch_for((uint32_t)n);
    slice_count(&q->slice, (uint32_t)n, 0);
    now = q->worker.now_us = now_us();
    for (n = n < FETCH_BUDGET ? n : FETCH_BUDGET; n > 0 && !q->broken; n--)
        if (vring_next(&q->vring, &head) != 0)
            queue_break(q, VND_CAUSE_GUEST, "a head beyond the ring was offered");
        else
            queue_fetch_head(q, head, false, now);
    return true;
}

/* How long the thread may sleep; -1: until it is woken. */
static int sleep_ms(const struct queue *q)
{
    int64_t now = now_us();
    int ms = -1, deadline = may_answer(q) ? parklist_ms_left(&q->parked, now) : -1;

    if (q->draining && (q->parked.n == 0 || q->drain_until_us <= now))
        ms = 0;
    else if (q->draining)
        ms = (int)((q->drain_until_us - now + 999) / 1000);
    if (q->polled && is_active(q) && (ms < 0 || ms > q->poll_ms))
        ms = q->poll_ms;
    return deadline >= 0 && (ms < 0 || deadline < ms) ? deadline : ms;
}

/* Whether there is something to do now, asked after wakelist_sleep, which tells none_woken. */
static bool must_stay_awake(struct queue *q, bool none_woken)
{
    if (atomic_load(&q->posted) != NULL)
        return true;
    if (may_answer(q) && !none_woken)
        return true;
    return is_active(q) && vring_arm(&q->vring);
}

/* What a look before sleeping is for. */
static bool has_work(struct queue *q)
{
    return atomic_load_explicit(&q->posted, memory_order_relaxed) != NULL ||
           (may_answer(q) && !wakelist_empty(&q->wakes)) || (is_active(q) && vring_pending(&q->vring) != 0);
}

#define LOOKS_A_CLOCK 16 /* looks between two readings of the clock */

/* Nothing is left to do: looks for work, then sleeps. */
static void idle(struct queue *q)
{
    int64_t began = now_us(), now = began;
    int64_t until = began + haltpoll_window_us(&q->poll, began);

    slice_count(&q->slice, 0, 1);
    while (now < until) {
        for (int i = 0; i < LOOKS_A_CLOCK; i++) {
            if (has_work(q)) {
                now = now_us();
                haltpoll_looked(&q->poll, now - began, true);
                return;
            }
            haltpoll_relax();
        }
        now = now_us();
    }
    if (now != began)
        haltpoll_looked(&q->poll, now - began, false);
    if (!must_stay_awake(q, wakelist_sleep(&q->wakes))) {
        queue_sleep(q, sleep_ms(q));
        now = now_us();
        if (q->poll.max_us != 0)
            haltpoll_slept(&q->poll, now - began);
    }
    wakelist_awake(&q->wakes);
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
            if (atomic_load_explicit(&q->common->mem_lost, memory_order_relaxed))
                queue_break(q, VND_CAUSE_IO, NULL);
            queue_run_woken(q);
            if (q->parked.first != NULL)
                queue_expire(q, now_us());
        } else {
            q->frozen = true;
        }
        if (is_active(q))
            work = fetch(q);
        if (q->draining && (q->parked.n == 0 || !may_answer(q) || now_us() >= q->drain_until_us) && finish_stop(q))
            continue;
        if (work) {
            q->poll_ms = POLL_MS;
            continue;
        }
        if (may_answer(q))
            queue_flush(q);
        idle(q);
        q->poll_ms = q->poll_ms * 2 < POLL_MAX_MS ? q->poll_ms * 2 : POLL_MAX_MS;
    }
}

static void *queue_main(void *arg)
{
    struct queue *q = arg;

    sigbus_unblock();
    haltpoll_init(&q->poll, q->engine->cfg.poll_us, now_us()); /* reads how many processors there are: a file */
    engine_confine(q->engine,
                   vfs_session_kind(q->common->vfs) == VND_SESSION_RAFS ? VND_THREAD_QUEUE : VND_THREAD_SHARE);
    run(q);
    wakelist_wait(&q->wakes); /* the last push may have delivered and not returned */
    acknowledge(q);
    return NULL;
}

/* ---- control's side */

/* All that queue_init took. The counters go first: they lead other threads to the list of parked requests. */
static void release(struct queue *q)
{
    fuse_worker_free(&q->worker, q->common->vfs);
    parklist_destroy(&q->parked);
    free(q->slots);
    free(q->resubmit);
    close_fd(&q->kick_fd);
    close_fd(&q->call_fd);
    close_fd(&q->err_fd);
    close_fd(&q->epoll_fd);
    wakelist_close(&q->wakes);
    pthread_mutex_destroy(&q->lock);
    pthread_cond_destroy(&q->acked);
}

int queue_init(struct queue *q, struct queue_common *common, uint32_t index)
{
    struct epoll_event ev = { .events = EPOLLIN | EPOLLET };
    char name[16];
    int rc;

    q->common = common;
    q->engine = common->engine;
    q->session = common->session;
    q->kind = common->kind;
    q->index = index;
    q->publish_batch = 1;
    q->deadline_us = (int64_t)q->engine->cfg.read_deadline_ms * 1000;
    q->kick_fd = q->call_fd = q->err_fd = -1;
    q->poll_ms = POLL_MS;
    rc = fuse_worker_init(&q->worker, q->engine, common->vfs);
    if (rc != 0)
        return rc;
    parklist_init(&q->parked, &q->worker.counters);
    atomic_store(&q->worker.counters.parked_list, &q->parked);
    pthread_mutex_init(&q->lock, NULL);
    pthread_cond_init(&q->acked, NULL);
    rc = wakelist_open(&q->wakes);
    q->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (rc == 0 && (q->epoll_fd < 0 || epoll_ctl(q->epoll_fd, EPOLL_CTL_ADD, q->wakes.fd, &ev) != 0))
        rc = -errno;
    if (rc == 0) {
        snprintf(name, sizeof(name), "vnd-queue%u", index);
        rc = thread_start(&q->thread, name, queue_main, q);
    }
    if (rc != 0)
        release(q);
    return rc;
}

void queue_post(struct queue *q, struct queue_conf *c)
{
    pthread_mutex_lock(&q->lock);
    q->busy = true;
    pthread_mutex_unlock(&q->lock);
    atomic_store(&q->posted, c);
    wakelist_raise(&q->wakes);
}

void queue_wait(struct queue *q)
{
    pthread_mutex_lock(&q->lock);
    while (q->busy)
        pthread_cond_wait(&q->acked, &q->lock);
    pthread_mutex_unlock(&q->lock);
}

void queue_free(struct queue *q)
{
    pthread_join(q->thread, NULL);
    release(q);
}
