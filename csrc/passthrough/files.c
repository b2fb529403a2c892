/* passthrough/files.c -- open files of a guest and their data; see passthrough.h. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

#include "passthrough/internal.h"

/* One call copies no more, so that a thread is not away for long. The guest's kernel asks again for the rest. */
#define COPY_MAX_BYTES (4u << 20)
#define READ_AHEAD_BYTES (1u << 20)
#define RETRY_MAX 2
#define SYNC_MOUNTS_MAX 64

/* ---- the table of open files; fh = gen << 32 | (slot + 1) */

static int grow(struct vnd_passthrough *p)
{
    uint32_t n = p->n_slots ? p->n_slots * 2 : 64;
    struct pt_file **files = realloc(p->files, n * sizeof(*files));

    if (!files)
        return -ENOMEM;
    for (uint32_t i = p->n_slots; i < n; i++)
        files[i] = NULL;
    p->files = files;
    p->n_slots = n;
    return 0;
}

static int add_locked(struct vnd_passthrough *p, struct pt_file *f)
{
    uint32_t at = p->free_hint;

    if (p->n_files >= p->files_max)
        return -ENFILE;
    if (p->n_files == p->n_slots && grow(p))
        return -ENOMEM;
    while (at >= p->n_slots || p->files[at])
        at = at + 1 < p->n_slots ? at + 1 : 0;
    p->free_hint = at + 1;
    f->slot = at;
    f->gen = ++p->next_gen;
    if (p->ledger)
        ledger_numbers(p->ledger)[PT_KEPT_NEXT_GEN] = p->next_gen;
    f->next = f->node->files;
    f->node->files = f;
    f->node->refs++;
    p->files[at] = f;
    p->n_files++;
    pt_keep_file(p, f);
    return 0;
}

static struct pt_file *new_file(struct pt_node *n, int fd)
{
    struct pt_file *f = calloc(1, sizeof(*f));

    if (f) {
        f->node = n;
        f->fd = fd;
        f->refs = 1;
        f->dir = n->type == S_IFDIR;
        pthread_mutex_init(&f->dir_lock, NULL);
    }
    return f;
}

int pt_file_restore(struct vnd_passthrough *p, struct pt_node *n, int fd, uint64_t fh, uint32_t kept_at)
{
    uint64_t slot = (fh & 0xffffffff) - 1;
    struct pt_file *f;

    if (slot >= p->files_max)
        return -EINVAL;
    while (slot >= p->n_slots)
        if (grow(p))
            return -ENOMEM;
    if (p->files[slot])
        return -EINVAL;
    f = new_file(n, fd);
    if (!f)
        return -ENOMEM;
    f->slot = (uint32_t)slot;
    f->gen = (uint32_t)(fh >> 32);
    f->kept_at = kept_at;
    f->next = n->files;
    n->files = f;
    n->refs++;
    p->files[slot] = f;
    p->n_files++;
    return 0;
}

int pt_file_add(struct vnd_passthrough *p, struct pt_node *n, int fd, uint64_t *fh)
{
    struct pt_file *f = new_file(n, fd);
    int rc = f ? 0 : -ENOMEM;

    if (!rc) {
        pthread_mutex_lock(&p->lock);
        rc = add_locked(p, f);
        pthread_mutex_unlock(&p->lock);
    }
    if (rc) {
        free(f);
        return rc;
    }
    *fh = (uint64_t)f->gen << 32 | (f->slot + 1);
    return 0;
}

static struct pt_file *find_locked(struct vnd_passthrough *p, uint64_t fh)
{
    uint64_t slot = (fh & 0xffffffff) - 1;
    struct pt_file *f = slot < p->n_slots ? p->files[slot] : NULL;

    return f && f->gen == fh >> 32 ? f : NULL;
}

struct pt_file *pt_file_get(struct vnd_passthrough *p, uint64_t ino, uint64_t fh)
{
    struct pt_file *f;

    pthread_mutex_lock(&p->lock);
    f = find_locked(p, fh);
    if (f && ino && f->node->ino != ino)
        f = NULL;
    if (f)
        f->refs++;
    pthread_mutex_unlock(&p->lock);
    return f;
}

/* Under the lock. True: it was the last reference; the caller frees f outside the lock. */
static bool put_locked(struct vnd_passthrough *p, struct pt_file *f)
{
    struct pt_file **at = &f->node->files;

    if (--f->refs)
        return false;
    while (*at != f)
        at = &(*at)->next;
    *at = f->next;
    pt_node_put_locked(p, f->node);
    return true;
}

static void file_free(struct pt_file *f)
{
    close(f->fd);
    free(f->entries);
    pthread_mutex_destroy(&f->dir_lock);
    free(f);
}

void pt_file_put(struct vnd_passthrough *p, struct pt_file *f)
{
    bool last;

    pthread_mutex_lock(&p->lock);
    last = put_locked(p, f);
    pthread_mutex_unlock(&p->lock);
    if (last)
        file_free(f);
}

static void take_out(struct vnd_passthrough *p, struct pt_file *f)
{
    p->files[f->slot] = NULL;
    p->free_hint = f->slot;
    ledger_drop(p->ledger, &f->kept_at);
    p->n_files--;
}

void pt_release(struct fs *fs, uint64_t fh)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_file *f;
    bool last = false;

    pthread_mutex_lock(&p->lock);
    f = find_locked(p, fh);
    if (f) {
        take_out(p, f);
        last = put_locked(p, f);
    }
    pthread_mutex_unlock(&p->lock);
    if (last)
        file_free(f);
}

void pt_files_free(struct vnd_passthrough *p)
{
    for (uint32_t i = 0;; i++) {
        struct pt_file *f;
        bool last = false;

        pthread_mutex_lock(&p->lock);
        if (i >= p->n_slots) {
            pthread_mutex_unlock(&p->lock);
            return;
        }
        f = p->files[i];
        if (f) {
            take_out(p, f);
            last = put_locked(p, f);
        }
        pthread_mutex_unlock(&p->lock);
        if (last)
            file_free(f);
    }
}

/* ---- opening */

/* Not O_APPEND: pages of the guest's cache are written back through any file of the inode, each at its place; the
 * write says when it appends. Not O_DIRECT: guest memory has the guest's alignment. */
int pt_open_flags(uint32_t guest)
{
    return (int)guest & (O_ACCMODE | O_TRUNC | O_SYNC | O_DSYNC | O_NOATIME);
}

int pt_open(struct fs *fs, uint64_t ino, uint32_t flags, bool dir, bool kill, uint64_t *fh)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_node *n = pt_node_find(p, ino);
    int fd, rc;
    bool dropped;

    if (!n)
        return -ESTALE;
    if (dir != (n->type == S_IFDIR)) {
        pt_node_put(p, n);
        return dir ? -ENOTDIR : n->type == S_IFDIR ? -EISDIR : -EBADF;
    }
    dropped = kill && (flags & O_TRUNC) && pt_fsetid_drop();
    fd = pt_open_node(p, n, dir ? O_RDONLY | O_DIRECTORY : pt_open_flags(flags));
    pt_fsetid_back(dropped);
    rc = fd < 0 ? fd : pt_file_add(p, n, fd, fh);
    if (rc && fd >= 0)
        close(fd);
    pt_node_put(p, n);
    return rc;
}

/* Closing a duplicate gives the error that closing the file would give (a quota, a network file system). */
int pt_flush(struct fs *fs, uint64_t fh)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_file *f = pt_file_get(p, 0, fh);
    int fd, rc = 0;

    if (!f)
        return -EBADF;
    fd = fcntl(f->fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0)
        rc = errno == EMFILE ? 0 : -errno; /* the guest's flush itself needs no descriptor */
    else if (close(fd))
        rc = -errno;
    pt_file_put(p, f);
    return rc;
}

/* ---- data */

/* A reference to the file, not a descriptor: a guest may have thousands of these queued. */
struct read_ahead {
    struct vnd_passthrough *p;
    struct pt_file *file;
    uint64_t off, len;
};

static void run_read_ahead(void *arg)
{
    struct read_ahead *r = arg;
    char *buf = malloc(r->len);
    uint64_t done = 0;

    while (buf && done < r->len) {
        ssize_t n = pread(r->file->fd, buf, r->len - done, (off_t)(r->off + done));

        if (n <= 0)
            break; /* the request meets the error again and tells it */
        done += (uint64_t)n;
    }
    free(buf);
    pt_file_put(r->p, r->file);
    free(r);
}

static int start_read_ahead(struct vnd_passthrough *p, struct store_wait *w, struct pt_file *f, uint64_t off,
                            uint64_t len)
{
    struct read_ahead *r = malloc(sizeof(*r));
    int rc;

    if (!r)
        return -ENOMEM;
    *r = (struct read_ahead){ p, f, off, len };
    pthread_mutex_lock(&p->lock);
    f->refs++;
    pthread_mutex_unlock(&p->lock);
    rc = pt_run(&p->fs, w, run_read_ahead, r);
    if (rc != -EINPROGRESS) {
        pthread_mutex_lock(&p->lock);
        f->refs--; /* never the last: the caller has one */
        pthread_mutex_unlock(&p->lock);
        free(r);
    }
    return rc;
}

static uint64_t iov_bytes(const struct iovec *iov, int n)
{
    uint64_t bytes = 0;

    for (int i = 0; i < n; i++)
        bytes += iov[i].iov_len;
    return bytes;
}

/* Reads from the page cache: all bytes up to the end of the file, or -EAGAIN. A short read that ends at a page's edge met
 * a page that is missing, or the end of the file: reading one byte more tells which. */
static int64_t read_cached(int fd, const struct fs_io *io, uint64_t want)
{
    int64_t got = preadv2(fd, io->iov, io->n, (off_t)io->off, RWF_NOWAIT);
    struct iovec probe = { .iov_base = (char[1]){ 0 }, .iov_len = 1 };

    if (got < 0)
        return -errno;
    if (got && (uint64_t)got < want && (io->off + (uint64_t)got) % 4096 == 0 &&
        preadv2(fd, &probe, 1, (off_t)io->off + got, RWF_NOWAIT) != 0) {
        return -EAGAIN;
    }
    return got;
}

int64_t pt_read(struct fs *fs, const struct fs_io *io, struct store_wait *w)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_file *f = pt_file_get(p, io->ino, io->fh);
    uint64_t want = iov_bytes(io->iov, io->n);
    int64_t got;

    if (!f)
        return -EBADF;
    got = w ? read_cached(f->fd, io, want) : -EAGAIN;
    /* After RETRY_MAX rounds the pages leave the cache faster than this thread comes for them, so it waits itself. */
    if (got == -EAGAIN && w && w->again < RETRY_MAX) {
        w->again++;
        got = start_read_ahead(p, w, f, io->off, want < READ_AHEAD_BYTES ? want : READ_AHEAD_BYTES);
    }
    if (got == -EAGAIN || got == -EOPNOTSUPP || got == -ENOMEM) {
        got = preadv(f->fd, io->iov, io->n, (off_t)io->off);
        got = got < 0 ? -errno : got;
    }
    pt_file_put(p, f);
    return got;
}

int64_t pt_write(struct fs *fs, const struct fs_io *io)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_file *f = pt_file_get(p, io->ino, io->fh);
    int64_t done;
    bool dropped;

    if (!f)
        return -EBADF;
    dropped = io->kill && pt_fsetid_drop();
    done = pwritev2(f->fd, io->iov, io->n, (off_t)io->off, io->append ? RWF_APPEND : 0);
    if (done < 0)
        done = -errno;
    pt_fsetid_back(dropped);
    pt_file_put(p, f);
    return done;
}

/* Syncs the file systems that the guest was led into, as far as their mounts have a descriptor. */
static int sync_all(struct vnd_passthrough *p)
{
    int fds[SYNC_MOUNTS_MAX], n = 0, error = 0;

    pthread_mutex_lock(&p->lock);
    for (const struct pt_mount *m = p->mounts; m && n < SYNC_MOUNTS_MAX; m = m->next) {
        int fd = m->fd >= 0 ? fcntl(m->fd, F_DUPFD_CLOEXEC, 0) : -1;

        if (fd >= 0)
            fds[n++] = fd;
    }
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < n; i++) {
        if (syncfs(fds[i]))
            error = errno;
        close(fds[i]);
    }
    return error;
}

int pt_sync(struct fs *fs, uint64_t ino, uint64_t fh, bool data_only)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_file *f;
    int rc;

    if (!fh)
        return -sync_all(p);
    f = pt_file_get(p, ino, fh);
    if (!f)
        return -EBADF;
    rc = (data_only ? fdatasync(f->fd) : fsync(f->fd)) ? -errno : 0;
    pt_file_put(p, f);
    return rc;
}

int pt_fallocate(struct fs *fs, uint64_t ino, uint64_t fh, uint32_t mode, uint64_t off, uint64_t len)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_file *f;
    int rc;

    if (off > INT64_MAX || len > INT64_MAX)
        return -EINVAL;
    f = pt_file_get(p, ino, fh);
    if (!f)
        return -EBADF;
    rc = fallocate(f->fd, (int)mode, (off_t)off, (off_t)len) ? -errno : 0;
    pt_file_put(p, f);
    return rc;
}

int64_t pt_copy(struct fs *fs, uint64_t fh_in, uint64_t off_in, uint64_t fh_out, uint64_t off_out, uint64_t len)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_file *in = pt_file_get(p, 0, fh_in), *out = pt_file_get(p, 0, fh_out);
    off_t from = (off_t)off_in, to = (off_t)off_out;
    int64_t done = -EBADF;

    if (in && out) {
        done = copy_file_range(in->fd, &from, out->fd, &to, len < COPY_MAX_BYTES ? len : COPY_MAX_BYTES, 0);
        done = done < 0 ? -errno : done;
        if (done == -ENOSYS)
            done = -EOPNOTSUPP;
    }
    if (in)
        pt_file_put(p, in);
    if (out)
        pt_file_put(p, out);
    return done;
}

int64_t pt_lseek(struct fs *fs, uint64_t ino, uint64_t fh, uint64_t off, uint32_t whence)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_file *f = pt_file_get(p, ino, fh);
    int64_t at;

    if (!f)
        return -EBADF;
    if (f->dir || whence > SEEK_HOLE || off > INT64_MAX) {
        at = -EINVAL; /* the position of an open directory is moved by its listings alone */
    } else {
        at = lseek(f->fd, (off_t)off, (int)whence);
        at = at < 0 ? -errno : at;
    }
    pt_file_put(p, f);
    return at;
}
