/* store/blob.c -- an image's view of a blob: opened, closed, and what it can tell of itself. */
#include <errno.h>
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

/* Hangs the handle on its blob's core. In one go with the lookup: a core without handles is closed. */
static int core_join(struct vnd_store *s, struct vnd_blob *b)
{
    struct blob_core *c, *fresh = calloc(1, sizeof *fresh);

    if (!fresh)
        return -ENOMEM;
    pthread_mutex_lock(&s->engine->lock);
    pthread_mutex_lock(&s->lock);
    for (c = s->cores; c; c = c->next)
        if (!strcmp(c->info.id, b->info.id) && !atomic_load(&c->closed))
            break;
    if (!c) {
        c = fresh;
        fresh = NULL;
        c->store = s;
        c->engine = s->engine;
        c->info = b->info;
        pthread_mutex_init(&c->load_lock, NULL);
        pthread_mutex_init(&c->lock, NULL);
        stream_init(c);
        c->next = s->cores;
        s->cores = c;
        s->refs++;
    }
    c->refs++;
    b->core = c;
    pthread_mutex_lock(&c->lock);
    b->next = c->blobs;
    c->blobs = b;
    pthread_mutex_unlock(&c->lock);
    pthread_mutex_unlock(&s->lock);
    pthread_mutex_unlock(&s->engine->lock);
    free(fresh);
    return 0;
}

struct vnd_blob *blob_open(vnd_store *s, const vnd_blob_info *info, blob_chunks_fn chunks, void *ctx, int *cause,
                           char *err, size_t err_len)
{
    const char *feature = feature_refused(info->features);
    struct vnd_blob *b;

    *cause = VND_CAUSE_FORMAT;
    if (!blob_id_valid(info->id)) {
        fail_line(0, err, err_len, "blob %u has an id that is no id: the image is damaged", info->index);
        return NULL;
    }
    if (feature) {
        fail_line(0, err, err_len,
                  "blob %s needs the feature %s, which is not supported; convert the image "
                  "without it",
                  info->id, feature);
        return NULL;
    }
    if (!codec_known(info->compressor) || info->digester > CODEC_SHA256) {
        fail_line(0, err, err_len, "blob %s: compressor %u or digester %u is unknown", info->id, info->compressor,
                  info->digester);
        return NULL;
    }
    if (info->uncompressed_size_bytes > 1ull << 44 || info->compressed_size_bytes > 1ull << 40 ||
        info->chunk_count > BLOBTABLE_COUNT_MAX) {
        fail_line(0, err, err_len, "blob %s: sizes beyond all bounds: the image is damaged", info->id);
        return NULL;
    }
    *cause = VND_CAUSE_IO;
    b = calloc(1, sizeof *b);
    if (b) {
        atomic_init(&b->refs, 1);
        b->info = *info;
        atomic_init(&b->amplify_bytes, AMPLIFY_DEFAULT_BYTES);
        b->chunks = chunks;
        b->ctx = ctx;
        b->meta.state = UNIT_OTHER;
        b->meta_claim = -1;
        pthread_cond_init(&b->load_end, NULL);
    }
    if (!b || core_join(s, b)) {
        free(b);
        fail_line(0, err, err_len, "blob %s: no memory", info->id);
        return NULL;
    }
    *cause = VND_CAUSE_NONE;
    return b;
}

void blob_meta_beside(struct vnd_blob *b, const char *dir)
{
    if (!b->beside)
        b->beside = strdup(dir);
}

void blob_close(struct vnd_blob *b, void *ctx)
{
    struct blob_core *c = b->core;
    struct miss_shard *s = miss_shard_of(c->engine->fetcher, b, 0);
    struct store_wait *list;
    bool last;

    pthread_mutex_lock(&s->lock);
    b->detached = true;
    while (b->loading) /* it calls the image's chunks function */
        pthread_cond_wait(&b->load_end, &s->lock);
    list = miss_detach(&b->meta, EIO);
    pthread_mutex_unlock(&s->lock);
    miss_wake(list);
    pthread_mutex_lock(&c->store->lock);
    pthread_mutex_lock(&c->lock);
    for (struct vnd_blob **p = &c->blobs; *p; p = &(*p)->next)
        if (*p == b) {
            *p = b->next;
            break;
        }
    last = !c->blobs;
    if (last) /* an image that names the blob from now on gets a core of its own */
        atomic_store(&c->closed, true);
    pthread_mutex_unlock(&c->lock);
    pthread_mutex_unlock(&c->store->lock);
    if (last) {
        want_purge(c);
        miss_fail_core(c, EIO);
    }
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

void vnd_blob_set_amplify(vnd_blob *b, uint32_t bytes)
{
    atomic_store_explicit(&b->amplify_bytes, bytes, memory_order_relaxed);
}
