/* base/sigbus.c -- see sigbus.h. */
#include "base/sigbus.h"

#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

/* start is 0 while the node is unused. Nodes are reused and never freed, so the handler may walk the list at any
 * moment without a lock. It runs in the thread that touched the range, so the range it looks for cannot go away
 * meanwhile; another node that changes under it is recognised by reading start twice. */
struct sigbus_range {
    struct sigbus_range *next;
    _Atomic uintptr_t start;
    _Atomic size_t len, page_bytes;
    _Atomic(_Atomic bool *) flag;
    _Atomic uint32_t pages_left; /* that may be replaced one by one */
    _Atomic bool hit;
};

static _Atomic(struct sigbus_range *) ranges;
static struct sigaction older;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool installed;

static bool put_zeroes(uintptr_t at, size_t len)
{
    void *want = (void *)at;

    return mmap(want, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) ==
           want;
}

/* Several threads may be in the handler at once. */
static bool may_split(struct sigbus_range *r)
{
    uint32_t left = atomic_load(&r->pages_left);

    while (left > 0)
        if (atomic_compare_exchange_weak(&r->pages_left, &left, left - 1))
            return true;
    return false;
}

static bool repair(uintptr_t addr)
{
    for (struct sigbus_range *r = atomic_load_explicit(&ranges, memory_order_acquire); r != NULL; r = r->next) {
        uintptr_t start = atomic_load_explicit(&r->start, memory_order_acquire);
        size_t len = atomic_load_explicit(&r->len, memory_order_relaxed);
        size_t page = atomic_load_explicit(&r->page_bytes, memory_order_relaxed);
        _Atomic bool *flag = atomic_load_explicit(&r->flag, memory_order_relaxed);

        if (start == 0 || addr < start || addr - start >= len)
            continue;
        atomic_thread_fence(memory_order_acquire);
        if (atomic_load_explicit(&r->start, memory_order_relaxed) != start)
            continue;
        /* Before other threads can see the zeroes. */
        atomic_store(&r->hit, true);
        if (flag != NULL)
            atomic_store(flag, true);
        return (may_split(r) && put_zeroes(start + (addr - start) / page * page, page)) || put_zeroes(start, len);
    }
    return false;
}

static void handle(int sig, siginfo_t *info, void *context)
{
    /* Only a real access fault carries an address worth looking at. */
    if (info->si_code > 0 && repair((uintptr_t)info->si_addr))
        return;
    if (older.sa_flags & SA_SIGINFO) {
        older.sa_sigaction(sig, info, context);
        return;
    }
    if (older.sa_handler != SIG_DFL && older.sa_handler != SIG_IGN) {
        older.sa_handler(sig);
        return;
    }
    if (older.sa_handler == SIG_IGN && info->si_code <= 0)
        return;
    /* Default action: the access is repeated, or the signal raised again, with no handler in between. */
    signal(SIGBUS, SIG_DFL);
    if (info->si_code <= 0)
        raise(SIGBUS);
}

struct sigbus_range *sigbus_add(void *start, size_t len, size_t page_bytes, bool whole, _Atomic bool *hit)
{
    struct sigbus_range *r;

    pthread_mutex_lock(&lock);
    if (!installed) {
        struct sigaction sa = { .sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER };

        sigemptyset(&sa.sa_mask);
        installed = sigaction(SIGBUS, &sa, &older) == 0;
    }
    for (r = atomic_load(&ranges); r != NULL; r = r->next)
        if (atomic_load(&r->start) == 0)
            break;
    if (r == NULL) {
        r = calloc(1, sizeof(*r));
        if (r != NULL) {
            r->next = atomic_load(&ranges);
            atomic_store_explicit(&ranges, r, memory_order_release);
        }
    }
    if (r != NULL) {
        atomic_store(&r->hit, false);
        atomic_store(&r->len, len);
        atomic_store(&r->page_bytes, page_bytes);
        atomic_store(&r->flag, hit);
        atomic_store(&r->pages_left, whole ? 0 : SIGBUS_PAGES_MAX);
        atomic_store_explicit(&r->start, (uintptr_t)start, memory_order_release);
    }
    pthread_mutex_unlock(&lock);
    return r;
}

void sigbus_remove(struct sigbus_range *r)
{
    if (r == NULL)
        return;
    pthread_mutex_lock(&lock);
    atomic_store(&r->start, 0);
    atomic_store(&r->flag, NULL);
    pthread_mutex_unlock(&lock);
}

bool sigbus_hit(struct sigbus_range *r)
{
    return r != NULL && atomic_load_explicit(&r->hit, memory_order_relaxed);
}

void sigbus_unblock(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}
