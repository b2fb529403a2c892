/* The in-flight region, up to a process that is killed at any instruction. */
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

#include "vhost/inflight.h"
#include "ring_guest.h"

TEST(inflight)
{
    uint64_t size;
    int fd = vnd_inflight_create(2, 8, &size);
    uint16_t heads[8];
    struct inflight f = { .num = 8 };
    struct vring_used_elem batch[2] = { { .id = 3 }, { .id = 5 } };

    CHECK(fd >= 0 && size == 2 * inflight_stride(8) + INFLIGHT_TAIL_BYTES && inflight_stride(8) == 192 &&
          inflight_stride(3) == 64);
    CHECK(ftruncate(fd, 0) < 0); /* sealed */
    f.region = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    inflight_reset(&f, 8, 7);
    CHECK(f.region->version == 1 && f.region->desc_num == 8);
    CHECK(inflight_recover(&f, 8, 7, true, heads) == 0 && f.region->used_idx == 7);
    inflight_begin(&f, 6);
    inflight_begin(&f, 3);
    inflight_begin(&f, 5);
    inflight_begin(&f, 1);
    CHECK(inflight_busy(&f, 3) && !inflight_busy(&f, 0));
    /* Died before used.idx moved: all four, in the order of fetching. */
    inflight_stage(&f, batch, 2);
    struct inflight again = { .region = f.region, .num = 8 };
    CHECK(inflight_recover(&again, 8, 7, true, heads) == 4);
    CHECK(heads[0] == 6 && heads[1] == 3 && heads[2] == 5 && heads[3] == 1 && again.counter == 4);
    /* Died after it and before they were struck off: the batch is done. */
    CHECK(inflight_recover(&again, 8, 9, true, heads) == 2 && heads[0] == 6 && heads[1] == 1);
    CHECK(f.region->used_idx == 9);
    inflight_drop(&f, 6);
    batch[0].id = 1;
    inflight_stage(&f, batch, 1);
    inflight_finish(&f, batch, 1, 10);
    CHECK(inflight_recover(&again, 8, 10, true, heads) == 0);
    /* What a hostile front-end might leave there. */
    f.region->last_batch_head = 60000;
    CHECK(inflight_recover(&again, 8, 13, true, heads) == 0);
    f.region->desc[0].next = 60000;
    f.region->last_batch_head = 0;
    CHECK(inflight_recover(&again, 8, 18, true, heads) == 0);
    f.region->desc_num = 4;
    CHECK(inflight_recover(&again, 8, 18, true, heads) == -EINVAL);
    f.region->version = 2;
    CHECK(inflight_recover(&again, 8, 18, true, heads) == -EINVAL);
    munmap(f.region, size);
    close(fd);
    CHECK(vnd_inflight_create(0, 8, &size) == -EINVAL && vnd_inflight_create(2, 1 << 20, &size) == -EINVAL);
}

/* ---- a process killed at any instruction of fetching and completing */

static const uint16_t offered[] = { 2, 0, 1, 3, 5 };

static void fetch_one(struct guest *g, struct inflight *f)
{
    uint16_t head;

    CHECK(vring_next(&g->ring, &head) == 0);
    inflight_begin(f, head);
}

static void complete(struct guest *g, struct inflight *f, uint16_t first, uint32_t n)
{
    struct vring_used_elem *batch = g->ring.staged;

    for (uint32_t i = 0; i < n; i++)
        vring_stage(&g->ring, offered[first + i], 0);
    inflight_stage(f, batch, n);
    vring_publish(&g->ring);
    inflight_finish(f, batch, n, g->ring.used_idx);
}

/* What the killed process does, from a fresh ring. */
static void live(struct guest *g, struct inflight *f)
{
    fetch_one(g, f);
    fetch_one(g, f);
    fetch_one(g, f);
    complete(g, f, 0, 2);
    fetch_one(g, f);
    complete(g, f, 2, 2);
    fetch_one(g, f);
}

/* Steps a child that lives through it; kills it after `steps`. Steps taken until its end or death, -1: cannot. */
static long run_and_kill(struct guest *g, struct inflight *f, long steps)
{
    int status = 0;
    long n = 0;
    pid_t child = fork();

    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0)
            _exit(2);
        raise(SIGSTOP);
        live(g, f);
        raise(SIGSTOP);
        _exit(0);
    }
    if (child < 0 || waitpid(child, &status, 0) != child || !WIFSTOPPED(status))
        return -1;
    while (n < steps) {
        if (ptrace(PTRACE_SINGLESTEP, child, NULL, NULL) != 0 || waitpid(child, &status, 0) != child)
            return -1;
        CHECK(!WIFEXITED(status));
        if (WSTOPSIG(status) == SIGSTOP)
            break; /* through with it */
        n++;
    }
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    return n;
}

/* Every head that was fetched is used or comes again, none twice, and fetching goes on behind them. */
static void check_after_death(struct guest *g, struct inflight *f)
{
    uint16_t used = get16(g->low + USED + 2), heads[RING_NUM];
    struct inflight next = { .region = f->region, .num = RING_NUM };
    uint32_t seen = 0, wanted = 0;
    int n = inflight_recover(&next, RING_NUM, used, true, heads);

    CHECK(n >= 0 && used + n <= 5);
    for (uint16_t i = 0; i < used; i++)
        seen += 1u << 4 * *(g->low + USED + 4 + 8 * i);
    for (int i = 0; i < n; i++)
        seen += 1u << 4 * heads[i];
    for (int i = 0; i < used + n; i++)
        wanted += 1u << 4 * offered[i];
    CHECK(seen == wanted);
}

TEST(killed_anywhere)
{
    struct guest g;
    struct inflight f = { .num = RING_NUM };
    long total = LONG_MAX, budget = 60000; /* steps in all: sanitizers make many more of them */

    guest_open(&g, true);
    f.region = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (uint32_t i = 0; i < 5; i++)
        put16(g.low + AVAIL + 4 + 2 * i, offered[i]);
    put16(g.low + AVAIL + 2, 5);
    for (long at = 0, stride = 1; at <= total; at += stride) {
        memset(g.low + USED, 0, 4 + 8 * RING_NUM);
        inflight_reset(&f, RING_NUM, 0);
        long n = run_and_kill(&g, &f, at ? at : LONG_MAX);
        if (n < 0) {
            fprintf(stderr, "test_killed_anywhere: no ptrace here, left out\n");
            break;
        }
        if (at == 0) {
            total = n;
            stride = 1 + total * total / 2 / budget;
        }
        check_after_death(&g, &f);
    }
    munmap(f.region, 4096);
    guest_close(&g);
}
