/* fuse/worker.c -- what a serving thread owns: made, registered with engine and mount table, freed. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fs/metrics.h"
#include "fuse/internal.h"

int fuse_worker_init(struct fuse_worker *w, struct vnd_engine *e, struct vnd_vfs *v)
{
    memset(w, 0, sizeof(*w));
    w->engine = e;
    w->scratch_bytes = FUSE_REPLY_MAX + (uint32_t)sizeof(struct fuse_out_header);
    w->scratch = malloc(w->scratch_bytes);
    if (!w->scratch)
        return -ENOMEM;
    engine_counters_register(e, &w->counters);
    pthread_mutex_lock(&e->lock);
    w->metrics_shard = metrics_take_shard(&e->metrics_shards);
    pthread_mutex_unlock(&e->lock);
    vfs_reader_add(v, &w->reader);
    return 0;
}

void fuse_worker_free(struct fuse_worker *w, struct vnd_vfs *v)
{
    vfs_reader_remove(v, &w->reader);
    engine_counters_unregister(w->engine, &w->counters);
    pthread_mutex_lock(&w->engine->lock);
    metrics_give_shard(&w->engine->metrics_shards, w->metrics_shard);
    pthread_mutex_unlock(&w->engine->lock);
    free(w->scratch);
    w->scratch = NULL;
}
