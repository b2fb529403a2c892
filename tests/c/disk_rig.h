/* disk_rig.h -- a disk of a small image: 15 blocks of bootstrap, 5 of nothing, 64 of one blob, which has chunks in its
 * blocks 3 to 13 (the last one is no whole block) and nothing in the others. A server in memory has the chunks.
 */
#ifndef DISK_RIG_H
#define DISK_RIG_H
#include "image_of_blob.h"

#include "disk/disk.h"

#define BLOCK RAFS_FLAT_BLOCK
#define BLOB_AT 20u /* blocks */
#define BLOB_END (BLOB_AT + IMG_BLOB_CHUNKS)
#define DISK_BYTES (BLOB_END * BLOCK)
#define FIRST_CHUNK 3u
#define LAST_CHUNK 13u
#define SLOT_BLOCKS \
    (1408 + 64) /* where the image's device slot says how many blocks the blob has, and where it begins */
#define SLOT_MAPPED (1408 + 68)

struct disk_rig {
    char dir[64];
    vnd_engine *engine;
    vnd_store *store;
    vnd_rafs *image;
    vnd_disk *disk;
    struct vnd_blob *blob;
    struct fix_blob *source;
    struct fix_server server;
    struct img img;
    struct img_nids n;
    uint8_t want[DISK_BYTES]; /* what the disk is to hold */
    char err[VND_ERR_MAX];    /* of the disk that was refused */
};

static inline vnd_rafs *disk_rig_open(struct disk_rig *g, const void *bytes, size_t len, vnd_store *store)
{
    char path[32], err[VND_ERR_MAX] = "";
    int cause, fd = img_fd(bytes, len, path);
    vnd_rafs *image = vnd_rafs_open(g->engine, path, NULL, store, &cause, err, sizeof(err));

    close(fd);
    if (!image)
        fprintf(stderr, "%s\n", err);
    CHECK(image);
    return image;
}

/* An image that may be changed before disk_rig_up. deadline_ms: of a guest's read, 0: the engine's own. */
static inline void disk_rig_make(struct disk_rig *g, uint32_t deadline_ms)
{
    char id[65], err[VND_ERR_MAX] = "";

    memset(g, 0, sizeof(*g));
    memset(id, 'a', 64);
    id[64] = 0;
    fix_dir_make(g->dir);
    g->source = fix_blob_new(id, 0, LAST_CHUNK + 1, IMG_CHUNK);
    make_image(&g->img, &g->n, g->source);
    img_32(&g->img, SLOT_MAPPED, BLOB_AT);
    g->engine = vnd_engine_new(&(vnd_engine_cfg){ .read_deadline_ms = deadline_ms });
    CHECK(g->engine);
    g->store = vnd_store_open(g->engine, g->dir, 0, err, sizeof(err));
    CHECK(g->store);
    g->server.flip_from = g->server.flip_to = -1;
    g->server.feed_bytes = 1 << 20;
    fix_server_start(&g->server, g->engine, g->source, 1);
}

/* Opens the image and makes its disk; without one g->err says why. */
static inline void disk_rig_up(struct disk_rig *g)
{
    g->image = disk_rig_open(g, g->img.b, sizeof(g->img.b), g->store);
    g->blob = vnd_rafs_blob(g->image, 0);
    g->disk = vnd_disk_new(g->image, g->err, sizeof(g->err));
    memcpy(g->want, g->img.b, sizeof(g->img.b));
    for (uint32_t i = FIRST_CHUNK; i <= LAST_CHUNK; i++)
        memcpy(g->want + (BLOB_AT + i) * BLOCK, g->source->plain + i * IMG_CHUNK, g->source->chunk[i].usize);
}

static inline void disk_rig_new(struct disk_rig *g)
{
    disk_rig_make(g, 0);
    disk_rig_up(g);
    if (!g->disk)
        fprintf(stderr, "%s\n", g->err);
    CHECK(g->disk);
}

static inline void disk_rig_free(struct disk_rig *g)
{
    vnd_disk_free(g->disk);
    vnd_engine_shutdown(g->engine);
    fix_server_stop(&g->server);
    vnd_rafs_free(g->image);
    vnd_store_free(g->store);
    vnd_engine_free(g->engine);
    fix_blob_free(g->source);
    fix_dir_remove(g->dir);
}

/* Reads extents as a thread that may block does. part NULL: of the flat disk. Bytes or -errno. */
static inline int64_t disk_rig_read(struct disk_rig *g, struct disk_part *part, uint64_t off, uint32_t len, void *buf)
{
    struct extent at[STORE_EXTENTS_MAX];
    struct fix_reader reader;
    struct fs_extents x = { at, STORE_EXTENTS_MAX, 0, &reader.w };
    struct iovec iov = { buf, len };
    int64_t rc;

    fix_reader_init(&reader);
    reader.w.deadline_us = now_us() + 30000000;
    for (;;) {
        int n = part ? disk_part_extents(g->disk, part, off, len, &x) : disk_extents(g->disk, off, len, &x);

        iov.iov_len = x.bytes;
        rc = n > 0 ? store_read(&reader.w, at, n, &iov, 1) : n;
        if (rc != -EINPROGRESS)
            break;
        fix_reader_wait(&reader);
    }
    store_wait_done(&reader.w);
    pthread_mutex_lock(&reader.lock); /* the waker may still be on its way out of it */
    pthread_mutex_unlock(&reader.lock);
    return rc;
}

#endif
