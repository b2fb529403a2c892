/* rafs/v5_check.c -- walks a whole v5 tree (docs/rafs-format.md 8, rows 7, 8, 12, 14, 15, 24, 25, 30 to 32).
 *
 * An entry of the inode table belongs to one directory and lies behind it, so one pass over the entries sees every name
 * once. Nothing here recurses, and the pass is never longer than the table.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "rafs/check.h"
#include "rafs/v5.h"

struct walk {
    struct vnd_rafs *r;
    struct rafs_faults *f;
    uint32_t *owner; /* by entry: the directory that claims it, 0 none */
    uint32_t *links; /* by inode: how many names of it were met */
    bool xattr_seen, stop;
};

static void fault_slot(struct walk *w, uint64_t slot, const char *what)
{
    if (!rafs_fault(w->f, "inode %llu: %s", (unsigned long long)slot, what))
        w->stop = true;
}

static void check_name(struct walk *w, const struct v5_inode *n)
{
    if (rafs_name_broken(n->name, n->name_len))
        fault_slot(w, n->slot, "its name holds '/' or NUL");
    else if (rafs_name_is_dots(n->name, n->name_len))
        fault_slot(w, n->slot, "its name is \".\" or \"..\"");
}

static void check_dir(struct walk *w, const struct v5_inode *entry)
{
    struct v5_inode dir, child, prev = { 0 };
    uint32_t subdirs = 0;

    if (v5_dir(w->r, entry->ino, &dir)) {
        fault_slot(w, entry->slot, "a directory whose entries lie before it or outside the inode table");
        return;
    }
    for (uint32_t k = 0; k < dir.child_count && !w->stop; k++) {
        uint64_t slot = (uint64_t)dir.child_index + k;

        if (w->owner[slot]) {
            fault_slot(w, slot, "claimed by more than one directory");
            return; /* the entries that follow would give the same fault */
        }
        w->owner[slot] = dir.slot;
        if (v5_record(w->r, slot, &child))
            continue; /* the pass itself comes to this entry and says so */
        if (child.parent != dir.ino)
            fault_slot(w, slot, "its parent is not the directory that it is in");
        if (prev.name && rafs_name_compare(prev.name, prev.name_len, child.name, child.name_len) >= 0)
            fault_slot(w, dir.slot, "names not in strictly ascending order: some cannot be found");
        prev = child;
        subdirs += S_ISDIR(child.mode) ? 1 : 0;
    }
    /* Old builders wrote 1 (docs/rafs-format.md, Appendix B). */
    if (!w->stop && dir.nlink != subdirs + 2 && dir.nlink != 1)
        fault_slot(w, dir.slot, "a directory whose link count is not 2 + its sub-directories");
}

static void check_file(struct walk *w, const struct v5_inode *n)
{
    uint64_t want = (n->size + w->r->info.chunk_size_bytes - 1) >> w->r->chunk_bits, end = 0;
    bool holes = n->flags & V5_INODE_HAS_HOLE;
    struct rafs_chunk c;

    if (!holes && want != n->child_count) {
        fault_slot(w, n->slot, "its number of chunks is not what its size makes");
        return;
    }
    for (uint64_t k = 0; k < n->child_count && !w->stop; k++) {
        if (v5_chunk_at(w->r, n, k, &c)) {
            fault_slot(w, n->slot, "a chunk of impossible size, or naming a blob or chunk that is not there");
            return;
        }
        if (holes ? c.file_off < end : c.size < n->size - c.file_off && c.size != w->r->info.chunk_size_bytes) {
            fault_slot(w, n->slot, holes ? "chunks that overlap in the file" : "a short chunk before its end");
            return;
        }
        end = c.file_off + c.size;
    }
}

static void check_xattrs(struct walk *w, const struct v5_inode *n)
{
    struct v5_xattr x;
    uint64_t at = 0;
    int rc;

    if (!n->xattr)
        return;
    w->xattr_seen = true;
    while ((rc = v5_xattr_next(n, &at, &x)) > 0) {}
    if (rc)
        fault_slot(w, n->slot, "malformed xattrs");
}

static void check_alias(struct walk *w, const struct v5_inode *n)
{
    struct v5_inode first;

    if (v5_inode(w->r, n->ino, &first) || !S_ISREG(first.mode)) {
        fault_slot(w, n->slot, "another name of an inode that is malformed or none");
        return;
    }
    if (n->mode != first.mode || n->size != first.size || n->nlink != first.nlink || n->uid != first.uid ||
        n->gid != first.gid || n->mtime != first.mtime || n->mtime_nsec != first.mtime_nsec ||
        n->child_count != first.child_count || memcmp(n->digest, first.digest, 32) != 0 ||
        (n->chunks && memcmp(n->chunks, first.chunks, (uint64_t)n->child_count * RAFS_CHUNK_RECORD) != 0)) {
        fault_slot(w, n->slot, "another name of a file that differs from its first");
    }
}

static void check_inode(struct walk *w, const struct v5_inode *n)
{
    uint32_t kind = n->mode & S_IFMT;
    char buf[RAFS_SYMLINK_MAX];

    check_xattrs(w, n);
    if (n->ino != n->slot) {
        check_alias(w, n);
    } else if (kind == S_IFDIR) {
        check_dir(w, n);
    } else if (kind == S_IFREG) {
        check_file(w, n);
    } else if (kind == S_IFLNK) {
        if (w->r->fs.ops->readlink(&w->r->fs, n->ino, buf, sizeof(buf)) < 0 || n->size != n->link_len)
            fault_slot(w, n->slot, "malformed symlink");
    } else if (kind == S_IFCHR || kind == S_IFBLK || kind == S_IFIFO || kind == S_IFSOCK) {
        if (n->size)
            fault_slot(w, n->slot, "a device, fifo or socket with a size");
    } else {
        fault_slot(w, n->slot, "unknown file type in its mode");
    }
    if (!w->stop && n->mtime_nsec >= 1000000000)
        fault_slot(w, n->slot, "mtime with more than a second of nanoseconds");
}

static void check_links(struct walk *w)
{
    struct v5_inode n;

    for (uint64_t ino = 1; ino <= w->r->slots && !w->stop; ino++) {
        if (w->links[ino] && v5_inode(w->r, ino, &n) == 0 && !S_ISDIR(n.mode) && n.nlink != w->links[ino]) {
            if (!rafs_fault(w->f, "inode %llu: link count %u, names %u", (unsigned long long)ino, n.nlink,
                            w->links[ino])) {
                w->stop = true;
            }
        }
    }
}

static void check_rest(struct walk *w)
{
    for (uint32_t i = 0; i < w->r->info.prefetch_count && !w->stop; i++) {
        uint32_t ino = rafs_le32(w->r->base + w->r->info.prefetch_table_offset + 4ull * i);
        struct v5_inode n;

        if (!ino)
            break;
        if (v5_inode(w->r, ino, &n))
            fault_slot(w, ino, "named by the prefetch table, but malformed or outside the image");
    }
    if (w->xattr_seen && !(w->r->info.flags & RAFS_FLAG_HAS_XATTR) && !w->stop)
        rafs_fault(w->f, "inodes have xattrs but the superblock says that none has");
}

void v5_check(struct vnd_rafs *r, struct rafs_faults *f)
{
    struct walk w = { .r = r, .f = f };
    uint64_t chunks_left = r->size / RAFS_CHUNK_RECORD;
    struct v5_inode n;

    w.owner = calloc((size_t)r->slots + 1, sizeof(*w.owner));
    w.links = calloc((size_t)r->slots + 1, sizeof(*w.links));
    if (!w.owner || !w.links) {
        rafs_fault(f, "out of memory");
        w.stop = true;
    }
    for (uint64_t slot = 1; slot <= r->slots && !w.stop; slot++) {
        if (slot > 1 && !w.owner[slot]) {
            fault_slot(&w, slot, "in no directory");
            continue;
        }
        if (v5_record(r, slot, &n)) {
            fault_slot(&w, slot, "malformed, or outside the image");
            continue;
        }
        if (n.chunks && n.child_count > chunks_left) {
            fault_slot(&w, slot, "chunk records of several files overlap");
            break;
        }
        chunks_left -= n.chunks ? n.child_count : 0;
        if (slot > 1)
            check_name(&w, &n);
        w.links[n.ino]++;
        if (!w.stop)
            check_inode(&w, &n);
    }
    if (!w.stop)
        check_links(&w);
    if (!w.stop)
        check_rest(&w);
    free(w.owner);
    free(w.links);
}
