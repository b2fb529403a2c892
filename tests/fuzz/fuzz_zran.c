/* fuzz_zran.c -- stored contexts of a gzip layer and its bytes: a count and a length, then contexts, dictionaries and
 * gzip data as these cut the input. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "blob/zran.h"

#define OUT_MAX (1u << 20) /* longer ones are only parsed */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *why;
    uint32_t n, dicts;
    struct zran *z, *same;

    if (size < 4)
        return 0;
    n = data[0] & 7;
    dicts = (uint32_t)(data[1] | data[2] << 8);
    data += 4;
    size -= 4;
    if (n * ZRAN_CONTEXT > size || dicts > size - n * ZRAN_CONTEXT)
        return 0;
    z = zran_new(data, n, data + n * ZRAN_CONTEXT, dicts, &why);
    if (!z)
        return 0;
    same = zran_new(data, n, data + n * ZRAN_CONTEXT, dicts, &why);
    if (!same || !zran_equal(z, same) || zran_equal(z, NULL) || !zran_equal(NULL, NULL))
        abort();
    zran_unref(zran_ref(same));
    zran_unref(same);
    data += n * ZRAN_CONTEXT + dicts;
    size -= n * ZRAN_CONTEXT + dicts;
    for (uint32_t i = 0; i < zran_count(z); i++) {
        const struct zran_context *c = zran_at(z, i);
        uint8_t *in, *out;

        if (c->out_len > OUT_MAX || c->in_off > size || c->in_len > size - c->in_off)
            continue;
        in = malloc(c->in_len);
        out = malloc(c->out_len);
        memcpy(in, data + c->in_off, c->in_len);
        zran_decode(z, i, in, out);
        free(in);
        free(out);
    }
    zran_unref(z);
    return 0;
}
