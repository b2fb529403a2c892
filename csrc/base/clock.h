/* base/clock.h -- time that never goes back: CLOCK_MONOTONIC. Any thread. */
#ifndef VND_CLOCK_H
#define VND_CLOCK_H
#include <stdint.h>
#include <time.h>

int64_t now_us(void);
/* At most one kernel tick (1 to 10 ms) old, and cheaper: for decisions, not for deadlines. */
int64_t coarse_ms(void);
/* The time ms from now, or of now_us(), as a wait on a condition takes it. */
struct timespec time_after_ms(int ms);
struct timespec time_at_us(int64_t us);

#endif
