/* device.c -- the vhost-user device: placeholder with the contract's symbols, so that the others can link. */
#include <errno.h>
#include <stdlib.h>

#include "engine.h"

struct vnd_device {
    struct vnd_engine *engine;
};

uint64_t vnd_device_features(void)
{
    return 1ull << 32 | 1ull << 30 | 1ull << 29 | 1ull << 28 | 1ull << 26;
}

vnd_device *vnd_device_new(vnd_engine *e, vnd_vfs *v, uint32_t queue_count, char *err, size_t err_len)
{
    vnd_device *d = calloc(1, sizeof(*d));

    if (d != NULL)
        d->engine = e;
    return d;
}

int vnd_device_apply(vnd_device *d, vnd_device_state *st, int drain_ms, char *err, size_t err_len)
{
    return -ENOSYS;
}

int vnd_inflight_create(uint32_t nq, uint32_t qsize, uint64_t *size_bytes)
{
    return -ENOSYS;
}

void vnd_device_reset(vnd_device *d)
{
}

void vnd_device_free(vnd_device *d)
{
    free(d);
}
