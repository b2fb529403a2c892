/* A host directory as a file system: from several threads at once while descriptors are dropped, open files, bounds. */
#include <fcntl.h>
#include <pthread.h>

#include "share_rig.h"

#define THREADS 3
#define ROUNDS 200
#define NAMES 12

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

TEST(a_source_that_is_not_there_is_named)
{
    char err[VND_ERR_MAX];

    CHECK(!vnd_passthrough_new(engine, "/nonexistent", 0, err, sizeof(err)));
    CHECK_HAS(err, "/nonexistent");
}

TEST(what_has_no_room_for_its_answer_is_not_made)
{
    struct fuse_create_in in = { .flags = O_RDWR, .mode = S_IFREG | 0644 };
    uint8_t body[64];
    struct share s;

    share_new(&s);
    CHECK_EQ(ask_cap(&s.client, FUSE_OP_CREATE, 1, body, with_name(body, &in, sizeof(in), "no"), 100), EINVAL);
    CHECK_EQ(ask(&s.client, FUSE_OP_LOOKUP, 1, "no", 3), ENOENT);
    share_free(&s);
}

TEST(what_a_guest_leaves_behind_goes_with_its_session)
{
    vnd_passthrough_stats stats;
    struct share s;
    struct made m;

    share_new(&s);
    for (int i = 0; i < 100; i++) {
        char name[16];

        snprintf(name, sizeof(name), "r%d", i);
        CHECK_EQ(create_file(&s.client, name, &m), 0);
    }
    vnd_passthrough_stats_get(s.p, &stats);
    CHECK_EQ(stats.files, 100);
    CHECK_EQ(stats.inodes, 101);
    fuse_session_reset(s.rig.s);
    vnd_passthrough_stats_get(s.p, &stats);
    CHECK_EQ(stats.files, 0);
    CHECK_EQ(stats.inodes, 1);
    share_free(&s);
}

TEST(an_open_file_in_use_outlives_its_release)
{
    struct fuse_release_in release = { 0 };
    struct share s;
    struct pt_file *f;
    struct made m;
    int fd;

    share_new(&s);
    CHECK_EQ(create_file(&s.client, "f", &m), 0);
    release.fh = m.fh;
    f = pt_file_get(s.p, 0, release.fh);
    CHECK(f);
    CHECK_EQ(f->refs, 2);
    fd = f->fd;
    CHECK_EQ(ask(&s.client, FUSE_OP_RELEASE, m.nodeid, &release, sizeof(release)), 0);
    CHECK(!pt_file_get(s.p, 0, release.fh)); /* no new use */
    CHECK(fcntl(fd, F_GETFD) >= 0);
    pt_file_put(s.p, f);
    CHECK_EQ(fcntl(fd, F_GETFD), -1);
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
