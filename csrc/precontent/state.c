/* precontent/state.c -- kernel objects (group, clones, marks), events as bytes, the shared state, and refusing all that
 * waits. See precontent/state.h. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "precontent/internal.h"

#define STATE_MAGIC "VNDPREC\1"
#define CLASS_PRE_CONTENT 0x8u
#define METADATA_BYTES 24u
#define METADATA_VERSION 3
#define INFO_RANGE 6
#define INFO_RANGE_BYTES 24u
#ifndef OPEN_TREE_CLONE
#define OPEN_TREE_CLONE 1u
#endif

int vnd_precontent_group(void)
{
    /* The queue must have no limit: what does not fit into it is let through. */
    int fd = fanotify_init(CLASS_PRE_CONTENT | FAN_CLOEXEC | FAN_NONBLOCK | FAN_UNLIMITED_QUEUE | FAN_UNLIMITED_MARKS,
                           O_RDONLY | O_LARGEFILE | O_CLOEXEC);

    return fd < 0 ? -errno : fd;
}

int vnd_precontent_clone(const char *path)
{
    long fd = syscall(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | O_CLOEXEC);

    return fd < 0 ? -errno : (int)fd;
}

int vnd_precontent_mark(int group_fd, int clone_fd, int reads)
{
    char path[40];
    int rc;

    snprintf(path, sizeof path, "/proc/self/fd/%d", clone_fd);
    if (reads)
        rc = fanotify_mark(group_fd, FAN_MARK_ADD | FAN_MARK_MOUNT,
                           PRECONTENT_ACCESS | PRECONTENT_OPEN | PRECONTENT_CLOSE, AT_FDCWD, path);
    else
        rc = fanotify_mark(group_fd, FAN_MARK_REMOVE | FAN_MARK_MOUNT, PRECONTENT_ACCESS, AT_FDCWD, path);
    return rc ? -errno : 0;
}

/* ---------------------------------------------------------------- events as bytes */

static uint16_t get16(const uint8_t *p)
{
    uint16_t v;

    memcpy(&v, p, sizeof v);
    return v;
}

static uint64_t get64(const uint8_t *p)
{
    uint64_t v;

    memcpy(&v, p, sizeof v);
    return v;
}

size_t precontent_parse(const uint8_t *buf, size_t len, struct precontent_event *out)
{
    uint32_t event_len, at;

    if (len < METADATA_BYTES)
        return 0;
    memcpy(&event_len, buf, sizeof event_len);
    at = get16(buf + 6);
    if (event_len < METADATA_BYTES || event_len > len || buf[4] != METADATA_VERSION || at < METADATA_BYTES ||
        at > event_len)
        return 0;
    *out = (struct precontent_event){ .mask = get64(buf + 8), .count = UINT64_MAX };
    memcpy(&out->fd, buf + 16, sizeof out->fd);
    while (event_len - at >= 4) { /* records: type, a byte of nothing, length */
        uint32_t info_len = get16(buf + at + 2);
        if (info_len < 4 || info_len > event_len - at)
            return 0;
        if (buf[at] == INFO_RANGE) {
            if (info_len < INFO_RANGE_BYTES)
                return 0;
            out->offset = get64(buf + at + 8);
            out->count = get64(buf + at + 16);
        }
        at += info_len;
    }
    return event_len;
}

/* ---------------------------------------------------------------- shared state */

int vnd_precontent_state(void)
{
    int fd = memfd_create("vnd-precontent", MFD_CLOEXEC);

    if (fd < 0)
        return -errno;
    if (ftruncate(fd, sizeof(struct precontent_state)) || pwrite(fd, STATE_MAGIC, 8, 0) != 8) {
        close(fd);
        return -ENOMEM;
    }
    return fd;
}

struct precontent_state *precontent_state_map(int fd)
{
    struct precontent_state *s;
    struct stat st;

    if (fstat(fd, &st) || (size_t)st.st_size != sizeof *s)
        return NULL;
    s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (s == MAP_FAILED)
        return NULL;
    if (memcmp(s->magic, STATE_MAGIC, 8)) {
        munmap(s, sizeof *s);
        return NULL;
    }
    return s;
}

void precontent_answer(int group_fd, int fd, uint32_t response)
{
    struct fanotify_response r = { .fd = fd, .response = response };
    ssize_t n;

    do
        n = write(group_fd, &r, sizeof r);
    while (n < 0 && errno == EINTR);
    /* ENOENT: a predecessor has answered it, and died before it noted that. */
}

bool precontent_count(struct precontent_state *s, uint64_t mask)
{
    if (mask & PRECONTENT_OPEN)
        atomic_fetch_add(&s->opens, 1);
    if (mask & PRECONTENT_CLOSE && atomic_fetch_sub(&s->opens, 1) <= 1)
        atomic_store(&s->ended, 1);
    return atomic_load(&s->ended) != 0;
}

int vnd_precontent_ended(vnd_precontent *p)
{
    return atomic_load(&p->state->ended) != 0;
}

void vnd_precontent_set_ended(vnd_precontent *p)
{
    atomic_store(&p->state->ended, 1);
}

int vnd_precontent_reserve(int state_fd)
{
    struct precontent_state *s = precontent_state_map(state_fd);
    struct precontent_event ev;
    size_t at = 0, n;
    int taken = 0;

    if (!s)
        return -EINVAL;
    while ((n = precontent_parse(s->buffer + at, sizeof s->buffer - at, &ev)) != 0) {
        bool known = !(ev.mask & PRECONTENT_ACCESS);
        at += n;
        for (uint32_t i = 0; i < PRECONTENT_SLOTS && !known; i++)
            known = atomic_load(&s->slots[i].waits) && s->slots[i].fd == ev.fd;
        for (uint32_t i = 0; i < PRECONTENT_SLOTS && !known; i++)
            if (!atomic_load(&s->slots[i].waits)) {
                precontent_fill(&s->slots[i], &ev, PRECONTENT_ANY_BLOB);
                known = true;
            }
        precontent_count(s, ev.mask);
    }
    memset(s->buffer, 0, sizeof s->buffer);
    for (uint32_t i = 0; i < PRECONTENT_SLOTS; i++) {
        struct precontent_slot *slot = &s->slots[i];
        if (!atomic_load(&slot->waits))
            continue;
        slot->held = fcntl(slot->fd, F_GETFD) < 0 && errno == EBADF && dup3(state_fd, slot->fd, O_CLOEXEC) >= 0;
        taken++;
    }
    munmap(s, sizeof *s);
    return taken;
}

void precontent_fill(struct precontent_slot *slot, const struct precontent_event *ev, uint32_t blob)
{
    slot->fd = ev->fd;
    slot->held = 1;
    slot->blob = blob;
    slot->offset = ev->offset;
    slot->count = ev->count;
    atomic_store(&slot->waits, 1);
}

static int refuse_buffer(struct vnd_precontent *p)
{
    struct precontent_state *s = p->state;
    struct precontent_event ev;
    size_t at = 0, n;
    int refused = 0;

    while ((n = precontent_parse(s->buffer + at, sizeof s->buffer - at, &ev)) != 0) {
        at += n;
        if (ev.mask & PRECONTENT_ACCESS) {
            precontent_answer(p->group_fd, ev.fd, PRECONTENT_DENY(EIO));
            refused++;
        }
        precontent_count(s, ev.mask);
    }
    memset(s->buffer, 0, sizeof s->buffer);
    return refused;
}

int vnd_precontent_refuse(vnd_precontent *p)
{
    struct precontent_state *s = p->state;
    struct precontent_event ev;
    int refused = refuse_buffer(p);

    for (uint32_t i = 0; i < PRECONTENT_SLOTS; i++)
        if (atomic_load(&s->slots[i].waits)) {
            precontent_answer(p->group_fd, s->slots[i].fd, PRECONTENT_DENY(EIO));
            atomic_store(&s->slots[i].waits, 0);
            refused++;
        }
    /* From here on a number can stand for no other event. */
    while (read(p->group_fd, s->buffer, sizeof s->buffer) > 0) {
        int fds[2] = { -1, -1 };
        size_t at = 0, n;
        for (int i = 0; i < 2 && (n = precontent_parse(s->buffer + at, sizeof s->buffer - at, &ev)) != 0; i++) {
            fds[i] = ev.fd;
            at += n;
        }
        refused += refuse_buffer(p);
        for (int i = 0; i < 2; i++)
            if (fds[i] >= 0)
                close(fds[i]);
    }
    return refused;
}

/* STATX_MNT_ID_UNIQUE of Linux 6.8 */
#define MOUNT_ID_UNIQUE 0x4000u

int64_t vnd_mount_id(const char *path)
{
    struct statx sx;

    if (statx(AT_FDCWD, path, AT_NO_AUTOMOUNT, MOUNT_ID_UNIQUE, &sx))
        return -errno;
    return sx.stx_mask & MOUNT_ID_UNIQUE ? (int64_t)sx.stx_mnt_id : -EOPNOTSUPP;
}
