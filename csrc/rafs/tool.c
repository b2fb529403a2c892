/* rafs/tool.c -- the reader as a tool: what check, inspect, convert and the tests ask of an opened bootstrap. */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "blob/codec.h"
#include "rafs/v5.h"

#define NO_RECORD UINT32_MAX
#define READ_PIECE (1u << 20)

int vnd_rafs_bootstrap_digest(vnd_rafs *r, uint8_t *out)
{
    return codec_sha256(r->base, r->size, out) ? -EIO : 0;
}

int vnd_rafs_getattr(vnd_rafs *r, uint64_t ino, vnd_attr *out)
{
    return r->fs.ops->getattr(&r->fs, ino, out);
}

static bool name_valid(const char *name)
{
    size_t len = strlen(name);

    return len >= 1 && len <= RAFS_NAME_MAX && !strchr(name, '/');
}

int vnd_rafs_lookup(vnd_rafs *r, uint64_t dir_ino, const char *name, uint64_t *ino)
{
    vnd_attr attr;
    int rc = name_valid(name) ? r->fs.ops->lookup(&r->fs, dir_ino, name, strlen(name), &attr) : -EINVAL;

    if (!rc)
        *ino = attr.ino;
    return rc;
}

struct dirents {
    vnd_dirent *out;
    int used, max;
};

static int put_dirent(void *ctx, const struct fs_entry *from)
{
    struct dirents *d = ctx;
    vnd_dirent *e;

    if (d->used >= d->max)
        return 1;
    e = &d->out[d->used++];
    e->ino = from->ino;
    e->next_off = from->next_off;
    e->type = from->type;
    memcpy(e->name, from->name, from->len);
    e->name[from->len] = 0;
    return 0;
}

int vnd_rafs_readdir(vnd_rafs *r, uint64_t dir_ino, uint64_t off, vnd_dirent *out, int max)
{
    struct dirents d = { out, 0, max };
    int rc = r->fs.ops->readdir(&r->fs, &(struct fs_listing){ dir_ino, 0, off, false, put_dirent, &d });

    return rc && !d.used ? rc : d.used;
}

int64_t vnd_rafs_readlink(vnd_rafs *r, uint64_t ino, char *buf, size_t buf_len)
{
    char target[RAFS_SYMLINK_MAX];

    return buf_len ? r->fs.ops->readlink(&r->fs, ino, buf, buf_len)
                   : r->fs.ops->readlink(&r->fs, ino, target, sizeof(target));
}

int64_t vnd_rafs_listxattr(vnd_rafs *r, uint64_t ino, char *buf, size_t buf_len)
{
    struct fs_buf names = { buf, buf_len, 0 };
    int rc = r->fs.ops->listxattr(&r->fs, ino, &names);

    return rc ? rc : (int64_t)names.need;
}

int64_t vnd_rafs_getxattr(vnd_rafs *r, uint64_t ino, const char *name, char *buf, size_t buf_len)
{
    struct fs_buf value = { buf, buf_len, 0 };
    int rc = r->fs.ops->getxattr(&r->fs, ino, name, strlen(name), &value);

    return rc ? rc : (int64_t)value.need;
}

int vnd_rafs_digest(vnd_rafs *r, uint64_t ino, uint8_t *out)
{
    struct v5_inode n;
    int rc = r->version == &rafs_v5 ? v5_inode(r, ino, &n) : -ENODATA;

    if (!rc)
        memcpy(out, n.digest, 32);
    return rc;
}

int vnd_rafs_prefetch(vnd_rafs *r, uint64_t *inos, int max)
{
    return r->version->prefetch(r, inos, max);
}

/* ---- chunks: joined with their records by (blob, index) */

static int record_key(struct vnd_rafs *r, uint32_t i, uint64_t *key, struct blob_chunk *c)
{
    uint32_t blob;
    int rc = r->version->record(r, i, &blob, c);

    *key = rc ? 0 : (uint64_t)blob << 32 | c->index;
    return rc;
}

static int compare_records(const void *a, const void *b, void *ctx)
{
    struct blob_chunk c;
    uint64_t ka, kb;
    uint32_t ia, ib;

    memcpy(&ia, a, sizeof(ia));
    memcpy(&ib, b, sizeof(ib));
    record_key(ctx, ia, &ka, &c);
    record_key(ctx, ib, &kb, &c);
    return ka != kb ? (ka > kb) - (ka < kb) : (ia > ib) - (ia < ib);
}

/* Sorts the record numbers once. 0 or -ENOMEM (also: more records than a u32 counts). */
static int make_index(struct vnd_rafs *r)
{
    uint64_t n = r->info.chunk_table_size_bytes / RAFS_CHUNK_RECORD;
    int rc = 0;

    pthread_mutex_lock(&r->index_lock);
    if (!r->index && n) {
        r->index = n < NO_RECORD ? malloc(n * sizeof(*r->index)) : NULL;
        rc = r->index ? 0 : -ENOMEM;
        if (!rc) {
            for (uint64_t i = 0; i < n; i++)
                r->index[i] = (uint32_t)i;
            qsort_r(r->index, n, sizeof(*r->index), compare_records, r);
            r->index_count = n;
        }
    }
    pthread_mutex_unlock(&r->index_lock);
    return rc;
}

static bool find_record(struct vnd_rafs *r, const struct rafs_chunk *c, struct blob_chunk *out)
{
    uint64_t lo = 0, hi = r->index_count, key, want = (uint64_t)c->blob << 32 | c->index;

    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;

        record_key(r, r->index[mid], &key, out);
        if (key < want)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < r->index_count && record_key(r, r->index[lo], &key, out) == 0 && key == want;
}

/* Fills in what the chunk's record says. */
static void add_record(vnd_chunk_info *out, const struct blob_chunk *record)
{
    out->coff = record->coff;
    out->csize_bytes = record->csize;
    out->usize_bytes = record->usize;
    out->flags = record->flags;
    out->digest_known = 1;
    memcpy(out->digest, record->digest, sizeof(record->digest));
}

int vnd_rafs_chunks(vnd_rafs *r, uint64_t ino, uint64_t first, vnd_chunk_info *out, int max)
{
    int n = 0, rc = make_index(r);

    while (!rc && n < max) {
        struct blob_chunk record;
        struct rafs_chunk c;
        uint32_t blob;

        rc = r->version->chunk(r, ino, first + (uint64_t)n, &c);
        if (rc <= 0)
            break;
        rc = 0;
        out[n] = (vnd_chunk_info){
            .file_off = c.file_off, .uoff = c.uoff, .blob_index = c.blob, .chunk_index = c.index, .usize_bytes = c.size
        };
        if (c.record) {
            v5_decode_chunk(r, c.record, &blob, &record);
            add_record(&out[n], &record);
        } else if (find_record(r, &c, &record) && record.uoff == c.uoff) {
            add_record(&out[n], &record);
        }
        n++;
    }
    return rc < 0 && !n ? rc : n;
}

/* ---- reading: the caller's thread waits where a guest's request would be parked */

struct tool_wait {
    struct store_wait wait;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool woken;
};

static void tool_wake(struct store_wait *w)
{
    struct tool_wait *t = w->owner;

    pthread_mutex_lock(&t->lock);
    t->woken = true;
    pthread_cond_signal(&t->cond);
    pthread_mutex_unlock(&t->lock);
}

static void tool_wait_init(struct tool_wait *t, uint32_t deadline_ms)
{
    pthread_condattr_t attr;

    memset(t, 0, sizeof(*t));
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&t->cond, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&t->lock, NULL);
    store_wait_init(&t->wait, tool_wake, t);
    t->wait.deadline_us = now_us() + (int64_t)deadline_ms * 1000;
}

static void tool_wait_destroy(struct tool_wait *t)
{
    pthread_cond_destroy(&t->cond);
    pthread_mutex_destroy(&t->lock);
}

/* Returns once woken, or (false) when the deadline passed and the waiter is unlinked. */
static bool tool_wait_woken(struct tool_wait *t, struct vnd_engine *e)
{
    struct timespec until = { t->wait.deadline_us / 1000000, t->wait.deadline_us % 1000000 * 1000 };
    bool late = false, woken;

    pthread_mutex_lock(&t->lock);
    while (!t->woken) {
        if (late) {
            pthread_cond_wait(&t->cond, &t->lock);
        } else if (pthread_cond_timedwait(&t->cond, &t->lock, &until) == ETIMEDOUT && !t->woken) {
            pthread_mutex_unlock(&t->lock); /* cancel takes the store's lock: never inside ours */
            late = true;
            if (store_wait_expire(&t->wait, e, "a tool's read", e->cfg.read_deadline_ms))
                return false;
            pthread_mutex_lock(&t->lock); /* its wake has been or is being called */
        }
    }
    woken = !late;
    t->woken = false;
    pthread_mutex_unlock(&t->lock);
    return woken;
}

static int64_t read_piece(struct vnd_rafs *r, struct extent *ext, uint64_t ino, uint64_t off, uint8_t *buf,
                          uint32_t len)
{
    struct tool_wait t;
    struct fs_extents x = { ext, STORE_EXTENTS_MAX, 0 };
    int n = r->fs.ops->extents(&r->fs, ino, off, len, &x);
    int64_t done;

    if (n <= 0)
        return n;
    struct iovec iov = { buf, x.bytes };

    tool_wait_init(&t, r->engine->cfg.read_deadline_ms);
    do {
        done = store_read(&t.wait, ext, n, &iov, 1);
    } while (done == -EINPROGRESS && tool_wait_woken(&t, r->engine));
    store_wait_done(&t.wait);
    tool_wait_destroy(&t);
    return done == -EINPROGRESS ? -ETIMEDOUT : done;
}

int64_t vnd_rafs_read(vnd_rafs *r, uint64_t ino, uint64_t off, uint8_t *buf, size_t len)
{
    struct extent *ext = malloc(STORE_EXTENTS_MAX * sizeof(*ext));
    size_t done = 0;
    int64_t n = ext ? 1 : -ENOMEM;

    while (n > 0 && done < len) {
        n = read_piece(r, ext, ino, off + done, buf + done,
                       len - done > READ_PIECE ? READ_PIECE : (uint32_t)(len - done));
        if (n > 0)
            done += (size_t)n;
    }
    free(ext);
    return n < 0 ? n : (int64_t)done;
}
