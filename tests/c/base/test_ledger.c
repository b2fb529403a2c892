/* Records that outlive their process: put, put anew, dropped, and what is left after a death at any instruction. */
#include "check.h"

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/ledger.h"

#define SEEN_MAX 64

struct seen {
    int n;
    struct {
        uint32_t at, len;
        uint16_t kind;
        uint8_t first, last;
    } all[SEEN_MAX];
};

static void take(void *ctx, uint32_t at, uint16_t kind, const void *data, uint32_t len)
{
    struct seen *s = ctx;
    const uint8_t *bytes = data;

    CHECK(s->n < SEEN_MAX);
    s->all[s->n].at = at;
    s->all[s->n].kind = kind;
    s->all[s->n].len = len;
    s->all[s->n].first = len ? bytes[0] : 0;
    s->all[s->n++].last = len ? bytes[len - 1] : 0;
}

/* What the next process finds. */
static struct seen reopen(int fd)
{
    struct ledger *l = ledger_open(fd);
    struct seen s = { 0 };

    CHECK(l);
    ledger_each(l, take, &s);
    ledger_close(l);
    return s;
}

TEST(records)
{
    static const uint32_t lengths[] = { 0, 1, LEDGER_SLOT_DATA, LEDGER_SLOT_DATA + 1, LEDGER_DATA_MAX };
    int fd = ledger_create();
    struct ledger *l = ledger_open(fd);
    uint8_t data[LEDGER_DATA_MAX + 1];
    uint32_t at[5] = { 0 };
    struct seen s;

    CHECK(fd >= 0 && l);
    ledger_numbers(l)[1] = 77;
    for (int i = 0; i < 5; i++) {
        memset(data, 'a' + i, sizeof(data));
        CHECK(ledger_put(l, &at[i], (uint16_t)(i + 1), data, lengths[i]) == 0 && at[i]);
    }
    CHECK(ledger_put(l, &at[0], 1, data, LEDGER_DATA_MAX + 1) == -EINVAL);
    s = reopen(fd);
    CHECK(s.n == 5);
    for (int i = 0; i < 5; i++)
        for (int k = 0; k < 5; k++)
            if (s.all[k].at == at[i])
                CHECK(s.all[k].kind == i + 1 && s.all[k].len == lengths[i] &&
                      s.all[k].last == (lengths[i] ? 'a' + i : 0));
    ledger_drop(l, &at[4]);
    CHECK(at[4] == 0);
    CHECK(ledger_put(l, &at[3], 9, "z", 1) == 0); /* shorter, in place of a longer one */
    *ledger_word(l, at[1], 0) = 0x58;
    ledger_close(l);
    s = reopen(fd);
    CHECK(s.n == 4);
    for (int k = 0; k < 4; k++)
        CHECK(s.all[k].at != at[1] || s.all[k].first == 0x58);
    l = ledger_open(fd);
    CHECK(ledger_numbers(l)[1] == 77);
    s = (struct seen){ 0 };
    ledger_each(l, take, &s);
    for (int i = 0; i < 2000; i++) { /* what was dropped is used again */
        uint32_t one = 0;

        CHECK(ledger_put(l, &one, 3, data, LEDGER_DATA_MAX) == 0 && one < 64);
        ledger_drop(l, &one);
    }
    ledger_close(l);
    close(fd);
}

/* Bytes of another program, or of a hostile one: nothing is read beyond the memory, and it ends. */
TEST(nonsense)
{
    int fd = ledger_create();
    struct ledger *l = ledger_open(fd);
    uint32_t at = 0;
    uint8_t *raw = mmap(NULL, 1 << 16, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), data[300] = { 1 };

    CHECK(l && raw != MAP_FAILED && ledger_put(l, &at, 1, data, sizeof(data)) == 0);
    ledger_close(l);
    for (uint32_t i = 16; i < 4096 + 8 * LEDGER_SLOT_BYTES; i++) {
        uint8_t old = raw[i];

        for (int bit = 0; bit < 8; bit++) {
            struct seen s = { 0 };

            raw[i] = old ^ (uint8_t)(1 << bit);
            l = ledger_open(fd);
            if (l)
                ledger_each(l, take, &s);
            ledger_close(l);
            CHECK(s.n <= 4);
            raw[i] = old;
            if (i >= 64 && i < 4096)
                break;
        }
    }
    munmap(raw, 1 << 16);
    close(fd);
    CHECK(ledger_open(0) == NULL);
}

/* ---- a process killed at any instruction */

static void live(struct ledger *l, uint32_t *first)
{
    uint8_t data[200];
    uint32_t other = 0;

    memset(data, 'b', sizeof(data));
    ledger_put(l, first, 2, data, sizeof(data)); /* in place of an 'a' */
    ledger_put(l, &other, 3, data, 10);
    ledger_drop(l, &other);
}

/* Steps a child through live; kills it after so many. Steps taken, -1: cannot. */
static long run_and_kill(struct ledger *l, uint32_t first, long steps)
{
    int status = 0;
    long n = 0;
    pid_t child = fork();

    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0)
            _exit(2);
        raise(SIGSTOP);
        live(l, &first);
        raise(SIGSTOP);
        _exit(0);
    }
    if (child < 0 || waitpid(child, &status, 0) != child || !WIFSTOPPED(status))
        return -1;
    while (n < steps) {
        if (ptrace(PTRACE_SINGLESTEP, child, NULL, NULL) != 0 || waitpid(child, &status, 0) != child)
            return -1;
        if (WIFEXITED(status) || WSTOPSIG(status) == SIGSTOP)
            break;
        n++;
    }
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    return n;
}

#ifdef __SANITIZE_THREAD__
#define STRIDE 997 /* each step is many there, and each is a stop of the child */
#else
#define STRIDE 7
#endif

TEST(killed_anywhere)
{
    for (long step = 0;; step += STRIDE) {
        int fd = ledger_create();
        struct ledger *l = ledger_open(fd);
        uint8_t data[200];
        uint32_t at = 0;
        struct seen s;
        long taken;
        bool found = false;

        memset(data, 'a', sizeof(data));
        CHECK(l && ledger_put(l, &at, 1, data, sizeof(data)) == 0);
        taken = run_and_kill(l, at, step);
        if (taken < 0) {
            printf("no ptrace here\n");
            return;
        }
        s = reopen(fd);
        for (int i = 0; i < s.n; i++) { /* whole, of one kind throughout, and one of them at least */
            if (s.all[i].kind == 3)
                continue;
            CHECK(s.all[i].len == sizeof(data) && s.all[i].first == s.all[i].last);
            CHECK(s.all[i].first == (s.all[i].kind == 1 ? 'a' : 'b'));
            found = true;
        }
        CHECK(found && s.n <= 3);
        ledger_close(l);
        close(fd);
        if (taken < step)
            return;
    }
}
