/* vhost/fs.c -- the device kind of virtio-fs: a FUSE session serves its requests. */
#include "vhost/internal.h"

#define REQUEST_BYTES_MAX (4u << 20) /* a FUSE request is 1 MiB and a header */

static enum req_verdict fs_serve(struct queue *q, struct req *r)
{
    return fuse_session_serve(q->session, &q->worker, r);
}

static enum req_verdict fs_fail(struct queue *q, struct req *r, int error)
{
    return fuse_session_fail(q->session, &q->worker, r, error);
}

const struct device_kind kind_fs = {
    .name = "fs",
    .queues_min = 2, /* one is the high priority queue */
    .header_bytes = sizeof(struct fuse_in_header),
    .request_bytes_min = sizeof(struct fuse_in_header),
    .request_bytes_max = REQUEST_BYTES_MAX,
    .serve = fs_serve,
    .fail = fs_fail,
};
