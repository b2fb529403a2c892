/* blob/zran.h -- random access into a gzip file by stored contexts (docs/rafs-format.md 4.6). A context tells where
 * in the file inflating may start, with which window and left-over bits, and how many bytes come out.
 */
#ifndef VND_ZRAN_H
#define VND_ZRAN_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ZRAN_OUT_MAX (16u << 20) /* bytes that one context gives at most */
#define ZRAN_WINDOW 32768u       /* deflate's: a dictionary is not longer */
#define ZRAN_CONTEXT 40u         /* bytes stored */

struct zran_context {
    uint64_t in_off; /* in the gzip file */
    uint32_t in_len, out_len;
    uint64_t dict_off; /* in struct zran's dicts */
    uint32_t dict_len;
    uint8_t byte, bits; /* the byte before in_off, and how many of its bits belong to it */
    uint16_t pad;       /* 0: contexts are compared as bytes */
};

struct zran; /* the contexts of one blob; immutable, counted */

/* Takes n stored contexts and the dictionaries behind them, all checked. NULL with *why (static text), *why NULL: no
 * memory. */
struct zran *zran_new(const uint8_t *stored, uint32_t n, const uint8_t *dicts, size_t dicts_len, const char **why);
struct zran *zran_ref(struct zran *z);
void zran_unref(struct zran *z);
bool zran_equal(const struct zran *a, const struct zran *b); /* either may be NULL */
uint32_t zran_count(const struct zran *z);
/* All contexts, one behind the other, and all dictionaries, of *len bytes. */
const uint8_t *zran_dicts(const struct zran *z, size_t *len);
const struct zran_context *zran_at(const struct zran *z, uint32_t i);
/* Inflates context i: src holds its in_len bytes, dst takes its out_len. 0, -EBADMSG, -ENOMEM. */
int zran_decode(const struct zran *z, uint32_t i, const uint8_t *src, uint8_t *dst);

#endif
