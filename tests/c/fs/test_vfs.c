/* The mount table as a guest sees it: pseudo directories, mounts on mounts, mounts that come and go under
 * requests. */
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>

#include "fuse_rig.h"

/* A mixed session with an image at /rafs/c1/lowerdir and another at /rafs/c2, and the nodes that a guest has looked up. */
struct two_mounts {
    struct rig g;
    struct img_nids n;
    vnd_rafs *a, *b;
    uint64_t rafs_dir, cid, root_a, root_b, file; /* cid: the pseudo directory /rafs/c1 */
};

static void two_mounts_new(struct two_mounts *t)
{
    memset(t, 0, sizeof *t);
    t->a = open_tree(FLAGS, &t->n);
    t->b = open_tree(FLAGS, &t->n);
    rig_new(&t->g, VND_SESSION_MIXED);
    init(&t->g, 7, 38, ~0ull);
    CHECK_EQ(vnd_vfs_mount_rafs(t->g.vfs, "/rafs//c1/lowerdir/", t->a), 0);
    CHECK_EQ(vnd_vfs_mount_rafs(t->g.vfs, "/rafs/c2", t->b), 0);
    t->rafs_dir = lookup(&t->g, 1, "rafs").nodeid;
    t->cid = lookup(&t->g, t->rafs_dir, "c1").nodeid;
    t->root_a = lookup(&t->g, t->cid, "lowerdir").nodeid;
    t->root_b = lookup(&t->g, t->rafs_dir, "c2").nodeid;
    t->file = 1ull << 48 | t->n.file;
}

static void two_mounts_free(struct two_mounts *t)
{
    rig_free(&t->g);
    vnd_rafs_free(t->a);
    vnd_rafs_free(t->b);
}

static uint32_t open_flags(struct rig *g, uint32_t op, uint64_t nodeid)
{
    struct fuse_open_in read_only = { 0 };
    struct fuse_open_out opened;

    CHECK_EQ(error_of(g, op, nodeid, &read_only, 8), 0);
    memcpy(&opened, g->data, sizeof(opened));
    CHECK_EQ(opened.fh, 0);
    return opened.open_flags;
}

TEST(mount_paths_that_are_refused)
{
    struct two_mounts t;
    struct rig g;

    two_mounts_new(&t);
    CHECK_EQ(vnd_vfs_mount_rafs(t.g.vfs, "/rafs/c1/lowerdir", t.b), -EEXIST);
    CHECK_EQ(vnd_vfs_mount_rafs(t.g.vfs, "/rafs", t.b), -EBUSY);
    CHECK_EQ(vnd_vfs_mount_rafs(t.g.vfs, "/", t.b), -EBUSY);
    rig_new(&g, VND_SESSION_MIXED);
    init(&g, 7, 38, ~0ull);
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, 1, "rafs", 5), ENOENT); /* never cached: it may come */
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "rafs", t.a), -EINVAL);
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "/rafs/../x", t.a), -EINVAL);
    rig_free(&g);
    two_mounts_free(&t);
}

/* What may come or go is not cached: names of pseudo directories and mount points. */
TEST(pseudo_directories_lead_to_mounts)
{
    struct two_mounts t;
    struct fuse_entry_out e;

    two_mounts_new(&t);
    e = lookup(&t.g, 1, "rafs");
    CHECK(e.nodeid > 1 && e.nodeid >> 48 == 0);
    CHECK_EQ(e.entry_valid, 0);
    CHECK_EQ(e.attr_valid, 0);
    CHECK_EQ(e.attr.mode, S_IFDIR | 0755);
    e = lookup(&t.g, t.cid, "lowerdir");
    CHECK_EQ(e.nodeid, 1ull << 48 | IMG_ROOT);
    CHECK_EQ(e.entry_valid, 0); /* the mount may go */
    CHECK_EQ(e.attr_valid, YEAR_S);
    CHECK_EQ(t.root_b, 2ull << 48 | IMG_ROOT);
    CHECK(lookup(&t.g, t.root_a, "file").nodeid != lookup(&t.g, t.root_b, "file").nodeid);
    two_mounts_free(&t);
}

TEST(dotdot_crosses_mount_points)
{
    struct two_mounts t;

    two_mounts_new(&t);
    CHECK_EQ(lookup(&t.g, t.root_a, "..").nodeid, t.cid);
    CHECK_EQ(lookup(&t.g, t.cid, "..").nodeid, t.rafs_dir);
    CHECK_EQ(lookup(&t.g, t.rafs_dir, "..").nodeid, 1);
    CHECK_EQ(lookup(&t.g, 1, "..").nodeid, 1);
    two_mounts_free(&t);
}

/* Listings show what lookups give, over mount points in both directions. */
TEST(listings_agree_with_lookups)
{
    static struct seen d[20];
    struct two_mounts t;

    two_mounts_new(&t);
    CHECK_EQ(read_dir(&t.g, t.rafs_dir, true, 0, 4096, d, 20), 4);
    CHECK(strcmp(d[2].name, "c1") == 0 && d[2].ino == t.cid && d[2].e.nodeid == t.cid && d[2].e.attr_valid == 0);
    CHECK(strcmp(d[3].name, "c2") == 0 && d[3].ino == t.root_b && d[3].e.nodeid == t.root_b);
    CHECK_EQ(d[3].e.attr.ino, t.root_b);
    CHECK_EQ(d[3].e.attr.nlink, 4);
    CHECK_EQ(d[3].e.entry_valid, 0);
    CHECK_EQ(read_dir(&t.g, t.rafs_dir, true, d[2].off, 4096, d, 20), 1);
    CHECK_EQ(read_dir(&t.g, t.root_a, false, 0, 4096, d, 20), 10);
    CHECK_EQ(d[0].ino, t.root_a);
    CHECK_EQ(d[1].ino, t.cid);
    CHECK_EQ(d[5].ino, t.file);
    two_mounts_free(&t);
}

TEST(opens_say_what_may_be_kept)
{
    struct fuse_open_in read_only = { 0 };
    struct two_mounts t;

    two_mounts_new(&t);
    CHECK(open_flags(&t.g, FUSE_OP_OPEN, t.file) & FUSE_OPEN_KEEP_CACHE);
    CHECK(open_flags(&t.g, FUSE_OP_OPENDIR, t.root_a) & FUSE_OPEN_CACHE_DIR);
    CHECK_EQ(open_flags(&t.g, FUSE_OP_OPENDIR, t.rafs_dir), 0);
    CHECK_EQ(error_of(&t.g, FUSE_OP_OPEN, t.root_a, &read_only, 8), EISDIR);
    CHECK_EQ(error_of(&t.g, FUSE_OP_OPENDIR, t.file, &read_only, 8), ENOTDIR);
    two_mounts_free(&t);
}

/* The kernel takes ENOSYS for the whole connection: nothing that a read-write neighbour has is ever answered so. */
TEST(nothing_that_a_neighbour_has_is_enosys)
{
    struct two_mounts t;

    two_mounts_new(&t);
    CHECK_EQ(error_of(&t.g, FUSE_OP_FLUSH, t.file, NULL, 0), 0);
    CHECK_EQ(error_of(&t.g, FUSE_OP_FSYNC, t.file, NULL, 0), 0);
    CHECK_EQ(error_of(&t.g, FUSE_OP_FSYNCDIR, t.root_a, NULL, 0), 0);
    CHECK_EQ(xattr(&t.g, t.file, "user.foo", 5), ENODATA);
    CHECK_EQ(xattr(&t.g, t.file, NULL, 5), 0);
    CHECK_EQ(xattr(&t.g, t.rafs_dir, "user.foo", 5), ENODATA);
    CHECK_EQ(xattr(&t.g, t.rafs_dir, NULL, 0), 0);
    CHECK_EQ(error_of(&t.g, FUSE_OP_MKDIR, t.rafs_dir, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&t.g, FUSE_OP_MKDIR, 1, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&t.g, FUSE_OP_MKDIR, t.root_a, NULL, 0), EROFS);
    CHECK_EQ(error_of(&t.g, FUSE_OP_UNLINK, t.rafs_dir, NULL, 0), EROFS);
    two_mounts_free(&t);
}

TEST(umount_makes_nodes_stale_and_never_uses_a_serial_again)
{
    struct two_mounts t;
    uint64_t cid;

    two_mounts_new(&t);
    CHECK_EQ(vnd_vfs_umount(t.g.vfs, "/rafs/c1"), -ENOENT);
    CHECK_EQ(vnd_vfs_umount(t.g.vfs, "/rafs/c1/lowerdir"), 0);
    vnd_rafs_free(t.a);
    CHECK_EQ(error_of(&t.g, FUSE_OP_GETATTR, t.file, NULL, 0), ESTALE);
    CHECK_EQ(error_of(&t.g, FUSE_OP_GETATTR, t.cid, NULL, 0), ESTALE); /* nothing needed it any more */
    CHECK_EQ(error_of(&t.g, FUSE_OP_LOOKUP, t.rafs_dir, "c1", 3), ENOENT);
    CHECK_EQ(lookup(&t.g, t.rafs_dir, "c2").nodeid, t.root_b);
    t.a = open_tree(FLAGS, &t.n);
    CHECK_EQ(vnd_vfs_mount_rafs(t.g.vfs, "/rafs/c1/lowerdir", t.a), 0);
    cid = lookup(&t.g, t.rafs_dir, "c1").nodeid;
    CHECK_EQ(lookup(&t.g, cid, "lowerdir").nodeid >> 48, 3);
    two_mounts_free(&t);
}

/* Mounts on directories of other mounts. */
TEST(nested)
{
    struct fs zero = { &zero_ops };
    static struct seen d[20];
    struct rig g;
    vnd_rafs *r = rig_rafs(&g, FLAGS);
    struct fuse_entry_out e;
    uint64_t sub = 1ull << 48 | g.n.sub;

    CHECK_EQ(vfs_mount(g.vfs, "/absent", &zero), -ENOENT);
    CHECK_EQ(vfs_mount(g.vfs, "/file", &zero), -ENOTDIR);
    CHECK_EQ(vfs_mount(g.vfs, "/sub/deep", &zero), 0);
    e = lookup(&g, sub, "deep");
    CHECK_EQ(e.nodeid, 2ull << 48 | 5);
    CHECK_EQ(e.entry_valid, 0);
    CHECK_EQ(lookup(&g, e.nodeid, "..").nodeid, sub);
    CHECK_EQ(read_dir(&g, sub, true, 0, 4096, d, 20), 3);
    CHECK_EQ(d[2].e.nodeid, 2ull << 48 | 5);
    CHECK_EQ(d[2].e.attr.size, ZERO_SIZE);
    CHECK_EQ(vnd_vfs_umount(g.vfs, "/"), -EBUSY);
    CHECK_EQ(vnd_vfs_umount(g.vfs, "/sub/deep"), 0);
    CHECK_EQ(lookup(&g, sub, "deep").nodeid, 1ull << 48 | g.n.deep);
    CHECK_EQ(vnd_vfs_umount(g.vfs, "/"), 0);
    CHECK_EQ(vnd_vfs_umount(g.vfs, "/"), -ENOENT);
    rig_free(&g);
    vnd_rafs_free(r);
}

/* ---- mounts come and go under requests: under a sanitizer, a use of what was freed shows */

struct racer {
    struct rig *g;
    _Atomic int *stop;
    uint64_t done;
};

static void *race(void *arg)
{
    struct racer *me = arg;
    struct fuse_worker w;
    struct fake_req f;

    CHECK_EQ(fuse_worker_init(&w, engine, me->g->vfs), 0);
    for (uint64_t nodeid = 1; !atomic_load(me->stop); nodeid = nodeid == 1 ? 2 : 1) {
        struct fuse_read_in in = { .size = 4096 };

        fake_fill(&f, FUSE_OP_READDIRPLUS, nodeid, &in, sizeof(in), 8192);
        f.r.session_gen = fuse_session_gen(me->g->s);
        CHECK_EQ(fuse_session_serve(me->g->s, &w, &f.r), REQ_REPLY);
        fake_done(&f);
        me->done++;
    }
    fuse_worker_free(&w, me->g->vfs);
    return NULL;
}

TEST(mounts_under_load)
{
    _Atomic int stop = 0;
    struct img_nids n;
    struct rig g;
    struct racer racers[2] = { { &g, &stop, 0 }, { &g, &stop, 0 } };
    pthread_t threads[2];

    rig_new(&g, VND_SESSION_MIXED);
    init(&g, 7, 38, ~0ull);
    for (int i = 0; i < 2; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, race, &racers[i]), 0);
    for (int i = 0; i < 100; i++) {
        vnd_rafs *r = open_tree(FLAGS, &n);

        CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, i % 2 ? "/a" : "/a/b", r), 0);
        sched_yield();
        CHECK_EQ(vnd_vfs_umount(g.vfs, i % 2 ? "/a" : "/a/b"), 0);
        vnd_rafs_free(r);
    }
    atomic_store(&stop, 1);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    rig_free(&g);
}

/* ---- a request that hangs: it is inside, and does not come out */

static _Atomic int umount_looks;

/* In the place of the system's: an umount that waits sleeps between its looks, and nothing else here does. */
int nanosleep(const struct timespec *pause, struct timespec *left)
{
    atomic_fetch_add(&umount_looks, 1);
    return clock_nanosleep(CLOCK_MONOTONIC, 0, pause, left) ? -1 : 0;
}

struct unmounter {
    struct vnd_vfs *vfs;
    const char *path;
    _Atomic bool done;
};

static void *unmount(void *arg)
{
    struct unmounter *u = arg;

    CHECK_EQ(vnd_vfs_umount(u->vfs, u->path), 0);
    atomic_store(&u->done, true);
    return NULL;
}

/* Only the end of the mount that it is in waits for it, and that holds up nothing else. Where it is is not known of every
 * request: such a one holds up each umount, and nothing else either. */
static void check_hanging(bool confined)
{
    struct fs zero[4] = { { &zero_ops }, { &zero_ops }, { &zero_ops }, { &zero_ops } };
    struct vnd_vfs *v = vnd_vfs_new(engine, VND_SESSION_MIXED);
    struct unmounter u = { .vfs = v, .path = "/hangs" };
    struct vfs_reader hangs = { 0 }, other = { 0 };
    pthread_t t;

    alarm(20); /* where something waits for it that must not */
    CHECK_EQ(vfs_mount(v, "/hangs", &zero[0]), 0);
    CHECK_EQ(vfs_mount(v, "/beside", &zero[1]), 0);
    vfs_reader_add(v, &hangs);
    vfs_enter(&hangs);
    if (confined)
        vfs_confine(&hangs, 1);
    CHECK(pthread_create(&t, NULL, unmount, &u) == 0);
    struct vfs_node node;
    CHECK_SOON(vfs_resolve(v, 1ull << 48 | 5, &node) != 0); /* until the umount has published its table */
    vfs_reader_add(v, &other);                              /* a new front-end */
    vfs_enter(&other);
    vfs_leave(&other);
    CHECK_EQ(vfs_mount(v, "/new", &zero[2]), 0);
    if (confined)
        CHECK_EQ(vnd_vfs_umount(v, "/beside"), 0);
    CHECK_EQ(vfs_mount(v, "/new2", &zero[3]), 0);
    CHECK(!atomic_load(&u.done));
    vfs_leave(&hangs);
    pthread_join(t, NULL);
    CHECK_EQ(vnd_vfs_umount(v, "/new"), 0);
    vfs_reader_remove(v, &hangs);
    vfs_reader_remove(v, &other);
    vnd_vfs_free(v);
}

TEST(a_request_that_hangs_in_a_mount)
{
    check_hanging(true);
}

TEST(a_request_that_hangs_somewhere)
{
    check_hanging(false);
}

/* A reader that leaves its mount (a look-up of "..", a name that a mount covers) counts as anywhere again. */
TEST(a_widened_reader_is_waited_for)
{
    struct fs zero = { &zero_ops };
    struct vnd_vfs *v = vnd_vfs_new(engine, VND_SESSION_MIXED);
    struct unmounter u = { .vfs = v, .path = "/m" };
    struct vfs_reader r = { 0 };
    struct vfs_node node;
    pthread_t t;

    CHECK_EQ(vfs_mount(v, "/m", &zero), 0);
    vfs_reader_add(v, &r);
    vfs_enter(&r);
    vfs_confine(&r, 7);
    node = (struct vfs_node){ .ino = 1 };
    CHECK_EQ(vfs_resolve(v, 1, &node), 0);
    vnd_attr attr;
    CHECK_EQ(vfs_lookup(v, &(struct vfs_step){ .reader = &r, .dir = &node, .name = "m", .len = 1 }, &node, &attr), 0);
    CHECK(node.fs == &zero);
    CHECK(pthread_create(&t, NULL, unmount, &u) == 0);
    CHECK_SOON(vfs_resolve(v, 1ull << 48 | 5, &node) != 0);
    int looks = atomic_load(&umount_looks);
    CHECK_SOON(atomic_load(&umount_looks) >= looks + 3);
    CHECK(!atomic_load(&u.done));
    vfs_leave(&r);
    pthread_join(t, NULL);
    vfs_reader_remove(v, &r);
    vnd_vfs_free(v);
}
