/* rafs/seek.c -- where a file has data and where holes (SEEK_DATA, SEEK_HOLE), in whole chunks.
 *
 * A file of v6 has no holes on disk: a hole is a chunk of zeroes. Such a chunk is told by its digest, which is that of as
 * many zeroes, so nothing is read. The chunks with that digest are searched for once, when an image is first asked.
 */
#include <errno.h>
#include <stdlib.h>

#include "blob/codec.h"
#include "rafs/internal.h"

/* Of a deduplicated image there is one for each blob; what is beyond the bound is taken for data. */
#define ZEROES_MAX 4096u
/* Chunks that one call looks at; what follows is taken for data. */
#define LOOK_MAX (1u << 20)
#define CHUNK_BITS_MIN 12u

/* BLAKE3 of 2^12 to 2^24 zero bytes. */
static const char blake3_zeroes[][2 * CODEC_DIGEST_BYTES + 1] = {
    "b6fb73fc46938c981e2b0b4b1ef282adcfc89854d01bfe3972fdc4785b41b2c7",
    "128daa44a4f7badaed2244bb6fe009d5e7803177414e01d7d9df80c190e14906",
    "111f6c2f2ac0fc43154414a6e3e4c104cb04907e9453d3ac85cc5f55cc015b48",
    "ac169ead597dac88b2d7223edd85c9895392532cfc7a3c5c29a3fbe3ccba37f2",
    "3bdeaf8f8e98780b318106aafdc3ca257f73df123d97b69112b26044c91a7d56",
    "33badd2c738dbf1cbeebf3279bf6da04ee43995276f786ef8dd30fb708f16e95",
    "86bb2b521a10612d5a1d38204fac4fa632466d1866144d8a6a7e3afc050ce7ae",
    "934d6b7aea5a339a9e858430cca7ac455d3537e70fd2b302931cc93b25e1df9a",
    "488de202f73bd976de4e7048f4e1f39a776d86d582b7348ff53bf432b987fca8",
    "8ac83f8ce09d064b023ab3c15880b02f2686cd1817fd25915b8153316ee059f8",
    "04e52cd2da6a0e1f338b0078369130d96585c1de65057da5dd1283b12fb853e1",
    "27ddc0a1d824fa6befe0596ddc0136fc4a1dc060d526800851f87498768b755c",
    "b4834959bc889fed1abf3c45d5da0e384134386a4b2786cc5dbb9fe8fa853bbb",
};

struct zeroes {
    struct vnd_rafs *r;
    uint8_t digests[2][CODEC_DIGEST_BYTES]; /* by codec_digest: of a whole chunk */
};

static void read_hex(const char *hex, uint8_t out[CODEC_DIGEST_BYTES])
{
    static const char digits[] = "0123456789abcdef";

    for (int i = 0; i < CODEC_DIGEST_BYTES; i++)
        out[i] = (uint8_t)((strchr(digits, hex[2 * i]) - digits) << 4 | (strchr(digits, hex[2 * i + 1]) - digits));
}

static int put_zeroes(void *ctx, uint64_t number, uint32_t blob, const struct blob_chunk *c)
{
    struct zeroes *z = ctx;
    struct vnd_rafs *r = z->r;

    if (blob < r->info.blob_count && c->usize == r->info.chunk_size_bytes &&
        memcmp(c->digest, z->digests[r->blobs[blob].info.digester == CODEC_SHA256], CODEC_DIGEST_BYTES) == 0) {
        r->zeroes[r->zero_count++] = (uint64_t)blob << 32 | c->index;
    }
    return r->zero_count >= ZEROES_MAX;
}

static int compare(const void *a, const void *b)
{
    uint64_t x, y;

    memcpy(&x, a, sizeof(x));
    memcpy(&y, b, sizeof(y));
    return (x > y) - (x < y);
}

/* Finds the chunks of zeroes, once. 0 or -ENOMEM. */
static int find_zeroes(struct vnd_rafs *r)
{
    struct zeroes z = { .r = r };
    uint8_t *chunk;
    int rc = 0;

    if (atomic_load_explicit(&r->zeroes_known, memory_order_acquire))
        return 0;
    pthread_mutex_lock(&r->index_lock);
    if (!r->zeroes) {
        chunk = calloc(1, r->info.chunk_size_bytes);
        r->zeroes = chunk ? malloc(ZEROES_MAX * sizeof(*r->zeroes)) : NULL;
        rc = r->zeroes ? 0 : -ENOMEM;
        if (!rc && codec_sha256(chunk, r->info.chunk_size_bytes, z.digests[CODEC_SHA256]) == 0) {
            read_hex(blake3_zeroes[r->chunk_bits - CHUNK_BITS_MIN], z.digests[CODEC_BLAKE3]);
            r->version->records(r, UINT32_MAX, put_zeroes, &z);
            qsort(r->zeroes, r->zero_count, sizeof(*r->zeroes), compare);
        }
        free(chunk);
        atomic_store_explicit(&r->zeroes_known, rc == 0, memory_order_release);
    }
    pthread_mutex_unlock(&r->index_lock);
    return rc;
}

static bool is_hole(const struct vnd_rafs *r, const struct extent *x)
{
    uint64_t key;
    uint32_t k = 0;

    if (!x->blob)
        return true;
    if (!r->zero_count)
        return false;
    while (k < r->info.blob_count && r->blobs[k].blob != x->blob)
        k++;
    key = (uint64_t)k << 32 | x->chunk;
    return bsearch(&key, r->zeroes, r->zero_count, sizeof(key), compare) != NULL;
}

int64_t rafs_seek(struct fs *fs, uint64_t ino, uint64_t off, bool hole)
{
    struct vnd_rafs *r = (struct vnd_rafs *)fs;
    struct extent ext[64];
    struct fs_extents x = { ext, 64, 0 };
    uint64_t at = off;
    int n, rc = find_zeroes(r);

    for (uint32_t looked = 0; !rc && looked < LOOK_MAX; looked += (uint32_t)n) {
        n = fs->ops->extents(fs, ino, at, 1u << 30, &x);
        if (n < 0)
            return n;
        if (n == 0)
            return hole ? (int64_t)at : -ENXIO; /* the end, which is a hole */
        for (int i = 0; i < n; i++) {
            if (is_hole(r, &ext[i]) == hole)
                return (int64_t)at;
            at += ext[i].len;
        }
    }
    return rc ? rc : hole ? INT64_MAX : (int64_t)at;
}
