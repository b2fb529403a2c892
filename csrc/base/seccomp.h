/* base/seccomp.h -- which system calls a thread may make. Each kind of thread has a list of its own (base/calls.h): those
 * that read guests' bytes or decode what a registry sent have the shortest, because they are attacked first.
 *
 * A filter is a thread's own, is never taken off, and goes on in threads that it starts. It needs no privilege; it sets
 * no_new_privs for the thread. */
#ifndef VND_SECCOMP_H
#define VND_SECCOMP_H
#include <linux/filter.h>
#include <stddef.h>
#include <stdint.h>

#include "vnd.h"

/* Instructions that a program has room for: two a call, more for those whose arguments are looked at. */
#define SECCOMP_PROGRAM_MAX 512

/* The program that seccomp_confine installs: its length, or -E2BIG. pid: of the process. For tests. */
int seccomp_program(enum vnd_seccomp mode, enum vnd_thread_kind kind, uint32_t pid,
                    struct sock_filter out[SECCOMP_PROGRAM_MAX]);
/* Before threads are confined, from one that is not: what the C library does once and by file names. 0 or -errno. */
int seccomp_prepare(enum vnd_seccomp mode);
/* Confines the calling thread. 0; mode VND_SECCOMP_NONE: 0 and nothing is done; or -errno. In mode trap the first call
 * installs the process's handler of SIGSYS, which writes one line to standard error and ends the process with status 159. */
int seccomp_confine(enum vnd_seccomp mode, enum vnd_thread_kind kind);
/* The same by the engine's configuration; what fails is said. */
void engine_confine(struct vnd_engine *e, enum vnd_thread_kind kind);
/* The call's name, or NULL: the filters do not know it. */
const char *seccomp_call_name(int number);

#endif
