/* fg_load.c -- load loops: one kind of operation at a fixed number in flight. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fg_internal.h"

enum { OP_LOOKUP = 1, OP_FORGET = 2, OP_GETATTR = 3, OP_READ = 15, OP_WRITE = 16, OP_RELEASE = 18, OP_CREATE = 35 };
struct in_header {
    uint32_t len, opcode;
    uint64_t unique, nodeid;
    uint32_t uid, gid, pid;
    uint16_t total_extlen, padding;
};
struct read_in {
    uint64_t fh, offset;
    uint32_t size, read_flags;
    uint64_t lock_owner;
    uint32_t flags, padding;
};
struct create_in {
    uint32_t flags, mode, umask, open_flags;
};
enum { ENTRY_BYTES = 128, OPEN_BYTES = 16, ATTR_BYTES = 104, WRITE_BYTES = 8, IN_BYTES = sizeof(struct in_header) };
struct run {
    fg_queue *q;
    const fg_load *load;
    uint64_t random, started, bytes;
    uint32_t cursor_file;
    uint64_t cursor;
};

static uint64_t clock_ns(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t next_random(struct run *r)
{
    r->random ^= r->random << 13;
    r->random ^= r->random >> 7;
    r->random ^= r->random << 17;
    return r->random;
}

static void write_header(struct fg_slot *s, uint32_t len, uint32_t opcode, uint64_t nodeid)
{
    struct in_header h = { len, opcode, s->unique, nodeid, 0, 0, 1, 0, 0 };
    s->in_data_bytes = 0;
    memcpy(s->host + FG_SLOT_IN, &h, sizeof h);
    s->opcode = opcode;
}

static void pick_random(struct run *r, struct fg_slot *s)
{
    uint32_t block = r->load->block_bytes;
    s->target = (uint32_t)(next_random(r) % r->load->file_count);
    s->offset = next_random(r) % (r->load->files[s->target].size_bytes / block) * block;
}

static int send_read(struct run *r, uint32_t slot)
{
    const fg_load *load = r->load;
    struct fg_slot *s = &r->q->slots[slot];
    uint32_t block = load->block_bytes;
    if (load->kind == FG_LOAD_READ_RANDOM) {
        pick_random(r, s);
    } else {
        if (r->cursor + block > load->files[r->cursor_file].size_bytes) {
            r->cursor = 0;
            r->cursor_file = (r->cursor_file + 1) % load->file_count;
        }
        s->target = r->cursor_file;
        s->offset = r->cursor;
        r->cursor += block;
    }
    const fg_file *f = &load->files[s->target];
    struct read_in in = { f->fh, s->offset, block, 0, 0, 0, 0 };
    write_header(s, sizeof(struct in_header) + sizeof in, OP_READ, f->nodeid);
    memcpy(s->host + FG_SLOT_IN + sizeof(struct in_header), &in, sizeof in);
    return fg_slot_send(r->q, slot, sizeof(struct in_header) + sizeof in, 0, block);
}

static int send_lookup(struct run *r, uint32_t slot)
{
    struct fg_slot *s = &r->q->slots[slot];
    s->target = (uint32_t)(next_random(r) % r->load->name_count);
    const fg_name *n = &r->load->names[s->target];
    uint32_t bytes = (uint32_t)strnlen(n->name, sizeof n->name - 1) + 1;
    write_header(s, sizeof(struct in_header) + bytes, OP_LOOKUP, n->parent);
    memcpy(s->host + FG_SLOT_IN + sizeof(struct in_header), n->name, bytes);
    return fg_slot_send(r->q, slot, sizeof(struct in_header) + bytes, 128, 0);
}

static int send_write(struct run *r, uint32_t slot)
{
    struct fg_slot *s = &r->q->slots[slot];
    uint32_t block = r->load->block_bytes;
    pick_random(r, s);
    const fg_file *f = &r->load->files[s->target];
    struct read_in in = { f->fh, s->offset, block, 0, 0, 0, 0 }; /* WRITE's has the same layout */
    write_header(s, IN_BYTES + sizeof in + block, OP_WRITE, f->nodeid);
    memcpy(s->host + FG_SLOT_IN + IN_BYTES, &in, sizeof in);
    for (uint32_t at = 0, page = 0; at < block; at += FG_PAGE, page++)
        fg_pattern_fill(s->host + fg_page_at(r->q, page), block - at < FG_PAGE ? block - at : FG_PAGE, s->offset + at,
                        f->seed);
    s->in_data_bytes = block;
    return fg_slot_send(r->q, slot, IN_BYTES + sizeof in, WRITE_BYTES, 0);
}

static int send_getattr(struct run *r, uint32_t slot)
{
    struct fg_slot *s = &r->q->slots[slot];
    s->target = (uint32_t)(next_random(r) % r->load->name_count);
    write_header(s, IN_BYTES + 16, OP_GETATTR, r->load->names[s->target].expect_nodeid);
    memset(s->host + FG_SLOT_IN + IN_BYTES, 0, 16);
    return fg_slot_send(r->q, slot, IN_BYTES + 16, ATTR_BYTES, 0);
}

static int send_create(struct run *r, uint32_t slot)
{
    enum { NAME_BYTES = 32 };
    struct fg_slot *s = &r->q->slots[slot];
    struct create_in in = { 2, 0100644, 022, 0 };
    char name[NAME_BYTES] = "";
    int n = snprintf(name, sizeof name, "%llx-%llu", (unsigned long long)r->load->random_seed,
                     (unsigned long long)r->started);
    uint32_t len = IN_BYTES + sizeof in + (uint32_t)n + 1;
    write_header(s, len, OP_CREATE, r->load->names[0].parent);
    memcpy(s->host + FG_SLOT_IN + IN_BYTES, &in, sizeof in);
    memcpy(s->host + FG_SLOT_IN + IN_BYTES + sizeof in, name, (uint32_t)n + 1);
    return fg_slot_send(r->q, slot, len, ENTRY_BYTES + OPEN_BYTES, 0);
}

/* After a create's reply: the same slot closes the file. */
static int send_release(struct run *r, uint32_t slot)
{
    struct fg_slot *s = &r->q->slots[slot];
    struct {
        uint64_t fh;
        uint32_t flags, release_flags;
        uint64_t lock_owner;
    } in = { 0 };
    uint64_t nodeid;
    memcpy(&nodeid, s->host + FG_SLOT_OUT + FG_OUT_FIXED_AT, sizeof nodeid);
    s->offset = nodeid;
    memcpy(&in.fh, s->host + FG_SLOT_OUT + FG_OUT_FIXED_AT + ENTRY_BYTES, sizeof in.fh);
    s->unique = r->q->next_unique += 2;
    write_header(s, IN_BYTES + sizeof in, OP_RELEASE, nodeid);
    memcpy(s->host + FG_SLOT_IN + IN_BYTES, &in, sizeof in);
    return fg_slot_send(r->q, slot, IN_BYTES + sizeof in, 0, 0);
}

/* Then forgets it, or a server that holds a descriptor for each node would run out. */
static int send_forget(struct run *r, uint32_t slot)
{
    struct fg_slot *s = &r->q->slots[slot];
    uint64_t count = 1;
    s->unique = r->q->next_unique += 2;
    write_header(s, IN_BYTES + sizeof count, OP_FORGET, s->offset);
    memcpy(s->host + FG_SLOT_IN + IN_BYTES, &count, sizeof count);
    return fg_slot_send(r->q, slot, IN_BYTES + sizeof count, -1, 0);
}

static int send_next(struct run *r, uint32_t slot)
{
    r->q->slots[slot].unique = r->q->next_unique += 2;
    r->started++;
    switch (r->load->kind) {
    case FG_LOAD_LOOKUP: return send_lookup(r, slot);
    case FG_LOAD_WRITE_RANDOM: return send_write(r, slot);
    case FG_LOAD_GETATTR: return send_getattr(r, slot);
    case FG_LOAD_CREATE: return send_create(r, slot);
    default: return send_read(r, slot);
    }
}

static int check_read(struct run *r, const struct fg_slot *s)
{
    const fg_file *f = &r->load->files[s->target];
    uint32_t block = r->load->block_bytes, last = (block - 1) / FG_PAGE;
    int rc = 0;
    if (r->load->check) {
        for (uint32_t i = 0; !rc && i <= last; i++) {
            uint32_t n = i == last ? block - last * FG_PAGE : FG_PAGE;
            rc = fg_pattern_check(s->host + fg_page_at(r->q, i), n, s->offset + (uint64_t)i * FG_PAGE, f->seed);
        }
    } else {
        uint32_t tail = block - 8 - last * FG_PAGE;
        rc = fg_pattern_check(s->host + fg_page_at(r->q, 0), 8, s->offset, f->seed);
        if (!rc)
            rc = fg_pattern_check(s->host + fg_page_at(r->q, last) + tail, 8, s->offset + block - 8, f->seed);
    }
    return rc ? fg_fail(r->q, rc, "wrong bytes at offset %llu", (unsigned long long)s->offset) : 0;
}

static int check_reply(struct run *r, struct fg_slot *s, uint32_t used_len)
{
    int32_t error;
    uint32_t want = 16 + (s->opcode == OP_LOOKUP    ? ENTRY_BYTES
                          : s->opcode == OP_GETATTR ? ATTR_BYTES
                          : s->opcode == OP_WRITE   ? WRITE_BYTES
                          : s->opcode == OP_CREATE  ? ENTRY_BYTES + OPEN_BYTES
                          : s->opcode == OP_RELEASE ? 0
                                                    : r->load->block_bytes);
    int64_t len = fg_reply_length(r->q, s, used_len, &error);
    if (s->opcode == OP_FORGET)
        return len > 0 ? fg_fail(r->q, -FG_BAD_LENGTH, "FORGET was answered") : (int)len;
    if (len < 0)
        return (int)len;
    if (error)
        return fg_fail(r->q, error, "request failed with error %d", error);
    if (len != want)
        return fg_fail(r->q, -FG_BAD_LENGTH, "reply of %lld bytes, %u expected", (long long)len, want);
    if (s->opcode == OP_WRITE || s->opcode == OP_CREATE || s->opcode == OP_RELEASE || s->opcode == OP_GETATTR) {
        r->bytes += s->in_data_bytes;
        return 0;
    }
    if (s->opcode == OP_READ) {
        r->bytes += r->load->block_bytes;
        return check_read(r, s);
    }
    const fg_name *n = &r->load->names[s->target];
    uint64_t nodeid;
    memcpy(&nodeid, s->host + FG_SLOT_OUT + FG_OUT_FIXED_AT, sizeof nodeid);
    if (n->expect_nodeid ? nodeid != n->expect_nodeid : nodeid == 0)
        return fg_fail(r->q, -FG_BAD_DATA, "look-up of %s gave node %llu", n->name, (unsigned long long)nodeid);
    return 0;
}

static bool finished(const struct run *r, uint64_t end_ns)
{
    return (r->load->max_ops && r->started >= r->load->max_ops) || atomic_load(&r->q->stop) ||
           (end_ns && clock_ns(CLOCK_MONOTONIC) >= end_ns);
}

static int check_load(fg_queue *q, const fg_load *l)
{
    bool read = l->kind != FG_LOAD_LOOKUP && l->kind != FG_LOAD_GETATTR && l->kind != FG_LOAD_CREATE;
    if (l->depth == 0 || l->depth > q->cfg.slot_count || q->in_flight)
        return fg_fail(q, -EINVAL, "depth %u with %u slots and %d in flight", l->depth, q->cfg.slot_count,
                       q->in_flight);
    if (read &&
        (l->block_bytes == 0 || l->block_bytes % 8 || l->block_bytes > q->cfg.slot_data_bytes || !l->file_count))
        return fg_fail(q, -EINVAL, "block of %u bytes, %u files", l->block_bytes, l->file_count);
    for (uint32_t i = 0; read && i < l->file_count; i++)
        if (l->files[i].size_bytes < l->block_bytes)
            return fg_fail(q, -EINVAL, "file %u is shorter than a block", i);
    return !read && !l->name_count ? fg_fail(q, -EINVAL, "no names") : 0;
}

int fg_load_run(fg_queue *q, const fg_load *load, fg_load_result *out)
{
    struct run r = { .q = q, .load = load, .random = load->random_seed * 0x9e3779b97f4a7c15ull + 1 };
    int rc = check_load(q, load);
    if (rc)
        return rc;
    memset(out, 0, sizeof *out);
    uint64_t kicks = q->kicks, calls = q->calls;
    uint64_t begin = clock_ns(CLOCK_MONOTONIC), cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    uint64_t sent, end = load->duration_ms ? begin + load->duration_ms * 1000000ull : 0;
    atomic_store(&q->stop, 0);
    for (uint32_t i = 0; !rc && i < load->depth && !finished(&r, 0); i++)
        rc = send_next(&r, i);
    sent = load->latency_ns ? clock_ns(CLOCK_MONOTONIC) : 0;
    fg_queue_publish(q);
    while (!rc && q->in_flight) {
        uint64_t cookie;
        uint32_t len;
        bool over = finished(&r, end);
        int got;
        while ((got = fg_queue_pop(q, &cookie, &len)) > 0) {
            struct fg_slot *s = &q->slots[cookie];
            s->busy = false;
            rc = check_reply(&r, s, len);
            if (!rc && (s->opcode == OP_CREATE || s->opcode == OP_RELEASE)) {
                rc = s->opcode == OP_CREATE ? send_release(&r, (uint32_t)cookie) : send_forget(&r, (uint32_t)cookie);
                if (rc)
                    break;
                continue;
            }
            if (load->latency_ns && out->ops < load->latency_room)
                load->latency_ns[out->ops] = clock_ns(CLOCK_MONOTONIC) - sent;
            out->ops++;
            over = over || finished(&r, 0);
            if (rc || (!over && (rc = send_next(&r, (uint32_t)cookie)) != 0))
                break;
        }
        rc = rc ? rc : got;
        if (load->pause_us && !over)
            usleep(load->pause_us);
        if (load->latency_ns)
            sent = clock_ns(CLOCK_MONOTONIC);
        fg_queue_publish(q);
        if (!rc && q->in_flight)
            rc = fg_queue_wait(q, (int)load->timeout_ms);
        if (rc > 0)
            rc = 0;
    }
    atomic_store(&q->stop, 0);
    out->bytes = r.bytes;
    out->elapsed_ns = clock_ns(CLOCK_MONOTONIC) - begin;
    out->cpu_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID) - cpu;
    out->kicks = q->kicks - kicks;
    out->calls = q->calls - calls;
    return rc;
}
