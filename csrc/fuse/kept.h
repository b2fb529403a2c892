/* fuse/kept.h -- what a FUSE session must not lose with its process: the result of INIT, in memory that outlives it. The
 * guest sends INIT once.
 *
 * Layout: fixed, in host byte order, in memory that is zeroed at first. A process that finds it checks all of it. While it is
 * written, seq is odd: a process that died then leaves a session as before INIT, whose INIT is still in flight and comes again.
 * Threads: written by the thread that serves INIT or DESTROY, or by control while no thread serves. Ownership: the transport
 * maps it, for longer than the session.
 */
#ifndef VND_FUSE_KEPT_H
#define VND_FUSE_KEPT_H
#include <stdbool.h>
#include <stdint.h>

#define FUSE_KEPT_MAGIC 0x6b657074646e7631ull
#define FUSE_KEPT_VERSION 1u

struct fuse_kept {
    uint64_t magic;
    uint32_t version;
    uint32_t size_bytes; /* of this struct */
    uint32_t seq;        /* odd: being written */
    uint32_t ready;      /* 1: INIT was answered, and no DESTROY came */
    uint32_t minor, max_pages, max_write, session_kind;
    uint64_t flags; /* granted */
    uint64_t sum;   /* over all that precedes it but seq */
};

/* The memory holds a session that goes on. */
bool fuse_kept_is_ready(const struct fuse_kept *k);
/* Writes all but magic, version, size, seq and sum as in from. */
void fuse_kept_write(struct fuse_kept *k, const struct fuse_kept *from);

#endif
