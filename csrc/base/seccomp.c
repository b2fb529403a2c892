/* base/seccomp.c -- see seccomp.h. */
#include "base/seccomp.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/engine.h"
#include "base/events.h"
#include "base/thread.h"

#if defined(__x86_64__)
#define MACHINE AUDIT_ARCH_X86_64
#define X32_BIT 0x40000000u /* numbers of the x32 interface are these and above */
#elif defined(__aarch64__)
#define MACHINE AUDIT_ARCH_AARCH64
#else
#error "base/seccomp.c: the system calls of this machine are not known; base/calls.h lists those of x86-64 and aarch64"
#endif

/* Kinds as bits of a line of calls.h. */
#define QUEUE (1u << VND_THREAD_QUEUE)
#define SHARE (1u << VND_THREAD_SHARE)

enum rule { ANY, AT_DIR, NO_EXEC, THREAD, OWN, SELF, NAMING, OWN_FS, TIGHTEN, NOSYS };

static const struct call {
    const char *name;
    int number;
    uint8_t kinds, rule;
} calls[] = {
#define CALL(kinds, name, rule, why) { #name, __NR_##name, kinds, rule },
#include "base/calls.h"
#undef CALL
};

#define N_CALLS (sizeof(calls) / sizeof(calls[0]))

/* What clone may be asked for: the C library's flags of a thread, and nothing of a namespace. */
#define CLONE_MUST (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD)
#define CLONE_SPACES \
    (CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET)

/* The lower half of an argument; both machines are little-endian. */
#define ARGUMENT(n) ((uint32_t)offsetof(struct seccomp_data, args) + 8u * (n))

/* A program being written. */
struct program {
    struct sock_filter *at;
    uint32_t n;
    uint32_t refusal;
};

static void add(struct program *p, uint16_t code, uint32_t k, uint8_t jt, uint8_t jf)
{
    if (p->n < SECCOMP_PROGRAM_MAX)
        p->at[p->n] = (struct sock_filter){ code, jt, jf, k };
    p->n++;
}

static void load(struct program *p, uint32_t offset)
{
    add(p, BPF_LD | BPF_W | BPF_ABS, offset, 0, 0);
}

static void give(struct program *p, uint32_t answer)
{
    add(p, BPF_RET | BPF_K, answer, 0, 0);
}

/* Allows the call if argument n, masked, is value (or, unless: is not), and refuses it else. */
static void judge(struct program *p, uint32_t n, uint32_t mask, uint32_t value, bool unless)
{
    load(p, ARGUMENT(n));
    if (mask != UINT32_MAX)
        add(p, BPF_ALU | BPF_AND | BPF_K, mask, 0, 0);
    add(p, BPF_JMP | BPF_JEQ | BPF_K, value, unless, !unless);
    give(p, SECCOMP_RET_ALLOW);
    give(p, p->refusal);
}

static void add_rule(struct program *p, enum rule rule, uint32_t pid)
{
    switch (rule) {
    case ANY: give(p, SECCOMP_RET_ALLOW); break;
    case AT_DIR: judge(p, 0, UINT32_MAX, (uint32_t)AT_FDCWD, true); break;
    case NO_EXEC: judge(p, 2, PROT_EXEC, 0, false); break;
    case THREAD: judge(p, 0, CLONE_MUST | CLONE_SPACES, CLONE_MUST, false); break;
    case OWN: judge(p, 0, UINT32_MAX, pid, false); break;
    case SELF: judge(p, 0, UINT32_MAX, 0, false); break;
    case NAMING:
        load(p, ARGUMENT(0));
        add(p, BPF_JMP | BPF_JEQ | BPF_K, PR_SET_NAME, 2, 0);
        add(p, BPF_JMP | BPF_JEQ | BPF_K, PR_GET_NAME, 1, 0);
        add(p, BPF_JMP | BPF_JEQ | BPF_K, PR_SET_NO_NEW_PRIVS, 0, 1);
        give(p, SECCOMP_RET_ALLOW);
        give(p, p->refusal);
        break;
    case OWN_FS: judge(p, 0, UINT32_MAX, CLONE_FS, false); break;
    case TIGHTEN: judge(p, 1, UINT32_MAX, 0, false); break;
    case NOSYS: give(p, SECCOMP_RET_ERRNO | ENOSYS); break;
    }
}

static uint32_t refusal_of(enum vnd_seccomp mode)
{
    switch (mode) {
    case VND_SECCOMP_LOG: return SECCOMP_RET_LOG;
    case VND_SECCOMP_TRAP: return SECCOMP_RET_TRAP;
    case VND_SECCOMP_NONE: return SECCOMP_RET_ALLOW;
    default: return SECCOMP_RET_KILL_PROCESS;
    }
}

int seccomp_program(enum vnd_seccomp mode, enum vnd_thread_kind kind, uint32_t pid,
                    struct sock_filter out[SECCOMP_PROGRAM_MAX])
{
    struct program p = { out, 0, refusal_of(mode) };

    load(&p, offsetof(struct seccomp_data, arch));
    add(&p, BPF_JMP | BPF_JEQ | BPF_K, MACHINE, 1, 0);
    give(&p, SECCOMP_RET_KILL_PROCESS); /* numbers of another machine mean other calls */
    load(&p, offsetof(struct seccomp_data, nr));
#ifdef X32_BIT
    add(&p, BPF_JMP | BPF_JGE | BPF_K, X32_BIT, 0, 1);
    give(&p, SECCOMP_RET_KILL_PROCESS);
#endif
    /* The kernel remembers which calls are always allowed, so the order of the list costs nothing. */
    for (size_t i = 0; i < N_CALLS; i++) {
        uint32_t skip;

        if (!(calls[i].kinds & 1u << kind))
            continue;
        skip = p.n;
        add(&p, BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)calls[i].number, 0, 0);
        add_rule(&p, calls[i].rule, pid);
        if (skip < SECCOMP_PROGRAM_MAX)
            out[skip].jf = (uint8_t)(p.n - skip - 1);
    }
    give(&p, p.refusal);
    return p.n <= SECCOMP_PROGRAM_MAX ? (int)p.n : -E2BIG;
}

const char *seccomp_call_name(int number)
{
    static const struct {
        const char *name;
        int number;
    } others[] = {
        { "socket", __NR_socket },
        { "connect", __NR_connect },
        { "execve", __NR_execve },
        { "execveat", __NR_execveat },
        { "ptrace", __NR_ptrace },
        { "mount", __NR_mount },
        { "umount2", __NR_umount2 },
        { "kill", __NR_kill },
        { "openat2", __NR_openat2 },
        { "bpf", __NR_bpf },
        { "io_uring_setup", __NR_io_uring_setup },
#ifdef __NR_open
        { "open", __NR_open },
        { "stat", __NR_stat },
        { "fork", __NR_fork },
#endif
    };

    for (size_t i = 0; i < N_CALLS; i++)
        if (calls[i].number == number)
            return calls[i].name;
    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++)
        if (others[i].number == number)
            return others[i].name;
    return NULL;
}

/* ---- mode trap: a line for the reader of standard error. Async-signal-safe: no stdio. */

#define TRAPPED (128 + SIGSYS) /* exit status, as a shell tells a death by this signal */

static size_t put_text(char *line, size_t at, size_t room, const char *text)
{
    while (*text && at < room)
        line[at++] = *text++;
    return at;
}

static size_t put_number(char *line, size_t at, size_t room, unsigned int number)
{
    char digits[12];
    int n = 0;

    do {
        digits[n++] = (char)('0' + number % 10);
        number /= 10;
    } while (number);
    while (n && at < room)
        line[at++] = digits[--n];
    return at;
}

static void say_and_end(int sig, siginfo_t *info, void *context)
{
    const char *name = seccomp_call_name(info->si_syscall);
    char line[160], thread[16] = "?";
    size_t at = 0;

    prctl(PR_GET_NAME, thread, 0, 0, 0);
    at = put_text(line, at, sizeof(line), "virtiofsd-nydus: thread ");
    at = put_text(line, at, sizeof(line), thread);
    at = put_text(line, at, sizeof(line), " made system call ");
    at = put_number(line, at, sizeof(line), (unsigned int)info->si_syscall);
    if (name) {
        at = put_text(line, at, sizeof(line), " (");
        at = put_text(line, at, sizeof(line), name);
        at = put_text(line, at, sizeof(line), ")");
    }
    at = put_text(line, at, sizeof(line), ", which its seccomp filter does not allow: the process ends\n");
    if (write(STDERR_FILENO, line, at) < 0)
        _exit(TRAPPED + 1);
    _exit(TRAPPED); /* abort() would lead through handlers of others, which may call what is not allowed */
}

static void install_handler(void)
{
    struct sigaction sa = { .sa_sigaction = say_and_end, .sa_flags = SA_SIGINFO | SA_NODEFER };

    sigemptyset(&sa.sa_mask);
    sigaction(SIGSYS, &sa, NULL);
}

int seccomp_confine(enum vnd_seccomp mode, enum vnd_thread_kind kind)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct sock_filter filter[SECCOMP_PROGRAM_MAX];
    struct sock_fprog program = { .filter = filter };
    sigset_t set;
    int n;

    if (mode == VND_SECCOMP_NONE)
        return 0;
    if (mode == VND_SECCOMP_TRAP) {
        pthread_once(&once, install_handler);
        sigemptyset(&set);
        sigaddset(&set, SIGSYS);
        pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    }
    n = seccomp_program(mode, kind, (uint32_t)getpid(), filter);
    if (n < 0)
        return n;
    program.len = (unsigned short)n;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || syscall(__NR_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program))
        return -errno;
    return 0;
}

/* The C library opens files by name at moments of its own: when a thread other than the first gives memory back to the
 * kernel for the first time, malloc reads the kernel's policy. It remembers that, so it is brought about here. The pieces
 * are small enough for a heap and in all more than malloc keeps. */
static void *give_memory_back(void *arg)
{
    enum { PIECES = 400, PIECE_BYTES = 100 << 10 };
    void **piece = calloc(PIECES, sizeof(*piece));

    for (int i = 0; piece && i < PIECES; i++)
        piece[i] = malloc(PIECE_BYTES);
    for (int i = PIECES - 1; piece && i >= 0; i--)
        free(piece[i]);
    free(piece);
    return NULL;
}

int seccomp_prepare(enum vnd_seccomp mode)
{
    pthread_t t;
    int rc;

    if (mode == VND_SECCOMP_NONE)
        return 0;
    rc = thread_start(&t, "vnd-warm", give_memory_back, NULL);
    if (!rc)
        pthread_join(t, NULL);
    return rc;
}

void engine_confine(struct vnd_engine *e, enum vnd_thread_kind kind)
{
    int rc = seccomp_confine((enum vnd_seccomp)e->cfg.seccomp, kind);

    if (rc)
        engine_say(e, VND_LEVEL_ERROR, VND_CAUSE_IO, "a thread has no seccomp filter: %s", strerror(-rc));
}

int vnd_seccomp_confine(int mode, int kind)
{
    if (mode < VND_SECCOMP_NONE || mode > VND_SECCOMP_KILL || kind < VND_THREAD_QUEUE || kind > VND_THREAD_SHARE)
        return -EINVAL;
    return seccomp_confine((enum vnd_seccomp)mode, (enum vnd_thread_kind)kind);
}
