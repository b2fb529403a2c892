/* What a session leaves for the next process, torn and foreign memory. */
#include "check.h"

#include <stddef.h>
#include <string.h>

#include "fuse/kept.h"

TEST(kept)
{
    struct fuse_kept k = { 0 }, good;

    CHECK(!fuse_kept_is_ready(&k));
    fuse_kept_write(&k, &(struct fuse_kept){ .ready = 1, .minor = 38, .flags = 5 });
    CHECK(fuse_kept_is_ready(&k) && k.minor == 38 && k.flags == 5);
    good = k;
    for (size_t i = 0; i < sizeof(k); i++) { /* each byte is looked at */
        k = good;
        ((uint8_t *)&k)[i] ^= 1;
        if (i < offsetof(struct fuse_kept, seq) || i >= offsetof(struct fuse_kept, ready))
            CHECK(!fuse_kept_is_ready(&k));
    }
    k = good;
    k.seq |= 1; /* died while it wrote */
    CHECK(!fuse_kept_is_ready(&k));
    k = good;
    fuse_kept_write(&k, &(struct fuse_kept){ 0 });
    CHECK(!fuse_kept_is_ready(&k));
}
