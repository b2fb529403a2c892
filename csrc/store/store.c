/* store/store.c -- stores and the registry of blobs. Their tables are loaded in store/load.c, reading is in read.c. */
#include "store/store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/netfs.h"
#include "store/fetcher.h"

#define SIDE_DIR ".virtiofsd-nydus"

/* Blob features, rafs-format 4.1 */
#define FEATURE_EXTERNAL 0x800u

/* ---------------------------------------------------------------- stores */

/* Sets side_dir_fd and writable; says once what is in the way. */
static void side_dir_open(struct vnd_store *s)
{
    int fd;

    if (s->network)
        return;
    if (mkdirat(s->dir_fd, SIDE_DIR, 0700) && errno != EEXIST) {
        if (!s->side_said)
            engine_say(s->engine, VND_LEVEL_WARNING, VND_CAUSE_SPACE,
                       "cache directory %s cannot be written (%s): what is not in it "
                       "is served from memory only and fetched again; %s",
                       s->path, strerror(errno), cachefile_cure(errno));
        s->side_said = true;
        s->writable = !(errno == EROFS || errno == EACCES || errno == EPERM);
        return;
    }
    fd = openat(s->dir_fd, SIDE_DIR, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return;
    s->writable = true;
    s->side_said = false;
    if (s->side_dir_fd < 0) {
        s->side_dir_fd = fd;
        return;
    }
    while (dup3(fd, s->side_dir_fd, O_CLOEXEC) < 0 && (errno == EINTR || errno == EBUSY))
        ;
    close(fd);
}

static bool leads_to(int dir_fd, const char *name, int fd)
{
    struct stat a, b;

    return !fstat(fd, &a) && !fstatat(dir_fd, name, &b, 0) && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

bool store_follow(struct vnd_store *s, bool retry)
{
    struct stat st;
    int fd;

    if (!leads_to(AT_FDCWD, s->path, s->dir_fd)) {
        fd = open(s->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (fd < 0 || fstat(fd, &st)) {
            if (!s->gone_said)
                engine_say(s->engine, VND_LEVEL_ERROR, VND_CAUSE_IO,
                           "cache directory %s is gone (%s): this daemon alone goes on "
                           "with the removed files; make it anew",
                           s->path, strerror(errno));
            s->gone_said = true;
            if (fd >= 0)
                close(fd);
            return false;
        }
        while (dup3(fd, s->dir_fd, O_CLOEXEC) < 0 && (errno == EINTR || errno == EBUSY))
            ;
        close(fd);
        pthread_mutex_lock(&s->engine->lock);
        s->dev = st.st_dev;
        s->ino = st.st_ino;
        pthread_mutex_unlock(&s->engine->lock);
        s->network = netfs_holds(s->dir_fd);
        s->gone_said = false;
        retry = true;
    }
    if (s->side_dir_fd < 0 ? retry : !leads_to(s->dir_fd, SIDE_DIR, s->side_dir_fd))
        side_dir_open(s);
    claim_wake_follow(&s->wake, s->side_dir_fd);
    return true;
}

static struct vnd_store *store_find(vnd_engine *e, const struct stat *st, bool compressed)
{
    struct vnd_store *s = e->stores;

    while (s && (s->dev != st->st_dev || s->ino != st->st_ino || s->compressed != compressed))
        s = s->next;
    if (s)
        s->refs++;
    return s;
}

vnd_store *vnd_store_open(vnd_engine *e, const char *work_dir, int compressed, char *err, size_t err_len)
{
    int fd = open(work_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct vnd_store *s, *old;
    struct stat st;

    if (fd < 0 || fstat(fd, &st)) {
        fail_line(0, err, err_len, "cannot open cache directory %s: %s", work_dir, strerror(errno));
        if (fd >= 0)
            close(fd);
        return NULL;
    }
    pthread_mutex_lock(&e->lock);
    s = store_find(e, &st, compressed);
    pthread_mutex_unlock(&e->lock);
    if (s) {
        close(fd);
        return s;
    }
    s = calloc(1, sizeof *s);
    if (!s) {
        close(fd);
        fail_line(0, err, err_len, "cache directory %s: no memory", work_dir);
        return NULL;
    }
    s->engine = e;
    s->refs = 1;
    s->dir_fd = fd;
    s->side_dir_fd = -1;
    s->writable = true;
    s->compressed = compressed;
    s->dev = st.st_dev;
    s->ino = st.st_ino;
    pthread_mutex_init(&s->lock, NULL);
    s->path = strdup(work_dir);
    s->network = netfs_holds(fd);
    if (s->network)
        engine_say(e, VND_LEVEL_WARNING, VND_CAUSE_NONE,
                   "cache directory %s is on a network file system: fetches are not shared "
                   "between daemons and everything is verified once per start",
                   work_dir);
    side_dir_open(s);
    if (!s->path || claim_wake_open(&s->wake, s->side_dir_fd)) {
        fail_line(0, err, err_len, "cache directory %s: no memory", work_dir);
        vnd_store_free(s);
        return NULL;
    }
    pthread_mutex_lock(&e->lock);
    old = store_find(e, &st, compressed); /* another thread may have been faster */
    if (!old) {
        s->next = e->stores;
        e->stores = s;
    }
    pthread_mutex_unlock(&e->lock);
    if (old) {
        vnd_store_free(s);
        return old;
    }
    return s;
}

void vnd_store_free(vnd_store *s)
{
    struct vnd_engine *e;
    bool last;

    if (!s)
        return;
    e = s->engine;
    pthread_mutex_lock(&e->lock);
    last = --s->refs == 0;
    for (struct vnd_store **p = &e->stores; last && *p; p = &(*p)->next)
        if (*p == s) {
            *p = s->next;
            break;
        }
    pthread_mutex_unlock(&e->lock);
    if (!last)
        return;
    claim_wake_close(&s->wake);
    if (s->side_dir_fd >= 0)
        close(s->side_dir_fd);
    close(s->dir_fd);
    pthread_mutex_destroy(&s->lock);
    free(s->path);
    free(s);
}

/* ---------------------------------------------------------------- cores and handles */

void core_get(struct blob_core *c)
{
    pthread_mutex_lock(&c->store->lock);
    c->refs++;
    pthread_mutex_unlock(&c->store->lock);
}

void core_put(struct blob_core *c)
{
    struct vnd_store *s = c->store;
    bool last;

    pthread_mutex_lock(&s->lock);
    last = --c->refs == 0;
    for (struct blob_core **p = &s->cores; last && *p; p = &(*p)->next)
        if (*p == c) {
            *p = c->next;
            break;
        }
    pthread_mutex_unlock(&s->lock);
    if (!last)
        return;
    uncached_drop(c);
    cachefile_close(c->cache);
    while (c->tables) {
        struct blobtable *t = c->tables;
        c->tables = t->next;
        blobtable_free(t);
    }
    pthread_mutex_destroy(&c->load_lock);
    pthread_mutex_destroy(&c->lock);
    free(c);
    vnd_store_free(s);
}

void handle_get(struct vnd_blob *b)
{
    atomic_fetch_add_explicit(&b->refs, 1, memory_order_relaxed);
}

void handle_put(struct vnd_blob *b)
{
    if (atomic_fetch_sub(&b->refs, 1) != 1)
        return;
    core_put(b->core);
    pthread_cond_destroy(&b->load_end);
    if (b->meta_claim >= 0)
        close(b->meta_claim);
    free(b->raw);
    free(b->beside);
    free(b);
}

/* The id becomes part of file names: rafs-format 8 #22. */
static bool id_valid(const char *id)
{
    size_t n = strspn(id, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-");
    return n > 0 && n <= VND_ID_MAX && !id[n];
}

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
    b->next = c->handles;
    c->handles = b;
    pthread_mutex_unlock(&c->lock);
    pthread_mutex_unlock(&s->lock);
    pthread_mutex_unlock(&s->engine->lock);
    free(fresh);
    return 0;
}

struct vnd_blob *blob_get(vnd_store *s, const vnd_blob_info *info, blob_chunks_fn chunks, void *ctx, int *cause,
                          char *err, size_t err_len)
{
    const char *feature = feature_refused(info->features);
    struct vnd_blob *b;

    *cause = VND_CAUSE_FORMAT;
    if (!id_valid(info->id)) {
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

void blob_put(struct vnd_blob *b, void *ctx)
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
    for (struct vnd_blob **p = &c->handles; *p; p = &(*p)->next)
        if (*p == b) {
            *p = b->next;
            break;
        }
    last = !c->handles;
    if (last) /* an image that names the blob from now on gets a core of its own */
        atomic_store(&c->closed, true);
    pthread_mutex_unlock(&c->lock);
    pthread_mutex_unlock(&c->store->lock);
    if (last) {
        fetch_purge(c);
        miss_fail_core(c, EIO);
    }
    handle_put(b);
}

uint64_t blob_uncompressed_size(const struct vnd_blob *b)
{
    return b->info.uncompressed_size_bytes;
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
