/* store/asker.h -- who asked first for a chunk: the image, whose backend is asked and whose amplify_io counts, the server that
 * backend stands for, and the session, whose turn it is among those who wait for that server.
 */
#ifndef VND_ASKER_H
#define VND_ASKER_H
#include <stdbool.h>
#include <stdint.h>

struct vnd_blob;

struct asker {
    uintptr_t id;      /* of a blob, which may have been closed meanwhile: compared, never followed. 0: none */
    uintptr_t session; /* of a reader, likewise */
    uint32_t source;   /* vnd_blob_set_source */
};

static inline bool asker_is(struct asker a, const struct vnd_blob *b)
{
    return a.id == (uintptr_t)b;
}

#endif
