/* vhost/device.c -- see device.h. apply compares what the front-end wants with what is, prepares mappings, hands each
 * queue its part and waits; what no queue uses any more is unmapped last. */
#include "vhost/device.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

uint64_t vnd_device_features(void)
{
    return DEVICE_FEATURES;
}

static int map_own_inflight(struct vnd_device *d, char *err, size_t err_len)
{
    uint64_t size;
    int fd = vnd_inflight_create(d->n_queues, VND_RING_MAX, &size), rc;

    if (fd < 0)
        return fail_line(fd, err, err_len, "in-flight region: %s", strerror(-fd));
    rc = guestmem_map_new(fd, 0, size, NULL, "in-flight region", &d->own_map, &d->own_inflight, err, err_len);
    close(fd);
    return rc;
}

vnd_device *vnd_device_new(vnd_engine *e, vnd_vfs *v, uint32_t queue_count, char *err, size_t err_len)
{
    struct vnd_device *d;
    int rc;

    if (queue_count < 2 || queue_count > VND_QUEUE_MAX) {
        fail_line(0, err, err_len, "%u queues: 2 to %d are possible (one is the high priority queue)", queue_count,
                  VND_QUEUE_MAX);
        return NULL;
    }
    d = calloc(1, sizeof(*d));
    if (d == NULL)
        goto no_memory;
    d->engine = e;
    d->vfs = v;
    d->session = fuse_session_new(e, v);
    /* Queues are aligned to cache lines. */
    d->queues = aligned_alloc(64, (queue_count * sizeof(struct queue) + 63) / 64 * 64);
    if (d->session == NULL || d->queues == NULL)
        goto no_memory;
    memset(d->queues, 0, queue_count * sizeof(struct queue));
    for (; d->n_queues < queue_count; d->n_queues++) {
        rc = queue_init(&d->queues[d->n_queues], e, v, d->session, d->n_queues, &d->mem_lost, &d->segs_bytes);
        if (rc != 0) {
            fail_line(rc, err, err_len, "starting queue %u: %s", d->n_queues, strerror(-rc));
            vnd_device_free(d);
            return NULL;
        }
    }
    if (map_own_inflight(d, err, err_len) != 0) {
        vnd_device_free(d);
        return NULL;
    }
    return d;
no_memory:
    fail_line(0, err, err_len, "device: out of memory");
    vnd_device_free(d);
    return NULL;
}

/* A private, non-blocking handle: a front-end must not be able to stop a queue by a full eventfd. */
static int take_fd(int fd, int *out)
{
    int own, flags;

    *out = -1;
    if (fd < 0)
        return 0;
    own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own < 0)
        return -errno;
    flags = fcntl(own, F_GETFL);
    if (flags >= 0 && !(flags & O_NONBLOCK))
        fcntl(own, F_SETFL, flags | O_NONBLOCK);
    *out = own;
    return 0;
}

static struct inflight queue_inflight(const struct vnd_device *d, uint32_t i)
{
    struct inflight f = { 0 };

    if (d->inflight != NULL && i < d->inflight_queues) {
        f.region = (void *)(d->inflight + i * inflight_stride(d->inflight_size));
        f.num = d->inflight_size;
    } else if (d->own_inflight != NULL) {
        f.region = (void *)(d->own_inflight + i * inflight_stride(VND_RING_MAX));
        f.num = VND_RING_MAX;
    }
    return f;
}

/* The front-end's in-flight region, checked and mapped. */
static int map_inflight(const vnd_device_state *st, _Atomic int *lost, struct guestmem_map **map, uint8_t **host,
                        char *err, size_t err_len)
{
    uint64_t need;

    if (st->inflight_queues == 0 || st->inflight_queues > VND_QUEUE_MAX || st->inflight_queue_size == 0 ||
        st->inflight_queue_size > VND_RING_MAX)
        return fail_line(-EINVAL, err, err_len, "in-flight region: %u queues of %u entries are not possible",
                         st->inflight_queues, st->inflight_queue_size);
    need = st->inflight_queues * inflight_stride(st->inflight_queue_size);
    if (st->inflight_size_bytes < need || st->inflight_offset % 8 != 0)
        return fail_line(-EINVAL, err, err_len, "in-flight region: %llu bytes at offset %llu, %llu are due",
                         (unsigned long long)st->inflight_size_bytes, (unsigned long long)st->inflight_offset,
                         (unsigned long long)need);
    return guestmem_map_new(st->inflight_fd, st->inflight_offset, st->inflight_size_bytes, lost, "in-flight region",
                            map, host, err, err_len);
}

static void fill_conf(struct vnd_device *d, uint32_t i, struct queue_conf *c)
{
    *c = (struct queue_conf){
        .kick_fd = -1,
        .call_fd = -1,
        .err_fd = -1,
        .mem = d->mem,
        .log = d->log,
        .features = d->features,
        .inflight = queue_inflight(d, i),
        .recover = d->rings[i].recover,
        .ring = d->rings[i].state,
    };
}

static bool same_ring(const vnd_ring_state *a, const vnd_ring_state *b)
{
    return a->num == b->num && a->flags == b->flags && a->desc_addr == b->desc_addr && a->used_addr == b->used_addr &&
           a->avail_addr == b->avail_addr && a->log_addr == b->log_addr && a->base == b->base &&
           a->started == b->started && a->enabled == b->enabled;
}

/* Posts what changed of ring i. 2: the ring itself did, 1: only what is common, 0: nothing, or -errno. */
static int post_ring(struct vnd_device *d, const vnd_device_state *st, uint32_t i, bool all, int drain_ms, char *err,
                     size_t err_len)
{
    struct device_ring *r = &d->rings[i];
    struct queue_conf *c = &d->confs[i];
    const vnd_ring_state *want = &st->rings[i], before = r->state;
    bool same = same_ring(&r->state, want) && r->kick_gen == st->kick_gen[i] && r->call_gen == st->call_gen[i] &&
                r->err_gen == st->err_gen[i];
    int rc = 0;

    if (same && !all)
        return 0;
    r->state = *want;
    fill_conf(d, i, c);
    c->drain_ms = drain_ms;
    if (r->kick_gen != st->kick_gen[i]) {
        c->new_kick = true;
        rc = take_fd(want->kick_fd, &c->kick_fd);
    }
    if (rc == 0 && r->call_gen != st->call_gen[i]) {
        c->new_call = true;
        rc = take_fd(want->call_fd, &c->call_fd);
    }
    if (rc == 0 && r->err_gen != st->err_gen[i]) {
        c->new_err = true;
        rc = take_fd(want->err_fd, &c->err_fd);
    }
    if (rc != 0) {
        close(c->kick_fd);
        close(c->call_fd);
        r->state = before;
        return fail_line(rc, err, err_len, "ring %u: taking its fds: %s", i, strerror(-rc));
    }
    r->kick_gen = st->kick_gen[i];
    r->call_gen = st->call_gen[i];
    r->err_gen = st->err_gen[i];
    queue_post(&d->queues[i], c);
    return same ? 1 : 2;
}

static int check_state(const struct vnd_device *d, const vnd_device_state *st, char *err, size_t err_len)
{
    if (st->features & ~DEVICE_FEATURES)
        return fail_line(-EINVAL, err, err_len, "features 0x%llx were never offered",
                         (unsigned long long)(st->features & ~DEVICE_FEATURES));
    if (st->ring_count > d->n_queues)
        return fail_line(-EINVAL, err, err_len, "%u rings, the device has %u", st->ring_count, d->n_queues);
    return 0;
}

int vnd_device_apply(vnd_device *d, vnd_device_state *st, int drain_ms, char *err, size_t err_len)
{
    struct guestmem *old_mem = NULL, *mem = NULL;
    struct guestlog *old_log = NULL, *log = NULL;
    struct guestmem_map *old_inflight = NULL, *map = NULL;
    uint8_t *host = NULL;
    int posted[VND_QUEUE_MAX];
    bool all;
    bool new_mem = st->region_gen != d->region_gen, new_log = st->log_gen != d->log_gen,
         new_inflight = st->inflight_gen != d->inflight_gen;
    int rc = check_state(d, st, err, err_len);

    /* First all that can fail. */
    if (rc == 0 && new_mem)
        rc = guestmem_new(st->regions, st->region_count, d->mem, &d->mem_lost, &mem, err, err_len);
    if (rc == 0 && new_log && st->log_fd >= 0)
        rc = guestlog_new(st->log_fd, st->log_offset, st->log_size_bytes, &d->mem_lost, &log, err, err_len);
    if (rc == 0 && new_inflight && st->inflight_fd >= 0)
        rc = map_inflight(st, &d->mem_lost, &map, &host, err, err_len);
    if (rc != 0) {
        guestmem_free(mem);
        guestlog_free(log);
        return rc;
    }
    if (new_mem) {
        old_mem = d->mem;
        d->mem = mem;
        d->region_gen = st->region_gen;
    }
    if (new_log) {
        old_log = d->log;
        d->log = log;
        d->log_gen = st->log_gen;
    }
    if (new_inflight) {
        old_inflight = d->inflight_map;
        d->inflight_map = map;
        d->inflight = host;
        d->inflight_queues = st->inflight_queues;
        d->inflight_size = st->inflight_queue_size;
        d->inflight_gen = st->inflight_gen;
        for (uint32_t i = 0; i < d->n_queues; i++)
            d->rings[i].recover = map != NULL && i < d->inflight_queues;
    }
    all = new_mem || new_log || new_inflight || st->features != d->features;
    d->features = st->features;

    for (uint32_t i = 0; i < d->n_queues; i++) {
        posted[i] = post_ring(d, st, i, all, drain_ms, err, err_len);
        if (posted[i] < 0 && rc == 0)
            rc = posted[i];
    }
    for (uint32_t i = 0; i < d->n_queues; i++) {
        struct queue_conf *c = &d->confs[i];

        if (posted[i] <= 0)
            continue;
        queue_wait(&d->queues[i]);
        st->rings[i].base = d->rings[i].state.base = c->ring.base;
        if (d->queues[i].running)
            d->rings[i].recover = false;
        /* A ring that could not start earlier tries again with each new memory: no news. */
        if (c->rc != 0 && posted[i] == 2 && rc == 0)
            rc = fail_line(c->rc, err, err_len, "%s", c->err);
    }
    guestmem_free(old_mem);
    guestlog_free(old_log);
    guestmem_map_put(old_inflight);
    if (new_mem && !guestmem_hit(d->mem))
        atomic_store(&d->mem_lost, 0);
    return rc;
}

/* Has every queue do something that is not a state. */
static void post_all(struct vnd_device *d, bool leave)
{
    for (uint32_t i = 0; i < d->n_queues; i++) {
        fill_conf(d, i, &d->confs[i]);
        d->confs[i].drop = true;
        d->confs[i].exit = leave;
        queue_post(&d->queues[i], &d->confs[i]);
    }
    for (uint32_t i = 0; i < d->n_queues; i++)
        queue_wait(&d->queues[i]);
}

void vnd_device_reset(vnd_device *d)
{
    post_all(d, false);
    fuse_session_reset(d->session);
}

void vnd_device_free(vnd_device *d)
{
    if (d == NULL)
        return;
    post_all(d, true);
    for (uint32_t i = 0; i < d->n_queues; i++)
        queue_free(&d->queues[i], d->vfs);
    free(d->queues);
    if (d->session != NULL)
        fuse_session_free(d->session);
    guestmem_free(d->mem);
    guestlog_free(d->log);
    guestmem_map_put(d->inflight_map);
    guestmem_map_put(d->own_map);
    free(d);
}
