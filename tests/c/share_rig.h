/* share_rig.h -- guests on a host directory, each a client that waits for its answers. The directory is one case's: share_new
 * and new_source make it, share_free and remove_source remove it.
 */
#ifndef TESTS_SHARE_RIG_H
#define TESTS_SHARE_RIG_H
#include <fcntl.h>
#include <ftw.h>
#include <pthread.h>

#include "fuse_rig.h"
#include "fuse/internal.h"
#include "passthrough/internal.h"

static char source[] = "/tmp/vnd-passthrough-XXXXXX"; /* of one case, see new_source */

struct client {
    struct rig rig; /* shares vfs and session with the others */
    struct fake_req f;
    _Atomic int woken;
    unsigned int seed;
    pthread_t thread;
    struct req_once *once; /* of its requests */
    bool again;
};

static inline int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    return remove(path);
}

static inline void client_wake(struct store_wait *w)
{
    struct client *c = (struct client *)((char *)w->owner - offsetof(struct client, f));

    atomic_store(&c->woken, 1);
}

/* One request to its end, also by another thread: its errno. */
static inline int ask_cap(struct client *c, uint32_t op, uint64_t nodeid, const void *body, uint32_t len,
                          uint32_t out_cap)
{
    struct fuse_out_header h;
    enum req_verdict v;

    fake_done(&c->f);
    fake_fill(&c->f, op, nodeid, body, len, out_cap);
    c->f.r.session_gen = fuse_session_gen(c->rig.s);
    c->f.r.wait.wake = client_wake;
    c->f.r.once = c->once;
    c->f.r.again = c->again;
    for (;;) {
        atomic_store(&c->woken, 0);
        v = fuse_session_serve(c->rig.s, &c->rig.w, &c->f.r);
        if (v != REQ_PARKED)
            break;
        while (!atomic_load(&c->woken))
            sched_yield();
    }
    if (v == REQ_NOREPLY)
        return 0;
    memcpy(&h, c->f.out, sizeof(h));
    return -h.error;
}

static inline int ask(struct client *c, uint32_t op, uint64_t nodeid, const void *body, uint32_t len)
{
    return ask_cap(c, op, nodeid, body, len, 16384);
}

static inline const uint8_t *answer(struct client *c)
{
    return c->f.out + sizeof(struct fuse_out_header);
}

static inline uint32_t with_name(uint8_t *body, const void *head, uint32_t head_len, const char *name)
{
    memcpy(body, head, head_len);
    memcpy(body + head_len, name, strlen(name) + 1);
    return head_len + (uint32_t)strlen(name) + 1;
}

static inline void forget(struct client *c, uint64_t nodeid, uint64_t n)
{
    ask(c, FUSE_OP_FORGET, nodeid, &n, sizeof(n));
}

static inline void new_source(void)
{
    CHECK(mkdtemp(source));
}

static inline void remove_source(void)
{
    nftw(source, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

/* A file that a client made and has open. */
struct made {
    uint64_t nodeid, fh;
};

/* 0 with *out, or the errno and *out is zero. */
static inline int create_file(struct client *c, const char *name, struct made *out)
{
    struct fuse_create_in in = { .flags = O_RDWR, .mode = S_IFREG | 0644 };
    struct fuse_entry_out e;
    struct fuse_open_out o;
    uint8_t body[64];
    int error = ask(c, FUSE_OP_CREATE, 1, body, with_name(body, &in, sizeof(in), name));

    *out = (struct made){ 0 };
    if (error)
        return error;
    memcpy(&e, answer(c), sizeof(e));
    memcpy(&o, answer(c) + sizeof(e), sizeof(o));
    *out = (struct made){ e.nodeid, o.fh };
    return 0;
}

/* A share on an empty directory, one guest, one client. */
struct share {
    struct rig rig;
    struct client client;
    vnd_passthrough *p;
};

static inline void share_new(struct share *s)
{
    char err[VND_ERR_MAX];

    memset(s, 0, sizeof(*s));
    new_source();
    s->p = vnd_passthrough_new(engine, source, 0, err, sizeof(err));
    CHECK(s->p);
    rig_new(&s->rig, VND_SESSION_MIXED);
    CHECK_EQ(vnd_vfs_mount_passthrough(s->rig.vfs, "/", s->p), 0);
    init(&s->rig, 7, 38, ~0ull);
    s->client.rig.s = s->rig.s;
    CHECK_EQ(fuse_worker_init(&s->client.rig.w, engine, s->rig.vfs), 0);
}

static inline void share_free(struct share *s)
{
    fake_done(&s->client.f);
    fuse_worker_free(&s->client.rig.w, s->rig.vfs);
    CHECK_EQ(vnd_vfs_umount(s->rig.vfs, "/"), 0);
    fuse_session_reset(s->rig.s);
    vnd_passthrough_free(s->p);
    rig_free(&s->rig);
    remove_source();
}

#endif
