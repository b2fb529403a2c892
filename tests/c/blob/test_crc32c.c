/* CRC-32C against the vectors of RFC 3720. */
#include <string.h>

#include "check.h"
#include "vnd.h"

TEST(known_values)
{
    uint8_t data[64];

    CHECK(vnd_crc32c((const uint8_t *)"123456789", 9) == 0xE3069283u);
    CHECK(vnd_crc32c(data, 0) == 0);
    memset(data, 0, 32);
    CHECK(vnd_crc32c(data, 32) == 0x8A9136AAu); /* RFC 3720, B.4 */
    memset(data, 0xFF, 32);
    CHECK(vnd_crc32c(data, 32) == 0x62A8AB43u);
    for (int i = 0; i < 32; i++)
        data[i] = (uint8_t)i;
    CHECK(vnd_crc32c(data, 32) == 0x46DD794Eu);
}
