/* fakeguest.h -- the guest half of a virtio-fs device without a VM: memory, split virtqueues, FUSE requests and
 * load loops.
 *
 * For tests and benchmarks only: a library of its own (virtiofsd_nydus/fakeguest_build.py), never linked into the engine. The
 * vhost-user messages are spoken by Python (virtiofsd_nydus/fakeguest/frontend.py). Everything that comes back from the server is
 * checked: which head, which length, which unique, the error range, and that no byte changed outside what the request let
 * the server write. From the bottom: fg_ram.c (memory), fg_ring.c (rings), fg_fuse.c (one request and its answer), fg_load.c
 * (loops).
 *
 * Threads: a queue belongs to one thread at a time, except fg_queue_set_call and fg_queue_stop, which any thread may call.
 * Python lets go of the GIL for a call that waits. No locks; fg_queue_stop sets one atomic flag.
 * Ownership: the caller owns memory and queues, and frees the queues first; descriptors stay the caller's.
 * Uses the C library alone, nothing of csrc/. Errors are -errno or one of enum fg_fault, negated; fg_queue_error says the last
 * one in words.
 */
#ifndef FAKEGUEST_H
#define FAKEGUEST_H
#include <stddef.h>
#include <stdint.h>

/* <cdef> what Python sees, to the end marker: plain declarations only */
enum fg_fault {                       /* faults of the server, apart from errno's range */
                FG_BAD_USED = 1001,   /* used ring: unknown head, index jumped */
                FG_BAD_LENGTH = 1002, /* used.len, out.len and the writable bytes do not agree */
                FG_BAD_REPLY = 1003,  /* wrong unique, error out of range, reply to what has none */
                FG_OVERRUN = 1004,    /* a byte changed that was not the server's to write */
                FG_LOST_CALL = 1005,  /* the used ring moved on, an interrupt was due and none came */
                FG_BAD_DATA = 1006    /* file bytes differ from the pattern */
};

/* ---- guest memory: one memfd, mapped region by region with inaccessible pages round each */
typedef struct fg_ram fg_ram;
typedef struct {
    uint64_t gpa, size_bytes, file_offset; /* page multiples */
} fg_region;
/* File bytes that lie in no region hold a pattern, checked by fg_ram_check_gaps. seal: forbid shrinking, as QEMU
 * does. NULL with errno. */
fg_ram *fg_ram_new(const fg_region *regions, int n, int seal);
void fg_ram_free(fg_ram *m);
int fg_ram_fd(fg_ram *m); /* borrowed */
/* Host address of [gpa, gpa+len), NULL unless it lies in one region. This is also the "user address". */
uint8_t *fg_ram_at(fg_ram *m, uint64_t gpa, uint64_t len);
int fg_ram_check_gaps(fg_ram *m); /* 0 or -FG_OVERRUN */

/* ---- a split virtqueue and its request slots */
typedef struct fg_queue fg_queue;
typedef struct {
    uint32_t num; /* entries, a power of two <= 1024 */
    uint64_t desc_gpa, avail_gpa, used_gpa;
    int event_idx, indirect; /* as negotiated */
    int poll;                /* 1: spin on the used ring and ask for no interrupts */
    uint64_t slot_gpa;       /* slots lie here, fg_slot_bytes apart */
    uint32_t slot_count, slot_data_bytes;
    int scatter; /* 1: a slot's data pages in a shuffled order */
    /* 1: where used.len is 0 a reply is as long as its own header says. nydusd says 0, and Linux does not look. */
    int header_len;
} fg_queue_config;
typedef struct {
    uint64_t gpa;
    uint32_t len, write; /* write 1: the server may write */
} fg_segment;
uint64_t fg_slot_bytes(uint32_t data_bytes); /* guest memory that one slot needs, page multiple */
/* Writes empty rings; next is the first avail and used index (0 after a boot). NULL with errno. */
fg_queue *fg_queue_new(fg_ram *m, const fg_queue_config *cfg, uint16_t next);
void fg_queue_free(fg_queue *q);
void fg_queue_set_kick(fg_queue *q, int fd); /* borrowed eventfd */
void fg_queue_set_call(fg_queue *q, int fd); /* borrowed eventfd; any thread, while another waits */
void fg_queue_stop(fg_queue *q);             /* any thread: ends fg_load_run after what is in flight */
void fg_queue_abandon(fg_queue *q);          /* any thread, before it is freed: every wait ends in -ECANCELED */
const char *fg_queue_error(fg_queue *q);
int fg_queue_in_flight(fg_queue *q);
uint16_t fg_queue_avail(fg_queue *q);
uint64_t fg_queue_kicks(fg_queue *q); /* kicks sent */
uint64_t fg_queue_calls(fg_queue *q); /* call signals received */

/* Puts a chain into the ring and the avail ring, not yet visible. table_gpa: where its indirect table goes, 0 =
 * direct. cookie comes back from pop. Head or -errno. */
int fg_queue_add(fg_queue *q, const fg_segment *segments, int n, uint64_t table_gpa, uint64_t cookie);
void fg_queue_publish(fg_queue *q); /* makes them visible and kicks if the server asked for it */
void fg_queue_kick(fg_queue *q);    /* kicks in any case */
int fg_queue_pop(fg_queue *q, uint64_t *cookie, uint32_t *len); /* 1, 0 = none, or a fault */
/* Waits for the used ring to move: 0, -ETIMEDOUT, -ECANCELED or -FG_LOST_CALL. */
int fg_queue_wait(fg_queue *q, int timeout_ms);

/* ---- one FUSE request in a slot. in: header, arguments, names, exactly as sent. Writable part: 16 bytes of
 * header, out_fixed bytes, data_bytes in pages; out_fixed < 0: no writable part at all. Header and arguments are
 * two descriptors, as Linux makes them. */
int fg_submit(fg_queue *q, uint32_t slot, const uint8_t *in, uint32_t in_len, int out_fixed, uint32_t data_bytes);
/* Waits for any slot, checks its reply and copies it (header first) into reply, NULL: leaves it where it is. Bytes (0: none
 * came) or fault. */
int64_t fg_reap(fg_queue *q, uint32_t *slot, uint8_t *reply, uint64_t reply_cap, int timeout_ms);

/* ---- load: keeps depth requests in flight */
/* WRITE_RANDOM overwrites with the file's own pattern. GETATTR asks for expect_nodeid of the names. CREATE makes files of
 * new names, told by random_seed and a count, below the first name's parent, releases and forgets each; an operation is all three. */
enum fg_load_kind {
    FG_LOAD_READ_RANDOM = 0,
    FG_LOAD_READ_SEQUENTIAL = 1,
    FG_LOAD_LOOKUP = 2,
    FG_LOAD_WRITE_RANDOM = 3,
    FG_LOAD_GETATTR = 4,
    FG_LOAD_CREATE = 5
};
typedef struct {
    uint64_t nodeid, fh, size_bytes, seed;
} fg_file;
/* expect_nodeid 0: any but 0 */
typedef struct {
    uint64_t parent, expect_nodeid;
    char name[64];
} fg_name;
typedef struct {
    uint32_t kind, depth, block_bytes;
    uint32_t check;       /* bytes of each read compared with the pattern: 0 = first and last, 1 = all */
    uint64_t max_ops;     /* 0 = no limit */
    uint32_t duration_ms; /* 0 = no limit */
    uint32_t timeout_ms;  /* longest wait for any completion */
    uint32_t pause_us;    /* slept after each batch of completions, by a guest that is to be slow; 0: none */
    uint64_t random_seed;
    const fg_file *files;
    uint32_t file_count;
    const fg_name *names;
    uint32_t name_count;
    /* With depth 1: from each request's publishing to its answer, of the first latency_room. NULL: not wanted. */
    uint64_t *latency_ns;
    uint64_t latency_room;
} fg_load;
typedef struct {
    uint64_t ops, bytes, elapsed_ns, cpu_ns, kicks, calls;
} fg_load_result;
/* Runs until a limit or fg_queue_stop; all of it has come back by then. 0 or a fault. The GIL is not held. */
int fg_load_run(fg_queue *q, const fg_load *load, fg_load_result *out);

/* The pattern of test files: what stands at offset (multiple of 8) of the file with that seed. */
void fg_pattern_fill(uint8_t *buf, uint64_t len, uint64_t offset, uint64_t seed);
int fg_pattern_check(const uint8_t *buf, uint64_t len, uint64_t offset, uint64_t seed); /* 0 or -FG_BAD_DATA */
/* Full fence, then a release store or acquire load of a 16-bit word in guest memory: for rings written by hand. */
void fg_store16(uint8_t *at, uint16_t value);
uint16_t fg_load16(const uint8_t *at);
/* </cdef> */

#endif
