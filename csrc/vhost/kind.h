/* vhost/kind.h -- what a device is: how its requests are read, served and failed. vhost/fs.c and vhost/blk.c each have
 * one; the rest of the folder knows rings and memory alone.
 */
#ifndef VND_KIND_H
#define VND_KIND_H
#include <stdbool.h>
#include <stdint.h>

#include "fuse/req.h"

struct queue;

struct device_kind {
    const char *name;
    uint64_t features;          /* virtio feature bits of its own */
    uint32_t queues_min;        /* of a device */
    uint32_t header_bytes;      /* of a request that go to req.in; what follows goes to req.args */
    uint32_t request_bytes_min; /* readable bytes; a request with fewer fails */
    uint32_t request_bytes_max; /* readable, and writable; a request with more fails */
    bool reply_at_end;          /* an error is told in the last writable byte; else in a fuse_out_header at the start */
    /* On the queue's thread; again for a request that was woken. */
    enum req_verdict (*serve)(struct queue *q, struct req *r);
    /* Writes an error reply if there is room: REQ_REPLY or REQ_NOREPLY. error: positive errno. */
    enum req_verdict (*fail)(struct queue *q, struct req *r, int error);
};

extern const struct device_kind kind_fs, kind_blk;

#endif
