/* vhost/device.h -- a vhost-user virtio-fs device: queues, memory and a FUSE session; vnd.h is its face. One control
 * thread at a time.
 */
#ifndef VND_DEVICE_H
#define VND_DEVICE_H
#include "vhost/internal.h"

#define DEVICE_FEATURES                                                                                      \
    (1ull << 32 /* VERSION_1 */ | 1ull << 30 /* F_PROTOCOL_FEATURES */ | 1ull << 29 /* RING_F_EVENT_IDX */ | \
     1ull << 28 /* RING_F_INDIRECT_DESC */ | 1ull << 26 /* F_LOG_ALL */)

/* What control last made of a ring. */
struct device_ring {
    vnd_ring_state state;
    uint32_t kick_gen, call_gen, err_gen;
    bool recover; /* the front-end gave an in-flight region that this ring has not looked at */
};

struct vnd_device {
    struct vnd_engine *engine;
    struct vnd_vfs *vfs;
    struct fuse_session *session;
    uint32_t n_queues;
    struct queue *queues;
    struct device_ring rings[VND_QUEUE_MAX];
    struct queue_conf confs[VND_QUEUE_MAX];
    uint64_t features;
    struct guestmem *mem;
    uint32_t region_gen;
    struct guestlog *log;
    uint32_t log_gen;
    struct guestmem_map *own_map, *inflight_map; /* in-flight region: ours, the front-end's or NULL */
    uint8_t *own_inflight, *inflight;
    uint32_t inflight_queues, inflight_size, inflight_gen;
    _Atomic int mem_lost;
    _Atomic uint32_t segs_bytes;
};

#endif
