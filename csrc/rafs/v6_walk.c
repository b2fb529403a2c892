/* rafs/v6_walk.c -- chunk records made from the files, for images whose chunk table means nothing: in tarfs mode a blob
 * is an uncompressed tar, and a chunk lies where its file's data lie in it (docs/rafs-format.md 3.10).
 *
 * The whole tree is walked when a blob's table is loaded, not when the image is opened. The walk ends after as many
 * entries and chunks as the image has room for, so directories that overlap or form a circle cannot prolong it.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "rafs/v6.h"

struct walk {
    struct vnd_rafs *r;
    uint32_t only_blob;
    rafs_put_record put;
    void *ctx;
    uint64_t *dirs;
    size_t count, cap;
    uint64_t entries_left, chunks_left, number;
};

static int push_dir(struct walk *w, uint64_t nid)
{
    if (w->count == w->cap) {
        size_t cap = w->cap ? w->cap * 2 : 256;
        uint64_t *dirs = realloc(w->dirs, cap * sizeof(*dirs));

        if (!dirs)
            return -ENOMEM;
        w->dirs = dirs;
        w->cap = cap;
    }
    w->dirs[w->count++] = nid;
    return 0;
}

static int put_file(struct walk *w, const struct v6_inode *n)
{
    uint64_t chunks = (n->size + w->r->info.chunk_size_bytes - 1) >> w->r->chunk_bits;
    struct rafs_chunk c;
    int rc = 0;

    for (uint64_t k = 0; k < chunks && !rc; k++) {
        if (!w->chunks_left-- || v6_chunk_at(w->r, n, k, &c))
            return 0;
        if (w->only_blob == UINT32_MAX || c.blob == w->only_blob) {
            struct blob_chunk out = {
                .index = c.index, .coff = c.uoff, .uoff = c.uoff, .csize = c.size, .usize = c.size
            };

            rc = w->put(w->ctx, w->number, c.blob, &out);
        }
        w->number++;
    }
    return rc;
}

static int walk_dir(struct walk *w, uint64_t nid)
{
    struct v6_inode dir, n;
    struct v6_block b;
    struct v6_entry e;
    uint64_t blocks;
    int rc = 0;

    if (v6_dir_open(w->r, nid, &dir, &blocks))
        return 0;
    for (uint64_t at = 0; at < blocks && v6_dir_block(w->r, &dir, at, &b) == 0; at++) {
        for (uint32_t k = 0; k < b.count && !rc; k++) {
            if (!w->entries_left--) {
                w->entries_left = 0;
                w->count = 0;
                return 0;
            }
            if (v6_dir_entry(&b, k, &e) || v6_inode(w->r, e.nid, &n))
                continue; /* a reader of it gets EIO */
            if (S_ISREG(n.mode) && n.layout == V6_CHUNKED)
                rc = put_file(w, &n);
            else if (S_ISDIR(n.mode) && !(e.name[0] == '.' && (e.len == 1 || (e.len == 2 && e.name[1] == '.'))))
                rc = push_dir(w, e.nid);
        }
        if (rc)
            return rc;
    }
    return 0;
}

int v6_walk_chunks(struct vnd_rafs *r, uint32_t only_blob, rafs_put_record put, void *ctx)
{
    struct walk w = { .r = r,
                      .only_blob = only_blob,
                      .put = put,
                      .ctx = ctx,
                      .entries_left = r->size / V6_DIRENT,
                      .chunks_left = r->size / 8 };
    int rc = push_dir(&w, r->root_nid);

    while (!rc && w.count)
        rc = walk_dir(&w, w.dirs[--w.count]);
    free(w.dirs);
    return rc;
}
