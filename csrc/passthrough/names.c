/* passthrough/names.c -- looks names up, lists, makes, renames and removes them. A name is one component below a
 * directory that the guest was given; see passthrough.h.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/stat.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "passthrough/internal.h"

/* Bytes of entries that are read from the host at once. */
#define ENTRIES_BYTES 4096u

struct linux_dirent64 {
    uint64_t d_ino;
    int64_t d_off;
    uint16_t d_reclen;
    uint8_t d_type;
    char d_name[];
};

/* DT_* of a mode. */
static uint32_t mode_type(uint32_t mode)
{
    return mode >> 12 & 15;
}

static int fail_errno(void)
{
    return errno == EMFILE ? -ENFILE : -errno;
}

static bool is_dots(const char *name)
{
    return name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2]));
}

static int open_name(struct vnd_passthrough *p, int dir, const char *name)
{
    bool tried = false;
    int fd;

    do {
        fd = openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    } while (fd < 0 && pt_make_room(p, &tried));
    return fd < 0 ? fail_errno() : fd;
}

/* A reference to a directory in which names are to change. -EROFS where the flags forbid that. */
static int get_dir(struct vnd_passthrough *p, uint64_t ino, struct pt_ref *ref)
{
    struct stat st;
    int rc = pt_get(p, ino, ref);

    if (rc || !(p->flags & VND_PASSTHROUGH_KEEP_TOP) || ref->node->mount != p->root->mount)
        return rc;
    if (ref->node == p->root || (fstatat(p->root_fd, "passthrough", &st, AT_SYMLINK_NOFOLLOW) == 0 &&
                                 st.st_ino == ref->node->host_ino && st.st_dev == ref->node->dev)) {
        pt_put(p, ref);
        return -EROFS;
    }
    return 0;
}

int pt_lookup(struct fs *fs, uint64_t dir, const char *name, size_t len, vnd_attr *out)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_ref ref;
    int fd, rc = pt_get(p, dir, &ref);
    bool dots = is_dots(name);

    if (rc)
        return rc;
    if (dots && (len == 1 || ref.node == p->root)) {
        rc = pt_learn(p, NULL, name, ref.fd, false, out);
    } else {
        fd = open_name(p, ref.fd, name);
        rc = fd < 0 ? fd : pt_learn(p, dots ? NULL : ref.node, name, fd, true, out);
    }
    pt_put(p, &ref);
    return rc;
}

/* Gives one entry of a listing with attributes. Not 0: it was not taken. */
static int put_plus(struct vnd_passthrough *p, struct pt_file *f, const struct linux_dirent64 *d,
                    const struct fs_listing *l)
{
    struct fs_entry e = { .next_off = (uint64_t)d->d_off, .name = d->d_name, .len = strlen(d->d_name) };
    vnd_attr attr;
    int fd = open_name(p, f->fd, d->d_name);

    if (fd < 0 ||
        pt_learn(p, f->node, d->d_name, fd, true, &attr)) { /* gone, or no room: a look-up may find it later */
        e.ino = pt_ino_in(f->node, d->d_ino);
        e.type = d->d_type;
        return l->put(l->ctx, &e);
    }
    e.ino = attr.ino;
    e.type = mode_type(attr.mode);
    e.attr = &attr;
    if (l->put(l->ctx, &e)) {
        pt_forget(p, attr.ino, 1);
        return 1;
    }
    return 0;
}

static int put_plain(struct pt_file *f, const struct linux_dirent64 *d, const struct fs_listing *l)
{
    struct fs_entry e = {
        pt_ino_in(f->node, d->d_ino), (uint64_t)d->d_off, d->d_name, strlen(d->d_name), d->d_type, NULL
    };
    struct stat st;

    if (e.type == DT_UNKNOWN && fstatat(f->fd, d->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0)
        e.type = mode_type(st.st_mode);
    return l->put(l->ctx, &e);
}

/* Puts an open directory at a cookie, which is the host's and opaque: where lseek takes it for negative (cookies of NFS
 * use all 64 bits), the listing goes on in what was read already, or else is read from the start up to there. */
static int seek_dir(struct pt_file *f, uint64_t off)
{
    if ((int64_t)off >= 0 || f->entries_off != off) {
        f->entries_at = f->entries_end = 0;
        f->entries_off = off;
        if (lseek(f->fd, (off_t)off, SEEK_SET) >= 0)
            return 0;
        if (errno != EINVAL || lseek(f->fd, 0, SEEK_SET) < 0)
            return -errno;
        f->entries_off = 0;
    }
    return 0;
}

/* The next entry of the host, or NULL: the end (*rc 0) or an error. Its d_reclen bytes are to be added to entries_at when
 * it is taken. */
static const struct linux_dirent64 *next_entry(struct pt_file *f, uint32_t bytes, int *rc)
{
    if (f->entries_at == f->entries_end) {
        long n = syscall(SYS_getdents64, f->fd, f->entries, bytes);

        *rc = n < 0 ? -errno : 0;
        if (n <= 0)
            return NULL;
        f->entries_at = 0;
        f->entries_end = (uint32_t)n;
    }
    return (const struct linux_dirent64 *)(const void *)(f->entries + f->entries_at);
}

static void take_entry(struct pt_file *f, const struct linux_dirent64 *d)
{
    f->entries_off = (uint64_t)d->d_off;
    f->entries_at += d->d_reclen;
}

static int list_locked(struct vnd_passthrough *p, struct pt_file *f, const struct fs_listing *l)
{
    /* A guest takes about 4 KiB of entries at a time, with attributes or without. */
    uint32_t bytes = l->want_attr ? ENTRIES_BYTES / 2 : ENTRIES_BYTES;
    const struct linux_dirent64 *d;
    int rc;

    if (!f->entries)
        f->entries = malloc(ENTRIES_BYTES);
    if (!f->entries)
        return -ENOMEM;
    rc = seek_dir(f, l->off);
    while (!rc && f->entries_off != l->off && (d = next_entry(f, bytes, &rc)))
        take_entry(f, d);
    if (!rc && f->entries_off != l->off)
        rc = -EINVAL; /* no entry has that cookie, or has it any more */
    while (!rc && (d = next_entry(f, bytes, &rc))) {
        if (l->want_attr && !is_dots(d->d_name) ? put_plus(p, f, d, l) : put_plain(f, d, l))
            break;
        take_entry(f, d);
    }
    return rc;
}

int pt_readdir(struct fs *fs, const struct fs_listing *l)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_file *f = pt_file_get(p, l->dir, l->fh);
    int rc;

    if (!f)
        return -EBADF;
    if (!f->dir) {
        pt_file_put(p, f);
        return -ENOTDIR;
    }
    pthread_mutex_lock(&f->dir_lock);
    rc = list_locked(p, f, l);
    pthread_mutex_unlock(&f->dir_lock);
    pt_file_put(p, f);
    return rc;
}

/* ---- making */

static int learn_name(struct vnd_passthrough *p, const struct pt_ref *dir, const char *name, vnd_attr *out)
{
    int fd = open_name(p, dir->fd, name);

    return fd < 0 ? fd : pt_learn(p, dir->node, name, fd, true, out);
}

/* A reference to a directory, and the caller's credentials, to make something there. 0: both are to be given back. */
static int enter(struct vnd_passthrough *p, const struct fs_make *make, struct pt_ref *ref, struct pt_cred *cred)
{
    int rc = get_dir(p, make->dir, ref);

    if (!rc) {
        rc = pt_cred_take(&make->who, cred);
        if (rc)
            pt_put(p, ref);
    }
    return rc;
}

/* Ends what enter began. rc: what making gave; if it is 0 the new object becomes known. */
static int leave_named(struct vnd_passthrough *p, struct pt_ref *ref, struct pt_cred *cred, int rc, const char *name,
                       vnd_attr *out)
{
    pt_cred_back(cred);
    if (!rc)
        rc = learn_name(p, ref, name, out);
    pt_put(p, ref);
    return rc;
}

int pt_mknod(struct fs *fs, const struct fs_make *make, vnd_attr *out)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_cred cred;
    struct pt_ref ref;
    int rc = enter(p, make, &ref, &cred);

    if (rc)
        return rc;
    if (S_ISDIR(make->mode)) {
        rc = mkdirat(ref.fd, make->name, make->mode & 07777) ? fail_errno() : 0;
    } else {
        uint32_t rdev = make->rdev;
        dev_t dev = makedev(rdev >> 8 & 0xfff, (rdev & 0xff) | (rdev >> 12 & 0xfff00));

        rc = mknodat(ref.fd, make->name, make->mode, dev) ? fail_errno() : 0;
    }
    return leave_named(p, &ref, &cred, rc, make->name, out);
}

int pt_symlink(struct fs *fs, const struct fs_make *make, const char *target, vnd_attr *out)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_cred cred;
    struct pt_ref ref;
    int rc = enter(p, make, &ref, &cred);

    if (rc)
        return rc;
    rc = symlinkat(target, ref.fd, make->name) ? fail_errno() : 0;
    return leave_named(p, &ref, &cred, rc, make->name, out);
}

/* Removes a file that was just made and cannot be given to the guest, unless the host has replaced it. */
static void unmake(const struct pt_ref *dir, const char *name, int fd)
{
    struct stat made, there;

    if (fstat(fd, &made) == 0 && fstatat(dir->fd, name, &there, AT_SYMLINK_NOFOLLOW) == 0 &&
        made.st_ino == there.st_ino && made.st_dev == there.st_dev) {
        unlinkat(dir->fd, name, 0);
    }
}

/* Gives the guest the entry and an open file, or neither; then the host has no such file either. name: "" of a file
 * without a name. fd is taken. */
static int open_made(struct vnd_passthrough *p, const struct pt_ref *dir, const char *name, int fd, vnd_attr *out,
                     uint64_t *fh)
{
    struct pt_node *n;
    int rc = pt_learn(p, dir->node, name, fd, false, out);

    if (!rc) {
        n = pt_node_find(p, out->ino);
        rc = n ? pt_file_add(p, n, fd, fh) : -ESTALE;
        if (n)
            pt_node_put(p, n);
        if (rc)
            pt_forget(p, out->ino, 1);
    }
    if (rc) {
        if (name[0])
            unmake(dir, name, fd);
        close(fd);
    }
    return rc;
}

static int open_existing(struct vnd_passthrough *p, const struct pt_ref *dir, const struct fs_make *make, vnd_attr *out,
                         uint64_t *fh)
{
    uint32_t flags = make->flags & ~(uint32_t)(O_CREAT | O_EXCL);
    int rc = learn_name(p, dir, make->name, out);

    if (rc)
        return rc;
    rc = S_ISLNK(out->mode) ? -ELOOP : S_ISDIR(out->mode) ? -EISDIR : 0;
    if (!rc)
        rc = pt_open(&p->fs, out->ino, flags, false, make->kill, fh);
    if (rc)
        pt_forget(p, out->ino, 1);
    return rc;
}

int pt_create(struct fs *fs, const struct fs_make *make, vnd_attr *out, uint64_t *fh)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_cred cred;
    struct pt_ref ref;
    int fd, rc = enter(p, make, &ref, &cred);

    if (rc)
        return rc;
    /* O_EXCL: what is there already might be a device, which must not be opened. */
    fd = openat(ref.fd, make->name, (pt_open_flags(make->flags) & ~O_TRUNC) | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                make->mode & 07777);
    rc = fd < 0 ? fail_errno() : 0;
    pt_cred_back(&cred);
    if (!rc)
        rc = open_made(p, &ref, make->name, fd, out, fh);
    else if (rc == -EEXIST && !(make->flags & O_EXCL))
        rc = open_existing(p, &ref, make, out, fh);
    pt_put(p, &ref);
    return rc;
}

int pt_tmpfile(struct fs *fs, const struct fs_make *make, vnd_attr *out, uint64_t *fh)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_cred cred;
    struct pt_ref ref;
    int fd, rc = enter(p, make, &ref, &cred);

    if (rc)
        return rc;
    fd = openat(ref.fd, ".",
                (pt_open_flags(make->flags) & ~O_TRUNC) | O_TMPFILE | (int)(make->flags & O_EXCL) | O_CLOEXEC,
                make->mode & 07777);
    rc = fd < 0 ? fail_errno() : 0;
    pt_cred_back(&cred);
    if (!rc)
        rc = open_made(p, &ref, "", fd, out, fh);
    pt_put(p, &ref);
    return rc;
}

int pt_link(struct fs *fs, uint64_t ino, uint64_t dir, const char *name, vnd_attr *out)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_ref ref, node;
    char number[12];
    int rc = get_dir(p, dir, &ref);

    if (rc)
        return rc;
    rc = pt_get(p, ino, &node);
    if (!rc) {
        if (linkat(node.fd, "", ref.fd, name, AT_EMPTY_PATH)) {
            rc = fail_errno();
            if (rc == -ENOENT || rc == -EPERM) { /* without CAP_DAC_READ_SEARCH */
                rc =
                    linkat(p->proc_fd, pt_fd_name(number, node.fd), ref.fd, name, AT_SYMLINK_FOLLOW) ? fail_errno() : 0;
            }
        }
        if (!rc)
            rc = pt_learn(p, ref.node, name, node.fd, false, out);
        pt_put(p, &node);
    }
    pt_put(p, &ref);
    return rc;
}

/* ---- removing and renaming */

int pt_unlink(struct fs *fs, uint64_t dir, const char *name, bool is_dir)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_ref ref;
    int rc = get_dir(p, dir, &ref);

    if (!rc) {
        rc = unlinkat(ref.fd, name, is_dir ? AT_REMOVEDIR : 0) ? fail_errno() : 0;
        pt_put(p, &ref);
    }
    return rc;
}

/* After a rename: what is called name in dir now keeps its place. */
static void note_place(struct vnd_passthrough *p, const struct pt_node *dir, int dir_fd, const char *name)
{
    struct pt_mount *m;
    struct pt_node *n;
    struct statx sx;
    int fd;

    if (!atomic_load_explicit(&p->has_places, memory_order_relaxed))
        return;
    fd = openat(dir_fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return;
    if (pt_stat_birth(fd, &sx) == 0) {
        pthread_mutex_lock(&p->lock);
        m = pt_mount_find(p, sx.stx_mnt_id);
        n = m ? pt_node_of(p, m, &sx) : NULL;
        if (n && n->place && pt_place_holds(n, &sx))
            pt_place_set(n, dir->ino, name, &sx); /* without memory the old place stays, and leads nowhere */
        if (m)
            pt_node_put_locked(p, pt_mount_put(p, m));
        pthread_mutex_unlock(&p->lock);
    }
    close(fd);
}

int pt_rename(struct fs *fs, const struct fs_rename *what)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_cred cred = { 0 };
    struct pt_ref from, to;
    int rc;

    if (what->flags & ~(uint32_t)(RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT))
        return -EINVAL;
    rc = get_dir(p, what->dir, &from);
    if (rc)
        return rc;
    rc = get_dir(p, what->new_dir, &to);
    if (!rc) {
        if (what->flags & RENAME_WHITEOUT) /* the whiteout is a new object of the caller's */
            rc = pt_cred_take(&what->who, &cred);
        if (!rc) {
            rc = renameat2(from.fd, what->name, to.fd, what->new_name, what->flags) ? fail_errno() : 0;
            pt_cred_back(&cred);
        }
        if (!rc) {
            note_place(p, to.node, to.fd, what->new_name);
            if (what->flags & RENAME_EXCHANGE)
                note_place(p, from.node, from.fd, what->name);
        }
        pt_put(p, &to);
    }
    pt_put(p, &from);
    return rc;
}
