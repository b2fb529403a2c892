/* fuzz_rafs_v5.c -- any bytes as a RAFS v5 bootstrap: told by its first eight, which are given. */
#include "rafs_walk.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char path[32];
    int fd;

    uint8_t *image = malloc(size < 8 ? 8 : size);
    static const uint8_t start[8] = { 'S', 'F', 'A', 'R', 0, 5, 0, 0 };

    memcpy(image, data, size);
    memcpy(image, start, 8);
    fd = img_fd(image, size < 8 ? 8 : size, path);
    walk_image(path, size);
    close(fd);
    free(image);
    return 0;
}
