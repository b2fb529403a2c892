/* passthrough/passthrough.c -- life, attributes and xattrs of the passthrough file system; see passthrough.h. */
#include "passthrough/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/xattr.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "fs/vfs.h"

/* Host files change by themselves. For that long a guest may not see a change. */
#define VALID_MS 1000
#define FILES_MAX (1u << 20)
#define ACL_ACCESS "system.posix_acl_access"
#define ACL_DEFAULT "system.posix_acl_default"

/* The magic link of a descriptor, for calls on xattrs: these know no directory to begin at. It leads to the inode itself,
 * even to that of a symlink. */
static const char *proc_path(char path[32], int fd)
{
    snprintf(path, 32, "/proc/self/fd/%d", fd);
    return path;
}

/* ---- attributes */

static int pt_getattr(struct fs *fs, uint64_t ino, vnd_attr *out)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_ref ref;
    int rc = pt_get(p, ino, &ref);

    if (!rc) {
        rc = pt_fill_attr(ref.node, ref.fd, out);
        pt_put(p, &ref);
    }
    return rc;
}

static int pt_getattr_fh(struct fs *fs, uint64_t ino, uint64_t fh, vnd_attr *out)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_file *f = pt_file_get(p, ino, fh);
    int rc;

    if (!f)
        return -EBADF;
    rc = pt_fill_attr(f->node, f->fd, out);
    pt_file_put(p, f);
    return rc;
}

static int set_size(struct vnd_passthrough *p, struct pt_node *n, struct pt_file *f, const struct fs_setattr *set)
{
    bool dropped;
    int fd, rc;

    if (set->size_bytes > INT64_MAX)
        return -EINVAL;
    if (n->type != S_IFREG)
        return n->type == S_IFDIR ? -EISDIR : -EINVAL;
    fd = f ? f->fd : pt_open_node(p, n, O_WRONLY);
    if (fd < 0)
        return fd;
    dropped = (set->valid & FS_SET_KILL) && pt_fsetid_drop();
    rc = ftruncate(fd, (off_t)set->size_bytes) ? -errno : 0;
    pt_fsetid_back(dropped);
    if (!f)
        close(fd);
    return rc;
}

static struct timespec time_of(uint32_t valid, uint32_t given, uint32_t now, struct timespec t)
{
    if (valid & now)
        t = (struct timespec){ .tv_nsec = UTIME_NOW };
    else if (!(valid & given))
        t = (struct timespec){ .tv_nsec = UTIME_OMIT };
    return t;
}

/* The file capabilities of a node that change of owner or size would take from it. The host takes them as for a plain
 * chown or truncate. The guest's kernel removes them by itself where they are to go, before it asks; where it does not
 * (overlayfs copies an inode up: attributes first, then size and owner) they are to stay, so they are put back. With
 * HANDLE_KILLPRIV_V2 Linux sends FS_SET_KILL with every change of owner (fs/fuse/dir.c: "unconditionally"), so it says
 * nothing there. */
struct caps {
    uint8_t value[XATTR_CAPS_SZ];
    ssize_t len;
};

static void save_caps(const struct pt_ref *ref, const struct fs_setattr *s, struct caps *c)
{
    char path[32];

    c->len = -1;
    if (ref->node->type == S_IFREG &&
        ((s->valid & FS_SET_SIZE) ? !(s->valid & FS_SET_KILL) : (s->valid & (FS_SET_UID | FS_SET_GID)) != 0))
        c->len = getxattr(proc_path(path, ref->fd), XATTR_NAME_CAPS, c->value, sizeof(c->value));
}

static int put_caps_back(const struct pt_ref *ref, const struct caps *c)
{
    char path[32];

    return c->len > 0 && setxattr(proc_path(path, ref->fd), XATTR_NAME_CAPS, c->value, (size_t)c->len, 0) ? -errno : 0;
}

static int set_all(struct vnd_passthrough *p, const struct pt_ref *ref, struct pt_file *f, const struct fs_setattr *s)
{
    struct caps caps;
    char name[12];
    int rc = 0;

    /* Owner before mode: the host clears set-id bits for a new owner. */
    save_caps(ref, s, &caps);
    if (s->valid & (FS_SET_UID | FS_SET_GID)) {
        uid_t uid = s->valid & FS_SET_UID ? s->uid : (uid_t)-1;
        gid_t gid = s->valid & FS_SET_GID ? s->gid : (gid_t)-1;

        rc = fchownat(ref->fd, "", uid, gid, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) ? -errno : 0;
    }
    if (!rc && (s->valid & FS_SET_MODE)) {
        if (ref->node->type == S_IFLNK)
            return -EOPNOTSUPP;
        rc = fchmodat(p->proc_fd, pt_fd_name(name, ref->fd), s->mode & 07777, 0) ? -errno : 0;
    }
    if (!rc && (s->valid & FS_SET_SIZE))
        rc = set_size(p, ref->node, f, s);
    if (!rc)
        rc = put_caps_back(ref, &caps);
    if (!rc && (s->valid & (FS_SET_ATIME | FS_SET_MTIME | FS_SET_ATIME_NOW | FS_SET_MTIME_NOW))) {
        struct timespec t[2] = { time_of(s->valid, FS_SET_ATIME, FS_SET_ATIME_NOW, s->atime),
                                 time_of(s->valid, FS_SET_MTIME, FS_SET_MTIME_NOW, s->mtime) };

        rc = utimensat(ref->fd, "", t, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) ? -errno : 0;
    }
    return rc;
}

static int pt_setattr(struct fs *fs, uint64_t ino, uint64_t fh, const struct fs_setattr *set, vnd_attr *out)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_file *f = fh ? pt_file_get(p, ino, fh) : NULL;
    struct pt_ref ref;
    int rc = fh && !f ? -EBADF : pt_get(p, ino, &ref);

    if (!rc) {
        rc = set_all(p, &ref, f, set);
        if (!rc)
            rc = pt_fill_attr(ref.node, ref.fd, out);
        pt_put(p, &ref);
    }
    if (f)
        pt_file_put(p, f);
    return rc;
}

static int64_t pt_readlink(struct fs *fs, uint64_t ino, char *buf, size_t cap)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_ref ref;
    int64_t n = pt_get(p, ino, &ref);

    if (n)
        return n;
    if (ref.node->type != S_IFLNK) {
        n = -EINVAL;
    } else {
        n = readlinkat(ref.fd, "", buf, cap);
        n = n < 0 ? -errno : (size_t)n == cap && cap < 4096 ? -ERANGE : n;
    }
    pt_put(p, &ref);
    return n;
}

static int pt_statvfs(struct fs *fs, uint64_t ino, struct statvfs *out)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_ref ref;
    int rc = pt_get(p, ino, &ref);

    if (!rc) {
        rc = fstatvfs(ref.fd, out) ? -errno : 0;
        pt_put(p, &ref);
    }
    return rc;
}

static int pt_statfs(struct fs *fs, uint64_t *blocks, uint64_t *files, uint32_t *bsize)
{
    struct statvfs st;
    int rc = pt_statvfs(fs, PT_ROOT_INO, &st);

    if (!rc) {
        *blocks = st.f_blocks;
        *files = st.f_files;
        *bsize = (uint32_t)st.f_bsize;
    }
    return rc;
}

/* ---- xattrs, by their own names */

/* overlayfs of the host would follow these into its lower layers, if the shared directory is or becomes a layer: to data
 * that the guest was not given. An overlayfs in the guest goes on without them, as on a file system that lacks them. */
static bool is_overlay_redirect(const char *name)
{
    static const char prefix[] = "trusted.overlay.", again[] = "overlay.";

    if (strncmp(name, prefix, sizeof(prefix) - 1))
        return false;
    name += sizeof(prefix) - 1;
    while (strncmp(name, again, sizeof(again) - 1) == 0) /* how an overlayfs on overlayfs names its own */
        name += sizeof(again) - 1;
    return strcmp(name, "redirect") == 0 || strcmp(name, "metacopy") == 0;
}

static bool is_acl(const char *name)
{
    return strcmp(name, ACL_ACCESS) == 0 || strcmp(name, ACL_DEFAULT) == 0;
}

static int xattr_result(ssize_t n)
{
    if (n < 0)
        return errno == ENOSYS ? -EOPNOTSUPP : -errno; /* after ENOSYS the guest would never ask again */
    return 0;
}

static int buf_result(ssize_t n, struct fs_buf *out)
{
    if (n < 0)
        return xattr_result(n);
    out->need = (size_t)n;
    return out->cap && out->need > out->cap ? -ERANGE : 0;
}

static int pt_getxattr(struct fs *fs, uint64_t ino, const char *name, size_t len, struct fs_buf *out)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_ref ref;
    char path[32];
    int rc = pt_get(p, ino, &ref);

    if (!rc) {
        rc = buf_result(getxattr(proc_path(path, ref.fd), name, out->at, out->cap), out);
        if (rc == -EOPNOTSUPP && is_acl(name))
            rc = -ENODATA; /* a guest that obeys ACLs takes any other error for a failure of the access itself */
        pt_put(p, &ref);
    }
    return rc;
}

static int pt_listxattr(struct fs *fs, uint64_t ino, struct fs_buf *out)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_ref ref;
    char path[32];
    int rc = pt_get(p, ino, &ref);

    if (!rc) {
        rc = buf_result(listxattr(proc_path(path, ref.fd), out->at, out->cap), out);
        pt_put(p, &ref);
    }
    return rc;
}

/* A mode that comes of an ACL loses its set-group-id bit unless the caller is of the group, as by chmod. */
static bool acl_takes_bits(const struct fs_caller *who, int fd, const char *name)
{
    struct stat st;

    return who->uid && strcmp(name, ACL_ACCESS) == 0 && fstat(fd, &st) == 0 && st.st_gid != who->gid;
}

static int pt_setxattr(struct fs *fs, const struct fs_caller *who, uint64_t ino, const struct fs_xattr *x)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_ref ref;
    char path[32];
    int rc = is_overlay_redirect(x->name) ? -EPERM : pt_get(p, ino, &ref);

    if (!rc) {
        bool dropped = acl_takes_bits(who, ref.fd, x->name) && pt_fsetid_drop();

        rc = xattr_result(setxattr(proc_path(path, ref.fd), x->name, x->value, x->len, (int)x->flags));
        pt_fsetid_back(dropped);
        pt_put(p, &ref);
    }
    return rc;
}

static int pt_removexattr(struct fs *fs, uint64_t ino, const char *name)
{
    struct vnd_passthrough *p = pt_of(fs);
    struct pt_ref ref;
    char path[32];
    int rc = pt_get(p, ino, &ref);

    if (!rc) {
        rc = xattr_result(removexattr(proc_path(path, ref.fd), name));
        pt_put(p, &ref);
    }
    return rc;
}

/* ---- the rest of the table */

static int pt_extents(struct fs *fs, uint64_t ino, uint64_t off, uint32_t len, struct fs_extents *out)
{
    return -EBADF;
}

static uint64_t pt_root(struct fs *fs)
{
    return PT_ROOT_INO;
}

static bool pt_has_xattr(struct fs *fs)
{
    return true;
}

static void pt_forget_op(struct fs *fs, uint64_t ino, uint64_t n)
{
    pt_forget(pt_of(fs), ino, n);
}

static const struct fs_rw_ops pt_rw_ops = {
    .valid_ms = VALID_MS,
    .forget = pt_forget_op,
    .open = pt_open,
    .release = pt_release,
    .flush = pt_flush,
    .getattr = pt_getattr_fh,
    .setattr = pt_setattr,
    .create = pt_create,
    .tmpfile = pt_tmpfile,
    .mknod = pt_mknod,
    .symlink = pt_symlink,
    .link = pt_link,
    .unlink = pt_unlink,
    .rename = pt_rename,
    .read = pt_read,
    .write = pt_write,
    .sync = pt_sync,
    .fallocate = pt_fallocate,
    .copy = pt_copy,
    .lseek = pt_lseek,
    .setxattr = pt_setxattr,
    .removexattr = pt_removexattr,
    .statvfs = pt_statvfs,
    .run = pt_run,
    .note_held = pt_note_held,
    .each_held = pt_each_held,
    .may_wait = pt_may_wait,
};

static const struct fs_ops pt_ops = {
    .name = "passthrough",
    .getattr = pt_getattr,
    .lookup = pt_lookup,
    .readdir = pt_readdir,
    .readlink = pt_readlink,
    .extents = pt_extents,
    .listxattr = pt_listxattr,
    .getxattr = pt_getxattr,
    .statfs = pt_statfs,
    .root = pt_root,
    .has_xattr = pt_has_xattr,
    .rw = &pt_rw_ops,
};

/* ---- life */

void vnd_passthrough_free(vnd_passthrough *p)
{
    if (!p)
        return;
    pt_pool_stop(p);
    pt_files_free(p);
    pt_nodes_free(p);
    if (p->root_fd >= 0)
        close(p->root_fd);
    if (p->proc_fd >= 0)
        close(p->proc_fd);
    ledger_close(p->ledger);
    pthread_mutex_destroy(&p->lock);
    free(p->files);
    free(p->source);
    free(p);
}

vnd_passthrough *vnd_passthrough_new(vnd_engine *e, const char *source, uint32_t flags, char *err, size_t err_len)
{
    struct vnd_passthrough *p = calloc(1, sizeof(*p));
    struct rlimit limit = { 0 };
    int rc;

    if (!p) {
        fail_line(-ENOMEM, err, err_len, "passthrough of %s: out of memory", source);
        return NULL;
    }
    p->fs.ops = &pt_ops;
    p->engine = e;
    p->flags = flags;
    p->source = strdup(source);
    p->fs.label = p->source;
    pthread_mutex_init(&p->lock, NULL);
    getrlimit(RLIMIT_NOFILE, &limit);
    p->kept_max = limit.rlim_cur / 4 < UINT32_MAX ? (uint32_t)(limit.rlim_cur / 4) : UINT32_MAX;
    p->cached_max = limit.rlim_cur / 8 < UINT32_MAX ? (uint32_t)(limit.rlim_cur / 8) + 1 : UINT32_MAX;
    p->cache_max = limit.rlim_cur / 8 < PT_CACHE_MAX ? (uint32_t)(limit.rlim_cur / 8) + 1 : PT_CACHE_MAX;
    p->files_max = limit.rlim_cur / 2 < FILES_MAX ? (uint32_t)(limit.rlim_cur / 2) : FILES_MAX;
    p->root_fd = open(source, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    rc = p->root_fd < 0 ? -errno : 0;
    p->proc_fd = rc ? -1 : open("/proc/self/fd", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (!rc)
        rc = p->proc_fd < 0 ? -errno : !p->source || pt_tables_new(p) ? -ENOMEM : pt_root_open(p);
    if (pt_pool_start(p) && !rc)
        rc = -EAGAIN;
    if (rc) {
        fail_line(rc, err, err_len, "passthrough of %s: %s", source, strerror(-rc));
        vnd_passthrough_free(p);
        return NULL;
    }
    return p;
}

void vnd_passthrough_drop_idle(vnd_passthrough *p)
{
    pt_drop_idle(p, true);
}

void vnd_passthrough_stats_get(vnd_passthrough *p, vnd_passthrough_stats *out)
{
    pthread_mutex_lock(&p->lock);
    *out = (vnd_passthrough_stats){ p->n_nodes, p->n_files, p->n_cached };
    for (const struct pt_mount *m = p->mounts; m; m = m->next)
        out->cached_fds += m->above && m->fd >= 0;
    pthread_mutex_unlock(&p->lock);
}

int vnd_vfs_mount_passthrough(vnd_vfs *v, const char *path, vnd_passthrough *p)
{
    return vfs_mount(v, path, &p->fs);
}
