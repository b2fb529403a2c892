/* fuzz_toc.c -- any bytes as a data blob that is read from its end. Tar headers have a checksum that nothing would
 * find: the first byte says whether it is set right. */
#include "rafs_walk.h"

#define HEADER 512

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *blob, *h;
    char path[32];
    uint32_t sum = 0;
    int fd;

    if (size < 1 + HEADER)
        return 0;
    blob = malloc(size - 1);
    memcpy(blob, data + 1, size - 1);
    h = blob + size - 1 - HEADER;
    if (data[0] & 1) {
        memset(h + 148, ' ', 8);
        for (int i = 0; i < HEADER; i++)
            sum += h[i];
        for (int i = 0; i < 6; i++)
            h[153 - i] = (uint8_t)('0' + (sum >> 3 * i & 7));
        h[154] = 0;
    }
    fd = img_fd(blob, size - 1, path);
    walk_image(path, size);
    close(fd);
    free(blob);
    return 0;
}
