/* base/sigbus.h -- mapped files that another process may truncate under us (guest memory, in-flight region, dirty log).
 *
 * A read or write past the end of such a file raises SIGBUS. The handler puts anonymous zeroes where the lost page was,
 * notes it, and the access goes on; the owner looks at the note and gives the mapping up. A process has a bounded number of
 * mappings (vm.max_map_count), and a zero page in the midst of a mapping makes three of one: so after a few pages, or at
 * once, the whole range is replaced by one mapping of zeroes. A SIGBUS
 * outside every registered range goes to the handler that was there before. A signal handler can only reach static
 * data: the list of ranges is the one exception to "no globals".
 */
#ifndef VND_SIGBUS_H
#define VND_SIGBUS_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

struct sigbus_range;

#define SIGBUS_PAGES_MAX 16 /* zero pages in one range; with the next, the range is replaced */

/* Guards [start, start+len), which is one mapping; page_bytes is its page size (huge pages: theirs). whole: the first loss
 * replaces the whole range, because nothing in it is used any more. hit, if not NULL, is set on the first loss. NULL: no
 * memory. */
struct sigbus_range *sigbus_add(void *start, size_t len, size_t page_bytes, bool whole, _Atomic bool *hit);
/* Before munmap, when no thread touches the range any more. */
void sigbus_remove(struct sigbus_range *r);
bool sigbus_hit(struct sigbus_range *r);
/* SIGBUS must not be blocked in a thread that touches guarded ranges: the kernel would end the process. */
void sigbus_unblock(void);

#endif
