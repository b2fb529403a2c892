/* base/turns.c -- see base/turns.h. */
#include "base/turns.h"

static void append_first(struct turns *t, struct turn_item *first)
{
    first->next_first = NULL;
    *(t->last ? &t->last->next_first : &t->first) = first;
    t->last = first;
}

void turns_push(struct turns *t, struct turn_item *item, uintptr_t who)
{
    item->who = who;
    item->next = NULL;
    for (struct turn_item *first = t->first; first; first = first->next_first)
        if (first->who == who) {
            first->last->next = item;
            first->last = item;
            return;
        }
    item->last = item;
    append_first(t, item);
}

struct turn_item *turns_pop(struct turns *t, bool (*may)(void *ctx, uintptr_t who), void *ctx)
{
    struct turn_item *before = NULL, *item;

    for (item = t->first; item && may && !may(ctx, item->who); item = item->next_first)
        before = item;
    if (!item)
        return NULL;
    *(before ? &before->next_first : &t->first) = item->next_first;
    if (t->last == item)
        t->last = before;
    if (item->next) { /* the guest's next item waits for the next turn */
        item->next->last = item->last;
        append_first(t, item->next);
    }
    return item;
}
