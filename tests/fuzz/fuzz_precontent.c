/* fuzz_precontent.c -- fanotify events as read(2) gives them: any bytes. */
#include <stdlib.h>
#include <string.h>

#include "precontent/internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *exact = malloc(size ? size : 1); /* a read past it shows under the sanitizer */
    struct precontent_event ev;
    size_t at = 0, n;

    memcpy(exact, data, size);
    while ((n = precontent_parse(exact + at, size - at, &ev)) != 0) {
        if (n < 24 || n > size - at)
            abort();
        at += n;
    }
    free(exact);
    return 0;
}
