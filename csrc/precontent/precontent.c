/* precontent/precontent.c -- serving pre-content events; see precontent.h. */
#include "precontent/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store/internal.h"
#include "precontent/state.h"
#include "base/sigbus.h"

#define BLOCK 4096u /* EROFS maps and reads whole blocks */
#define TRIES 64    /* chunks come and go faster than they can be looked at */

static void raise_fd(int fd)
{
    uint64_t one = 1;
    ssize_t n = write(fd, &one, sizeof one);

    (void)n; /* an eventfd that is full is readable all the same */
}

/* ---------------------------------------------------------------- blobs */

struct load_wait {
    struct store_wait wait;
    int fd;
};

static void wake_load(struct store_wait *w)
{
    raise_fd(((struct load_wait *)w->owner)->fd);
}

/* Blocks until the blob's chunk table is here. */
static int load_table(struct vnd_precontent *p, struct vnd_blob *b)
{
    struct load_wait l = { .fd = eventfd(0, EFD_CLOEXEC) };
    struct pollfd wait = { .fd = l.fd, .events = POLLIN };
    int rc;

    if (l.fd < 0)
        return -errno;
    store_wait_init(&l.wait, wake_load, &l);
    l.wait.deadline_us = now_us() + p->ttl_us;
    rc = handle_park(b, &l.wait);
    if (rc == 0) {
        while (poll(&wait, 1, (int)(p->ttl_us / 1000)) < 0 && errno == EINTR)
            ;
        if (!(wait.revents & POLLIN) && store_wait_cancel(&l.wait)) {
            rc = -ETIMEDOUT;
        } else { /* its wake has been or is being called */
            uint64_t count;
            while (read(l.fd, &count, sizeof count) < 0 && errno == EINTR)
                ;
            rc = l.wait.err ? -l.wait.err : atomic_load(&b->table) ? 0 : -EIO;
            store_wait_done(&l.wait);
        }
    }
    close(l.fd);
    return rc < 0 ? rc : 0;
}

static int compare_places(const void *a, const void *b, void *ctx)
{
    const struct blobtable *t = ctx;
    uint64_t x = t->chunk[*(const uint32_t *)a].uoff, y = t->chunk[*(const uint32_t *)b].uoff;

    return (x > y) - (x < y);
}

int vnd_precontent_add(vnd_precontent *p, vnd_blob *b, int fd, char *err, size_t err_len)
{
    struct precontent_blob *more, *mine;
    struct blobtable *t;
    struct stat st;
    int rc = p->started || p->n_blobs == PRECONTENT_BLOBS_MAX ? -EINVAL : load_table(p, b);

    if (rc)
        return fail_line(rc, err, err_len, "blob %s: its chunk table cannot be had: %s", b->info.id, strerror(-rc));
    if (b->cache->stored)
        return fail_line(-EINVAL, err, err_len, "blob %s: its cache is compressed", b->info.id);
    if (b->cache->data_fd < 0 || !b->cache->writable)
        return fail_line(-EROFS, err, err_len, "blob %s: its cache file cannot be written", b->info.id);
    fd = fcntl(fd < 0 ? b->cache->data_fd : fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0 || fstat(fd, &st))
        return fail_line(-errno, err, err_len, "blob %s: its cache file: %s", b->info.id, strerror(errno));
    t = atomic_load_explicit(&b->table, memory_order_acquire);
    more = realloc(p->blobs, (p->n_blobs + 1) * sizeof *more);
    if (more)
        p->blobs = more;
    mine = more ? &more[p->n_blobs] : NULL;
    if (!mine || !(mine->order = malloc((t->known + 1) * sizeof *mine->order))) {
        close(fd);
        return fail_line(-ENOMEM, err, err_len, "blob %s: no memory", b->info.id);
    }
    mine->blob = b;
    mine->fd = fd;
    mine->moves = 1;
    mine->dev = st.st_dev;
    mine->ino = st.st_ino;
    mine->n = 0;
    for (uint32_t i = 0; i < t->n && mine->n < t->known; i++)
        if (t->chunk[i].usize)
            mine->order[mine->n++] = i;
    qsort_r(mine->order, mine->n, sizeof *mine->order, compare_places, t);
    p->n_blobs++;
    return 0;
}

int vnd_precontent_fd(vnd_precontent *p, uint32_t index)
{
    return index < p->n_blobs ? p->blobs[index].fd : -EINVAL;
}

/* Whether the cache's file is the one that the kernel reads, and was since moves was that. */
static bool is_same_file(const struct precontent_blob *b, uint64_t moves)
{
    const struct cachefile *c = b->blob->cache;
    struct stat st;

    return !(moves & 1) && !fstat(c->data_fd, &st) && st.st_dev == b->dev && st.st_ino == b->ino &&
           atomic_load(&c->moves) == moves;
}

int vnd_precontent_complete(vnd_precontent *p, uint32_t index)
{
    const struct precontent_blob *b = index < p->n_blobs ? &p->blobs[index] : NULL;
    uint64_t moves = b ? atomic_load(&b->blob->cache->moves) : 1, total;

    return b && vnd_blob_ready(b->blob, &total) == total && is_same_file(b, moves);
}

/* The first chunk, in order, that ends (its last block filled up) behind at. */
static uint32_t find_chunk(const struct precontent_blob *b, const struct blobtable *t, uint64_t at)
{
    uint32_t low = 0, high = b->n;

    while (low < high) {
        uint32_t mid = low + (high - low) / 2;
        const struct blobtable_chunk *c = &t->chunk[b->order[mid]];
        if ((c->uoff + c->usize + BLOCK - 1) / BLOCK * BLOCK > at)
            high = mid;
        else
            low = mid + 1;
    }
    return low;
}

/* Chunks of [*at, end), as many as go into ext; *at moves behind them. -EIO: bytes of it belong to no chunk of the image
 * (gaps: these are passed over). */
static int gather(const struct precontent_blob *b, uint64_t *at, uint64_t end, bool gaps, struct extent *ext)
{
    struct blobtable *t = atomic_load_explicit(&b->blob->table, memory_order_acquire);
    uint32_t i = find_chunk(b, t, *at);
    int n = 0;

    while (*at < end && n < PRECONTENT_EXTENTS) {
        const struct blobtable_chunk *c = i < b->n ? &t->chunk[b->order[i]] : NULL;
        if (!c || c->uoff > *at) {
            if (!gaps)
                return -EIO;
            if (!c || c->uoff >= end) {
                *at = end;
                break;
            }
        }
        ext[n++] = (struct extent){ .blob = b->blob, .uoff = c->uoff, .chunk = b->order[i], .len = c->usize };
        *at = (c->uoff + c->usize + BLOCK - 1) / BLOCK * BLOCK;
        i++;
    }
    return n;
}

/* The extents are ready in the cache; in the kernel's file too, once this has returned 0. -EAGAIN: no longer. */
static int settle_extents(struct precontent_blob *b, const struct extent *ext, int n)
{
    struct cachefile *c = b->blob->cache;
    uint64_t moves = atomic_load(&c->moves), epoch;
    uint8_t *buf;
    int rc = 0;

    if (moves == b->moves)
        return 0;
    if (is_same_file(b, moves)) {
        b->moves = moves;
        return -EAGAIN; /* what was ready may have been so in another */
    }
    for (int i = 0; i < n && !rc; i++) {
        epoch = cachefile_epoch(c);
        buf = malloc(ext[i].len);
        rc = !buf                                ? -ENOMEM
             : !cachefile_ready(c, ext[i].chunk) ? -EAGAIN
                                                 : cachefile_read(c, ext[i].uoff, buf, ext[i].len);
        if (!rc && !cachefile_epoch_holds(c, epoch))
            rc = -EAGAIN;
        if (!rc && pwrite(b->fd, buf, ext[i].len, (off_t)ext[i].uoff) != (ssize_t)ext[i].len)
            rc = errno == ENOSPC || errno == EDQUOT ? -errno : -EIO;
        free(buf);
    }
    return rc;
}

/* ---------------------------------------------------------------- requests: the serving thread's */

static void list_request(struct vnd_precontent *p, struct precontent_request *r)
{
    if (r->listed)
        return;
    r->prev = p->last;
    r->next = NULL;
    *(p->last ? &p->last->next : &p->first) = r;
    p->last = r;
    r->listed = true;
    atomic_store_explicit(&p->counters.oldest_park_us, p->first->deadline_us - p->ttl_us, memory_order_relaxed);
}

static void finish_request(struct precontent_request *r, uint32_t response)
{
    struct vnd_precontent *p = r->p;
    int fd = r->slot->fd;
    bool held = r->slot->held;

    store_wait_done(&r->wait);
    if (r->listed) {
        *(r->prev ? &r->prev->next : &p->first) = r->next;
        *(r->next ? &r->next->prev : &p->last) = r->prev;
        r->listed = false;
        atomic_store_explicit(&p->counters.oldest_park_us, p->first ? p->first->deadline_us - p->ttl_us : 0,
                              memory_order_relaxed);
    }
    precontent_answer(p->group_fd, fd, response);
    /* In this order: as long as the number is taken no other event can have it. */
    atomic_store(&r->slot->waits, 0);
    if (held)
        close(fd);
    r->next = p->free;
    p->free = r;
}

static void wake_request(struct store_wait *w)
{
    struct vnd_precontent *p = ((struct precontent_request *)w->owner)->p;
    struct store_wait *top;

    atomic_fetch_add_explicit(&p->wakers, 1, memory_order_relaxed);
    top = atomic_load_explicit(&p->done, memory_order_relaxed);
    do
        w->done_next = top;
    while (!atomic_compare_exchange_weak(&p->done, &top, w));
    if (atomic_load(&p->sleeping) && atomic_exchange(&p->sleeping, 0))
        raise_fd(p->wake_fd);
    atomic_fetch_sub_explicit(&p->wakers, 1, memory_order_release);
}

static struct precontent_request *take_request(struct vnd_precontent *p)
{
    struct precontent_request *r = p->free;

    p->free = r->next;
    store_wait_init(&r->wait, wake_request, r);
    r->at = r->slot->offset;
    r->listed = false;
    r->deadline_us = r->wait.deadline_us = now_us() + p->ttl_us;
    return r;
}

static uint64_t end_of(const struct precontent_slot *s, const struct precontent_blob *b)
{
    uint64_t size = blob_uncompressed_size(b->blob), end = s->offset + s->count;

    return end < s->offset || end > size ? size : end;
}

/* 0: all is ready; -EINPROGRESS: it will be woken; -errno. */
static int want_range(struct precontent_request *r)
{
    struct vnd_precontent *p = r->p;
    bool any = r->slot->blob == PRECONTENT_ANY_BLOB;
    struct extent ext[PRECONTENT_EXTENTS];

    for (; r->blob < p->n_blobs; r->blob++) {
        struct precontent_blob *b = &p->blobs[r->blob];
        uint64_t end = end_of(r->slot, b), at;
        for (int tries = 0; (at = r->at) < end;) {
            int n = gather(b, &at, end, any, ext), rc;
            if (n < 0) {
                engine_say(p->engine, VND_LEVEL_ERROR, VND_CAUSE_FORMAT,
                           "blob %s: a file lies at %llu, where the image names no "
                           "chunk: it is damaged",
                           b->blob->info.id, (unsigned long long)r->at);
                return n;
            }
            rc = n ? store_want(&r->wait, ext, n) : 0;
            if (!rc)
                rc = settle_extents(b, ext, n);
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
        if (!r->listed)
            atomic_fetch_add_explicit(&p->counters.parked, 1, memory_order_relaxed);
        list_request(p, r);
        return;
    }
    atomic_fetch_add_explicit(&p->counters.fuse_requests, 1, memory_order_relaxed);
    if (rc)
        atomic_fetch_add_explicit(&p->counters.fuse_errors, 1, memory_order_relaxed);
    else if (!r->listed)
        atomic_fetch_add_explicit(&p->counters.hits, 1, memory_order_relaxed);
    finish_request(r, response_of(rc));
}

static void serve_woken(struct vnd_precontent *p)
{
    struct store_wait *w = atomic_exchange_explicit(&p->done, NULL, memory_order_acquire), *list = NULL, *next;

    for (; w; w = next) { /* oldest first */
        next = w->done_next;
        w->done_next = list;
        list = w;
    }
    for (; list; list = next) {
        next = list->done_next;
        serve_request(list->owner);
    }
}

static void expire_requests(struct vnd_precontent *p)
{
    int64_t now = now_us();
    struct precontent_request *r, *next;

    for (r = p->first; r && r->deadline_us <= now; r = next) {
        next = r->next;
        if (!store_wait_cancel(&r->wait))
            continue; /* being woken: a moment */
        atomic_fetch_add_explicit(&p->counters.expired, 1, memory_order_relaxed);
        engine_say(p->engine, VND_LEVEL_ERROR, VND_CAUSE_DEADLINE,
                   "a kernel read answered with EIO: its data did not come within %lld ms",
                   (long long)(p->ttl_us / 1000));
        finish_request(r, PRECONTENT_DENY(EIO));
    }
}

/* ---------------------------------------------------------------- events */

static uint32_t blob_of(const struct vnd_precontent *p, int fd)
{
    struct stat st;

    if (!fstat(fd, &st))
        for (uint32_t i = 0; i < p->n_blobs; i++)
            if (p->blobs[i].ino == st.st_ino && p->blobs[i].dev == st.st_dev)
                return i;
    return PRECONTENT_ANY_BLOB;
}

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
            precontent_fill(slot, &ev, blob_of(p, ev.fd));
            mine[k] = take_request(p);
            mine[k]->blob = slot->blob == PRECONTENT_ANY_BLOB ? 0 : slot->blob;
            k++;
        } else {
            if (precontent_count(s, ev.mask))
                raise_fd(p->ended_fd);
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
        p->requests[i].next = *list;
        *list = &p->requests[i];
    }
    while ((r = adopted) != NULL) {
        adopted = r->next;
        r->next = p->free;
        p->free = r;
        take_request(p);
        if (r->slot->blob >= p->n_blobs)
            r->slot->blob = PRECONTENT_ANY_BLOB;
        r->blob = r->slot->blob == PRECONTENT_ANY_BLOB ? 0 : r->slot->blob;
        serve_request(r);
    }
}

static int ms_to_deadline(const struct vnd_precontent *p)
{
    int64_t ms = p->first ? (p->first->deadline_us - now_us() + 999) / 1000 : -1;

    return p->first && ms < 0 ? 0 : ms > 1000000 ? 1000000 : (int)ms;
}

static void *serve_main(void *arg)
{
    struct vnd_precontent *p = arg;
    uint64_t count;

    sigbus_unblock();
    adopt_events(p);
    while (!atomic_load_explicit(&p->stop, memory_order_acquire)) {
        struct pollfd wait[2] = { { .fd = p->wake_fd, .events = POLLIN }, { .fd = p->group_fd, .events = POLLIN } };
        int ms;

        serve_woken(p);
        expire_requests(p);
        ms = ms_to_deadline(p);
        atomic_store(&p->sleeping, 1);
        if (!atomic_load(&p->done) && !atomic_load(&p->stop))
            poll(wait, p->free && p->free->next ? 2 : 1, ms);
        atomic_store_explicit(&p->sleeping, 0, memory_order_relaxed);
        /* One event a turn: to ask in vain costs as much as the poll */
        if (wait[1].revents & POLLIN)
            read_events(p);
        if (wait[0].revents & POLLIN && read(p->wake_fd, &count, sizeof count) < 0)
            continue;
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
        p->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        p->ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        p->state = precontent_state_map(state_fd);
        if (e)
            p->requests = calloc(PRECONTENT_SLOTS, sizeof *p->requests);
    }
    if (!p || p->wake_fd < 0 || p->ended_fd < 0 || !p->state || (e && !p->requests)) {
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
        raise_fd(p->wake_fd);
        pthread_join(p->thread, NULL);
        /* What is parked stays unanswered: another process may go on with it. */
        for (struct precontent_request *r = p->first; r; r = r->next)
            store_wait_cancel(&r->wait);
        while (atomic_load_explicit(&p->wakers, memory_order_acquire) != 0)
            sched_yield();
    }
    if (p->requests && p->engine)
        engine_counters_unregister(p->engine, &p->counters);
    for (uint32_t i = 0; i < p->n_blobs; i++) {
        free(p->blobs[i].order);
        close(p->blobs[i].fd);
    }
    free(p->blobs);
    free(p->requests);
    if (p->state)
        munmap(p->state, sizeof *p->state);
    if (p->wake_fd >= 0)
        close(p->wake_fd);
    if (p->ended_fd >= 0)
        close(p->ended_fd);
    free(p);
}
