/* fusedev/fusedev.c -- threads of the /dev/fuse transport and what control asks; see fusedev/internal.h. */
#include "fusedev/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "fs/pseudo.h"

#define PAGE 4096u
#define FUSE_DEV_IOC_CLONE _IOR(229, 0, uint32_t)
#define FUSE_NOTIFY_RESEND 7
#define FUSE_NOTIFY_INVAL_INODE 2

static void do_nothing(int number)
{
}

/* A blocked read ends with EINTR only if the signal has a handler. */
static int install_leave_signal(void)
{
    struct sigaction old, mine = { .sa_handler = do_nothing };

    if (sigaction(FUSEDEV_SIGNAL_LEAVE, NULL, &old) != 0)
        return -errno;
    if (old.sa_handler != SIG_DFL)
        return old.sa_handler == do_nothing ? 0 : -EBUSY;
    return sigaction(FUSEDEV_SIGNAL_LEAVE, &mine, NULL) == 0 ? 0 : -errno;
}

static void worker_free(struct fusedev_worker *w)
{
    if (w->dev == NULL)
        return;
    fuse_worker_free(&w->fuse, w->dev->vfs);
    free(w->in);
    if (w->out != NULL)
        free(w->out - (PAGE - sizeof(struct fuse_out_header)));
    if (w->fd >= 0 && w->fd != w->dev->fd)
        close(w->fd);
    free(w->slot);
    w->dev = NULL;
}

static int worker_init(struct vnd_fusedev *d, struct fusedev_worker *w, int fd, bool reads)
{
    uint8_t *out;
    int rc = fuse_worker_init(&w->fuse, d->engine, d->vfs);

    if (rc != 0)
        return rc;
    w->dev = d;
    w->fd = fd;
    out = aligned_alloc(PAGE, PAGE + FUSE_REPLY_MAX);
    if (out == NULL)
        return -ENOMEM;
    w->out = out + PAGE - sizeof(struct fuse_out_header);
    if (!reads)
        return 0;
    w->in = aligned_alloc(PAGE, FUSEDEV_IN_BYTES);
    return w->in == NULL ? -ENOMEM : 0;
}

/* A descriptor of its own on the same connection; the shared one where the kernel has none to give. */
static int clone_fd(struct vnd_fusedev *d)
{
    uint32_t source = (uint32_t)d->fd;
    int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);

    if (fd < 0)
        return d->fd;
    if (ioctl(fd, FUSE_DEV_IOC_CLONE, &source) != 0) {
        close(fd);
        return d->fd;
    }
    return fd;
}

static int start_threads(struct vnd_fusedev *d, uint32_t threads, struct failure *f)
{
    int rc = worker_init(d, &d->finisher, -1, false);

    if (rc == 0)
        atomic_store(&d->finisher.fuse.counters.parked_list, &d->parked);
    if (rc == 0)
        rc = thread_start(&d->finisher.thread, "vnd-fuse-done", fusedev_finisher_main, &d->finisher);
    d->finisher.started = rc == 0;
    for (uint32_t i = 0; i < threads && rc == 0; i++) {
        struct fusedev_worker *w = &d->readers[i];

        rc = worker_init(d, w, d->clones && i > 0 ? clone_fd(d) : d->fd, true);
        if (rc == 0)
            rc = thread_start(&w->thread, "vnd-fuse", fusedev_reader_main, w);
        w->started = rc == 0;
        d->n_readers = i + 1;
    }
    if (rc != 0)
        failure_set(f, rc, VND_CAUSE_IO, "starting %u FUSE threads: %s", threads, strerror(-rc));
    return rc;
}

vnd_fusedev *vnd_fusedev_new(vnd_engine *e, vnd_vfs *v, int fd, uint32_t threads, uint32_t flags, char *err,
                             size_t err_len)
{
    struct {
        struct fuse_out_header h;
    } resend = { { .len = sizeof(resend), .error = FUSE_NOTIFY_RESEND } };
    struct failure f = { 0 };
    struct vnd_fusedev *d;
    int rc = install_leave_signal();

    if (rc != 0) {
        fail_line(0, err, err_len, "signal %d is in use", FUSEDEV_SIGNAL_LEAVE);
        return NULL;
    }
    if (threads < 1 || threads > FUSEDEV_THREADS_MAX) {
        fail_line(0, err, err_len, "%u FUSE threads: 1 to %d are possible", threads, FUSEDEV_THREADS_MAX);
        return NULL;
    }
    d = aligned_alloc(64, (sizeof(*d) + 63) / 64 * 64);
    if (d == NULL) {
        fail_line(0, err, err_len, "FUSE device: out of memory");
        return NULL;
    }
    memset(d, 0, sizeof(*d));
    d->engine = e;
    d->vfs = v;
    d->clones = !(flags & VND_FUSEDEV_SHARED);
    d->deadline_us = (int64_t)e->cfg.read_deadline_ms * 1000;
    parklist_init(&d->parked, &d->finisher.fuse.counters);
    d->session = fuse_session_new(e, v);
    wakelist_open(&d->wakes);
    d->ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    d->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (d->session == NULL || d->wakes.fd < 0 || d->ended_fd < 0 || d->fd < 0) {
        fail_line(0, err, err_len, "FUSE device: out of memory or descriptors");
        vnd_fusedev_free(d);
        return NULL;
    }
    if (flags & VND_FUSEDEV_BACKING)
        d->backing = backing_new(d->fd);
    fuse_session_set_backing(d->session, d->backing);
    fuse_session_keep_root(d->session);
    if (flags & VND_FUSEDEV_RESUME)
        fuse_session_resume(d->session);
    rc = start_threads(d, threads, &f);
    if (rc != 0) {
        failure_tell(&f, rc, NULL, err, err_len);
        vnd_fusedev_free(d);
        return NULL;
    }
    if ((flags & VND_FUSEDEV_RESEND) && write(d->fd, &resend, sizeof(resend)) < 0)
        engine_say(e, VND_LEVEL_WARNING, VND_CAUSE_IO,
                   "the kernel does not send again what the last server left unanswered (%s): "
                   "readers that wait for it hang until the mount is aborted",
                   strerror(errno));
    return d;
}

int vnd_fusedev_ready(vnd_fusedev *d)
{
    return fuse_session_ready(d->session);
}

int vnd_fusedev_root_changed(vnd_fusedev *d)
{
    struct {
        struct fuse_out_header h;
        uint64_t nodeid;
        int64_t off, len; /* off below 0: attributes alone */
    } changed = { { .len = sizeof(changed), .error = FUSE_NOTIFY_INVAL_INODE }, PSEUDO_ROOT_INO, -1, 0 };

    if (!fuse_session_ready(d->session) || write(d->fd, &changed, sizeof(changed)) >= 0 || errno == ENOENT)
        return 0;
    return -errno;
}

int vnd_fusedev_wait(vnd_fusedev *d, int timeout_ms)
{
    struct pollfd wait = { .fd = d->ended_fd, .events = POLLIN };
    int n = poll(&wait, 1, timeout_ms);

    return n > 0 ? 0 : n == 0 || errno == EINTR ? -ETIMEDOUT : -errno;
}

void vnd_fusedev_stop(vnd_fusedev *d)
{
    const struct timespec pause = { .tv_nsec = 200000 };

    atomic_store(&d->stop, true);
    for (uint32_t i = 0; i < d->n_readers; i++) {
        struct fusedev_worker *w = &d->readers[i];

        if (!w->started)
            continue;
        /* A signal that comes just before the read does nothing: again, until it is out. */
        while (!atomic_load(&w->left)) {
            pthread_kill(w->thread, FUSEDEV_SIGNAL_LEAVE);
            nanosleep(&pause, NULL);
        }
        pthread_join(w->thread, NULL);
        w->started = false;
    }
    atomic_store(&d->abandon, true);
    if (d->finisher.started) {
        wakelist_raise(&d->wakes);
        pthread_join(d->finisher.thread, NULL);
        d->finisher.started = false;
    }
    event_raise(d->ended_fd);
}

void vnd_fusedev_free(vnd_fusedev *d)
{
    if (d == NULL)
        return;
    vnd_fusedev_stop(d);
    for (uint32_t i = 0; i < d->n_readers; i++)
        worker_free(&d->readers[i]);
    worker_free(&d->finisher);
    for (struct fusedev_slot *s = d->free, *next; s != NULL; s = next) {
        next = s->next_free;
        free(s);
    }
    fuse_session_free(d->session);
    backing_free(d->backing);
    if (d->fd >= 0)
        close(d->fd);
    wakelist_close(&d->wakes);
    if (d->ended_fd >= 0)
        close(d->ended_fd);
    parklist_destroy(&d->parked);
    free(d);
}
