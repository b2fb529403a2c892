/* store/upkeep.c -- the thread that looks after cache files once a second: makes written data durable, follows files
 * that were removed or replaced, and uses a disk again that was full or could not be written.
 */
#include <errno.h>
#include <time.h>

#include "store/fetcher.h"

#define LOOK_MS 1000
#define RETRY_US (5ll * 1000 * 1000) /* after this, files that could not be opened or written are tried again */

static const char *const REPLACED[] = {
    [CACHEFILE_DATA_REPLACED] = "its data file was removed or replaced; what is read is fetched again",
    [CACHEFILE_SIDE_REPLACED] = "its side file was removed or replaced; what is read is verified again",
    [CACHEFILE_MAP_REPLACED] = "its chunk map was removed or replaced; it is written anew",
};

/* Readers go on in the open files until the move, so it is no hurry and no loss if it fails. With load_lock held: the table
 * and the files' names stay as they are. */
static void follow_core(struct blob_core *c, bool retry)
{
    struct cachefile *f = c->cache;
    char name[CORE_NAME_MAX], err[VND_ERR_MAX] = "";
    struct cachefile_cfg cfg;
    enum cachefile_replaced which;
    int cause = VND_CAUSE_NONE, rc;

    core_cache_cfg(c, name, &cfg);
    which = cachefile_find_replaced(f, &cfg);
    if (which == CACHEFILE_IN_PLACE && !(retry && cachefile_lacks(f, &cfg)))
        return;
    cfg.quiet = which == CACHEFILE_IN_PLACE;
    rc = cachefile_move(f, &cfg, atomic_load(&c->table), which == CACHEFILE_IN_PLACE, &cause, err, sizeof err);
    if (rc == -EEXIST && !atomic_load(&c->apart)) /* what lies there now is of another table */
        rc = core_set_apart(c, &cause, err, sizeof err);
    if (!rc && which != CACHEFILE_IN_PLACE)
        engine_say(c->engine, VND_LEVEL_WARNING, VND_CAUSE_IO, "cache of blob %s: %s", f->id, REPLACED[which]);
    else if (!rc)
        engine_say(c->engine, VND_LEVEL_INFO, VND_CAUSE_NONE, "cache of blob %s is written again", f->id);
    else if (rc < 0 && which != CACHEFILE_IN_PLACE && !f->replaced_said)
        engine_say(c->engine, VND_LEVEL_ERROR, cause,
                   "%s; %s, and until that is mended this daemon alone goes on with the "
                   "removed file",
                   err, REPLACED[which]);
    f->replaced_said = rc < 0;
}

/* One round over all blobs. sync_all: the interval has passed, so small amounts are synced, too. */
static void look_after(struct vnd_engine *e, bool sync_all, bool retry)
{
    for (int skip = 0;; skip++) {
        struct blob_core *c = NULL;
        int at = 0;

        /* Walks by position, because the lists change meanwhile. To miss a blob or meet it twice does no harm. */
        pthread_mutex_lock(&e->lock);
        for (struct vnd_store *s = e->stores; s && !c; s = s->next) {
            pthread_mutex_lock(&s->lock);
            for (struct blob_core *k = s->cores; k && !c; k = k->next)
                if (at++ == skip) {
                    c = k;
                    c->refs++;
                }
            pthread_mutex_unlock(&s->lock);
        }
        pthread_mutex_unlock(&e->lock);
        if (!c)
            return;
        if (atomic_load_explicit(&c->table, memory_order_acquire)) {
            if (c->cache->sync_due)
                cachefile_sync(c->cache);
            c->cache->sync_due = !c->cache->sync_due && cachefile_write_out(c->cache, sync_all);
            if (store_follow(c->store, retry) && !pthread_mutex_trylock(&c->load_lock)) {
                follow_core(c, retry);
                pthread_mutex_unlock(&c->load_lock);
            }
            if (retry && c->cache->writable && atomic_load(&c->uncached)) {
                pthread_mutex_lock(&c->load_lock);
                uncached_flush(c);
                pthread_mutex_unlock(&c->load_lock);
            }
        }
        core_unref(c);
    }
}

static void *upkeep_run(void *arg)
{
    struct fetcher *f = arg;
    int64_t synced = now_us(), retried = synced;

    pthread_mutex_lock(&f->upkeep_lock);
    while (!f->upkeep_down) {
        struct timespec until = time_after_ms(LOOK_MS);
        pthread_cond_timedwait(&f->upkeep_some, &f->upkeep_lock, &until);
        if (f->upkeep_down)
            break;
        bool sync_all = now_us() - synced >= (int64_t)f->engine->cfg.sync_interval_ms * 1000;
        bool retry = now_us() - retried >= RETRY_US;
        pthread_mutex_unlock(&f->upkeep_lock);
        look_after(f->engine, sync_all, retry);
        if (sync_all)
            synced = now_us();
        if (retry)
            retried = now_us();
        pthread_mutex_lock(&f->upkeep_lock);
    }
    pthread_mutex_unlock(&f->upkeep_lock);
    return NULL;
}

void upkeep_start(struct fetcher *f)
{
    pthread_mutex_lock(&f->upkeep_lock);
    if (!f->upkeep_started && !f->upkeep_down)
        f->upkeep_started = !thread_start(&f->upkeep_thread, "vnd-upkeep", upkeep_run, f);
    pthread_mutex_unlock(&f->upkeep_lock);
}

void upkeep_stop(struct fetcher *f)
{
    bool join;

    pthread_mutex_lock(&f->upkeep_lock);
    join = f->upkeep_started;
    f->upkeep_down = true;
    f->upkeep_started = false;
    pthread_cond_signal(&f->upkeep_some);
    pthread_mutex_unlock(&f->upkeep_lock);
    if (join)
        pthread_join(f->upkeep_thread, NULL);
}
