/* The passthrough from several threads at once, as queues serve it, while descriptors are dropped and the session ends. */
#include <fcntl.h>
#include <ftw.h>
#include <pthread.h>
#include <sys/resource.h>

#include "fuse_rig.h"
#include "fuse/internal.h"
#include "passthrough/internal.h"

#define THREADS 3
#define ROUNDS 200
#define NAMES 12

static char source[] = "/tmp/vnd-passthrough-XXXXXX"; /* of one case, see new_source */

struct client {
    struct rig rig; /* shares vfs and session with the others */
    struct fake_req f;
    _Atomic int woken;
    unsigned int seed;
    pthread_t thread;
    _Atomic int *stop;
};

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    return remove(path);
}

static void client_wake(struct store_wait *w)
{
    struct client *c = (struct client *)((char *)w->owner - offsetof(struct client, f));

    atomic_store(&c->woken, 1);
}

/* One request to its end, also by another thread: its errno. */
static int ask_cap(struct client *c, uint32_t op, uint64_t nodeid, const void *body, uint32_t len, uint32_t out_cap)
{
    struct fuse_out_header h;
    enum req_verdict v;

    fake_done(&c->f);
    fake_fill(&c->f, op, nodeid, body, len, out_cap);
    c->f.r.session_gen = fuse_session_gen(c->rig.s);
    c->f.r.wait.wake = client_wake;
    for (;;) {
        atomic_store(&c->woken, 0);
        v = fuse_session_serve(c->rig.s, &c->rig.w, &c->f.r);
        if (v != REQ_PARKED)
            break;
        while (!atomic_load(&c->woken))
            sched_yield();
    }
    if (v == REQ_NOREPLY)
        return 0;
    memcpy(&h, c->f.out, sizeof(h));
    return -h.error;
}

static int ask(struct client *c, uint32_t op, uint64_t nodeid, const void *body, uint32_t len)
{
    return ask_cap(c, op, nodeid, body, len, 16384);
}

static const uint8_t *answer(struct client *c)
{
    return c->f.out + sizeof(struct fuse_out_header);
}

static uint32_t with_name(uint8_t *body, const void *head, uint32_t head_len, const char *name)
{
    memcpy(body, head, head_len);
    memcpy(body + head_len, name, strlen(name) + 1);
    return head_len + (uint32_t)strlen(name) + 1;
}

static void forget(struct client *c, uint64_t nodeid, uint64_t n)
{
    ask(c, FUSE_OP_FORGET, nodeid, &n, sizeof(n));
}

static void use_file(struct client *c, const char *name)
{
    struct fuse_create_in in = { .flags = O_RDWR, .mode = S_IFREG | 0644 };
    struct fuse_entry_out e;
    struct fuse_open_out open;
    struct {
        struct fuse_write_in in;
        uint8_t data[5000];
    } write = { .in = { .size = 5000 } };
    struct fuse_read_in read = { .size = 8192 };
    struct fuse_fsync_in sync = { 0 };
    struct fuse_release_in release = { 0 };
    uint8_t body[512];

    c->rig.f.r.in.uid = 0;
    if (ask(c, FUSE_OP_CREATE, 1, body, with_name(body, &in, sizeof(in), name)))
        return;
    memcpy(&e, answer(c), sizeof(e));
    memcpy(&open, answer(c) + sizeof(e), sizeof(open));
    write.in.fh = read.fh = sync.fh = release.fh = open.fh;
    memset(write.data, 'w', sizeof(write.data));
    ask(c, FUSE_OP_WRITE, e.nodeid, &write, sizeof(write));
    ask(c, FUSE_OP_READ, e.nodeid, &read, sizeof(read));
    if (rand_r(&c->seed) % 16 == 0)
        ask(c, FUSE_OP_FSYNC, e.nodeid, &sync, sizeof(sync));
    ask(c, FUSE_OP_GETATTR, e.nodeid, NULL, 0);
    ask(c, FUSE_OP_RELEASE, e.nodeid, &release, sizeof(release));
    forget(c, e.nodeid, 1);
}

static void list(struct client *c)
{
    struct fuse_open_in in = { 0 };
    struct fuse_open_out open;
    struct fuse_read_in read = { .size = 4096 };
    struct fuse_release_in release = { 0 };

    if (ask(c, FUSE_OP_OPENDIR, 1, &in, sizeof(in)))
        return;
    memcpy(&open, answer(c), sizeof(open));
    read.fh = release.fh = open.fh;
    if (ask(c, FUSE_OP_READDIRPLUS, 1, &read, sizeof(read)) == 0) {
        uint8_t copy[16384];
        uint32_t len = c->f.r.out_len - (uint32_t)sizeof(struct fuse_out_header), at = 0;

        memcpy(copy, answer(c), len);
        while (at < len) {
            struct fuse_entry_out e;
            struct fuse_dirent d;

            memcpy(&e, copy + at, sizeof(e));
            memcpy(&d, copy + at + sizeof(e), sizeof(d));
            if (e.nodeid)
                forget(c, e.nodeid, 1);
            at += (uint32_t)((sizeof(e) + sizeof(d) + d.namelen + 7) & ~7ull);
        }
    }
    ask(c, FUSE_OP_RELEASEDIR, 1, &release, sizeof(release));
}

static void *client_run(void *arg)
{
    struct client *c = arg;

    for (int i = 0; i < ROUNDS; i++) {
        char name[16], other[16];
        uint8_t body[64];
        uint32_t len;
        struct fuse_rename_in to = { .newdir = 1 };

        snprintf(name, sizeof(name), "f%d", rand_r(&c->seed) % NAMES);
        snprintf(other, sizeof(other), "f%d", rand_r(&c->seed) % NAMES);
        switch (rand_r(&c->seed) % 5) {
        case 0: ask(c, FUSE_OP_UNLINK, 1, name, (uint32_t)strlen(name) + 1); break;
        case 1:
            len = with_name(body, &to, sizeof(to), name);
            memcpy(body + len, other, strlen(other) + 1);
            ask(c, FUSE_OP_RENAME, 1, body, len + (uint32_t)strlen(other) + 1);
            break;
        case 2: list(c); break;
        case 3:
            if (ask(c, FUSE_OP_LOOKUP, 1, name, (uint32_t)strlen(name) + 1) == 0) {
                struct fuse_entry_out e;

                memcpy(&e, answer(c), sizeof(e));
                ask(c, FUSE_OP_GETATTR, e.nodeid, NULL, 0);
                forget(c, e.nodeid, 1);
            }
            break;
        default: use_file(c, name);
        }
    }
    return NULL;
}

static void new_source(void)
{
    CHECK(mkdtemp(source));
}

static void remove_source(void)
{
    nftw(source, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

/* Ends without a node or a file left, whatever was interleaved. */
TEST(threads)
{
    struct client clients[THREADS];
    vnd_passthrough_stats stats;
    char err[VND_ERR_MAX];
    struct rig first;
    vnd_passthrough *p;

    new_source();
    p = vnd_passthrough_new(engine, source, 0, err, sizeof(err));
    CHECK(p);
    rig_new(&first, VND_SESSION_MIXED);
    CHECK_EQ(vnd_vfs_mount_passthrough(first.vfs, "/", p), 0);
    init(&first, 7, 38, ~0ull);
    for (unsigned int i = 0; i < THREADS; i++) {
        memset(&clients[i], 0, sizeof(clients[i]));
        clients[i].rig.vfs = first.vfs;
        clients[i].rig.s = first.s;
        clients[i].seed = i + 1;
        CHECK_EQ(fuse_worker_init(&clients[i].rig.w, engine, first.vfs), 0);
        CHECK_EQ(pthread_create(&clients[i].thread, NULL, client_run, &clients[i]), 0);
    }
    for (int i = 0; i < 200; i++) {
        vnd_passthrough_drop_idle(p);
        sched_yield();
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(clients[i].thread, NULL);
        fake_done(&clients[i].f);
        fuse_worker_free(&clients[i].rig.w, first.vfs);
    }
    vnd_passthrough_stats_get(p, &stats);
    CHECK_EQ(stats.files, 0);
    CHECK_EQ(stats.inodes, 1);
    vnd_passthrough_drop_idle(p);
    vnd_passthrough_stats_get(p, &stats);
    CHECK_EQ(stats.cached_fds, 0);
    CHECK_EQ(vnd_vfs_umount(first.vfs, "/"), 0);
    vnd_passthrough_free(p);
    rig_free(&first);
    remove_source();
}

/* What a guest leaves behind goes with its session. */
TEST(reset)
{
    struct fuse_create_in in = { .flags = O_RDWR, .mode = S_IFREG | 0644 };
    vnd_passthrough_stats stats;
    char err[VND_ERR_MAX];
    struct client c = { 0 };
    uint8_t body[64];
    struct rig g;
    vnd_passthrough *p;

    new_source();
    p = vnd_passthrough_new(engine, source, 0, err, sizeof(err));
    CHECK(p);
    CHECK(!vnd_passthrough_new(engine, "/nonexistent", 0, err, sizeof(err)));
    CHECK(strstr(err, "/nonexistent"));
    rig_new(&g, VND_SESSION_MIXED);
    CHECK_EQ(vnd_vfs_mount_passthrough(g.vfs, "/", p), 0);
    init(&g, 7, 38, ~0ull);
    c.rig.s = g.s;
    CHECK_EQ(fuse_worker_init(&c.rig.w, engine, g.vfs), 0);
    for (int i = 0; i < 100; i++) {
        char name[16];

        snprintf(name, sizeof(name), "r%d", i);
        CHECK_EQ(ask(&c, FUSE_OP_CREATE, 1, body, with_name(body, &in, sizeof(in), name)), 0);
    }
    vnd_passthrough_stats_get(p, &stats);
    CHECK_EQ(stats.files, 100);
    CHECK_EQ(stats.inodes, 101);
    /* No room for the answer: nothing is made. */
    CHECK_EQ(ask_cap(&c, FUSE_OP_CREATE, 1, body, with_name(body, &in, sizeof(in), "no"), 100), EINVAL);
    CHECK_EQ(ask(&c, FUSE_OP_LOOKUP, 1, "no", 3), ENOENT);
    fake_done(&c.f);
    fuse_worker_free(&c.rig.w, g.vfs);
    fuse_session_reset(g.s);
    vnd_passthrough_stats_get(p, &stats);
    CHECK_EQ(stats.files, 0);
    CHECK_EQ(stats.inodes, 1);
    CHECK_EQ(vnd_vfs_umount(g.vfs, "/"), 0);
    vnd_passthrough_free(p);
    rig_free(&g);
    remove_source();
}

/* A share on an empty directory, one guest, one client. */
struct share {
    struct rig rig;
    struct client client;
    vnd_passthrough *p;
};

static void share_new(struct share *s)
{
    char err[VND_ERR_MAX];

    memset(s, 0, sizeof(*s));
    new_source();
    s->p = vnd_passthrough_new(engine, source, 0, err, sizeof(err));
    CHECK(s->p);
    rig_new(&s->rig, VND_SESSION_MIXED);
    CHECK_EQ(vnd_vfs_mount_passthrough(s->rig.vfs, "/", s->p), 0);
    init(&s->rig, 7, 38, ~0ull);
    s->client.rig.s = s->rig.s;
    CHECK_EQ(fuse_worker_init(&s->client.rig.w, engine, s->rig.vfs), 0);
}

static void share_free(struct share *s)
{
    fake_done(&s->client.f);
    fuse_worker_free(&s->client.rig.w, s->rig.vfs);
    CHECK_EQ(vnd_vfs_umount(s->rig.vfs, "/"), 0);
    fuse_session_reset(s->rig.s);
    vnd_passthrough_free(s->p);
    rig_free(&s->rig);
    remove_source();
}

/* Makes and opens a file. *fh: the open file. Its nodeid, or 0 with *error. */
static uint64_t create(struct share *s, const char *name, uint64_t *fh, int *error)
{
    struct fuse_create_in in = { .flags = O_RDWR, .mode = S_IFREG | 0644 };
    struct fuse_entry_out e;
    struct fuse_open_out open;
    uint8_t body[64];

    *error = ask(&s->client, FUSE_OP_CREATE, 1, body, with_name(body, &in, sizeof(in), name));
    if (*error)
        return 0;
    memcpy(&e, answer(&s->client), sizeof(e));
    memcpy(&open, answer(&s->client) + sizeof(e), sizeof(open));
    *fh = open.fh;
    return e.nodeid;
}

TEST(an_open_file_in_use_outlives_its_release)
{
    struct fuse_release_in release = { 0 };
    struct share s;
    struct pt_file *f;
    uint64_t nodeid;
    int error, fd;

    share_new(&s);
    nodeid = create(&s, "f", &release.fh, &error);
    CHECK_EQ(error, 0);
    f = pt_file_get(s.p, 0, release.fh);
    CHECK(f);
    CHECK_EQ(f->refs, 2);
    fd = f->fd;
    CHECK_EQ(ask(&s.client, FUSE_OP_RELEASE, nodeid, &release, sizeof(release)), 0);
    CHECK(!pt_file_get(s.p, 0, release.fh)); /* no new use */
    CHECK(fcntl(fd, F_GETFD) >= 0);
    pt_file_put(s.p, f);
    CHECK_EQ(fcntl(fd, F_GETFD), -1);
    share_free(&s);
}

/* Which way a request that may take long is served: 0 here, 1 by another thread. */
static int is_detached(struct share *s, uint64_t nodeid, uint64_t fh)
{
    struct fuse_fsync_in in = { .fh = fh };
    struct client *c = &s->client;
    enum req_verdict v;

    fake_done(&c->f);
    fake_fill(&c->f, FUSE_OP_FSYNC, nodeid, &in, sizeof(in), 4096);
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
    uint64_t mine = (128ull << 20) - 1000, all = (512ull << 20) - 1000, nodeid, fh;
    struct share s;
    int error;

    share_new(&s);
    nodeid = create(&s, "f", &fh, &error);
    CHECK_EQ(error, 0);
    CHECK_EQ(is_detached(&s, nodeid, fh), 1);
    CHECK_EQ(atomic_load(&s.rig.s->detached_bytes), 0);
    CHECK_EQ(atomic_load(&engine->detached_bytes), 0);
    atomic_store(&s.rig.s->detached_bytes, mine);
    CHECK_EQ(is_detached(&s, nodeid, fh), 0);
    atomic_store(&s.rig.s->detached_bytes, 0);
    atomic_store(&engine->detached_bytes, all); /* of other sessions */
    CHECK_EQ(is_detached(&s, nodeid, fh), 0);
    atomic_store(&engine->detached_bytes, 0);
    CHECK_EQ(is_detached(&s, nodeid, fh), 1);
    share_free(&s);
}

/* The entries of the root with attributes: how many of them the guest may use. */
static int list_plus(struct client *c, uint64_t dir)
{
    struct fuse_open_in in = { 0 };
    struct fuse_open_out open;
    struct fuse_read_in read = { .size = 4096 };
    struct fuse_release_in release = { 0 };
    int with_node = 0, got;

    CHECK_EQ(ask(c, FUSE_OP_OPENDIR, dir, &in, sizeof(in)), 0);
    memcpy(&open, answer(c), sizeof(open));
    read.fh = release.fh = open.fh;
    do {
        got = 0;
        CHECK_EQ(ask(c, FUSE_OP_READDIRPLUS, dir, &read, sizeof(read)), 0);
        for (uint32_t at = 0; at < c->f.r.out_len - (uint32_t)sizeof(struct fuse_out_header);) {
            struct fuse_entry_out e;
            struct fuse_dirent d;

            memcpy(&e, answer(c) + at, sizeof(e));
            memcpy(&d, answer(c) + at + sizeof(e), sizeof(d));
            at += (uint32_t)(sizeof(e) + ((sizeof(d) + d.namelen + 7) & ~7ull));
            read.offset = d.off;
            with_node += e.nodeid != 0;
            got++;
        }
    } while (got);
    CHECK_EQ(ask(c, FUSE_OP_RELEASEDIR, dir, &release, sizeof(release)), 0);
    return with_node;
}

/* The tables grow with the nodes; a guest keeps no more than its bound, and makes nothing that it could not keep. */
TEST(nodes_have_a_bound)
{
    struct fuse_mkdir_in in = { .mode = 0755 };
    vnd_passthrough_stats stats;
    struct fuse_entry_out e;
    uint64_t some = 3u << PT_BUCKETS_LOG2, first = 0;
    char name[24];
    uint8_t body[64];
    struct share s;

    share_new(&s);
    s.client.rig.s->budget[FUSE_HELD_NODE].all_max = 2 * some; /* as many are left for others */
    for (uint64_t i = 0; i < some; i++) {
        snprintf(name, sizeof(name), "%llu", (unsigned long long)i);
        CHECK_EQ(ask(&s.client, FUSE_OP_MKDIR, 1, body, with_name(body, &in, sizeof(in), name)), 0);
        memcpy(&e, answer(&s.client), sizeof(e));
        first = first ? first : e.nodeid;
    }
    CHECK(s.p->buckets_log2 > PT_BUCKETS_LOG2);
    vnd_passthrough_stats_get(s.p, &stats);
    CHECK_EQ(stats.inodes, some + 1);
    CHECK_EQ(ask(&s.client, FUSE_OP_MKDIR, 1, body, with_name(body, &in, sizeof(in), "more")), ENFILE);
    CHECK_EQ(ask(&s.client, FUSE_OP_LOOKUP, 1, "more", 5), ENOENT);
    CHECK_EQ(mkdirat(s.p->root_fd, "host", 0755), 0);
    CHECK_EQ(ask(&s.client, FUSE_OP_LOOKUP, 1, "host", 5), ENFILE);
    CHECK_EQ(ask(&s.client, FUSE_OP_GETATTR, first, NULL, 0), 0);
    CHECK_EQ(ask(&s.client, FUSE_OP_LOOKUP, 1, "7", 2), 0); /* known already */
    CHECK_EQ(list_plus(&s.client, 1), (int)some);           /* goes on: without a node of "host" */
    vnd_passthrough_stats_get(s.p, &stats);
    CHECK_EQ(stats.inodes, some + 1);
    forget(&s.client, first, 2);
    CHECK_EQ(ask(&s.client, FUSE_OP_LOOKUP, 1, "host", 5), 0);
    share_free(&s);
}

static uint64_t inodes(vnd_passthrough *p)
{
    vnd_passthrough_stats stats;

    vnd_passthrough_stats_get(p, &stats);
    return stats.inodes;
}

/* Of what a mount covers only the mount itself keeps a count, and gives it back. */
TEST(covered_entries_are_not_counted)
{
    char err[VND_ERR_MAX];
    vnd_passthrough *over;
    struct fuse_entry_out e;
    struct share s;

    share_new(&s);
    over = vnd_passthrough_new(engine, source, 0, err, sizeof(err));
    CHECK(over);
    CHECK_EQ(mkdirat(s.p->root_fd, "a", 0755), 0);
    CHECK_EQ(mkdirat(s.p->root_fd, "a/b", 0755), 0);
    CHECK_EQ(mkdirat(s.p->root_fd, "a/c", 0755), 0);
    CHECK_EQ(vnd_vfs_mount_passthrough(s.rig.vfs, "/a/b", over), 0);
    CHECK_EQ(inodes(s.p), 2); /* the root, and what is covered */
    CHECK_EQ(vnd_vfs_mount_passthrough(s.rig.vfs, "/a/b", over), -EEXIST);
    CHECK_EQ(vnd_vfs_mount_passthrough(s.rig.vfs, "/a/c/none", over), -ENOENT);
    CHECK_EQ(inodes(s.p), 2);
    CHECK_EQ(ask(&s.client, FUSE_OP_LOOKUP, 1, "a", 2), 0);
    memcpy(&e, answer(&s.client), sizeof(e));
    for (int i = 0; i < 3; i++)
        CHECK_EQ(list_plus(&s.client, e.nodeid), 2);
    CHECK_EQ(inodes(s.p), 4);
    CHECK_EQ(vnd_vfs_umount(s.rig.vfs, "/a/b"), 0);
    CHECK_EQ(inodes(s.p), 3); /* a and c, which the guest holds */
    fuse_session_reset(s.rig.s);
    CHECK_EQ(inodes(s.p), 1);
    vnd_passthrough_free(over);
    share_free(&s);
}

/* ---- two guests on one share */

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

struct made {
    uint64_t nodeid, fh;
};

static int create_file(struct client *c, const char *name, struct made *out)
{
    struct fuse_create_in in = { .flags = O_RDWR, .mode = S_IFREG | 0644 };
    struct fuse_entry_out e;
    struct fuse_open_out o;
    uint8_t body[64];
    int error = ask(c, FUSE_OP_CREATE, 1, body, with_name(body, &in, sizeof(in), name));

    if (error)
        return error;
    memcpy(&e, answer(c), sizeof(e));
    memcpy(&o, answer(c) + sizeof(e), sizeof(o));
    *out = (struct made){ e.nodeid, o.fh };
    return 0;
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
