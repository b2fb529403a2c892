/* passthrough/kept.c -- writes down what a host directory must not lose with its process: mounts, nodes, open files, and what
 * sessions hold of them. It is table work: most functions are called under the lock.
 */
#include "passthrough/kept.h"

#include <fcntl.h>
#include <string.h>

#include "passthrough/internal.h"

void pt_keep_mount(struct vnd_passthrough *p, struct pt_mount *m)
{
    uint8_t data[sizeof(struct kept_mount) + sizeof(m->name)];
    struct kept_mount k = { .remote = m->remote, .no_fd = m->no_fd };
    size_t len = strlen(m->name);

    if (!p->ledger || !m->above)
        return;
    k.above = m->above->ino;
    memcpy(data, &k, sizeof(k));
    memcpy(data + sizeof(k), m->name, len);
    ledger_put(p->ledger, &m->kept_at, KEPT_MOUNT, data, (uint32_t)(sizeof(k) + len));
}

void pt_keep_node(struct vnd_passthrough *p, struct pt_node *n)
{
    uint8_t data[sizeof(struct kept_node) + PT_HANDLE_MAX + 256];
    struct kept_node k;

    if (!p->ledger || !n->linked || n == p->root)
        return;
    k = (struct kept_node){ .ino = n->ino,
                            .generation = n->generation,
                            .host_ino = n->host_ino,
                            .dev = n->dev,
                            .mount = n->mount->kept_at,
                            .device = n->device,
                            .type = n->type,
                            .handle_bytes = n->handle_bytes,
                            .handle_type = n->handle_type };
    if (n->place && n->place->name_len < 256) {
        k.has_place = 1;
        k.born = n->place->born;
        k.name_len = n->place->name_len;
        k.place_dir = n->place->dir;
        k.birth_s = n->place->birth.tv_sec;
        k.birth_nsec = n->place->birth.tv_nsec;
        memcpy(data + sizeof(k) + n->handle_bytes, n->place->name, k.name_len);
    }
    memcpy(data, &k, sizeof(k));
    memcpy(data + sizeof(k), n->handle, n->handle_bytes);
    ledger_put(p->ledger, &n->kept_at, KEPT_NODE, data, (uint32_t)(sizeof(k) + n->handle_bytes + k.name_len));
}

void pt_keep_file(struct vnd_passthrough *p, struct pt_file *f)
{
    struct kept_file k = { .fh = (uint64_t)f->gen << 32 | (f->slot + 1), .ino = f->node->ino };

    if (!p->ledger)
        return;
    k.flags = (uint32_t)fcntl(f->fd, F_GETFL);
    ledger_put(p->ledger, &f->kept_at, KEPT_FILE, &k, sizeof(k));
}

void pt_note_held(struct fs *fs, const struct fs_held *h, uint32_t *at)
{
    struct ledger *l = pt_of(fs)->ledger;
    struct kept_held k = { .n = h->n, .id = h->id, .owner = h->owner, .file = h->file };

    if (!l)
        return;
    if (!h->n)
        ledger_drop(l, at);
    else if (*at)
        *ledger_word(l, *at, 0) = h->n;
    else
        ledger_put(l, at, KEPT_HELD, &k, sizeof(k));
}

struct each {
    uint32_t owner;
    fs_take_held take;
    void *ctx;
    struct vnd_passthrough *p;
};

static void give_held(void *ctx, uint32_t at, uint16_t kind, const void *data, uint32_t len)
{
    struct each *e = ctx;
    struct kept_held k;

    if (kind != KEPT_HELD || len != sizeof(k))
        return;
    memcpy(&k, data, sizeof(k));
    if (k.owner == e->owner)
        e->take(e->ctx, &(struct fs_held){ k.owner, k.file, k.id, k.n }, at);
}

void pt_each_held(struct fs *fs, uint32_t owner, fs_take_held take, void *ctx)
{
    struct vnd_passthrough *p = pt_of(fs);

    if (p->ledger)
        ledger_each(p->ledger, give_held, &(struct each){ owner, take, ctx, p });
}

int vnd_ledger_create(void)
{
    return ledger_create();
}
