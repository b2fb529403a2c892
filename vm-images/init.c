/* init.c: the whole user space of the test guest. It loads the modules, opens the control port (virtio-serial) and does
 * what the host asks there: mount the image, run commands in it and hand back their output and status, end the machine.
 *
 * Frames, little endian, both ways: u32 payload length, u16 type, u16 job, payload. virtiofsd_nydus/vmm/guest.py
 * holds the other end and the same numbers. The host is trusted (it runs us); lengths are checked all the same, so
 * that a bug there shows as an error line and not as a dead guest. Each start of the guest says the 16 bytes of
 * `magic` first: after a reset the host finds the first frame by them. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PROTOCOL = 1, MAX_JOBS = 16, MAX_FRAME_BYTES = 256 * 1024, MAX_WORDS = 4096, DEBUG_EXIT_PORT = 0x501 };
enum frame_type {
    REQ_MOUNT = 1,   /* u32 flags, tag\0 */
    REQ_EXEC = 2,    /* u32 flags, u32 argc, u32 envc, cwd\0, argv strings, env strings */
    REQ_KILL = 3,    /* u32 signal, to the job's process group */
    REQ_EXIT = 4,    /* u32 code: QEMU ends with (code << 1) | 1 */
    REQ_UNMOUNT = 5, /* nothing */
    SAY_HELLO = 16,  /* u32 protocol, u64 now_us, u64 init_us, kernel release */
    SAY_PHASE = 17,  /* u64 now_us, name */
    SAY_STDOUT = 18,
    SAY_STDERR = 19,
    SAY_ENDED = 20, /* u64 start_us, u64 end_us, u32 exit status (128 + signal when killed) */
    SAY_ERROR = 21, /* u32 errno, text */
};
enum { MOUNT_OVERLAY = 1, MOUNT_SPECIAL = 2 };
enum { EXEC_CHROOT = 1 };

struct job {
    pid_t pid; /* 0: slot free */
    uint16_t id;
    int out[2]; /* read ends of stdout and stderr, -1 when at their end */
    uint64_t start_us;
};

struct guest {
    int port;
    int signals;
    uint64_t init_us;
    struct job jobs[MAX_JOBS];
    uint8_t *in; /* MAX_FRAME_BYTES + 8 */
    size_t in_bytes;
};

static uint64_t boot_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

static void put_u64(uint8_t *p, uint64_t v)
{
    memcpy(p, &v, sizeof v);
}

static void put_u32(uint8_t *p, uint32_t v)
{
    memcpy(p, &v, sizeof v);
}

static uint32_t get_u32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Ends QEMU through isa-debug-exit; the cloud kernels have no /dev/port, so it takes a C program. */
static void machine_exit(uint32_t code)
{
    if (ioperm(DEBUG_EXIT_PORT, 1, 1) == 0)
        __asm__ volatile("outb %0, %1" : : "a"((uint8_t)code), "Nd"((uint16_t)DEBUG_EXIT_PORT));
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

static void say(struct guest *g, uint16_t type, uint16_t job, const void *payload, size_t bytes)
{
    uint8_t head[8];
    put_u32(head, (uint32_t)bytes);
    memcpy(head + 4, &type, 2);
    memcpy(head + 6, &job, 2);
    struct iovec iov[2] = { { head, sizeof head }, { (void *)payload, bytes } };
    int i = 0;
    while (i < 2) {
        ssize_t n = writev(g->port, iov + i, 2 - i);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            machine_exit(3); /* the host has closed the channel */
        while (i < 2 && (size_t)n >= iov[i].iov_len)
            n -= (ssize_t)iov[i++].iov_len;
        if (i < 2) {
            iov[i].iov_base = (uint8_t *)iov[i].iov_base + n;
            iov[i].iov_len -= (size_t)n;
        }
    }
}

static void say_error(struct guest *g, uint16_t job, int error, const char *what)
{
    uint8_t buf[512];
    put_u32(buf, (uint32_t)error);
    int n = snprintf((char *)buf + 4, sizeof buf - 4, "%s: %s", what, strerror(error));
    say(g, SAY_ERROR, job, buf, 4 + (size_t)(n < (int)sizeof buf - 5 ? n : (int)sizeof buf - 5));
}

static void say_phase(struct guest *g, const char *name)
{
    uint8_t buf[72];
    size_t n = strlen(name);
    put_u64(buf, boot_us());
    memcpy(buf + 8, name, n);
    say(g, SAY_PHASE, 0, buf, 8 + n);
}

static void mount_here(const char *source, const char *target, const char *type, const char *data)
{
    mkdir(target, 0755);
    if (mount(source, target, type, 0, data) && errno != EBUSY)
        fprintf(stderr, "init: mount %s: %s\n", target, strerror(errno));
}

static void load_modules(void)
{
    struct dirent **names;
    int n = scandir("/modules", &names, NULL, alphasort);
    for (int i = 0; i < n; i++) {
        char path[300];
        if (names[i]->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "/modules/%s", names[i]->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
            fprintf(stderr, "init: %s: %s\n", path, strerror(errno));
        if (fd >= 0)
            close(fd);
    }
}

static int open_port(void)
{
    /* The port appears a moment after its driver, from a work queue; no event tells of it before udev's time. */
    struct timespec pause_1ms = { 0, 1000000 };
    for (int i = 0; i < 5000; i++) {
        /* vportNp1: N counts all virtio devices, in the order of their slots */
        for (int number = 0; number < 8; number++) {
            char path[32];
            snprintf(path, sizeof path, "/dev/vport%dp1", number);
            int fd = open(path, O_RDWR | O_CLOEXEC);
            if (fd >= 0)
                return fd;
        }
        nanosleep(&pause_1ms, NULL);
    }
    return -1;
}

static void raise_loopback(void)
{
    struct ifreq r = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd >= 0) {
        ioctl(fd, SIOCSIFFLAGS, &r);
        close(fd);
    }
}

/* proc, sys, dev and what programs expect in /dev. Their directories come from the image or, on an overlay, are
 * made. */
static void mount_special(void)
{
    mount_here("proc", "/newroot/proc", "proc", NULL);
    mount_here("sysfs", "/newroot/sys", "sysfs", NULL);
    mount_here("dev", "/newroot/dev", "devtmpfs", NULL);
    mount_here("devpts", "/newroot/dev/pts", "devpts", "ptmxmode=0666");
    mount_here("shm", "/newroot/dev/shm", "tmpfs", "mode=1777");
    symlink("/proc/self/fd", "/newroot/dev/fd");
    symlink("/proc/self/fd/0", "/newroot/dev/stdin");
    symlink("/proc/self/fd/1", "/newroot/dev/stdout");
    symlink("/proc/self/fd/2", "/newroot/dev/stderr");
}

static void unmount_root(void)
{
    static const char *const points[] = { "/newroot/dev/shm", "/newroot/dev/pts", "/newroot/dev", "/newroot/sys",
                                          "/newroot/proc",    "/newroot",         "/rw",          "/lower" };
    for (size_t i = 0; i < sizeof points / sizeof *points; i++)
        umount2(points[i], 0);
}

static void mount_root(struct guest *g, const uint8_t *p, size_t bytes)
{
    if (bytes < 6 || p[bytes - 1]) {
        say_error(g, 0, EINVAL, "mount request");
        return;
    }
    uint32_t flags = get_u32(p);
    const char *tag = (const char *)p + 4;
    const char *lower = flags & MOUNT_OVERLAY ? "/lower" : "/newroot";
    if (mount(tag, lower, "virtiofs", MS_RDONLY, NULL)) {
        say_error(g, 0, errno, "mount virtiofs");
        return;
    }
    if (flags & MOUNT_OVERLAY) {
        struct stat st;
        mount_here("rw", "/rw", "tmpfs", "mode=0755,size=75%");
        mkdir("/rw/up", 0755);
        mkdir("/rw/work", 0755);
        if (stat("/lower", &st)) {
            say_error(g, 0, errno, "stat of the image's root");
            return;
        }
        /* The merged root shows the upper directory's attributes: make them the image's. */
        chown("/rw/up", st.st_uid, st.st_gid);
        chmod("/rw/up", st.st_mode & 07777);
        if (mount("overlay", "/newroot", "overlay", 0, "lowerdir=/lower,upperdir=/rw/up,workdir=/rw/work")) {
            say_error(g, 0, errno, "mount overlay");
            return;
        }
    }
    if (flags & MOUNT_SPECIAL)
        mount_special();
    say_phase(g, "root");
}

/* The next NUL-terminated string, or NULL when the frame ends before the NUL. */
static char *next_string(uint8_t **p, uint8_t *end)
{
    char *s = (char *)*p;
    uint8_t *nul = memchr(*p, 0, (size_t)(end - *p));
    if (!nul)
        return NULL;
    *p = nul + 1;
    return s;
}

static void child_exec(uint32_t flags, const char *cwd, char **argv, char **env, int out, int err)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    int null = open("/dev/null", O_RDONLY);
    dup2(null, 0);
    dup2(out, 1);
    dup2(err, 2);
    if ((flags & EXEC_CHROOT) && chroot("/newroot")) {
        fprintf(stderr, "init: chroot: %s\n", strerror(errno));
        _exit(126);
    }
    if (chdir(cwd)) {
        fprintf(stderr, "init: chdir %s: %s\n", cwd, strerror(errno));
        _exit(126);
    }
    environ = env;
    execvp(argv[0], argv);
    int error = errno;
    fprintf(stderr, "%s: %s\n", argv[0], strerror(error));
    _exit(error == ENOENT ? 127 : 126); /* as shells do */
}

static void start_job(struct guest *g, uint16_t id, uint8_t *p, size_t bytes)
{
    static char *words[MAX_WORDS + 2];
    struct job *j = NULL;
    for (int i = 0; i < MAX_JOBS; i++)
        if (!g->jobs[i].pid)
            j = &g->jobs[i];
    uint8_t *end = p + bytes;
    uint32_t flags = 0, argc = 0, envc = 0;
    if (bytes >= 12)
        flags = get_u32(p), argc = get_u32(p + 4), envc = get_u32(p + 8);
    if (!j || argc < 1 || argc > MAX_WORDS || envc > MAX_WORDS - argc) {
        say_error(g, id, j ? EINVAL : EAGAIN, "exec request");
        return;
    }
    p += 12;
    const char *cwd = next_string(&p, end);
    char **argv = words, **env = words + argc + 1;
    for (uint32_t i = 0; cwd && i < argc + envc; i++) {
        char *s = next_string(&p, end);
        if (!s)
            cwd = NULL;
        words[i < argc ? i : i + 1] = s;
    }
    words[argc] = words[argc + 1 + envc] = NULL;
    int out[2] = { -1, -1 }, err[2] = { -1, -1 };
    if (!cwd || pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC)) {
        say_error(g, id, cwd ? errno : EINVAL, "exec request");
        return;
    }
    uint64_t start_us = boot_us();
    pid_t pid = fork();
    if (pid == 0)
        child_exec(flags, cwd, argv, env, out[1], err[1]);
    int error = errno;
    close(out[1]);
    close(err[1]);
    if (pid < 0) {
        close(out[0]);
        close(err[0]);
        say_error(g, id, error, "fork");
        return;
    }
    fcntl(out[0], F_SETFL, O_NONBLOCK);
    fcntl(err[0], F_SETFL, O_NONBLOCK);
    *j = (struct job){ .pid = pid, .id = id, .out = { out[0], err[0] }, .start_us = start_us };
}

/* Sends what a job's stream holds now; closes it at its end. */
static void drain_stream(struct guest *g, struct job *j, int which)
{
    static uint8_t buf[32 * 1024];
    while (j->out[which] >= 0) {
        ssize_t n = read(j->out[which], buf, sizeof buf);
        if (n > 0) {
            say(g, which ? SAY_STDERR : SAY_STDOUT, j->id, buf, (size_t)n);
        } else if (n < 0 && errno == EINTR) {
            continue;
        } else if (n < 0 && errno == EAGAIN) {
            return;
        } else {
            close(j->out[which]);
            j->out[which] = -1;
        }
    }
}

static void reap(struct guest *g)
{
    struct signalfd_siginfo info;
    while (read(g->signals, &info, sizeof info) == sizeof info)
        ;
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        for (int i = 0; i < MAX_JOBS; i++) {
            struct job *j = &g->jobs[i];
            if (j->pid != pid)
                continue;
            /* A grandchild may hold the pipes for ever: take what is there, then say that the command has ended. */
            uint8_t buf[20];
            put_u64(buf, j->start_us);
            put_u64(buf + 8, boot_us());
            put_u32(buf + 16, (uint32_t)(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status)));
            for (int k = 0; k < 2; k++) {
                drain_stream(g, j, k);
                if (j->out[k] >= 0)
                    close(j->out[k]);
            }
            say(g, SAY_ENDED, j->id, buf, sizeof buf);
            j->pid = 0;
        }
    }
}

static void handle_frame(struct guest *g, uint16_t type, uint16_t id, uint8_t *p, size_t bytes)
{
    switch (type) {
    case REQ_MOUNT: mount_root(g, p, bytes); break;
    case REQ_EXEC: start_job(g, id, p, bytes); break;
    case REQ_KILL:
        for (int i = 0; bytes >= 4 && i < MAX_JOBS; i++)
            if (g->jobs[i].pid && g->jobs[i].id == id)
                kill(-g->jobs[i].pid, (int)get_u32(p));
        break;
    case REQ_UNMOUNT:
        unmount_root();
        say_phase(g, "unmounted");
        break;
    case REQ_EXIT:
        kill(-1, SIGKILL);
        unmount_root();
        machine_exit(bytes >= 4 ? get_u32(p) : 0);
        break;
    default: say_error(g, id, EPROTO, "request of unknown type");
    }
}

static void read_requests(struct guest *g)
{
    ssize_t n = read(g->port, g->in + g->in_bytes, MAX_FRAME_BYTES + 8 - g->in_bytes);
    if (n < 0 && (errno == EINTR || errno == EAGAIN))
        return;
    if (n <= 0)
        machine_exit(3); /* the host has gone: so do we */
    g->in_bytes += (size_t)n;
    size_t done = 0;
    while (g->in_bytes - done >= 8) {
        uint8_t *head = g->in + done;
        uint32_t bytes = get_u32(head);
        uint16_t type, id;
        memcpy(&type, head + 4, 2);
        memcpy(&id, head + 6, 2);
        if (bytes > MAX_FRAME_BYTES)
            machine_exit(4);
        if (g->in_bytes - done - 8 < bytes)
            break;
        handle_frame(g, type, id, head + 8, bytes);
        done += 8 + bytes;
    }
    memmove(g->in, g->in + done, g->in_bytes - done);
    g->in_bytes -= done;
}

static void serve(struct guest *g)
{
    for (;;) {
        struct pollfd fds[2 + 2 * MAX_JOBS] = { { g->port, POLLIN, 0 }, { g->signals, POLLIN, 0 } };
        for (int i = 0; i < MAX_JOBS; i++)
            for (int k = 0; k < 2; k++)
                fds[2 + 2 * i + k] = (struct pollfd){ g->jobs[i].pid ? g->jobs[i].out[k] : -1, POLLIN, 0 };
        if (poll(fds, 2 + 2 * MAX_JOBS, -1) < 0)
            continue;
        for (int i = 0; i < MAX_JOBS; i++)
            for (int k = 0; k < 2; k++)
                if (fds[2 + 2 * i + k].revents)
                    drain_stream(g, &g->jobs[i], k);
        if (fds[1].revents)
            reap(g);
        if (fds[0].revents)
            read_requests(g);
    }
}

int main(void)
{
    static struct guest g;
    g.init_us = boot_us();
    mount_here("dev", "/dev", "devtmpfs", NULL);
    mount_here("proc", "/proc", "proc", NULL);
    mount_here("sysfs", "/sys", "sysfs", NULL);
    load_modules();
    mkdir("/lower", 0755);
    mkdir("/newroot", 0755);
    raise_loopback();
    sethostname("guest", 5);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    g.signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    g.port = open_port();
    g.in = malloc(MAX_FRAME_BYTES + 8);
    if (g.port < 0 || g.signals < 0 || !g.in) {
        fprintf(stderr, "init: no control port\n");
        machine_exit(5);
    }
    struct utsname u;
    uname(&u);
    /* Whatever the last life of this machine left half said on the channel ends here. */
    static const char magic[16] = "\r\nguest hello\r\n";
    if (write(g.port, magic, sizeof magic) != sizeof magic)
        machine_exit(3);
    uint8_t hello[20 + sizeof u.release];
    size_t n = strlen(u.release);
    put_u32(hello, PROTOCOL);
    put_u64(hello + 4, boot_us());
    put_u64(hello + 12, g.init_us);
    memcpy(hello + 20, u.release, n);
    say(&g, SAY_HELLO, 0, hello, 20 + n);
    serve(&g);
}
