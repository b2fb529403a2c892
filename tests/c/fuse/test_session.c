/* The FUSE session over a mount table: every answer that the kernel can see, without a kernel. */
#include <dirent.h>
#include <fcntl.h>

#include "fuse_rig.h"

/* ---- session life */

TEST(init)
{
    struct rig g;
    struct fuse_init_out out;
    uint64_t guest61 = 0xb7bfffffbull; /* what a 6.1 guest offers */
    uint32_t gen;

    rig_new(&g, VND_SESSION_RAFS);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 1, NULL, 0), EIO);
    CHECK_EQ(error_of(&g, FUSE_OP_INIT, 0, "\7\0\0\0", 4), EINVAL);
    out = init(&g, 8, 0, 0);
    CHECK_EQ(out.major, 7);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 1, NULL, 0), EIO); /* not yet: the kernel comes again */
    CHECK_EQ(error_of(&g, FUSE_OP_INIT, 0, "\6\0\0\0\1\0\0\0\0\0\0\0\0\0\0\0", 16), EPROTO);
    gen = fuse_session_gen(g.s);
    out = init(&g, 7, 38, guest61 | FUSE_INIT_INIT_EXT);
    CHECK_EQ(fuse_session_gen(g.s), gen);
    CHECK_EQ(g.len, 64);
    CHECK_EQ(out.minor, 38);
    CHECK_EQ(out.max_readahead, 131072);
    CHECK_EQ(out.max_pages, 256);
    CHECK_EQ(out.max_write, 4096);
    CHECK(out.max_background >= 256);
    CHECK_EQ(out.time_gran, 1);
    CHECK_EQ(out.flags2, 0);
    CHECK_EQ(out.flags & ~(uint32_t)guest61 & ~(uint32_t)FUSE_INIT_INIT_EXT, 0);
    CHECK(out.flags & FUSE_INIT_EXPLICIT_INVAL_DATA);
    CHECK(out.flags & FUSE_INIT_POSIX_ACL); /* what an image's ACL says is obeyed */
    CHECK(!(out.flags & FUSE_INIT_AUTO_INVAL_DATA));
    CHECK(out.flags & FUSE_INIT_CACHE_SYMLINKS && out.flags & FUSE_INIT_DO_READDIRPLUS);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 1, NULL, 0), 0);
    /* A second INIT: a new session, whatever belonged to the old one gets no answer. */
    out = init(&g, 7, 45, ~0ull);
    CHECK_EQ(out.minor, 38);
    CHECK_EQ(fuse_session_gen(g.s), gen + 1);
    fake_done(&g.f);
    fake_fill(&g.f, FUSE_OP_GETATTR, 1, NULL, 0, 8192);
    g.f.r.session_gen = gen;
    CHECK_EQ(fuse_session_serve(g.s, &g.w, &g.f.r), REQ_NOREPLY);
    CHECK_EQ(fuse_session_fail(g.s, &g.w, &g.f.r, EIO), REQ_NOREPLY);
    out = init(&g, 7, 12, 0);
    CHECK_EQ(g.len, 24);
    CHECK_EQ(out.minor, 12);
    CHECK_EQ(out.flags, 0);
    CHECK_EQ(error_of(&g, FUSE_OP_DESTROY, 0, NULL, 0), 0);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 1, NULL, 0), EIO);
    init(&g, 7, 38, 0);
    fuse_session_reset(g.s);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 1, NULL, 0), EIO);
    rig_free(&g);
    rig_new(&g, VND_SESSION_MIXED);
    out = init(&g, 7, 38, guest61);
    CHECK(out.flags & FUSE_INIT_AUTO_INVAL_DATA);
    CHECK(!(out.flags & FUSE_INIT_EXPLICIT_INVAL_DATA));
    rig_free(&g);
}

TEST(malformed)
{
    struct rig g;
    vnd_rafs *r = rig_rafs(&g, FLAGS);
    char longer[600];

    CHECK_EQ(error_of(&g, FUSE_OP_MAX, 1, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, 4096, 1, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, UINT32_MAX, 1, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, 0, 1, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 2ull << 48, NULL, 0), ESTALE);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 0, NULL, 0), ESTALE);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 1ull << 48 | 0xffffffffffff, NULL, 0), EIO);
    CHECK_EQ(error_of(&g, FUSE_OP_READ, 1, "abc", 3), EINVAL);
    fake_done(&g.f);
    fake_fill(&g.f, FUSE_OP_GETATTR, 1, "0123456789abcdef", 16, 8192);
    g.f.r.in.len = 40;
    call_filled(&g);
    CHECK_EQ(g.error, EINVAL);
    /* Room: none for a header, only for a header, one byte short. */
    call_cap(&g, FUSE_OP_GETATTR, 1, NULL, 0, 15);
    CHECK_EQ(g.verdict, REQ_NOREPLY);
    call_cap(&g, FUSE_OP_GETATTR, 1, NULL, 0, 16);
    CHECK_EQ(g.error, EINVAL);
    call_cap(&g, FUSE_OP_GETATTR, 1, NULL, 0, 119);
    CHECK_EQ(g.error, EINVAL);
    call_cap(&g, FUSE_OP_GETATTR, 1, NULL, 0, 120);
    CHECK_EQ(g.error, 0);
    call_cap(&g, FUSE_OP_FORGET, 1, NULL, 0, 0);
    CHECK_EQ(g.verdict, REQ_NOREPLY);
    call_cap(&g, FUSE_OP_BATCH_FORGET, 1, "garbage", 7, 8192);
    CHECK_EQ(g.verdict, REQ_NOREPLY);
    call(&g, FUSE_OP_INTERRUPT, 1, "12345678", 8);
    CHECK_EQ(g.verdict, REQ_NOREPLY);
    /* Names. */
    memset(longer, 'a', sizeof(longer));
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, 1, "\0\0", 2), EINVAL);
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, 1, "abc", 3), EINVAL);
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, 1, "a/b", 4), EINVAL);
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, 1, longer, 600), ENAMETOOLONG);
    longer[256] = 0;
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, 1, longer, 257), ENAMETOOLONG);
    longer[255] = 0;
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, 1, longer, 256), 0); /* absent, and said so for good */
    rig_free(&g);
    vnd_rafs_free(r);
}

/* ---- inside an image */

TEST(lookup_and_attr)
{
    struct rig g;
    vnd_rafs *r = rig_rafs(&g, FLAGS);
    uint64_t base = 1ull << 48;
    struct fuse_attr_out attr;
    struct fuse_entry_out e = lookup(&g, 1, "file");

    CHECK_EQ(e.nodeid, base | g.n.file);
    CHECK_EQ(e.attr.ino, g.n.file); /* one image: its own numbers */
    CHECK_EQ(e.entry_valid, YEAR_S);
    CHECK_EQ(e.attr_valid, YEAR_S);
    CHECK_EQ(e.attr.size, IMG_FILE_SIZE);
    CHECK_EQ(e.attr.mode, S_IFREG | 0644);
    CHECK_EQ(e.attr.nlink, 2);
    CHECK_EQ(e.attr.mtimensec, 123456789);
    CHECK_EQ(lookup(&g, 1, "hard").nodeid, e.nodeid);
    e = lookup(&g, 1, "nothing");
    CHECK_EQ(e.nodeid, 0);
    CHECK_EQ(e.entry_valid, YEAR_S);
    CHECK_EQ(lookup(&g, 1, ".").nodeid, 1);
    CHECK_EQ(lookup(&g, 1, "..").nodeid, 1);
    CHECK_EQ(lookup(&g, base | g.n.sub, "..").nodeid, 1);
    CHECK_EQ(lookup(&g, base | g.n.deep, "..").nodeid, base | g.n.sub);
    CHECK_EQ(error_of(&g, FUSE_OP_LOOKUP, base | g.n.file, "x", 2), ENOTDIR);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, 1, NULL, 0), 0);
    memcpy(&attr, g.data, sizeof(attr));
    CHECK_EQ(attr.attr.ino, IMG_ROOT);
    CHECK_EQ(attr.attr_valid, YEAR_S);
    CHECK_EQ(error_of(&g, FUSE_OP_GETATTR, base | IMG_ROOT, NULL, 0), 0);
    memcpy(&attr, g.data, sizeof(attr));
    CHECK_EQ(attr.attr.ino, IMG_ROOT);
    CHECK_EQ(error_of(&g, FUSE_OP_READLINK, base | g.n.link, NULL, 0), 0);
    CHECK(g.len == 11 && memcmp(g.data, "target/path", 11) == 0);
    CHECK_EQ(error_of(&g, FUSE_OP_READLINK, 1, NULL, 0), EINVAL);
    CHECK_EQ(error_of(&g, FUSE_OP_STATFS, 1, NULL, 0), 0);
    CHECK_EQ(g.len, 80);
    rig_free(&g);
    vnd_rafs_free(r);
}

TEST(refusals)
{
    static const uint32_t erofs[] = { FUSE_OP_SETATTR,   FUSE_OP_SYMLINK,  FUSE_OP_MKNOD,           FUSE_OP_MKDIR,
                                      FUSE_OP_UNLINK,    FUSE_OP_RMDIR,    FUSE_OP_RENAME,          FUSE_OP_LINK,
                                      FUSE_OP_WRITE,     FUSE_OP_SETXATTR, FUSE_OP_REMOVEXATTR,     FUSE_OP_CREATE,
                                      FUSE_OP_FALLOCATE, FUSE_OP_RENAME2,  FUSE_OP_COPY_FILE_RANGE, FUSE_OP_TMPFILE };
    struct fuse_open_in rdwr = { .flags = O_RDWR }, trunc = { .flags = O_TRUNC }, read_only = { 0 };
    struct rig g;
    vnd_rafs *r = rig_rafs(&g, FLAGS);
    uint64_t file = 1ull << 48 | g.n.file;

    for (size_t i = 0; i < sizeof(erofs) / sizeof(erofs[0]); i++)
        CHECK_EQ(error_of(&g, erofs[i], file, NULL, 0), EROFS);
    CHECK_EQ(error_of(&g, FUSE_OP_IOCTL, file, NULL, 0), ENOTTY);
    CHECK_EQ(error_of(&g, FUSE_OP_SETUPMAPPING, file, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_STATX, file, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_OPEN, file, &rdwr, 8), EROFS);
    CHECK_EQ(error_of(&g, FUSE_OP_OPEN, file, &trunc, 8), EROFS);
    CHECK_EQ(error_of(&g, FUSE_OP_OPEN, file, &read_only, 8), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_OPENDIR, 1, &read_only, 8), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_FLUSH, file, NULL, 0), ENOSYS);
    CHECK_EQ(error_of(&g, FUSE_OP_RELEASE, file, NULL, 0), 0);
    CHECK_EQ(error_of(&g, FUSE_OP_SYNCFS, file, NULL, 0), 0);
    rig_free(&g);
    vnd_rafs_free(r);
}

TEST(access_and_lseek)
{
    struct fuse_access_in write = { .mask = 2 }, exec = { .mask = 1 }, reading = { .mask = 4 };
    struct fuse_lseek_in data = { .offset = 5, .whence = SEEK_DATA }, hole = { .offset = 5, .whence = SEEK_HOLE },
                         past = { .offset = IMG_FILE_SIZE, .whence = SEEK_DATA }, bad = { .whence = 9 };
    struct rig g;
    vnd_rafs *r = rig_rafs(&g, FLAGS);
    uint64_t file = 1ull << 48 | g.n.file, off;

    CHECK_EQ(error_of(&g, FUSE_OP_ACCESS, file, &write, 8), EROFS);
    CHECK_EQ(error_of(&g, FUSE_OP_ACCESS, file, &exec, 8), EACCES); /* root needs one x bit */
    CHECK_EQ(error_of(&g, FUSE_OP_ACCESS, file, &reading, 8), 0);
    CHECK_EQ(error_of(&g, FUSE_OP_ACCESS, 1, &exec, 8), 0);
    CHECK_EQ(error_of(&g, FUSE_OP_LSEEK, file, &data, 24), 0);
    memcpy(&off, g.data, 8);
    CHECK_EQ(off, 5);
    CHECK_EQ(error_of(&g, FUSE_OP_LSEEK, file, &hole, 24), 0);
    memcpy(&off, g.data, 8);
    CHECK_EQ(off, IMG_FILE_SIZE);
    CHECK_EQ(error_of(&g, FUSE_OP_LSEEK, file, &past, 24), ENXIO);
    CHECK_EQ(error_of(&g, FUSE_OP_LSEEK, file, &bad, 24), EINVAL);
    rig_free(&g);
    vnd_rafs_free(r);
}

TEST(xattrs)
{
    struct rig g;
    vnd_rafs *r = rig_rafs(&g, FLAGS | FLAG_XATTR);
    uint64_t with = 1ull << 48 | g.n.xfile, without = 1ull << 48 | g.n.file;
    uint32_t size;

    CHECK_EQ(xattr(&g, with, "user.foo", 0), 0);
    memcpy(&size, g.data, 4);
    CHECK_EQ(size, 5);
    CHECK_EQ(g.len, 8);
    CHECK_EQ(xattr(&g, with, "user.foo", 5), 0);
    CHECK(g.len == 5 && memcmp(g.data, "hello", 5) == 0);
    CHECK_EQ(xattr(&g, with, "user.foo", 4), ERANGE);
    CHECK_EQ(xattr(&g, with, "trusted.overlay.opaque", 100), ENODATA);
    CHECK_EQ(xattr(&g, without, "user.foo", 100), ENODATA);
    CHECK_EQ(xattr(&g, with, NULL, 0), 0);
    memcpy(&size, g.data, 4);
    CHECK_EQ(size, 22);
    CHECK_EQ(xattr(&g, with, NULL, 100), 0);
    CHECK_EQ(g.len, 22);
    CHECK_EQ(xattr(&g, with, NULL, 21), ERANGE);
    CHECK_EQ(xattr(&g, without, NULL, 100), 0);
    CHECK_EQ(g.len, 0);
    CHECK_EQ(error_of(&g, FUSE_OP_GETXATTR, with, "\0\0\0\0\0\0\0\0ab", 10), EINVAL);
    rig_free(&g);
    vnd_rafs_free(r);
    r = rig_rafs(&g, FLAGS);
    CHECK_EQ(xattr(&g, 1, "user.foo", 5), ENOSYS);
    CHECK_EQ(xattr(&g, 1, NULL, 5), ENOSYS);
    rig_free(&g);
    vnd_rafs_free(r);
}

/* ---- listings */

TEST(listings)
{
    static struct seen d[300];
    struct rig g;
    vnd_rafs *r = rig_rafs(&g, FLAGS);
    uint64_t big = 1ull << 48 | g.n.big;

    for (int plus = 0; plus < 2; plus++) {
        /* Sizes that end at every place of an entry. */
        for (uint32_t size = 192; size < 192 + 192; size += 8) {
            uint64_t off = 0;
            int total = 0, n;

            while ((n = read_dir(&g, big, plus, off, size, d, 300)) > 0) {
                for (int i = 0; i < n; i++, total++) {
                    char want[IMG_NAME] = "..";

                    if (total < 2)
                        want[total + 1] = 0;
                    else
                        img_many_name(want, total - 2);
                    CHECK(strcmp(d[i].name, want) == 0);
                    CHECK_EQ(d[i].type, total < 2 ? DT_DIR : DT_REG);
                    if (plus) {
                        CHECK_EQ(d[i].e.nodeid, total < 2 ? 0 : 1ull << 48 | d[i].ino);
                        CHECK_EQ(d[i].e.entry_valid, total < 2 ? 0 : YEAR_S);
                    }
                }
                off = d[n - 1].off;
            }
            CHECK_EQ(n, 0);
            CHECK_EQ(total, IMG_MANY + 2);
        }
        CHECK_EQ(read_dir(&g, big, plus, 0, 24, d, 300), -EINVAL); /* not even one: no end, an error */
        CHECK_EQ(read_dir(&g, 1ull << 48 | g.n.file, plus, 0, 4096, d, 300), -ENOTDIR);
        CHECK_EQ(read_dir(&g, big, plus, UINT64_MAX, 4096, d, 300), 0);
        CHECK_EQ(read_dir(&g, big, plus, 123456, 4096, d, 300), 0);
    }
    CHECK_EQ(read_dir(&g, 1, false, 0, 4096, d, 300), 10);
    CHECK_EQ(d[0].ino, IMG_ROOT);
    CHECK_EQ(d[1].ino, IMG_ROOT);
    CHECK_EQ(d[5].ino, g.n.file);
    CHECK_EQ(d[5].ino, d[6].ino);
    rig_free(&g);
    vnd_rafs_free(r);
}

/* ---- reads */

static int read_at(struct rig *g, uint64_t nodeid, uint64_t off, uint32_t size, uint32_t out_cap)
{
    struct fuse_read_in in = { .offset = off, .size = size };

    call_cap(g, FUSE_OP_READ, nodeid, &in, sizeof(in), out_cap);
    return g->error ? -g->error : (int)g->len;
}

TEST(reads)
{
    struct fs zero = { &zero_ops };
    struct rig g;
    uint64_t file = 1ull << 48 | 6;

    rig_new(&g, VND_SESSION_RAFS);
    CHECK_EQ(vfs_mount(g.vfs, "/", &zero), 0);
    init(&g, 7, 38, ~0ull);
    CHECK_EQ(read_at(&g, file, 0, 4096, 16 + 4096), 4096);
    CHECK(g.data[0] == 0 && g.data[4095] == 0);
    CHECK_EQ(g.f.dirty, 4096);
    CHECK_EQ(read_at(&g, file, 0, 1u << 20, 16 + (1u << 20)), 1 << 20);
    CHECK_EQ(read_at(&g, file, ZERO_SIZE - 10, 4096, 16 + 10), 10); /* the end, and room for it */
    CHECK_EQ(read_at(&g, file, ZERO_SIZE, 4096, 16), 0);
    CHECK_EQ(read_at(&g, file, UINT64_MAX, 4096, 8192), 0);
    /* A short reply would be taken for the end of the file: an error instead. */
    CHECK_EQ(read_at(&g, file, 0, 4096, 16 + 4095), -EINVAL);
    CHECK_EQ(read_at(&g, file, 0, 0xffffffff, 16 + (2u << 20)), -EINVAL);
    CHECK_EQ(read_at(&g, file, 0, 4096, 16), -EINVAL);
    CHECK_EQ(read_at(&g, file, 0, 0, 16), 0);
    rig_free(&g);
}
