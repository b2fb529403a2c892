/* fuzz_rafs.c -- any bytes as an image; its kept corpus is of RAFS v6. */
#include "rafs_walk.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char path[32];
    int fd;

    fd = img_fd(data, size, path);
    walk_image(path, size);
    close(fd);
    return 0;
}
