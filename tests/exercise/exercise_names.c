/* exercise_names.c -- each case: two directories and a target in each, then one call by one caller. */
#include <linux/fs.h>
#include <sys/statvfs.h>
#include <sys/xattr.h>
#include <time.h>

#include "exercise.h"

enum kind {
    NONE,
    REG,
    REG_SETID,
    DIRECTORY,
    DIRECTORY_FULL,
    LINK_REG,
    LINK_DIR,
    LINK_DANGLING,
    LINK_LOOP,
    FIFO,
    CHR,
    BLK,
    SOCK,
    HARD,
    LONGEST,
    TOO_LONG,
    PATH_TOO_LONG,
    BELOW_FILE,
    BELOW_MISSING,
    BELOW_LOOP,
    DIR_SLASH,
    REG_SLASH,
    NONE_SLASH,
    LINK_DIR_SLASH,
    EMPTY,
    DOT,
    DOT_DOT,
    KINDS
};
static const char *const kind_names[KINDS] = {
    "none",          "reg",        "setid", "dir",  "full",  "link-reg",  "link-dir", "dangling",      "loop",
    "fifo",          "chr",        "blk",   "sock", "hard",  "longest",   "too-long", "path-too-long", "below-file",
    "below-missing", "below-loop", "dir/",  "reg/", "none/", "link-dir/", "empty",    "dot",           "dot-dot"
};

static const struct {
    mode_t mode;
    uid_t uid;
    gid_t gid;
} dirs[] = {
    { 0755, 1000, 1000 }, { 0777, 0, 0 },       { 01777, 0, 0 },      { 01777, 1001, 1001 }, { 02775, 1000, 1000 },
    { 02777, 0, 1001 },   { 0555, 1000, 1000 }, { 0666, 1000, 1000 }, { 0711, 0, 0 },        { 03770, 1000, 1000 },
};
#define DIRS (sizeof(dirs) / sizeof(dirs[0]))

static const uid_t owners[] = { 0, 1000, 1000, 1001 };
static const mode_t modes[] = { 0644, 0600, 0, 0777, 04755, 02711, 06775, 01777, 0444, 02644 };
static const char *const xattr_names[] = { "user.a",
                                           "trusted.a",
                                           "security.a",
                                           "trusted.overlay.opaque",
                                           "security.capability",
                                           "system.posix_acl_access",
                                           "system.posix_acl_default",
                                           "user.",
                                           "bad",
                                           "system.none" };

static mode_t chance_mode(void)
{
    return modes[chance(sizeof(modes) / sizeof(modes[0]))];
}

static void make_file(const char *path, mode_t mode)
{
    int fd = open(path, O_CREAT | O_EXCL | O_WRONLY, 0600);

    if (fd < 0 || write(fd, "0123456789", 10) != 10 || fchmod(fd, mode)) {
        perror(path);
        exit(2);
    }
    close(fd);
}

/* Makes what stands at dir/t, and says in path how it is called. */
static void make_target(char *path, const char *dir, enum kind kind, uid_t owner)
{
    static const uint8_t capability[20] = { 1, 0, 0, 2, 0, 4 };
    char aside[64];

    snprintf(path, 300, "%s/t", dir);
    snprintf(aside, sizeof(aside), "%s/aside", dir);
    switch (kind) {
    case REG:
    case HARD:
    case REG_SLASH:
    case BELOW_FILE:
        make_file(path, chance_mode() & 0777);
        if (kind == HARD && link(path, aside))
            exit(2);
        break;
    case REG_SETID: make_file(path, 06755); break;
    case DIRECTORY:
    case DIRECTORY_FULL:
    case DIR_SLASH:
    case DOT:
    case DOT_DOT:
        mkdir(path, one_in(2) ? 0755 : 0777);
        if (kind == DIRECTORY_FULL) {
            snprintf(aside, sizeof(aside), "%s/t/in", dir);
            make_file(aside, 0644);
        }
        break;
    case LINK_REG:
        make_file(aside, 0666);
        symlink("aside", path);
        break;
    case LINK_DIR:
    case LINK_DIR_SLASH:
        mkdir(aside, 0777);
        symlink("aside", path);
        break;
    case LINK_DANGLING: symlink("nowhere", path); break;
    case LINK_LOOP:
    case BELOW_LOOP: symlink("t", path); break;
    case FIFO: mkfifo(path, 0666); break;
    case CHR:
    case BLK:
    case SOCK:
        mknod(path, (kind == CHR ? S_IFCHR : kind == BLK ? S_IFBLK : S_IFSOCK) | 0666, kind == BLK ? 0x5678 : 0);
        break;
    default: break;
    }
    lchown(path, owner, owner);
    if (kind == REG_SETID) {
        chmod(path, 06755); /* the new owner took the bits */
        setxattr(path, "security.capability", capability, sizeof(capability), 0);
        setxattr(path, "user.a", "value", 5, 0);
    }
    make_old(path);
    switch (kind) {
    case LONGEST:
    case TOO_LONG: snprintf(path, 300, "%s/%0*d", dir, kind == LONGEST ? 255 : 256, 0); break;
    case PATH_TOO_LONG:
        path += sprintf(path, "%s", dir);
        for (int i = 0; i < 2048; i++)
            path += sprintf(path, "/.");
        break;
    case BELOW_FILE:
    case BELOW_LOOP: strcat(path, "/x"); break;
    case BELOW_MISSING: strcat(path, "/x/y"); break;
    case DIR_SLASH:
    case REG_SLASH:
    case NONE_SLASH:
    case LINK_DIR_SLASH: strcat(path, "/"); break;
    case EMPTY: *path = 0; break;
    case DOT:
    case DOT_DOT: strcat(path, kind == DOT ? "/." : "/.."); break;
    default: break;
    }
}

static long use_open(const char *path, enum kind kind)
{
    static const int extra[] = {
        O_CREAT,   O_CREAT | O_EXCL,      O_TRUNC,           O_APPEND, O_DIRECTORY, O_NOFOLLOW, O_PATH, O_NOATIME,
        O_TMPFILE, O_CREAT | O_DIRECTORY, O_CREAT | O_TRUNC, O_SYNC
    };
    int flags = (int)chance(3) | extra[chance(12)] | extra[chance(12)] | O_NONBLOCK;
    char buf[16];
    struct stat st;
    int fd;

    say(" open %x", flags);
    /* Kernels since 6.4 refuse the pair, those before it made a file; what a device is, is the kernel's own affair. */
    if ((flags & (O_CREAT | O_DIRECTORY)) == (O_CREAT | O_DIRECTORY) || kind == CHR || kind == BLK)
        return 0;
    fd = open(path, flags, chance_mode());
    if (fd < 0)
        return -1;
    if (fstat(fd, &st) == 0)
        say(" [%o %u:%u %lld]", st.st_mode, st.st_uid, st.st_gid, S_ISREG(st.st_mode) ? (long long)st.st_size : 0);
    if (S_ISREG(st.st_mode)) {
        say(" r%zd", read(fd, buf, 5));
        say(" w%zd", write(fd, "abc", 3));
        say(" t%d", ftruncate(fd, 7));
        say(" s%d", fsync(fd));
    }
    close(fd);
    return 0;
}

static long use_xattr(const char *path)
{
    const char *name = xattr_names[chance(10)];
    uint8_t value[64];
    bool follow = one_in(2);
    struct stat st;
    size_t len;
    static char big[70000];

    switch (chance(6)) {
    case 0: {
        static const uint8_t capability[20] = { 1, 0, 0, 2, 0, 4 };
        int flags = (int)chance(3);

        len = strncmp(name, "system.posix", 12) == 0     ? make_acl(value, chance(8), chance(8), chance(8), chance(8))
              : strcmp(name, "security.capability") == 0 ? sizeof(capability)
                                                         : chance(20);

        if (len == sizeof(capability))
            memcpy(value, capability, len);
        else if (strncmp(name, "system.posix", 12))
            memset(value, 'v', len);
        say(" setxattr %s %zu %x", name, len, flags);
        return (follow ? setxattr : lsetxattr)(path, name, value, len, flags);
    }
    case 1:
        /* Of two faults kernels name different ones first. */
        len = one_in(2) || geteuid() || (follow ? stat : lstat)(path, &st) ? 3000 : 65537;
        say(" setxattr %s big", name);
        return (follow ? setxattr : lsetxattr)(path, name, big, len, 0);
    case 2: say(" getxattr %s", name); return (follow ? getxattr : lgetxattr)(path, name, big, chance(3) * 4);
    case 3: say(" listxattr"); return (follow ? listxattr : llistxattr)(path, big, one_in(3) ? 3 : sizeof(big));
    case 4: say(" removexattr %s", name); return (follow ? removexattr : lremovexattr)(path, name);
    default:
        say(" setxattr then get %s", name);
        if ((follow ? setxattr : lsetxattr)(path, name, "abc", 3, 0))
            return -1;
        return (follow ? getxattr : lgetxattr)(path, name, big, sizeof(big));
    }
}

static uid_t chance_id(void)
{
    static const uid_t ids[] = { (uid_t)-1, 0, 1000, 1001, 4000000000u };

    return ids[chance(5)];
}

static long use_times(const char *path)
{
    static const long nsec[] = { UTIME_NOW, UTIME_OMIT, 5, 999999999, 1000000000 };
    struct timespec t[2] = { { (time_t)chance(1000000000), nsec[chance(5)] },
                             { (time_t)chance(1000000000), nsec[chance(5)] } };
    int flags = one_in(2) ? AT_SYMLINK_NOFOLLOW : 0;

    say(" utimensat %ld %ld %x", t[0].tv_nsec, t[1].tv_nsec, flags);
    return utimensat(AT_FDCWD, path, one_in(6) ? NULL : t, flags);
}

static long use_target_length(const char *path)
{
    char target[4200];
    size_t len = one_in(2) ? chance(30) : 4090 + chance(10);

    memset(target, 'l', len);
    target[len] = 0;
    say(" symlink %zu", len);
    return symlink(target, path);
}

static long use(const char *a, enum kind kind, const char *b)
{
    static const mode_t types[] = { S_IFREG, S_IFCHR, S_IFBLK, S_IFIFO, S_IFSOCK, 0, S_IFDIR, S_IFLNK };
    struct statvfs fs;
    char buf[300];
    struct stat st;
    uint32_t n;

    switch (chance(22)) {
    case 0:
    case 1:
    case 2: return use_open(a, kind);
    case 3: say(" mkdir"); return mkdir(a, chance_mode());
    case 4:
        n = chance(8);
        say(" mknod %x", types[n]);
        return mknod(a, types[n] | chance_mode(), one_in(2) ? 0 : 0x1234);
    case 5: return use_target_length(a);
    case 6:
        n = one_in(2) ? AT_SYMLINK_FOLLOW : 0;
        say(" link %x", n);
        return linkat(AT_FDCWD, a, AT_FDCWD, b, (int)n);
    case 7: say(" unlink"); return unlink(a);
    case 8: say(" rmdir"); return rmdir(a);
    case 9:
    case 10: say(" rename"); return rename(a, b);
    case 11:
    case 12:
        n = one_in(3) ? chance(8) : 1u << chance(3);
        say(" renameat2 %x", n);
        return renameat2(AT_FDCWD, a, AT_FDCWD, b, n);
    case 13:
        n = one_in(4) ? 0x7fffffff : chance(20);
        say(" truncate %u", n);
        return n == 0x7fffffff ? truncate(a, -1) : truncate(a, n);
    case 14: say(" chmod"); return chmod(a, chance_mode());
    case 15: {
        uid_t uid = chance_id();
        gid_t gid = uid == (uid_t)-1 ? 1000 : chance_id(); /* FUSE has no word for a change of nothing */

        say(" chown %d:%d", (int)uid, (int)gid);
        return fchownat(AT_FDCWD, a, uid, gid, one_in(2) ? AT_SYMLINK_NOFOLLOW : 0);
    }
    case 16: return use_times(a);
    case 17:
    case 18: return use_xattr(a);
    case 19:
        n = chance(8);
        say(" access %u", n);
        return faccessat(AT_FDCWD, a, (int)n, AT_EACCESS);
    case 20:
        say(" stat");
        if (one_in(2))
            return statvfs(a, &fs) ? -1 : (long)(fs.f_bsize + fs.f_namemax);
        return (one_in(2) ? stat(a, &st) : lstat(a, &st)) ? -1 : (long)st.st_mode;
    default:
        say(" readlink, list");
        if (one_in(2))
            return readlink(a, buf, sizeof(buf));
        say_names(a);
        return 0;
    }
}

/* Until times that are set from now on differ from those before: some file systems count in ticks. */
static void wait_tick(void)
{
    struct timespec first, now;

    clock_gettime(CLOCK_REALTIME_COARSE, &first);
    do {
        now = (struct timespec){ .tv_nsec = 500000 };
        nanosleep(&now, NULL);
        clock_gettime(CLOCK_REALTIME_COARSE, &now);
    } while (now.tv_sec == first.tv_sec && now.tv_nsec == first.tv_nsec);
}

static void run_case(uint32_t number)
{
    static char a[8192], b[8192];
    static const char *const watched[] = { "a", "a/t", "a/aside", "b", "b/t", "b/aside" };
    static const mode_t masks[] = { 0, 022, 077, 027, 0777 };
    struct stat before[6];
    enum kind kinds[2];
    uid_t caller = chance_user();
    uint32_t d[2] = { chance(DIRS), chance(DIRS) };
    mode_t mask = masks[chance(5)];
    uint8_t acl[64];
    int saved;
    long rc;

    kinds[0] = one_in(3) ? REG : chance(KINDS);
    kinds[1] = one_in(2) ? NONE : chance(KINDS);
    umask(0);
    mkdir("a", 0700);
    mkdir("b", 0700);
    make_target(a, "a", kinds[0], owners[chance(4)]);
    make_target(b, "b", kinds[1], owners[chance(4)]);
    for (int i = 0; i < 2; i++) {
        const char *dir = i ? "b" : "a";

        chown(dir, dirs[d[i]].uid, dirs[d[i]].gid);
        chmod(dir, dirs[d[i]].mode);
        if (one_in(8))
            setxattr(dir, "system.posix_acl_default", acl, make_acl(acl, 7, chance(8), chance(8), 7), 0);
        if (one_in(12))
            setxattr(dir, "system.posix_acl_access", acl, make_acl(acl, 7, chance(8), chance(8), chance(8)), 0);
        make_old(dir);
    }
    for (int i = 0; i < 6; i++)
        if (lstat(watched[i], &before[i]))
            before[i].st_ino = 0;
    wait_tick();
    umask(mask);
    say("n%u %u in %o %s, %o %s, mask %o:", number, caller, dirs[d[0]].mode, kind_names[kinds[0]], dirs[d[1]].mode,
        kind_names[kinds[1]], mask);
    become(caller);
    rc = use(a, kinds[0], b);
    saved = errno;
    become(0);
    errno = saved;
    say_result(rc);
    for (int i = 0; i < 6; i++)
        say_state(watched[i], before[i].st_ino ? &before[i] : NULL);
    remove_all("a");
    remove_all("b");
    if (rmdir("a") || rmdir("b")) {
        perror("rmdir");
        exit(2);
    }
}

void names_run(uint32_t cases)
{
    for (uint32_t i = 0; i < cases; i++)
        run_case(i);
}
