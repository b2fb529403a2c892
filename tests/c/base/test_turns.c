/* Guests that share a queue take turns; and so they do for the threads of a pool and of a host directory. */
#include <pthread.h>
#include <stdatomic.h>

#include "base/pool.h"
#include "base/turns.h"
#include "check.h"
#include "vnd.h"

static struct turns queue;
static struct turn_item items[8];

static void push(const char *guests)
{
    for (uint32_t i = 0; guests[i]; i++)
        turns_push(&queue, &items[i], (uintptr_t)guests[i]);
}

static void check_order(const char *guests, bool (*may)(void *ctx, uintptr_t who))
{
    struct turn_item *item;
    char got[9] = "";

    for (int n = 0; (item = turns_pop(&queue, may, NULL)) != NULL; n++)
        got[n] = (char)item->who;
    if (strcmp(got, guests) != 0)
        fprintf(stderr, "%s, not %s\n", got, guests);
    CHECK(strcmp(got, guests) == 0);
}

TEST(one_of_each_guest_in_turn)
{
    push("aaaabbc");
    check_order("abcabaa", NULL);
    CHECK(turns_empty(&queue));
    push("ba");
    check_order("ba", NULL);
}

TEST(items_of_a_guest_keep_their_order)
{
    push("aba");
    CHECK(turns_pop(&queue, NULL, NULL) == &items[0]);
    CHECK(turns_pop(&queue, NULL, NULL) == &items[1]);
    turns_push(&queue, &items[3], 'a');
    CHECK(turns_pop(&queue, NULL, NULL) == &items[2]);
    CHECK(turns_pop(&queue, NULL, NULL) == &items[3]);
    CHECK(turns_pop(&queue, NULL, NULL) == NULL);
}

static bool is_not_a(void *ctx, uintptr_t who)
{
    return who != 'a';
}

TEST(a_guest_that_may_not_is_passed_over)
{
    push("aabcb");
    check_order("bcb", is_not_a);
    check_order("aa", NULL);
    push("ab"); /* the last guest is taken from behind one that stays */
    check_order("b", is_not_a);
    turns_push(&queue, &items[2], 'c');
    check_order("ac", NULL);
}

/* ---- the engine's pool: a guest may have one thread busy here */
#define FLOOD 6

struct job {
    struct pool_task task; /* first */
    char guest;
};

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int n_begun, n_ran;

static void run_job(struct pool_task *t)
{
    if (((struct job *)t)->guest == 'a') {
        atomic_fetch_add(&n_begun, 1);
        pthread_mutex_lock(&gate);
        pthread_mutex_unlock(&gate);
    }
    atomic_fetch_add(&n_ran, 1);
}

TEST(a_guest_that_floods_the_pool)
{
    vnd_engine_cfg cfg = { .pool_threads = 1 };
    vnd_engine *e = vnd_engine_new(&cfg);
    static struct job jobs[FLOOD + 2];

    pthread_mutex_lock(&gate);
    for (int i = 0; i < FLOOD + 2; i++) {
        jobs[i] = (struct job){ { .run = run_job }, i < FLOOD ? 'a' : 'b' };
        pool_submit(e, &jobs[i].task, (uintptr_t)jobs[i].guest);
    }
    alarm(60); /* where b waits for a */
    CHECK_SOON(atomic_load(&n_ran) >= 2);
    CHECK_EQ(atomic_load(&n_begun), 1);
    pthread_mutex_unlock(&gate);
    vnd_engine_shutdown(e);
    vnd_engine_free(e); /* runs what is queued */
    CHECK_EQ(atomic_load(&n_ran), FLOOD + 2);
}
