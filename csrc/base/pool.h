/* base/pool.h -- a few threads for work that must not run on a queue's thread because it may wait for the disk. Tasks are
 * run in the order they came, each once. The pool has a lock of its own that is taken under any other and held over no
 * task.
 */
#ifndef VND_POOL_H
#define VND_POOL_H
#include <stdint.h>

struct vnd_engine;

/* Embedded in the caller's own struct. It is the pool's from pool_submit until run is called; run may free it. */
struct pool_task {
    struct pool_task *next;
    void (*run)(struct pool_task *t);
};

/* 0 or -errno. At most POOL_MAX threads. */
int pool_new(struct vnd_engine *e, uint32_t threads);
/* Runs what is queued, then ends the threads. */
void pool_free(struct vnd_engine *e);
/* Any thread. Cannot fail. */
void pool_submit(struct vnd_engine *e, struct pool_task *t);

#endif
