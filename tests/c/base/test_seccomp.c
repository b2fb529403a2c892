/* What threads may no longer do once they are confined, and that they can still do their work. */
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "base/seccomp.h"
#include "check.h"

static int dir_fd, event_fd;

static void open_by_name(void)
{
    syscall(__NR_openat, AT_FDCWD, "/etc/passwd", O_RDONLY);
}
static void open_below(void)
{
    int fd = openat(dir_fd, "passwd", O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        _exit(3);
    close(fd);
}
static void make_socket(void)
{
    socket(AF_UNIX, SOCK_STREAM, 0);
}
static void run_program(void)
{
    char *none[] = { NULL };

    execve("/bin/true", none, none);
}
static void trace_parent(void)
{
    ptrace(PTRACE_ATTACH, getppid(), NULL, NULL);
}
static void mount_over(void)
{
    mount("none", "/nowhere", "tmpfs", 0, NULL);
}
static void make_process(void)
{
    syscall(__NR_clone, SIGCHLD, 0, 0, 0, 0);
}
static void leave_namespace(void)
{
    unshare(CLONE_NEWNS);
}
static void kill_parent(void)
{
    kill(getppid(), SIGTERM);
}
static void map_code(void)
{
    mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}
static void protect_code(void)
{
    void *page = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    mprotect(page, 4096, PROT_READ | PROT_EXEC);
}
static void read_names(void)
{
    syscall(__NR_openat2, AT_FDCWD, "/etc", NULL, 0);
}
static void own_umask(void)
{
    if (unshare(CLONE_FS))
        _exit(3);
    umask(022);
}
static void wake_and_allocate(void)
{
    uint64_t one = 1;
    void *big = malloc(8 << 20);

    if (!big || write(event_fd, &one, sizeof(one)) != sizeof(one) || read(event_fd, &one, sizeof(one)) != sizeof(one))
        _exit(3);
    memset(big, 1, 8 << 20);
    free(big);
}
static void give_memory_back(void)
{
    void *piece[64];

    for (int i = 0; i < 64; i++)
        piece[i] = malloc(100 << 10);
    for (int i = 63; i >= 0; i--)
        free(piece[i]);
}
static void *nothing(void *arg)
{
    return prctl(PR_SET_NAME, "more", 0, 0, 0) ? arg : NULL;
}
static void start_thread(void)
{
    pthread_t t;
    int here;
    void *failed;

    if (pthread_create(&t, NULL, nothing, &here) || pthread_join(t, &failed) || failed)
        _exit(3);
}

static void *confined_again(void *arg)
{
    return seccomp_confine(VND_SECCOMP_KILL, VND_THREAD_SHARE) ? arg : NULL;
}
static void start_confined_thread(void)
{
    pthread_t t;
    int here;
    void *failed;

    if (pthread_create(&t, NULL, confined_again, &here) || pthread_join(t, &failed) || failed)
        _exit(3);
}

#define QUEUE_BIT (1u << VND_THREAD_QUEUE)
#define SHARE_BIT (1u << VND_THREAD_SHARE)
#define ALL_KINDS (QUEUE_BIT | SHARE_BIT)

static const struct act {
    const char *name;
    void (*act)(void);
    uint32_t allowed; /* the kinds that may */
} acts[] = {
    { "open by an absolute name", open_by_name, 0 },
    { "open below a directory", open_below, SHARE_BIT },
    { "socket", make_socket, 0 },
    { "exec", run_program, 0 },
    { "ptrace", trace_parent, 0 },
    { "mount", mount_over, 0 },
    { "a process", make_process, 0 },
    { "a mount namespace", leave_namespace, 0 },
    { "kill", kill_parent, 0 },
    { "map code", map_code, 0 },
    { "make memory code", protect_code, 0 },
    { "openat2", read_names, 0 },
    { "a umask of its own", own_umask, SHARE_BIT },
    { "wake and allocate", wake_and_allocate, ALL_KINDS },
    { "give memory back", give_memory_back, ALL_KINDS },
    { "a thread with a filter of its own", start_confined_thread, SHARE_BIT },
    { "a thread", start_thread, SHARE_BIT },
};

struct attempt {
    enum vnd_seccomp mode;
    enum vnd_thread_kind kind;
    void (*act)(void);
};

static void *attempt_main(void *arg)
{
    const struct attempt *a = arg;

    if (seccomp_confine(a->mode, a->kind))
        _exit(2);
    a->act();
    return NULL;
}

/* A process with a thread that tries; its wait status. err: where its standard error goes, -1: where ours does. */
static int
try
    (struct attempt a, int err)
    {
        struct rlimit no_core = { 0, 0 };
        int status;
        pid_t child = fork();

        if (!child) {
            pthread_t t;

            setrlimit(RLIMIT_CORE, &no_core);
            if (err >= 0)
                dup2(err, STDERR_FILENO);
            pthread_create(&t, NULL, attempt_main, &a);
            pthread_join(t, NULL);
            _exit(0);
        }
        CHECK(child > 0 && waitpid(child, &status, 0) == child);
        return status;
    }

BEFORE_EACH
{
    dir_fd = open("/etc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    event_fd = eventfd(0, EFD_CLOEXEC);
    CHECK(seccomp_prepare(VND_SECCOMP_KILL) == 0);
    CHECK(dir_fd >= 0 && event_fd >= 0);
}

TEST(a_confined_thread_dies_of_what_it_must_not_do_and_lives_by_what_it_may)
{
    for (int kind = VND_THREAD_QUEUE; kind <= VND_THREAD_SHARE; kind++)
        for (size_t i = 0; i < sizeof(acts) / sizeof(acts[0]); i++) {
            int status =
            try
                ((struct attempt){ VND_SECCOMP_KILL, kind, acts[i].act }, -1);
            bool lived = WIFEXITED(status) && WEXITSTATUS(status) == 0;
            bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS;

            if ((acts[i].allowed & 1u << kind) ? !lived : !killed)
                fprintf(stderr, "kind %d, %s: status %#x\n", kind, acts[i].name, status);
            CHECK((acts[i].allowed & 1u << kind) ? lived : killed);
        }
}

#ifndef __SANITIZE_THREAD__ /* it runs handlers later, when the thread makes its next call */
TEST(a_trapped_call_is_named_in_one_line)
{
    char line[256];
    int ends[2], status;
    ssize_t n;

    CHECK(pipe(ends) == 0);
    status =
    try
        ((struct attempt){ VND_SECCOMP_TRAP, VND_THREAD_QUEUE, make_socket }, ends[1]);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 128 + SIGSYS);
    close(ends[1]);
    n = read(ends[0], line, sizeof(line) - 1);
    CHECK(n > 0);
    line[n] = 0;
    CHECK(strstr(line, " made system call "));
    CHECK(strstr(line, " (socket), which its seccomp filter does not allow: the process ends\n"));
    CHECK(strchr(line, '\n') == line + n - 1);
}
#endif

TEST(modes_log_and_none_end_no_thread)
{
    CHECK_EQ(try ((struct attempt){ VND_SECCOMP_LOG, VND_THREAD_QUEUE, make_socket }, -1), 0);
    CHECK_EQ(try ((struct attempt){ VND_SECCOMP_NONE, VND_THREAD_QUEUE, open_by_name }, -1), 0);
}

/* The program as the kernel would run it, for calls that cannot be made here. */
static uint32_t answer(const struct sock_filter *code, int n, const struct seccomp_data *d)
{
    uint32_t a = 0;

    for (int i = 0; i < n; i++) {
        const struct sock_filter *f = &code[i];

        switch (f->code) {
        case BPF_LD | BPF_W | BPF_ABS: memcpy(&a, (const uint8_t *)d + f->k, sizeof(a)); break;
        case BPF_ALU | BPF_AND | BPF_K: a &= f->k; break;
        case BPF_JMP | BPF_JEQ | BPF_K: i += a == f->k ? f->jt : f->jf; break;
        case BPF_JMP | BPF_JGE | BPF_K: i += a >= f->k ? f->jt : f->jf; break;
        default: CHECK_EQ(f->code, BPF_RET | BPF_K); return f->k;
        }
    }
    CHECK(!"the program ends without an answer");
    return 0;
}

TEST(calls_of_another_machine_are_refused_in_every_mode)
{
    struct sock_filter code[SECCOMP_PROGRAM_MAX];
    struct seccomp_data foreign = { .nr = __NR_read, .arch = AUDIT_ARCH_I386 };
    struct seccomp_data own = { .nr = __NR_read };
#if defined(__x86_64__)
    struct seccomp_data x32 = { .nr = 0x40000000, .arch = AUDIT_ARCH_X86_64 };

    own.arch = AUDIT_ARCH_X86_64;
#else
    own.arch = AUDIT_ARCH_AARCH64;
#endif
    for (int kind = VND_THREAD_QUEUE; kind <= VND_THREAD_SHARE; kind++)
        for (int mode = VND_SECCOMP_LOG; mode <= VND_SECCOMP_KILL; mode++) {
            int n = seccomp_program(mode, kind, 1, code);

            CHECK(n > 0 && n <= SECCOMP_PROGRAM_MAX);
            CHECK_EQ(answer(code, n, &foreign), SECCOMP_RET_KILL_PROCESS);
            CHECK_EQ(answer(code, n, &own), SECCOMP_RET_ALLOW);
#if defined(__x86_64__)
            CHECK_EQ(answer(code, n, &x32), SECCOMP_RET_KILL_PROCESS);
#endif
        }
}
