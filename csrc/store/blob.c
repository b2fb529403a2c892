/* store/blob.c -- an image's view of a blob: opened, closed, and what it can tell of itself. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "store/fetcher.h"

/* Blob features, docs/rafs-format.md 4.1 */
#define FEATURE_EXTERNAL 0x800u

static const char *feature_refused(uint32_t features)
{
    if (features & FEATURE_EXTERNAL)
        return "EXTERNAL";
    return NULL;
}

/* Takes b out of its core, of which no image is left then, or another; that core, or NULL. store->lock is held. */
static struct blob_core *core_leave(struct vnd_blob *b)
{
    struct blob_core *c = b->core;

    if (!c)
        return NULL;
    pthread_mutex_lock(&c->lock);
    for (struct vnd_blob **p = &c->blobs; *p; p = &(*p)->next)
        if (*p == b) {
            *p = b->next;
            break;
        }
    if (!c->blobs) /* an image that names the blob from now on gets a core of its own */
        atomic_store(&c->closed, true);
    pthread_mutex_unlock(&c->lock);
    return c;
}

/* If no image is left: drops what is queued, fails what waits. */
static void core_give_up(struct blob_core *c)
{
    if (!atomic_load(&c->closed))
        return;
    want_purge(c);
    miss_fail_core(c, EIO);
}

/* Puts the blob into the core of that table name, "" is the blob's own files; makes the core if there is none. In one step
 * with the look-up, for a core without blobs is closed. Returns the core that b had, with the reference b held on it, or
 * NULL. -ENOMEM in *rc. */
static struct blob_core *core_join(struct vnd_store *s, struct vnd_blob *b, const char *table_name, bool below, int *rc)
{
    struct blob_core *c, *fresh = calloc(1, sizeof *fresh), *had;

    *rc = fresh ? 0 : -ENOMEM;
    if (!fresh)
        return NULL;
    pthread_mutex_lock(&s->engine->lock);
    pthread_mutex_lock(&s->lock);
    for (c = s->cores; c; c = c->next) /* table_name of a core that is set apart later may not be read yet */
        if (!strcmp(c->info.id, b->info.id) && !atomic_load(&c->closed) &&
            !strcmp(atomic_load(&c->apart) ? c->table_name : "", table_name))
            break;
    if (!c) {
        c = fresh;
        fresh = NULL;
        c->store = s;
        c->engine = s->engine;
        c->info = b->info;
        snprintf(c->table_name, sizeof c->table_name, "%s", table_name);
        c->below = below;
        atomic_init(&c->apart, *table_name != 0);
        pthread_mutex_init(&c->load_lock, NULL);
        pthread_mutex_init(&c->lock, NULL);
        stream_init(c);
        c->next = s->cores;
        s->cores = c;
        s->refs++;
    }
    c->refs++;
    had = core_leave(b);
    atomic_store(&b->core, c);
    pthread_mutex_lock(&c->lock);
    b->next = c->blobs;
    c->blobs = b;
    pthread_mutex_unlock(&c->lock);
    pthread_mutex_unlock(&s->lock);
    pthread_mutex_unlock(&s->engine->lock);
    free(fresh);
    return had;
}

int blob_set_apart(struct vnd_blob *b, const struct blobtable *own, bool below)
{
    char name[BLOBTABLE_NAME_LEN + 1];
    struct blob_core *had;
    int rc = blobtable_name(&b->info, own, name);

    if (!rc)
        had = core_join(b->core->store, b, name, below, &rc);
    if (rc)
        return rc;
    want_move_ranges(had, b->core, asker_of(b, 0));
    core_give_up(had);
    core_unref(had);
    return 0;
}

int core_set_apart(struct blob_core *c, bool below, struct failure *f)
{
    char name[CORE_NAME_MAX];
    struct cachefile_cfg cfg;
    int rc = blobtable_name(&c->info, atomic_load(&c->table), c->table_name);

    if (rc)
        return failure_set(f, rc, VND_CAUSE_IO, "its table gets no name: %s", strerror(-rc));
    c->below = below;
    atomic_store(&c->apart, true);
    core_cache_cfg(c, name, &cfg);
    rc = cachefile_move(c->cache, &cfg, atomic_load(&c->table), CACHEFILE_MOVE, f);
    if (!rc)
        engine_say(c->engine, VND_LEVEL_WARNING, VND_CAUSE_DIGEST,
                   "cache of blob %s: its files are another's now and are left alone; this image's chunks go to "
                   "%s.blob.%s",
                   c->info.id, name, c->stored ? "raw" : "data");
    return rc;
}

struct vnd_blob *blob_open(vnd_store *s, const vnd_blob_info *info, blob_chunks_fn chunks, void *ctx, struct failure *f)
{
    const char *feature = feature_refused(info->features);
    struct vnd_blob *b;
    int rc = 0;

    if (!blob_id_valid(info->id)) {
        failure_set(f, 0, VND_CAUSE_FORMAT, "blob %u has an id that is no id: the image is damaged", info->index);
        return NULL;
    }
    if (feature) {
        failure_set(f, 0, VND_CAUSE_FORMAT,
                    "blob %s needs the feature %s, which is not supported; convert the image "
                    "without it",
                    info->id, feature);
        return NULL;
    }
    if (!codec_known(info->compressor) || info->digester > CODEC_SHA256) {
        failure_set(f, 0, VND_CAUSE_FORMAT, "blob %s: compressor %u or digester %u is unknown", info->id,
                    info->compressor, info->digester);
        return NULL;
    }
    if (info->uncompressed_size_bytes > 1ull << 44 || info->compressed_size_bytes > 1ull << 40 ||
        info->chunk_count > BLOBTABLE_COUNT_MAX) {
        failure_set(f, 0, VND_CAUSE_FORMAT, "blob %s: sizes beyond all bounds: the image is damaged", info->id);
        return NULL;
    }
    b = calloc(1, sizeof *b);
    if (b) {
        atomic_init(&b->refs, 1);
        b->info = *info;
        atomic_init(&b->amplify_bytes, AMPLIFY_DEFAULT_BYTES);
        b->chunks = chunks;
        b->ctx = ctx;
        b->load.unit.state = UNIT_OTHER;
        b->load.claim_fd = -1;
        pthread_cond_init(&b->load.ended, NULL);
    }
    if (b)
        core_join(s, b, "", false, &rc);
    if (!b || rc) {
        free(b);
        failure_set(f, 0, VND_CAUSE_IO, "blob %s: no memory", info->id);
        return NULL;
    }
    return b;
}

void blob_meta_beside(struct vnd_blob *b, const char *dir)
{
    if (!b->load.beside)
        b->load.beside = strdup(dir);
}

void blob_close(struct vnd_blob *b, void *ctx)
{
    struct miss_shard *s = miss_shard_of(b->core->engine->fetcher, b, 0);
    struct store_wait *list;
    struct blob_core *c;

    pthread_mutex_lock(&s->lock);
    b->detached = true;
    while (b->load.running) /* it calls the image's chunks function */
        pthread_cond_wait(&b->load.ended, &s->lock);
    list = miss_detach(&b->load.unit, EIO);
    pthread_mutex_unlock(&s->lock);
    miss_wake(list);
    c = b->core;
    pthread_mutex_lock(&c->store->lock);
    core_leave(b);
    pthread_mutex_unlock(&c->store->lock);
    core_give_up(c);
    blob_unref(b);
}

uint64_t blob_uncompressed_size(const struct vnd_blob *b)
{
    return b->info.uncompressed_size_bytes;
}

const char *blob_id(const struct vnd_blob *b)
{
    return b->info.id;
}

struct blobtable *blob_table(const struct vnd_blob *b)
{
    return atomic_load_explicit(&b->table, memory_order_acquire);
}

struct cachefile *blob_cachefile(const struct vnd_blob *b)
{
    return blob_table(b) ? b->cache : NULL;
}

uint64_t vnd_blob_ready(vnd_blob *b, uint64_t *total)
{
    struct blobtable *t = atomic_load_explicit(&b->table, memory_order_acquire);

    uint64_t ready = 0;

    *total = t ? t->known : 0;
    if (t && t->known == t->n)
        return cachefile_count_ready(b->cache);
    for (uint32_t i = 0; t && i < t->n; i++) /* this image names some of the blob's chunks only */
        ready += t->chunk[i].usize && cachefile_ready(b->cache, i);
    return ready;
}

uint32_t vnd_blob_chunks_before(vnd_blob *b, uint64_t end)
{
    struct blobtable *t = atomic_load_explicit(&b->table, memory_order_acquire);
    uint32_t n = 0;

    for (uint32_t i = 0; t && i < t->n; i++)
        if (t->chunk[i].usize && t->chunk[i].coff < end)
            n = i + 1;
    return n;
}

uint64_t vnd_blob_ready_range(vnd_blob *b, uint32_t first, uint32_t n, uint64_t *total)
{
    struct blobtable *t = atomic_load_explicit(&b->table, memory_order_acquire);
    uint64_t ready = 0;

    *total = 0;
    for (uint32_t i = first; t && i < t->n && i - first < n; i++)
        if (t->chunk[i].usize) {
            ++*total;
            ready += cachefile_ready(b->cache, i);
        }
    return ready;
}

uint32_t vnd_blob_ready_map(vnd_blob *b, uint8_t *bits, size_t bytes)
{
    struct blobtable *t = atomic_load_explicit(&b->table, memory_order_acquire);

    if (bytes > 0) /* else bits may be NULL: the count alone is asked */
        memset(bits, 0, bytes);
    for (uint32_t i = 0; t && i < t->n && i / 8 < bytes; i++)
        if (t->chunk[i].usize && cachefile_ready(b->cache, i))
            bits[i / 8] |= (uint8_t)(1u << i % 8);
    return t ? t->n : 0;
}

void vnd_blob_set_source(vnd_blob *b, uint32_t source)
{
    atomic_store_explicit(&b->source, source, memory_order_relaxed);
}

void vnd_blob_set_amplify(vnd_blob *b, uint32_t bytes)
{
    atomic_store_explicit(&b->amplify_bytes, bytes, memory_order_relaxed);
}
