/* disk/disk.c -- the flat disk: where its parts lie, and which extents a range of it is. See disk.h. */
#include "disk/disk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/base.h"
#include "blob/table.h"
#include "fs/vfs.h"

/* The kernel counts blocks of a device in 32 bits. */
#define DISK_BYTES_MAX ((uint64_t)RAFS_FLAT_BLOCK << 32)

/* ---- made */

static uint64_t up_to_block(uint64_t bytes)
{
    return (bytes + RAFS_FLAT_BLOCK - 1) / RAFS_FLAT_BLOCK * RAFS_FLAT_BLOCK;
}

/* Fills part 1 + k. end: where the part before it ends. */
static int place_blob(struct vnd_disk *d, vnd_rafs *r, uint32_t k, uint64_t end, struct failure *f)
{
    struct disk_part *p = &d->parts[1 + k];
    int rc = rafs_flat_place(r, k, &p->at, &p->bytes);

    if (rc != 0)
        return failure_set(f, rc, VND_CAUSE_FORMAT, "device slot %u: %s", k, strerror(-rc));
    p->blob = vnd_rafs_blob(r, k);
    if (p->blob == NULL)
        return failure_set(f, -ENODEV, VND_CAUSE_IO, "the image was opened for its metadata alone");
    if (p->at == 0)
        return failure_set(f, -EINVAL, VND_CAUSE_FORMAT,
                           "blob %u has no place on a flat disk: the image was made by an old builder; convert it anew",
                           k);
    if (p->at < end || p->at >= DISK_BYTES_MAX || p->bytes > DISK_BYTES_MAX - p->at ||
        p->bytes < up_to_block(blob_uncompressed_size(p->blob)))
        return failure_set(
            f, -EINVAL, VND_CAUSE_FORMAT,
            "blob %u is at block %llu of a flat disk with %llu blocks, which overlaps another part or is "
            "less than the blob: the image is damaged",
            k, (unsigned long long)(p->at / RAFS_FLAT_BLOCK), (unsigned long long)(p->bytes / RAFS_FLAT_BLOCK));
    return 0;
}

static int place_parts(struct vnd_disk *d, vnd_rafs *r, struct failure *f)
{
    uint64_t end;
    int rc = 0;

    d->parts[0].metadata = rafs_metadata(r, &d->parts[0].bytes);
    end = d->parts[0].bytes = up_to_block(d->parts[0].bytes);
    for (uint32_t k = 0; k + 1 < d->n_parts && rc == 0; k++) {
        rc = place_blob(d, r, k, end, f);
        end = d->parts[1 + k].at + d->parts[1 + k].bytes;
    }
    d->bytes = end;
    return rc;
}

vnd_disk *vnd_disk_new(vnd_rafs *r, char *err, size_t err_len)
{
    vnd_rafs_info info;
    struct failure f = { 0 };
    struct vnd_disk *d;
    int rc = -ENOMEM;

    vnd_rafs_info_get(r, &info);
    if (info.fs_version != 6 || info.block_size_bytes != RAFS_FLAT_BLOCK) {
        fail_line(0, err, err_len,
                  "an image of RAFS v%u with blocks of %u bytes is no disk: v6 with blocks of %u is due; convert it so",
                  info.fs_version, info.block_size_bytes, RAFS_FLAT_BLOCK);
        return NULL;
    }
    failure_set(&f, rc, VND_CAUSE_IO, "disk: out of memory");
    d = calloc(1, sizeof(*d));
    if (d != NULL) {
        pthread_mutex_init(&d->lock, NULL);
        d->fs.ops = &disk_fs_ops;
        d->n_parts = 1 + info.blob_count;
        d->parts = calloc(d->n_parts, sizeof(*d->parts));
        rc = d->parts != NULL ? place_parts(d, r, &f) : -ENOMEM;
    }
    if (rc == 0)
        return d;
    failure_tell(&f, rc, NULL, err, err_len);
    vnd_disk_free(d);
    return NULL;
}

void vnd_disk_free(vnd_disk *d)
{
    if (d == NULL)
        return;
    for (uint32_t k = 0; d->parts != NULL && k < d->n_parts; k++)
        free(atomic_load(&d->parts[k].order));
    free(d->parts);
    pthread_mutex_destroy(&d->lock);
    free(d);
}

uint64_t vnd_disk_bytes(const vnd_disk *d)
{
    return d->bytes;
}

int vnd_vfs_mount_disk(vnd_vfs *v, const char *path, vnd_disk *d)
{
    return vfs_mount(v, path, &d->fs);
}

/* ---- read */

static int compare_places(const void *a, const void *b, void *ctx)
{
    const struct blobtable *t = ctx;
    uint64_t x = t->chunk[*(const uint32_t *)a].uoff, y = t->chunk[*(const uint32_t *)b].uoff;

    return (x > y) - (x < y);
}

/* The order of the part's chunks, made by the first who asks. NULL: no memory. */
static const uint32_t *order_of(struct vnd_disk *d, struct disk_part *p, struct blobtable *t)
{
    uint32_t *order = atomic_load_explicit(&p->order, memory_order_acquire), n = 0;

    if (order != NULL)
        return order;
    pthread_mutex_lock(&d->lock);
    order = atomic_load_explicit(&p->order, memory_order_relaxed);
    if (order == NULL && (order = malloc((t->n + 1) * sizeof(*order))) != NULL) {
        for (uint32_t i = 0; i < t->n; i++)
            if (t->chunk[i].usize != 0)
                order[n++] = i;
        qsort_r(order, n, sizeof(*order), compare_places, t);
        p->n = n;
        atomic_store_explicit(&p->order, order, memory_order_release);
    }
    pthread_mutex_unlock(&d->lock);
    return order;
}

/* The index in order of the first chunk that ends behind at. */
static uint32_t find_chunk(const struct blobtable *t, const uint32_t *order, uint32_t n, uint64_t at)
{
    uint32_t low = 0, high = n;

    while (low < high) {
        uint32_t mid = low + (high - low) / 2;
        const struct blobtable_chunk *c = &t->chunk[order[mid]];

        if (c->uoff + c->usize > at)
            high = mid;
        else
            low = mid + 1;
    }
    return low;
}

/* Adds x, of which no more than len is wanted. */
static void add(struct fs_extents *out, int *count, struct extent x, uint64_t len, uint64_t wanted)
{
    x.len = (uint32_t)(len < wanted ? len : wanted);
    out->at[(*count)++] = x;
    out->bytes += x.len;
}

/* The blob's chunk table; NULL with *rc where it is not loaded. */
static struct blobtable *table_of(struct vnd_blob *b, struct store_wait *w, int *rc)
{
    struct blobtable *t = blob_table(b);

    if (t != NULL)
        return t;
    if (w == NULL) {
        *rc = -EAGAIN;
        return NULL;
    }
    *rc = -w->err;
    w->err = 0;
    if (*rc == 0)
        *rc = blob_park(b, w);
    if (*rc != 1) {
        *rc = *rc == 0 ? -EINPROGRESS : *rc;
        return NULL;
    }
    t = blob_table(b);
    *rc = t != NULL ? 0 : -EIO;
    return t;
}

/* Adds bytes [off, end) of the blob, as far as there is room. */
static int add_blob(struct vnd_disk *d, struct disk_part *p, uint64_t off, uint64_t end, struct fs_extents *out,
                    int *count)
{
    const uint32_t *order;
    uint32_t i, n;
    int rc = 0;
    struct blobtable *t = table_of(p->blob, out->wait, &rc);

    if (t == NULL)
        return rc;
    order = order_of(d, p, t);
    if (order == NULL)
        return -ENOMEM;
    n = p->n < t->n ? p->n : t->n; /* the same, but a reader of this code need not know */
    for (i = find_chunk(t, order, n, off); off < end && *count < out->max;) {
        const struct blobtable_chunk *c = i < n ? &t->chunk[order[i]] : NULL;
        uint32_t before = out->bytes;

        if (c == NULL || c->uoff > off) {
            add(out, count, (struct extent){ 0 }, c != NULL ? c->uoff - off : end - off, end - off);
        } else {
            struct extent x = {
                .blob = p->blob, .uoff = off, .chunk = order[i], .chunk_off = (uint32_t)(off - c->uoff)
            };

            add(out, count, x, c->uoff + c->usize - off, end - off);
            i++;
        }
        off += out->bytes - before;
    }
    return 0;
}

static int add_part(struct vnd_disk *d, struct disk_part *p, uint64_t off, uint64_t end, struct fs_extents *out,
                    int *count)
{
    if (p->blob != NULL)
        return add_blob(d, p, off, end, out, count);
    if (*count < out->max)
        add(out, count, (struct extent){ .bytes = p->metadata + off }, end - off, end - off);
    return 0;
}

int disk_part_extents(struct vnd_disk *d, struct disk_part *p, uint64_t off, uint32_t len, struct fs_extents *out)
{
    uint64_t end = off + len;
    int count = 0, rc;

    out->bytes = 0;
    if (off >= p->bytes)
        return 0;
    rc = add_part(d, p, off, end < p->bytes ? end : p->bytes, out, &count);
    return rc != 0 ? rc : count;
}

int disk_extents(struct vnd_disk *d, uint64_t off, uint32_t len, struct fs_extents *out)
{
    uint64_t at, end;
    int count = 0, rc = 0;

    out->bytes = 0;
    if (off >= d->bytes)
        return 0;
    end = len < d->bytes - off ? off + len : d->bytes;
    for (uint32_t k = 0; k < d->n_parts && rc == 0; k++) {
        struct disk_part *p = &d->parts[k];
        uint64_t part_end = p->at + p->bytes;

        at = off + out->bytes;
        if (at >= end || count >= out->max || part_end <= at)
            continue;
        if (p->at > at) { /* the bytes between two parts */
            add(out, &count, (struct extent){ 0 }, p->at - at, end - at);
            at = off + out->bytes;
        }
        if (at < end && at >= p->at)
            rc = add_part(d, p, at - p->at, (part_end < end ? part_end : end) - p->at, out, &count);
    }
    return rc != 0 ? rc : count;
}
