/* store/foreign.c -- the thread that waits for chunks and chunk tables which other processes fetch. It starts when
 * first needed. */
#include <errno.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "store/fetcher.h"

#define TICK_MS 10 /* a dead holder, and a real nydusd that fills without our locks, are noticed within this */

static void foreign_free(struct foreign *x)
{
    if (x->meta)
        blob_unref(x->meta);
    core_unref(x->core);
    free(x);
}

/* How long another process may have a chunk claimed: a multiple of what this blob's fetches take here. One that is stopped, or
 * whose server hangs, keeps its claims; to fetch a chunk twice costs only its bytes. */
#define PATIENCE_TIMES 4
#define PATIENCE_MIN_US (1000 * 1000)
#define PATIENCE_MAX_US (5 * 1000 * 1000)
#define PATIENCE_UNKNOWN_US (2 * 1000 * 1000) /* nothing was fetched here yet */

static bool is_overdue(const struct foreign *x)
{
    const struct link_pace *pace = &x->core->pace;
    int64_t latency_us = atomic_load(&pace->latency_us), share_us = x->core->engine->cfg.read_deadline_ms * 1000ll / 3;
    uint64_t rate = atomic_load(&pace->bytes_per_s);
    int64_t patience_us = PATIENCE_UNKNOWN_US;

    if (latency_us)
        patience_us = PATIENCE_TIMES * (latency_us + (rate ? (int64_t)(FETCH_PREFETCH_BYTES * 1000000ull / rate) : 0));
    if (latency_us && patience_us < PATIENCE_MIN_US)
        patience_us = PATIENCE_MIN_US;
    if (patience_us > PATIENCE_MAX_US)
        patience_us = PATIENCE_MAX_US;
    if (patience_us > share_us)
        patience_us = share_us;
    return now_us() - x->since_us > patience_us;
}

/* The table is there, or its fetcher gave up or died: the load looks again, and fetches itself if need be. */
static bool meta_over(const struct foreign *x, bool tick)
{
    int fd = tick ? claim_meta(x->core->store->side_dir_fd, x->meta->info.id) : -EAGAIN;

    if (fd >= 0)
        close(fd);
    if (fd == -EAGAIN && !atomic_load(&x->core->closed)) {
        if (!tick || !is_overdue(x))
            return false;
        x->meta->load.claim_overdue = true;
    }
    x->done(x->meta, atomic_load(&x->core->closed) ? EIO : 0);
    return true;
}

/* Whether the thread has nothing more to do for the chunk. */
static bool foreign_over(const struct foreign *x, bool tick)
{
    struct cachefile *c = x->core->cache;

    if (x->meta)
        return meta_over(x, tick);
    if (cachefile_ready(c, x->index)) {
        miss_finish(x->core, x->index, 0);
        return true;
    }
    if (atomic_load(&x->core->closed)) {
        miss_finish(x->core, x->index, EIO);
        return true;
    }
    /* Free and not ready: the holder died or failed. Marked: a nydusd filled it without a lock. It is ours now. */
    if (tick && (cachefile_marked(c, x->index) || !claim_foreign(c->side_fd, x->index))) {
        miss_retry(x->core, x->index, MISS_ANY_TRIES, 0, EIO);
        return true;
    }
    if (tick && is_overdue(x)) {
        miss_retry(x->core, x->index, MISS_ANY_TRIES, MISS_OVERDUE, EIO);
        return true;
    }
    return false;
}

static void *foreign_run(void *arg)
{
    struct fetcher *f = arg;
    int64_t last_tick = 0;

    pthread_mutex_lock(&f->foreign_lock);
    while (!f->foreign_down) {
        if (!f->foreign) {
            pthread_cond_wait(&f->foreign_some, &f->foreign_lock);
            continue;
        }
        struct foreign *mine = f->foreign, *keep = NULL, **keep_tail = &keep;
        struct vnd_store *store = mine->core->store;
        struct blob_core *held = mine->core;
        bool tick = now_us() - last_tick >= TICK_MS * 1000;
        f->foreign = NULL;
        pthread_mutex_unlock(&f->foreign_lock);

        core_ref(held); /* keeps the store for the wait below */
        uint32_t gen = claim_wake_enter(&store->wake);
        while (mine) {
            struct foreign *x = mine;
            mine = x->next;
            if (foreign_over(x, tick)) {
                foreign_free(x);
                continue;
            }
            x->next = NULL;
            *keep_tail = x;
            keep_tail = &x->next;
        }
        if (tick)
            last_tick = now_us();
        if (keep)
            claim_wake_wait(&store->wake, gen, TICK_MS);
        claim_wake_leave(&store->wake);
        core_unref(held);

        pthread_mutex_lock(&f->foreign_lock);
        *keep_tail = f->foreign;
        if (keep)
            f->foreign = keep;
    }
    pthread_mutex_unlock(&f->foreign_lock);
    return NULL;
}

static bool add(struct fetcher *f, struct blob_core *c, uint32_t index, struct vnd_blob *meta,
                void (*done)(struct vnd_blob *b, int error))
{
    struct foreign *x = calloc(1, sizeof *x);
    bool ok = x != NULL;

    if (!ok)
        return false;
    x->core = c;
    x->index = index;
    x->since_us = now_us();
    x->meta = meta;
    x->done = done;
    core_ref(c);
    if (meta)
        blob_ref(meta);
    pthread_mutex_lock(&f->foreign_lock);
    if (!f->foreign_started && !f->foreign_down)
        f->foreign_started = !thread_start(&f->foreign_thread, "vnd-foreign", foreign_run, f);
    ok = f->foreign_started;
    if (ok) {
        x->next = f->foreign;
        f->foreign = x;
        pthread_cond_signal(&f->foreign_some);
    }
    pthread_mutex_unlock(&f->foreign_lock);
    if (!ok)
        foreign_free(x);
    return ok;
}

void foreign_add(struct fetcher *f, struct blob_core *c, uint32_t index)
{
    if (!add(f, c, index, NULL, NULL))
        miss_finish(c, index, EIO);
}

void foreign_add_meta(struct fetcher *f, struct vnd_blob *b, void (*done)(struct vnd_blob *b, int error))
{
    if (!add(f, b->core, 0, b, done))
        done(b, EIO);
}

void foreign_stop(struct fetcher *f)
{
    bool join;

    pthread_mutex_lock(&f->foreign_lock);
    join = f->foreign_started;
    f->foreign_down = true;
    f->foreign_started = false;
    pthread_cond_signal(&f->foreign_some);
    pthread_mutex_unlock(&f->foreign_lock);
    if (join)
        pthread_join(f->foreign_thread, NULL);
    while (f->foreign) {
        struct foreign *x = f->foreign;
        f->foreign = x->next;
        if (x->meta)
            x->done(x->meta, ESHUTDOWN);
        foreign_free(x);
    }
}
