/* blob/cipher.c -- see cipher.h. */
#include "blob/cipher.h"

#include <errno.h>
#include <limits.h>
#include <openssl/evp.h>
#include <string.h>

#define UNIT_MIN 16u

bool cipher_key_valid(const uint8_t key[CIPHER_KEY_BYTES])
{
    return memcmp(key, key + CIPHER_KEY_BYTES / 2, CIPHER_KEY_BYTES / 2) != 0;
}

int cipher_decrypt(const uint8_t key[CIPHER_KEY_BYTES], const uint8_t iv[CIPHER_IV_BYTES], const uint8_t *src,
                   size_t len, uint8_t *dst, size_t *out_len)
{
    EVP_CIPHER_CTX *ctx;
    int out = 0, tail = 0, ok;

    if (len < UNIT_MIN || len > INT_MAX)
        return -EBADMSG;
    ctx = EVP_CIPHER_CTX_new();
    if (!ctx)
        return -ENOMEM;
    ok = EVP_DecryptInit_ex(ctx, EVP_aes_128_xts(), NULL, key, iv) == 1 &&
         EVP_DecryptUpdate(ctx, dst, &out, src, (int)len) == 1 && EVP_DecryptFinal_ex(ctx, dst + out, &tail) == 1;
    EVP_CIPHER_CTX_free(ctx);
    if (!ok || (size_t)out + (size_t)tail != len)
        return -EBADMSG;
    *out_len = len;
    if (len == CIPHER_PADDED && dst[16] == 0x78 && dst[17] == 0x90 && dst[15] < UNIT_MIN)
        *out_len = UNIT_MIN - dst[15];
    return 0;
}
