/* Pre-content events on a socket that keeps message borders, as a group does: answered at once,
 * when their chunks come, with an error when they do not; gone on with by another server; refused. */
#include "store_fixture.h"

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "precontent/internal.h"

#define CHUNKS 16u
#define CHUNK 65536u
#define ALLOW 1u
#define DENY_EIO (2u | (uint32_t)EIO << 24)

struct rig {
    char dir[200];
    vnd_engine *e;
    vnd_store *s;
    struct fix_blob *b;
    struct vnd_blob *h;
    struct fix_server server;
    vnd_precontent *p;
    int fd, group, state; /* fd: the kernel's end of group */
};

struct answer {
    int32_t fd;
    uint32_t response;
};

static size_t put_event(uint8_t *at, uint64_t mask, int32_t fd, uint64_t offset, uint64_t count, bool range)
{
    uint32_t len = range ? 48 : 24;
    uint16_t header = 24, info = 24;

    memset(at, 0, len);
    memcpy(at, &len, 4);
    at[4] = 3;
    memcpy(at + 6, &header, 2);
    memcpy(at + 8, &mask, 8);
    memcpy(at + 16, &fd, 4);
    if (range) {
        at[24] = 6;
        memcpy(at + 26, &info, 2);
        memcpy(at + 32, &offset, 8);
        memcpy(at + 40, &count, 8);
    }
    return len;
}

/* A descriptor of the data file, as the kernel would open it. */
static int event_fd(struct rig *g)
{
    char path[300];
    int fd;

    snprintf(path, sizeof path, "%s/%s.blob.data", g->dir, g->b->info.id);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
}

static int send_event(struct rig *g, uint64_t offset, uint64_t count)
{
    uint8_t raw[64];
    int fd = event_fd(g);
    size_t len = put_event(raw, PRECONTENT_ACCESS, fd, offset, count, true);

    CHECK_EQ(send(g->fd, raw, len, 0), len);
    return fd;
}

static void send_plain(struct rig *g, uint64_t mask)
{
    uint8_t raw[64];
    size_t len = put_event(raw, mask, event_fd(g), 0, 0, false);

    CHECK_EQ(send(g->fd, raw, len, 0), len);
}

/* No thread fetches but the one that waits here. */
static struct answer receive(struct rig *g)
{
    struct pollfd wait = { .fd = g->fd, .events = POLLIN };
    struct answer a;
    vnd_job job;

    for (int i = 0; poll(&wait, 1, 0) == 0; i++) {
        CHECK(i < 2000);
        if (vnd_job_next(g->e, &job, 1, 10) == 0)
            fix_serve(&g->server, &job);
    }
    CHECK_EQ(recv(g->fd, &a, sizeof a, 0), sizeof a);
    return a;
}

static bool is_silent(struct rig *g, int ms)
{
    struct pollfd wait = { .fd = g->fd, .events = POLLIN };

    return poll(&wait, 1, ms) == 0;
}

static void expect(struct rig *g, int fd, uint32_t response)
{
    struct answer a = receive(g);

    CHECK_EQ(a.fd, fd);
    CHECK_EQ(a.response, response);
}

static void begin(struct rig *g)
{
    char err[VND_ERR_MAX] = "";

    g->p = vnd_precontent_new(g->e, g->group, g->state, err, sizeof err);
    CHECK(g->p);
    CHECK_EQ(vnd_precontent_add(g->p, g->h, -1, err, sizeof err), 0);
    CHECK_EQ(vnd_precontent_start(g->p), 0);
}

static void rig_init(struct rig *g, uint32_t deadline_ms, uint32_t hide_from, uint32_t hide_to)
{
    vnd_engine_cfg cfg = { .read_deadline_ms = deadline_ms };
    char err[VND_ERR_MAX] = "";
    int pair[2];

    memset(g, 0, sizeof *g);
    fix_dir_make(g->dir);
    g->b = fix_blob_new("precontent", CODEC_NONE, CHUNKS, CHUNK);
    g->b->hide_from = hide_from;
    g->b->hide_to = hide_to;
    g->e = vnd_engine_new(&cfg);
    g->s = vnd_store_open(g->e, g->dir, 0, err, sizeof err);
    CHECK(g->s);
    g->h = fix_open(g->s, g->b);
    g->server = (struct fix_server){ .e = g->e, .blob = g->b, .feed_bytes = 1000 };
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    CHECK(fcntl(pair[1], F_SETFL, O_NONBLOCK) == 0);
    g->fd = pair[0];
    g->group = pair[1];
    g->state = vnd_precontent_state();
    CHECK(g->state >= 0);
    begin(g);
}

static void rig_free(struct rig *g)
{
    vnd_precontent_free(g->p);
    vnd_engine_shutdown(g->e);
    blob_close(g->h, g->b);
    vnd_store_free(g->s);
    vnd_engine_free(g->e);
    fix_blob_free(g->b);
    fix_dir_remove(g->dir);
    close(g->fd);
    close(g->group);
    close(g->state);
}

/* Until so many were read. */
static void wait_for_events(struct precontent_state *s, uint32_t n)
{
    uint32_t waits = 0;

    for (int k = 0; waits < n; k++) {
        CHECK(k < 20000);
        usleep(1000);
        waits = 0;
        for (uint32_t i = 0; i < PRECONTENT_SLOTS; i++)
            waits += atomic_load(&s->slots[i].waits);
    }
}

TEST(parse)
{
    struct precontent_event ev;
    uint8_t raw[64] = { 0 };
    uint32_t len;
    uint16_t info;

    CHECK_EQ(precontent_parse(raw, sizeof raw, &ev), 0);
    CHECK_EQ(put_event(raw, PRECONTENT_ACCESS, 7, 4096, 8192, true), 48);
    CHECK_EQ(precontent_parse(raw, sizeof raw, &ev), 48);
    CHECK_EQ(ev.fd, 7);
    CHECK_EQ(ev.mask, PRECONTENT_ACCESS);
    CHECK_EQ(ev.offset, 4096);
    CHECK_EQ(ev.count, 8192);
    for (size_t n = 0; n < 48; n++)
        CHECK_EQ(precontent_parse(raw, n, &ev), 0);
    raw[4] = 2; /* another version of the interface */
    CHECK_EQ(precontent_parse(raw, sizeof raw, &ev), 0);
    raw[4] = 3;
    for (info = 0; info < 200; info++) { /* a record that is shorter than its kind, or longer than the event */
        memcpy(raw + 26, &info, 2);
        CHECK_EQ(precontent_parse(raw, sizeof raw, &ev), info == 24 ? 48 : 0);
    }
    len = 20;
    memcpy(raw, &len, 4);
    CHECK_EQ(precontent_parse(raw, sizeof raw, &ev), 0);
    CHECK_EQ(put_event(raw, PRECONTENT_ACCESS, 7, 0, 0, false), 24);
    CHECK_EQ(precontent_parse(raw, sizeof raw, &ev), 24);
    CHECK_EQ(ev.offset, 0);
    CHECK(ev.count == UINT64_MAX); /* no range: the whole file */
}

TEST(answers)
{
    struct rig g;
    int first, second, third;
    char byte;

    rig_init(&g, 0, 0, 0);
    first = send_event(&g, 0, 4096);
    expect(&g, first, ALLOW);
    CHECK(fcntl(first, F_GETFD) < 0 && errno == EBADF); /* the event's descriptor is closed */
    /* A fetch takes the next 256 KiB along; these are farther off. What is here is answered beside what is not, and that when it comes */
    first = send_event(&g, 8 * CHUNK - 4096, 8192);
    second = send_event(&g, 12 * CHUNK, CHUNK);
    CHECK(is_silent(&g, 30));
    third = send_event(&g, 0, CHUNK);
    CHECK(!is_silent(&g, 20000));
    expect(&g, third, ALLOW);
    struct answer a = receive(&g), b = receive(&g);
    CHECK((a.fd == first && b.fd == second) || (a.fd == second && b.fd == first));
    CHECK_EQ(a.response, ALLOW);
    CHECK_EQ(b.response, ALLOW);
    /* Allowed: its bytes are in the file */
    second = event_fd(&g);
    CHECK_EQ(pread(second, &byte, 1, 12 * CHUNK + 5), 1);
    CHECK_EQ((uint8_t)byte, g.b->plain[12 * CHUNK + 5]);
    close(second);
    /* To the end of the file, and beyond it */
    first = send_event(&g, 15 * CHUNK, CHUNK);
    expect(&g, first, ALLOW);
    first = send_event(&g, 64 * CHUNK, CHUNK);
    expect(&g, first, ALLOW);
    rig_free(&g);
}

TEST(failures)
{
    struct rig g;
    int fd;

    rig_init(&g, 0, 4, 5);
    fd = send_event(&g, 4 * CHUNK, 4096); /* no chunk of the image */
    expect(&g, fd, DENY_EIO);
    fd = send_event(&g, 3 * CHUNK, 2 * CHUNK);
    expect(&g, fd, DENY_EIO);
    atomic_store(&g.server.fail_errno, EIO);
    fd = send_event(&g, 8 * CHUNK, 4096);
    expect(&g, fd, DENY_EIO);
    atomic_store(&g.server.fail_errno, 0);
    fd = send_event(&g, 8 * CHUNK, 4096);
    expect(&g, fd, ALLOW);
    rig_free(&g);
    rig_init(&g, 100, 0, 0);
    fd = send_event(&g, 8 * CHUNK, 4096);
    CHECK(!is_silent(&g, 20000)); /* it did not come in time */
    expect(&g, fd, DENY_EIO);
    rig_free(&g);
}

TEST(another_goes_on)
{
    struct rig g;
    uint8_t raw[64];
    int fds[3];

    rig_init(&g, 0, 0, 0);
    fds[0] = send_event(&g, 2 * CHUNK, 4096);
    fds[1] = send_event(&g, 9 * CHUNK, 4096);
    struct precontent_state *s = precontent_state_map(g.state);
    CHECK(s);
    wait_for_events(s, 2);
    CHECK(is_silent(&g, 0));
    vnd_precontent_free(g.p);
    CHECK(is_silent(&g, 0)); /* unanswered, not refused */
    /* Here the dead process's descriptors are this one's: closed, as by its death */
    close(fds[0]);
    close(fds[1]);
    /* And one that read(2) had given it and no more */
    fds[2] = fds[1] + 40;
    put_event(raw, PRECONTENT_ACCESS, fds[2], 14 * CHUNK, 4096, true);
    memcpy(s->buffer, raw, 48);
    CHECK_EQ(vnd_precontent_reserve(g.state), 3);
    for (int i = 0; i < 3; i++)
        CHECK(fcntl(fds[i], F_GETFD) >= 0); /* no event of ours gets their numbers */
    begin(&g);
    CHECK(is_silent(&g, 30));
    for (int i = 0; i < 3; i++) {
        struct answer a = receive(&g);
        CHECK(a.fd == fds[0] || a.fd == fds[1] || a.fd == fds[2]);
        CHECK_EQ(a.response, ALLOW);
    }
    fds[0] = send_event(&g, 14 * CHUNK, 4096);
    expect(&g, fds[0], ALLOW);
    munmap(s, sizeof *s);
    rig_free(&g);
}

TEST(refused)
{
    char err[VND_ERR_MAX] = "";
    struct rig g;
    int parked, queued;

    rig_init(&g, 0, 0, 0);
    parked = send_event(&g, 2 * CHUNK, 4096);
    struct precontent_state *s = precontent_state_map(g.state);
    wait_for_events(s, 1);
    vnd_precontent_free(g.p);
    queued = send_event(&g, 3 * CHUNK, 4096);
    g.p = vnd_precontent_new(NULL, g.group, g.state, err, sizeof err);
    CHECK(g.p);
    CHECK_EQ(vnd_precontent_refuse(g.p), 2);
    expect(&g, parked, DENY_EIO);
    expect(&g, queued, DENY_EIO);
    CHECK_EQ(vnd_precontent_refuse(g.p), 0);
    CHECK(is_silent(&g, 0));
    close(parked);
    /* Opened and closed: ended, also when only the thread that refuses sees it */
    send_plain(&g, PRECONTENT_OPEN);
    vnd_precontent_refuse(g.p);
    CHECK(!vnd_precontent_ended(g.p));
    send_plain(&g, PRECONTENT_CLOSE);
    vnd_precontent_refuse(g.p);
    CHECK(vnd_precontent_ended(g.p));
    munmap(s, sizeof *s);
    rig_free(&g);
}

TEST(end)
{
    struct rig g;
    struct pollfd over;

    rig_init(&g, 0, 0, 0);
    over = (struct pollfd){ .fd = vnd_precontent_ended_fd(g.p), .events = POLLIN };
    send_plain(&g, PRECONTENT_OPEN);
    send_plain(&g, PRECONTENT_OPEN);
    send_plain(&g, PRECONTENT_CLOSE);
    int fd = send_event(&g, 0, 4096);
    expect(&g, fd, ALLOW);
    CHECK_EQ(poll(&over, 1, 0), 0);
    send_plain(&g, PRECONTENT_CLOSE);
    CHECK_EQ(poll(&over, 1, 20000), 1);
    CHECK(vnd_precontent_ended(g.p));
    rig_free(&g);
}

static void wait_parked(const struct vnd_precontent *p, uint32_t n)
{
    for (int i = 0; atomic_load(&p->counters.parked) < n; i++) {
        CHECK(i < 20000);
        usleep(1000);
    }
}

/* Each mount is a session of its own: what one has asked for does not stand before what another asks for. */
TEST(mounts_take_turns)
{
    struct rig g, other;
    int pair[2];
    vnd_job job;

    rig_init(&g, 0, 0, 0);
    vnd_blob_set_amplify(g.h, 0); /* one job a chunk and its neighbour */
    other = g;
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    CHECK(fcntl(pair[1], F_SETFL, O_NONBLOCK) == 0);
    other.fd = pair[0];
    other.group = pair[1];
    other.state = vnd_precontent_state();
    begin(&other);
    for (uint32_t i = 0; i < 3; i++)
        send_event(&g, (uint64_t)i * 4 * CHUNK, 4096);
    wait_parked(g.p, 3);
    send_event(&other, 14ull * CHUNK, 4096);
    wait_parked(other.p, 1);
    CHECK_EQ(vnd_job_next(g.e, &job, 0, 2000), 0);
    CHECK_EQ(job.coff, 0);
    CHECK_EQ(vnd_job_next(g.e, &job, 0, 2000), 0);
    CHECK_EQ(job.coff, 14ull * CHUNK);
    vnd_precontent_free(other.p);
    close(other.fd);
    close(other.group);
    close(other.state);
    rig_free(&g);
}
