/* rafs/check.h -- collects the faults of a walk: one line each, up to a number. */
#ifndef VND_RAFS_CHECK_H
#define VND_RAFS_CHECK_H
#include "rafs/internal.h"

struct rafs_faults {
    int count, max;
    char *out;
    size_t used, cap;
};
/* Adds a line. Control characters of names are shown as '?'. false: enough, stop. */
bool rafs_fault(struct rafs_faults *f, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* All versions: the chunk records against the blob table, digests that are missing. */
void rafs_check_records(struct vnd_rafs *r, struct rafs_faults *f);

#endif
