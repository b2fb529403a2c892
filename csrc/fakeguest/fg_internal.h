/* fg_internal.h -- what the files of the fake guest share. */
#ifndef FG_INTERNAL_H
#define FG_INTERNAL_H
#include <stdatomic.h>
#include <stdbool.h>

#include "fakeguest.h"

#define FG_PAGE 4096u
#define FG_FILL 0xa5 /* writable memory before the server wrote it */
#define FG_RING_MAX 1024
#define FG_ERR_MAX 256

/* virtio 1.2, 2.7: split virtqueues */
struct fg_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};
struct fg_avail {
    uint16_t flags;
    _Atomic uint16_t idx;
    uint16_t ring[];
};
struct fg_used_elem {
    uint32_t id, len;
};
struct fg_used {
    uint16_t flags;
    _Atomic uint16_t idx;
    struct fg_used_elem ring[];
};
enum { FG_DESC_NEXT = 1, FG_DESC_WRITE = 2, FG_DESC_INDIRECT = 4 };

/* A slot in guest memory: indirect table, request, reply header and fixed part, data pages; fill between them. */
enum {
    FG_SLOT_TABLE = 0,
    FG_SLOT_IN = 0x2000,
    FG_SLOT_OUT = 0x4000,
    FG_SLOT_DATA = 0x6000,
    FG_SLOT_IN_MAX = 0x1f00,
    FG_OUT_AT = 64,
    FG_OUT_FIXED_AT = 256,
    FG_OUT_FIXED_MAX = 0xe00
};

struct fg_slot {
    uint64_t gpa;
    uint8_t *host;
    bool busy;
    uint64_t unique;
    uint32_t in_len, data_bytes, table_bytes;
    uint32_t in_data_bytes; /* of the request, in the data pages */
    int out_fixed;
    uint32_t target; /* load: which file or name */
    uint64_t offset; /* load: where in the file */
    uint32_t opcode; /* load: what was sent last */
};

struct fg_queue {
    fg_ram *ram;
    fg_queue_config cfg;
    struct fg_desc *desc;
    struct fg_avail *avail;
    struct fg_used *used;
    _Atomic uint16_t *used_event, *avail_event;
    uint16_t avail_idx, published, last_used;
    uint16_t free_head, free_count;
    uint16_t next[FG_RING_MAX];      /* free list and chains: our own copy, the ring is shared memory */
    uint16_t chain_len[FG_RING_MAX]; /* descriptors of the chain at this head, 0 = not in flight */
    uint64_t cookie[FG_RING_MAX];
    int in_flight, kick_fd, wake_fd; /* wake_fd: call fd changed or stop asked */
    _Atomic int call_fd, stop, abandoned;
    uint64_t kicks, calls, next_unique;
    struct fg_slot *slots;
    uint16_t *page_order; /* scatter: where page i of a slot lies */
    uint8_t *shadow;      /* what requests and tables were, per slot: FG_SLOT_OUT bytes */
    char err[FG_ERR_MAX];
};

int fg_fail(fg_queue *q, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* Slot's checks without the fill tests; out: header's error. Length of reply or fault. */
int64_t fg_reply_length(fg_queue *q, struct fg_slot *s, uint32_t used_len, int32_t *error);
int fg_slot_send(fg_queue *q, uint32_t slot, uint32_t in_len, int out_fixed, uint32_t data_bytes);
uint64_t fg_page_at(const fg_queue *q, uint32_t page); /* offset in the slot of data page i */

#endif
