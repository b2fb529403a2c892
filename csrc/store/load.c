/* store/load.c -- loading a blob's chunk table when it is first needed: on a pool thread, from the image's own records,
 * and where those do not say where chunks lie, from the blob's stored table (ID.blob.meta, or a META job). Readers
 * meanwhile wait on the pseudo-unit META(blob).
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "blob/meta.h"
#include "store/fetcher.h"

#define META_RETRY_US (1000 * 1000) /* an image that was refused may be looked at again after this */
#define META_TRIES 2

static int open_cache(struct blob_core *c, const struct blobtable *t, struct failure *f)
{
    char name[CORE_NAME_MAX];
    struct cachefile_cfg cfg;
    const char *why = c->store->compressed || c->stored ? blobtable_unstorable(&c->info, t) : NULL;

    if (c->cache)
        return c->stored && why ? failure_set(f, -EEXIST, VND_CAUSE_DIGEST, "its cache is compressed, and %s", why) : 0;
    if (why)
        engine_say(c->engine, VND_LEVEL_WARNING, VND_CAUSE_NONE, "cache of blob %s is kept uncompressed: %s",
                   c->info.id, why);
    c->stored = c->store->compressed && !why;
    /* Where no side file can bind files to a table, they have its name, lest another host or user write to them. */
    if (c->store->side_dir_fd < 0 && c->store->writable && !atomic_load(&c->apart))
        return failure_set(f, -EBUSY, VND_CAUSE_NONE, "nothing can tell here whose the files of that name are");
    core_cache_cfg(c, name, &cfg);
    cfg.table = t;
    return cachefile_open(&c->cache, &cfg, f);
}

static bool same_storage(const vnd_blob_info *a, const vnd_blob_info *b)
{
    return a->chunk_count == b->chunk_count && a->compressor == b->compressor && a->digester == b->digester &&
           a->cipher == b->cipher && !memcmp(a->cipher_key, b->cipher_key, sizeof a->cipher_key) &&
           !memcmp(a->cipher_iv, b->cipher_iv, sizeof a->cipher_iv) &&
           a->uncompressed_size_bytes == b->uncompressed_size_bytes;
}

/* Opens the core's files if need be, binds them to all, and makes all the core's table. */
static int publish_table(struct blob_core *c, struct blobtable *all, struct failure *f)
{
    int rc = open_cache(c, all, f);

    if (rc)
        return rc;
    /* For a commit, binding and table change in one step (cachefile_invalidate's rule). */
    pthread_mutex_lock(&c->cache->lock);
    rc = cachefile_bind(c->cache, all, f);
    if (!rc) {
        all->next = c->tables;
        c->tables = all;
        atomic_store_explicit(&c->table, all, memory_order_release);
    }
    pthread_mutex_unlock(&c->cache->lock);
    return rc;
}

/* Joins b's table with its core's: *own, which is taken over, unless this fails. The core's table only grows, for its
 * trusted bits vouch for what it says. -EEXIST: they contradict each other. */
static int join_tables(struct vnd_blob *b, struct blobtable **own, struct failure *f)
{
    struct blob_core *c = b->core;
    struct blobtable *now = atomic_load(&c->table), *all = *own, *mine = *own;
    int rc = 0;

    if (!same_storage(&b->info, &c->info))
        return failure_set(f, -EEXIST, VND_CAUSE_DIGEST, "sizes or codecs differ from what another image says");
    if (now && blobtable_equal(now, *own)) {
        mine = now;
        blobtable_free(*own);
    } else {
        if (now)
            rc = blobtable_merge(&all, now, *own, f);
        if (!rc && now && blobtable_equal(now, all)) { /* it says less than what is known already */
            blobtable_free(all);
            b->own = mine;
        } else if (!rc) {
            rc = publish_table(c, all, f);
            if (rc && all != mine)
                blobtable_free(all);
            if (!rc && all != mine)
                b->own = mine;
        }
    }
    if (rc)
        return rc;
    *own = NULL;
    b->cache = c->cache;
    atomic_store_explicit(&b->table, mine, memory_order_release);
    return 0;
}

static int join_locked(struct vnd_blob *b, struct blobtable **own, struct failure *f)
{
    struct blob_core *c = b->core;
    int rc;

    pthread_mutex_lock(&c->load_lock);
    rc = join_tables(b, own, f);
    pthread_mutex_unlock(&c->load_lock);
    return rc;
}

/* Gives records (may be NULL: there are none) the places that a stored table states. */
static int apply_meta(struct blobtable **records, const vnd_blob_info *info, const uint8_t *plain,
                      const uint8_t *header, struct failure *f)
{
    struct blobtable *meta;
    int rc = blobmeta_parse(&meta, info, plain, header, f);

    if (rc)
        return rc;
    if (!*records) {
        *records = meta;
        return 0;
    }
    rc = blobmeta_place(*records, meta, info, f);
    blobtable_free(meta);
    return rc;
}

/* Reads the table from the file in the work directory. A file with a fault is not used. */
static int meta_from_file(struct vnd_blob *b, struct blobtable **records)
{
    uint8_t header[BLOBMETA_HEADER], *plain;
    struct failure why = { 0 };
    int rc = blobmeta_file_read(b->core->store->dir_fd, &b->info, &plain, header);
    bool cached = !rc;

    if (rc && b->load.beside) {
        int dir_fd = open(b->load.beside, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        rc = dir_fd < 0 ? -errno : blobmeta_file_read(dir_fd, &b->info, &plain, header);
        if (dir_fd >= 0)
            close(dir_fd);
    }
    if (rc)
        return rc;
    rc = apply_meta(records, &b->info, plain, header, &why);
    if (rc)
        engine_say(b->core->engine, VND_LEVEL_WARNING, VND_CAUSE_FORMAT,
                   "%s.blob.meta in the cache directory or beside the bootstrap is not used: %s", b->info.id, why.line);
    else if (cached)
        atomic_store(&b->core->meta_cached, true);
    free(plain);
    return rc;
}

bool core_drop_meta(struct blob_core *c)
{
    if (!atomic_exchange(&c->meta_cached, false))
        return false;
    blobmeta_file_remove(c->store->dir_fd, &c->info);
    return true;
}

/* Makes the table of the bytes that a META job brought. */
static int meta_from_raw(struct vnd_blob *b, struct blobtable **records, struct failure *f)
{
    const uint8_t *header = b->load.raw + b->info.ci_csize_bytes;
    uint8_t *plain = NULL;
    int rc = b->info.cipher ? blobmeta_decrypt(&b->info, b->load.raw, b->load.raw_len, f) : 0;

    if (!rc)
        rc = blobmeta_decode(&plain, &b->info, b->load.raw, b->load.raw_len, f);
    if (rc)
        return rc;
    rc = apply_meta(records, &b->info, plain, header, f);
    if (!rc && b->core->store->writable)
        blobmeta_file_write(b->core->store->dir_fd, &b->info, plain, header); /* only saves the next fetch */
    free(plain);
    return rc;
}

/* Reads the stored table from its file. -EINPROGRESS: it has to be fetched, and we hold the claim where there can be
 * one; -EBUSY: another process fetches it. */
static int meta_find(struct vnd_blob *b, struct blobtable **own)
{
    if (!meta_from_file(b, own))
        return 0;
    b->load.claim_fd = claim_meta(b->core->store->side_dir_fd, b->info.id);
    if (b->load.claim_fd == -EAGAIN && !b->load.claim_overdue)
        return -EBUSY;
    /* Another process may have finished between the look and the claim. */
    return b->load.claim_fd >= 0 && !meta_from_file(b, own) ? 0 : -EINPROGRESS;
}

/* -EINPROGRESS: the stored table has to be fetched first; -EBUSY: another process does it. */
static int load_table(struct vnd_blob *b, struct blobtable **own, struct failure *f)
{
    bool batch = b->info.features & (BLOBMETA_BATCH | BLOBMETA_ZRAN);
    int rc;

    f->cause = VND_CAUSE_FORMAT; /* where what fails says nothing */
    rc = blobtable_from_records(own, &b->info, b->chunks, b->ctx, f);
    if (rc && rc != -ENODATA)
        return rc;
    if (!rc && !batch)
        return 0;
    /* The image's own limits first: without digests nothing is worth fetching. */
    if (rc && !b->core->engine->cfg.allow_unverified)
        return failure_set(f, -EIO, VND_CAUSE_DIGEST,
                           "its image lists no chunks and so no digests of it; "
                           "--allow-unverified serves it all the same");
    if (!blobmeta_possible(&b->info)) {
        rc = failure_set(f, -EIO, VND_CAUSE_FORMAT, "neither its image nor the blob says where its chunks lie");
    } else if (b->load.raw) {
        rc = meta_from_raw(b, own, f);
        free(b->load.raw);
        b->load.raw = NULL;
        if (rc && rc != -ENOMEM && b->load.raw_tries < META_TRIES)
            rc = -EINPROGRESS;
        if (rc)
            f->cause = VND_CAUSE_DIGEST;
    } else {
        rc = meta_find(b, own);
    }
    if (rc) {
        blobtable_free(*own);
        *own = NULL;
    }
    return rc;
}

static int load(struct vnd_blob *b, struct failure *f)
{
    struct blob_core *c = b->core;
    struct blobtable *own = NULL;
    int rc = load_table(b, &own, f);

    if (rc)
        return rc;
    if (own->digests < own->known && !c->engine->cfg.allow_unverified) {
        blobtable_free(own);
        return failure_set(f, -EIO, VND_CAUSE_DIGEST,
                           "its image carries no chunk digests; --allow-unverified serves it all "
                           "the same");
    }
    rc = join_locked(b, &own, f);
    if (rc == -EEXIST || rc == -EBUSY) {
        engine_say(c->engine, rc == -EEXIST ? VND_LEVEL_WARNING : VND_LEVEL_INFO, VND_CAUSE_NONE,
                   "blob %s: %s; this image gets cache files of its own", b->info.id, f->line);
        rc = blob_set_apart(b, own, rc == -EBUSY);
        if (!rc)
            rc = join_locked(b, &own, f);
    }
    blobtable_free(own);
    return rc;
}

/* ---------------------------------------------------------------- who waits for it */

struct load_task {
    struct pool_task task;
    struct vnd_blob *b;
};

static void load_end(struct vnd_blob *b, int rc)
{
    struct miss_shard *s = miss_shard_of(b->core->engine->fetcher, b, 0);
    struct store_wait *list = NULL;

    pthread_mutex_lock(&s->lock);
    b->load.running = false;
    b->load.fetching = rc == -EINPROGRESS || rc == -EBUSY;
    if (rc != -EINPROGRESS && b->load.claim_fd >= 0) /* the file is written now, or cannot be */
        close(b->load.claim_fd);
    if (rc != -EINPROGRESS)
        b->load.claim_fd = -1;
    if (!b->load.fetching) {
        b->load.raw_tries = 0;
        b->load.unit.failed = false;
        b->load.failed_errno = rc ? EIO : 0;
        b->load.retry_us = now_us() + META_RETRY_US;
        list = miss_detach(&b->load.unit, b->load.failed_errno);
    }
    pthread_cond_broadcast(&b->load.ended);
    pthread_mutex_unlock(&s->lock);
    miss_wake(list);
}

/* The other process has finished or failed: look again. */
static void meta_fetched(struct vnd_blob *b, int error)
{
    blob_take_raw(b, NULL, 0, error);
}

static void load_run(struct pool_task *task)
{
    struct vnd_blob *b = ((struct load_task *)task)->b;
    struct vnd_engine *e = b->core->engine;
    struct failure f = { 0 };
    int rc = load(b, &f);

    if (rc == -EINPROGRESS) {
        if (f.line[0])
            engine_say(e, VND_LEVEL_WARNING, VND_CAUSE_DIGEST, "%s; it is asked for once more", f.line);
        b->load.raw_tries++;
        load_end(b, rc); /* before the job can end */
        if (want_push_meta(b, 0))
            blob_take_raw(b, NULL, 0, ENOMEM);
    } else if (rc == -EBUSY) {
        load_end(b, rc);
        foreign_add_meta(e->fetcher, b, meta_fetched);
    } else {
        if (rc)
            engine_say(e, VND_LEVEL_ERROR, f.cause, "blob %s cannot be served: %s", b->info.id, f.line);
        load_end(b, rc);
    }
    if (!rc) {
        upkeep_start(e->fetcher);
        want_wake(e->fetcher);
    }
    blob_unref(b);
    free(task);
}

/* With the shard's lock held. */
static int load_start(struct vnd_blob *b)
{
    struct load_task *t;

    if (b->load.running || b->load.fetching)
        return 0;
    if (b->detached || atomic_load(&b->core->engine->fetcher->down))
        return -EIO;
    if (b->load.failed_errno && now_us() < b->load.retry_us)
        return -b->load.failed_errno;
    t = calloc(1, sizeof *t);
    if (!t)
        return -ENOMEM;
    t->task.run = load_run;
    t->b = b;
    blob_ref(b);
    b->load.running = true;
    pool_submit(b->core->engine, &t->task, 0);
    return 0;
}

void blob_take_raw(struct vnd_blob *b, uint8_t *raw, size_t len, int error)
{
    struct miss_shard *s = miss_shard_of(b->core->engine->fetcher, b, 0);
    int rc = error ? -error : 0;

    pthread_mutex_lock(&s->lock);
    free(b->load.raw);
    b->load.raw = raw;
    b->load.raw_len = len;
    b->load.fetching = false;
    b->load.unit.failed = false;
    if (!rc)
        rc = load_start(b);
    pthread_mutex_unlock(&s->lock);
    if (rc)
        load_end(b, rc);
}

int blob_defer_raw(struct vnd_blob *b, int64_t not_before_us)
{
    struct miss_shard *s = miss_shard_of(b->core->engine->fetcher, b, 0);
    bool detached;

    pthread_mutex_lock(&s->lock);
    b->load.unit.failed = true;
    b->load.unit.core = b->core; /* it does not change before the table has come */
    detached = b->detached;
    pthread_mutex_unlock(&s->lock);
    return detached ? -EIO : want_push_meta(b, not_before_us);
}

void blob_want_load(struct vnd_blob *b)
{
    struct miss_shard *s = miss_shard_of(b->core->engine->fetcher, b, 0);

    pthread_mutex_lock(&s->lock);
    if (!atomic_load(&b->table))
        load_start(b);
    pthread_mutex_unlock(&s->lock);
}

int blob_park(struct vnd_blob *b, struct store_wait *w)
{
    struct miss_shard *s = miss_shard_of(b->core->engine->fetcher, b, 0);
    int rc = 1;

    pthread_mutex_lock(&s->lock);
    if (!atomic_load(&b->table) && !(rc = load_start(b)))
        miss_link(s, &b->load.unit, w);
    pthread_mutex_unlock(&s->lock);
    return rc;
}
