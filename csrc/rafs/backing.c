/* rafs/backing.c -- backing files for the kernel (fs/backing.h): files of an image whose bytes are all in the cache.
 *
 * The kernel reads a backing file at the same offsets as the file that is open, but an image's bytes lie in the middle of
 * blobs. EROFS over the same bootstrap and the same cache files has every file at its own offsets. So the image is
 * mounted once more, attached to no directory (base/hostmount.h), and its files are opened by handle: a nid is EROFS's
 * inode number too. Only a file whose chunks are all ready is opened; EROFS would show holes in any other file.
 *
 * A blob that was never read from has no cache file yet. The bootstrap stands in for it, because no file that is complete
 * needs that blob. When such a blob, or a new cache file of a known blob, is needed, the image is mounted anew.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/hostmount.h"
#include "rafs/v6.h"

/* A file of one or two READs gains nothing over the page cache that FUSE keeps for it. */
#define BACKING_BYTES_MIN (128u << 10)
#define SECTOR 512u
#define NO_EPOCH UINT64_MAX /* odd, so no state that can be read has it */
#define EROFS_FILEID 0x81   /* FILEID_INO64_GEN: high and low half of the nid, generation 0 */

struct nid_handle {
    struct file_handle h;
    uint32_t words[3];
};

struct rafs_backing {
    pthread_mutex_t lock;
    int root_fd;      /* -1: none yet */
    bool failed;      /* mounting failed; it was said once and is not tried again */
    uint64_t *epochs; /* of each blob's cache file when it was mounted, or NO_EPOCH */
};

void rafs_backing_free(struct vnd_rafs *r)
{
    struct rafs_backing *b = r->backing;

    if (!b)
        return;
    if (b->root_fd >= 0)
        close(b->root_fd);
    pthread_mutex_destroy(&b->lock);
    free(b->epochs);
    free(b);
    r->backing = NULL;
}

int rafs_backing_new(struct vnd_rafs *r)
{
    struct rafs_backing *b = calloc(1, sizeof(*b));

    if (!b)
        return -ENOMEM;
    b->epochs = calloc(r->info.blob_count + 1, sizeof(*b->epochs));
    if (!b->epochs) {
        free(b);
        return -ENOMEM;
    }
    b->root_fd = -1;
    pthread_mutex_init(&b->lock, NULL);
    r->backing = b;
    return 0;
}

/* With b->lock. Notes the state of each blob's cache file. True: it is not the state that is mounted. */
static bool note_epochs(struct vnd_rafs *r, struct hostmount_part *parts)
{
    struct rafs_backing *b = r->backing;
    bool changed = b->root_fd < 0;

    for (uint32_t i = 0; i < r->info.blob_count; i++) {
        uint64_t epoch = NO_EPOCH;
        int fd = blob_cache_fd(r->blobs[i].blob, &epoch);

        parts[i + 1] = fd < 0 ? parts[0] : (struct hostmount_part){ .fd = fd };
        changed |= epoch != b->epochs[i];
        b->epochs[i] = epoch;
    }
    return changed;
}

/* With b->lock. Mounts the image over the cache files as they are now, if that is not what is mounted. */
static void mount_image(struct vnd_rafs *r)
{
    struct rafs_backing *b = r->backing;
    struct hostmount_part parts[HOSTMOUNT_PARTS_MAX] = { { .fd = r->map_fd, .offset = r->map_off } };
    struct failure f = { 0 };
    int fd;

    if (!note_epochs(r, parts))
        return;
    if (b->root_fd >= 0)
        close(b->root_fd);
    fd = hostmount_erofs(parts, (int)r->info.blob_count + 1, &f);
    b->root_fd = fd < 0 ? -1 : fd;
    if (fd < 0) {
        b->failed = true;
        engine_say(r->engine, VND_LEVEL_INFO, VND_CAUSE_NONE, "%s: cached files go through the daemon, not past it: %s",
                   r->path, f.line);
    }
}

/* With b->lock. True: the cache files that hold the extents are those that are mounted. */
static bool is_mounted(const struct vnd_rafs *r, const struct extent *ext, int n)
{
    for (int i = 0; i < n; i++) {
        uint32_t at = 0;
        uint64_t epoch = NO_EPOCH;

        if (!ext[i].blob || (i && ext[i].blob == ext[i - 1].blob))
            continue;
        while (at < r->info.blob_count && r->blobs[at].blob != ext[i].blob)
            at++;
        if (at == r->info.blob_count || blob_cache_fd(ext[i].blob, &epoch) < 0 || epoch != r->backing->epochs[at])
            return false;
    }
    return true;
}

/* Of a file: a chunk is missing; all chunks are ready; all are ready, and in cache files that are mounted. */
enum file_state { FILE_PARTIAL, FILE_READY, FILE_MOUNTED };

/* With b->lock. */
static enum file_state state_of(struct vnd_rafs *r, uint64_t nid, uint64_t size)
{
    struct extent ext[STORE_EXTENTS_MAX];
    struct fs_extents x = { ext, STORE_EXTENTS_MAX, 0 };
    enum file_state state = FILE_MOUNTED;

    for (uint64_t off = 0; off < size; off += x.bytes) {
        uint64_t left = size - off;
        int n = r->fs.ops->extents(&r->fs, nid, off, left < 1u << 30 ? (uint32_t)left : 1u << 30, &x);

        if (n <= 0 || !x.bytes || !store_ready(ext, n))
            return FILE_PARTIAL;
        if (!is_mounted(r, ext, n))
            state = FILE_READY;
    }
    return state;
}

static int open_nid(int root_fd, uint64_t nid)
{
    struct nid_handle handle = {
        .h = { .handle_bytes = sizeof(handle.words), .handle_type = EROFS_FILEID },
        .words = { (uint32_t)(nid >> 32), (uint32_t)nid, 0 },
    };
    int fd = open_by_handle_at(root_fd, &handle.h, O_RDONLY | O_CLOEXEC | O_NOATIME);

    return fd < 0 ? -errno : fd;
}

int v6_backing_fd(struct fs *fs, uint64_t nid)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct rafs_backing *b = r->backing;
    struct v6_inode n;
    struct stat st;
    enum file_state state = FILE_PARTIAL;
    int fd = v6_inode(r, nid, &n);

    if (fd || !S_ISREG(n.mode) || n.size < BACKING_BYTES_MIN)
        return fd ? fd : -ENODATA;
    pthread_mutex_lock(&b->lock);
    if (!b->failed)
        state = state_of(r, nid, n.size);
    if (state == FILE_READY) {
        mount_image(r);
        state = b->failed ? FILE_PARTIAL : state_of(r, nid, n.size);
    }
    fd = state == FILE_MOUNTED ? open_nid(b->root_fd, nid) : -ENODATA;
    pthread_mutex_unlock(&b->lock);
    /* The kernel gets the inode that this reader means, or none. */
    if (fd >= 0 && (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || (uint64_t)st.st_size != n.size)) {
        close(fd);
        return -EIO;
    }
    return fd;
}
