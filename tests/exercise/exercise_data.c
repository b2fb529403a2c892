/* exercise_data.c -- the bytes of two files, as fsx goes about it: written, mapped, cut, punched, copied at random places
 * through descriptors of several kinds, and read back.
 */
#include <linux/falloc.h>
#include <sys/mman.h>
#include <sys/uio.h>

#include "exercise.h"

#define FILE_BYTES 300000u
#define CALL_BYTES 70000u

static uint8_t buf[CALL_BYTES];
static const char *const names[] = { "f0", "f1" };
static int fds[2][3]; /* read-write, append, opened for one call */

static void fill(size_t len)
{
    uint32_t v = chance(1u << 31);

    for (size_t i = 0; i < len; i++)
        buf[i] = (uint8_t)((v >> (i % 4 * 8)) + i / 251);
}

static void open_all(void)
{
    for (int i = 0; i < 2; i++) {
        fds[i][0] = open(names[i], O_RDWR | O_CREAT, 0666);
        fds[i][1] = open(names[i], O_WRONLY | O_APPEND);
        fds[i][2] = open(names[i], O_RDWR | O_DSYNC);
    }
}

static void close_all(void)
{
    for (int i = 0; i < 6; i++)
        close(fds[i / 3][i % 3]);
}

static void say_read(int fd, off_t at, size_t len)
{
    ssize_t n = pread(fd, buf, len, at);

    say(" h%llx", n < 0 ? 0ull : (unsigned long long)hash_bytes(7, buf, (size_t)n));
    say_result(n);
}

/* Changes or reads mapped bytes; what is beyond the file's end is not touched. */
static void use_map(int fd, bool change)
{
    struct stat st;
    size_t page = chance(FILE_BYTES) & ~4095u, len = 1 + chance(20000), from = chance(4096);
    uint8_t *map;

    fstat(fd, &st);
    if ((uint64_t)st.st_size < page + from + len) {
        say(" map beyond = 0\n");
        return;
    }
    map = mmap(NULL, from + len, PROT_READ | (change ? PROT_WRITE : 0), change ? MAP_SHARED : MAP_PRIVATE, fd,
               (off_t)page);
    if (map == MAP_FAILED) {
        say_result(-1);
        return;
    }
    say(" map %zu+%zu+%zu h%llx", page, from, len, (unsigned long long)hash_bytes(7, map + from, len));
    if (change) {
        fill(len);
        memcpy(map + from, buf, len);
        say(" sync %d", msync(map, from + len, MS_SYNC));
    }
    say_result(munmap(map, from + len));
}

static void use_seek(int fd)
{
    int whence = one_in(2) ? SEEK_DATA : SEEK_HOLE;
    off_t at = chance(FILE_BYTES);

    say(" sync %d seek %d %lld", fsync(fd), whence, (long long)at);
    say_result((long)lseek(fd, at, whence));
}

/* The second file never is: where a host puts zeroes into reserved space, and so what is a hole, depends on when it
 * writes back. */
static void use_space(int fd)
{
    static const int kinds[] = { 0, FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE,
                                 FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE };
    int kind = kinds[chance(4)];
    off_t at = chance(FILE_BYTES);
    off_t len = chance(CALL_BYTES);

    say(" fallocate %x %lld %lld", kind, (long long)at, (long long)len);
    say_result(fallocate(fd, kind, at, len));
}

static void use_vector(int fd, off_t at, size_t len)
{
    struct iovec iov[3] = { { buf, len / 3 }, { buf + len / 3, 0 }, { buf + len / 3, len - len / 3 } };

    fill(len);
    say(" pwritev %lld %zu", (long long)at, len);
    say_result(pwritev(fd, iov, 3, at));
}

static void step(uint32_t number)
{
    uint32_t which = chance(2), how = chance(4) ? 0 : chance(3);
    int fd = fds[which][how], other = fds[1 - which][0];
    off_t at = chance(FILE_BYTES), to = chance(FILE_BYTES);
    size_t len = one_in(4) ? 1 + chance(100) : 1 + chance(CALL_BYTES - 1);
    struct stat st;
    int flags;

    say("d%u f%u.%u:", number, which, how);
    switch (chance(19)) {
    case 0:
    case 1:
    case 2:
        fill(len);
        say(" pwrite %lld %zu", (long long)at, len);
        say_result(pwrite(fd, buf, len, at));
        break;
    case 3:
        fill(len);
        say(" write %zu", len);
        say_result(write(fds[which][1], buf, len));
        if (fstat(fd, &st) == 0 && st.st_size > (off_t)(2 * FILE_BYTES))
            ftruncate(fd, 1000);
        break;
    case 4:
    case 5:
    case 6:
        say(" pread %lld %zu", (long long)at, len);
        say_read(fd, at, len);
        break;
    case 7:
        say(" ftruncate %lld", (long long)at);
        say_result(ftruncate(fd, at));
        break;
    case 8:
        say(" truncate %lld", (long long)at);
        say_result(truncate(names[which], at));
        break;
    case 9:
        say(" punch %lld %zu", (long long)at, len);
        say_result(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, (off_t)len));
        break;
    case 10: use_space(fds[0][how]); break;
    case 11:
    case 12: use_map(fds[which][0], one_in(2)); break;
    case 13: use_seek(fds[1][0]); break;
    case 14:
        say(" copy %lld to %lld, %zu", (long long)at, (long long)to, len);
        say_result(copy_file_range(fd, &at, one_in(2) ? other : fd, &to, len, 0));
        break;
    case 15: use_vector(fd, at, len); break;
    case 16:
        flags = (int)chance(3);
        say(" sync %d", flags);
        say_result(flags == 0 ? fsync(fd) : flags == 1 ? fdatasync(fd) : syncfs(fd));
        break;
    case 17:
        close_all();
        flags = one_in(3) ? O_TRUNC : 0;
        say(" reopen %x", flags);
        close(open(names[which], O_WRONLY | flags));
        open_all();
        say_result(0);
        break;
    default:
        flags = one_in(2) ? 04755 : 06711;
        say(" %o, as user:", flags);
        chmod(names[which], (mode_t)flags);
        become(1000);
        fill(10);
        say(" w%zd", pwrite(fds[which][0], buf, 10, at));
        become(0);
        say_result(fstat(fd, &st) ? -1 : (long)st.st_mode);
    }
    if (number % 16 == 0) {
        say_state(names[0], NULL);
        say_state(names[1], NULL);
    }
}

void data_run(uint32_t steps)
{
    umask(0);
    mkdir("data", 0777);
    if (chdir("data"))
        exit(2);
    open_all();
    for (uint32_t i = 0; i < steps; i++)
        step(i);
    close_all();
    say_state(names[0], NULL);
    say_state(names[1], NULL);
    if (chdir(".."))
        exit(2);
    remove_all("data");
    rmdir("data");
}
