/* base/ledger.h -- records in memory that outlives the process: a memfd that a keeper holds and each process maps.
 *
 * Layout: a head of one page, then slots of LEDGER_SLOT_BYTES. A record takes one slot, or a chain of them where its data is
 * longer. Its first slot's kind is written last and cleared first, so a process that dies at any instruction leaves whole
 * records alone; slots that no record leads to are free. A record that is put anew is there twice for a moment: the reader
 * takes either.
 * Threads: any; one lock, taken for moments, under which nothing else is taken. It may be taken under others.
 * Ownership: the caller owns the descriptor. Errors are -errno.
 */
#ifndef VND_LEDGER_H
#define VND_LEDGER_H
#include <stddef.h>
#include <stdint.h>

#define LEDGER_SLOT_BYTES 128u
#define LEDGER_SLOT_DATA 112u /* data of one slot */
#define LEDGER_DATA_MAX 1024u /* of one record */
#define LEDGER_NUMBERS 4      /* of the head, the owner's */

struct ledger;

/* A new, blank one: its descriptor or -errno. */
int ledger_create(void);
/* Maps one. NULL: no memory, or it is none of this layout. */
struct ledger *ledger_open(int fd);
void ledger_close(struct ledger *l); /* NULL is fine */
/* Numbers of the head: 0 in a blank one. */
uint64_t *ledger_numbers(struct ledger *l);
/* Puts a record in place of the one at *at (0: there is none) and sets *at. kind is not 0. -ENOSPC. l NULL: nothing. */
int ledger_put(struct ledger *l, uint32_t *at, uint16_t kind, const void *data, uint32_t len);
/* Takes a record out and clears *at. */
void ledger_drop(struct ledger *l, uint32_t *at);
/* A number in a record's first slot, at a multiple of 8 below LEDGER_SLOT_DATA: it may be written in place. */
uint64_t *ledger_word(struct ledger *l, uint32_t at, uint32_t offset);
/* Gives every record: its place, kind, data. Before any is put. */
void ledger_each(struct ledger *l, void (*take)(void *ctx, uint32_t at, uint16_t kind, const void *data, uint32_t len),
                 void *ctx);

#endif
