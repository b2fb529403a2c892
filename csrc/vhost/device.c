/* vhost/device.c -- see device.h. apply compares what the front-end wants with what is, prepares mappings, hands each
 * queue its part and waits; what no queue uses any more is unmapped last. */
#include "vhost/device.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuse/kept.h"

uint64_t vnd_device_features(int kind)
{
    return COMMON_FEATURES | (kind == VND_DEVICE_BLK ? kind_blk.features : kind_fs.features);
}

static int map_own_inflight(struct vnd_device *d, struct failure *f)
{
    struct map_request r = { .what = "in-flight region" };
    struct device_inflight *own = &d->own_inflight;
    int rc;

    r.fd = vnd_inflight_create(d->n_queues, VND_RING_MAX, &r.size_bytes);
    if (r.fd < 0)
        return failure_set(f, r.fd, VND_CAUSE_IO, "in-flight region: %s", strerror(-r.fd));
    rc = guestmem_map_new(&r, &own->map, &own->host, f);
    close(r.fd);
    own->queues = d->n_queues;
    own->entries = VND_RING_MAX;
    return rc;
}

static int start_queues(struct vnd_device *d, uint32_t n, struct failure *f)
{
    for (; d->n_queues < n; d->n_queues++) {
        int rc = queue_init(&d->queues[d->n_queues], &d->common, d->n_queues);

        if (rc != 0)
            return failure_set(f, rc, VND_CAUSE_IO, "starting queue %u: %s", d->n_queues, strerror(-rc));
    }
    return map_own_inflight(d, f);
}

/* What is served, of which there is one for each kind. */
static bool fill_common(struct queue_common *c, const vnd_device_cfg *cfg)
{
    c->engine = cfg->engine;
    c->vfs = cfg->vfs;
    if (cfg->kind == VND_DEVICE_BLK) {
        c->kind = &kind_blk;
        c->disk = cfg->disk;
        memcpy(c->blk_id, cfg->blk_id, strnlen(cfg->blk_id, VND_BLK_ID_BYTES));
        c->who = (uintptr_t)c;
        return true;
    }
    c->kind = &kind_fs;
    c->session = fuse_session_new(cfg->engine, cfg->vfs);
    c->who = (uintptr_t)c->session;
    return c->session != NULL;
}

vnd_device *vnd_device_new(const vnd_device_cfg *cfg, char *err, size_t err_len)
{
    uint32_t queue_count = cfg->queue_count,
             min = cfg->kind == VND_DEVICE_BLK ? kind_blk.queues_min : kind_fs.queues_min;
    struct failure f = { 0 };
    struct vnd_device *d;
    size_t bytes;
    int rc = -ENOMEM;

    if (queue_count < min || queue_count > VND_QUEUE_MAX) {
        fail_line(0, err, err_len, "%u queues: %u to %d are possible", queue_count, min, VND_QUEUE_MAX);
        return NULL;
    }
    d = calloc(1, sizeof(*d));
    failure_set(&f, rc, VND_CAUSE_IO, "device: out of memory");
    if (d != NULL) {
        bool filled = fill_common(&d->common, cfg);

        bytes = queue_count * sizeof(struct queue); /* a multiple of its alignment, which is a cache line's */
        d->queues = aligned_alloc(_Alignof(struct queue), bytes);
        if (d->queues != NULL)
            memset(d->queues, 0, bytes);
        if (d->queues != NULL && filled)
            rc = start_queues(d, queue_count, &f);
    }
    if (rc == 0)
        return d;
    failure_tell(&f, rc, NULL, err, err_len);
    vnd_device_free(d);
    return NULL;
}

void vnd_device_set_number(vnd_device *d, uint32_t number)
{
    d->common.number = number;
    if (d->common.session != NULL)
        fuse_session_set_owner(d->common.session, number);
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
    const struct device_inflight *in =
        d->inflight.map != NULL && i < d->inflight.queues ? &d->inflight : &d->own_inflight;

    if (in->map == NULL)
        return (struct inflight){ 0 };
    return (struct inflight){ .region = (void *)(in->host + i * inflight_stride(in->entries)), .num = in->entries };
}

/* The front-end's in-flight region, checked and mapped: as much of it as is due. The rest that it tells must be there too:
 * a front-end that tells sizes that are not so may be wrong in the others. */
static int map_inflight(const vnd_device_state *st, const struct map_request *like, struct device_inflight *out,
                        struct failure *f)
{
    struct map_request r = *like;
    struct stat file;
    uint64_t end;

    if (st->inflight_queues == 0 || st->inflight_queues > VND_QUEUE_MAX || st->inflight_queue_size == 0 ||
        st->inflight_queue_size > VND_RING_MAX)
        return failure_set(f, -EINVAL, VND_CAUSE_FORMAT, "in-flight region: %u queues of %u entries are not possible",
                           st->inflight_queues, st->inflight_queue_size);
    r.fd = st->inflight_fd;
    r.offset = st->inflight_offset;
    r.size_bytes = st->inflight_queues * inflight_stride(st->inflight_queue_size);
    out->tail = st->inflight_size_bytes >= r.size_bytes + INFLIGHT_TAIL_BYTES;
    r.what = "in-flight region";
    if (st->inflight_size_bytes < r.size_bytes || r.offset % 8 != 0)
        return failure_set(f, -EINVAL, VND_CAUSE_FORMAT, "in-flight region: %llu bytes at offset %llu, %llu are due",
                           (unsigned long long)st->inflight_size_bytes, (unsigned long long)r.offset,
                           (unsigned long long)r.size_bytes);
    if (fstat(r.fd, &file) != 0)
        return failure_set(f, -errno, VND_CAUSE_IO, "in-flight region: fd %d: %s", r.fd, strerror(errno));
    if (__builtin_add_overflow(r.offset, st->inflight_size_bytes, &end) || end > (uint64_t)file.st_size)
        return failure_set(f, -EINVAL, VND_CAUSE_FORMAT,
                           "in-flight region: %llu bytes at offset %llu, the file has %llu",
                           (unsigned long long)st->inflight_size_bytes, (unsigned long long)r.offset,
                           (unsigned long long)file.st_size);
    out->queues = st->inflight_queues;
    out->entries = st->inflight_queue_size;
    r.size_bytes += out->tail ? INFLIGHT_TAIL_BYTES : 0;
    return guestmem_map_new(&r, &out->map, &out->host, f);
}

/* New descriptors of a ring, ours. new_ is set where the front-end gave another, or took it away (-1). */
struct ring_fds {
    bool new_kick, new_call, new_err;
    int kick, call, err;
};
static const struct ring_fds no_fds = { .kick = -1, .call = -1, .err = -1 };

static void close_ring_fds(struct ring_fds *fds)
{
    const int all[] = { fds->kick, fds->call, fds->err };

    for (int i = 0; i < 3; i++)
        if (all[i] >= 0)
            close(all[i]);
    *fds = no_fds;
}

static int take_ring_fds(const struct device_ring *r, const vnd_device_state *st, uint32_t i, struct ring_fds *fds)
{
    const vnd_ring_state *want = &st->rings[i];
    int rc = 0;

    fds->new_kick = r->kick_gen != st->kick_gen[i];
    fds->new_call = r->call_gen != st->call_gen[i];
    fds->new_err = r->err_gen != st->err_gen[i];
    if (fds->new_kick)
        rc = take_fd(want->kick_fd, &fds->kick);
    if (rc == 0 && fds->new_call)
        rc = take_fd(want->call_fd, &fds->call);
    if (rc == 0 && fds->new_err)
        rc = take_fd(want->err_fd, &fds->err);
    return rc;
}

/* What one call of apply changes: what is new until exchange, from then on what it replaced. */
struct apply {
    int drain_ms;
    bool new_mem, new_log, new_inflight;
    bool all; /* something that all rings have in common */
    struct guestmem *mem;
    struct guestlog *log;
    struct device_inflight inflight;
    struct ring_fds fds[VND_QUEUE_MAX]; /* taken, until post_ring gives them to the queues */
};

/* Frees what a holds. */
static void drop_apply(struct vnd_device *d, struct apply *a)
{
    for (uint32_t i = 0; i < d->n_queues; i++)
        close_ring_fds(&a->fds[i]);
    guestmem_free(a->mem);
    guestlog_free(a->log);
    guestmem_map_put(a->inflight.map);
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
        .died = d->inflight_died,
        .carry = d->carry,
        .ring = d->rings[i].state,
    };
}

static bool same_ring(const vnd_ring_state *a, const vnd_ring_state *b)
{
    return a->num == b->num && a->flags == b->flags && a->desc_addr == b->desc_addr && a->used_addr == b->used_addr &&
           a->avail_addr == b->avail_addr && a->log_addr == b->log_addr && a->base == b->base &&
           a->started == b->started && a->enabled == b->enabled;
}

/* What post_ring did. */
enum posted { POSTED_NOTHING, POSTED_COMMON, POSTED_RING };

/* Posts what changed of ring i, or only what all rings have in common. */
static enum posted post_ring(struct vnd_device *d, const vnd_device_state *st, uint32_t i, struct apply *a)
{
    struct device_ring *r = &d->rings[i];
    struct queue_conf *c = &d->confs[i];
    struct ring_fds *fds = &a->fds[i];
    bool same = same_ring(&r->state, &st->rings[i]) && !fds->new_kick && !fds->new_call && !fds->new_err;

    if (same && !a->all)
        return POSTED_NOTHING;
    r->state = st->rings[i];
    fill_conf(d, i, c);
    c->drain_ms = a->drain_ms;
    c->new_kick = fds->new_kick;
    c->new_call = fds->new_call;
    c->new_err = fds->new_err;
    c->kick_fd = fds->kick;
    c->call_fd = fds->call;
    c->err_fd = fds->err;
    *fds = no_fds; /* the queue's now */
    r->kick_gen = st->kick_gen[i];
    r->call_gen = st->call_gen[i];
    r->err_gen = st->err_gen[i];
    queue_post(&d->queues[i], c);
    return same ? POSTED_COMMON : POSTED_RING;
}

static int check_state(const struct vnd_device *d, const vnd_device_state *st, struct failure *f)
{
    uint64_t unknown = st->features & ~(COMMON_FEATURES | d->common.kind->features);

    if (unknown != 0)
        return failure_set(f, -EINVAL, VND_CAUSE_FORMAT, "features 0x%llx were never offered",
                           (unsigned long long)unknown);
    if (st->ring_count > d->n_queues)
        return failure_set(f, -EINVAL, VND_CAUSE_FORMAT, "%u rings, the device has %u", st->ring_count, d->n_queues);
    /* A running ring has its heads in the region; another one may have room for fewer. */
    for (uint32_t i = 0; i < d->n_queues && st->inflight_gen != d->inflight_gen; i++)
        if (d->rings[i].state.started)
            return failure_set(f, -EBUSY, VND_CAUSE_GUEST, "in-flight region: it cannot be replaced while ring %u runs",
                               i);
    return 0;
}

/* Maps and takes what is new: all that can fail, before anything is changed. */
static int prepare(struct vnd_device *d, const vnd_device_state *st, struct apply *a, struct failure *f)
{
    struct map_request like = { .engine = d->common.engine, .lost = &d->common.mem_lost, .old = d->mem };
    int rc = check_state(d, st, f);

    a->new_mem = st->region_gen != d->region_gen;
    a->new_log = st->log_gen != d->log_gen;
    a->new_inflight = st->inflight_gen != d->inflight_gen;
    a->all = a->new_mem || a->new_log || a->new_inflight || st->features != d->features;
    if (rc == 0 && a->new_mem)
        rc = guestmem_new(st->regions, st->region_count, &like, &a->mem, f);
    like.old = NULL;
    if (rc == 0 && a->new_log && st->log_fd >= 0) {
        like.fd = st->log_fd;
        like.offset = st->log_offset;
        like.size_bytes = st->log_size_bytes;
        rc = guestlog_new(&like, &a->log, f);
    }
    if (rc == 0 && a->new_inflight && st->inflight_fd >= 0)
        rc = map_inflight(st, &like, &a->inflight, f);
    for (uint32_t i = 0; i < d->n_queues && rc == 0; i++) {
        rc = take_ring_fds(&d->rings[i], st, i, &a->fds[i]);
        if (rc != 0)
            failure_set(f, rc, VND_CAUSE_IO, "ring %u: taking its fds: %s", i, strerror(-rc));
    }
    if (rc != 0)
        drop_apply(d, a);
    return rc;
}

/* Where the session's part of the region is; NULL: nowhere. */
static struct fuse_kept *kept_of(const struct device_inflight *in)
{
    _Static_assert(sizeof(struct fuse_kept) <= INFLIGHT_TAIL_BYTES, "the tail has room");

    return in->map && in->tail ? (void *)(in->host + in->queues * inflight_stride(in->entries)) : NULL;
}

/* Puts what is new in its place; a then holds what it was before. */
static void exchange(struct vnd_device *d, const vnd_device_state *st, struct apply *a)
{
    if (a->new_mem) {
        struct guestmem *mem = a->mem;

        a->mem = d->mem;
        d->mem = mem;
        d->region_gen = st->region_gen;
    }
    if (a->new_log) {
        struct guestlog *log = a->log;

        a->log = d->log;
        d->log = log;
        d->log_gen = st->log_gen;
    }
    if (a->new_inflight) {
        struct device_inflight inflight = a->inflight;

        a->inflight = d->inflight;
        d->inflight = inflight;
        d->inflight_gen = st->inflight_gen;
        d->inflight_died = st->inflight_died;
        for (uint32_t i = 0; i < d->n_queues; i++)
            d->rings[i].recover = inflight.map == NULL || i >= inflight.queues ? RECOVER_NOT
                                  : st->inflight_goes_on >> i & 1              ? RECOVER_ANY_BASE
                                                                               : RECOVER_SAME_BASE;
        if (d->common.session != NULL)
            fuse_session_keep(d->common.session, kept_of(&inflight));
    }
    d->features = st->features;
    d->carry = st->carries_inflight;
}

/* Has every queue be as st wants it, and waits until it is. 0, or what failed first. */
static int apply_rings(struct vnd_device *d, vnd_device_state *st, struct apply *a, struct failure *f)
{
    enum posted posted[VND_QUEUE_MAX];
    int rc = 0;

    for (uint32_t i = 0; i < d->n_queues; i++)
        posted[i] = post_ring(d, st, i, a);
    for (uint32_t i = 0; i < d->n_queues; i++) {
        struct queue_conf *c = &d->confs[i];

        if (posted[i] == POSTED_NOTHING)
            continue;
        queue_wait(&d->queues[i]);
        st->rings[i].base = d->rings[i].state.base = c->ring.base;
        if (d->queues[i].running)
            d->rings[i].recover = RECOVER_NOT;
        else if (d->carry && d->log != NULL && posted[i] == POSTED_RING)
            d->rings[i].recover = RECOVER_SAME_BASE; /* what was set aside goes on here if the migration fails */
        /* A ring that could not start earlier tries again with each new memory: no news. */
        if (c->rc != 0 && posted[i] == POSTED_RING && rc == 0) {
            rc = c->rc;
            *f = c->failure;
        }
    }
    return rc;
}

int vnd_device_apply(vnd_device *d, vnd_device_state *st, int drain_ms, char *err, size_t err_len)
{
    struct apply a = { .drain_ms = drain_ms };
    struct failure f = { 0 };
    int rc;

    for (uint32_t i = 0; i < VND_QUEUE_MAX; i++)
        a.fds[i] = no_fds;
    rc = prepare(d, st, &a, &f);
    if (rc != 0)
        return failure_tell(&f, rc, NULL, err, err_len);
    exchange(d, st, &a);
    rc = apply_rings(d, st, &a, &f);
    drop_apply(d, &a);
    if (a.new_mem && !guestmem_hit(d->mem))
        atomic_store(&d->common.mem_lost, false);
    return rc == 0 ? 0 : failure_tell(&f, rc, NULL, err, err_len);
}

int vnd_device_inflight(vnd_device *d, uint32_t ring, uint16_t *heads, int max)
{
    struct inflight f;

    if (ring >= d->n_queues || max < VND_RING_MAX || d->rings[ring].state.started)
        return -EINVAL;
    f = queue_inflight(d, ring);
    return f.region == NULL || f.region->version == 0 ? 0 : inflight_list(&f, f.num, heads);
}

int vnd_device_set_inflight(vnd_device *d, uint32_t ring, const uint16_t *heads, int n)
{
    struct inflight f;

    if (ring >= d->n_queues || d->rings[ring].state.started)
        return -EINVAL;
    f = queue_inflight(d, ring);
    if (f.region == NULL || n < 0 || (uint32_t)n > f.num)
        return -EINVAL;
    for (int i = 0; i < n; i++)
        if (heads[i] >= f.num)
            return -EINVAL;
    inflight_put(&f, heads, (uint32_t)n);
    d->rings[ring].recover = RECOVER_SAME_BASE;
    return 0;
}

int vnd_device_init_get(vnd_device *d, vnd_init_result *out)
{
    return fuse_session_init_get(d->common.session, out);
}

int vnd_device_resume(vnd_device *d, const vnd_init_result *init)
{
    return fuse_session_resume_as(d->common.session, init);
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
    if (d->common.session != NULL)
        fuse_session_reset(d->common.session);
}

void vnd_device_free(vnd_device *d)
{
    if (d == NULL)
        return;
    post_all(d, true);
    for (uint32_t i = 0; i < d->n_queues; i++)
        queue_free(&d->queues[i]);
    free(d->queues);
    if (d->common.session != NULL) {
        fuse_session_keep(d->common.session, NULL); /* another process may go on with it */
        fuse_session_free(d->common.session);
    }
    guestmem_free(d->mem);
    guestlog_free(d->log);
    guestmem_map_put(d->inflight.map);
    guestmem_map_put(d->own_inflight.map);
    free(d);
}
