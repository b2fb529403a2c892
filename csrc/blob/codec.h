/* blob/codec.h -- decoding one chunk, and SHA-256. Stateless towards the caller; a context may be kept to save
 * allocations. */
#ifndef VND_CODEC_H
#define VND_CODEC_H
#include <stddef.h>
#include <stdint.h>

/* docs/rafs-format.md 5 */
enum codec_id { CODEC_NONE = 0, CODEC_LZ4_BLOCK = 1, CODEC_GZIP = 2, CODEC_ZSTD = 3 };
enum codec_digest { CODEC_BLAKE3 = 0, CODEC_SHA256 = 1 };

#define CODEC_DIGEST_BYTES 32

struct codec; /* reusable state of one thread or job */

struct codec *codec_new(void);
void codec_free(struct codec *c);
int codec_known(uint32_t id);
/* Decodes src into exactly dst_len bytes. 0, -EBADMSG (anything but exactly that many bytes, or a damaged source),
 * -ENOTSUP (unknown codec), -ENOMEM. Never writes past dst_len. */
int codec_decode(struct codec *c, uint32_t id, const uint8_t *src, size_t src_len, uint8_t *dst, size_t dst_len);
/* 0 or -EIO. */
int codec_sha256(const void *src, size_t len, uint8_t out[CODEC_DIGEST_BYTES]);

#endif
