/* precontent/state.h -- what the processes that hold one fanotify group share, and the group's kernel objects.
 *
 * The kernel keeps an event that was read and not answered for as long as the group lives, under the number that its
 * descriptor had; when the last descriptor of the group is closed it lets every reader go on. So the group is held by
 * two processes, and what is read lies in memory that both have, from within read(2) on: the process that goes on answers
 * it. One process serves at a time; the other only holds.
 */
#ifndef VND_PRECONTENT_STATE_H
#define VND_PRECONTENT_STATE_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PRECONTENT_SLOTS 1024u /* events read and not answered; the rest waits in the kernel */
/* One event with a range has 48 bytes, one without 24: no two that wait for an answer fit. */
#define PRECONTENT_BUFFER 64u
#define PRECONTENT_ANY_BLOB UINT32_MAX /* read by a process that died before it looked whose event it was */

/* include/uapi/linux/fanotify.h of 6.14, which C libraries of today lack */
#define PRECONTENT_OPEN 0x20u
#define PRECONTENT_CLOSE 0x10u      /* FAN_CLOSE_NOWRITE */
#define PRECONTENT_ACCESS 0x100000u /* FAN_PRE_ACCESS */
#define PRECONTENT_ALLOW 1u
#define PRECONTENT_DENY(error) (2u | (uint32_t)(error) << 24) /* EPERM EIO EBUSY ETXTBSY EAGAIN ENOSPC EDQUOT */

struct precontent_event {
    uint64_t mask, offset, count; /* no range given: the whole file */
    int32_t fd;
};
/* Takes one event off the front: its length, or 0: there is no whole, well-formed one. */
size_t precontent_parse(const uint8_t *buf, size_t len, struct precontent_event *out);

/* Shared (a memfd). */
struct precontent_slot {
    _Atomic uint32_t waits; /* 1: read, not answered */
    int32_t fd;             /* its number in the process that read it */
    uint32_t blob;          /* index in order of adding, or PRECONTENT_ANY_BLOB */
    uint32_t held;          /* 1: the number is a descriptor of the serving process, to be closed */
    uint64_t offset, count;
};
struct precontent_state {
    char magic[8];
    _Atomic int32_t opens;             /* devices that the file system has open */
    _Atomic uint32_t ended;            /* it had some and has none: it is gone */
    uint8_t buffer[PRECONTENT_BUFFER]; /* read(2)'s; zeroes but for events that have no slot yet */
    struct precontent_slot slots[PRECONTENT_SLOTS];
};

/* The memfd of vnd_precontent_state, mapped; NULL: it is none. munmap ends it. */
struct precontent_state *precontent_state_map(int fd);
/* Lets the reader go on, or fails it. That the event is answered already is no error. */
void precontent_answer(int group_fd, int fd, uint32_t response);
/* Counts what an event says of devices opened and closed. True: the file system is gone. */
bool precontent_count(struct precontent_state *s, uint64_t mask);
/* Notes an event that was read; it waits from here on. */
void precontent_fill(struct precontent_slot *slot, const struct precontent_event *ev, uint32_t blob);

#endif
