/* test_vfs.c -- the mount table as a guest sees it: pseudo directories, mounts on mounts, mounts that come and go under
 * requests. */
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>

#include "fuse_rig.h"

static void test_pseudo_and_mixed(void)
{
    struct fuse_open_in read_only = { 0 };
    struct fuse_open_out opened;
    static struct seen d[20];
    struct img_nids n;
    struct rig g;
    vnd_rafs *a = open_tree(FLAGS, &n), *b = open_tree(FLAGS, &n);
    struct fuse_entry_out e;
    uint64_t rafs_dir, cid, root_a, root_b, file;

    rig_new(&g, VND_SESSION_MIXED);
    init(&g, 7, 38, ~0ull);
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, 1, "rafs", 5), ENOENT); /* never cached: it may come */
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "rafs", a), -EINVAL);
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "/rafs/../x", a), -EINVAL);
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "/rafs//c1/lowerdir/", a), 0);
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "/rafs/c1/lowerdir", b), -EEXIST);
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "/rafs", b), -EBUSY);
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "/", b), -EBUSY);
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "/rafs/c2", b), 0);
    e = lookup(&g, 1, "rafs");
    CHECK(e.nodeid > 1 && e.nodeid >> 48 == 0);
    CHECK_EQ(e.entry_valid, 0);
    CHECK_EQ(e.attr_valid, 0);
    CHECK_EQ(e.attr.mode, S_IFDIR | 0755);
    rafs_dir = e.nodeid;
    cid = lookup(&g, rafs_dir, "c1").nodeid;
    e = lookup(&g, cid, "lowerdir");
    root_a = e.nodeid;
    CHECK_EQ(root_a, 1ull << 48 | IMG_ROOT);
    CHECK_EQ(e.entry_valid, 0); /* the mount may go */
    CHECK_EQ(e.attr_valid, YEAR_S);
    root_b = lookup(&g, rafs_dir, "c2").nodeid;
    CHECK_EQ(root_b, 2ull << 48 | IMG_ROOT);
    CHECK_EQ(lookup(&g, root_a, "..").nodeid, cid);
    CHECK_EQ(lookup(&g, cid, "..").nodeid, rafs_dir);
    CHECK_EQ(lookup(&g, rafs_dir, "..").nodeid, 1);
    CHECK_EQ(lookup(&g, 1, "..").nodeid, 1);
    CHECK(lookup(&g, root_a, "file").nodeid != lookup(&g, root_b, "file").nodeid);

    /* Listings show what lookups give, over mount points in both directions. */
    CHECK_EQ(read_dir(&g, rafs_dir, true, 0, 4096, d, 20), 4);
    CHECK(strcmp(d[2].name, "c1") == 0 && d[2].ino == cid && d[2].e.nodeid == cid && d[2].e.attr_valid == 0);
    CHECK(strcmp(d[3].name, "c2") == 0 && d[3].ino == root_b && d[3].e.nodeid == root_b);
    CHECK_EQ(d[3].e.attr.ino, root_b);
    CHECK_EQ(d[3].e.attr.nlink, 4);
    CHECK_EQ(d[3].e.entry_valid, 0);
    CHECK_EQ(read_dir(&g, rafs_dir, true, d[2].off, 4096, d, 20), 1);
    CHECK_EQ(read_dir(&g, root_a, false, 0, 4096, d, 20), 10);
    CHECK_EQ(d[0].ino, root_a);
    CHECK_EQ(d[1].ino, cid);
    CHECK_EQ(d[5].ino, 1ull << 48 | n.file);

    /* Nothing that a read-write neighbour has is ever ENOSYS. */
    file = 1ull << 48 | n.file;
    CHECK_EQ(error_of(&g, FUSE_OP_OPEN, file, &read_only, 8), 0);
    memcpy(&opened, g.data, sizeof(opened));
    CHECK(opened.open_flags & FUSE_OPEN_KEEP_CACHE);
    CHECK_EQ(opened.fh, 0);
    CHECK_EQ(error_of(&g, FUSE_OP_OPENDIR, root_a, &read_only, 8), 0);
    memcpy(&opened, g.data, sizeof(opened));
    CHECK(opened.open_flags & FUSE_OPEN_CACHE_DIR);
    CHECK_EQ(error_of(&g, FUSE_OP_OPENDIR, rafs_dir, &read_only, 8), 0);
    memcpy(&opened, g.data, sizeof(opened));
    CHECK_EQ(opened.open_flags, 0);
    CHECK_EQ(error_of(&g, FUSE_OP_OPEN, root_a, &read_only, 8), EISDIR);
    CHECK_EQ(error_of(&g, FUSE_OP_OPENDIR, file, &read_only, 8), ENOTDIR);
    CHECK_EQ(error_of(&g, FUSE_OP_FLUSH, file, NULL, 0), 0);
    CHECK_EQ(error_of(&g, FUSE_OP_FSYNC, file, NULL, 0), 0);
    CHECK_EQ(error_of(&g, FUSE_OP_FSYNCDIR, root_a, NULL, 0), 0);
    CHECK_EQ(xattr(&g, file, "user.foo", 5), ENODATA);
    CHECK_EQ(xattr(&g, file, NULL, 5), 0);
    CHECK_EQ(xattr(&g, rafs_dir, "user.foo", 5), ENODATA);
    CHECK_EQ(xattr(&g, rafs_dir, NULL, 0), 0);
    CHECK_EQ(error_of(&g, FUSE_OP_MKDIR, rafs_dir, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_MKDIR, 1, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_MKDIR, root_a, NULL, 0), EROFS);
    CHECK_EQ(error_of(&g, FUSE_OP_UNLINK, rafs_dir, NULL, 0), EROFS);

    CHECK_EQ(vnd_vfs_umount(g.vfs, "/rafs/c1"), -ENOENT);
    CHECK_EQ(vnd_vfs_umount(g.vfs, "/rafs/c1/lowerdir"), 0);
    vnd_rafs_free(a);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, file, NULL, 0), ESTALE);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, cid, NULL, 0), ESTALE); /* nothing needed it any more */
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, rafs_dir, "c1", 3), ENOENT);
    CHECK_EQ(lookup(&g, rafs_dir, "c2").nodeid, root_b);
    a = open_tree(FLAGS, &n);
    CHECK_EQ(vnd_vfs_mount_rafs(g.vfs, "/rafs/c1/lowerdir", a), 0);
    cid = lookup(&g, rafs_dir, "c1").nodeid;
    CHECK_EQ(lookup(&g, cid, "lowerdir").nodeid >> 48, 3); /* serials are never used again */
    rig_free(&g);
    vnd_rafs_free(a);
    vnd_rafs_free(b);
}

/* Mounts on directories of other mounts. */
static void test_nested(void)
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

static void test_mounts_under_load(void)
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

int main(void)
{
    engine = vnd_engine_new(&(vnd_engine_cfg){ 0 });
    CHECK(engine);
    test_pseudo_and_mixed();
    test_nested();
    test_mounts_under_load();
    vnd_engine_shutdown(engine);
    vnd_engine_free(engine);
    puts("test_vfs: ok");
    return 0;
}
