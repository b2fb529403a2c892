/* blob/id.c -- see blob/chunk.h. */
#include "blob/chunk.h"

#include <string.h>

bool blob_id_valid(const char *id)
{
    size_t n = strspn(id, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-");

    return n > 0 && n <= VND_ID_MAX && !id[n];
}
