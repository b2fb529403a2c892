/* base/thread.h -- starting a thread of the engine. */
#ifndef VND_THREAD_H
#define VND_THREAD_H
#include <pthread.h>

/* pthread_create under a name (15 bytes at most). Signals go to Python's main thread, so the new one blocks all but SIGBUS
 * and SIGSEGV. 0 or -errno. */
int thread_start(pthread_t *t, const char *name, void *(*fn)(void *), void *arg);

#endif
