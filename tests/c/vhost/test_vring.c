/* Split rings, without threads but for the last case. */
#include <errno.h>
#include <pthread.h>
#include <sched.h>

#include "ring_guest.h"

static int walk(struct guest *g, uint16_t head, struct vring_chain *c)
{
    uint32_t hint = 0;
    const char *why = NULL;
    int rc = vring_walk(&g->ring, g->mem, &hint, head, c, &why);

    CHECK((rc == 0) == (why == NULL));
    return rc;
}

static struct vring_chain chain;

/* Whether a guest that sleeps is signalled for what was staged. */
static bool publish(struct vring *v)
{
    vring_publish(v);
    return vring_must_signal(v);
}

TEST(resolve)
{
    struct guest g;
    struct vring r;

    guest_open(&g, true);
    CHECK(vring_resolve(&r, g.mem, 0, USER, USER + AVAIL, USER + USED) == -EINVAL);
    CHECK(vring_resolve(&r, g.mem, 6, USER, USER + AVAIL, USER + USED) == -EINVAL);
    CHECK(vring_resolve(&r, g.mem, 2048, USER, USER + AVAIL, USER + USED) == -EINVAL);
    CHECK(vring_resolve(&r, g.mem, 8, USER + 8, USER + AVAIL, USER + USED) == -EINVAL);
    CHECK(vring_resolve(&r, g.mem, 8, USER, USER + AVAIL + 1, USER + USED) == -EINVAL);
    CHECK(vring_resolve(&r, g.mem, 8, USER, USER + AVAIL, USER + USED + 2) == -EINVAL);
    CHECK(vring_resolve(&r, g.mem, 8, USER + LOW - 64, USER + AVAIL, USER + USED) == -EFAULT);
    CHECK(vring_resolve(&r, g.mem, 8, USER, USER + LOW - 16, USER + USED) == -EFAULT);
    CHECK(vring_resolve(&r, g.mem, 8, USER, USER + AVAIL, USER + LOW - 64) == -EFAULT);
    CHECK(vring_resolve(&r, g.mem, 8, 0, 0, 0) == -EFAULT);
    CHECK(r.used == NULL);
    guest_close(&g);
}

TEST(chain)
{
    struct guest g;

    guest_open(&g, true);
    put_desc(&g, 0, 0x5000, 40, 1, 3);
    put_desc(&g, 3, 0x5028, 10, 1, 4); /* adjoins: one segment */
    put_desc(&g, 4, 0x5900, 0, 1, 5);  /* empty: skipped */
    put_desc(&g, 5, 0x6000, 16, 3, 6);
    put_desc(&g, 6, 0x7000, 4096, 3, 7);
    put_desc(&g, 7, 0x8000, 4096, 2, 0xffff); /* adjoins; next means nothing here */
    CHECK(walk(&g, 0, &chain) == 0);
    CHECK(chain.n_in == 1 && chain.in_bytes == 50 && chain.n_out == 2 && chain.out_bytes == 16 + 8192);
    CHECK(chain.seg[0].gpa == 0x5000 && chain.seg[1].gpa == 0x6000 && chain.seg[2].len == 8192);
    /* Readable and writable neighbours stay apart. */
    put_desc(&g, 1, 0x5000, 16, 1, 2);
    put_desc(&g, 2, 0x5010, 16, 2, 0);
    CHECK(walk(&g, 1, &chain) == 0 && chain.n_in == 1 && chain.n_out == 1);
    guest_close(&g);
}

TEST(indirect)
{
    struct guest g;

    guest_open(&g, true);
    put_table(&g, 0, 0x5000, 40, 1, 2);
    put_table(&g, 2, 0x6000, 16, 3, 1);
    put_table(&g, 1, 0x7000, 8, 2, 0);
    put_desc(&g, 0, TABLE, 48, 4, 0);
    CHECK(walk(&g, 0, &chain) == 0 && chain.in_bytes == 40 && chain.out_bytes == 24 && chain.n_out == 2);
    put_desc(&g, 0, TABLE, 0, 4, 0);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, TABLE, 47, 4, 0);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, TABLE, 16 * 2048, 4, 0);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, TABLE, 32, 4, 0); /* entry 2 lies beyond the table */
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, TABLE, 48, 4 | 1, 1);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, 0x5000, 8, 1, 1);
    put_desc(&g, 1, TABLE, 48, 4 | 2, 0); /* not first, and its write flag means nothing */
    CHECK(walk(&g, 0, &chain) == 0 && chain.in_bytes == 48 && chain.out_bytes == 24);
    put_desc(&g, 1, TABLE, 16 * 1024, 4, 0); /* with it longer than any ring */
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, TABLE, 48, 4, 0);
    put_table(&g, 1, TABLE, 48, 4, 0); /* a table in a table */
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_table(&g, 1, 0x7000, 8, 3, 0); /* a loop */
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, HIGH, 48, 4, 0); /* a hole: this request only */
    CHECK(walk(&g, 0, &chain) == -EFAULT);
    /* A table that lies across two regions. */
    put_table(&g, 1, 0x7000, 8, 2, 0);
    memcpy(g.low + LOW - 24, g.low + TABLE, 24);
    memcpy(g.high, g.low + TABLE + 24, 24);
    put_desc(&g, 0, LOW - 24, 48, 4, 0);
    CHECK(walk(&g, 0, &chain) == 0 && chain.in_bytes == 40 && chain.out_bytes == 24);
    guest_close(&g);
}

TEST(table_in_a_table_of_one_entry)
{
    struct guest g;

    guest_open(&g, true);
    put_table(&g, 0, 0x5000, 16, 4, 0); /* as a plain buffer it would do */
    put_desc(&g, 0, TABLE, 16, 4, 0);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    guest_close(&g);
}

/* The walk keeps its copy of a table: what an earlier, longer one has left behind it is not the guest's. */
TEST(next_beyond_an_indirect_table)
{
    struct guest g;

    guest_open(&g, true);
    put_table(&g, 0, 0x5000, 40, 1, 2);
    put_table(&g, 2, 0x7000, 8, 2, 0);
    put_desc(&g, 0, TABLE, 48, 4, 0);
    CHECK(walk(&g, 0, &chain) == 0 && chain.in_bytes == 40 && chain.out_bytes == 8);
    put_desc(&g, 0, TABLE, 32, 4, 0);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    guest_close(&g);
}

TEST(hostile_chain)
{
    struct guest g;
    uint16_t head;

    guest_open(&g, true);
    put_desc(&g, 0, 0x5000, 8, 1, RING_NUM); /* next beyond the ring */
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, 0x5000, 8, 1, 0); /* a loop of one */
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, 0x5000, 0, 1, 1); /* of two, empty ones */
    put_desc(&g, 1, 0x5000, 0, 1, 0);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, 0x5000, 8, 3, 1); /* readable after writable */
    put_desc(&g, 1, 0x5000, 8, 0, 0);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, UINT64_MAX - 4, 8, 0, 0); /* wraps */
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    put_desc(&g, 0, 0, UINT32_MAX, 1, 1); /* sums to more than 32 bits */
    put_desc(&g, 1, 0, UINT32_MAX, 0, 0);
    CHECK(walk(&g, 0, &chain) == -EBADMSG);
    /* The longest possible chain is fine. */
    for (uint16_t i = 0; i < RING_NUM; i++)
        put_desc(&g, i, 0x5000 + 0x20u * i, 8, i + 1u < RING_NUM, (uint16_t)(i + 1));
    CHECK(walk(&g, 0, &chain) == 0 && chain.n_in == RING_NUM);
    /* Heads and indices. */
    offer(&g, RING_NUM);
    CHECK(vring_pending(&g.ring) == 1 && vring_next(&g.ring, &head) == -EBADMSG);
    put16(g.low + AVAIL + 2, RING_NUM + 1);
    CHECK(vring_pending(&g.ring) == -EBADMSG);
    put16(g.low + AVAIL + 2, 0xffff); /* going back */
    CHECK(vring_pending(&g.ring) == -EBADMSG);
    put16(g.low + AVAIL + 2, RING_NUM);
    CHECK(vring_pending(&g.ring) == RING_NUM);
    guest_close(&g);
}

/* Indices pass 65,535 in both rings, with every signalling decision as the guest's used_event asks. */
TEST(wrap)
{
    struct guest g;
    uint16_t start = 65530, head;

    guest_open(&g, true);
    g.avail_idx = g.ring.last_avail = g.ring.used_idx = g.ring.signalled_used = start;
    put16(g.low + USED + 2, start);
    put16(g.low + AVAIL + 2, start);
    CHECK(vring_used_now(&g.ring) == start);
    for (uint32_t i = 0; i < 16; i++) {
        bool wanted = i % 3 == 0;

        offer(&g, (uint16_t)(i % RING_NUM));
        CHECK(vring_pending(&g.ring) == 1);
        CHECK(vring_next(&g.ring, &head) == 0 && head == i % RING_NUM);
        vring_stage(&g.ring, head, 100 + i);
        /* used_event names the entry after which to signal. */
        put16(g.low + AVAIL + 4 + 2 * RING_NUM, (uint16_t)(start + i + (wanted ? 0 : 5)));
        CHECK(publish(&g.ring) == wanted);
        CHECK(get16(g.low + USED + 2) == (uint16_t)(start + i + 1));
        struct vring_used_elem e;
        memcpy(&e, g.low + USED + 4 + 8 * ((start + i) % RING_NUM), 8);
        CHECK(e.id == i % RING_NUM && e.len == 100 + i);
        CHECK(!vring_arm(&g.ring));
        CHECK(get16(g.low + USED + 4 + 8 * RING_NUM) == (uint16_t)(start + i + 1));
    }
    offer(&g, 1);
    CHECK(vring_arm(&g.ring));
    guest_close(&g);
}

/* need_event over a whole batch, and the first batch of a ring. */
TEST(batch_event)
{
    struct guest g;

    guest_open(&g, true);
    put16(g.low + AVAIL + 4 + 2 * RING_NUM, 2);
    for (uint16_t i = 0; i < 4; i++)
        vring_stage(&g.ring, i, 0);
    CHECK(publish(&g.ring)); /* entries 0..3 pass 2 */
    vring_stage(&g.ring, 4, 0);
    CHECK(!publish(&g.ring));
    g.ring.force_signal = true;
    vring_stage(&g.ring, 5, 0);
    CHECK(publish(&g.ring));
    vring_stage(&g.ring, 6, 0);
    CHECK(!publish(&g.ring));
    CHECK(!publish(&g.ring)); /* nothing staged */
    guest_close(&g);
}

/* A guest polls for so long that used.idx comes round, asking for no signal; then it sleeps. */
TEST(a_guest_that_sleeps_after_polling_is_signalled)
{
    struct guest g;

    guest_open(&g, true);
    g.ring.signalled_used = g.ring.used_idx;
    g.ring.force_signal = false;
    put16(g.low + AVAIL + 4 + 2 * RING_NUM, (uint16_t)(g.ring.used_idx - 1));
    for (uint32_t i = 0; i < 65535; i++) {
        vring_stage(&g.ring, 0, 0);
        CHECK(!publish(&g.ring));
    }
    put16(g.low + AVAIL + 4 + 2 * RING_NUM, g.ring.used_idx);
    vring_stage(&g.ring, 0, 0);
    CHECK(publish(&g.ring));
    guest_close(&g);
}

TEST(flags)
{
    struct guest g;

    guest_open(&g, false);
    vring_stage(&g.ring, 0, 0);
    CHECK(publish(&g.ring));
    put16(g.low + AVAIL, 1); /* no interrupts, please */
    vring_stage(&g.ring, 1, 0);
    CHECK(!publish(&g.ring));
    vring_disarm(&g.ring);
    CHECK(get16(g.low + USED) == 1);
    CHECK(!vring_arm(&g.ring) && get16(g.low + USED) == 0);
    guest_close(&g);
}

/* ---- both sides go to sleep at once: one of them sees the other */

#define SLEEPS 50000

struct sleeper {
    struct guest *g;
    _Atomic uint32_t round; /* both begin a round when it is theirs */
    _Atomic uint32_t done;
    bool saw; /* the guest, in this round: the used index had moved */
};

static void *guest_sleeps(void *arg)
{
    struct sleeper *s = arg;

    for (uint32_t i = 1; i <= SLEEPS; i++) {
        uint16_t *event = (uint16_t *)(void *)(s->g->low + AVAIL + 4 + 2 * RING_NUM);
        uint16_t *used = (uint16_t *)(void *)(s->g->low + USED + 2), before;

        while (atomic_load(&s->round) != i)
            ;
        before = (uint16_t)(i - 1);
        __atomic_store_n(event, before, __ATOMIC_RELAXED); /* asks for the next */
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        s->saw = __atomic_load_n(used, __ATOMIC_ACQUIRE) != before;
        atomic_store(&s->done, i);
    }
    return NULL;
}

/* The guest asks to be signalled and looks once more; the device publishes and looks at what the guest asks. Where neither
 * sees the other, the guest sleeps for ever. A test by many tries: never wrong where the order is kept. */
TEST(no_signal_is_lost_when_both_look_at_once)
{
    struct guest g;
    struct sleeper s = { .g = &g };
    pthread_t t;

    guest_open(&g, true);
    g.ring.force_signal = false;
    CHECK(pthread_create(&t, NULL, guest_sleeps, &s) == 0);
    for (uint32_t i = 1; i <= SLEEPS; i++) {
        vring_stage(&g.ring, 0, 0);
        /* So far the guest asks for one that is far away. */
        put16(g.low + AVAIL + 4 + 2 * RING_NUM, (uint16_t)(i + 1000));
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        atomic_store(&s.round, i);
        for (volatile uint32_t pause = i % 64; pause > 0; pause--)
            ;
        bool signal = publish(&g.ring);
        while (atomic_load(&s.done) != i)
            sched_yield();
        CHECK(signal || s.saw);
    }
    pthread_join(t, NULL);
    guest_close(&g);
}
