/* exercise_tree.c -- a tree that lives on, as fsstress goes about it: files stay open while their names go, directories
 * are listed from places told before, locks are held.
 */
#include <sys/file.h>
#include <sys/xattr.h>

#include "exercise.h"

#define OPEN_FILES 8

static const char *const dirs[] = { ".", "d0", "d1", "d0/e", "d1/e", "d0/e/f" };
static int files[OPEN_FILES];

static void chance_path(char out[64])
{
    snprintf(out, 64, "%s/n%u", dirs[chance(6)], chance(10));
}

static int chance_file(void)
{
    return files[chance(OPEN_FILES)];
}

static void keep(int fd)
{
    uint32_t at = chance(OPEN_FILES);

    if (fd >= 0) {
        if (files[at] >= 0)
            close(files[at]);
        files[at] = fd;
    }
    say_result(fd < 0 ? -1 : 0);
}

static void say_open_state(int fd)
{
    struct stat st;

    if (fstat(fd, &st)) {
        say(" %s", strerrorname_np(errno));
        return;
    }
    say(" [%o %u:%u n%lu s%lld]", st.st_mode, st.st_uid, st.st_gid, (unsigned long)st.st_nlink,
        S_ISDIR(st.st_mode) ? 0 : (long long)st.st_size);
}

static void use_file(int fd)
{
    struct timespec t[2] = { { OLD_S, 1 }, { OLD_S, 2 } };
    char buf[64], path[64];
    ssize_t n;

    switch (chance(10)) {
    case 0:
        say(" fchmod");
        say_result(fchmod(fd, 0600 + chance(8)));
        break;
    case 1:
        say(" fchown");
        say_result(fchown(fd, chance_user(), chance_user()));
        break;
    case 2:
        say(" ftruncate");
        say_result(ftruncate(fd, chance(1000)));
        break;
    case 3:
        say(" fsetxattr");
        say_result(fsetxattr(fd, one_in(2) ? "user.x" : "trusted.x", "value", chance(6), 0));
        break;
    case 4:
        say(" fgetxattr");
        say_result(fgetxattr(fd, "user.x", buf, sizeof(buf)));
        break;
    case 5:
        say(" futimens");
        say_result(futimens(fd, t));
        break;
    case 6:
        memset(buf, 'w', sizeof(buf));
        say(" pwrite");
        say_result(pwrite(fd, buf, 1 + chance(60), chance(500)));
        break;
    case 7:
        n = pread(fd, buf, sizeof(buf), chance(500));
        say(" pread h%llx", n < 0 ? 0ull : (unsigned long long)hash_bytes(7, buf, (size_t)n));
        say_result(n);
        break;
    case 8:
        chance_path(path);
        say(" link to %s", path);
        /* Linux 6.10 lets the process that opened it, those before root alone. */
        say_result(geteuid() ? 0 : linkat(fd, "", AT_FDCWD, path, AT_EMPTY_PATH));
        break;
    default: say(" fallocate"); say_result(fallocate(fd, (int)chance(2), chance(1000), 1 + chance(1000)));
    }
    say("  ");
    say_open_state(fd);
    say("\n");
}

/* An entry's place, told while listing, leads to what came after it then. */
static void use_places(const char *path)
{
    long places[64];
    char *after[64];
    struct dirent *e;
    uint32_t n = 0, at, wrong = 0;
    DIR *dir = opendir(path);

    if (!dir) {
        say_result(-1);
        return;
    }
    while ((e = readdir(dir)) && n < 64) {
        after[n] = strdup(e->d_name);
        places[n++] = telldir(dir);
    }
    for (uint32_t i = 0; i + 1 < n; i++) {
        at = chance(n - 1);
        seekdir(dir, places[at]);
        e = readdir(dir);
        wrong += !e || strcmp(e->d_name, after[at + 1]);
    }
    rewinddir(dir);
    for (at = 0; readdir(dir);)
        at++;
    for (uint32_t i = 0; i < n; i++)
        free(after[i]);
    closedir(dir);
    say(" %u entries, %u again, wrong %u", n, at, wrong);
    say_names(path);
    say_result(0);
}

static void use_locks(int fd, int other)
{
    struct flock lock = { .l_type = one_in(2) ? F_WRLCK : F_RDLCK, .l_start = chance(100), .l_len = chance(100) };

    if (one_in(2)) {
        int kind = one_in(3) ? LOCK_UN : one_in(2) ? LOCK_EX : LOCK_SH;

        say(" flock %d", kind);
        say_result(flock(fd, kind | LOCK_NB));
    } else {
        lock.l_type = one_in(3) ? F_UNLCK : lock.l_type;
        say(" lock %d %lld+%lld", lock.l_type, (long long)lock.l_start, (long long)lock.l_len);
        say(" %d", fcntl(fd, F_OFD_SETLK, &lock) ? errno : 0);
        lock.l_type = F_WRLCK;
        lock.l_pid = 0;
        say_result(fcntl(other, F_OFD_GETLK, &lock) ? -1 : lock.l_type);
    }
}

static void use_acl(const char *path)
{
    static const char *const kinds[] = { "system.posix_acl_access", "system.posix_acl_default" };
    const char *kind = kinds[chance(2)];
    uint8_t acl[64];
    size_t len = make_acl(acl, 7, chance(8), chance(8), chance(8));

    say(" %s", kind);
    say_result(one_in(3) ? removexattr(path, kind) : setxattr(path, kind, acl, len, 0));
}

static void step(uint32_t number)
{
    static const int kinds[] = { O_RDWR | O_CREAT, O_RDWR | O_CREAT | O_EXCL, O_RDONLY,
                                 O_RDWR | O_TRUNC, O_WRONLY | O_APPEND,       O_RDONLY | O_DIRECTORY };
    uid_t caller = one_in(2) ? 0 : chance_user();
    char a[64], b[64], proc[64];
    const char *dir = dirs[chance(6)];
    uint32_t n = chance(8);
    int fd = chance_file();
    struct stat st;

    chance_path(a);
    chance_path(b);
    say("t%u %u:", number, caller);
    become(caller);
    switch (chance(22)) {
    case 0:
    case 1:
    case 2:
        say(" open %s %x", a, kinds[n % 6]);
        /* Which devices there are is the kernel's own affair, and the mount's. */
        if (lstat(a, &st) == 0 && S_ISCHR(st.st_mode)) {
            say(" = device\n");
            break;
        }
        keep(open(a, kinds[n % 6] | O_NOFOLLOW | O_NONBLOCK, 0666));
        break;
    case 3:
        say(" open %s unnamed", dir);
        keep(open(dir, O_TMPFILE | O_RDWR | (n == 0 ? O_EXCL : 0), 0644));
        break;
    case 4:
        snprintf(proc, sizeof(proc), "/proc/self/fd/%d", fd);
        say(" link open to %s", a);
        say_result(linkat(AT_FDCWD, proc, AT_FDCWD, a, AT_SYMLINK_FOLLOW));
        break;
    case 5:
    case 6:
    case 7:
    case 8: use_file(fd); break;
    case 9:
        say(" unlink %s", a);
        say_result(unlink(a));
        break;
    case 10:
        say(" mkdir %s", n < 5 ? dir : a);
        say_result(mkdir(n < 5 ? dir : a, 0777));
        break;
    case 11:
        say(" rmdir %s", n == 0 ? dir : a);
        say_result(rmdir(n == 0 ? dir : a));
        break;
    case 12:
    case 13:
        n = n < 5 ? 0 : 1u << (n - 5);
        say(" rename %s %s %x", a, one_in(6) ? dir : b, n);
        say_result(renameat2(AT_FDCWD, a, AT_FDCWD, b, n));
        break;
    case 14:
        say(" link %s %s", a, b);
        say_result(link(a, b));
        break;
    case 15:
        say(" symlink %s", a);
        say_result(symlink(n < 4 ? "n1" : "../n2", a));
        break;
    case 16:
        say(" list %s", dir);
        use_places(dir);
        break;
    case 17: use_locks(fd, chance_file()); break;
    case 18:
        say(" acl of %s", n < 4 ? dir : a);
        use_acl(n < 4 ? dir : a);
        break;
    case 19:
        say(" chmod %s", a);
        say_result(n < 3 ? chmod(dir, 03777) : chmod(a, 0111 * n));
        break;
    case 20:
        say(" set %s", a);
        say_result(lsetxattr(a, n < 4 ? "user.y" : "trusted.overlay.origin", "y", 1, 0));
        break;
    default:
        say(" state %s\n", a);
        become(0);
        say_state(a, NULL);
    }
    become(0);
}

static void say_tree(const char *dir)
{
    /* The order of a directory is its own file system's: by names that are known. */
    char path[64];

    for (uint32_t i = 0; i < 10; i++) {
        struct stat st;

        snprintf(path, sizeof(path), "%s/n%u", dir, i);
        if (lstat(path, &st) == 0)
            say_state(path, NULL);
    }
}

void tree_run(uint32_t steps)
{
    umask(022);
    mkdir("tree", 0777);
    if (chdir("tree"))
        exit(2);
    chmod(".", 0777);
    for (uint32_t i = 1; i < 6; i++) {
        mkdir(dirs[i], 0777);
        chmod(dirs[i], 0777);
    }
    for (uint32_t i = 0; i < OPEN_FILES; i++)
        files[i] = -1;
    for (uint32_t i = 0; i < steps; i++)
        step(i);
    for (uint32_t i = 0; i < 6; i++) {
        say_state(dirs[i], NULL);
        say_tree(dirs[i]);
    }
    for (uint32_t i = 0; i < OPEN_FILES; i++)
        if (files[i] >= 0)
            close(files[i]);
    if (chdir(".."))
        exit(2);
    remove_all("tree");
    rmdir("tree");
}
