/* store/upkeep.c -- the thread that looks after cache files once a second: makes written data durable, follows files
 * that were removed or replaced, and uses a disk again that was full or could not be written.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
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
static void follow_core(struct blob_core *c, bool changed, bool retry)
{
    struct cachefile *f = c->cache;
    char name[CORE_NAME_MAX];
    struct failure why = { 0 };
    struct cachefile_cfg cfg;
    enum cachefile_replaced which;
    int rc;

    core_cache_cfg(c, name, &cfg);
    which = changed ? cachefile_find_replaced(f, &cfg) : CACHEFILE_IN_PLACE;
    if (which == CACHEFILE_IN_PLACE && !(retry && cachefile_lacks(f, &cfg)))
        return;
    cfg.quiet = which == CACHEFILE_IN_PLACE;
    rc = cachefile_move(f, &cfg, atomic_load(&c->table),
                        which == CACHEFILE_IN_PLACE ? CACHEFILE_MOVE_IF_BETTER : CACHEFILE_MOVE, &why);
    if ((rc == -EEXIST || rc == -EBUSY) &&
        !atomic_load(&c->apart)) /* what lies there now is not, or perhaps not, this table's */
        rc = core_set_apart(c, rc == -EBUSY, &why);
    if (!rc && which != CACHEFILE_IN_PLACE)
        engine_say(c->engine, VND_LEVEL_WARNING, VND_CAUSE_IO, "cache of blob %s: %s", f->id, REPLACED[which]);
    else if (!rc)
        engine_say(c->engine, VND_LEVEL_INFO, VND_CAUSE_NONE, "cache of blob %s is written again", f->id);
    else if (rc < 0 && which != CACHEFILE_IN_PLACE && !f->replaced_said)
        engine_say(c->engine, VND_LEVEL_ERROR, why.cause,
                   "%s; %s, and until that is mended this daemon alone goes on with the "
                   "removed file",
                   why.line, REPLACED[which]);
    f->replaced_said = rc < 0;
    if (rc < 0) /* to be tried again, though nothing changes in the directories */
        c->store->dir_seen = (struct store_seen){ 0 };
}

#define SETTLED_NS 2000000000ll /* a directory's time moves on within this, however coarse its clock is */

/* Whether a name in the directory may lead elsewhere than when this was asked last. */
static bool dir_changed(int dir_fd, struct store_seen *seen)
{
    struct timespec now;
    struct stat st;
    struct store_seen is;

    if (dir_fd < 0)
        return false;
    if (fstat(dir_fd, &st))
        return true;
    clock_gettime(CLOCK_REALTIME, &now);
    is = (struct store_seen){ st.st_ino, st.st_mtim.tv_sec * 1000000000ll + st.st_mtim.tv_nsec };
    bool same = is.ino == seen->ino && is.mtime_ns == seen->mtime_ns;
    /* A change right after this look may get the same time: such a time is not noted. */
    *seen = now.tv_sec * 1000000000ll + now.tv_nsec - is.mtime_ns > SETTLED_NS ? is : (struct store_seen){ 0 };
    return !same;
}

/* References on all cores, those of a store together: their number. */
static uint32_t list_cores(struct vnd_engine *e, struct blob_core ***out)
{
    uint32_t n = 0, cap = 0;

    *out = NULL;
    pthread_mutex_lock(&e->lock);
    for (struct vnd_store *s = e->stores; s; s = s->next) {
        pthread_mutex_lock(&s->lock);
        for (struct blob_core *k = s->cores; k; k = k->next) {
            if (n == cap) {
                struct blob_core **more = realloc(*out, (cap ? 2 * cap : 64) * sizeof(struct blob_core *));
                if (!more)
                    break; /* the others' turn comes with the next round */
                *out = more;
                cap = cap ? 2 * cap : 64;
            }
            k->refs++;
            (*out)[n++] = k;
        }
        pthread_mutex_unlock(&s->lock);
    }
    pthread_mutex_unlock(&e->lock);
    return n;
}

static void look_after_core(struct blob_core *c, bool sync_all, bool changed, bool retry)
{
    if (c->cache->sync_due)
        cachefile_sync(c->cache);
    c->cache->sync_due = !c->cache->sync_due && cachefile_write_out(c->cache, sync_all);
    if ((changed || retry) && !pthread_mutex_trylock(&c->load_lock)) {
        follow_core(c, changed, retry);
        pthread_mutex_unlock(&c->load_lock);
    } else if (changed) {
        c->store->dir_seen = (struct store_seen){ 0 }; /* a load is under way: the next round looks */
    }
    if (retry && c->cache->writable && atomic_load(&c->uncached)) {
        pthread_mutex_lock(&c->load_lock);
        uncached_flush(c);
        pthread_mutex_unlock(&c->load_lock);
    }
}

/* One round over all blobs. sync_all: the interval has passed, so little is worth it too. Of files that nothing has happened
 * to, a round asks two directories for their times, however many blobs there are. */
static void look_after(struct vnd_engine *e, bool sync_all, bool retry)
{
    const struct vnd_store *store = NULL;
    bool followed = false, changed = false;
    struct blob_core **cores;
    uint32_t n = list_cores(e, &cores);

    for (uint32_t i = 0; i < n; i++) {
        struct blob_core *c = cores[i];

        if (i == 0 || c->store != store) {
            store = c->store;
            followed = store_follow(c->store, retry);
            /* Both are asked, so that both are noted. */
            changed = dir_changed(c->store->dir_fd, &c->store->dir_seen) |
                      dir_changed(c->store->side_dir_fd, &c->store->side_seen);
        }
        if (!followed)
            c->store->dir_seen = (struct store_seen){ 0 };
        if (atomic_load_explicit(&c->table, memory_order_acquire))
            look_after_core(c, sync_all, followed && changed, followed && retry);
        core_unref(c);
    }
    free(cores);
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
