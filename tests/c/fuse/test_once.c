/* Requests that come again because their process died: done before, begun before, failed before, and not begun. */
#include <linux/fs.h>
#include <sys/stat.h>
#include <sys/xattr.h>

#include "share_rig.h"

static struct share s;
static struct req_once once;

static const char *path_of(const char *name)
{
    static char path[256];

    snprintf(path, sizeof(path), "%s/%s", source, name);
    return path;
}

static bool is_there(const char *name)
{
    return access(path_of(name), F_OK) == 0;
}

static uint64_t size_of(const char *name)
{
    struct stat st;

    CHECK(stat(path_of(name), &st) == 0);
    return (uint64_t)st.st_size;
}

/* A request as a first process serves it. */
static int ask_first(uint32_t op, uint64_t nodeid, const void *body, uint32_t len)
{
    once = (struct req_once){ 0 };
    s.client.once = &once;
    s.client.again = false;
    return ask(&s.client, op, nodeid, body, len);
}

/* The same as the next process gets it, which finds this step. */
static int ask_again(enum req_step step, uint32_t op, uint64_t nodeid, const void *body, uint32_t len)
{
    once.step = (uint8_t)step;
    s.client.again = true;
    return ask(&s.client, op, nodeid, body, len);
}

static void new_file(const char *name)
{
    struct made made;

    s.client.once = NULL;
    s.client.again = false;
    CHECK_EQ(create_file(&s.client, name, &made), 0);
}

/* Requests that make a name: served, then again after each step. Not begun, the name is another's. */
TEST(names_made)
{
    struct fuse_mkdir_in mkdir_in = { .mode = 0755 };
    struct fuse_mknod_in mknod_in = { .mode = S_IFREG | 0644 };
    struct fuse_create_in create_in = { .flags = O_RDWR | O_CREAT | O_EXCL, .mode = S_IFREG | 0644 };
    uint8_t body[256];
    uint32_t len;

    share_new(&s);
    for (int i = 0; i < 4; i++) {
        static const uint32_t ops[] = { FUSE_OP_MKDIR, FUSE_OP_MKNOD, FUSE_OP_CREATE, FUSE_OP_SYMLINK };

        if (i == 0)
            len = with_name(body, &mkdir_in, sizeof(mkdir_in), "directory");
        else if (i == 1)
            len = with_name(body, &mknod_in, sizeof(mknod_in), "node");
        else if (i == 2)
            len = with_name(body, &create_in, sizeof(create_in), "file");
        else
            len = with_name(body, "link", 5, "target");
        CHECK_EQ(ask_first(ops[i], 1, body, len), 0);
        CHECK_EQ(once.step, REQ_DONE);
        struct fuse_entry_out e, again;
        memcpy(&e, answer(&s.client), sizeof(e));
        for (enum req_step step = REQ_BEGUN; step <= REQ_DONE; step++) {
            CHECK_EQ(ask_again(step, ops[i], 1, body, len), 0);
            memcpy(&again, answer(&s.client), sizeof(again));
            CHECK_EQ(again.nodeid, e.nodeid);
        }
        CHECK_EQ(ask_again(REQ_NOT_BEGUN, ops[i], 1, body, len), EEXIST);
    }
    share_free(&s);
}

/* Requests that take a name away or move it. What was done is not done to what has the name since. */
TEST(names_gone)
{
    struct fuse_rename_in to = { .newdir = 1 };
    uint8_t body[64];
    uint32_t len;

    share_new(&s);
    new_file("one");
    CHECK_EQ(ask_first(FUSE_OP_UNLINK, 1, "one", 4), 0);
    CHECK_EQ(ask_again(REQ_BEGUN, FUSE_OP_UNLINK, 1, "one", 4), 0);
    new_file("one");
    s.client.once = &once;
    CHECK_EQ(ask_again(REQ_DONE, FUSE_OP_UNLINK, 1, "one", 4), 0);
    CHECK(is_there("one"));
    CHECK_EQ(ask_again(REQ_NOT_BEGUN, FUSE_OP_UNLINK, 1, "none", 5), ENOENT);

    len = with_name(body, &to, sizeof(to), "one");
    memcpy(body + len, "two", 4);
    CHECK_EQ(ask_first(FUSE_OP_RENAME, 1, body, len + 4), 0);
    CHECK_EQ(ask_again(REQ_BEGUN, FUSE_OP_RENAME, 1, body, len + 4), 0);
    new_file("one");
    s.client.once = &once;
    CHECK_EQ(ask_again(REQ_DONE, FUSE_OP_RENAME, 1, body, len + 4), 0);
    CHECK(is_there("one") && is_there("two"));
    share_free(&s);
}

/* A failure is a result, too: what has changed since does not count. */
TEST(failures_are_kept)
{
    struct fuse_mkdir_in in = { .mode = 0755 };
    uint8_t body[64];
    uint32_t len = with_name(body, &in, sizeof(in), "there");

    share_new(&s);
    new_file("there");
    CHECK_EQ(ask_first(FUSE_OP_MKDIR, 1, body, len), EEXIST);
    CHECK(unlink(path_of("there")) == 0);
    CHECK_EQ(ask_again(REQ_DONE, FUSE_OP_MKDIR, 1, body, len), EEXIST);
    CHECK(!is_there("there"));
    share_free(&s);
}

/* Bytes at the end are there once, at whatever step the process died. */
TEST(appends)
{
    struct {
        struct fuse_write_in in;
        char data[10];
    } write = { .in = { .size = 10, .flags = O_APPEND }, .data = "0123456789" };
    struct made made;

    share_new(&s);
    s.client.once = NULL;
    CHECK_EQ(create_file(&s.client, "log", &made), 0);
    write.in.fh = made.fh;
    CHECK_EQ(ask_first(FUSE_OP_WRITE, made.nodeid, &write, sizeof(write.in) + 10), 0);
    for (enum req_step step = REQ_BEGUN; step <= REQ_DONE; step++) {
        CHECK_EQ(ask_again(step, FUSE_OP_WRITE, made.nodeid, &write, sizeof(write.in) + 10), 0);
        CHECK_EQ(size_of("log"), 10);
    }
    memcpy(write.data, "abcdefghij", 10); /* begun, and not done: its bytes are not there */
    CHECK_EQ(ask_again(REQ_BEGUN, FUSE_OP_WRITE, made.nodeid, &write, sizeof(write.in) + 10), 0);
    CHECK_EQ(size_of("log"), 20);
    CHECK_EQ(ask_again(REQ_NOT_BEGUN, FUSE_OP_WRITE, made.nodeid, &write, sizeof(write.in) + 10), 0);
    CHECK_EQ(size_of("log"), 30);
    share_free(&s);
}

/* A truncation that was done does not take away what was written after it. */
TEST(truncations)
{
    struct fuse_setattr_in set = { .valid = 1u << 3 };
    struct fuse_open_in open = { .flags = O_RDWR | O_TRUNC };
    struct made made;

    share_new(&s);
    s.client.once = NULL;
    CHECK_EQ(create_file(&s.client, "file", &made), 0);
    CHECK_EQ(ask_first(FUSE_OP_SETATTR, made.nodeid, &set, sizeof(set)), 0);
    CHECK(truncate(path_of("file"), 100) == 0);
    CHECK_EQ(ask_again(REQ_DONE, FUSE_OP_SETATTR, made.nodeid, &set, sizeof(set)), 0);
    CHECK_EQ(size_of("file"), 100);
    CHECK_EQ(ask_again(REQ_DONE, FUSE_OP_OPEN, made.nodeid, &open, sizeof(open)), 0);
    CHECK_EQ(size_of("file"), 100);
    CHECK_EQ(ask_again(REQ_BEGUN, FUSE_OP_SETATTR, made.nodeid, &set, sizeof(set)), 0);
    CHECK_EQ(size_of("file"), 0);
    share_free(&s);
}
