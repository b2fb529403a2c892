/* A process dies under its rings; the next one goes on from the in-flight region. */
#include "device_rig.h"

#include "vhost/inflight.h"

#define MARKED 4

/* The rig with an in-flight region that outlives its device, a session, and MARKED reads in flight. The region. */
static int rig_up_marked(struct rig *r)
{
    uint64_t size;
    int fd = vnd_inflight_create(QUEUES, RING, &size);

    CHECK(fd >= 0);
    rig_up(r, 0);
    stop_rings(r);
    r->st.inflight_fd = fd;
    r->st.inflight_size_bytes = size;
    r->st.inflight_queues = QUEUES;
    r->st.inflight_queue_size = RING;
    r->st.inflight_gen++;
    set_rings(r, false);
    CHECK_EQ(apply(r), 0);
    init_session(r);
    for (uint32_t i = 0; i < MARKED; i++)
        send_read(r, i, i, 4096);
    await_parked(r, MARKED);
    return fd;
}

/* The process dies: the next device gets the region as it was at this moment. The new region. */
static int die(struct rig *r, int fd, bool died)
{
    uint64_t size;
    int copy = vnd_inflight_create(QUEUES, RING, &size);
    uint8_t bytes[2048];

    CHECK(copy >= 0 && size <= sizeof(bytes));
    CHECK(pread(fd, bytes, size, 0) == (ssize_t)size && pwrite(copy, bytes, size, 0) == (ssize_t)size);
    unplug(r);
    close(fd);
    r->dev = vnd_device_new(&(vnd_device_cfg){ .engine = r->fix.e, .vfs = r->vfs, .queue_count = QUEUES }, r->err,
                            sizeof(r->err));
    CHECK(r->dev);
    r->st.inflight_fd = copy;
    r->st.inflight_goes_on = 0xffff;
    r->st.inflight_died = died;
    for (int i = 0; i < QUEUES; i++)
        r->st.rings[i].base = 77; /* where it stood is not known */
    return copy;
}

/* Reaps all that were in flight; each gives what is wanted. */
static void check_answers(struct rig *r, int64_t wanted)
{
    uint32_t slot, seen = 0;

    for (uint32_t i = 0; i < MARKED; i++) {
        CHECK_EQ(reap(r, &slot, NULL), wanted);
        seen |= 1u << slot;
    }
    CHECK_EQ(seen, (1u << MARKED) - 1);
    CHECK_EQ(fg_queue_in_flight(r->q[RQ]), 0);
}

/* What was in flight is served, in the session that INIT began in the process that died. */
TEST(goes_on)
{
    struct rig r;
    int fd = rig_up_marked(&r);

    fd = die(&r, fd, true);
    CHECK_EQ(apply(&r), 0);
    serve_now(&r, 0);
    check_answers(&r, 4096);
    check_read(&r, 0, 9, 4096);
    close(fd);
    rig_down(&r);
}

/* Requests that were in flight at two deaths in a row are not tried a third time; others are served. */
TEST(two_deaths)
{
    struct rig r;
    int fd = rig_up_marked(&r);

    for (int i = 0; i < 2; i++) {
        fd = die(&r, fd, true);
        CHECK_EQ(apply(&r), 0);
    }
    check_answers(&r, -EIO);
    CHECK(fix_said(r.fix.e, VND_CAUSE_IO, "was in flight at two deaths in a row"));
    serve_now(&r, 0);
    for (uint32_t i = 0; i < MARKED; i++) /* the same heads, with other requests */
        check_read(&r, i, i, 4096);
    close(fd);
    rig_down(&r);
}

/* A process that was ended on purpose counts for nothing. */
TEST(ends_are_no_deaths)
{
    struct rig r;
    int fd = rig_up_marked(&r);

    for (int i = 0; i < 4; i++) {
        fd = die(&r, fd, false);
        CHECK_EQ(apply(&r), 0);
    }
    serve_now(&r, 0);
    check_answers(&r, 4096);
    close(fd);
    rig_down(&r);
}

/* A ring that stood still at the death goes on where its base agrees with the region, and begins anew where not. */
TEST(stopped_at_the_death)
{
    struct rig r;

    for (int reboots = 0; reboots < 2; reboots++) {
        int fd = rig_up_marked(&r);
        uint16_t base;

        stop_rings(&r);
        base = r.st.rings[RQ].base;
        CHECK_EQ(base, 1 + MARKED);
        fd = die(&r, fd, true);
        r.st.inflight_goes_on = 0;
        CHECK_EQ(apply(&r), 0); /* the rings stand still yet */
        if (reboots) {
            set_rings(&r, false);
            CHECK_EQ(apply(&r), 0);
            init_session(&r);
        } else {
            r.st.rings[RQ].base = base;
            restart_rings(&r);
        }
        serve_now(&r, 0);
        if (reboots)
            CHECK_EQ(used_idx(&r), 1);
        else
            check_answers(&r, 4096);
        check_read(&r, 0, 9, 4096);
        close(fd);
        rig_down(&r);
    }
}

/* The process died between an answer and its interrupt: the guest is woken, though nothing is left to answer. */
TEST(interrupt_that_was_due)
{
    struct rig r;
    uint64_t count;
    int fd = rig_up_marked(&r);

    serve_now(&r, 0);
    check_answers(&r, 4096);
    fd = die(&r, fd, true);
    CHECK(fcntl(r.call[RQ], F_SETFL, O_NONBLOCK) == 0);
    while (read(r.call[RQ], &count, sizeof(count)) > 0)
        ;
    CHECK_EQ(apply(&r), 0);
    CHECK(read(r.call[RQ], &count, sizeof(count)) == sizeof(count));
    close(fd);
    rig_down(&r);
}
