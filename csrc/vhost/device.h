/* vhost/device.h -- the contract of vhost/: a vhost-user device of one front-end. Its functions are vnd.h's.
 *
 * What it is: queues, the guest's memory, the in-flight region, and what its kind (vhost/kind.h) serves: a FUSE session
 * (fuse/fuse.h) or a disk (disk/disk.h). The messages themselves are
 * spoken by Python; here is what they come to (vnd_device_state).
 * Threads: one control thread at a time calls vnd_device_*. Each queue has a thread of its own, which alone touches its ring
 * and its requests' memory. Threads of the store and of file systems call a request's wake, and nothing else.
 * Locks, each taken alone: a queue's lock (a posted conf is acknowledged under it); its parked list's lock (after the
 * engine's). Queue threads take none on the way of a request that is ready.
 * Ownership: the device owns queues, mappings and session, not the disk; a queue owns the descriptors that its conf gave it. Engine and
 * mount table outlive the device. Memory is unmapped when every queue has acknowledged that it uses it no more.
 * It may use base, store/store.h, fs, disk and fuse.
 */
#ifndef VND_DEVICE_H
#define VND_DEVICE_H
#include "vhost/internal.h"

#define COMMON_FEATURES                                                                                      \
    (1ull << 32 /* VERSION_1 */ | 1ull << 30 /* F_PROTOCOL_FEATURES */ | 1ull << 29 /* RING_F_EVENT_IDX */ | \
     1ull << 28 /* RING_F_INDIRECT_DESC */ | 1ull << 26 /* F_LOG_ALL */)

/* What control last made of a ring. */
struct device_ring {
    vnd_ring_state state;
    uint32_t kick_gen, call_gen, err_gen;
    enum recover recover; /* not RECOVER_NOT: there is an in-flight region that this ring has not looked at */
};

/* A front-end's in-flight region, mapped; map NULL: there is none. */
struct device_inflight {
    struct guestmem_map *map;
    uint8_t *host;
    uint32_t queues, entries; /* rings, and entries of each, that it was made for */
    bool tail;                /* there is room for struct fuse_kept behind them */
};

struct vnd_device {
    struct queue_common common;
    uint32_t n_queues;
    struct queue *queues;
    struct device_ring rings[VND_QUEUE_MAX];
    struct queue_conf confs[VND_QUEUE_MAX];
    uint64_t features;
    bool carry; /* vnd_device_state's carries_inflight */
    struct guestmem *mem;
    uint32_t region_gen;
    struct guestlog *log;
    uint32_t log_gen;
    struct device_inflight own_inflight, inflight; /* ours, and the front-end's */
    uint32_t inflight_gen;
    bool inflight_died;
};

#endif
