/* exercise.c -- exercise DIRECTORY SEED NAMES DATA TREE: runs that many steps of each part in DIRECTORY, which is empty
 * and left so. Needs root. See exercise.h.
 */
#include "exercise.h"

#include <ftw.h>
#include <grp.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <sys/xattr.h>

#define NAMES_MAX 512

static uint64_t random_state;

uint32_t chance(uint32_t n)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 33) % n;
}

bool one_in(uint32_t n)
{
    return chance(n) == 0;
}

void say(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
}

void say_result(long rc)
{
    if (rc < 0)
        say(" = %s\n", strerrorname_np(errno));
    else
        say(" = %ld\n", rc);
}

static void must(long rc, const char *what)
{
    if (rc < 0) {
        perror(what);
        exit(2);
    }
}

void become(uid_t uid)
{
    must(syscall(SYS_setresuid, -1, 0, -1), "setresuid 0");
    must(syscall(SYS_setresgid, -1, uid == 1002 ? 1000 : uid, -1), "setresgid");
    if (uid)
        must(syscall(SYS_setresuid, -1, uid, -1), "setresuid");
}

/* 1002 shares the group of 1000. */
uid_t chance_user(void)
{
    static const uid_t users[] = { 0, 0, 1000, 1000, 1001, 1002 };

    return users[chance(6)];
}

uint64_t hash_bytes(uint64_t hash, const void *data, size_t len)
{
    const uint8_t *at = data;

    for (size_t i = 0; i < len; i++)
        hash = (hash ^ at[i]) * 0x100000001b3ull;
    return hash;
}

static uint64_t hash_file(const char *path)
{
    uint64_t hash = 0xcbf29ce484222325ull;
    static char buf[65536];
    int fd = open(path, O_RDONLY | O_NOFOLLOW);
    ssize_t n;

    if (fd < 0)
        return 0;
    while ((n = read(fd, buf, sizeof(buf))) > 0)
        hash = hash_bytes(hash, buf, (size_t)n);
    close(fd);
    return hash;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void say_xattrs(const char *path)
{
    static char list[16384], value[65536];
    char *names[NAMES_MAX];
    size_t n = 0;
    ssize_t len = llistxattr(path, list, sizeof(list));

    for (char *at = list; len > 0 && at < list + len && n < NAMES_MAX; at += strlen(at) + 1)
        names[n++] = at;
    qsort(names, n, sizeof(names[0]), by_name);
    for (size_t i = 0; i < n; i++) {
        ssize_t got = lgetxattr(path, names[i], value, sizeof(value));

        say(" %s:%zd:%llx", names[i], got,
            got < 0 ? (unsigned long long)errno : (unsigned long long)hash_bytes(7, value, (size_t)got));
    }
}

static bool same_time(struct timespec a, struct timespec b)
{
    return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
}

void say_state(const char *path, const struct stat *before)
{
    char target[4200];
    struct stat st;

    say("  %.40s:", path);
    if (lstat(path, &st)) {
        say(" %s\n", strerrorname_np(errno));
        return;
    }
    say(" %o %u:%u", st.st_mode, st.st_uid, st.st_gid);
    if (!S_ISDIR(st.st_mode))
        say(" n%lu s%lld", (unsigned long)st.st_nlink, (long long)st.st_size);
    else
        say(" n%lu", (unsigned long)st.st_nlink);
    if (S_ISCHR(st.st_mode) || S_ISBLK(st.st_mode))
        say(" r%llx", (unsigned long long)st.st_rdev);
    if (S_ISLNK(st.st_mode)) {
        ssize_t n = readlink(path, target, sizeof(target));

        say(" ->%llx", n < 0 ? 0ull : (unsigned long long)hash_bytes(7, target, (size_t)n));
    }
    if (S_ISREG(st.st_mode))
        say(" h%llx", (unsigned long long)hash_file(path));
    if (before && before->st_ino == st.st_ino) {
        say("%s%s", same_time(before->st_mtim, st.st_mtim) ? "" : " m+",
            same_time(before->st_ctim, st.st_ctim) ? "" : " c+");
    }
    if (st.st_mtim.tv_sec < OLD_S + 1000)
        say(" m%lld.%ld", (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
    say_xattrs(path);
    say("\n");
}

void say_names(const char *path)
{
    char *names[NAMES_MAX];
    size_t n = 0;
    struct dirent *e;
    DIR *dir = opendir(path);

    if (!dir) {
        say(" %s", strerrorname_np(errno));
        return;
    }
    while ((e = readdir(dir)) && n < NAMES_MAX) {
        char line[300];

        snprintf(line, sizeof(line), "%s/%d", e->d_name, e->d_type);
        names[n++] = strdup(line);
    }
    closedir(dir);
    qsort(names, n, sizeof(names[0]), by_name);
    for (size_t i = 0; i < n; i++) {
        say(" %.24s", names[i]);
        free(names[i]);
    }
}

void make_old(const char *path)
{
    struct timespec t[2] = { { OLD_S, OLD_NSEC }, { OLD_S, OLD_NSEC } };

    utimensat(AT_FDCWD, path, t, AT_SYMLINK_NOFOLLOW);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    return ftw->level ? remove(path) : 0;
}

/* All below it. */
void remove_all(const char *path)
{
    must(nftw(path, remove_one, 32, FTW_DEPTH | FTW_PHYS), path);
}

size_t make_acl(uint8_t out[64], uint32_t user_bits, uint32_t named_bits, uint32_t group_bits, uint32_t mask_bits)
{
    /* posix_acl_xattr.h: version 2, then tag, bits and id of each entry. */
    const struct {
        uint16_t tag;
        uint32_t bits, id;
    } entries[] = {
        { 1, user_bits, ~0u }, { 2, named_bits, 1001 }, { 4, group_bits, ~0u }, { 16, mask_bits, ~0u }, { 32, 0, ~0u },
    };
    uint32_t version = 2;
    size_t at = 4;

    memcpy(out, &version, 4);
    for (size_t i = 0; i < 5; i++) {
        uint16_t bits = (uint16_t)entries[i].bits;

        memcpy(out + at, &entries[i].tag, 2);
        memcpy(out + at + 2, &bits, 2);
        memcpy(out + at + 4, &entries[i].id, 4);
        at += 8;
    }
    return at;
}

int main(int argc, char **argv)
{
    if (argc != 6 || geteuid()) {
        fputs("usage: exercise DIRECTORY SEED NAMES DATA TREE, as root\n", stderr);
        return 2;
    }
    setvbuf(stdout, NULL, _IOFBF, 1 << 16);
    must(chdir(argv[1]), argv[1]);
    must(setgroups(0, NULL), "setgroups");
    must(chown(".", 0, 0), "chown");
    must(chmod(".", 0755), "chmod");
    random_state = strtoull(argv[2], NULL, 10) * 0x9e3779b97f4a7c15ull + 1;
    names_run((uint32_t)strtoul(argv[3], NULL, 10));
    data_run((uint32_t)strtoul(argv[4], NULL, 10));
    tree_run((uint32_t)strtoul(argv[5], NULL, 10));
    umask(022);
    remove_all(".");
    say("end\n");
    return fflush(stdout) ? 1 : 0;
}
