/* check.h -- what every C test program stands on: named cases, a main, and checks that say where and what.
 *
 *     TEST(reads_past_the_end_are_short)
 *     {
 *         CHECK_EQ(read_some(...), 100);
 *     }
 *
 * build/c/FOLDER/test_FILE             runs all cases, each in a process of its own: no case sees what another left
 *                                      behind, and one that crashes or hangs ends alone
 * build/c/FOLDER/test_FILE NAME...     runs those whose name holds one of the words. One case alone runs in the program's
 *                                      own process, so that a debugger meets it
 * build/c/FOLDER/test_FILE -l          lists the names; -v says each as it begins
 *
 * A check that does not hold ends its process with status 1, or by abort() where CHECK_ABORT is set. Include this file in
 * one source a program.
 */
#ifndef TESTS_CHECK_H
#define TESTS_CHECK_H
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* A case that is still running then hangs. The slowest takes 6 s alone, under ThreadSanitizer ten times that. */
#define CHECK_CASE_MAX_S 300

struct check_case {
    const char *name;
    void (*run)(void);
    bool on_request; /* runs where its name is given, not with all */
    struct check_case *next;
};

static struct check_case *check_first, **check_last = &check_first;
static void (*check_before)(void), (*check_after)(void);

#define CHECK_CASE(case_name, requested)                                                                         \
    static void test_##case_name(void);                                                                          \
    __attribute__((constructor)) static void check_add_##case_name(void)                                         \
    {                                                                                                            \
        static struct check_case one = { .name = #case_name, .run = test_##case_name, .on_request = requested }; \
        *check_last = &one;                                                                                      \
        check_last = &one.next;                                                                                  \
    }                                                                                                            \
    static void test_##case_name(void)

/* A case: a fact about the code, named for it. */
#define TEST(name) CHECK_CASE(name, false)
/* A measurement: runs only where it is named. */
#define MEASURE(name) CHECK_CASE(name, true)

/* What each case needs: a body that runs before it in its process, and one that runs after it has passed. */
#define BEFORE_EACH                                                 \
    static void check_before_each(void);                            \
    __attribute__((constructor)) static void check_add_before(void) \
    {                                                               \
        check_before = check_before_each;                           \
    }                                                               \
    static void check_before_each(void)
#define AFTER_EACH                                                 \
    static void check_after_each(void);                            \
    __attribute__((constructor)) static void check_add_after(void) \
    {                                                              \
        check_after = check_after_each;                            \
    }                                                              \
    static void check_after_each(void)

/* Ends the process at once: other threads of the case may run, and must not meet exit handlers. */
static _Noreturn inline void check_fail(void)
{
    if (getenv("CHECK_ABORT"))
        abort();
    _exit(1);
}

#define CHECK(cond)                                                                          \
    do {                                                                                     \
        if (!(cond)) {                                                                       \
            fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, __LINE__, __func__, #cond); \
            check_fail();                                                                    \
        }                                                                                    \
    } while (0)
/* Both as signed 64-bit numbers, shown when they differ. */
#define CHECK_EQ(a, b)                                                                                      \
    do {                                                                                                    \
        long long a_ = (long long)(a), b_ = (long long)(b);                                                 \
        if (a_ != b_) {                                                                                     \
            fprintf(stderr, "%s:%d: %s: %s is %lld, not %lld\n", __FILE__, __LINE__, __func__, #a, a_, b_); \
            check_fail();                                                                                   \
        }                                                                                                   \
    } while (0)
/* Both as strings, shown when they differ. */
#define CHECK_STR(a, b)                                                                                         \
    do {                                                                                                        \
        const char *a_ = (a), *b_ = (b);                                                                        \
        if (strcmp(a_, b_) != 0) {                                                                              \
            fprintf(stderr, "%s:%d: %s: %s is \"%s\", not \"%s\"\n", __FILE__, __LINE__, __func__, #a, a_, b_); \
            check_fail();                                                                                       \
        }                                                                                                       \
    } while (0)
/* The string has the part in it; the whole is shown when it does not. */
#define CHECK_HAS(whole, part)                                                                             \
    do {                                                                                                   \
        const char *a_ = (whole), *b_ = (part);                                                            \
        if (!strstr(a_, b_)) {                                                                             \
            fprintf(stderr, "%s:%d: %s: \"%s\" is not in \"%s\"\n", __FILE__, __LINE__, __func__, b_, a_); \
            check_fail();                                                                                  \
        }                                                                                                  \
    } while (0)

/* Waits until the condition holds, which another thread or process brings about: it is looked at every 200 us, and must
 * hold within CHECK_SOON_S. Nothing in a test waits for a time. */
#define CHECK_SOON_S 30
#define CHECK_SOON(cond)                                                                                          \
    do {                                                                                                          \
        time_t until_ = time(NULL) + CHECK_SOON_S;                                                                \
        while (!(cond)) {                                                                                         \
            if (time(NULL) > until_) {                                                                            \
                fprintf(stderr, "%s:%d: %s: not so after %d s: %s\n", __FILE__, __LINE__, __func__, CHECK_SOON_S, \
                        #cond);                                                                                   \
                check_fail();                                                                                     \
            }                                                                                                     \
            usleep(200);                                                                                          \
        }                                                                                                         \
    } while (0)

/* The directory for temporary files: TMPDIR, or /tmp. */
static inline const char *check_tmp(void)
{
    const char *dir = getenv("TMPDIR");

    return dir ? dir : "/tmp";
}

static inline void check_run_case(const struct check_case *c)
{
    if (check_before)
        check_before();
    c->run();
    if (check_after)
        check_after();
}

/* Whether the case passed in a process of its own. */
static inline bool check_fork_case(const struct check_case *c)
{
    int status = 0;
    pid_t pid;

    fflush(NULL);
    pid = fork();
    if (pid == 0) {
        alarm(CHECK_CASE_MAX_S);
        check_run_case(c);
        exit(0);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid) {
        perror("fork");
        return false;
    }
    if (WIFSIGNALED(status))
        fprintf(stderr, "%s: ended by signal %d (%s)\n", c->name, WTERMSIG(status), strsignal(WTERMSIG(status)));
    return status == 0;
}

static inline bool check_wanted(const struct check_case *c, int words, char **word)
{
    if (words == 0)
        return !c->on_request;
    for (int i = 0; i < words; i++)
        if (strstr(c->name, word[i]))
            return true;
    return false;
}

int main(int argc, char **argv)
{
    const char *program = strstr(argv[0], "build/") ? strstr(argv[0], "build/") : argv[0];
    bool list = argc > 1 && !strcmp(argv[1], "-l"), verbose = argc > 1 && !strcmp(argv[1], "-v");
    int words = argc - 1 - (list || verbose), wanted = 0, failed = 0;
    char **word = argv + argc - words;
    const struct check_case *only = NULL;

    for (struct check_case *c = check_first; c; c = c->next) {
        if (list)
            puts(c->name);
        if (!check_wanted(c, words, word))
            continue;
        wanted++;
        only = c;
    }
    if (list)
        return 0;
    if (wanted == 0) {
        fprintf(stderr, "%s: no case has that name; -l lists them\n", program);
        return 1;
    }
    if (wanted == 1) {
        check_run_case(only);
        printf("%s: %s passed\n", program, only->name);
        return 0;
    }
    for (struct check_case *c = check_first; c; c = c->next) {
        if (!check_wanted(c, words, word))
            continue;
        if (verbose)
            printf("%s: %s\n", program, c->name);
        if (check_fork_case(c))
            continue;
        fprintf(stderr, "%s: FAILED: %s\n", program, c->name);
        failed++;
    }
    if (failed == 0)
        printf("%s: %d cases passed\n", program, wanted);
    return failed != 0;
}

#endif
