/* vhost/blk.c -- the device kind of virtio-blk (virtio 1.2, 5.2): sectors of a disk (disk/disk.h), read-only.
 *
 * A request is a header of 16 bytes, the data, and one status byte at the very end of what the device may write. Each part may
 * be cut into descriptors anywhere. A read is served in pieces: req.step counts the sectors that are in the guest's memory.
 */
#include <errno.h>
#include <string.h>

#include "disk/disk.h"
#include "vhost/internal.h"

/* Requests and their status, virtio 1.2, 5.2.6. */
enum { T_IN = 0, T_FLUSH = 4, T_GET_ID = 8, T_OUT = 1, T_DISCARD = 11, T_WRITE_ZEROES = 13, T_SECURE_ERASE = 14 };
enum { S_OK = 0, S_IOERR = 1, S_UNSUPP = 2 };

#define F_SEG_MAX (1ull << 2)
#define F_RO (1ull << 5)
#define F_BLK_SIZE (1ull << 6)
#define F_FLUSH (1ull << 9)
#define F_TOPOLOGY (1ull << 10)
#define F_MQ (1ull << 12)

/* Linux asks for 1 to 4 MiB at most. The sectors of this many bytes fit req.step. */
#define REQUEST_BYTES_MAX (16u << 20)
#define PIECE_BYTES (1u << 20) /* what a thread reads before it looks at the next piece: as FUSE's largest read */

struct blk_header {
    uint32_t type, ioprio;
    uint64_t sector;
};

static void count(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n, memory_order_relaxed);
}

/* Ends the request. written: bytes from the start of the data that were written, with the status all there are. */
static enum req_verdict end(struct queue *q, struct req *r, uint8_t status, uint32_t written)
{
    bool full = written + 1 == r->out_cap;

    store_wait_done(&r->wait);
    r->out_len = 0;
    if (r->out_cap == 0 || r->ops->out_copy(r, r->out_cap - 1, &status, 1) != 0)
        return REQ_NOREPLY;
    /* What stands before used.len must have been written; on an error only the last byte was. */
    r->out_len = full ? r->out_cap : 0;
    count(&q->worker.counters.fuse_requests, 1);
    if (status == S_IOERR)
        count(&q->worker.counters.fuse_errors, 1);
    return REQ_REPLY;
}

/* Reads a piece of at most *len bytes at off into the reply at `at`; *len gets how many. 0, -EINPROGRESS or -errno. */
static int read_piece(struct queue *q, struct req *r, uint64_t off, uint32_t at, uint32_t *len)
{
    struct fs_extents x = { q->worker.extents, STORE_EXTENTS_MAX, 0, &r->wait };
    int64_t done;
    int n, iov_n;

    for (;;) {
        n = disk_extents(q->common->disk, off, *len, &x);
        if (n < 0)
            return n;
        iov_n = 0;
        if (x.bytes == *len)
            iov_n = r->ops->out_iov(r, at, *len, q->worker.iov, REQ_IOV_MAX);
        if (x.bytes == *len && iov_n > 0)
            break;
        /* More extents or ranges of memory than there is room for, or memory that is none: tells itself at one sector. */
        if (*len <= DISK_SECTOR)
            return -EFAULT;
        *len = *len / 2 / DISK_SECTOR * DISK_SECTOR;
    }
    done = store_read(&r->wait, q->worker.extents, n, q->worker.iov, iov_n);
    if (done < 0)
        return (int)done;
    store_wait_done(&r->wait);
    if (done != *len)
        return -EIO;
    r->ops->out_dirty(r, at, *len);
    return 0;
}

static enum req_verdict serve_in(struct queue *q, struct req *r, uint64_t sector)
{
    uint64_t sectors = q->common->disk->bytes / DISK_SECTOR;
    uint32_t bytes = r->out_cap - 1;
    bool parked_before = r->wait.parked_once;
    int rc = 0;

    if (bytes % DISK_SECTOR != 0 || sector > sectors || bytes / DISK_SECTOR > sectors - sector)
        return end(q, r, S_IOERR, 0);
    while (r->step * DISK_SECTOR < bytes && rc == 0) {
        uint32_t at = r->step * DISK_SECTOR, len = bytes - at < PIECE_BYTES ? bytes - at : PIECE_BYTES;

        rc = read_piece(q, r, (sector + r->step) * DISK_SECTOR, at, &len);
        if (rc == 0)
            r->step = (uint16_t)(r->step + len / DISK_SECTOR);
    }
    if (rc == -EINPROGRESS) {
        if (!parked_before)
            count(&q->worker.counters.parked, 1);
        return REQ_PARKED;
    }
    if (rc != 0)
        return end(q, r, S_IOERR, 0);
    if (!parked_before)
        count(&q->worker.counters.hits, 1);
    count(&q->worker.counters.read_bytes, bytes);
    return end(q, r, S_OK, bytes);
}

static enum req_verdict serve_id(struct queue *q, struct req *r)
{
    if (r->out_cap - 1 < VND_BLK_ID_BYTES || r->ops->out_copy(r, 0, q->common->blk_id, VND_BLK_ID_BYTES) != 0)
        return end(q, r, S_IOERR, 0);
    return end(q, r, S_OK, VND_BLK_ID_BYTES);
}

static enum req_verdict blk_serve(struct queue *q, struct req *r)
{
    struct blk_header h;

    if (r->out_cap == 0)
        return end(q, r, S_IOERR, 0);
    memcpy(&h, r->args, sizeof(h));
    r->in.opcode = h.type; /* for those who list what waits */
    r->in.nodeid = h.sector;
    switch (h.type) {
    case T_IN: return serve_in(q, r, h.sector);
    case T_GET_ID: return serve_id(q, r);
    case T_FLUSH: return end(q, r, S_OK, 0); /* nothing was written */
    case T_OUT:
    case T_DISCARD:
    case T_WRITE_ZEROES:
    case T_SECURE_ERASE: return end(q, r, S_IOERR, 0); /* it is read-only */
    default: return end(q, r, S_UNSUPP, 0);
    }
}

static enum req_verdict blk_fail(struct queue *q, struct req *r, int error)
{
    return end(q, r, S_IOERR, 0);
}

const struct device_kind kind_blk = {
    .name = "blk",
    .features = F_SEG_MAX | F_RO | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_MQ,
    .queues_min = 1,
    .request_bytes_min = sizeof(struct blk_header),
    .request_bytes_max = REQUEST_BYTES_MAX,
    .reply_at_end = true,
    .serve = blk_serve,
    .fail = blk_fail,
};
