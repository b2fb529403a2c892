/* fuse/req.h -- one FUSE request as transports and the session share it.
 *
 * A transport (virtio-fs queue, /dev/fuse) owns the struct, fills in + args from a single copy of what the guest sent,
 * and calls fuse_session_serve on its own thread. It never looks into the request; the session never knows where
 * the bytes go (design law 6). Host addresses of reply memory exist only inside one call (law 11).
 */
#ifndef VND_REQ_H
#define VND_REQ_H
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "fuse/wire.h"
#include "store/store.h"

/* Enough for every argument struct plus two names of 255 (RENAME2: 16 + 2 * 256). Longer bodies (WRITE data, xattr
 * values, BATCH_FORGET lists) are read through in_copy. */
#define REQ_ARGS_MAX 544
/* Reply pages of a 1 MiB read, its header, and an unaligned edge. */
#define REQ_IOV_MAX 264

struct req;

struct req_ops {
    /* Copies request bytes [off, off+len) counted from the end of the in header. 0 or -EFAULT/-EINVAL. A byte that
     * was already copied may have changed since: use the copy. */
    int (*in_copy)(struct req *r, uint32_t off, void *dst, uint32_t len);
    /* Writes reply bytes at [off, off+len), off 0 = first byte of the out header. 0 or -EFAULT. */
    int (*out_copy)(struct req *r, uint32_t off, const void *src, uint32_t len);
    /* Resolves reply bytes [off, off+len) to at most max iovecs, adjacent ones joined. Their number or -EFAULT. Valid
     * until the transport gets control back. */
    int (*out_iov)(struct req *r, uint32_t off, uint32_t len, struct iovec *iov, int max);
    /* Bytes [off, off+len) obtained from out_iov have been written (dirty logging). */
    void (*out_dirty)(struct req *r, uint32_t off, uint32_t len);
    /* Like out_iov, of request bytes that are handed on unread (WRITE data); offsets as in_copy's. NULL: the
     * session copies. */
    int (*in_iov)(struct req *r, uint32_t off, uint32_t len, struct iovec *iov, int max);
};

struct req {
    struct fuse_in_header in;   /* private copy */
    uint8_t args[REQ_ARGS_MAX]; /* private copy of the first args_len bytes after it, always followed by 0 */
    uint8_t args_nul;
    uint32_t args_len;    /* bytes in args */
    uint32_t body_len;    /* all bytes after the in header */
    uint32_t out_cap;     /* bytes of reply space, out header included */
    uint32_t out_len;     /* set by the session: bytes of the reply = used.len = fuse_out_header.len */
    uint32_t session_gen; /* generation of the session that it belongs to */
    int64_t began_us;     /* CLOCK_MONOTONIC when it was first served; the transport sets 0 */
    const struct req_ops *ops;
    struct store_wait wait; /* links a parked request to the unit it needs */
};

enum req_verdict {
    REQ_REPLY,   /* a reply of out_len bytes stands in the reply area */
    REQ_NOREPLY, /* none is due (FORGET), or there is no room for one: out_len is 0 */
    REQ_PARKED   /* wait is linked; wait.wake will be called once, then serve again */
};

#endif
