/* base/thread.c -- see base/thread.h. */
#include "base/thread.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

struct start {
    void *(*fn)(void *);
    void *arg;
    char name[16];
};

/* A thread names itself: to name another one the C library opens a file by its path, which a confined thread that starts one
 * must not. */
static void *start_main(void *arg)
{
    struct start start = *(struct start *)arg;

    free(arg);
    pthread_setname_np(pthread_self(), start.name);
    return start.fn(start.arg);
}

int thread_start(pthread_t *t, const char *name, void *(*fn)(void *), void *arg)
{
    struct start *start = malloc(sizeof(*start));
    sigset_t all, old;
    int rc;

    if (!start)
        return -ENOMEM;
    start->fn = fn;
    start->arg = arg;
    snprintf(start->name, sizeof(start->name), "%s", name);
    /* SIGBUS and SIGSEGV are raised by the thread's own access and must reach it. */
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    rc = pthread_create(t, NULL, start_main, start);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc)
        free(start);
    return -rc;
}
