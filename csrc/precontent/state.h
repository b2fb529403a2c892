/* precontent/state.h -- what precontent/precontent.c asks of precontent_state.c. */
#ifndef VND_PRECONTENT_STATE_H
#define VND_PRECONTENT_STATE_H
#include "precontent/internal.h"

/* The memfd of vnd_precontent_state, mapped; NULL: it is none. munmap ends it. */
struct precontent_state *precontent_state_map(int fd);
/* Lets the reader go on, or fails it. An event that is no more is no error. */
void precontent_answer(int group_fd, int fd, uint32_t response);
/* Counts what an event says of devices opened and closed. Whether the file system is gone. */
bool precontent_count(struct precontent_state *s, uint64_t mask);
/* Notes an event that was read; it waits from here on. */
void precontent_fill(struct precontent_slot *slot, const struct precontent_event *ev, uint32_t blob);

#endif
