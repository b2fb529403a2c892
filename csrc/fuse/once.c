/* fuse/once.c -- operations that must not be done twice, though their request is served again by the next process.
 *
 * How far an operation is stands in memory that outlives the process: begun before the call to the host, done with its result
 * after it. What was done is answered with that result. What was begun is called again, and what the host then says is read
 * as what it says after success: a name that was to be made is there, one that was to go is gone. Between "begun" and the call
 * to the host lie microseconds: a process that dies there with a name that was there before is answered wrongly, with success.
 */
#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "fuse/internal.h"

/* Only a process that dies between two stores would see them out of order, and its memory is this machine's. */
static void keep_order(void)
{
    atomic_signal_fence(memory_order_seq_cst);
}

/* Success of these has no payload, so there is nothing left to do for what was done. */
static bool answers_nothing(uint32_t opcode)
{
    switch (opcode) {
    case FUSE_OP_UNLINK:
    case FUSE_OP_RMDIR:
    case FUSE_OP_RENAME:
    case FUSE_OP_RENAME2:
    case FUSE_OP_SETXATTR:
    case FUSE_OP_REMOVEXATTR: return true;
    default: return false;
    }
}

enum req_verdict fuse_once(struct fuse_call *c)
{
    struct req_once *once = c->r->once;
    enum req_verdict verdict;

    if (!once)
        return c->once(c);
    c->before = c->r->again && once->step <= REQ_DONE ? once->step : REQ_NOT_BEGUN;
    if (c->before == REQ_DONE && once->error)
        return fuse_reply_error(c, once->error);
    if (c->before == REQ_DONE && answers_nothing(c->r->in.opcode))
        return fuse_reply(c, NULL, 0);
    if (c->before != REQ_DONE) {
        once->step = REQ_BEGUN;
        keep_order();
    }
    verdict = c->once(c);
    if (verdict != REQ_PARKED) {
        once->error = c->error;
        keep_order();
        once->step = REQ_DONE;
    }
    return verdict;
}

int fuse_made_before(struct fuse_call *c, int rc, const char *name, vnd_attr *attr)
{
    if (rc != -EEXIST || c->before == REQ_NOT_BEGUN)
        return rc;
    return c->node.fs->ops->lookup(c->node.fs, c->node.ino, name, strlen(name), attr);
}

int fuse_gone_before(const struct fuse_call *c, int rc, int gone)
{
    return rc == gone && c->before != REQ_NOT_BEGUN ? 0 : rc;
}

bool fuse_was_appended(struct fuse_call *c, uint64_t fh, const struct iovec *iov, int n, uint32_t len)
{
    uint8_t part[4096];
    uint64_t off, done = 0;
    vnd_attr attr;

    if (c->before == REQ_DONE)
        return true;
    if (c->before != REQ_BEGUN || fuse_rw_of(c)->getattr(c->node.fs, c->node.ino, fh, &attr) || attr.size_bytes < len)
        return false;
    off = attr.size_bytes - len;
    for (int i = 0; i < n; i++)
        for (size_t at = 0; at < iov[i].iov_len;) {
            size_t want = iov[i].iov_len - at < sizeof(part) ? iov[i].iov_len - at : sizeof(part);
            struct iovec to = { part, want };
            struct fs_io io = { .ino = c->node.ino, .fh = fh, .off = off + done, .iov = &to, .n = 1 };

            if (fuse_rw_of(c)->read(c->node.fs, &io, NULL) != (int64_t)want ||
                memcmp(part, (const uint8_t *)iov[i].iov_base + at, want) != 0)
                return false;
            at += want;
            done += want;
        }
    return true;
}
