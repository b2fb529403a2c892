/* base/error.c -- see base/error.h. */
#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>

int failure_set(struct failure *f, int rc, int cause, const char *fmt, ...)
{
    if (f) {
        va_list ap;
        f->cause = cause;
        va_start(ap, fmt);
        vsnprintf(f->line, sizeof f->line, fmt, ap);
        va_end(ap);
    }
    return rc;
}

int fail_line(int rc, char *err, size_t err_len, const char *fmt, ...)
{
    if (err && err_len) {
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(err, err_len, fmt, ap);
        va_end(ap);
    }
    return rc;
}

int failure_tell(const struct failure *f, int rc, int *cause, char *err, size_t err_len)
{
    if (cause)
        *cause = f->cause;
    return fail_line(rc, err, err_len, "%s", f->line);
}
