/* fake_req.h -- a transport of one request at a time: private buffers, reply memory exactly as long as told, so
 * that a sanitizer sees every byte too many. */
#ifndef FAKE_REQ_H
#define FAKE_REQ_H
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fuse/fuse.h"

struct fake_req {
    struct req r;        /* first */
    uint8_t *body, *out; /* body_len, out_cap bytes */
    uint32_t dirty;      /* bytes reported as written through iovecs */
};

static int fake_in_copy(struct req *r, uint32_t off, void *dst, uint32_t len)
{
    struct fake_req *f = (struct fake_req *)r;

    if (off > r->body_len || len > r->body_len - off)
        return -EINVAL;
    memcpy(dst, f->body + off, len);
    return 0;
}

static int fake_out_copy(struct req *r, uint32_t off, const void *src, uint32_t len)
{
    struct fake_req *f = (struct fake_req *)r;

    if (off > r->out_cap || len > r->out_cap - off)
        return -EFAULT;
    memcpy(f->out + off, src, len);
    return 0;
}

/* Two pieces, so that no code counts on one. */
static int fake_out_iov(struct req *r, uint32_t off, uint32_t len, struct iovec *iov, int max)
{
    struct fake_req *f = (struct fake_req *)r;

    if (off > r->out_cap || len > r->out_cap - off || max < 2)
        return -EFAULT;
    iov[0] = (struct iovec){ f->out + off, len / 2 };
    iov[1] = (struct iovec){ f->out + off + len / 2, len - len / 2 };
    return 2;
}

static void fake_out_dirty(struct req *r, uint32_t off, uint32_t len)
{
    ((struct fake_req *)r)->dirty += len;
}

static const struct req_ops fake_ops = { fake_in_copy, fake_out_copy, fake_out_iov, fake_out_dirty };

static void fake_wake(struct store_wait *w)
{
}

static inline void fake_fill(struct fake_req *f, uint32_t opcode, uint64_t nodeid, const void *body, uint32_t body_len,
                             uint32_t out_cap)
{
    memset(f, 0, sizeof(*f));
    f->body = malloc(body_len ? body_len : 1);
    f->out = malloc(out_cap ? out_cap : 1);
    memset(f->out, 0xee, out_cap);
    if (body_len)
        memcpy(f->body, body, body_len);
    f->r.in = (struct fuse_in_header){ .len = 40 + body_len, .opcode = opcode, .unique = 77, .nodeid = nodeid };
    f->r.body_len = body_len;
    f->r.args_len = body_len < REQ_ARGS_MAX ? body_len : REQ_ARGS_MAX;
    memcpy(f->r.args, f->body, f->r.args_len);
    f->r.out_cap = out_cap;
    f->r.ops = &fake_ops;
    store_wait_init(&f->r.wait, fake_wake, f);
}

static inline void fake_done(struct fake_req *f)
{
    free(f->body);
    free(f->out);
}

#endif
