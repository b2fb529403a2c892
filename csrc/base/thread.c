/* base/thread.c -- see base/thread.h. */
#include "base/thread.h"

#include <signal.h>
#include <stdio.h>

int thread_start(pthread_t *t, const char *name, void *(*fn)(void *), void *arg)
{
    sigset_t all, old;
    char short_name[16];
    int rc;

    /* SIGBUS and SIGSEGV are raised by the thread's own access and must reach it. */
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    rc = pthread_create(t, NULL, fn, arg);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc)
        return -rc;
    snprintf(short_name, sizeof short_name, "%s", name);
    pthread_setname_np(*t, short_name);
    return 0;
}
