/* The RAFS v5 reader on an image that nydus-image made (v2.4.4-8-g34e6071e: create --fs-version 5 --compressor zstd), of a
 * tree of 49 inodes: file (1,536,000 bytes: 0 to 255 again and again; mode 4755), small (1000:1001, user.color blue) with
 * a second name hard and a symlink link to it, empty, fifo, null (1:3), sub/ with deep/ and n00 to n39, nNN of NN bytes.
 * All times are 1. */
#include <dirent.h>
#include <errno.h>
#include <sys/stat.h>

#include "rafs_rig.h"

#define IMAGE "tests/c/rafs/v5.boot"
#define FILE_BYTES 1536000u

static uint8_t bytes[32768];
static size_t size;

static void load_image(void)
{
    FILE *f = fopen(IMAGE, "rb");

    CHECK(f);
    size = fread(bytes, 1, sizeof(bytes), f);
    fclose(f);
    CHECK(size > 8192 && size < sizeof(bytes));
}

static vnd_rafs *open_v5(void)
{
    char err[VND_ERR_MAX] = "";
    int cause;
    vnd_rafs *r;

    load_image();
    r = open_bytes(bytes, size, &cause, err);
    CHECK(r);
    return r;
}

static uint64_t find(vnd_rafs *r, uint64_t dir, const char *name)
{
    uint64_t ino = 0;

    CHECK_EQ(vnd_rafs_lookup(r, dir, name, &ino), 0);
    return ino;
}

static vnd_attr attr_of(vnd_rafs *r, const char *name)
{
    vnd_rafs_info info;
    vnd_attr a;

    vnd_rafs_info_get(r, &info);
    CHECK_EQ(vnd_rafs_getattr(r, find(r, info.root_ino, name), &a), 0);
    return a;
}

static uint64_t root_of(vnd_rafs *r)
{
    vnd_rafs_info info;

    vnd_rafs_info_get(r, &info);
    CHECK_EQ(info.fs_version, 5);
    CHECK_EQ(info.blob_count, 1);
    return info.root_ino;
}

TEST(attributes)
{
    vnd_rafs *r = open_v5();
    vnd_attr file = attr_of(r, "file"), small = attr_of(r, "small"), null = attr_of(r, "null");

    CHECK_EQ(file.size_bytes, FILE_BYTES);
    CHECK_EQ(file.mode, S_IFREG | 04755);
    CHECK_EQ(file.mtime_s, 1);
    CHECK_EQ(small.uid, 1000);
    CHECK_EQ(small.gid, 1001);
    CHECK_EQ(small.nlink, 2);
    CHECK(S_ISCHR(null.mode));
    CHECK(S_ISFIFO(attr_of(r, "fifo").mode));
    CHECK_EQ(attr_of(r, "empty").size_bytes, 0);
    vnd_rafs_free(r);
}

TEST(names)
{
    vnd_rafs *r = open_v5();
    uint64_t root = root_of(r), sub = find(r, root, "sub"), ino;

    CHECK_EQ(find(r, root, "hard"), find(r, root, "small"));
    CHECK_EQ(find(r, sub, ".."), root);
    CHECK_EQ(find(r, find(r, sub, "deep"), "."), find(r, sub, "deep"));
    CHECK_EQ(vnd_rafs_lookup(r, sub, "n40", &ino), -ENOENT);
    CHECK_EQ(vnd_rafs_lookup(r, find(r, root, "file"), "x", &ino), -ENOTDIR);
    vnd_rafs_free(r);
}

TEST(directory_in_pieces)
{
    vnd_rafs *r = open_v5();
    uint64_t sub = find(r, root_of(r), "sub"), off = 0;
    vnd_dirent d[7];
    vnd_attr a;
    int n, names = 0;

    while ((n = vnd_rafs_readdir(r, sub, off, d, 7)) > 0) {
        for (int i = 0; i < n; i++, names++)
            if (d[i].name[0] == 'n') {
                CHECK_EQ(vnd_rafs_getattr(r, d[i].ino, &a), 0);
                CHECK_EQ(a.size_bytes, (uint64_t)strtol(d[i].name + 1, NULL, 10));
            }
        off = d[n - 1].next_off;
    }
    CHECK_EQ(n, 0);
    CHECK_EQ(names, 2 + 1 + 40);
    vnd_rafs_free(r);
}

TEST(symlink_and_xattr)
{
    vnd_rafs *r = open_v5();
    uint64_t root = root_of(r), small = find(r, root, "small");
    char buf[64] = "";

    CHECK_EQ(vnd_rafs_readlink(r, find(r, root, "link"), buf, sizeof(buf)), 5);
    CHECK(memcmp(buf, "small", 5) == 0);
    CHECK_EQ(vnd_rafs_readlink(r, small, buf, sizeof(buf)), -EINVAL);
    CHECK_EQ(vnd_rafs_getxattr(r, small, "user.color", buf, sizeof(buf)), 4);
    CHECK(memcmp(buf, "blue", 4) == 0);
    CHECK_EQ(vnd_rafs_getxattr(r, small, "user.colour", buf, sizeof(buf)), -ENODATA);
    CHECK_EQ(vnd_rafs_listxattr(r, small, buf, sizeof(buf)), 11);
    vnd_rafs_free(r);
}

TEST(chunks_of_a_file)
{
    vnd_rafs *r = open_v5();
    vnd_chunk_info c[3];

    CHECK_EQ(vnd_rafs_chunks(r, find(r, root_of(r), "file"), 0, c, 3), 2);
    CHECK_EQ(c[0].usize_bytes, 1u << 20);
    CHECK_EQ(c[1].file_off, 1u << 20);
    CHECK_EQ(c[1].usize_bytes, FILE_BYTES - (1u << 20));
    vnd_rafs_free(r);
}

/* Bytes of the file that its extents name. */
static uint64_t extents_bytes(vnd_rafs *r, uint64_t ino, uint64_t off, uint32_t len)
{
    struct fs *fs = rafs_fs(r);
    struct extent ext[8];
    struct fs_extents x = { ext, 8, 0 };

    return fs->ops->extents(fs, ino, off, len, &x) < 0 ? UINT64_MAX : x.bytes;
}

TEST(extents_of_a_file)
{
    static struct vnd_blob *const blob = (struct vnd_blob *)&engine; /* extents name it, nothing reads it */
    vnd_rafs *r = open_v5();
    uint64_t file = find(r, root_of(r), "file");

    r->blobs[0].blob = blob;
    CHECK_EQ(extents_bytes(r, file, 0, 4096), 4096);
    CHECK_EQ(extents_bytes(r, file, (1u << 20) - 10, 20), 20);
    CHECK_EQ(extents_bytes(r, file, FILE_BYTES - 5, 100), 5);
    CHECK_EQ(extents_bytes(r, file, FILE_BYTES, 100), 0);
    r->blobs[0].blob = NULL;
    vnd_rafs_free(r);
}

TEST(check_finds_no_fault)
{
    vnd_rafs *r = open_v5();
    char out[4096] = "";

    CHECK_EQ(vnd_rafs_check(r, 10, out, sizeof(out)), 0);
    vnd_rafs_free(r);
}

TEST(digest_of_an_inode)
{
    vnd_rafs *r = open_v5();
    uint8_t digest[32] = { 0 }, none[32] = { 0 };

    CHECK_EQ(vnd_rafs_digest(r, find(r, root_of(r), "file"), digest), 0);
    CHECK(memcmp(digest, none, sizeof(none)) != 0);
    vnd_rafs_free(r);
}

/* Reads all that a walk meets, whatever it says. */
static void walk(vnd_rafs *r, uint64_t ino, uint32_t *budget)
{
    vnd_chunk_info c[4];
    vnd_dirent d[16];
    vnd_attr a;
    char buf[300];
    uint64_t off = 0;
    int n;

    if (*budget == 0 || vnd_rafs_getattr(r, ino, &a) != 0)
        return;
    --*budget;
    vnd_rafs_readlink(r, ino, buf, sizeof(buf));
    vnd_rafs_listxattr(r, ino, buf, sizeof(buf));
    vnd_rafs_chunks(r, ino, 0, c, 4);
    extents_bytes(r, ino, 0, 1 << 21);
    while ((n = vnd_rafs_readdir(r, ino, off, d, 16)) > 0 && *budget) {
        for (int i = 0; i < n; i++)
            if (strcmp(d[i].name, ".") != 0 && strcmp(d[i].name, "..") != 0)
                walk(r, d[i].ino, budget);
        CHECK(d[n - 1].next_off > off); /* else the listing would never end */
        off = d[n - 1].next_off;
    }
}

/* Each word of the file, all bits turned: refused, or read within bounds, and a fault found if it says anything of use. */
TEST(any_word_may_be_wrong)
{
    char err[VND_ERR_MAX], out[4096];
    int cause, refused = 0, faulty = 0;

    load_image();
    for (size_t at = 0; at + 4 <= size; at += 4) {
        uint32_t budget = 100;
        vnd_rafs *r;

        if (at >= 200 && at < 8192)
            continue; /* the rest of the superblock is not used */
        for (int i = 0; i < 4; i++)
            bytes[at + i] ^= 0xff;
        r = open_bytes(bytes, size, &cause, err);
        refused += !r;
        if (r) {
            walk(r, root_of(r), &budget);
            faulty += vnd_rafs_check(r, 10, out, sizeof(out)) > 0;
            vnd_rafs_free(r);
        }
        for (int i = 0; i < 4; i++)
            bytes[at + i] ^= 0xff;
    }
    CHECK(refused > 20);
    CHECK(faulty > 800);
}
