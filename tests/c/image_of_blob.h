/* image_of_blob.h -- an image (v6_image.h) whose file's chunks are those of a fixture's blob, with their true digests. */
#ifndef IMAGE_OF_BLOB_H
#define IMAGE_OF_BLOB_H
#include "store_fixture.h"

#include "v6_image.h"

static inline void make_image(struct img *m, struct img_nids *n, const struct fix_blob *b)
{
    img_init(m, 0x1 | 0x8 | 0x10);
    img_32(m, 4096 + 80, 1);
    *n = img_tree(m);
    for (uint32_t k = 0; k < m->records; k++) {
        uint32_t at = IMG_CHUNKS_OFF + 80 * k;
        const struct blob_chunk *c = &b->chunk[k + 3];

        memcpy(m->b + at, c->digest, 32);
        img_32(m, at + 40, c->csize);
        img_32(m, at + 44, c->usize);
        img_64(m, at + 48, c->coff);
    }
}

#endif
