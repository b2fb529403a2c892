/* fuse/held.c -- what one session holds of file systems that can be written to, which it shares with other guests: counts of
 * nodes that it looked up, and open files. A guest can give back and use what its own session holds, nothing else; what is
 * left goes when the session ends or begins anew. */
#include <errno.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#include "fuse/internal.h"

/* What a node costs in all: here and in its file system. All guests may hold as many as fit into a part of the memory. */
#define NODE_BYTES 512
#define NODES_PART 16
#define NODES_LEAST (8u << 20)
/* Open files of all guests: half of the descriptors, and no more than this. */
#define FILES_MAX (1u << 20)

struct held {
    struct held *next; /* bucket, or a list of those taken out */
    uint64_t id;       /* inode number, or fh */
    uint64_t n;        /* look-ups; 1 of a file */
    uint32_t kept_at;  /* its note in the file system; 0: none */
    uint16_t serial;
    uint8_t kind; /* enum fuse_held_kind */
};

static uint64_t hash_of(enum fuse_held_kind kind, uint16_t serial, uint64_t id)
{
    return (id ^ (uint64_t)serial << 40 ^ (uint64_t)kind << 63) * 0x9e3779b97f4a7c15ull;
}

static struct held_stripe *stripe_of(struct fuse_session *s, uint64_t hash)
{
    return &s->held[hash >> 32 & (FUSE_HELD_STRIPES - 1)];
}

/* With the stripe's lock held: where the entry is linked, or the end of its bucket; NULL: there are no buckets yet. */
static struct held **find(struct held_stripe *t, uint64_t hash, enum fuse_held_kind kind, uint16_t serial, uint64_t id)
{
    struct held **p;

    if (!t->buckets)
        return NULL;
    for (p = &t->buckets[hash >> 40 & (t->n_buckets - 1)]; *p; p = &(*p)->next)
        if ((*p)->id == id && (*p)->serial == serial && (*p)->kind == kind)
            break;
    return p;
}

/* As many buckets as entries, about. Where there is no memory for more the old ones serve on. */
static void grow(struct held_stripe *t)
{
    uint32_t n = t->n_buckets ? t->n_buckets * 2 : 16;
    struct held **more;

    if (t->n < t->n_buckets || !(more = calloc(n, sizeof(*more))))
        return;
    for (uint32_t i = 0; i < t->n_buckets; i++)
        for (struct held *h = t->buckets[i], *next; h; h = next) {
            uint32_t at = hash_of(h->kind, h->serial, h->id) >> 40 & (n - 1);

            next = h->next;
            h->next = more[at];
            more[at] = h;
        }
    free(t->buckets);
    t->buckets = more;
    t->n_buckets = n;
}

static void give(struct held_budget *b)
{
    atomic_fetch_sub_explicit(&b->mine, 1, memory_order_relaxed);
    atomic_fetch_sub_explicit(b->all, 1, memory_order_relaxed);
}

static bool take(struct held_budget *b)
{
    uint64_t mine = atomic_fetch_add_explicit(&b->mine, 1, memory_order_relaxed);

    if (mine + atomic_fetch_add_explicit(b->all, 1, memory_order_relaxed) < b->all_max)
        return true;
    give(b);
    return false;
}

/* Notes it where it outlives the process. The caller is in the file system. */
static void note(struct fuse_session *s, struct held *h)
{
    struct vfs_node node;

    if (s->owner && vfs_resolve(s->vfs, (uint64_t)h->serial << 48, &node) == 0 && node.fs->ops->rw)
        node.fs->ops->rw->note_held(node.fs, &(struct fs_held){ s->owner, h->kind == FUSE_HELD_FILE, h->id, h->n },
                                    &h->kept_at);
}

int fuse_hold(struct fuse_session *s, enum fuse_held_kind kind, uint16_t serial, uint64_t id)
{
    uint64_t hash = hash_of(kind, serial, id);
    struct held_stripe *t = stripe_of(s, hash);
    struct held **p, *h;
    int rc = 0;

    pthread_mutex_lock(&t->lock);
    grow(t);
    p = find(t, hash, kind, serial, id);
    if (p && *p) {
        (*p)->n++;
        note(s, *p);
    } else if (!take(&s->budget[kind])) {
        rc = -ENFILE;
    } else if (p && (h = malloc(sizeof(*h)))) {
        *h = (struct held){ .id = id, .n = 1, .serial = serial, .kind = (uint8_t)kind };
        *p = h;
        t->n++;
        note(s, h);
    } else {
        give(&s->budget[kind]);
        rc = -ENOMEM;
    }
    pthread_mutex_unlock(&t->lock);
    return rc;
}

uint64_t fuse_give_back(struct fuse_session *s, enum fuse_held_kind kind, uint16_t serial, uint64_t id, uint64_t n)
{
    uint64_t hash = hash_of(kind, serial, id), taken = 0;
    struct held_stripe *t = stripe_of(s, hash);
    struct held **p, *h;

    pthread_mutex_lock(&t->lock);
    p = find(t, hash, kind, serial, id);
    if (p && *p) {
        h = *p;
        taken = n < h->n ? n : h->n;
        h->n -= taken;
        note(s, h);
        if (!h->n) {
            *p = h->next;
            free(h);
            t->n--;
            give(&s->budget[kind]);
        }
    }
    pthread_mutex_unlock(&t->lock);
    return taken;
}

bool fuse_holds(struct fuse_session *s, enum fuse_held_kind kind, uint16_t serial, uint64_t id)
{
    uint64_t hash = hash_of(kind, serial, id);
    struct held_stripe *t = stripe_of(s, hash);
    struct held **p;
    bool held;

    pthread_mutex_lock(&t->lock);
    p = find(t, hash, kind, serial, id);
    held = p && *p;
    pthread_mutex_unlock(&t->lock);
    return held;
}

static struct held *take_all(struct held_stripe *t)
{
    struct held *all = NULL;

    pthread_mutex_lock(&t->lock);
    for (uint32_t i = 0; i < t->n_buckets; i++)
        for (struct held *h; (h = t->buckets[i]) != NULL;) {
            t->buckets[i] = h->next;
            h->next = all;
            all = h;
        }
    t->n = 0;
    pthread_mutex_unlock(&t->lock);
    return all;
}

void fuse_give_all_back(struct fuse_session *s, struct vfs_reader *reader)
{
    for (uint32_t i = 0; i < FUSE_HELD_STRIPES; i++)
        for (struct held *h = take_all(&s->held[i]), *next; h; h = next) {
            struct vfs_node node;

            next = h->next;
            vfs_widen(reader);
            if (vfs_resolve(s->vfs, (uint64_t)h->serial << 48, &node) == 0 && node.fs->ops->rw) {
                vfs_confine(reader, h->serial); /* to close a file may hang */
                if (s->owner)
                    node.fs->ops->rw->note_held(
                        node.fs, &(struct fs_held){ s->owner, h->kind == FUSE_HELD_FILE, h->id, 0 }, &h->kept_at);
                if (h->kind == FUSE_HELD_FILE)
                    node.fs->ops->rw->release(node.fs, h->id);
                else
                    node.fs->ops->rw->forget(node.fs, h->id, h->n);
            }
            give(&s->budget[h->kind]);
            free(h);
        }
    vfs_widen(reader);
}

/* ---- of another process */

struct taker {
    struct fuse_session *s;
    uint16_t serial;
};

static void take_held(void *ctx, const struct fs_held *what, uint32_t at)
{
    struct taker *taker = ctx;
    enum fuse_held_kind kind = what->file ? FUSE_HELD_FILE : FUSE_HELD_NODE;
    uint64_t hash = hash_of(kind, taker->serial, what->id);
    struct held_stripe *t = stripe_of(taker->s, hash);
    struct held **p, *h = malloc(sizeof(*h));

    pthread_mutex_lock(&t->lock);
    grow(t);
    p = find(t, hash, kind, taker->serial, what->id);
    if (h && p && !*p) {
        *h = (struct held){
            .id = what->id, .n = what->n, .kept_at = at, .serial = taker->serial, .kind = (uint8_t)kind
        };
        *p = h;
        t->n++;
        take(&taker->s->budget[kind]);
        h = NULL;
    }
    pthread_mutex_unlock(&t->lock);
    free(h);
}

void fuse_take_all_held(struct fuse_session *s)
{
    struct vfs_node node = { 0 };

    while (s->owner && vfs_rw_after(s->vfs, node.serial, &node))
        node.fs->ops->rw->each_held(node.fs, s->owner, take_held, &(struct taker){ s, node.serial });
}

void fuse_held_init(struct fuse_session *s)
{
    struct rlimit limit;
    uint64_t nodes;

    for (uint32_t i = 0; i < FUSE_HELD_STRIPES; i++)
        pthread_mutex_init(&s->held[i].lock, NULL);
    getrlimit(RLIMIT_NOFILE, &limit);
    nodes = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE) / NODES_PART / NODE_BYTES;
    s->budget[FUSE_HELD_NODE].all = &s->engine->held_nodes;
    s->budget[FUSE_HELD_NODE].all_max = nodes > NODES_LEAST ? nodes : NODES_LEAST;
    s->budget[FUSE_HELD_FILE].all = &s->engine->held_files;
    s->budget[FUSE_HELD_FILE].all_max = limit.rlim_cur / 2 < FILES_MAX ? limit.rlim_cur / 2 : FILES_MAX;
}

void fuse_held_free(struct fuse_session *s)
{
    for (uint32_t i = 0; i < FUSE_HELD_STRIPES; i++) {
        free(s->held[i].buckets);
        pthread_mutex_destroy(&s->held[i].lock);
    }
}
