/* What `check` finds in an image that opens: one fault each, and what a hostile image may cost it. */
#include "rafs_rig.h"

static void check_says(const struct img *m, const char *word)
{
    char out[8192];
    vnd_rafs *r = open_image(m);
    int n = vnd_rafs_check(r, 50, out, sizeof(out));

    if (word ? n < 1 || !strstr(out, word) : n != 0) {
        fprintf(stderr, "%d faults, wanted '%s':\n%s\n", n, word ? word : "none", out);
        check_fail();
    }
    vnd_rafs_free(r);
}

static struct img_nids good_image(struct img *m)
{
    img_init(m, FLAGS);
    return img_tree(m);
}

TEST(image_without_faults)
{
    struct img good;

    good_image(&good);
    check_says(&good, NULL);
}

#define BREAK(change, word)   \
    do {                      \
        m = good;             \
        change;               \
        check_says(&m, word); \
    } while (0)

TEST(directories)
{
    struct img good, m;
    struct img_nids n = good_image(&good);
    uint32_t root_dir = img_off(IMG_ROOT) + 64, entry = root_dir + 5 * 12; /* "file" */
    uint32_t name = root_dir + rafs_le16(good.b + entry + 8);

    BREAK(m.b[name] = 'z', "ascending");
    BREAK(m.b[name] = '/', "'/' or NUL");
    BREAK(m.b[name] = 0, "'/' or NUL");
    BREAK(m.b[entry + 10] = 2, "type");
    BREAK(img_64(&m, entry, 1 << 20), "malformed or outside");
    BREAK(img_64(&m, entry, n.empty), "link count");
    BREAK(img_16(&m, root_dir + 8, 11), "malformed directory block");
    BREAK(img_16(&m, root_dir + 12 + 8, 0xffff), "malformed directory entry");
    BREAK(img_64(&m, root_dir + 8 * 12, IMG_ROOT), "twice");
    BREAK(img_64(&m, img_off(n.sub) + 64 + 24, IMG_ROOT), "twice");
    BREAK(img_64(&m, img_off(n.sub) + 64 + 12, n.sub), "not its parent");
    BREAK(img_64(&m, img_off(n.sub) + 64, IMG_ROOT), "another inode");
    BREAK(img_32(&m, img_off(n.sub) + 44, 9), "link count");
    BREAK(img_32(&m, img_off(n.file) + 44, 9), "link count 9, names 2");
}

TEST(inodes)
{
    struct img good, m;
    struct img_nids n = good_image(&good);

    BREAK(img_16(&m, img_off(n.xfile) + 2, 6), "xattrs");
    BREAK(m.b[img_off(n.xfile) + 64 + 4] = 1, "xattrs");
    BREAK(m.b[img_off(n.xfile) + 64 + 13] = 5, "xattrs");
    BREAK(img_64(&m, img_off(n.link) + 8, 5000), "symlink");
    BREAK(img_64(&m, img_off(n.link) + 8, 0), "symlink");
    BREAK(m.b[img_off(n.link) + 64 + 3] = 0, "symlink");
    BREAK(img_64(&m, img_off(n.dev) + 8, 5), "with a size");
    BREAK(img_32(&m, img_off(n.file) + 40, 1000000000), "mtime");
    BREAK(img_64(&m, 1152, FLAGS & ~0x20u), "none has");
    BREAK(img_64(&m, 1152 + 40, 8000); img_32(&m, 1152 + 48, 4); img_32(&m, 8000, 1 << 20), "prefetch");
}

TEST(chunks)
{
    struct img good, m;
    struct img_nids n = good_image(&good);

    BREAK(img_16(&m, img_off(n.file) + 64 + 2, 2), "chunk index");
    BREAK(img_16(&m, img_off(n.file) + 64 + 2, 0), "chunk index");
    BREAK(img_16(&m, img_off(n.file) + 64, IMG_BLOB_CHUNKS), "chunk index");
    BREAK(img_32(&m, img_off(n.file) + 64 + 4, IMG_BLOB_CHUNKS), "outside its blob");
    BREAK(img_64(&m, img_off(n.file) + 8, 1ull << 62), "chunk index");
    BREAK(img_16(&m, img_off(n.file), 1), "not chunk-based");
    BREAK(img_32(&m, IMG_CHUNKS_OFF + 32, 1), "names blob 1");
    BREAK(img_32(&m, IMG_CHUNKS_OFF + 72, 999), "index 999");
    BREAK(img_32(&m, IMG_CHUNKS_OFF + 44, 0), "bad sizes");
    BREAK(img_32(&m, IMG_CHUNKS_OFF + 40, 1), "bad sizes");
    BREAK(img_64(&m, IMG_CHUNKS_OFF + 48, 1ull << 50), "outside its blob");
    BREAK(memset(m.b + IMG_CHUNKS_OFF, 0, 32), "no digest");
}

#undef BREAK

/* Many directories over the same entries: the work would grow with their product. */
TEST(check_is_bounded)
{
    static char names[12][4];
    struct img_name entries[14];
    struct img m;
    struct img_nids n;
    uint32_t big;

    img_init(&m, FLAGS);
    n = img_tree(&m);
    big = img_off(n.big);
    entries[0] = (struct img_name){ ".", n.sub, 2 };
    entries[1] = (struct img_name){ "..", IMG_ROOT, 2 };
    for (int i = 0; i < 12; i++) {
        snprintf(names[i], sizeof(names[i]), "s%c", 'a' + i);
        entries[i + 2] = (struct img_name){ names[i], img_alloc(&m, 0), 2 };
        memcpy(m.b + img_off(entries[i + 2].nid), m.b + big, 64);
    }
    img_dir(&m, n.sub, 14, entries, 14);
    check_says(&m, "overlap");
}

TEST(check_stops_at_max)
{
    struct img m;
    char out[100];

    img_init(&m, FLAGS);
    img_tree(&m);
    for (int i = 0; i < 11; i++)
        img_32(&m, IMG_CHUNKS_OFF + 80 * i + 44, 0);
    vnd_rafs *r = open_image(&m);

    CHECK_EQ(vnd_rafs_check(r, 3, out, sizeof(out)), 3);
    CHECK_EQ(vnd_rafs_check(r, 100, out, 1), 11); /* counted where there is no room to say */
    vnd_rafs_free(r);
}
