/* store/stream.h -- readers that go through a blob in order: how far one fetch reaches, and what is fetched ahead of
 * them (docs/datapath.md 5).
 *
 * A miss that follows the last fetch of a stream doubles the stream's window; any other begins a stream. Once a stream
 * has fetched STREAM_AHEAD_AFTER, the window behind it is fetched before a reader misses it; when the reader comes to
 * its start, the next one is. So the network, the decoding and the reader work at the same time.
 *
 * What may be wasted is bounded by what was used: a window ahead is at most half of what the stream has fetched.
 */
#ifndef VND_STREAM_H
#define VND_STREAM_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "store/asker.h"

struct blob_core;
struct fetcher;
struct job;

#define STREAMS 4 /* told apart in a blob; the one used longest ago makes room */
#define STREAM_NONE UINT32_MAX
#define STREAM_AHEAD_AFTER (4u << 20)  /* bytes read in order, from then on there is fetching ahead */
#define STREAM_WINDOW_MAX (32u << 20)  /* whatever the link is */
#define AMPLIFY_MIN_BYTES (128u << 10) /* what nydusd makes of a smaller amplify_io */
#define AMPLIFY_DEFAULT_BYTES (1u << 20)

/* All but mark under fetcher->lock. Places are chunk indexes. */
struct stream {
    uint64_t used; /* 0: free; else the stream's number in order of use */
    uint32_t window_bytes, amplify_bytes;
    uint64_t fetched_bytes; /* compressed, in order, so far */
    uint32_t next;          /* behind the last fetch that a reader waited for */
    uint32_t ahead;         /* behind the window ahead, or next */
    _Atomic uint32_t mark;  /* start of that window: a reader who gets here asks for more */
};

/* What a link gives, of the fetches so far: smoothed. 0: not known. */
struct link_pace {
    _Atomic uint32_t latency_us;  /* from the job to its first bytes */
    _Atomic uint64_t bytes_per_s; /* after them */
};

/* Bytes that a window of a stream grows to: amplify, or more where the link's bandwidth and latency ask for it. */
uint32_t stream_window_max(const struct link_pace *p, uint32_t amplify_bytes);
/* A job has ended well: first_bytes came latency_us after it began, the rest in the rest_us after that. */
void stream_pace(struct link_pace *p, uint32_t latency_us, uint64_t rest_bytes, uint64_t rest_us);
/* A core is new. */
void stream_init(struct blob_core *c);
/* A miss of chunk index: returns the window of its fetch; *number tells stream_fetched which stream it was.
 * amplify_bytes 0: only wanted chunks are fetched. fetcher->lock is held. */
uint32_t stream_miss(struct blob_core *c, uint32_t index, uint32_t amplify_bytes, uint64_t *number);
/* The fetch for it was made: it ends before chunk end and has so many bytes. Queues the window ahead. fetcher->lock
 * is held. */
void stream_fetched(struct blob_core *c, uint64_t number, uint32_t end, uint64_t bytes, struct asker asker);
/* A reader has come to a stream's mark. No lock is held. */
void stream_reached(struct blob_core *c, uint32_t index, struct asker asker);

#endif
