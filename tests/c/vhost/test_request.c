/* Reads that miss, and what ends or outlives them: wakes, deadlines, stops, reboots, crashes,
 * hang-ups.
 */
#include "device_rig.h"

/* A cold read does not hold up a warm one behind it; answers go out of order. */
TEST(cold_beside_warm)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 0);
    init_session(&r);
    serve_now(&r, 0);
    check_read(&r, 0, 0, 4096);
    fix_hold(&r.fix.server);
    uint64_t parked = stats(&r).parked;
    send_read(&r, 1, 20, 4096);
    await_parked(&r, parked + 1);
    for (int i = 0; i < 50; i++)
        check_read(&r, 2, 0, 4096);
    atomic_store(&r.fix.server.hold, 0);
    CHECK_EQ(reap(&r, &slot, NULL), 4096);
    CHECK_EQ(slot, 1);
    rig_down(&r);
}

/* A stop with a read that never comes: bounded, silent, and answered after the guest goes on. */
TEST(stop_and_continue)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 0);
    init_session(&r);
    send_read(&r, 2, 5, 4096);
    send_read(&r, 3, 9, 4096);
    await_parked(&r, 2);
    int64_t before = now_us();
    stop_rings(&r);
    CHECK(now_us() - before < 1000 * (DRAIN_MS + 2000));
    CHECK_EQ(r.st.rings[RQ].base, 3);
    CHECK_EQ(used_idx(&r), 1);
    serve_now(&r, 0); /* data comes while the guest stands still: it must not be written */
    CHECK_SOON(stats(&r).fetched_chunks != 0);
    vnd_device_state other = r.st; /* passes through the queues' loops */
    other.log_gen++;
    CHECK_EQ(vnd_device_apply(r.dev, &other, DRAIN_MS, r.err, sizeof(r.err)), 0);
    r.st.log_gen = other.log_gen;
    CHECK_EQ(used_idx(&r), 1);
    restart_rings(&r);
    CHECK_EQ(reap(&r, &slot, NULL), 4096);
    CHECK_EQ(reap(&r, &slot, NULL), 4096);
    CHECK_EQ(fg_queue_in_flight(r.q[RQ]), 0);
    check_read(&r, 0, 5, 4096);
    rig_down(&r);
}

/* A reboot drops what was in flight and uses the heads anew. */
TEST(reboot)
{
    struct rig r;

    rig_up(&r, 0);
    init_session(&r);
    for (uint32_t i = 0; i < SLOTS; i++)
        send_read(&r, i, i, 4096);
    await_parked(&r, SLOTS);
    stop_rings(&r);
    set_rings(&r, false);
    CHECK_EQ(apply(&r), 0);
    init_session(&r);
    serve_now(&r, 0);
    for (uint32_t i = 0; i < SLOTS; i++)
        check_read(&r, i, i, 4096);
    rig_down(&r);
}

/* With the dirty log on, nothing can be taken along: EIO. And everything that was written is in the log. */
TEST(stop_for_migration)
{
    struct rig r;
    uint32_t slot;
    uint8_t bits[RAM_BYTES / 4096 / 8];
    int fd = memfd_create("log", MFD_CLOEXEC);

    rig_up(&r, 0);
    CHECK(ftruncate(fd, 4096) == 0);
    init_session(&r);
    r.st.features |= F_LOG_ALL;
    r.st.log_fd = fd;
    r.st.log_size_bytes = sizeof(bits);
    r.st.log_gen++;
    for (int i = 0; i < QUEUES; i++)
        r.st.rings[i].flags = 1;
    CHECK_EQ(apply(&r), 0);
    send_read(&r, 1, 0, 4096);
    await_parked(&r, 1);
    stop_rings(&r);
    CHECK_EQ(used_idx(&r), 2);
    CHECK_EQ(reap(&r, &slot, NULL), -EIO);
    CHECK(pread(fd, bits, sizeof(bits), 0) == sizeof(bits));
    uint64_t header = ring_config(&r, RQ).slot_gpa + fg_slot_bytes(SLOT_DATA) + FG_SLOT_OUT;
    CHECK(bits[header / 4096 / 8] & 1 << header / 4096 % 8);
    CHECK(bits[0x7000 / 4096 / 8] & 1 << 0x7000 / 4096 % 8); /* used ring of queue 1 */
    CHECK_EQ(bits[0x10000 / 4096 / 8], 0);                   /* the other queue's requests: nothing */
    restart_rings(&r);
    serve_now(&r, 0);
    CHECK(pwrite(fd, (uint8_t[64]){ 0 }, 64, 0) == 64);
    check_read(&r, 0, 0, 4096);
    CHECK(pread(fd, bits, sizeof(bits), 0) == sizeof(bits));
    uint64_t data = ring_config(&r, RQ).slot_gpa + fg_page_at(r.q[RQ], 0);
    CHECK(bits[data / 4096 / 8] & 1 << data / 4096 % 8);
    close(fd);
    rig_down(&r);
}

TEST(deadline)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 80);
    init_session(&r);
    int64_t before = now_us();
    for (uint32_t i = 0; i < 3; i++)
        send_read(&r, i, i, 4096);
    for (uint32_t i = 0; i < 3; i++)
        CHECK_EQ(reap(&r, &slot, NULL), -EIO);
    int64_t took = now_us() - before;
    CHECK(took >= 80000 && took < 3000000);
    CHECK_EQ(stats(&r).expired, 3);
    CHECK(fix_said(r.fix.e, VND_CAUSE_DEADLINE, "EIO"));
    serve_now(&r, 0);
    check_read(&r, 0, 0, 4096);
    rig_down(&r);
}

/* A deadline does not run while the guest cannot be answered. */
TEST(deadline_frozen)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 300);
    init_session(&r);
    send_read(&r, 0, 0, 4096);
    await_parked(&r, 1);
    r.st.rings[RQ].enabled = 0;
    CHECK_EQ(apply(&r), 0);
    usleep(400000); /* longer than the deadline, which is what is tested */
    serve_now(&r, 0);
    CHECK_SOON(stats(&r).fetched_chunks != 0);
    CHECK_EQ(used_idx(&r), 1);
    r.st.rings[RQ].enabled = 1;
    CHECK_EQ(apply(&r), 0);
    CHECK_EQ(reap(&r, &slot, NULL), 4096);
    rig_down(&r);
}

/* A blank region of the front-end: the base it sets is obeyed. */
TEST(blank_inflight)
{
    struct rig r;
    uint64_t size;
    int fd = vnd_inflight_create(QUEUES, RING, &size);

    rig_up(&r, 0);
    stop_rings(&r);
    r.st.inflight_fd = fd;
    r.st.inflight_goes_on = 0xffff;
    r.st.inflight_size_bytes = size;
    r.st.inflight_queues = QUEUES;
    r.st.inflight_queue_size = RING;
    r.st.inflight_gen++;
    set_rings(&r, false);
    send_init(&r); /* lies before the base: never served */
    r.st.rings[RQ].base = 1;
    CHECK_EQ(apply(&r), 0);
    CHECK_EQ(apply(&r), 0);
    CHECK_EQ(used_idx(&r), 0);
    stop_rings(&r);
    CHECK_EQ(r.st.rings[RQ].base, 1);
    close(fd);
    rig_down(&r);
}

/* A read into more ranges than a slot holds waits like any other; beyond the device's budget it fails, alone. */
TEST(many_ranges)
{
    struct rig r;
    struct fuse_read_in in = { .offset = 3 * CHUNK, .size = 60 * 1024 };
    fg_segment seg[62];
    uint64_t cookie;
    uint32_t len;

    rig_up(&r, 0);
    init_session(&r);
    uint64_t gpa = ring_config(&r, RQ).slot_gpa;
    uint8_t *at = fg_ram_at(r.ram, gpa, 256 << 10);
    uint32_t n = make(&r, at, FUSE_OP_READ, 1ull << 48 | FILE_INO, &in, sizeof(in));
    seg[0] = (fg_segment){ gpa, n, 0 };
    seg[1] = (fg_segment){ gpa + 4096, 16, 1 };
    for (uint32_t i = 0; i < 60; i++)
        seg[2 + i] = (fg_segment){ gpa + 8192 + 2048 * i, 1024, 1 };
    CHECK(fg_queue_add(r.q[RQ], seg, 62, gpa + 0x40000, 1) >= 0);
    fg_queue_publish(r.q[RQ]);
    await_parked(&r, 1);
    CHECK(atomic_load(&r.dev->common.segs_bytes) > 0);
    serve_now(&r, 0);
    CHECK_EQ(fg_queue_wait(r.q[RQ], WAIT_MS), 0);
    CHECK_EQ(fg_queue_pop(r.q[RQ], &cookie, &len), 1);
    CHECK_EQ(len, 16 + 60 * 1024);
    for (uint32_t i = 0; i < 60; i++)
        CHECK(memcmp(at + 8192 + 2048 * i, r.blob->plain + 3 * CHUNK + 1024 * i, 1024) == 0);
    CHECK_EQ(atomic_load(&r.dev->common.segs_bytes), 0);

    atomic_store(&r.fix.server.hold, 1);
    atomic_store(&r.dev->common.segs_bytes, QUEUE_SEGS_BUDGET);
    in.offset = 25 * CHUNK;
    make(&r, at, FUSE_OP_READ, 1ull << 48 | FILE_INO, &in, sizeof(in));
    CHECK(fg_queue_add(r.q[RQ], seg, 62, gpa + 0x40000, 1) >= 0);
    fg_queue_publish(r.q[RQ]);
    CHECK_EQ(fg_queue_wait(r.q[RQ], WAIT_MS), 0);
    CHECK_EQ(fg_queue_pop(r.q[RQ], &cookie, &len), 1);
    CHECK_EQ(len, 16);
    struct fuse_out_header h;
    memcpy(&h, at + 4096, sizeof(h));
    CHECK_EQ(h.error, -EIO);
    CHECK_EQ(atomic_load(&r.dev->common.segs_bytes), QUEUE_SEGS_BUDGET);
    check_read(&r, 1, 3, 4096);
    rig_down(&r);
}

/* Wakes race with everything that ends a request: hang-up, reset, deadline. */
TEST(races)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 20);
    serve_now(&r, EIO); /* chunks never come, every job wakes its readers */
    for (int round = 0; round < 60; round++) {
        init_session(&r);
        for (uint32_t i = 0; i < SLOTS; i++)
            send_read(&r, i, (i * 7 + (uint32_t)round) % CHUNKS, 4096);
        switch (round % 3) {
        case 0:
            usleep((useconds_t)(round * 37 % 1000));
            unplug(&r);
            plug(&r);
            break;
        case 1:
            for (uint32_t i = 0; i < SLOTS; i++)
                CHECK_EQ(reap(&r, &slot, NULL), -EIO);
            break;
        default:
            vnd_device_reset(r.dev);
            stop_rings(&r);
            set_rings(&r, false);
            CHECK_EQ(apply(&r), 0);
        }
    }
    rig_down(&r);
}

/* Another in-flight region while the guest stands still: what is held is marked in the old one, so it is given up. Kept, it
 * would be answered without a mark, and a crash would lose it. */
TEST(another_inflight_region_drops_what_is_held)
{
    struct rig r;
    uint64_t size;
    uint32_t slot;

    rig_up(&r, 0);
    init_session(&r);
    send_read(&r, 2, 5, 4096);
    await_parked(&r, 1);
    stop_rings(&r);
    CHECK_EQ(used_idx(&r), 1);
    int fd = vnd_inflight_create(QUEUES, RING, &size);
    r.st.inflight_fd = fd;
    r.st.inflight_goes_on = 0xffff;
    r.st.inflight_size_bytes = size;
    r.st.inflight_queues = QUEUES;
    r.st.inflight_queue_size = RING;
    r.st.inflight_gen++;
    restart_rings(&r); /* the rings stand where they stood */
    send_read(&r, 4, 5, 4096);
    await_parked(&r, 2);
    serve_now(&r, 0);
    CHECK_EQ(reap(&r, &slot, NULL), 4096);
    CHECK_EQ(slot, 4);
    for (uint32_t i = 0; i < 4; i++)
        check_read(&r, 5, i, 4096);
    CHECK_EQ(fg_queue_in_flight(r.q[RQ]), 1);
    close(fd);
    rig_down(&r);
}

/* The memory that a reply went to is lost while it is made: the reply is not published, for it is zeroes. */
TEST(nothing_is_published_once_memory_is_lost)
{
    struct rig r;

    rig_up(&r, 0);
    init_session(&r);
    send_read(&r, 1, 3, 4096);
    await_parked(&r, 1);
    uint16_t stood = used_idx(&r);
    /* The second region, where the queue's requests lie; its rings are in the first. */
    CHECK(ftruncate(fg_ram_fd(r.ram), (off_t)regions[1].file_offset) == 0);
    serve_now(&r, 0);
    CHECK(err_signalled(r.errfd[RQ]));
    CHECK_EQ(used_idx(&r), stood);
    CHECK(fix_said(r.fix.e, VND_CAUSE_IO, "truncated"));
    unplug(&r);
    CHECK(ftruncate(fg_ram_fd(r.ram), 0x100000 + RAM_BYTES * 3 / 2) == 0);
    rig_down(&r);
}
