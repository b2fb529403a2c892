/* Takes the syncing of data files out of a process (LD_PRELOAD): what a cache would be that marks chunks durable without
 * having made them so. */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int is_data(int fd)
{
    char link[64], path[4096];
    ssize_t n;

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    n = readlink(link, path, sizeof path - 1);
    if (n < 0)
        return 0;
    path[n] = 0;
    return n > 10 && !strcmp(path + n - 10, ".blob.data");
}

int fdatasync(int fd)
{
    int (*next)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");

    return is_data(fd) ? 0 : next(fd);
}

int sync_file_range(int fd, off_t at, off_t len, unsigned flags)
{
    (void)fd, (void)at, (void)len, (void)flags;
    return 0;
}
