/* rafs_walk.h -- any bytes as a bootstrap (or a data blob that holds one): every call of the reader, on all that a walk
 * of bounded length meets. */
#ifndef RAFS_WALK_H
#define RAFS_WALK_H
#include <errno.h>

#include "../c/v6_image.h"
#include "rafs/internal.h"

static vnd_engine *engine;

static int put_nothing(void *ctx, const struct blob_chunk *c)
{
    return ++*(uint32_t *)ctx > 1000;
}

static int take_none(void *ctx, const struct fs_entry *e)
{
    return ++*(int *)ctx > 3;
}

static void visit(vnd_rafs *r, uint64_t ino, uint32_t *budget)
{
    struct fs *fs = rafs_fs(r);
    struct extent ext[8];
    vnd_chunk_info chunks[8];
    vnd_dirent d[16];
    vnd_attr a;
    char buf[5000];
    uint64_t off = 0, found;
    struct fs_extents x = { ext, 8, 0 };
    int n;

    if (*budget == 0 || vnd_rafs_getattr(r, ino, &a))
        return;
    --*budget;
    vnd_rafs_readlink(r, ino, buf, sizeof(buf));
    vnd_rafs_readlink(r, ino, buf, 3);
    if (vnd_rafs_listxattr(r, ino, buf, sizeof(buf)) > 0) {
        vnd_rafs_getxattr(r, ino, buf, buf, sizeof(buf));
        vnd_rafs_listxattr(r, ino, buf, 2);
    }
    vnd_rafs_getxattr(r, ino, "system.posix_acl_access", buf, 4);
    vnd_rafs_chunks(r, ino, 0, chunks, 8);
    vnd_rafs_chunks(r, ino, a.size_bytes / 4096 / 2, chunks, 8);
    fs->ops->extents(fs, ino, 0, 1 << 20, &x);
    fs->ops->extents(fs, ino, a.size_bytes / 2, UINT32_MAX, &x);
    vnd_rafs_lookup(r, ino, "file", &found);
    fs->ops->readdir(fs, &(struct fs_listing){ ino, 0, 0, true, take_none, &(int){ 0 } });
    vnd_rafs_lookup(r, ino, "..", &found);
    while ((n = vnd_rafs_readdir(r, ino, off, d, 16)) > 0 && *budget) {
        for (int i = 0; i < n; i++) {
            vnd_rafs_lookup(r, ino, d[i].name, &found);
            if (strcmp(d[i].name, ".") != 0 && strcmp(d[i].name, "..") != 0)
                visit(r, d[i].ino, budget);
        }
        if (d[n - 1].next_off <= off)
            __builtin_trap(); /* a listing that would never end */
        off = d[n - 1].next_off;
    }
}

/* The image in the file path, whatever it is. */
static void walk_image(const char *path, size_t size)
{
    static struct vnd_blob *const blob = (struct vnd_blob *)&engine;
    char err[VND_ERR_MAX], *out = malloc(2000);
    uint32_t budget = 40;
    uint64_t inos[4];
    int cause;

    if (!engine)
        engine = vnd_engine_new(&(vnd_engine_cfg){ 0 });
    vnd_rafs *r = vnd_rafs_open(engine, path, NULL, NULL, &cause, err, sizeof(err));

    if (r) {
        for (uint32_t k = 0; k < r->info.blob_count; k++) {
            uint32_t count = 0;

            rafs_blob_chunks(r, k, put_nothing, &count);
            if (r->info.fs_version == 6)
                r->version->record(r, 0, &count, &(struct blob_chunk){ 0 });
            r->blobs[k].blob = blob; /* extents name it, and it is not read */
        }
        struct fs *fs = rafs_fs(r);
        uint32_t bsize;

        if (fs->ops->root(fs) != r->info.root_ino ||
            fs->ops->has_xattr(fs) != ((r->info.flags & RAFS_FLAG_HAS_XATTR) != 0) ||
            fs->ops->statfs(fs, &inos[0], &inos[1], &bsize)) {
            __builtin_trap();
        }
        visit(r, r->info.root_ino, &budget);
        visit(r, size, &budget);
        vnd_rafs_prefetch(r, inos, 4);
        vnd_rafs_check(r, 10, out, 2000);
        for (uint32_t k = 0; k < r->info.blob_count; k++)
            r->blobs[k].blob = NULL;
        vnd_rafs_free(r);
    }
    free(out);
}

#endif
