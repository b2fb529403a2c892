/* blob/cipher.h -- AES-128-XTS as Nydus encrypts blobs (docs/rafs-format.md 4.7): each chunk, the chunk table and
 * its header are one data unit each, all with the blob's key and tweak.
 */
#ifndef VND_CIPHER_H
#define VND_CIPHER_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CIPHER_KEY_BYTES 32
#define CIPHER_IV_BYTES 16
#define CIPHER_PADDED 18 /* bytes of a unit that held less than 16 */

/* Decrypts len >= 16 bytes, dst may be src. *out_len: bytes without padding. 0, -EBADMSG, -ENOMEM. */
int cipher_decrypt(const uint8_t key[CIPHER_KEY_BYTES], const uint8_t iv[CIPHER_IV_BYTES], const uint8_t *src,
                   size_t len, uint8_t *dst, size_t *out_len);
/* Whether the halves of the key differ, without which there is no XTS. */
bool cipher_key_valid(const uint8_t key[CIPHER_KEY_BYTES]);

#endif
