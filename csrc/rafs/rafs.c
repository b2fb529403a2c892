/* rafs/rafs.c -- opens a bootstrap of any version and ties it to the store. */
#include "rafs/rafs.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/base.h"
#include "fs/metrics.h"
#include "fs/vfs.h"
#include "rafs/internal.h"
#include "rafs/v6.h"

/* In the order in which they are asked. v5 comes first: its first bytes decide, whatever stands at byte 1024
 * (docs/rafs-format.md 1.1). */
static const struct rafs_version *const versions[] = { &rafs_v5, &rafs_v6 };

/* An inlined bootstrap cannot name the blob that holds it, so it has 64 'x' for an id (docs/rafs-format.md 1.4). */
static bool id_placeholder(const char *id)
{
    return strspn(id, "x") == VND_ID_MAX;
}

/* The file's name without directory and extension, if it could be a blob id. */
static bool path_stem(const char *path, char out[VND_ID_MAX + 1])
{
    const char *slash = strrchr(path, '/'), *start = slash ? slash + 1 : path;
    size_t len = strcspn(start, ".");

    if (len > VND_ID_MAX)
        return false;
    memcpy(out, start, len);
    out[len] = 0;
    return blob_id_valid(out);
}

/* Puts the real id in the place of an inlined blob's placeholder: blob_id, or else the name of the data blob that the
 * bootstrap was read from. */
static int resolve_ids(struct vnd_rafs *r, const char *blob_id, const struct rafs_error *e)
{
    char stem[VND_ID_MAX + 1];
    bool done = false;

    if (blob_id && !blob_id_valid(blob_id))
        return rafs_fail(e, VND_CAUSE_FORMAT, "blob id '%.80s' is not 1 to 64 of [0-9a-zA-Z_-]", blob_id);
    if (!blob_id && r->from_blob && path_stem(r->path, stem))
        blob_id = stem;
    for (uint32_t k = 0; k < r->info.blob_count; k++) {
        vnd_blob_info *i = &r->blobs[k].info;
        bool inlined =
            (i->features & RAFS_BLOB_INLINED_FS_META) && !(i->features & (RAFS_BLOB_SEPARATE | RAFS_BLOB_EXTERNAL));

        /* The chunk table of a layer that is used as it is lies in the blob that this bootstrap was read from. */
        if (i->features & RAFS_BLOB_SEPARATE && i->features & RAFS_BLOB_INLINED_FS_META && !i->cipher && blob_id &&
            !i->meta_id[0]) {
            snprintf(i->meta_id, sizeof(i->meta_id), "%s", blob_id);
        }
        if (!id_placeholder(i->id) && !(inlined && blob_id && r->info.blob_count == 1))
            continue;
        if (!blob_id && r->store)
            return rafs_fail(e, VND_CAUSE_FORMAT, "blob %u has no id of its own: its name must be given", k);
        if (!blob_id)
            continue;
        if (done)
            return rafs_fail(e, VND_CAUSE_FORMAT, "more than one blob has no id of its own");
        snprintf(i->id, sizeof(i->id), "%s", blob_id);
        done = true;
    }
    return 0;
}

/* Law 2: what cannot be verified is not served unless the operator says so. */
static int check_digests(const struct vnd_rafs *r, const struct rafs_error *e)
{
    for (uint32_t k = 0; k < r->info.blob_count; k++) {
        const vnd_blob_info *b = &r->blobs[k].info;

        /* In v5 each chunk record follows its inode and has a digest. */
        if (r->info.fs_version == 6 && b->chunk_count &&
            (r->info.flags & RAFS_FLAG_TARFS ||
             (!r->info.chunk_table_size_bytes && !(b->features & RAFS_BLOB_INLINED_DIGEST)))) {
            return rafs_fail(e, VND_CAUSE_DIGEST,
                             "blob %u has no chunk digests, so nothing of it can be verified: "
                             "rebuild the image or give --allow-unverified",
                             k);
        }
    }
    return 0;
}

static int open_blobs(struct vnd_rafs *r, const struct rafs_error *e)
{
    const char *slash = strrchr(r->path, '/');
    char dir[PATH_MAX];
    int rc;

    if (!r->store)
        return 0;
    snprintf(dir, sizeof(dir), "%.*s", slash ? (int)(slash - r->path) + 1 : 2, slash ? r->path : "./");
    if (!r->engine->cfg.allow_unverified && (rc = check_digests(r, e)))
        return rc;
    for (uint32_t k = 0; k < r->info.blob_count; k++) {
        r->blobs[k].blob = blob_open(r->store, &r->blobs[k].info, rafs_blob_chunks, r, e->failure);
        if (!r->blobs[k].blob)
            return -EIO;
        blob_meta_beside(r->blobs[k].blob, dir);
    }
    return 0;
}

static int open_version(struct vnd_rafs *r, const struct rafs_error *e)
{
    for (size_t i = 0; i < sizeof(versions) / sizeof(versions[0]); i++) {
        if (versions[i]->detect(r->base, r->size)) {
            r->version = versions[i];
            r->fs.ops = r->version->fs_ops;
            return r->version->open(r, e);
        }
    }
    return rafs_fail(e, VND_CAUSE_FORMAT, "not a RAFS bootstrap");
}

vnd_rafs *vnd_rafs_open(vnd_engine *engine, const char *bootstrap, const char *blob_id, vnd_store *store, int *cause,
                        char *err, size_t err_len)
{
    struct failure failure = { 0 };
    struct rafs_error e = { bootstrap, &failure };
    struct vnd_rafs *r = calloc(1, sizeof(*r));

    if (!r) {
        failure_tell(&failure, rafs_no_memory(&e), cause, err, err_len);
        return NULL;
    }
    pthread_mutex_init(&r->index_lock, NULL);
    r->map_fd = -1;
    r->engine = engine;
    r->store = store;
    r->own_uid = geteuid();
    r->own_gid = getegid();
    r->path = strdup(bootstrap);
    r->fs.label = r->path;
    if (!r->path) {
        rafs_no_memory(&e);
    } else if (rafs_image_map(r, &e) == 0 && open_version(r, &e) == 0 && resolve_ids(r, blob_id, &e) == 0 &&
               open_blobs(r, &e) == 0) {
        r->fs.metrics = metrics_new(r->info.inode_count);
        if (r->fs.metrics && rafs_backing_new(r) == 0)
            return r;
        rafs_no_memory(&e);
    }
    failure_tell(&failure, 0, cause, err, err_len);
    vnd_rafs_free(r);
    return NULL;
}

void vnd_rafs_free(vnd_rafs *r)
{
    if (!r)
        return;
    for (uint32_t k = 0; r->blobs && k < r->info.blob_count; k++)
        if (r->blobs[k].blob)
            blob_close(r->blobs[k].blob, r);
    if (r->version && r->version->close)
        r->version->close(r);
    rafs_backing_free(r);
    rafs_image_unmap(r);
    metrics_free(r->fs.metrics);
    pthread_mutex_destroy(&r->index_lock);
    free(r->index);
    free(r->zeroes);
    free(r->blobs);
    free(r->path);
    free(r);
}

void vnd_rafs_info_get(vnd_rafs *r, vnd_rafs_info *out)
{
    *out = r->info;
}

int vnd_rafs_blob_info(vnd_rafs *r, uint32_t index, vnd_blob_info *out)
{
    if (index >= r->info.blob_count)
        return -EINVAL;
    *out = r->blobs[index].info;
    return 0;
}

vnd_blob *vnd_rafs_blob(vnd_rafs *r, uint32_t index)
{
    return index < r->info.blob_count ? r->blobs[index].blob : NULL;
}

void vnd_rafs_stats(vnd_rafs *r, vnd_mount_stats *out)
{
    metrics_sum(r->fs.metrics, out);
}

void vnd_rafs_count_files(vnd_rafs *r, int on)
{
    metrics_keep(r->fs.metrics, on);
}

uint64_t vnd_rafs_file_stats(vnd_rafs *r, vnd_file_stats *out, uint64_t max)
{
    return metrics_files(r->fs.metrics, out, max);
}

uint64_t vnd_rafs_latest_read(vnd_rafs *r, uint64_t *inos, uint64_t max)
{
    return metrics_latest(r->fs.metrics, inos, max);
}

const uint8_t *rafs_metadata(const vnd_rafs *r, uint64_t *bytes)
{
    *bytes = r->size;
    return r->base;
}

int rafs_flat_place(const vnd_rafs *r, uint32_t k, uint64_t *at, uint64_t *bytes)
{
    if (r->version != &rafs_v6 || r->info.block_size_bytes != RAFS_FLAT_BLOCK)
        return -EINVAL;
    if (k >= r->info.blob_count)
        return -ENOENT;
    return v6_flat_place(r, k, at, bytes);
}

struct fs *rafs_fs(vnd_rafs *r)
{
    return &r->fs;
}

int vnd_vfs_mount_rafs(vnd_vfs *v, const char *path, vnd_rafs *r)
{
    return vfs_mount(v, path, &r->fs);
}
