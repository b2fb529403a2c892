/* rafs/v6_check.c -- walks a whole v6 tree (docs/rafs-format.md 8, rows 9 to 15, 24 to 26, 30).
 *
 * Each directory is entered once, by its inode number, so the walk ends whatever the image says, and its work is bounded
 * by the image's size. The directories still to be entered are a list on the heap.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "blob/meta.h"
#include "rafs/check.h"
#include "rafs/v6.h"

struct dir_job {
    uint64_t nid, parent;
};

struct walk {
    struct vnd_rafs *r;
    struct rafs_faults *f;
    uint32_t *links; /* by nid: how many entries name it, without "." and ".." */
    uint64_t slots;
    struct dir_job *jobs;
    size_t count, cap;
    uint64_t entries_left, chunks_left; /* starts at what the image has room for; more would overlap */
    bool xattr_seen, stop;
};

static void fault_inode(struct walk *w, uint64_t nid, const char *what)
{
    if (!rafs_fault(w->f, "inode %llu: %s", (unsigned long long)nid, what))
        w->stop = true;
}

/* Takes one from a budget. When the budget is spent: false, the fault is noted once and the walk stops. */
static bool spend(struct walk *w, uint64_t *left, uint64_t nid, const char *what)
{
    if (*left) {
        --*left;
        return true;
    }
    fault_inode(w, nid, what);
    w->stop = true;
    return false;
}

static bool push_dir(struct walk *w, uint64_t nid, uint64_t parent)
{
    if (w->count == w->cap) {
        size_t cap = w->cap ? w->cap * 2 : 256;
        struct dir_job *jobs = realloc(w->jobs, cap * sizeof(*jobs));

        if (!jobs)
            return false;
        w->jobs = jobs;
        w->cap = cap;
    }
    w->jobs[w->count++] = (struct dir_job){ nid, parent };
    return true;
}

static void check_file(struct walk *w, const struct v6_inode *n)
{
    uint64_t chunks = (n->size + w->r->info.chunk_size_bytes - 1) >> w->r->chunk_bits;
    struct rafs_chunk c;

    if (n->layout != V6_CHUNKED && n->size) {
        fault_inode(w, n->nid, "a file that is not chunk-based");
        return;
    }
    for (uint64_t k = 0; k < chunks && !w->stop; k++) {
        if (!spend(w, &w->chunks_left, n->nid, "chunk indexes of several files overlap"))
            return;
        if (v6_chunk_at(w->r, n, k, &c)) {
            fault_inode(w, n->nid, "a chunk index outside the image, or naming a blob or chunk that is not there");
            return;
        }
        uint64_t end = (w->r->blobs[c.blob].info.uncompressed_size_bytes + 4095) & ~4095ull;

        if (c.uoff > end || c.size > end - c.uoff) {
            fault_inode(w, n->nid, "data outside its blob");
            return;
        }
    }
}

static void check_inline(struct walk *w, const struct v6_inode *n)
{
    uint64_t blksz = 1ull << w->r->blkszbits, off = n->off + n->head + n->xattr_len, tail;

    if (n->layout != V6_FLAT_INLINE || !n->size)
        return;
    tail = n->size % blksz ? n->size % blksz : blksz;
    if (off / blksz != (off + tail - 1) / blksz)
        fault_inode(w, n->nid, "inline data crosses a block boundary: the kernel refuses that");
}

/* The checks that each inode gets once. */
static void check_inode(struct walk *w, const struct v6_inode *n)
{
    char buf[RAFS_SYMLINK_MAX];
    struct fs *fs = &w->r->fs;
    struct fs_buf need = { 0 };
    uint32_t kind = n->mode & S_IFMT;

    if (n->xattr_len) {
        w->xattr_seen = true;
        if (fs->ops->listxattr(fs, n->nid, &need))
            fault_inode(w, n->nid, "malformed xattrs");
    }
    check_inline(w, n);
    if (kind == S_IFREG) {
        check_file(w, n);
    } else if (kind == S_IFLNK) {
        if (fs->ops->readlink(fs, n->nid, buf, sizeof(buf)) < 0)
            fault_inode(w, n->nid, "malformed symlink");
    } else if (kind == S_IFCHR || kind == S_IFBLK || kind == S_IFIFO || kind == S_IFSOCK) {
        if (n->size)
            fault_inode(w, n->nid, "a device, fifo or socket with a size");
    } else if (kind != S_IFDIR) {
        fault_inode(w, n->nid, "unknown file type in its mode");
    }
    if (n->mtime_nsec >= 1000000000)
        fault_inode(w, n->nid, "mtime with more than a second of nanoseconds");
}

static bool entry_is(const struct v6_entry *e, const char *name)
{
    return e->len == strlen(name) && memcmp(e->name, name, e->len) == 0;
}

static void check_entry(struct walk *w, const struct dir_job *d, const struct v6_entry *e, uint32_t *subdirs)
{
    static const uint32_t kinds[8] = { 0, S_IFREG, S_IFDIR, S_IFCHR, S_IFBLK, S_IFIFO, S_IFSOCK, S_IFLNK };
    struct v6_inode n;

    if (rafs_name_broken(e->name, e->len)) {
        fault_inode(w, d->nid, "an entry's name holds '/' or NUL");
        return;
    }
    if (v6_inode(w->r, e->nid, &n)) {
        if (!rafs_fault(w->f, "inode %llu: entry '%.*s' names inode %llu, which is malformed or outside the image",
                        (unsigned long long)d->nid, (int)e->len, e->name, (unsigned long long)e->nid)) {
            w->stop = true;
        }
        return;
    }
    if (e->file_type >= 8 || kinds[e->file_type] != (n.mode & S_IFMT)) {
        if (!rafs_fault(w->f, "inode %llu: entry '%.*s' has a type that is not its inode's", (unsigned long long)d->nid,
                        (int)e->len, e->name)) {
            w->stop = true;
        }
    }
    if (entry_is(e, ".")) {
        if (e->nid != d->nid)
            fault_inode(w, d->nid, "\".\" is another inode");
        return;
    }
    if (entry_is(e, "..")) {
        if (e->nid != d->parent)
            fault_inode(w, d->nid, "\"..\" is not its parent");
        return;
    }
    if (w->links[e->nid] == 0)
        check_inode(w, &n);
    w->links[e->nid]++;
    if (!S_ISDIR(n.mode))
        return;
    ++*subdirs;
    if (w->links[e->nid] > 1 || e->nid == w->r->root_nid) {
        fault_inode(w, e->nid, "a directory that is in the tree twice");
    } else if (!push_dir(w, e->nid, d->nid)) {
        fault_inode(w, e->nid, "out of memory");
        w->stop = true;
    }
}

static void check_dir(struct walk *w, const struct dir_job *d)
{
    struct v6_entry prev = { 0 }, e;
    uint32_t subdirs = 0, dots = 0;
    struct v6_inode n;
    struct v6_block b;
    uint64_t blocks;

    if (v6_dir_open(w->r, d->nid, &n, &blocks)) {
        fault_inode(w, d->nid, "a directory that cannot be opened");
        return;
    }
    for (uint64_t at = 0; at < blocks && !w->stop; at++) {
        if (v6_dir_block(w->r, &n, at, &b)) {
            fault_inode(w, d->nid, "a malformed directory block");
            return;
        }
        for (uint32_t k = 0; k < b.count && !w->stop; k++) {
            if (!spend(w, &w->entries_left, d->nid, "entries of several directories overlap"))
                return;
            if (v6_dir_entry(&b, k, &e)) {
                fault_inode(w, d->nid, "a malformed directory entry");
                return;
            }
            if (prev.name && rafs_name_compare(prev.name, prev.len, e.name, e.len) >= 0)
                fault_inode(w, d->nid, "names not in strictly ascending order: some cannot be found");
            dots += entry_is(&e, ".") || entry_is(&e, "..");
            check_entry(w, d, &e, &subdirs);
            prev = e;
        }
    }
    if (!w->stop && dots != 2)
        fault_inode(w, d->nid, "a directory without \".\" or \"..\"");
    /* Old builders wrote 1 (docs/rafs-format.md, Appendix B). */
    if (!w->stop && n.nlink != subdirs + 2 && n.nlink != 1)
        fault_inode(w, d->nid, "a directory whose link count is not 2 + its sub-directories");
}

static void check_links(struct walk *w)
{
    struct v6_inode n;

    for (uint64_t nid = 0; nid < w->slots && !w->stop; nid++) {
        if (w->links[nid] && v6_inode(w->r, nid, &n) == 0 && !S_ISDIR(n.mode) && n.nlink != w->links[nid]) {
            if (!rafs_fault(w->f, "inode %llu: link count %u, names %u", (unsigned long long)nid, n.nlink,
                            w->links[nid])) {
                w->stop = true;
            }
        }
    }
}

static void check_tables(struct walk *w)
{
    struct vnd_rafs *r = w->r;
    struct v6_inode n;

    for (uint32_t i = 0; i < r->info.prefetch_count && !w->stop; i++) {
        uint32_t nid = rafs_le32(r->base + r->info.prefetch_table_offset + 4ull * i);

        if (!nid)
            break;
        if (v6_inode(r, nid, &n))
            fault_inode(w, nid, "named by the prefetch table, but malformed or outside the image");
    }
    if (w->xattr_seen && !(r->info.flags & RAFS_FLAG_HAS_XATTR) && !w->stop)
        rafs_fault(w->f, "inodes have xattrs but the superblock says that none has");
}

/* Checks where the kernel finds the blobs when they and the bootstrap are one device. Old builders left that out (0). */
static void check_mapped(struct walk *w)
{
    struct vnd_rafs *r = w->r;
    const uint8_t *slots = r->base + (uint64_t)rafs_le16(r->base + V6_SB + V6_SB_SLOTS) * V6_DEVICE;
    uint64_t bootstrap = (r->size + (1ull << r->blkszbits) - 1) >> r->blkszbits;

    for (uint32_t k = 0; k < r->info.blob_count && !w->stop; k++) {
        uint64_t blocks = rafs_le32(slots + (uint64_t)k * V6_DEVICE + V6_DEVICE_BLOCKS);
        uint64_t at = rafs_le32(slots + (uint64_t)k * V6_DEVICE + V6_DEVICE_MAPPED);

        if (at && blocks && at < bootstrap && !rafs_fault(w->f, "blob %u is mapped over the bootstrap", k))
            w->stop = true;
        for (uint32_t j = 0; j < k && at && blocks && !w->stop; j++) {
            uint64_t others = rafs_le32(slots + (uint64_t)j * V6_DEVICE + V6_DEVICE_BLOCKS);
            uint64_t other = rafs_le32(slots + (uint64_t)j * V6_DEVICE + V6_DEVICE_MAPPED);

            if (other && at < other + others && other < at + blocks &&
                !rafs_fault(w->f, "mapped ranges of blobs %u and %u overlap", j, k)) {
                w->stop = true;
            }
        }
    }
}

/* Checks that a reader takes the chunk tables that lie with the blobs: of batched and zran blobs there is no other. */
static void check_chunk_tables(struct walk *w)
{
    for (uint32_t k = 0; k < w->r->info.blob_count && !w->stop; k++) {
        const vnd_blob_info *b = &w->r->blobs[k].info;

        if (b->chunk_count && b->features & (BLOBMETA_ZRAN | BLOBMETA_BATCH) && !blobmeta_possible(b) &&
            !rafs_fault(w->f, "blob %u: no reader takes its chunk table (%u chunks, %llu bytes decoded)", k,
                        b->chunk_count, (unsigned long long)b->ci_usize_bytes))
            w->stop = true;
    }
}

void v6_check(struct vnd_rafs *r, struct rafs_faults *f)
{
    struct walk w = {
        .r = r, .f = f, .slots = r->inode_end / 32 + 1, .entries_left = r->size / V6_DIRENT, .chunks_left = r->size / 8
    };
    struct v6_inode root;

    w.links = calloc(w.slots, sizeof(*w.links));
    if (!w.links || !push_dir(&w, r->root_nid, r->root_nid)) {
        rafs_fault(f, "out of memory");
        free(w.links);
        return;
    }
    if (v6_inode(r, r->root_nid, &root) == 0)
        check_inode(&w, &root);
    while (w.count && !w.stop) {
        struct dir_job d = w.jobs[--w.count];

        check_dir(&w, &d);
    }
    if (!w.stop) {
        check_links(&w);
        check_tables(&w);
        check_mapped(&w);
        check_chunk_tables(&w);
    }
    free(w.links);
    free(w.jobs);
}
