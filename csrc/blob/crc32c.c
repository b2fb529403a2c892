/* blob/crc32c.c -- CRC-32C (polynomial 0x1EDC6F41 reflected, all ones in and out), by the processor where it can. */
#include "vnd.h"

#include <string.h>

#define CRC32C_POLY 0x82F63B78u

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t crc32c_by_cpu(uint32_t crc, const uint8_t *buf, size_t len)
{
    uint64_t wide = crc;

    while (len >= 8) {
        uint64_t word;

        memcpy(&word, buf, 8);
        wide = __builtin_ia32_crc32di(wide, word);
        buf += 8;
        len -= 8;
    }
    crc = (uint32_t)wide;
    while (len--)
        crc = __builtin_ia32_crc32qi(crc, *buf++);
    return crc;
}
#endif

static uint32_t crc32c_by_nibbles(uint32_t crc, const uint8_t *buf, size_t len)
{
    uint32_t table[16];

    for (uint32_t i = 0; i < 16; i++) {
        uint32_t value = i;

        for (int bit = 0; bit < 4; bit++)
            value = value & 1 ? value >> 1 ^ CRC32C_POLY : value >> 1;
        table[i] = value;
    }
    while (len--) {
        crc ^= *buf++;
        crc = crc >> 4 ^ table[crc & 15];
        crc = crc >> 4 ^ table[crc & 15];
    }
    return crc;
}

uint32_t vnd_crc32c(const uint8_t *buf, size_t len)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2"))
        return ~crc32c_by_cpu(0xFFFFFFFFu, buf, len);
#endif
    return ~crc32c_by_nibbles(0xFFFFFFFFu, buf, len);
}
