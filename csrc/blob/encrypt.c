/* blob/encrypt.c -- AES-128-XTS for writing images; cipher.c decrypts. */
#include "vnd.h"

#include <errno.h>
#include <limits.h>
#include <openssl/evp.h>

int vnd_xts_encrypt(const uint8_t key[32], const uint8_t iv[16], const uint8_t *src, size_t len, uint8_t *dst)
{
    EVP_CIPHER_CTX *ctx;
    int out = 0, tail = 0, ok;

    if (len < 16 || len > INT_MAX)
        return -EINVAL;
    ctx = EVP_CIPHER_CTX_new();
    if (!ctx)
        return -ENOMEM;
    ok = EVP_EncryptInit_ex(ctx, EVP_aes_128_xts(), NULL, key, iv) == 1 &&
         EVP_EncryptUpdate(ctx, dst, &out, src, (int)len) == 1 && EVP_EncryptFinal_ex(ctx, dst + out, &tail) == 1;
    EVP_CIPHER_CTX_free(ctx);
    return ok && (size_t)out + (size_t)tail == len ? 0 : -EIO;
}
