/* fuse/held.c -- what one session holds of file systems that can be written to, which it shares with other guests: counts of
 * nodes that it looked up, and open files. A guest can give back and use what its own session holds, nothing else; what is
 * left goes when the session ends or begins anew. */
#include <errno.h>
#include <stdlib.h>
#include <sys/resource.h>

#include "fuse/internal.h"

/* Open files of one guest: half of what a file system has open for all of them, which is half of the descriptors. */
#define FILES_MAX (1u << 19)

struct held {
    struct held *next; /* bucket, or a list of those taken out */
    uint64_t id;       /* inode number, or fh */
    uint64_t n;        /* look-ups; 1 of a file */
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

int fuse_hold(struct fuse_session *s, enum fuse_held_kind kind, uint16_t serial, uint64_t id)
{
    uint64_t hash = hash_of(kind, serial, id);
    struct held_stripe *t = stripe_of(s, hash);
    struct held **p, *h = NULL;

    if (kind == FUSE_HELD_FILE && atomic_fetch_add(&s->n_files, 1) >= s->files_max) {
        atomic_fetch_sub(&s->n_files, 1);
        return -ENFILE;
    }
    pthread_mutex_lock(&t->lock);
    grow(t);
    p = find(t, hash, kind, serial, id);
    if (p && *p) {
        h = *p;
        h->n++;
    } else if (p && (h = malloc(sizeof(*h)))) {
        *h = (struct held){ .id = id, .n = 1, .serial = serial, .kind = (uint8_t)kind };
        *p = h;
        t->n++;
    }
    pthread_mutex_unlock(&t->lock);
    if (!h && kind == FUSE_HELD_FILE)
        atomic_fetch_sub(&s->n_files, 1);
    return h ? 0 : -ENOMEM;
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
        if (!h->n) {
            *p = h->next;
            free(h);
            t->n--;
        }
    }
    pthread_mutex_unlock(&t->lock);
    if (taken && kind == FUSE_HELD_FILE)
        atomic_fetch_sub(&s->n_files, 1);
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
                if (h->kind == FUSE_HELD_FILE)
                    node.fs->ops->rw->release(node.fs, h->id);
                else
                    node.fs->ops->rw->forget(node.fs, h->id, h->n);
            }
            if (h->kind == FUSE_HELD_FILE)
                atomic_fetch_sub(&s->n_files, 1);
            free(h);
        }
    vfs_widen(reader);
}

void fuse_held_init(struct fuse_session *s)
{
    struct rlimit limit;

    for (uint32_t i = 0; i < FUSE_HELD_STRIPES; i++)
        pthread_mutex_init(&s->held[i].lock, NULL);
    getrlimit(RLIMIT_NOFILE, &limit);
    s->files_max = limit.rlim_cur / 4 < FILES_MAX ? (uint32_t)(limit.rlim_cur / 4) : FILES_MAX;
}

void fuse_held_free(struct fuse_session *s)
{
    for (uint32_t i = 0; i < FUSE_HELD_STRIPES; i++) {
        free(s->held[i].buckets);
        pthread_mutex_destroy(&s->held[i].lock);
    }
}
