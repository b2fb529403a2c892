/* What one session holds of a share that it has in common with another guest's. */
#include <sys/resource.h>

#include "share_rig.h"

/* Two guests on one share. */
struct pair {
    struct rig first; /* the mount table's */
    vnd_passthrough *p;
    struct client a, b;
};

static void client_new(struct client *c, struct rig *first)
{
    struct fuse_init_in in = { .major = 7, .minor = 38, .flags = ~0u };

    memset(c, 0, sizeof(*c));
    c->rig.vfs = first->vfs;
    c->rig.s = fuse_session_new(engine, first->vfs);
    CHECK(c->rig.s);
    CHECK_EQ(fuse_worker_init(&c->rig.w, engine, first->vfs), 0);
    CHECK_EQ(ask(c, FUSE_OP_INIT, 0, &in, sizeof(in)), 0);
}

static void client_free(struct client *c)
{
    fake_done(&c->f);
    fuse_session_free(c->rig.s);
    fuse_worker_free(&c->rig.w, c->rig.vfs);
}

static void pair_new(struct pair *t)
{
    char err[VND_ERR_MAX];

    new_source();
    t->p = vnd_passthrough_new(engine, source, 0, err, sizeof(err));
    CHECK(t->p);
    rig_new(&t->first, VND_SESSION_MIXED);
    CHECK_EQ(vnd_vfs_mount_passthrough(t->first.vfs, "/", t->p), 0);
    client_new(&t->a, &t->first);
    client_new(&t->b, &t->first);
}

static void pair_free(struct pair *t)
{
    vnd_passthrough_stats stats;

    client_free(&t->a);
    client_free(&t->b);
    vnd_passthrough_stats_get(t->p, &stats);
    CHECK_EQ(stats.files, 0);
    CHECK_EQ(stats.inodes, 1);
    CHECK_EQ(vnd_vfs_umount(t->first.vfs, "/"), 0);
    vnd_passthrough_free(t->p);
    rig_free(&t->first);
    remove_source();
}

static int read_file(struct client *c, const struct made *m)
{
    struct fuse_read_in in = { .fh = m->fh, .size = 100 };

    return ask(c, FUSE_OP_READ, m->nodeid, &in, sizeof(in));
}

/* b's file and node are there, and in use. */
static void check_unharmed(struct client *c, const struct made *m)
{
    struct fuse_fsync_in sync = { .fh = m->fh };
    struct fuse_open_in open = { .flags = O_RDONLY };

    CHECK_EQ(ask(c, FUSE_OP_GETATTR, m->nodeid, NULL, 0), 0);
    CHECK_EQ(read_file(c, m), 0);
    CHECK_EQ(ask(c, FUSE_OP_FSYNC, m->nodeid, &sync, sizeof(sync)), 0);
    CHECK_EQ(ask(c, FUSE_OP_OPEN, m->nodeid, &open, sizeof(open)), 0);
}

TEST(a_guest_cannot_give_back_what_anothers_session_holds)
{
    struct pair t;
    struct made b;

    pair_new(&t);
    CHECK_EQ(create_file(&t.b, "b", &b), 0);
    struct fuse_release_in release = { .fh = b.fh };
    forget(&t.a, b.nodeid, 1ull << 40);
    check_unharmed(&t.b, &b);
    ask(&t.a, FUSE_OP_RELEASE, b.nodeid, &release, sizeof(release));
    check_unharmed(&t.b, &b);
    CHECK_EQ(read_file(&t.a, &b), EBADF);
    /* And what it holds itself is given back no more than once. */
    forget(&t.b, b.nodeid, 1);
    CHECK_EQ(ask(&t.b, FUSE_OP_RELEASE, b.nodeid, &release, sizeof(release)), 0);
    CHECK_EQ(read_file(&t.b, &b), EBADF);
    pair_free(&t);
}

TEST(the_end_of_one_guests_session_leaves_anothers)
{
    struct fuse_init_in again = { .major = 7, .minor = 38, .flags = ~0u };
    vnd_passthrough_stats stats;
    struct pair t;
    struct made a, b;

    pair_new(&t);
    CHECK_EQ(create_file(&t.b, "b", &b), 0);
    CHECK_EQ(create_file(&t.a, "a", &a), 0);
    CHECK_EQ(ask(&t.a, FUSE_OP_INIT, 0, &again, sizeof(again)), 0);
    CHECK_EQ(read_file(&t.a, &a), EBADF); /* of before its INIT */
    check_unharmed(&t.b, &b);
    CHECK_EQ(create_file(&t.a, "a2", &a), 0);
    CHECK_EQ(ask(&t.a, FUSE_OP_DESTROY, 0, NULL, 0), 0);
    check_unharmed(&t.b, &b);
    CHECK_EQ(ask(&t.a, FUSE_OP_INIT, 0, &again, sizeof(again)), 0);
    CHECK_EQ(create_file(&t.a, "a3", &a), 0);
    fuse_session_reset(t.a.rig.s); /* it hangs up */
    check_unharmed(&t.b, &b);
    vnd_passthrough_stats_get(t.p, &stats);
    CHECK_EQ(stats.inodes, 2);    /* the root and b: nothing of a is left */
    CHECK_EQ(stats.files, 1 + 3); /* b's, and those that check_unharmed opened */
    pair_free(&t);
}

/* A guest that opens all it can leaves the others theirs. */
TEST(open_files_are_a_guests_own)
{
    struct rlimit limit;
    struct pair t;
    struct made m;
    uint32_t n = 0;

    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    limit.rlim_cur = 400;
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    pair_new(&t);
    CHECK_EQ(create_file(&t.a, "a", &m), 0);
    struct fuse_open_in open = { .flags = O_RDONLY };
    while (ask(&t.a, FUSE_OP_OPEN, m.nodeid, &open, sizeof(open)) == 0)
        CHECK(++n < 400);
    CHECK_EQ(ask(&t.a, FUSE_OP_OPEN, m.nodeid, &open, sizeof(open)), ENFILE);
    CHECK_EQ(create_file(&t.a, "no", &m), ENFILE);
    CHECK_EQ(ask(&t.b, FUSE_OP_LOOKUP, 1, "no", 3), ENOENT); /* nothing was made */
    for (int i = 0; i < 40; i++) {                           /* half of what a left */
        char name[16];

        snprintf(name, sizeof(name), "b%d", i);
        CHECK_EQ(create_file(&t.b, name, &m), 0);
        check_unharmed(&t.b, &m);
        struct fuse_release_in release = { .fh = m.fh };
        CHECK_EQ(ask(&t.b, FUSE_OP_RELEASE, m.nodeid, &release, sizeof(release)), 0);
    }
    pair_free(&t);
}
