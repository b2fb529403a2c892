/* fuse/req.h -- one FUSE request, as a transport and the session share it.
 *
 * What it is: the header and arguments of a request, copied once from what the guest sent, and five functions by which the
 * session reaches the rest of it. The transport never looks into the request; the session never knows where the bytes go.
 * Threads: the transport calls fuse_session_serve on its own thread, and again there when the request was woken. The five
 * functions are called within that call, on that thread. wait.wake alone is called by others.
 * Locks: none.
 * Ownership: the transport owns the struct, from before it is first served until a verdict other than REQ_PARKED. Host
 * addresses of a request's memory are valid until the call returns.
 * It may use store/wait.h and store/store.h. Another transport needs this header and fuse.h alone.
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

/* How far an operation is that must not be done twice, in memory that outlives the process. */
enum req_step { REQ_NOT_BEGUN, REQ_BEGUN, REQ_DONE };
struct req_once {
    uint8_t step; /* enum req_step; written last */
    uint8_t padding;
    uint16_t error; /* of REQ_DONE: 0, or the errno that it ended with */
};

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
    uint32_t args_len;     /* bytes in args */
    uint32_t body_len;     /* all bytes after the in header */
    uint32_t out_cap;      /* bytes of reply space, out header included */
    uint32_t out_len;      /* set by the session: bytes of the reply = used.len = fuse_out_header.len */
    uint32_t session_gen;  /* generation of the session that it belongs to */
    struct req_once *once; /* set by the transport; NULL: nothing outlives the process */
    bool again;            /* set by the transport: a process that died may have served it already */
    int64_t began_us;      /* CLOCK_MONOTONIC when it was first served; the transport sets 0 */
    uint16_t step;         /* SYNCFS: serial of the mount that was synced last; the transport sets 0 */
    const struct req_ops *ops;
    struct store_wait wait; /* links a parked request to the unit it needs */
};

enum req_verdict {
    REQ_REPLY,   /* a reply of out_len bytes stands in the reply area */
    REQ_NOREPLY, /* none is due (FORGET), or there is no room for one: out_len is 0 */
    REQ_PARKED   /* wait is linked; wait.wake will be called once, then serve again */
};

#endif
