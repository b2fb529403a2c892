/* cache/bind.c -- binds the trusted bits of a side file to what a table says of the chunks. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "base/base.h"
#include "cache/cache.h"
#include "cache/claim.h"

/* The bindings are walked in blocks, and holes of the side file are skipped: an image may claim 16 million chunks
 * and name three. */
#define BIND_BLOCK 4096u

_Static_assert(sizeof(struct side_bound) == 48, "bindings are compared as bytes, so none may be padding");

struct bind {
    struct cachefile *c;
    const struct blobtable *t;
    bool sorted;             /* chunks so far lie in index order */
    uint64_t end;            /* of the last one */
    uint32_t bad;            /* first chunk that is bound otherwise, or n */
    struct blobtable *spans; /* collects all that is bound, if not NULL */
    struct side_bound block[BIND_BLOCK];
};

static bool names_any(const struct blobtable *t, uint32_t from, uint32_t to)
{
    while (from < to && !t->chunk[from].usize)
        from++;
    return from < to;
}

/* The binding that the table gives a chunk; state 0: none. */
static struct side_bound bound_of(const struct bind *b, uint32_t i)
{
    const struct blobtable_chunk *k = &b->t->chunk[i];
    struct side_bound want = { .state = 0 };

    if (!k->usize)
        return want;
    want.off = cachefile_off(b->c, k);
    want.len = cachefile_len(b->c, k);
    want.state = b->c->stored ? 1 | (k->flags & BLOBTABLE_COMPRESSED ? 2 : 0) | k->usize << 2 : 1;
    memcpy(want.digest, b->t->digest[i], 32);
    return want;
}

/* Compares one chunk, binds it in the block, notes its span. Returns whether the block changed. */
static bool bind_chunk(struct bind *b, uint32_t i, struct side_bound *k)
{
    const struct side_bound want = bound_of(b, i);
    bool changed = false;

    if (want.state && memcmp(k, &want, sizeof want)) {
        if (k->state && b->bad == b->c->n)
            b->bad = i;
        *k = want;
        changed = true;
    }
    if (k->state) {
        b->sorted &= k->off >= b->end;
        b->end = k->off + k->len;
        if (b->spans) {
            b->spans->chunk[i].uoff = k->off;
            b->spans->chunk[i].usize = k->len;
            b->spans->known++;
        }
    }
    return changed;
}

/* Walks all bindings; write: stores what changed. 0 or -errno. */
static int bind_walk(struct bind *b, bool write)
{
    struct cachefile *c = b->c;
    off_t base = (off_t)cachefile_bound_offset(c->n), data = base;

    b->sorted = true;
    b->end = 0;
    b->bad = c->n;
    for (uint32_t from = 0; from < c->n; from += BIND_BLOCK) {
        uint32_t to = c->n - from < BIND_BLOCK ? c->n : from + BIND_BLOCK;
        off_t at = base + (off_t)from * (off_t)sizeof *b->block;
        size_t len = (size_t)(to - from) * sizeof *b->block;
        bool changed = false;

        if (data < at && (data = lseek(c->side_fd, at, SEEK_DATA)) < 0)
            data = errno == ENXIO ? INT64_MAX : at;
        if (data >= at + (off_t)len && !names_any(b->t, from, to))
            continue;
        if (pread(c->side_fd, b->block, len, at) != (ssize_t)len)
            return -EIO;
        for (uint32_t i = from; i < to; i++)
            changed |= bind_chunk(b, i, &b->block[i - from]);
        if (changed && write && pwrite(c->side_fd, b->block, len, at) != (ssize_t)len)
            return errno ? -errno : -EIO;
    }
    return 0;
}

/* Whether chunks that would be bound together share bytes of the data file: one's commit would change the other. */
static int bind_overlap(struct bind *b, bool *hit, uint32_t *x, uint32_t *y)
{
    int rc;

    *hit = false;
    if (b->sorted)
        return 0;
    b->spans = blobtable_new(b->c->n);
    if (!b->spans)
        return -ENOMEM;
    rc = bind_walk(b, false);
    *hit = !rc && blobtable_overlap(b->spans, x, y);
    blobtable_free(b->spans);
    b->spans = NULL;
    return rc;
}

/* Notes in the data file itself whose it is, for when the side file is lost. Where file systems keep no such notes, what was
 * fetched is fetched or copied again then. */
static void name_data(const struct cachefile *c, const struct blobtable *t)
{
    char has[BLOBTABLE_NAME_LEN + 1] = "", name[BLOBTABLE_NAME_LEN + 1];
    ssize_t len = c->named ? 0 : fgetxattr(c->data_fd, CACHE_XATTR, has, BLOBTABLE_NAME_LEN);
    bool none = len < 0 && errno == ENODATA;

    if (!c->named && (none || (len > 0 && !strcmp(has, CACHE_XATTR_OPEN))) && !blobtable_name(c->info, t, name))
        fsetxattr(c->data_fd, CACHE_XATTR, name, BLOBTABLE_NAME_LEN, none ? XATTR_CREATE : XATTR_REPLACE);
}

static int bind_locked(struct bind *b, struct failure *f)
{
    struct cachefile *c = b->c;
    uint32_t x = 0, y = 0;
    bool overlap;
    int rc = bind_walk(b, false);
    uint32_t bad = b->bad;

    if (!rc)
        rc = bind_overlap(b, &overlap, &x, &y);
    if (!rc && bad < c->n)
        return failure_set(f, -EEXIST, VND_CAUSE_DIGEST, "chunk %u is not what another image says of it", bad);
    if (!rc && overlap)
        return failure_set(f, -EEXIST, VND_CAUSE_DIGEST, "chunks %u and %u share bytes, one is of another image", x, y);
    if (!rc)
        rc = bind_walk(b, true);
    if (!rc)
        name_data(c, b->t);
    return rc ? failure_set(f, rc, VND_CAUSE_DIGEST, "cannot use its side file: %s", strerror(-rc)) : 0;
}

int cachefile_bind(struct cachefile *c, const struct blobtable *t, struct failure *f)
{
    struct bind *b;
    int rc;

    if (c->side_fd < 0)
        return 0;
    b = calloc(1, sizeof *b);
    if (!b)
        return failure_set(f, -ENOMEM, VND_CAUSE_DIGEST, "no memory");
    b->c = c;
    b->t = t;
    rc = claim_byte(c->side_fd, CLAIM_INIT, true, CLAIM_INIT_WAIT_MS);
    if (rc) {
        failure_set(f, rc, VND_CAUSE_DIGEST, "cannot lock its side file: %s", strerror(-rc));
    } else {
        rc = bind_locked(b, f);
        claim_byte_release(c->side_fd, CLAIM_INIT);
    }
    free(b);
    return rc;
}
