/* cache/claim.h -- who fetches what, over processes: open-file-description locks on a blob's side file, and one futex
 * word per work directory that says "something became ready" (docs/datapath.md 3).
 *
 * The locks live in offsets far beyond the file's data. They belong to the open file description, so a killed
 * holder's are free at once; they do not exclude threads that share the descriptor: the miss table does that,
 * first.
 */
#ifndef VND_CLAIM_H
#define VND_CLAIM_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define CLAIM_UNITS (1ll << 40)        /* + first unit, length n */
#define CLAIM_INIT (1ll << 41)         /* header and binding are being looked at or changed */
#define CLAIM_ATTACH ((1ll << 41) + 1) /* held shared by every process that has the file open */
#define CLAIM_SYNC ((1ll << 41) + 2)   /* makes data durable */
#define CLAIM_EVICT ((1ll << 41) + 3)  /* invalidates chunks: the epoch is odd */

#define CLAIM_INIT_WAIT_MS 5000 /* a process that reads or changes a header is done long before */

/* Claims units [first, first+n) or the free beginning of them. Returns the number claimed; 0: another process holds
 * the first. */
int claim_units(int fd, uint32_t first, uint32_t n);
void claim_release(int fd, uint32_t first, uint32_t n);
/* Whether another process holds a unit now. */
bool claim_foreign(int fd, uint32_t unit);
/* Locks one byte, shared or exclusive. A shared lock of ours becomes exclusive only when no other process has one.
 * 0, -EAGAIN when another holds it (after waiting up to wait_ms), or -errno. */
int claim_byte(int fd, int64_t at, bool exclusive, int wait_ms);
void claim_byte_release(int fd, int64_t at);

/* Claims the fetching of a blob's stored chunk table (the blob may have no side file yet). Returns a descriptor that
 * holds the claim until it is closed; -EAGAIN: another process holds it; or -errno: nothing can be claimed here. */
int claim_meta(int side_dir_fd, const char *id);

/* Gives a mapped file's first len bytes their blocks, so that a store into it never finds the disk full. */
int claim_reserve(int fd, int64_t len);

struct claim_wake {
    struct claim_wake_page {
        _Atomic uint32_t gen, waiters;
    } *page; /* mapped file shared by all processes, or private memory */
    struct sigbus_range *guard;
    bool shared;
    uint64_t dev, ino; /* of the file */
};
/* dir_fd -1: private memory. Without a file it uses private memory, too; fails with -ENOMEM alone. */
int claim_wake_open(struct claim_wake *w, int dir_fd);
void claim_wake_close(struct claim_wake *w);
/* If the file was removed or could not be opened before: uses the one that is there now, makes it if need be. One
 * thread at a time. */
void claim_wake_follow(struct claim_wake *w, int dir_fd);
/* Wakes the waiting processes, after trusted bits were set. */
void claim_wake_all(struct claim_wake *w);
/* Waits until the generation is no longer gen, at most timeout_ms. */
void claim_wake_wait(struct claim_wake *w, uint32_t gen, int timeout_ms);
uint32_t claim_wake_enter(struct claim_wake *w); /* announces a waiter; returns the generation */
void claim_wake_leave(struct claim_wake *w);

#endif
