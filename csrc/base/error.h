/* base/error.h -- why something failed. The number is the return value (-errno); the kind and one line of text for a
 * person stand beside it. Stateless: any thread.
 */
#ifndef VND_ERROR_H
#define VND_ERROR_H
#include <stddef.h>

#include "vnd.h"

/* The caller owns it and gives it in zeroed ({ 0 }); only a failing function fills it. */
struct failure {
    int cause;              /* enum vnd_cause */
    char line[VND_ERR_MAX]; /* what, where, what to do; no newline */
};

/* Fills f (may be NULL) and returns rc, so that `return failure_set(f, -EIO, VND_CAUSE_IO, ...)` reads well. */
int failure_set(struct failure *f, int rc, int cause, const char *fmt, ...) __attribute__((format(printf, 4, 5)));
/* The same for vnd.h's own functions, which take the line as (err, err_len); err may be NULL. */
int fail_line(int rc, char *err, size_t err_len, const char *fmt, ...) __attribute__((format(printf, 4, 5)));
/* Copies f out to what a function of vnd.h was given, each of which may be NULL, and returns rc. */
int failure_tell(const struct failure *f, int rc, int *cause, char *err, size_t err_len);

#endif
