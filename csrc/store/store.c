/* store/store.c -- stores and the registry of blobs. Their tables are loaded in store/load.c, reading is in read.c. */
#include "store/store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/netfs.h"
#include "store/fetcher.h"

#define SIDE_DIR ".virtiofsd-nydus"

/* ---------------------------------------------------------------- stores */

/* Sets side_dir_fd and writable. If the side directory cannot be made, says so once. */
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

void core_ref(struct blob_core *c)
{
    pthread_mutex_lock(&c->store->lock);
    c->refs++;
    pthread_mutex_unlock(&c->store->lock);
}

void core_unref(struct blob_core *c)
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

void blob_ref(struct vnd_blob *b)
{
    atomic_fetch_add_explicit(&b->refs, 1, memory_order_relaxed);
}

void blob_unref(struct vnd_blob *b)
{
    if (atomic_fetch_sub(&b->refs, 1) != 1)
        return;
    core_unref(b->core);
    blobtable_free(b->own);
    pthread_cond_destroy(&b->load.ended);
    if (b->load.claim_fd >= 0)
        close(b->load.claim_fd);
    free(b->load.raw);
    free(b->load.beside);
    free(b);
}

void core_name(const struct blob_core *c, char out[CORE_NAME_MAX])
{
    bool apart = atomic_load(&c->apart);

    snprintf(out, CORE_NAME_MAX, "%s%s%s", c->info.id, apart ? "." : "", apart ? c->table_name : "");
}

void core_cache_cfg(const struct blob_core *c, char name[CORE_NAME_MAX], struct cachefile_cfg *cfg)
{
    core_name(c, name);
    *cfg = (struct cachefile_cfg){
        .engine = c->engine,
        .dir_fd = c->store->dir_fd,
        .side_dir_fd = c->store->side_dir_fd,
        .writable = c->store->writable,
        .id = name,
        .lower_id = c->below ? c->info.id : NULL,
        .named = atomic_load(&c->apart),
        .info = &c->info,
        .table = atomic_load(&c->table),
        .stored = c->stored,
        .n = c->info.chunk_count,
        .size_bytes = c->stored ? blobtable_stored_bytes(&c->info) : c->info.uncompressed_size_bytes,
    };
}
