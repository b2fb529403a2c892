/* store_fixture.h -- a blob with known chunks, its server in memory, and a fetch thread that serves the engine's
 * jobs from it, for the tests of the blob store. Digests are SHA-256, so that C does all of it.
 */
#ifndef STORE_FIXTURE_H
#define STORE_FIXTURE_H
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <lz4.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include "check.h"

#include "blob/codec.h"
#include "store/fetcher.h"
#include "store/store.h"

struct fix_blob {
    vnd_blob_info info;
    struct blob_chunk *chunk;
    uint8_t *plain, *stored; /* uncompressed space, blob */
    size_t plain_len, stored_len;
    uint32_t hide_from, hide_to; /* chunks that the image does not name */
};

static inline uint32_t fix_random(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

static inline size_t fix_compress(uint32_t codec, const uint8_t *src, size_t n, uint8_t *dst, size_t cap)
{
    if (codec == CODEC_ZSTD)
        return ZSTD_compress(dst, cap, src, n, 3);
    if (codec == CODEC_LZ4_BLOCK)
        return (size_t)LZ4_compress_default((const char *)src, (char *)dst, (int)n, (int)cap);
    if (codec == CODEC_GZIP) {
        z_stream z = { 0 };
        CHECK(deflateInit2(&z, 6, Z_DEFLATED, 31, 8, Z_DEFAULT_STRATEGY) == Z_OK);
        z.next_in = (uint8_t *)(uintptr_t)src;
        z.avail_in = (unsigned)n;
        z.next_out = dst;
        z.avail_out = (unsigned)cap;
        CHECK(deflate(&z, Z_FINISH) == Z_STREAM_END);
        size_t len = z.total_out;
        deflateEnd(&z);
        return len;
    }
    memcpy(dst, src, n);
    return n;
}

/* n chunks of chunk_size bytes (the last one shorter and not aligned), compressible. */
static inline struct fix_blob *fix_blob_new(const char *id, uint32_t codec, uint32_t n, uint32_t chunk_size)
{
    struct fix_blob *b = calloc(1, sizeof *b);
    uint32_t seed = 7;
    size_t cap = (size_t)n * (chunk_size + chunk_size / 255 + 64 + 512);

    b->chunk = calloc(n, sizeof *b->chunk);
    b->plain_len = (size_t)n * chunk_size;
    b->plain = calloc(1, b->plain_len);
    b->stored = calloc(1, cap);
    for (uint32_t i = 0; i < n; i++) {
        struct blob_chunk *c = &b->chunk[i];
        uint8_t *p = b->plain + (size_t)i * chunk_size;
        uint32_t usize = i + 1 == n ? chunk_size - 4096 + 123 : chunk_size;
        for (uint32_t k = 0; k < usize; k++)
            p[k] = (uint8_t)(k % 3 ? 'a' + i % 26 : fix_random(&seed));
        size_t len = fix_compress(codec, p, usize, b->stored + b->stored_len, cap - b->stored_len);
        *c = (struct blob_chunk){ .index = i,
                                  .usize = usize,
                                  .uoff = (uint64_t)i * chunk_size,
                                  .coff = b->stored_len,
                                  .csize = (uint32_t)len,
                                  .flags = codec ? 1 : 0 };
        if (len >= usize) {
            memcpy(b->stored + b->stored_len, p, usize);
            c->csize = usize;
            c->flags = 0;
        }
        b->stored_len += c->csize;
        CHECK(codec_sha256(p, usize, c->digest) == 0);
    }
    b->info = (vnd_blob_info){ .chunk_size_bytes = chunk_size,
                               .chunk_count = n,
                               .compressor = codec,
                               .digester = 1,
                               .features = 1,
                               .compressed_size_bytes = b->stored_len,
                               .uncompressed_size_bytes = b->plain_len };
    snprintf(b->info.id, sizeof b->info.id, "%s", id);
    return b;
}

static inline void fix_blob_free(struct fix_blob *b)
{
    free(b->chunk);
    free(b->plain);
    free(b->stored);
    free(b);
}

static inline int fix_chunks(void *ctx, uint32_t blob_index, int (*put)(void *, const struct blob_chunk *),
                             void *put_ctx)
{
    struct fix_blob *b = ctx;
    int rc = 0;

    for (uint32_t i = 0; i < b->info.chunk_count && !rc; i++)
        if (i < b->hide_from || i >= b->hide_to)
            rc = put(put_ctx, &b->chunk[i]);
    return rc;
}

static inline struct vnd_blob *fix_open(vnd_store *s, struct fix_blob *b)
{
    struct failure f = { 0 };
    struct vnd_blob *h = blob_open(s, &b->info, fix_chunks, b, &f);

    if (!h)
        fprintf(stderr, "blob_open: %s\n", f.line);
    CHECK(h);
    return h;
}

/* ---- a blocking reader */
struct fix_reader {
    struct store_wait w;
    pthread_mutex_t lock;
    pthread_cond_t some;
    int woken;
};

static inline void fix_wake(struct store_wait *w)
{
    struct fix_reader *r = w->owner;
    pthread_mutex_lock(&r->lock);
    r->woken++;
    pthread_cond_broadcast(&r->some);
    pthread_mutex_unlock(&r->lock);
}

static inline void fix_reader_init(struct fix_reader *r)
{
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->some, NULL);
    r->woken = 0;
    store_wait_init(&r->w, fix_wake, r);
}

static inline void fix_reader_wait(struct fix_reader *r)
{
    pthread_mutex_lock(&r->lock);
    while (!r->woken)
        pthread_cond_wait(&r->some, &r->lock);
    r->woken--;
    pthread_mutex_unlock(&r->lock);
}

/* Extents of [off, off+len) of the uncompressed space. */
static inline int fix_extents(struct vnd_blob *h, const struct fix_blob *b, uint64_t off, uint32_t len,
                              struct extent *ext, int max)
{
    int n = 0;

    while (len) {
        uint32_t i = (uint32_t)(off / b->info.chunk_size_bytes);
        const struct blob_chunk *c = &b->chunk[i];
        uint32_t in = (uint32_t)(off - c->uoff), part = c->usize - in < len ? c->usize - in : len;
        CHECK(n < max);
        ext[n++] = (struct extent){ .blob = h, .uoff = off, .chunk = i, .len = part, .chunk_off = in };
        off += part;
        len -= part;
    }
    return n;
}

/* As a file system would read: blocks till done. */
static inline int64_t fix_read(struct vnd_blob *h, const struct fix_blob *b, uint64_t off, uint32_t len, uint8_t *buf)
{
    struct extent ext[STORE_EXTENTS_MAX];
    int n = fix_extents(h, b, off, len, ext, STORE_EXTENTS_MAX);
    struct iovec iov = { buf, len };
    struct fix_reader r;
    int64_t rc;

    fix_reader_init(&r);
    r.w.deadline_us = now_us() + 30000000;
    while ((rc = store_read(&r.w, ext, n, &iov, 1)) == -EINPROGRESS)
        fix_reader_wait(&r);
    store_wait_done(&r.w);
    pthread_mutex_lock(&r.lock); /* the waker may still be on its way out of it */
    pthread_mutex_unlock(&r.lock);
    return rc;
}

static inline void fix_check(struct vnd_blob *h, const struct fix_blob *b, uint64_t off, uint32_t len)
{
    uint8_t *buf = malloc(len);
    CHECK_EQ(fix_read(h, b, off, len, buf), len);
    for (uint32_t i = 0; i < len; i++)
        if (buf[i] != b->plain[off + i]) {
            fprintf(stderr, "byte %llu is %u, not %u\n", (unsigned long long)off + i, buf[i], b->plain[off + i]);
            check_fail();
        }
    free(buf);
}

/* ---- a server */
struct fix_server {
    vnd_engine *e;
    struct fix_blob *blob;
    pthread_t thread[4];
    int threads, take_prefetch;
    uint32_t feed_bytes;
    _Atomic int fail_errno; /* each job ends with it */
    _Atomic uint64_t jobs, verify_jobs, meta_jobs, fed_bytes;
    _Atomic int flip_from, flip_to; /* jobs with these numbers get a flipped byte */
    _Atomic int hold;               /* do not serve while set */
    _Atomic int holding;            /* threads that have seen it */
};

static inline int fix_flush(vnd_engine *e, uint64_t id)
{
    vnd_chunk_view v[64];
    int n;

    while ((n = vnd_job_chunks(e, id, v, 64)) > 0) {
        int rc = vnd_job_commit(e, id, NULL, n);
        if (rc < 0 && rc != -ENOSPC)
            return rc;
    }
    return n;
}

static inline void fix_serve(struct fix_server *s, const vnd_job *job)
{
    uint64_t number = atomic_fetch_add(&s->jobs, 1), off = 0;
    bool flip = (int)number >= atomic_load(&s->flip_from) && (int)number < atomic_load(&s->flip_to);
    int rc = 0, fail = atomic_load(&s->fail_errno);

    if (fail) {
        vnd_job_end(s->e, job->id, fail, VND_CAUSE_NETWORK, "the server is away");
        return;
    }
    if (job->kind == VND_JOB_VERIFY) {
        atomic_fetch_add(&s->verify_jobs, 1);
        rc = fix_flush(s->e, job->id);
        vnd_job_end(s->e, job->id, rc < 0 ? EIO : 0, VND_CAUSE_DIGEST, "verify");
        return;
    }
    if (job->kind == VND_JOB_META)
        atomic_fetch_add(&s->meta_jobs, 1);
    CHECK(job->coff + job->clen <= s->blob->stored_len);
    while (off < job->clen && rc >= 0) {
        size_t n = job->clen - off < s->feed_bytes ? (size_t)(job->clen - off) : s->feed_bytes;
        uint8_t *p = malloc(n); /* exactly as long: a read past it shows under the sanitizer */
        memcpy(p, s->blob->stored + job->coff + off, n);
        if (flip && off == 0)
            p[n > 200 ? 100 : n / 2] ^= 0x40;
        rc = vnd_job_feed(s->e, job->id, p, n);
        free(p);
        off += n;
        atomic_fetch_add(&s->fed_bytes, n);
        if (rc > 0)
            rc = fix_flush(s->e, job->id);
    }
    if (rc == -EBADMSG)
        fix_flush(s->e, job->id);
    if (rc == -ECANCELED)
        rc = 0;
    vnd_job_end(s->e, job->id, rc < 0 ? EIO : 0, rc < 0 ? VND_CAUSE_DIGEST : 0, "wrong bytes");
}

static inline void *fix_server_run(void *arg)
{
    struct fix_server *s = arg;
    bool holds = false;
    vnd_job job;
    int rc;

    for (;;) {
        if (holds != (bool)atomic_load(&s->hold)) {
            holds = !holds;
            atomic_fetch_add(&s->holding, holds ? 1 : -1);
        }
        if (holds) {
            usleep(200);
            if (atomic_load(&s->e->shutdown))
                return NULL;
            continue;
        }
        rc = vnd_job_next(s->e, &job, s->take_prefetch, 50);
        if (rc == -ESHUTDOWN)
            return NULL;
        if (!rc)
            fix_serve(s, &job);
    }
}

/* Until hold is cleared no thread of it serves a job that comes after this. */
static inline void fix_hold(struct fix_server *s)
{
    atomic_store(&s->hold, 1);
    CHECK_SOON(atomic_load(&s->holding) >= s->threads);
}

static inline void fix_server_start(struct fix_server *s, vnd_engine *e, struct fix_blob *b, int threads)
{
    s->e = e;
    s->blob = b;
    s->threads = threads;
    s->take_prefetch = 1;
    if (!s->feed_bytes)
        s->feed_bytes = 1000;
    for (int i = 0; i < threads; i++)
        CHECK(pthread_create(&s->thread[i], NULL, fix_server_run, s) == 0);
}

static inline void fix_server_stop(struct fix_server *s)
{
    for (int i = 0; i < s->threads; i++)
        pthread_join(s->thread[i], NULL);
}

/* ---- a work directory */
static inline void fix_dir_make(char *dir)
{
    sprintf(dir, "%s/vnd-test-XXXXXX", check_tmp());
    CHECK(mkdtemp(dir));
}

/* Mounts the directory over itself, read-only, until umount(dir). False: this process may not. */
static inline bool fix_dir_read_only(const char *dir)
{
    if (geteuid() != 0 || mount(dir, dir, NULL, MS_BIND, NULL) != 0)
        return false;
    CHECK(!mount(NULL, dir, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL));
    return true;
}

static inline void fix_dir_remove(const char *dir)
{
    char cmd[300];
    snprintf(cmd, sizeof cmd, "rm -rf '%s'", dir);
    CHECK(system(cmd) == 0);
}

/* engine + store + server over one blob */
struct fix {
    int compressed; /* the cache is to hold chunks as they are stored */
    vnd_engine *e;
    vnd_store *s;
    struct vnd_blob *h;
    struct fix_server server;
};

static inline void fix_up(struct fix *f, const char *dir, struct fix_blob *b, int threads)
{
    char err[VND_ERR_MAX] = "";
    vnd_engine_cfg cfg = { 0 };

    f->e = vnd_engine_new(&cfg);
    CHECK(f->e);
    f->s = vnd_store_open(f->e, dir, f->compressed, err, sizeof err);
    CHECK(f->s);
    f->h = fix_open(f->s, b);
    fix_server_start(&f->server, f->e, b, threads);
}

static inline void fix_down(struct fix *f)
{
    vnd_engine_shutdown(f->e);
    fix_server_stop(&f->server);
    blob_close(f->h, NULL);
    vnd_store_free(f->s);
    vnd_engine_free(f->e);
}

/* ---- one step at a time, with a fixture of no server threads */
/* Until the blob's chunk table is there, so that a read parks on its chunk at once. */
static inline void fix_load_blob(struct vnd_blob *b)
{
    blob_want_load(b);
    for (int64_t until = now_us() + 30000000; !atomic_load(&b->table) && now_us() < until;)
        usleep(100);
    CHECK(atomic_load(&b->table));
}

static inline void fix_load_table(struct fix *f)
{
    fix_load_blob(f->h);
}

static inline void fix_next_job(struct fix *f, vnd_job *job)
{
    CHECK_EQ(vnd_job_next(f->e, job, 0, 2000), 0);
}

static inline void fix_serve_now(struct fix *f, const vnd_job *job)
{
    f->server.e = f->e;
    f->server.feed_bytes = 100000;
    fix_serve(&f->server, job);
}

/* A reader of a chunk that is not ready. */
static inline void fix_park(struct fix *f, struct fix_blob *b, struct fix_reader *r, uint32_t chunk)
{
    static uint8_t buf[8];
    struct extent x = { .blob = f->h, .uoff = b->chunk[chunk].uoff, .chunk = chunk, .len = 8 };
    struct iovec iov = { buf, 8 };

    fix_reader_init(r);
    CHECK_EQ(store_read(&r->w, &x, 1, &iov, 1), -EINPROGRESS);
}

/* Whether the engine says a line with this in it within a second; takes the lines before it. */
static inline bool fix_said(vnd_engine *e, int cause, const char *part)
{
    int64_t until = now_us() + 1000000;
    vnd_event ev;

    while (now_us() < until) {
        if (vnd_event_next(e, &ev, 20) != 0)
            continue;
        if (getenv("VERBOSE"))
            fprintf(stderr, "  said %d/%d: %s\n", ev.level, ev.cause, ev.text);
        if (ev.cause == cause && strstr(ev.text, part))
            return true;
    }
    return false;
}

#endif
