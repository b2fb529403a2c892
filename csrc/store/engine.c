/* store/engine.c -- the engine's life: what starts its parts and ends them, in order. */
#include <stdlib.h>

#include "base/seccomp.h"
#include "blob/codec.h"
#include "store/fetcher.h"

/* What vnd_engine_cfg says of a 0. */
#define READ_DEADLINE_DEFAULT_MS 30000
#define POOL_THREADS_DEFAULT 2
#define SYNC_INTERVAL_DEFAULT_MS 30000

/* What libraries do once and by file names, before threads are confined: libcrypto reads its configuration. */
static int prepare_libraries(const vnd_engine_cfg *cfg)
{
    uint8_t digest[32];

    if (cfg->seccomp != VND_SECCOMP_NONE)
        codec_sha256((const uint8_t *)"", 0, digest);
    return seccomp_prepare((enum vnd_seccomp)cfg->seccomp);
}

vnd_engine *vnd_engine_new(const vnd_engine_cfg *cfg)
{
    vnd_engine *e = calloc(1, sizeof *e);

    if (!e)
        return NULL;
    if (cfg)
        e->cfg = *cfg;
    if (!e->cfg.read_deadline_ms)
        e->cfg.read_deadline_ms = READ_DEADLINE_DEFAULT_MS;
    if (!e->cfg.pool_threads)
        e->cfg.pool_threads = POOL_THREADS_DEFAULT;
    if (!e->cfg.sync_interval_ms)
        e->cfg.sync_interval_ms = SYNC_INTERVAL_DEFAULT_MS;
    pthread_mutex_init(&e->lock, NULL);
    e->events = events_new();
    if (!e->events || prepare_libraries(&e->cfg) || fetcher_new(e) || pool_new(e, e->cfg.pool_threads)) {
        vnd_engine_free(e);
        return NULL;
    }
    return e;
}

void vnd_engine_shutdown(vnd_engine *e)
{
    if (atomic_exchange(&e->shutdown, 1))
        return;
    if (e->fetcher)
        fetcher_shutdown(e);
    events_wake(e->events);
}

void vnd_engine_free(vnd_engine *e)
{
    if (!e)
        return;
    if (e->events)
        vnd_engine_shutdown(e);
    if (e->pool)
        pool_free(e);
    if (e->fetcher)
        fetcher_free(e);
    events_free(e->events);
    pthread_mutex_destroy(&e->lock);
    free(e);
}
