/* The disk as a directory of files: their names, attributes and bytes, and what is not there. */
#include <dirent.h>

#include "disk_rig.h"

#include "fs/vfs.h"

enum { ROOT = 1, FLAT, BOOTSTRAP, BLOB, NO_INODE };

static struct disk_rig g;
static const struct fs_ops *ops;
static struct fs *fs;

BEFORE_EACH
{
    disk_rig_new(&g);
    fs = &g.disk->fs;
    ops = fs->ops;
}

AFTER_EACH
{
    disk_rig_free(&g);
}

struct listed {
    struct fs_entry e[8];
    uint64_t attr_bytes[8]; /* the attributes' size; UINT64_MAX: the entry had none */
    int n, room;
};

static int put(void *ctx, const struct fs_entry *e)
{
    struct listed *l = ctx;

    if (l->n == l->room)
        return -1;
    l->attr_bytes[l->n] = e->attr ? e->attr->size_bytes : UINT64_MAX;
    l->e[l->n++] = *e;
    return 0;
}

static int list(struct listed *l, uint64_t dir, uint64_t off, bool want_attr, int room)
{
    *l = (struct listed){ .room = room };
    return ops->readdir(fs, &(struct fs_listing){ dir, 0, off, want_attr, put, l });
}

static int look_up(uint64_t dir, const char *name, vnd_attr *out)
{
    return ops->lookup(fs, dir, name, strlen(name), out);
}

TEST(the_root_is_a_directory_that_none_may_write_to)
{
    vnd_attr a;

    CHECK_EQ(ops->root(fs), ROOT);
    CHECK_EQ(ops->getattr(fs, ROOT, &a), 0);
    CHECK_EQ(a.mode, S_IFDIR | 0555);
    CHECK_EQ(a.nlink, 2);
}

TEST(each_name_is_found_with_its_size)
{
    const struct {
        const char *name;
        uint64_t ino, bytes;
    } cases[] = {
        { "disk", FLAT, DISK_BYTES },
        { "bootstrap", BOOTSTRAP, IMG_SIZE },
        { g.source->info.id, BLOB, IMG_BLOB_CHUNKS * BLOCK },
    };
    vnd_attr a;

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        CHECK_EQ(look_up(ROOT, cases[i].name, &a), 0);
        CHECK_EQ(a.ino, cases[i].ino);
        CHECK_EQ(a.mode, S_IFREG | 0444);
        CHECK_EQ(a.size_bytes, cases[i].bytes);
        CHECK_EQ(a.blocks, cases[i].bytes / 512);
    }
}

TEST(dots_are_the_root)
{
    vnd_attr a;

    CHECK_EQ(look_up(ROOT, ".", &a), 0);
    CHECK_EQ(a.ino, ROOT);
    CHECK_EQ(look_up(ROOT, "..", &a), 0);
    CHECK_EQ(a.ino, ROOT);
}

TEST(what_is_not_there_is_told_apart)
{
    vnd_attr a;
    struct listed l;

    CHECK_EQ(look_up(ROOT, "dis", &a), -ENOENT);
    CHECK_EQ(look_up(ROOT, "diskk", &a), -ENOENT);
    CHECK_EQ(look_up(FLAT, "disk", &a), -ENOTDIR);
    CHECK_EQ(look_up(NO_INODE, "disk", &a), -ESTALE);
    CHECK_EQ(list(&l, FLAT, 0, false, 8), -ENOTDIR);
    CHECK_EQ(list(&l, NO_INODE, 0, false, 8), -ESTALE);
    CHECK_EQ(ops->getattr(fs, 0, &a), -ESTALE);
    CHECK_EQ(ops->getattr(fs, NO_INODE, &a), -ESTALE);
}

TEST(the_listing_has_all_names_once)
{
    const char *names[] = { ".", "..", "disk", "bootstrap", g.source->info.id };
    struct listed l;

    CHECK_EQ(list(&l, ROOT, 0, true, 8), 0);
    CHECK_EQ(l.n, 5);
    for (int i = 0; i < l.n; i++) {
        CHECK_STR(l.e[i].name, names[i]);
        CHECK_EQ(l.e[i].len, strlen(names[i]));
        CHECK_EQ(l.e[i].type, i < 2 ? DT_DIR : DT_REG);
        CHECK_EQ(l.e[i].ino, i < 2 ? ROOT : FLAT + i - 2);
    }
    CHECK_EQ(l.attr_bytes[0], UINT64_MAX);
    CHECK_EQ(l.attr_bytes[2], DISK_BYTES);
    CHECK_EQ(l.attr_bytes[3], IMG_SIZE);
}

TEST(the_listing_gives_attributes_only_where_they_are_asked_for)
{
    struct listed l;

    CHECK_EQ(list(&l, ROOT, 0, false, 8), 0);
    for (int i = 0; i < l.n; i++)
        CHECK_EQ(l.attr_bytes[i], UINT64_MAX);
}

TEST(the_listing_goes_on_at_each_cookie)
{
    struct listed l;
    uint64_t off = 0;
    int total = 0;

    do {
        CHECK_EQ(list(&l, ROOT, off, false, 1), 0);
        total += l.n;
        if (l.n > 0)
            off = l.e[0].next_off;
    } while (l.n > 0);
    CHECK_EQ(total, 5);
    CHECK_EQ(list(&l, ROOT, UINT64_MAX, false, 8), 0);
    CHECK_EQ(l.n, 0);
}

TEST(extents_are_those_of_the_disk_and_of_each_device)
{
    const struct {
        uint64_t ino, off, uoff;
        bool is_blob;
    } cases[] = {
        { FLAT, (BLOB_AT + 5) * BLOCK, 5 * BLOCK, true },
        { BOOTSTRAP, 4096, 4096, false },
        { BLOB, 5 * BLOCK, 5 * BLOCK, true },
    };
    struct extent at[4];
    uint64_t size;

    fix_load_blob(g.blob);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct fs_extents x = { at, 4, 0, NULL };

        CHECK_EQ(ops->extents(fs, cases[i].ino, cases[i].off, 100, &x), 1);
        CHECK_EQ(x.bytes, 100);
        if (cases[i].is_blob)
            CHECK(at[0].blob == g.blob && at[0].uoff == cases[i].uoff);
        else
            CHECK(at[0].bytes == rafs_metadata(g.image, &size) + cases[i].uoff);
    }
}

TEST(a_file_has_no_extents_at_its_end)
{
    const uint64_t ends[] = { [FLAT] = DISK_BYTES, [BOOTSTRAP] = IMG_SIZE, [BLOB] = IMG_BLOB_CHUNKS * BLOCK };
    struct extent at[4];

    fix_load_blob(g.blob);
    for (uint64_t ino = FLAT; ino <= BLOB; ino++) {
        struct fs_extents x = { at, 4, 0, NULL };

        CHECK_EQ(ops->extents(fs, ino, ends[ino], BLOCK, &x), 0);
        CHECK_EQ(ops->extents(fs, ino, ends[ino] - 10, BLOCK, &x), 1);
        CHECK_EQ(x.bytes, 10);
    }
}

/* Fewer bytes than the file has would be taken for its end. */
TEST(a_read_of_more_extents_than_there_is_room_for_is_an_error)
{
    struct extent at[1];
    struct fs_extents x = { at, 1, 0, NULL };

    fix_load_blob(g.blob);
    CHECK_EQ(ops->extents(fs, BLOB, 5 * BLOCK, 2 * BLOCK, &x), -EIO);
    CHECK_EQ(ops->extents(fs, FLAT, 0, DISK_BYTES, &x), -EIO);
}

TEST(what_is_no_file_has_no_extents)
{
    struct extent at[1];
    struct fs_extents x = { at, 1, 0, NULL };

    CHECK_EQ(ops->extents(fs, ROOT, 0, BLOCK, &x), -EISDIR);
    CHECK_EQ(ops->extents(fs, NO_INODE, 0, BLOCK, &x), -ESTALE);
}

TEST(there_are_neither_links_nor_extended_attributes)
{
    char buf[16];
    struct fs_buf out = { buf, sizeof(buf), 7 };

    CHECK_EQ(ops->readlink(fs, FLAT, buf, sizeof(buf)), -EINVAL);
    CHECK_EQ(ops->readlink(fs, NO_INODE, buf, sizeof(buf)), -ESTALE);
    CHECK(!ops->has_xattr(fs));
    CHECK_EQ(ops->listxattr(fs, FLAT, &out), 0);
    CHECK_EQ(out.need, 0);
    CHECK_EQ(ops->getxattr(fs, FLAT, "user.x", 6, &out), -ENODATA);
}

TEST(statfs_counts_the_flat_disk)
{
    uint64_t blocks, files;
    uint32_t bsize;

    CHECK_EQ(ops->statfs(fs, &blocks, &files, &bsize), 0);
    CHECK_EQ(bsize, BLOCK);
    CHECK_EQ(blocks, DISK_BYTES / BLOCK);
    CHECK_EQ(files, 4);
}

TEST(is_mounted_and_unmounted)
{
    vnd_vfs *v = vnd_vfs_new(g.engine, VND_SESSION_RAFS);

    CHECK_EQ(vnd_vfs_mount_disk(v, "/", g.disk), 0);
    CHECK_EQ(vnd_vfs_mount_disk(v, "/", g.disk), -EEXIST);
    CHECK_EQ(vnd_vfs_umount(v, "/"), 0);
    vnd_vfs_free(v);
}
