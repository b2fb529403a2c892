/* store/asker.h -- the image whose read asked first for a chunk: its backend is asked, and how far it wants a miss extended
 * is obeyed.
 */
#ifndef VND_ASKER_H
#define VND_ASKER_H
#include <stdbool.h>
#include <stdint.h>

struct vnd_blob;

/* A blob that may have been closed meanwhile: compared, never followed. id 0: none. */
struct asker {
    uintptr_t id;
};

static inline struct asker asker_of(const struct vnd_blob *b)
{
    return (struct asker){ (uintptr_t)b };
}

static inline bool asker_is(struct asker a, const struct vnd_blob *b)
{
    return a.id == (uintptr_t)b;
}

#endif
