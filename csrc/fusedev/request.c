/* fusedev/request.c -- requests of the /dev/fuse transport: read, served, parked, woken, expired, interrupted, answered. */
#include "fusedev/internal.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fuse/internal.h"
#include "base/sigbus.h"

void fusedev_raise(int fd)
{
    uint64_t one = 1;
    ssize_t n = write(fd, &one, sizeof(one));

    (void)n;
}

/* ---- slots */

/* Waits for memory rather than fail: a request that was read must be answered. */
static struct fusedev_slot *take_slot(struct vnd_fusedev *d)
{
    const struct timespec pause = { .tv_nsec = 1000000 };
    struct fusedev_slot *s;

    for (;;) {
        pthread_mutex_lock(&d->lock);
        s = d->free;
        if (s != NULL)
            d->free = s->next;
        pthread_mutex_unlock(&d->lock);
        if (s == NULL)
            s = malloc(sizeof(*s));
        if (s != NULL)
            break;
        nanosleep(&pause, NULL);
    }
    memset(s, 0, sizeof(*s));
    s->dev = d;
    return s;
}

static void give_slot(struct fusedev_slot *s)
{
    struct vnd_fusedev *d = s->dev;

    pthread_mutex_lock(&d->lock);
    s->next = d->free;
    d->free = s;
    pthread_mutex_unlock(&d->lock);
}

static void note_oldest(struct vnd_fusedev *d)
{
    atomic_store_explicit(&d->finisher.fuse.counters.oldest_park_us, d->first ? d->first->parked_us : 0,
                          memory_order_relaxed);
}

/* These two under the lock. */
static void list_slot(struct vnd_fusedev *d, struct fusedev_slot *s)
{
    s->state = FUSEDEV_PARKED;
    s->prev = d->last;
    s->next = NULL;
    if (d->last != NULL)
        d->last->next = s;
    else
        d->first = s;
    d->last = s;
    d->n_parked++;
    note_oldest(d);
}

static void unlist_slot(struct vnd_fusedev *d, struct fusedev_slot *s)
{
    if (s->prev != NULL)
        s->prev->next = s->next;
    else
        d->first = s->next;
    if (s->next != NULL)
        s->next->prev = s->prev;
    else
        d->last = s->prev;
    s->prev = s->next = NULL;
    s->state = FUSEDEV_SERVING;
    d->n_parked--;
    note_oldest(d);
}

int fusedev_list_waiting(struct engine_counters *c, vnd_waiting *out, int max, int64_t now)
{
    struct vnd_fusedev *d =
        (struct vnd_fusedev *)(void *)((char *)c - offsetof(struct vnd_fusedev, finisher.fuse.counters));
    int n = 0;

    pthread_mutex_lock(&d->lock);
    for (const struct fusedev_slot *s = d->first; s != NULL && n < max; s = s->next)
        out[n++] = (vnd_waiting){ .nodeid = s->req.in.nodeid,
                                  .unique = s->req.in.unique,
                                  .opcode = s->req.in.opcode,
                                  .wait_us = now > s->parked_us ? (uint64_t)(now - s->parked_us) : 0 };
    pthread_mutex_unlock(&d->lock);
    return n;
}

/* ---- the request's memory: buffers of the thread that serves it */

static struct fusedev_slot *slot_of(struct req *r)
{
    return (struct fusedev_slot *)(void *)((char *)r - offsetof(struct fusedev_slot, req));
}

static int op_in_copy(struct req *r, uint32_t off, void *dst, uint32_t len)
{
    const struct fusedev_worker *w = slot_of(r)->at;

    /* The buffer holds another request once this one was parked. */
    if (r->wait.parked_once || w->in == NULL || off > r->body_len || len > r->body_len - off)
        return -EINVAL;
    memcpy(dst, w->in + sizeof(r->in) + off, len);
    return 0;
}

static int op_out_copy(struct req *r, uint32_t off, const void *src, uint32_t len)
{
    if (off > r->out_cap || len > r->out_cap - off)
        return -EFAULT;
    memcpy(slot_of(r)->at->out + off, src, len);
    return 0;
}

static int op_out_iov(struct req *r, uint32_t off, uint32_t len, struct iovec *iov, int max)
{
    if (max < 1 || off > r->out_cap || len > r->out_cap - off)
        return -EFAULT;
    iov[0] = (struct iovec){ .iov_base = slot_of(r)->at->out + off, .iov_len = len };
    return 1;
}

static void op_out_dirty(struct req *r, uint32_t off, uint32_t len)
{
}

static const struct req_ops fusedev_req_ops = {
    .in_copy = op_in_copy,
    .out_copy = op_out_copy,
    .out_iov = op_out_iov,
    .out_dirty = op_out_dirty,
};

static void wake_slot(struct store_wait *w);

/* ---- serving */

/* Errors are no matter: whoever asked is gone (ENOENT), or the whole mount is (ENODEV). */
static void write_reply(struct fusedev_worker *w, const struct fusedev_slot *s)
{
    ssize_t n;

    do
        n = write(s->fd, w->out, s->req.out_len);
    while (n < 0 && errno == EINTR);
    if (n < 0 && errno != ENOENT && errno != ENODEV)
        engine_say(w->dev->engine, VND_LEVEL_WARNING, VND_CAUSE_IO,
                   "a reply to operation %u was refused by the kernel: %s", s->req.in.opcode, strerror(errno));
}

static void fail_slot(struct fusedev_worker *w, struct fusedev_slot *s, int error)
{
    s->at = w;
    if (fuse_session_fail(w->dev->session, &w->fuse, &s->req, error) == REQ_REPLY)
        write_reply(w, s);
}

/* Under the lock. */
static bool is_early(const struct vnd_fusedev *d, uint64_t unique)
{
    for (uint32_t i = 0; i < FUSEDEV_EARLY_MAX; i++)
        if (d->early[i] == unique)
            return true;
    return false;
}

/* False: it was woken in the meantime and must be served again. *interrupted: its interrupt is here already. */
static bool park_slot(struct vnd_fusedev *d, struct fusedev_slot *s, bool *interrupted)
{
    bool listed, first;

    pthread_mutex_lock(&d->lock);
    listed = !s->woken;
    first = d->first == NULL;
    *interrupted = listed && is_early(d, s->req.in.unique);
    s->woken = false;
    if (listed)
        list_slot(d, s);
    pthread_mutex_unlock(&d->lock);
    if (listed && first)
        fusedev_raise(d->wake_fd); /* the finisher sleeps without a deadline */
    return listed;
}

/* The reader wants its read ended: at once if nothing is under way for it. */
static void interrupt_request(struct fusedev_worker *w, uint64_t unique)
{
    struct vnd_fusedev *d = w->dev;
    struct fusedev_slot *s;

    pthread_mutex_lock(&d->lock);
    for (s = d->first; s != NULL; s = s->next)
        if (s->req.in.unique == unique)
            break;
    if (s != NULL && s->state == FUSEDEV_PARKED && store_wait_cancel(&s->req.wait)) {
        unlist_slot(d, s);
    } else { /* not parked yet, or woken and about to be served, which may park it again */
        d->early[d->early_at++ % FUSEDEV_EARLY_MAX] = unique;
        s = NULL;
    }
    pthread_mutex_unlock(&d->lock);
    if (s != NULL) {
        fail_slot(w, s, EINTR);
        give_slot(s);
    }
}

/* True: the slot is free again; false: it is parked, or another's. */
static bool serve_slot(struct fusedev_worker *w, struct fusedev_slot *s)
{
    uint64_t unique = s->req.in.unique;
    enum req_verdict verdict;
    bool interrupted;

    do {
        s->at = w;
        verdict = fuse_session_serve(w->dev->session, &w->fuse, &s->req);
        if (verdict == REQ_REPLY)
            write_reply(w, s);
        if (verdict != REQ_PARKED)
            return true;
        if (s->parked_us == 0)
            s->parked_us = s->deadline_us - w->dev->deadline_us;
    } while (!park_slot(w->dev, s, &interrupted));
    if (interrupted)
        interrupt_request(w, unique);
    return false;
}

/* True: the slot is free again. */
static bool take_request(struct fusedev_worker *w, struct fusedev_slot *s, uint32_t len)
{
    struct vnd_fusedev *d = w->dev;
    struct req *r = &s->req;

    w->in_len = len;
    if (len < sizeof(r->in))
        return true;
    memcpy(&r->in, w->in, sizeof(r->in));
    r->body_len = len - (uint32_t)sizeof(r->in);
    r->args_len = r->body_len < REQ_ARGS_MAX ? r->body_len : REQ_ARGS_MAX;
    memcpy(r->args, w->in + sizeof(r->in), r->args_len);
    if (r->args_len < REQ_ARGS_MAX)
        r->args[r->args_len] = 0;
    r->args_nul = 0;
    r->out_cap = FUSEDEV_OUT_BYTES;
    r->out_len = 0;
    r->ops = &fusedev_req_ops;
    r->session_gen = fuse_session_gen(d->session);
    if (r->in.opcode == FUSE_OP_INTERRUPT) {
        uint64_t unique = 0;

        if (r->args_len >= sizeof(unique))
            memcpy(&unique, r->args, sizeof(unique));
        interrupt_request(w, unique);
        return true;
    }
    store_wait_init(&r->wait, wake_slot, s);
    s->fd = w->fd;
    s->state = FUSEDEV_SERVING;
    s->woken = false;
    s->parked_us = 0;
    w->fuse.now_us = now_us();
    r->began_us = 0;
    s->deadline_us = w->fuse.now_us + d->deadline_us;
    r->wait.deadline_us = s->deadline_us;
    return serve_slot(w, s);
}

void *fusedev_reader_main(void *arg)
{
    struct fusedev_worker *w = arg;
    struct vnd_fusedev *d = w->dev;
    sigset_t leave;

    sigbus_unblock();
    sigemptyset(&leave);
    sigaddset(&leave, FUSEDEV_SIGNAL_LEAVE);
    pthread_sigmask(SIG_UNBLOCK, &leave, NULL);
    while (!atomic_load_explicit(&d->stop, memory_order_acquire)) {
        ssize_t n;

        if (w->slot == NULL)
            w->slot = take_slot(d);
        n = read(w->fd, w->in, FUSEDEV_IN_BYTES);
        if (n > 0) {
            if (!take_request(w, w->slot, (uint32_t)n))
                w->slot = NULL;
        } else if (n == 0 || (errno != EINTR && errno != EAGAIN && errno != ENOENT)) {
            if (n < 0 && errno != ENODEV)
                engine_say(d->engine, VND_LEVEL_ERROR, VND_CAUSE_IO, "reading /dev/fuse: %s", strerror(errno));
            fusedev_raise(d->ended_fd);
            break;
        }
    }
    atomic_store(&w->left, true);
    return NULL;
}

/* ---- parked requests */

/* Any thread. After the last line the device may be gone; until then wakers keeps it. */
static void wake_slot(struct store_wait *w)
{
    struct vnd_fusedev *d = ((struct fusedev_slot *)w->owner)->dev;
    struct store_wait *top;

    atomic_fetch_add_explicit(&d->wakers, 1, memory_order_relaxed);
    top = atomic_load_explicit(&d->done, memory_order_relaxed);
    do {
        w->done_next = top;
    } while (!atomic_compare_exchange_weak(&d->done, &top, w));
    if (atomic_load(&d->sleeping) && atomic_exchange(&d->sleeping, 0))
        fusedev_raise(d->wake_fd);
    atomic_fetch_sub_explicit(&d->wakers, 1, memory_order_release);
}

/* All woken ones, oldest first. */
static struct store_wait *take_done(struct vnd_fusedev *d)
{
    struct store_wait *w = atomic_exchange_explicit(&d->done, NULL, memory_order_acquire), *list = NULL;

    while (w != NULL) {
        struct store_wait *next = w->done_next;

        w->done_next = list;
        list = w;
        w = next;
    }
    return list;
}

static void finish_woken(struct fusedev_worker *w, struct fusedev_slot *s)
{
    struct vnd_fusedev *d = w->dev;
    bool mine;

    pthread_mutex_lock(&d->lock);
    mine = s->state != FUSEDEV_SERVING;
    if (mine)
        unlist_slot(d, s);
    else
        s->woken = true; /* whoever is about to list it serves it again instead */
    pthread_mutex_unlock(&d->lock);
    if (!mine)
        return;
    if (atomic_load_explicit(&d->abandon, memory_order_acquire)) {
        store_wait_done(&s->req.wait);
        give_slot(s);
    } else if (serve_slot(w, s)) {
        give_slot(s);
    }
}

/* Takes one whose time is over off the list: the one to fail, or NULL. abandon: any. */
static struct fusedev_slot *take_expired(struct vnd_fusedev *d, int64_t now, bool abandon)
{
    struct fusedev_slot *s;

    pthread_mutex_lock(&d->lock);
    for (s = d->first; s != NULL; s = s->next) {
        if (s->state != FUSEDEV_PARKED)
            continue;
        if (!abandon && s->deadline_us > now) {
            s = NULL;
            break;
        }
        if (store_wait_cancel(&s->req.wait)) {
            unlist_slot(d, s);
            break;
        }
        s->state = FUSEDEV_EXPIRED; /* being woken: a moment */
    }
    pthread_mutex_unlock(&d->lock);
    return s;
}

static void expire_parked(struct fusedev_worker *w)
{
    struct vnd_fusedev *d = w->dev;
    bool abandon = atomic_load_explicit(&d->abandon, memory_order_acquire);
    struct fusedev_slot *s;

    while ((s = take_expired(d, now_us(), abandon)) != NULL) {
        if (!abandon) {
            atomic_fetch_add_explicit(&w->fuse.counters.expired, 1, memory_order_relaxed);
            engine_say(d->engine, VND_LEVEL_ERROR, VND_CAUSE_DEADLINE,
                       "host read answered with EIO: its data did not come within %lld ms",
                       (long long)(d->deadline_us / 1000));
            fail_slot(w, s, EIO);
        }
        give_slot(s);
    }
}

/* Milliseconds until the oldest parked request expires, -1: none is. */
static int ms_to_deadline(struct vnd_fusedev *d)
{
    struct fusedev_slot *s;
    int64_t ms = -1;

    pthread_mutex_lock(&d->lock);
    for (s = d->first; s != NULL && s->state != FUSEDEV_PARKED; s = s->next)
        ;
    if (s != NULL) {
        ms = (s->deadline_us - now_us() + 999) / 1000;
        ms = ms < 0 ? 0 : ms > 1000000 ? 1000000 : ms;
    }
    pthread_mutex_unlock(&d->lock);
    return (int)ms;
}

static bool is_over(struct vnd_fusedev *d)
{
    bool over;

    if (!atomic_load_explicit(&d->abandon, memory_order_acquire))
        return false;
    pthread_mutex_lock(&d->lock);
    over = d->n_parked == 0;
    pthread_mutex_unlock(&d->lock);
    return over;
}

void *fusedev_finisher_main(void *arg)
{
    struct fusedev_worker *w = arg;
    struct vnd_fusedev *d = w->dev;
    struct pollfd wait = { .fd = d->wake_fd, .events = POLLIN };
    uint64_t count;

    sigbus_unblock();
    for (;;) {
        struct store_wait *next, *list = take_done(d);
        int ms;

        for (; list != NULL; list = next) {
            next = list->done_next;
            finish_woken(w, list->owner);
        }
        expire_parked(w);
        if (is_over(d))
            break;
        /* What is parked from here on is younger than the one this sleeps for, or says so when it is the first. */
        ms = ms_to_deadline(d);
        atomic_store(&d->sleeping, 1);
        if (atomic_load(&d->done) == NULL && !is_over(d))
            poll(&wait, 1, ms);
        atomic_store_explicit(&d->sleeping, 0, memory_order_relaxed);
        if (read(d->wake_fd, &count, sizeof(count)) < 0)
            continue; /* nobody raised it */
    }
    while (atomic_load_explicit(&d->wakers, memory_order_acquire) != 0)
        sched_yield();
    return NULL;
}
