/* rafs/check.h -- collects the faults that a walk of an image finds: one line for each, up to max lines. */
#ifndef VND_RAFS_CHECK_H
#define VND_RAFS_CHECK_H
#include "rafs/internal.h"

struct rafs_faults {
    int count, max;
    char *out; /* lines with '\n' between them, NUL-ended */
    size_t used, cap;
};
/* Adds a line; control characters of names become '?'. False when max lines are there: the walk is to stop. */
bool rafs_fault(struct rafs_faults *f, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
