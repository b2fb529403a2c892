/* precontent/precontent.c -- the serving thread: events, requests, life. See precontent/internal.h. */
#include "precontent/internal.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/sigbus.h"

/* Chunks that are invalidated again and again while they are looked at: after that many looks it is an error. */
#define TRIES 64

/* ---------------------------------------------------------------- requests: the serving thread's */

static void finish_request(struct precontent_request *r, uint32_t response)
{
    struct vnd_precontent *p = r->p;
    int fd = r->slot->fd;
    bool held = r->slot->held;

    store_wait_done(&r->wait);
    if (r->parked.listed)
        parklist_remove(&p->parked, &r->parked);
    precontent_answer(p->group_fd, fd, response);
    /* In this order: as long as the number is taken no other event can have it. */
    atomic_store(&r->slot->waits, 0);
    if (held)
        close(fd);
    r->next_free = p->free;
    p->free = r;
}

static void wake_request(struct store_wait *w)
{
    wakelist_push(&((struct precontent_request *)w->owner)->p->wakes, &w->done);
}

static struct precontent_request *take_request(struct vnd_precontent *p)
{
    struct precontent_request *r = p->free;

    p->free = r->next_free;
    store_wait_init(&r->wait, wake_request, r);
    r->wait.who = (uintptr_t)p;
    r->at = r->slot->offset;
    r->parked = (struct parked){ .since_us = now_us() };
    r->parked.deadline_us = r->wait.deadline_us = r->parked.since_us + p->ttl_us;
    r->wait.session = (uintptr_t)p;
    return r;
}

/* 0: all is ready; -EINPROGRESS: it will be woken; -errno. */
static int want_range(struct precontent_request *r)
{
    struct vnd_precontent *p = r->p;
    bool any = r->slot->blob == PRECONTENT_ANY_BLOB;
    struct extent ext[PRECONTENT_EXTENTS];

    for (; r->blob < p->n_blobs; r->blob++) {
        struct precontent_blob *b = &p->blobs[r->blob];
        uint64_t end = precontent_end(r->slot, b), at;
        for (int tries = 0; (at = r->at) < end;) {
            int n = precontent_gather(b, &at, end, any, ext), rc;
            if (n < 0) {
                engine_say(p->engine, VND_LEVEL_ERROR, VND_CAUSE_FORMAT,
                           "blob %s: a file lies at %llu, where the image names no chunk: it is damaged",
                           blob_id(b->blob), (unsigned long long)r->at);
                return n;
            }
            rc = n ? store_want(&r->wait, ext, n) : 0;
            if (!rc)
                rc = precontent_copy(b, ext, n);
            if (rc == -EAGAIN && ++tries < TRIES)
                continue;
            if (rc)
                return rc;
            r->at = at;
        }
        if (!any)
            break;
        r->at = r->slot->offset;
    }
    return 0;
}

static uint32_t response_of(int rc)
{
    return rc == 0 ? PRECONTENT_ALLOW : PRECONTENT_DENY(rc == -ENOSPC || rc == -EDQUOT ? -rc : EIO);
}

static void serve_request(struct precontent_request *r)
{
    struct vnd_precontent *p = r->p;
    int rc = want_range(r);

    if (rc == -EINPROGRESS) {
        if (!r->parked.listed) { /* else it keeps its place */
            atomic_fetch_add_explicit(&p->counters.parked, 1, memory_order_relaxed);
            parklist_add(&p->parked, &r->parked);
        }
        return;
    }
    atomic_fetch_add_explicit(&p->counters.fuse_requests, 1, memory_order_relaxed);
    if (rc)
        atomic_fetch_add_explicit(&p->counters.fuse_errors, 1, memory_order_relaxed);
    else if (!r->parked.listed)
        atomic_fetch_add_explicit(&p->counters.hits, 1, memory_order_relaxed);
    finish_request(r, response_of(rc));
}

static void serve_woken(struct vnd_precontent *p)
{
    struct wake_item *item;

    while ((item = wakelist_take(&p->wakes)) != NULL)
        serve_request(store_wait_of(item)->owner);
}

static struct precontent_request *request_of(struct parked *p)
{
    return (struct precontent_request *)(void *)((char *)p - offsetof(struct precontent_request, parked));
}

static void expire_requests(struct vnd_precontent *p)
{
    int64_t now = now_us();
    struct parked *next;

    for (struct parked *at = p->parked.first; at && at->deadline_us <= now; at = next) {
        struct precontent_request *r = request_of(at);

        next = at->next;
        if (!store_wait_expire(&r->wait, p->engine, "a kernel read", p->ttl_us / 1000))
            continue; /* being woken: a moment */
        atomic_fetch_add_explicit(&p->counters.expired, 1, memory_order_relaxed);
        finish_request(r, PRECONTENT_DENY(EIO));
    }
}

/* ---------------------------------------------------------------- events */

/* One read(2). */
static void read_events(struct vnd_precontent *p)
{
    struct precontent_state *s = p->state;
    struct precontent_request *mine[2];
    struct precontent_event ev;
    size_t at = 0, n;
    int k = 0;

    if (read(p->group_fd, s->buffer, sizeof s->buffer) <= 0)
        return;
    while (k < 2 && p->free && (n = precontent_parse(s->buffer + at, sizeof s->buffer - at, &ev)) != 0) {
        at += n;
        if (ev.mask & PRECONTENT_ACCESS) {
            struct precontent_slot *slot = p->free->slot;
            precontent_fill(slot, &ev, precontent_blob_of(p, ev.fd));
            mine[k] = take_request(p);
            mine[k]->blob = slot->blob == PRECONTENT_ANY_BLOB ? 0 : slot->blob;
            k++;
        } else {
            if (precontent_count(s, ev.mask))
                event_raise(p->ended_fd);
            if (ev.fd >= 0)
                close(ev.fd);
        }
    }
    memset(s->buffer, 0, at);
    for (int i = 0; i < k; i++)
        serve_request(mine[i]);
}

/* What a predecessor had read and not answered; vnd_precontent_reserve holds its numbers. */
static void adopt_events(struct vnd_precontent *p)
{
    struct precontent_request *adopted = NULL, *r;

    for (uint32_t i = 0; i < PRECONTENT_SLOTS; i++) {
        bool waits = atomic_load(&p->state->slots[i].waits);
        struct precontent_request **list = waits ? &adopted : &p->free;
        p->requests[i].next_free = *list;
        *list = &p->requests[i];
    }
    while ((r = adopted) != NULL) {
        adopted = r->next_free;
        r->next_free = p->free;
        p->free = r;
        take_request(p);
        if (r->slot->blob >= p->n_blobs)
            r->slot->blob = PRECONTENT_ANY_BLOB;
        r->blob = r->slot->blob == PRECONTENT_ANY_BLOB ? 0 : r->slot->blob;
        serve_request(r);
    }
}

static void *serve_main(void *arg)
{
    struct vnd_precontent *p = arg;

    sigbus_unblock();
    adopt_events(p);
    while (!atomic_load_explicit(&p->stop, memory_order_acquire)) {
        struct pollfd wait[2] = { { .fd = p->wakes.fd, .events = POLLIN }, { .fd = p->group_fd, .events = POLLIN } };
        int ms;

        serve_woken(p);
        expire_requests(p);
        ms = parklist_ms_left(&p->parked, now_us());
        if (wakelist_sleep(&p->wakes) && !atomic_load(&p->stop))
            poll(wait, p->free && p->free->next_free ? 2 : 1, ms);
        wakelist_awake(&p->wakes);
        /* One event a turn: to ask in vain costs as much as the poll. */
        if (wait[1].revents & POLLIN)
            read_events(p);
        if (wait[0].revents & POLLIN)
            wakelist_clear(&p->wakes);
    }
    return NULL;
}

/* ---------------------------------------------------------------- life */

vnd_precontent *vnd_precontent_new(vnd_engine *e, int group_fd, int state_fd, char *err, size_t err_len)
{
    struct vnd_precontent *p = aligned_alloc(64, (sizeof *p + 63) / 64 * 64);

    if (p) {
        memset(p, 0, sizeof *p);
        p->engine = e;
        p->group_fd = group_fd;
        p->ttl_us = e ? (int64_t)e->cfg.read_deadline_ms * 1000 : 0;
        parklist_init(&p->parked, &p->counters);
        wakelist_open(&p->wakes);
        p->ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        p->state = precontent_state_map(state_fd);
        if (e)
            p->requests = calloc(PRECONTENT_SLOTS, sizeof *p->requests);
    }
    if (!p || p->wakes.fd < 0 || p->ended_fd < 0 || !p->state || (e && !p->requests)) {
        fail_line(0, err, err_len, "pre-content events: out of memory or descriptors");
        vnd_precontent_free(p);
        return NULL;
    }
    for (uint32_t i = 0; e && i < PRECONTENT_SLOTS; i++) {
        p->requests[i].p = p;
        p->requests[i].slot = &p->state->slots[i];
    }
    if (e)
        engine_counters_register(e, &p->counters);
    return p;
}

int vnd_precontent_start(vnd_precontent *p)
{
    int rc = thread_start(&p->thread, "vnd-precontent", serve_main, p);

    p->started = rc == 0;
    return rc;
}

int vnd_precontent_ended_fd(vnd_precontent *p)
{
    return p->ended_fd;
}

void vnd_precontent_free(vnd_precontent *p)
{
    if (!p)
        return;
    if (p->started) {
        atomic_store(&p->stop, true);
        wakelist_raise(&p->wakes);
        pthread_join(p->thread, NULL);
        /* What is parked stays unanswered: another process may go on with it. */
        for (struct parked *at = p->parked.first; at; at = at->next)
            store_wait_cancel(&request_of(at)->wait);
        wakelist_wait(&p->wakes);
    }
    if (p->requests && p->engine)
        engine_counters_unregister(p->engine, &p->counters);
    precontent_blobs_free(p);
    free(p->requests);
    if (p->state)
        munmap(p->state, sizeof *p->state);
    wakelist_close(&p->wakes);
    parklist_destroy(&p->parked);
    if (p->ended_fd >= 0)
        close(p->ended_fd);
    free(p);
}
