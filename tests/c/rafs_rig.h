/* rafs_rig.h -- an engine for each case, and RAFS v6 images (v6_image.h) opened in it. */
#ifndef RAFS_RIG_H
#define RAFS_RIG_H
#include "check.h"
#include "rafs/rafs.h"
#include "rafs/internal.h"
#include "v6_image.h"

#define FLAGS (0x1u | 0x4u | 0x10u | 0x20u) /* no compression, blake3, explicit ids, xattrs */

static vnd_engine *engine;

BEFORE_EACH
{
    engine = vnd_engine_new(&(vnd_engine_cfg){ 0 });
    CHECK(engine);
}

AFTER_EACH
{
    vnd_engine_shutdown(engine);
    vnd_engine_free(engine);
}

static inline vnd_rafs *open_bytes(const void *bytes, size_t len, int *cause, char err[VND_ERR_MAX])
{
    char path[32];
    int fd = img_fd(bytes, len, path);
    vnd_rafs *r = vnd_rafs_open(engine, path, NULL, NULL, cause, err, VND_ERR_MAX);

    close(fd);
    return r;
}

static inline vnd_rafs *open_image(const struct img *m)
{
    char err[VND_ERR_MAX] = "";
    int cause = 0;
    vnd_rafs *r = open_bytes(m->b, sizeof(m->b), &cause, err);

    if (!r)
        fprintf(stderr, "%s\n", err);
    CHECK(r);
    return r;
}

#endif
