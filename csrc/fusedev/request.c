/* fusedev/request.c -- requests of the /dev/fuse transport: read, served, parked, woken, expired, interrupted, answered. */
#include "fusedev/internal.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/sigbus.h"

/* ---- slots */

/* Waits for memory rather than fail: a request that was read must be answered. */
static struct fusedev_slot *take_slot(struct vnd_fusedev *d)
{
    const struct timespec pause = { .tv_nsec = 1000000 };
    struct fusedev_slot *s;

    for (;;) {
        pthread_mutex_lock(&d->parked.lock);
        s = d->free;
        if (s != NULL)
            d->free = s->next_free;
        pthread_mutex_unlock(&d->parked.lock);
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

    pthread_mutex_lock(&d->parked.lock);
    s->next_free = d->free;
    d->free = s;
    pthread_mutex_unlock(&d->parked.lock);
}

/* These two under the lock. */
static void list_slot(struct vnd_fusedev *d, struct fusedev_slot *s)
{
    s->state = FUSEDEV_PARKED;
    s->parked.wakes = false;
    parklist_add(&d->parked, &s->parked);
}

static void unlist_slot(struct vnd_fusedev *d, struct fusedev_slot *s)
{
    parklist_remove(&d->parked, &s->parked);
    s->state = FUSEDEV_SERVING;
}

static struct fusedev_slot *slot_of_parked(struct parked *p)
{
    return (struct fusedev_slot *)(void *)((char *)p - offsetof(struct fusedev_slot, parked));
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

/* ENOENT: the process that asked is gone. ENODEV: the mount is. Neither matters. */
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

    pthread_mutex_lock(&d->parked.lock);
    listed = !s->woken;
    first = d->parked.first == NULL;
    *interrupted = listed && is_early(d, s->req.in.unique);
    s->woken = false;
    if (listed)
        list_slot(d, s);
    pthread_mutex_unlock(&d->parked.lock);
    if (listed && first)
        wakelist_raise(&d->wakes); /* the finisher sleeps without a deadline */
    return listed;
}

/* The kernel wants the request ended: at once if no wake is under way for it. */
static void interrupt_request(struct fusedev_worker *w, uint64_t unique)
{
    struct vnd_fusedev *d = w->dev;
    struct fusedev_slot *s = NULL;

    pthread_mutex_lock(&d->parked.lock);
    for (struct parked *p = d->parked.first; p != NULL && s == NULL; p = p->next)
        if (p->unique == unique)
            s = slot_of_parked(p);
    if (s != NULL && s->state == FUSEDEV_PARKED && store_wait_cancel(&s->req.wait)) {
        unlist_slot(d, s);
    } else { /* not parked yet, or woken and about to be served, which may park it again */
        d->early[d->early_at++ % FUSEDEV_EARLY_MAX] = unique;
        s = NULL;
    }
    pthread_mutex_unlock(&d->parked.lock);
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
    r->wait.who = (uintptr_t)d->session;
    s->fd = w->fd;
    s->state = FUSEDEV_SERVING;
    s->woken = false;
    w->fuse.now_us = now_us();
    r->again = false;
    r->once = NULL;
    r->began_us = 0;
    r->step = 0;
    r->wait.deadline_us = w->fuse.now_us + d->deadline_us;
    r->wait.session = (uintptr_t)d->session;
    s->parked = (struct parked){ .since_us = w->fuse.now_us,
                                 .deadline_us = r->wait.deadline_us,
                                 .nodeid = r->in.nodeid,
                                 .unique = r->in.unique,
                                 .opcode = r->in.opcode };
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
            event_raise(d->ended_fd);
            break;
        }
    }
    atomic_store(&w->left, true);
    return NULL;
}

/* ---- parked requests */

static void wake_slot(struct store_wait *w)
{
    wakelist_push(&((struct fusedev_slot *)w->owner)->dev->wakes, &w->done);
}

static void finish_woken(struct fusedev_worker *w, struct fusedev_slot *s)
{
    struct vnd_fusedev *d = w->dev;
    bool mine;

    pthread_mutex_lock(&d->parked.lock);
    mine = s->state != FUSEDEV_SERVING;
    if (mine)
        unlist_slot(d, s);
    else
        s->woken = true; /* the thread that is about to list it serves it again instead */
    pthread_mutex_unlock(&d->parked.lock);
    if (!mine)
        return;
    if (atomic_load_explicit(&d->abandon, memory_order_acquire)) {
        store_wait_done(&s->req.wait);
        give_slot(s);
    } else if (serve_slot(w, s)) {
        give_slot(s);
    }
}

/* Takes a request whose deadline has passed off the list, for the caller to fail; NULL: there is none. abandon: whatever its
 * deadline. */
static struct fusedev_slot *take_expired(struct vnd_fusedev *d, int64_t now, bool abandon)
{
    struct fusedev_slot *expired = NULL;

    pthread_mutex_lock(&d->parked.lock);
    for (struct parked *p = d->parked.first; p != NULL && expired == NULL; p = p->next) {
        struct fusedev_slot *s = slot_of_parked(p);

        if (s->state != FUSEDEV_PARKED)
            continue;
        if (!abandon && p->deadline_us > now)
            break;
        if (abandon ? store_wait_cancel(&s->req.wait)
                    : store_wait_expire(&s->req.wait, d->engine, "host read", d->deadline_us / 1000)) {
            expired = s;
        } else { /* being woken: a moment */
            s->state = FUSEDEV_EXPIRED;
            p->wakes = true;
        }
    }
    if (expired != NULL)
        unlist_slot(d, expired);
    pthread_mutex_unlock(&d->parked.lock);
    return expired;
}

static void expire_parked(struct fusedev_worker *w)
{
    struct vnd_fusedev *d = w->dev;
    bool abandon = atomic_load_explicit(&d->abandon, memory_order_acquire);
    struct fusedev_slot *s;

    while ((s = take_expired(d, now_us(), abandon)) != NULL) {
        if (!abandon) {
            atomic_fetch_add_explicit(&w->fuse.counters.expired, 1, memory_order_relaxed);
            fail_slot(w, s, EIO);
        }
        give_slot(s);
    }
}

static int ms_to_deadline(struct vnd_fusedev *d)
{
    int ms;

    pthread_mutex_lock(&d->parked.lock);
    ms = parklist_ms_left(&d->parked, now_us());
    pthread_mutex_unlock(&d->parked.lock);
    return ms;
}

static bool is_over(struct vnd_fusedev *d)
{
    bool over;

    if (!atomic_load_explicit(&d->abandon, memory_order_acquire))
        return false;
    pthread_mutex_lock(&d->parked.lock);
    over = d->parked.n == 0;
    pthread_mutex_unlock(&d->parked.lock);
    return over;
}

void *fusedev_finisher_main(void *arg)
{
    struct fusedev_worker *w = arg;
    struct vnd_fusedev *d = w->dev;
    struct pollfd wait = { .fd = d->wakes.fd, .events = POLLIN };

    sigbus_unblock();
    for (;;) {
        struct wake_item *item;
        int ms;

        while ((item = wakelist_take(&d->wakes)) != NULL)
            finish_woken(w, store_wait_of(item)->owner);
        expire_parked(w);
        if (is_over(d))
            break;
        /* A request that parks from here on has a later deadline than the one that ends this sleep; where nothing is parked,
         * the thread that parks the first one raises the eventfd (park_slot). */
        ms = ms_to_deadline(d);
        if (wakelist_sleep(&d->wakes) && !is_over(d))
            poll(&wait, 1, ms);
        wakelist_awake(&d->wakes);
        wakelist_clear(&d->wakes);
    }
    wakelist_wait(&d->wakes);
    return NULL;
}
