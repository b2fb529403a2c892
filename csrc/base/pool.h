/* base/pool.h -- a few threads for work that must not run on a queue's thread because it may wait for the disk. Each task
 * is run once; guests take turns (base/turns.h), and one guest's tasks never take all threads. The pool has a lock of its own that is taken under any other and held over no
 * task.
 */
#ifndef VND_POOL_H
#define VND_POOL_H
#include <stdint.h>

#include "base/turns.h"

struct vnd_engine;

/* Embedded in the caller's own struct. It is the pool's from pool_submit until run is called; run may free it. */
struct pool_task {
    struct turn_item turn;
    void (*run)(struct pool_task *t);
};

/* 0 or -errno. threads: that one guest may have busy, at most POOL_MAX; there is one more. */
int pool_new(struct vnd_engine *e, uint32_t threads);
/* Runs what is queued, then ends the threads. */
void pool_free(struct vnd_engine *e);
/* Any thread. Cannot fail. who: the guest or mount that it is for (store_wait.who); 0: none. */
void pool_submit(struct vnd_engine *e, struct pool_task *t, uintptr_t who);

#endif
