/* base/ledger.c -- see ledger.h. */
#include "base/ledger.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAGIC 0x6c65646765723031ull
#define VERSION 1u
#define HEAD_BYTES 4096u
#define SLOTS_MAX (12u << 20) /* 1.5 GiB of address space; pages that are not used cost nothing */
#define LEDGER_BYTES (HEAD_BYTES + (uint64_t)SLOTS_MAX * LEDGER_SLOT_BYTES)
#define KIND_MORE 0xffffu

struct head {
    uint64_t magic;
    uint32_t version, slot_bytes;
    uint64_t numbers[LEDGER_NUMBERS];
    uint32_t end; /* slots from here on were never used; slot 0 is none */
};

struct slot {
    _Atomic uint16_t kind; /* 0: free; KIND_MORE: goes on with another slot's record */
    uint16_t len;          /* bytes of data here */
    uint32_t next;         /* of the chain; 0: none */
    uint32_t whole;        /* in the first slot: bytes of the record */
    uint32_t padding;
    uint8_t data[LEDGER_SLOT_DATA];
};
_Static_assert(sizeof(struct slot) == LEDGER_SLOT_BYTES, "slot");

struct ledger {
    struct head *head;
    struct slot *slots;
    pthread_mutex_t lock;
    uint32_t *free;
    uint32_t n_free, room;
    bool swept; /* free holds every free slot below head->end */
};

/* Only a process that dies between two stores would see them out of order, and its memory is this machine's. */
static void keep_order(void)
{
    atomic_signal_fence(memory_order_seq_cst);
}

int ledger_create(void)
{
    int fd = memfd_create("ledger", MFD_CLOEXEC | MFD_ALLOW_SEALING), rc;

    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)LEDGER_BYTES) == 0 &&
        fcntl(fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) == 0)
        return fd;
    rc = -errno;
    close(fd);
    return rc;
}

struct ledger *ledger_open(int fd)
{
    struct ledger *l = calloc(1, sizeof(*l));
    struct stat st;
    void *at = MAP_FAILED;

    if (l && fstat(fd, &st) == 0 && (uint64_t)st.st_size == LEDGER_BYTES)
        at = mmap(NULL, LEDGER_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (at == MAP_FAILED) {
        free(l);
        return NULL;
    }
    l->head = at;
    l->slots = (void *)((uint8_t *)at + HEAD_BYTES);
    pthread_mutex_init(&l->lock, NULL);
    if (!l->head->magic) {
        l->head->version = VERSION;
        l->head->slot_bytes = LEDGER_SLOT_BYTES;
        l->head->end = 1;
        keep_order();
        l->head->magic = MAGIC;
        l->swept = true;
    }
    if (l->head->magic != MAGIC || l->head->version != VERSION || l->head->slot_bytes != LEDGER_SLOT_BYTES ||
        l->head->end < 1 || l->head->end > SLOTS_MAX) {
        ledger_close(l);
        return NULL;
    }
    return l;
}

void ledger_close(struct ledger *l)
{
    if (!l)
        return;
    munmap(l->head, LEDGER_BYTES);
    pthread_mutex_destroy(&l->lock);
    free(l->free);
    free(l);
}

uint64_t *ledger_numbers(struct ledger *l)
{
    return l->head->numbers;
}

/* ---- slots, under the lock */

/* A slot that is forgotten for want of memory is found again by the next process. */
static void give_slot(struct ledger *l, uint32_t at)
{
    if (l->n_free == l->room) {
        uint32_t room = l->room ? l->room * 2 : 256;
        uint32_t *more = realloc(l->free, room * sizeof(*more));

        if (!more)
            return;
        l->free = more;
        l->room = room;
    }
    l->free[l->n_free++] = at;
}

static uint32_t take_slot(struct ledger *l)
{
    if (l->n_free)
        return l->free[--l->n_free];
    return l->head->end < SLOTS_MAX ? l->head->end++ : 0;
}

static void free_chain(struct ledger *l, uint32_t at)
{
    for (uint32_t next; at; at = next) {
        struct slot *s = &l->slots[at];

        next = s->next;
        atomic_store_explicit(&s->kind, 0, memory_order_relaxed);
        keep_order();
        s->next = 0;
        give_slot(l, at);
    }
}

/* Writes the chain from its end, so that a slot's next is there before it: its first slot, 0: no room. */
static uint32_t write_chain(struct ledger *l, uint16_t kind, const uint8_t *data, uint32_t len)
{
    uint32_t n = len ? (len + LEDGER_SLOT_DATA - 1) / LEDGER_SLOT_DATA : 1, next = 0;

    while (n-- > 0) {
        uint32_t at = take_slot(l), off = n * LEDGER_SLOT_DATA;
        struct slot *s = &l->slots[at];

        if (!at) {
            free_chain(l, next);
            return 0;
        }
        s->len = (uint16_t)(len - off < LEDGER_SLOT_DATA ? len - off : LEDGER_SLOT_DATA);
        s->next = next;
        s->whole = len;
        memcpy(s->data, data + off, s->len);
        keep_order();
        atomic_store_explicit(&s->kind, n ? KIND_MORE : kind, memory_order_relaxed);
        next = at;
    }
    keep_order();
    return next;
}

int ledger_put(struct ledger *l, uint32_t *at, uint16_t kind, const void *data, uint32_t len)
{
    uint32_t made, old = *at;

    if (!l)
        return 0;
    if (len > LEDGER_DATA_MAX)
        return -EINVAL;
    pthread_mutex_lock(&l->lock);
    made = write_chain(l, kind, data, len);
    if (made) {
        *at = made;
        free_chain(l, old);
    }
    pthread_mutex_unlock(&l->lock);
    return made ? 0 : -ENOSPC;
}

void ledger_drop(struct ledger *l, uint32_t *at)
{
    uint32_t old = *at;

    *at = 0;
    if (!l || !old)
        return;
    pthread_mutex_lock(&l->lock);
    free_chain(l, old);
    pthread_mutex_unlock(&l->lock);
}

uint64_t *ledger_word(struct ledger *l, uint32_t at, uint32_t offset)
{
    return (uint64_t *)(void *)(l->slots[at].data + offset);
}

/* ---- what another process left */

/* Copies a record whose first slot is at. Its bytes, or -EINVAL where the chain is not sound. used: slots that a record leads
 * to. */
static int read_chain(const struct ledger *l, uint32_t at, uint8_t *data, uint8_t *used)
{
    uint32_t whole = l->slots[at].whole, got = 0;

    if (whole > LEDGER_DATA_MAX)
        return -EINVAL;
    for (uint32_t i = at; i; i = l->slots[i].next) {
        const struct slot *s = &l->slots[i];

        if (i >= l->head->end || used[i] || s->len > LEDGER_SLOT_DATA || got + s->len > whole ||
            (i != at && s->kind != KIND_MORE))
            return -EINVAL;
        memcpy(data + got, s->data, s->len);
        got += s->len;
        used[i] = 1;
    }
    return got == whole ? (int)got : -EINVAL;
}

void ledger_each(struct ledger *l, void (*take)(void *ctx, uint32_t at, uint16_t kind, const void *data, uint32_t len),
                 void *ctx)
{
    uint32_t end = l->head->end;
    uint8_t *used = calloc(end, 1), data[LEDGER_DATA_MAX];

    if (!used)
        return;
    for (uint32_t at = 1; at < end; at++) {
        uint16_t kind = l->slots[at].kind;
        int len = kind && kind != KIND_MORE ? read_chain(l, at, data, used) : -EINVAL;

        if (len >= 0)
            take(ctx, at, kind, data, (uint32_t)len);
    }
    pthread_mutex_lock(&l->lock);
    for (uint32_t at = 1; at < end && !l->swept; at++)
        if (!used[at]) {
            l->slots[at].kind = 0;
            give_slot(l, at);
        }
    l->swept = true;
    pthread_mutex_unlock(&l->lock);
    free(used);
}
