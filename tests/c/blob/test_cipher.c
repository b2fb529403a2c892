/* The cipher of encrypted chunks, AES-128-XTS: what the writer encrypts, the reader decrypts. */
#include <errno.h>
#include <string.h>

#include "blob/cipher.h"
#include "check.h"
#include "vnd.h"

TEST(known_vector)
{
    /* IEEE 1619 vector 2: key 0x11.., tweak key 0x22.., unit 0x3333333333, 32 bytes of 0x44. */
    static const uint8_t want[32] = {
        0xc4, 0x54, 0x18, 0x5e, 0x6a, 0x16, 0x93, 0x6e, 0x39, 0x33, 0x40, 0x38, 0xac, 0xef, 0x83, 0x8b,
        0xfb, 0x18, 0x6f, 0xff, 0x74, 0x80, 0xad, 0xc4, 0x28, 0x93, 0x82, 0xec, 0xd6, 0xd3, 0x94, 0xf0,
    };
    uint8_t key[32], iv[16] = { 0x33, 0x33, 0x33, 0x33, 0x33 }, in[32], out[32];

    memset(key, 0x11, 16);
    memset(key + 16, 0x22, 16);
    memset(in, 0x44, sizeof(in));
    CHECK(vnd_xts_encrypt(key, iv, in, sizeof(in), out) == 0);
    CHECK(memcmp(out, want, sizeof(want)) == 0);
    CHECK(vnd_xts_encrypt(key, iv, in, 15, out) == -EINVAL);
    CHECK(vnd_xts_encrypt(key, iv, in, 17, out) == 0);
}

static void make_key(uint8_t key[32], uint8_t iv[16])
{
    for (int i = 0; i < 32; i++)
        key[i] = (uint8_t)(i * 7);
    for (int i = 0; i < 16; i++)
        iv[i] = (uint8_t)(200 - i);
}

TEST(decrypts_what_encrypt_made)
{
    uint8_t key[32], iv[16], plain[1000], stored[1000], back[1000];
    size_t len = 0;

    make_key(key, iv);
    for (int i = 0; i < 1000; i++)
        plain[i] = (uint8_t)(i * i);
    CHECK_EQ(vnd_xts_encrypt(key, iv, plain, 1000, stored), 0);
    CHECK_EQ(cipher_decrypt(key, iv, stored, 1000, back, &len), 0);
    CHECK(len == 1000 && !memcmp(plain, back, 1000) && memcmp(plain, stored, 1000));
    CHECK_EQ(cipher_decrypt(key, iv, stored, 1000, stored, &len), 0);
    CHECK(!memcmp(plain, stored, 1000));
}

TEST(padding_of_a_short_chunk_is_taken_off)
{
    static const uint8_t short_plain[18] = { 0x61, 0x62, 14, 14, 14, 14, 14, 14,   14,
                                             14,   14,   14, 14, 14, 14, 14, 0x78, 0x90 };
    uint8_t key[32], iv[16], stored[18], back[18];
    size_t len = 0;

    make_key(key, iv);
    CHECK_EQ(vnd_xts_encrypt(key, iv, short_plain, 18, stored), 0);
    CHECK_EQ(cipher_decrypt(key, iv, stored, 18, back, &len), 0);
    CHECK(len == 2 && back[0] == 'a' && back[1] == 'b');
    CHECK_EQ(cipher_decrypt(key, iv, stored, 15, back, &len), -EBADMSG);
}

TEST(a_key_of_two_equal_halves_is_not_valid)
{
    uint8_t key[32], iv[16];

    make_key(key, iv);
    CHECK(cipher_key_valid(key));
    memcpy(key + 16, key, 16);
    CHECK(!cipher_key_valid(key));
}
