/* base/events.h -- lines for Python's log thread. Any thread; nothing here waits for the log. */
#ifndef VND_EVENTS_H
#define VND_EVENTS_H
#include "vnd.h"

struct engine_events; /* a ring of lines, with a lock of its own that is taken under any other */

/* NULL: no memory. */
struct engine_events *events_new(void);
void events_free(struct engine_events *ev);
/* The engine is being shut down: vnd_event_next returns. */
void events_wake(struct engine_events *ev);
/* Says one line. Never blocks; drops the line (and counts it) when the ring is full. The same text within 5 s is only
 * counted. level: enum vnd_level; cause: enum vnd_cause. */
void engine_say(struct vnd_engine *e, int level, int cause, const char *fmt, ...) __attribute__((format(printf, 4, 5)));

#endif
