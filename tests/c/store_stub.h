/* store_stub.h -- so that the tests of the file systems link while csrc has no blob store. Weak: the real one wins. */
#ifndef STORE_STUB_H
#define STORE_STUB_H
#include <string.h>

#include "engine.h"
#include "store.h"

#define WEAK __attribute__((weak))
WEAK struct vnd_blob *blob_get(vnd_store *s, const vnd_blob_info *i, blob_chunks_fn c, void *x, int *cause, char *e,
                               size_t n) { return NULL; }
WEAK void blob_put(struct vnd_blob *b, void *c) { }
WEAK int64_t store_read(struct store_wait *w, const struct extent *e, int n, const struct iovec *iov, int m)
{
    int64_t sum = 0;

    for (int i = 0; i < m; i++) {
        memset(iov[i].iov_base, 0, iov[i].iov_len);
        sum += (int64_t)iov[i].iov_len;
    }
    return sum;
}
WEAK void store_wait_done(struct store_wait *w) { }
WEAK bool store_wait_cancel(struct store_wait *w) { return true; }
WEAK void store_wait_init(struct store_wait *w, void (*k)(struct store_wait *), void *o) { memset(w, 0, sizeof(*w)); }
WEAK int fetcher_new(struct vnd_engine *e) { return 0; }
WEAK void fetcher_shutdown(struct vnd_engine *e) { }
WEAK void fetcher_free(struct vnd_engine *e) { }
WEAK int pool_new(struct vnd_engine *e, uint32_t n) { return 0; }
WEAK void pool_free(struct vnd_engine *e) { }

#endif
