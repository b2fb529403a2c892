/* The RAFS v6 reader on images made here: what it reads, and what it refuses. */
#include <dirent.h>
#include <errno.h>

#include "rafs_rig.h"

static void refused(const struct img *m, size_t len, int cause, const char *word)
{
    char err[VND_ERR_MAX] = "";
    int got = 0;
    vnd_rafs *r = open_bytes(m->b, len, &got, err);

    if (r || got != cause || !strstr(err, word)) {
        fprintf(stderr, "%s, cause %d, line '%s', wanted '%s'\n", r ? "opened" : "refused", got, err, word);
        check_fail();
    }
}

static uint64_t find(vnd_rafs *r, uint64_t dir, const char *name)
{
    uint64_t ino = 0;

    CHECK_EQ(vnd_rafs_lookup(r, dir, name, &ino), 0);
    return ino;
}

static vnd_rafs *open_img_tree(struct img_nids *n)
{
    static struct img m;

    img_init(&m, FLAGS);
    *n = img_tree(&m);
    return open_image(&m);
}

TEST(image_and_its_blobs)
{
    struct img_nids n;
    vnd_rafs *r = open_img_tree(&n);
    vnd_rafs_info info;
    vnd_blob_info blob;

    vnd_rafs_info_get(r, &info);
    CHECK_EQ(info.fs_version, 6);
    CHECK_EQ(info.root_ino, IMG_ROOT);
    CHECK_EQ(info.blob_count, 1);
    CHECK_EQ(vnd_rafs_blob_info(r, 0, &blob), 0);
    CHECK_EQ(blob.chunk_count, IMG_BLOB_CHUNKS);
    CHECK_EQ(strspn(blob.id, "a"), 64);
    CHECK_EQ(vnd_rafs_blob_info(r, 1, &blob), -EINVAL);
    vnd_rafs_free(r);
}

TEST(names_are_found)
{
    struct img_nids n;
    vnd_rafs *r = open_img_tree(&n);

    CHECK_EQ(find(r, IMG_ROOT, "file"), n.file);
    CHECK_EQ(find(r, IMG_ROOT, "hard"), n.file);
    CHECK_EQ(find(r, n.deep, ".."), n.sub);
    CHECK_EQ(find(r, n.deep, "."), n.deep);
    CHECK_EQ(find(r, IMG_ROOT, ".."), IMG_ROOT);
    vnd_rafs_free(r);
}

TEST(names_that_are_not_there)
{
    struct img_nids n;
    vnd_rafs *r = open_img_tree(&n);
    const struct {
        uint64_t dir;
        const char *name;
        int rc;
    } cases[] = {
        { IMG_ROOT, "fil", -ENOENT }, { IMG_ROOT, "filee", -ENOENT }, { IMG_ROOT, "\001", -ENOENT },
        { IMG_ROOT, "zz", -ENOENT },  { n.big, "n2", -ENOENT },       { n.big, "n399~", -ENOENT },
        { IMG_ROOT, "", -EINVAL },    { IMG_ROOT, "a/b", -EINVAL },   { n.file, "x", -ENOTDIR },
    };
    uint64_t ino;

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        CHECK_EQ(vnd_rafs_lookup(r, cases[i].dir, cases[i].name, &ino), cases[i].rc);
    vnd_rafs_free(r);
}

TEST(attributes)
{
    struct img_nids n;
    vnd_rafs *r = open_img_tree(&n);
    vnd_attr a;

    CHECK_EQ(vnd_rafs_getattr(r, n.file, &a), 0);
    CHECK_EQ(a.size_bytes, IMG_FILE_SIZE);
    CHECK_EQ(a.blocks, (IMG_FILE_SIZE + 511) / 512);
    CHECK_EQ(a.mode, S_IFREG | 0644);
    CHECK_EQ(a.nlink, 2);
    CHECK_EQ(a.uid, 1000);
    CHECK_EQ(a.gid, 100000);
    CHECK_EQ(a.mtime_s, 1600000000);
    CHECK_EQ(a.mtime_nsec, 123456789);
    CHECK_EQ(vnd_rafs_getattr(r, n.dev, &a), 0);
    CHECK_EQ(a.rdev, 5 << 8 | 1);
    CHECK_EQ(vnd_rafs_getattr(r, 1u << 20, &a), -EIO);
    CHECK_EQ(vnd_rafs_getattr(r, UINT64_MAX, &a), -EIO);
    vnd_rafs_free(r);
}

/* The large directory, three entries at a time, each found again by name. */
TEST(directory_in_pieces)
{
    struct img_nids n;
    vnd_rafs *r = open_img_tree(&n);
    vnd_dirent d[64];
    uint64_t off = 0;
    char name[IMG_NAME];
    int got, total = 0;

    while ((got = vnd_rafs_readdir(r, n.big, off, d, 3)) > 0) {
        for (int i = 0; i < got; i++) {
            CHECK_EQ(find(r, n.big, d[i].name), d[i].ino);
            if (total >= 2) {
                img_many_name(name, total - 2);
                CHECK_STR(d[i].name, name);
                CHECK_EQ(d[i].type, DT_REG);
            }
            total++;
        }
        off = d[got - 1].next_off;
    }
    CHECK_EQ(got, 0);
    CHECK_EQ(total, IMG_MANY + 2);
    CHECK_EQ(vnd_rafs_readdir(r, n.big, UINT64_MAX, d, 3), 0);
    CHECK_EQ(vnd_rafs_readdir(r, n.file, 0, d, 3), -ENOTDIR);
    vnd_rafs_free(r);
}

TEST(symlink_target_fits_or_is_refused)
{
    struct img_nids n;
    vnd_rafs *r = open_img_tree(&n);
    char buf[64];

    CHECK_EQ(vnd_rafs_readlink(r, n.link, NULL, 0), 11);
    CHECK_EQ(vnd_rafs_readlink(r, n.link, buf, 11), 11);
    CHECK(memcmp(buf, "target/path", 11) == 0);
    CHECK_EQ(vnd_rafs_readlink(r, n.link, buf, 10), -ERANGE);
    CHECK_EQ(vnd_rafs_readlink(r, n.file, buf, sizeof(buf)), -EINVAL);
    vnd_rafs_free(r);
}

TEST(xattrs)
{
    struct img_nids n;
    vnd_rafs *r = open_img_tree(&n);
    char buf[64];

    CHECK_EQ(vnd_rafs_listxattr(r, n.xfile, NULL, 0), 22);
    CHECK_EQ(vnd_rafs_listxattr(r, n.xfile, buf, sizeof(buf)), 22);
    CHECK(memcmp(buf, "user.foo\0security.cap", 22) == 0);
    CHECK_EQ(vnd_rafs_listxattr(r, n.xfile, buf, 21), -ERANGE);
    CHECK_EQ(vnd_rafs_getxattr(r, n.xfile, "user.foo", buf, sizeof(buf)), 5);
    CHECK(memcmp(buf, "hello", 5) == 0);
    CHECK_EQ(vnd_rafs_getxattr(r, n.xfile, "user.foo", buf, 4), -ERANGE);
    CHECK_EQ(vnd_rafs_getxattr(r, n.xfile, "user.fo", buf, 4), -ENODATA);
    CHECK_EQ(vnd_rafs_getxattr(r, n.xfile, "security.cap", NULL, 0), 4);
    CHECK_EQ(vnd_rafs_getxattr(r, n.file, "user.foo", buf, 4), -ENODATA);
    CHECK_EQ(vnd_rafs_listxattr(r, n.file, buf, 4), 0);
    vnd_rafs_free(r);
}

TEST(compact_and_owner)
{
    struct img m;
    struct img_nids n;
    vnd_attr a;

    img_init(&m, 0x1 | 0x4); /* ids are the daemon's */
    n = img_tree(&m);
    memset(m.b + img_off(n.empty), 0, 64);
    img_16(&m, img_off(n.empty), 4 << 1);
    img_16(&m, img_off(n.empty) + 4, S_IFREG | 0640);
    img_16(&m, img_off(n.empty) + 6, 1);
    img_16(&m, img_off(n.empty) + 24, 7);
    vnd_rafs *r = open_image(&m);

    CHECK_EQ(vnd_rafs_getattr(r, n.empty, &a), 0);
    CHECK_EQ(a.mode, S_IFREG | 0640);
    CHECK_EQ(a.mtime_s, 1234);
    CHECK_EQ(a.uid, geteuid());
    CHECK_EQ(vnd_rafs_getattr(r, n.file, &a), 0);
    CHECK_EQ(a.uid, geteuid());
    vnd_rafs_free(r);
}

/* Extents go to the blob; here there is none, so blobs are put in by hand. */
TEST(extents)
{
    struct extent x[STORE_EXTENTS_MAX];
    struct vnd_blob *blob = (struct vnd_blob *)&engine;
    struct img m;
    struct img_nids n;
    struct fs_extents some = { x, 4, 0 }, all = { x, STORE_EXTENTS_MAX, 0 }, two = { x, 2, 0 };

    img_init(&m, FLAGS);
    n = img_tree(&m);
    vnd_rafs *r = open_image(&m);
    struct fs *fs = rafs_fs(r);

    CHECK_EQ(fs->ops->extents(fs, n.file, 0, 10, &some), -ENODEV);
    r->blobs[0].blob = blob;
    CHECK_EQ(fs->ops->extents(fs, n.file, 100, 5000, &some), 2);
    CHECK_EQ(some.bytes, 5000);
    CHECK_EQ(x[0].chunk, 3);
    CHECK_EQ(x[0].chunk_off, 100);
    CHECK_EQ(x[0].uoff, 3 * 4096 + 100);
    CHECK_EQ(x[0].len, 3996);
    CHECK_EQ(x[1].chunk, 4);
    CHECK_EQ(x[1].uoff, 4 * 4096);
    CHECK_EQ(x[1].len, 1004);
    CHECK_EQ(fs->ops->extents(fs, n.file, 0, UINT32_MAX, &all), 11);
    CHECK_EQ(all.bytes, IMG_FILE_SIZE);
    CHECK_EQ(x[10].len, 100);
    CHECK_EQ(fs->ops->extents(fs, n.file, 0, UINT32_MAX, &two), 2);
    CHECK_EQ(two.bytes, 8192);
    CHECK_EQ(fs->ops->extents(fs, n.file, IMG_FILE_SIZE, 1, &some), 0);
    CHECK_EQ(fs->ops->extents(fs, n.file, UINT64_MAX, 1, &some), 0);
    CHECK_EQ(fs->ops->extents(fs, n.sub, 0, 1, &some), -EISDIR);
    CHECK_EQ(fs->ops->extents(fs, n.link, 0, 1, &some), -EINVAL);
    r->blobs[0].blob = NULL;
    vnd_rafs_free(r);
}

static int count_put(void *ctx, const struct blob_chunk *c)
{
    uint32_t *count = ctx;

    CHECK_EQ(c->digest[0], c->index + 1);
    return ++*count == 5;
}

TEST(chunks)
{
    vnd_chunk_info c[16];
    struct img m;
    struct img_nids n;
    uint32_t count = 0;

    img_init(&m, FLAGS);
    n = img_tree(&m);
    vnd_rafs *r = open_image(&m);

    CHECK_EQ(vnd_rafs_chunks(r, n.file, 0, c, 16), 11);
    CHECK_EQ(c[10].file_off, 40960);
    CHECK_EQ(c[10].chunk_index, 13);
    CHECK_EQ(c[10].usize_bytes, 100);
    CHECK_EQ(c[10].digest_known, 1);
    CHECK_EQ(c[10].digest[5], 14);
    CHECK_EQ(c[10].coff, 13 * 4096);
    CHECK_EQ(vnd_rafs_chunks(r, n.file, 10, c, 16), 1);
    CHECK_EQ(vnd_rafs_chunks(r, n.file, 11, c, 16), 0);
    CHECK_EQ(vnd_rafs_chunks(r, n.file, UINT64_MAX, c, 16), 0);
    CHECK_EQ(vnd_rafs_chunks(r, n.sub, 0, c, 16), -EISDIR);
    CHECK_EQ(rafs_blob_chunks(r, 0, count_put, &count), 1);
    CHECK_EQ(count, 5);
    count = 100;
    CHECK_EQ(rafs_blob_chunks(r, 0, count_put, &count), 0);
    CHECK_EQ(count, 111);
    CHECK_EQ(rafs_blob_chunks(r, 7, count_put, &count), 0);
    vnd_rafs_free(r);
}

/* ---- what open refuses, one fault each */

#define BREAK(change, cause, word)             \
    do {                                       \
        img_init(&m, FLAGS);                   \
        img_tree(&m);                          \
        change;                                \
        refused(&m, sizeof(m.b), cause, word); \
    } while (0)

TEST(superblock_with_a_fault_is_refused)
{
    struct img m;

    BREAK(img_32(&m, 1024, 7), VND_CAUSE_FORMAT, "not a RAFS bootstrap");
    BREAK(img_32(&m, 0, 0x52414653); img_32(&m, 4, 0x500), VND_CAUSE_FORMAT, "RAFS v5");
    BREAK(img_32(&m, 1024 + 8, 0), VND_CAUSE_FORMAT, "plain EROFS");
    BREAK(img_32(&m, 1024 + 80, 0x1c), VND_CAUSE_FORMAT, "0x10");
    BREAK(m.b[1024 + 12] = 13, VND_CAUSE_FORMAT, "block size");
    BREAK(img_16(&m, 1024 + 14, 60000), VND_CAUSE_FORMAT, "root inode");
    BREAK(img_64(&m, 1152, FLAGS | 0x400), VND_CAUSE_FORMAT, "0x400");
    BREAK(img_64(&m, 1152, FLAGS | 1ull << 40), VND_CAUSE_FORMAT, "feature");
    BREAK(img_64(&m, 1152, FLAGS | 0x80), VND_CAUSE_FORMAT, "one compressor");
    BREAK(img_64(&m, 1152, FLAGS | 0x8), VND_CAUSE_FORMAT, "one digest");
    BREAK(img_32(&m, 1024 + 40, 0x7fffffff), VND_CAUSE_FORMAT, "root inode");
    BREAK(img_16(&m, img_off(IMG_ROOT) + 4, S_IFREG), VND_CAUSE_FORMAT, "not a directory");
}

TEST(tables_with_a_fault_are_refused)
{
    struct img m;

    BREAK(img_64(&m, 1152 + 8, 4097), VND_CAUSE_FORMAT, "blob table");
    BREAK(img_64(&m, 1152 + 8, UINT64_MAX - 4095), VND_CAUSE_FORMAT, "blob table");
    BREAK(img_32(&m, 1152 + 16, 255), VND_CAUSE_FORMAT, "blob table");
    BREAK(img_32(&m, 1152 + 20, 12288), VND_CAUSE_FORMAT, "chunk size");
    BREAK(img_64(&m, 1152 + 32, UINT64_MAX - 79), VND_CAUSE_FORMAT, "chunk table");
    BREAK(img_64(&m, 1152 + 24, 4096), VND_CAUSE_FORMAT, "overlap");
    BREAK(img_64(&m, 1152 + 8, 12288), VND_CAUSE_FORMAT, "overlap");
    BREAK(img_64(&m, 1152 + 40, 1 << 30); img_32(&m, 1152 + 48, 4), VND_CAUSE_FORMAT, "prefetch table");
    BREAK(img_16(&m, 1024 + 86, 2), VND_CAUSE_FORMAT, "devices");
    BREAK(img_16(&m, 1024 + 88, 0), VND_CAUSE_FORMAT, "device table");
}

TEST(blob_with_a_fault_is_refused)
{
    struct img m;

    BREAK(m.b[1408] = 'b', VND_CAUSE_FORMAT, "name different blobs");
    BREAK(m.b[4096 + 3] = '/', VND_CAUSE_FORMAT, "id");
    BREAK(m.b[4096 + 3] = 0, VND_CAUSE_FORMAT, "id");
    BREAK(memset(m.b + 4096, 0, 64), VND_CAUSE_FORMAT, "id");
    BREAK(img_32(&m, 4096 + 84, 0x1001), VND_CAUSE_FORMAT, "feature 0x1000");
    BREAK(img_32(&m, 4096 + 84, 0x101), VND_CAUSE_FORMAT, "encrypted");
    BREAK(img_32(&m, 4096 + 216, 1), VND_CAUSE_FORMAT, "encrypted");
    BREAK(img_32(&m, 4096 + 64, 1), VND_CAUSE_FORMAT, "out of range");
    BREAK(img_32(&m, 4096 + 76, 4), VND_CAUSE_FORMAT, "out of range");
    BREAK(img_32(&m, 4096 + 72, (1 << 24) + 1), VND_CAUSE_FORMAT, "out of range");
    BREAK(img_64(&m, 4096 + 96, 1ull << 45), VND_CAUSE_FORMAT, "out of range");
}

#undef BREAK

TEST(truncated_file_is_refused)
{
    struct img good;

    img_init(&good, FLAGS);
    img_tree(&good);
    refused(&good, sizeof(good.b) - 1, VND_CAUSE_FORMAT, "truncated");
    refused(&good, 8192, VND_CAUSE_FORMAT, "truncated");
    refused(&good, 1024, VND_CAUSE_FORMAT, "not a RAFS bootstrap");
    refused(&good, 0, VND_CAUSE_FORMAT, "not a RAFS bootstrap");
}

TEST(placeholder_id)
{
    char path[32], err[VND_ERR_MAX], real[65];
    vnd_blob_info blob;
    struct img m;
    int cause, fd;

    img_init(&m, FLAGS);
    img_tree(&m);
    memset(m.b + 4096, 'x', 64);
    memset(m.b + 1408, 'x', 64);
    memset(real, 'b', 64);
    real[64] = 0;
    fd = img_fd(m.b, sizeof(m.b), path);
    vnd_rafs *r = vnd_rafs_open(engine, path, real, NULL, &cause, err, sizeof(err));

    CHECK(r);
    CHECK_EQ(vnd_rafs_blob_info(r, 0, &blob), 0);
    CHECK(strcmp(blob.id, real) == 0);
    vnd_rafs_free(r);
    CHECK(!vnd_rafs_open(engine, path, "../etc", NULL, &cause, err, sizeof(err)));
    CHECK_EQ(cause, VND_CAUSE_FORMAT);
    close(fd);
}

/* The file is cut short while it is mapped: errors, no crash. */
/* Inodes end where the chunk table begins: what lies there looks like one, and is none. */
TEST(inode_number_beyond_the_inodes)
{
    static struct img m;
    vnd_rafs *r;
    vnd_attr attr;
    uint64_t nid = (IMG_CHUNKS_OFF - IMG_META) / 32 + 10;

    img_init(&m, FLAGS);
    img_tree(&m);
    img_inode(&m, nid, 0, S_IFREG | 0644, 1, 0, 0);
    r = open_image(&m);
    CHECK_EQ(vnd_rafs_getattr(r, nid, &attr), -EIO);
    vnd_rafs_free(r);
}

/* A name ends inside its directory's block, though what follows would make a longer one. */
TEST(name_that_ends_beyond_its_directory)
{
    static struct img m;
    struct img_nids n;
    vnd_rafs *r;
    uint64_t nid, ino;
    uint32_t at;

    img_init(&m, FLAGS);
    n = img_tree(&m);
    nid = img_alloc(&m, 256);
    const struct img_name names[] = {
        { ".", nid, DT_DIR }, { "..", IMG_ROOT, DT_DIR }, { "a", n.file, DT_REG }, { "b", n.file, DT_REG }
    };
    img_dir(&m, nid, 2, names, 4);
    at = img_off(nid) + 64; /* 48 bytes of entries, 5 of names */
    memset(m.b + at + 53, 'x', 20);
    img_16(&m, at + 3 * 12 + 8, 53 + 10); /* where b's name begins, a's ends */
    r = open_image(&m);
    CHECK_EQ(vnd_rafs_lookup(r, nid, "abxxxxxxxxxx", &ino), -EIO);
    vnd_rafs_free(r);
}

TEST(truncated_under_us)
{
    char path[32], err[VND_ERR_MAX], out[4096];
    struct img m;
    struct img_nids n;
    vnd_attr a;
    uint64_t ino;
    int cause, fd;

    img_init(&m, FLAGS);
    n = img_tree(&m);
    fd = img_fd(m.b, sizeof(m.b), path);
    vnd_rafs *r = vnd_rafs_open(engine, path, NULL, NULL, &cause, err, sizeof(err));

    CHECK(r);
    CHECK_EQ(ftruncate(fd, 4096), 0);
    CHECK_EQ(vnd_rafs_getattr(r, n.file, &a), -EIO);
    CHECK_EQ(vnd_rafs_lookup(r, IMG_ROOT, "file", &ino), -EIO);
    CHECK(vnd_rafs_check(r, 10, out, sizeof(out)) > 0);
    vnd_rafs_free(r);
    close(fd);
}
