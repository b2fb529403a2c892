/* Requests that may take long are served by other threads, as far as their bytes have room. */
#include "share_rig.h"

/* Which way a request that may take long is served: 0 here, 1 by another thread. */
static int is_detached(struct share *s, const struct made *m)
{
    struct fuse_fsync_in in = { .fh = m->fh };
    struct client *c = &s->client;
    enum req_verdict v;

    fake_done(&c->f);
    fake_fill(&c->f, FUSE_OP_FSYNC, m->nodeid, &in, sizeof(in), 4096);
    c->f.r.session_gen = fuse_session_gen(c->rig.s);
    c->f.r.wait.wake = client_wake;
    atomic_store(&c->woken, 0);
    v = fuse_session_serve(c->rig.s, &c->rig.w, &c->f.r);
    if (v != REQ_PARKED)
        return 0;
    while (!atomic_load(&c->woken))
        sched_yield();
    CHECK_EQ(fuse_session_serve(c->rig.s, &c->rig.w, &c->f.r), REQ_REPLY);
    return 1;
}

TEST(detached_requests_have_a_budget)
{
    uint64_t mine = (128ull << 20) - 1000, all = (512ull << 20) - 1000;
    struct share s;
    struct made m;

    share_new(&s);
    CHECK_EQ(create_file(&s.client, "f", &m), 0);
    CHECK_EQ(is_detached(&s, &m), 1);
    CHECK_EQ(atomic_load(&s.rig.s->detached_bytes), 0);
    CHECK_EQ(atomic_load(&engine->detached_bytes), 0);
    atomic_store(&s.rig.s->detached_bytes, mine);
    CHECK_EQ(is_detached(&s, &m), 0);
    atomic_store(&s.rig.s->detached_bytes, 0);
    atomic_store(&engine->detached_bytes, all); /* of other sessions */
    CHECK_EQ(is_detached(&s, &m), 0);
    atomic_store(&engine->detached_bytes, 0);
    CHECK_EQ(is_detached(&s, &m), 1);
    share_free(&s);
}
