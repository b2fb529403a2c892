/* fg_ring.c -- the driver's side of a split virtqueue. */
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "fg_internal.h"

int fg_fail(fg_queue *q, int code, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(q->err, sizeof q->err, fmt, ap);
    va_end(ap);
    return code;
}

uint64_t fg_slot_bytes(uint32_t data_bytes)
{
    return FG_SLOT_DATA + (uint64_t)data_bytes + FG_PAGE;
}

static int set_up_slots(fg_queue *q)
{
    uint32_t pages = q->cfg.slot_data_bytes / FG_PAGE;
    uint64_t each = fg_slot_bytes(q->cfg.slot_data_bytes);
    q->slots = calloc(q->cfg.slot_count ? q->cfg.slot_count : 1, sizeof *q->slots);
    q->shadow = calloc(q->cfg.slot_count ? q->cfg.slot_count : 1, FG_SLOT_OUT);
    q->page_order = calloc(pages ? pages : 1, sizeof *q->page_order);
    if (!q->slots || !q->shadow || !q->page_order)
        return -ENOMEM;
    for (uint32_t i = 0; i < pages; i++)
        q->page_order[i] = (uint16_t)i;
    for (uint32_t i = pages; q->cfg.scatter && i > 1; i--) { /* Fisher-Yates, always the same order */
        uint32_t j = (i * 2654435761u >> 8) % i;
        uint16_t t = q->page_order[i - 1];
        q->page_order[i - 1] = q->page_order[j];
        q->page_order[j] = t;
    }
    for (uint32_t i = 0; i < q->cfg.slot_count; i++) {
        q->slots[i].gpa = q->cfg.slot_gpa + i * each;
        q->slots[i].host = fg_ram_at(q->ram, q->slots[i].gpa, each);
        if (!q->slots[i].host)
            return -EFAULT;
        memset(q->slots[i].host, FG_FILL, each);
    }
    return 0;
}

static void set_up_rings(fg_queue *q, uint16_t next)
{
    uint32_t n = q->cfg.num;
    memset(q->desc, 0, n * sizeof *q->desc);
    memset(q->avail, 0, 4 + 2 * n + 2);
    memset(q->used, 0, 4 + 8 * n + 2);
    q->used_event = (_Atomic uint16_t *)&q->avail->ring[n];
    q->avail_event = (_Atomic uint16_t *)&q->used->ring[n];
    q->avail_idx = q->published = q->last_used = next;
    atomic_store(&q->avail->idx, next);
    atomic_store(&q->used->idx, next);
    for (uint32_t i = 0; i < n; i++)
        q->next[i] = (uint16_t)(i + 1);
    q->free_count = (uint16_t)n;
    if (q->cfg.poll)
        q->avail->flags = 1;
}

fg_queue *fg_queue_new(fg_ram *m, const fg_queue_config *cfg, uint16_t next)
{
    if (cfg->num == 0 || cfg->num > FG_RING_MAX || (cfg->num & (cfg->num - 1))) {
        errno = EINVAL;
        return NULL;
    }
    fg_queue *q = calloc(1, sizeof *q);
    if (!q)
        return NULL;
    q->ram = m;
    q->cfg = *cfg;
    q->kick_fd = -1;
    q->call_fd = -1;
    q->next_unique = 1u << 20; /* apart from those that Python gives out */
    q->desc = (void *)fg_ram_at(m, cfg->desc_gpa, 16ull * cfg->num);
    q->avail = (void *)fg_ram_at(m, cfg->avail_gpa, 6 + 2ull * cfg->num);
    q->used = (void *)fg_ram_at(m, cfg->used_gpa, 6 + 8ull * cfg->num);
    q->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int rc = !q->desc || !q->avail || !q->used ? -EFAULT : q->wake_fd < 0 ? -errno : set_up_slots(q);
    if (rc) {
        fg_queue_free(q);
        errno = -rc;
        return NULL;
    }
    set_up_rings(q, next);
    return q;
}

void fg_queue_free(fg_queue *q)
{
    if (!q)
        return;
    if (q->wake_fd >= 0)
        close(q->wake_fd);
    free(q->slots);
    free(q->shadow);
    free(q->page_order);
    free(q);
}

static void wake(fg_queue *q)
{
    uint64_t one = 1;
    ssize_t n = write(q->wake_fd, &one, sizeof one);
    (void)n;
}

void fg_queue_set_kick(fg_queue *q, int fd)
{
    q->kick_fd = fd;
}
const char *fg_queue_error(fg_queue *q)
{
    return q->err;
}
int fg_queue_in_flight(fg_queue *q)
{
    return q->in_flight;
}
uint16_t fg_queue_avail(fg_queue *q)
{
    return q->avail_idx;
}
uint64_t fg_queue_kicks(fg_queue *q)
{
    return q->kicks;
}
uint64_t fg_queue_calls(fg_queue *q)
{
    return q->calls;
}

void fg_queue_set_call(fg_queue *q, int fd)
{
    atomic_store(&q->call_fd, fd);
    wake(q);
}

void fg_queue_stop(fg_queue *q)
{
    atomic_store(&q->stop, 1);
    wake(q);
}

void fg_queue_abandon(fg_queue *q)
{
    atomic_store(&q->abandoned, 1);
    wake(q);
}

void fg_store16(uint8_t *at, uint16_t value)
{
    atomic_thread_fence(memory_order_seq_cst);
    atomic_store_explicit((_Atomic uint16_t *)at, value, memory_order_release);
}

uint16_t fg_load16(const uint8_t *at)
{
    atomic_thread_fence(memory_order_seq_cst);
    return atomic_load_explicit((const _Atomic uint16_t *)at, memory_order_acquire);
}

int fg_queue_add(fg_queue *q, const fg_segment *segments, int n, uint64_t table_gpa, uint64_t cookie)
{
    int need = table_gpa ? 1 : n;
    struct fg_desc *table = table_gpa ? (void *)fg_ram_at(q->ram, table_gpa, 16ull * (uint64_t)n) : NULL;
    if (n <= 0 || (table_gpa && !table))
        return fg_fail(q, -EINVAL, "no room for a chain of %d descriptors", n);
    if (need > q->free_count)
        return fg_fail(q, -ENOSPC, "ring full: %d descriptors wanted, %u free", need, q->free_count);
    uint16_t head = q->free_head, at = head;
    for (int i = 0; i < n; i++) {
        struct fg_desc d = { segments[i].gpa, segments[i].len, segments[i].write ? FG_DESC_WRITE : 0, 0 };
        if (i + 1 < n) {
            d.flags |= FG_DESC_NEXT;
            d.next = table ? (uint16_t)(i + 1) : q->next[at];
        }
        if (table) {
            table[i] = d;
        } else {
            q->desc[at] = d;
            at = q->next[at];
        }
    }
    if (table) {
        q->desc[head] = (struct fg_desc){ table_gpa, 16u * (uint32_t)n, FG_DESC_INDIRECT, 0 };
        at = q->next[head];
    }
    q->free_head = at;
    q->free_count = (uint16_t)(q->free_count - need);
    q->chain_len[head] = (uint16_t)need;
    q->cookie[head] = cookie;
    q->avail->ring[q->avail_idx & (q->cfg.num - 1)] = head;
    q->avail_idx++;
    q->in_flight++;
    return head;
}

void fg_queue_kick(fg_queue *q)
{
    uint64_t one = 1;
    if (q->kick_fd >= 0 && write(q->kick_fd, &one, sizeof one) == sizeof one)
        q->kicks++;
}

void fg_queue_publish(fg_queue *q)
{
    uint16_t old = q->published, now = q->avail_idx;
    if (old == now)
        return;
    atomic_store_explicit(&q->avail->idx, now, memory_order_release);
    q->published = now;
    atomic_thread_fence(memory_order_seq_cst);
    bool want;
    if (q->cfg.event_idx) {
        uint16_t event = atomic_load_explicit(q->avail_event, memory_order_relaxed);
        want = (uint16_t)(now - event - 1) < (uint16_t)(now - old);
    } else {
        want = !(*(volatile uint16_t *)&q->used->flags & 1);
    }
    if (want)
        fg_queue_kick(q);
}

int fg_queue_pop(fg_queue *q, uint64_t *cookie, uint32_t *len)
{
    uint16_t idx = atomic_load_explicit(&q->used->idx, memory_order_acquire);
    uint16_t ahead = (uint16_t)(idx - q->last_used);
    if (ahead == 0)
        return 0;
    if (ahead > q->in_flight)
        return fg_fail(q, -FG_BAD_USED, "used index %u is %u ahead with %d in flight", idx, ahead, q->in_flight);
    struct fg_used_elem e = q->used->ring[q->last_used & (q->cfg.num - 1)];
    if (e.id >= q->cfg.num || q->chain_len[e.id] == 0)
        return fg_fail(q, -FG_BAD_USED, "used entry for head %u, which is not in flight", e.id);
    uint16_t head = (uint16_t)e.id, last = head;
    for (uint16_t i = 1; i < q->chain_len[head]; i++)
        last = q->next[last];
    q->next[last] = q->free_head;
    q->free_head = head;
    q->free_count = (uint16_t)(q->free_count + q->chain_len[head]);
    q->chain_len[head] = 0;
    q->in_flight--;
    q->last_used++;
    *cookie = q->cookie[head];
    *len = e.len;
    return 1;
}

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static bool moved(fg_queue *q)
{
    return atomic_load_explicit(&q->used->idx, memory_order_acquire) != q->last_used;
}

static int spin(fg_queue *q, int timeout_ms)
{
    int64_t end = now_ms() + timeout_ms;
    for (uint32_t i = 1; !moved(q); i++) {
        __builtin_ia32_pause();
        if (atomic_load_explicit(&q->abandoned, memory_order_relaxed))
            return fg_fail(q, -ECANCELED, "the queue is being closed");
        if ((i & 0xfff) == 0 && (now_ms() > end || atomic_load(&q->stop)))
            return atomic_load(&q->stop) && now_ms() <= end
                       ? 0
                       : fg_fail(q, -ETIMEDOUT, "no completion in %d ms", timeout_ms);
    }
    return 0;
}

int fg_queue_wait(fg_queue *q, int timeout_ms)
{
    if (q->cfg.poll)
        return spin(q, timeout_ms);
    if (q->cfg.event_idx)
        atomic_store_explicit(q->used_event, q->last_used, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    if (moved(q))
        return 0;
    int64_t end = now_ms() + timeout_ms;
    for (;;) {
        if (atomic_load(&q->abandoned))
            return fg_fail(q, -ECANCELED, "the queue is being closed");
        int64_t left = end - now_ms();
        struct pollfd p[2] = { { atomic_load(&q->call_fd), POLLIN, 0 }, { q->wake_fd, POLLIN, 0 } };
        int n = left > 0 ? poll(p, 2, (int)left) : 0;
        uint64_t count;
        if (n < 0 && errno != EINTR)
            return fg_fail(q, -errno, "poll failed");
        if (n == 0)
            return moved(q) ? fg_fail(q, -FG_LOST_CALL, "used index moved, no interrupt in %d ms", timeout_ms)
                            : fg_fail(q, -ETIMEDOUT, "no completion in %d ms, %d in flight", timeout_ms, q->in_flight);
        if (n > 0 && p[1].revents && read(q->wake_fd, &count, sizeof count) > 0 && atomic_load(&q->stop))
            return 0;
        if (n > 0 && (p[0].revents & POLLIN) && read(p[0].fd, &count, sizeof count) == sizeof count) {
            q->calls++;
            if (moved(q))
                return 0;
        }
    }
}
