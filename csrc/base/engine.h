/* base/engine.h -- the engine object: a plain context that everything hangs off. There are no globals. */
#ifndef VND_ENGINE_H
#define VND_ENGINE_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "base/counters.h"
#include "vnd.h"

struct vnd_engine {
    vnd_engine_cfg cfg;           /* defaults filled in; does not change */
    struct engine_events *events; /* set once, as the next two are */
    struct pool *pool;
    struct fetcher *fetcher;  /* the store's */
    struct vnd_store *stores; /* the store's list, under lock */
    pthread_mutex_t lock;
    struct engine_counters *counters; /* list of blocks, under lock */
    struct engine_counters shared;    /* for threads without a block of their own */
    _Atomic uint64_t detached_bytes;  /* of requests that wait for a host call: fuse/detach.c */
    /* What all sessions hold of host directories: fuse/held.c bounds it. */
    _Atomic uint64_t held_nodes, held_files;
    /* Descriptors of nodes of all host directories: passthrough/ bounds them. */
    _Atomic uint32_t kept_fds, cached_fds;
    uint64_t metrics_shards; /* one bit for each that is in use: fs/metrics.h, under lock */
    _Atomic int shutdown;
    /* What all front-ends together have mapped: vhost/guestmem.h bounds it. */
    _Atomic uint64_t guest_bytes;
    _Atomic uint32_t guest_maps;
};

#endif
