/* base/hostmount.c -- mount(2) for Python, and mounts attached to no directory; see hostmount.h. */
#include "base/hostmount.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <unistd.h>

#define LOOP_TRIES 16
#define READ_AHEAD_SECTORS 2048ul /* 1 MiB, as for the FUSE mount itself */

int vnd_mount(const char *source, const char *target, const char *type, uint64_t flags, const char *data)
{
    return mount(source, target, type, (unsigned long)flags, data) == 0 ? 0 : -errno;
}

int vnd_umount(const char *target, int flags)
{
    return umount2(target, flags) == 0 ? 0 : -errno;
}

/* A read-only loop device that ends with its last user: its descriptor and number, or -errno. */
static int open_loop(const struct hostmount_part *part, int *number)
{
    struct loop_config config = { .fd = (uint32_t)part->fd };
    int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC), rc = -EBUSY;

    config.info.lo_offset = part->offset;
    config.info.lo_flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR;
    if (control < 0)
        return -errno;
    for (int i = 0; i < LOOP_TRIES && rc == -EBUSY; i++) { /* another process may take the free one first */
        char path[32];
        int fd;

        *number = ioctl(control, LOOP_CTL_GET_FREE);
        if (*number < 0) {
            rc = -errno;
            break;
        }
        snprintf(path, sizeof(path), "/dev/loop%d", *number);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        rc = fd < 0 ? -errno : fd;
        if (fd >= 0 && ioctl(fd, LOOP_CONFIGURE, &config) != 0) {
            rc = -errno;
            close(fd);
        }
    }
    close(control);
    if (rc >= 0)
        ioctl(rc, BLKRASET, READ_AHEAD_SECTORS);
    return rc;
}

static int set_string(int fs, const char *key, int loop)
{
    char path[32];

    snprintf(path, sizeof(path), "/dev/loop%d", loop);
    return fsconfig(fs, FSCONFIG_SET_STRING, key, path, 0) == 0 ? 0 : -errno;
}

static int open_root(int fs)
{
    int mount_fd, rc;

    if (fsconfig(fs, FSCONFIG_SET_FLAG, "ro", NULL, 0) != 0 || fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) != 0)
        return -errno;
    mount_fd =
        fsmount(fs, FSMOUNT_CLOEXEC, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOATIME);
    if (mount_fd < 0)
        return -errno;
    /* fsmount's own descriptor is a mere path, which nothing can be looked up by handle under. */
    rc = openat(mount_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    rc = rc < 0 ? -errno : rc;
    close(mount_fd);
    return rc;
}

int hostmount_erofs(const struct hostmount_part *parts, int n, struct failure *f)
{
    int loops[HOSTMOUNT_PARTS_MAX], opened = 0, rc = 0, number = -1;
    int fs = fsopen("erofs", FSOPEN_CLOEXEC);

    if (fs < 0)
        return failure_set(f, -errno, VND_CAUSE_IO, "this kernel has no EROFS or lets only root mount: %s",
                           strerror(errno));
    for (int i = 0; i < n && rc == 0; i++) {
        int fd = n <= HOSTMOUNT_PARTS_MAX ? open_loop(&parts[i], &number) : -E2BIG;

        if (fd < 0) {
            rc = failure_set(f, fd, VND_CAUSE_IO, "no loop device: %s", strerror(-fd));
            break;
        }
        loops[opened++] = fd;
        rc = set_string(fs, i == 0 ? "source" : "device", number);
        if (rc != 0)
            failure_set(f, rc, VND_CAUSE_IO, "EROFS does not take a device: %s", strerror(-rc));
    }
    if (rc == 0) {
        rc = open_root(fs);
        if (rc < 0)
            failure_set(f, rc, VND_CAUSE_IO, "EROFS does not mount: %s", strerror(-rc));
    }
    close(fs);
    while (opened > 0)
        close(loops[--opened]); /* the mount holds them now; without one they end here */
    return rc;
}
