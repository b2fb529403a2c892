/* base/base.h -- what all the other folders stand on: errors, time, threads, lines for the log, counters, the pool, and
 * lists that wake a thread. It knows no blob, no request and no guest.
 *
 * Threads: any may call what is here; wakelist.h says which of its functions are the taker's alone.
 * Locks: the engine's lock (list of counter blocks, list of stores) may be held when the pool's or the events' is taken;
 * these two are taken last and nothing is called while they are held.
 * Ownership: struct vnd_engine owns the events and the pool. store/engine.c makes and ends all of it, in order.
 * May use: the C library and vnd.h. Not part of this header, because few need them: hostmount.h, netfs.h, privilege.h,
 * seccomp.h, sigbus.h, wakelist.h.
 */
#ifndef VND_BASE_H
#define VND_BASE_H
#include "base/clock.h"
#include "base/counters.h"
#include "base/engine.h"
#include "base/error.h"
#include "base/events.h"
#include "base/pool.h"
#include "base/thread.h"

#endif
