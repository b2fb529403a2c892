/* What a front-end may set and change on a device that serves, and what a guest may break. */
#include <dirent.h>
#include <sys/resource.h>

#include "device_rig.h"

TEST(reads)
{
    struct rig r;

    rig_up(&r, 0);
    init_session(&r);
    serve_now(&r, 0);
    check_read(&r, 0, 0, CHUNK);
    check_read(&r, 1, 0, 4096);
    for (uint32_t i = 0; i < 100; i++)
        check_read(&r, i % SLOTS, i % (CHUNKS - 1), 4096);
    CHECK(stats(&r).hits > 60);
    rig_down(&r);
}

/* Kicks before enable; nothing is looked at until then, all of it then without another kick. */
TEST(kick_before_enable)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 0);
    r.st.rings[RQ].enabled = 0;
    CHECK_EQ(apply(&r), 0);
    send_init(&r);
    fg_queue_kick(r.q[RQ]);
    CHECK_EQ(apply(&r), 0); /* passes through the queue's loop */
    CHECK_EQ(used_idx(&r), 0);
    r.st.rings[RQ].enabled = 1;
    CHECK_EQ(apply(&r), 0);
    CHECK_EQ(reap(&r, &slot, NULL), 64);
    rig_down(&r);
}

/* A request that misses is answered through the call fd that is there by then; the new one is signalled at once. */
TEST(call_swap)
{
    struct rig r;
    uint32_t slot;
    uint64_t n;

    rig_up(&r, 0);
    init_session(&r);
    send_read(&r, 0, 3, 4096);
    await_parked(&r, 1);
    int fd = eventfd(0, EFD_CLOEXEC);
    close(r.call[RQ]); /* the old one is ours to close: the device has its own */
    r.call[RQ] = fd;
    r.st.rings[RQ].call_fd = fd;
    r.st.call_gen[RQ]++;
    CHECK_EQ(apply(&r), 0);
    CHECK(read(fd, &n, sizeof(n)) == sizeof(n));
    fg_queue_set_call(r.q[RQ], fd);
    serve_now(&r, 0);
    CHECK_EQ(reap(&r, &slot, NULL), 4096);
    check_read(&r, 0, 3, 4096);
    rig_down(&r);
}

struct swapper {
    struct rig *r;
    _Atomic int stop, calls;
};

static void *swap_main(void *arg)
{
    struct swapper *s = arg;

    while (!atomic_load(&s->stop)) {
        set_memory(s->r);
        CHECK_EQ(apply(s->r), 0);
        atomic_fetch_add(&s->calls, 1);
    }
    return NULL;
}

/* Memory is replaced all the time while reads run. */
TEST(memory_swap)
{
    struct rig r;
    struct swapper s = { .r = &r };
    pthread_t t;

    rig_up(&r, 0);
    init_session(&r);
    serve_now(&r, 0);
    CHECK(pthread_create(&t, NULL, swap_main, &s) == 0);
    for (uint32_t i = 0; i < 300 || atomic_load(&s.calls) < 30; i++)
        check_read(&r, i % SLOTS, i % (CHUNKS - 1), 4096);
    atomic_store(&s.stop, 1);
    pthread_join(t, NULL);
    rig_down(&r);
}

/* Memory without the rings: the queue pauses; with them again it goes on, even for what waited meanwhile. */
TEST(memory_gone)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 0);
    init_session(&r);
    r.st.region_count = 0;
    r.st.region_gen++;
    CHECK_EQ(apply(&r), 0);
    send_read(&r, 0, 0, 4096);
    serve_now(&r, 0);
    CHECK_EQ(apply(&r), 0);
    CHECK_EQ(used_idx(&r), 1);
    set_memory(&r);
    CHECK_EQ(apply(&r), 0);
    CHECK_EQ(reap(&r, &slot, NULL), 4096);
    rig_down(&r);
}

/* The guest breaks a queue: err fd, one line, that queue only, and a restart heals it. */
TEST(broken_queue)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 0);
    init_session(&r);
    send_read(&r, 0, 0, 4096);
    await_parked(&r, 1);
    /* The parked request's head again. */
    fg_queue *q = r.q[RQ];
    q->avail->ring[q->avail_idx % RING] = q->avail->ring[(uint16_t)(q->avail_idx - 1) % RING];
    atomic_store(&q->avail->idx, (uint16_t)(q->avail_idx + 1));
    fg_queue_kick(q);
    CHECK(err_signalled(r.errfd[RQ]));
    CHECK(fix_said(r.fix.e, VND_CAUSE_GUEST, "offered again"));
    CHECK_EQ(stats(&r).ring_errors, 1);
    serve_now(&r, 0);
    uint16_t stood = used_idx(&r);
    /* The other queue lives: a FORGET is consumed. */
    uint8_t buf[64];
    uint64_t one = 1, cookie;
    uint32_t len;
    CHECK_EQ(fg_submit(r.q[0], 0, buf, make(&r, buf, FUSE_OP_FORGET, 2, &one, 8), -1, 0), 0);
    CHECK_EQ(fg_queue_wait(r.q[0], WAIT_MS), 0);
    CHECK_EQ(fg_queue_pop(r.q[0], &cookie, &len), 1);
    CHECK_EQ(len, 0);
    CHECK_EQ(used_idx(&r), stood);
    stop_rings(&r);
    set_rings(&r, false);
    CHECK_EQ(apply(&r), 0);
    init_session(&r);
    check_read(&r, 0, 0, 4096);
    (void)slot;
    rig_down(&r);
}

/* A read whose pages lie nowhere fails alone. */
TEST(hole)
{
    struct rig r;
    struct fuse_read_in in = { .offset = 0, .size = 4096 };
    uint8_t *req;
    uint64_t cookie;
    uint32_t len;

    rig_up(&r, 0);
    init_session(&r);
    serve_now(&r, 0);
    check_read(&r, 0, 0, 4096);
    uint64_t gpa = ring_config(&r, RQ).slot_gpa;
    req = fg_ram_at(r.ram, gpa, 4096);
    uint32_t n = make(&r, req, FUSE_OP_READ, 1ull << 48 | FILE_INO, &in, sizeof(in));
    fg_segment bad_out[] = { { gpa, n, 0 }, { RAM_BYTES * 8, 4096 + 16, 1 } };
    fg_segment bad_in[] = { { RAM_BYTES * 8, n, 0 }, { gpa + 4096, 4096 + 16, 1 } };
    fg_segment bad_data[] = { { gpa, n, 0 }, { gpa + 4096, 16, 1 }, { RAM_BYTES * 8, 4096, 1 } };
    fg_segment *bad[] = { bad_out, bad_in, bad_data };
    for (int i = 0; i < 3; i++) {
        CHECK(fg_queue_add(r.q[RQ], bad[i], i == 2 ? 3 : 2, 0, 77) >= 0);
        fg_queue_publish(r.q[RQ]);
        CHECK_EQ(fg_queue_wait(r.q[RQ], WAIT_MS), 0);
        CHECK_EQ(fg_queue_pop(r.q[RQ], &cookie, &len), 1);
        CHECK_EQ(len, i == 2 ? 16 : 0); /* there is room for an error in the last */
    }
    check_read(&r, 1, 0, 4096);
    CHECK_EQ(stats(&r).ring_errors, 0);
    rig_down(&r);
}

TEST(truncated)
{
    struct rig r;

    rig_up(&r, 0);
    init_session(&r);
    CHECK(ftruncate(fg_ram_fd(r.ram), 0x100000 + 0x4000) == 0); /* rings of queue 1 and all data */
    uint64_t one = 1;
    CHECK(write(r.kick[RQ], &one, 8) == 8);
    CHECK(err_signalled(r.errfd[RQ]));
    CHECK(fix_said(r.fix.e, VND_CAUSE_IO, "truncated"));
    unplug(&r);
    CHECK(ftruncate(fg_ram_fd(r.ram), 0x100000 + RAM_BYTES * 3 / 2) == 0);
    fg_ram_free(r.ram);
    r.ram = fg_ram_new(regions, 2, 0);
    plug(&r); /* the daemon serves the next front-end */
    init_session(&r);
    serve_now(&r, 0);
    check_read(&r, 0, 0, 4096);
    rig_down(&r);
}

/* A ring that was started without a kick fd is looked at all the same. */
TEST(no_kick_fd)
{
    struct rig r;
    uint32_t slot;

    rig_up(&r, 0);
    stop_rings(&r);
    set_rings(&r, false);
    for (int i = 0; i < QUEUES; i++)
        r.st.rings[i].kick_fd = -1;
    CHECK_EQ(apply(&r), 0);
    send_init(&r);
    CHECK_EQ(reap(&r, &slot, NULL), 64);
    rig_down(&r);
}

/* What the front-end asks for and cannot have, leaves the device as it was. */
TEST(refused)
{
    struct rig r;

    rig_up(&r, 0);
    init_session(&r);
    serve_now(&r, 0);
    vnd_device_state good = r.st;
    r.st.features |= 1ull << 40;
    CHECK_EQ(apply(&r), -EINVAL);
    r.st = good;
    r.st.regions[1].gpa = 4096;
    r.st.region_gen++;
    CHECK_EQ(apply(&r), -EINVAL);
    r.st = good;
    check_read(&r, 0, 0, 4096);
    stop_rings(&r);
    good = r.st;
    set_rings(&r, false);
    r.st.rings[RQ].num = 12;
    CHECK_EQ(apply(&r), -EINVAL);
    r.st.rings[RQ].num = RING;
    r.st.rings[RQ].used_addr = 0x1000;
    CHECK_EQ(apply(&r), -EFAULT);
    CHECK(err_signalled(r.errfd[RQ]));
    CHECK_EQ(stats(&r).ring_errors, 1);
    set_memory(&r);
    CHECK_EQ(apply(&r), 0); /* tries again, fails again: no news */
    CHECK_EQ(stats(&r).ring_errors, 1);
    set_rings(&r, false);
    int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    r.st.rings[RQ].kick_fd = file; /* a plain file cannot be waited on */
    CHECK_EQ(apply(&r), -EPERM);
    close(file);
    set_rings(&r, false);
    CHECK_EQ(apply(&r), 0);
    check_read(&r, 0, 1, 4096);
    rig_down(&r);
}

static void set_descriptor_limit(rlim_t n)
{
    struct rlimit now;

    CHECK(getrlimit(RLIMIT_NOFILE, &now) == 0);
    now.rlim_cur = n;
    CHECK(setrlimit(RLIMIT_NOFILE, &now) == 0);
}

/* A change that needs a descriptor where none is left changes nothing: the queues use their memory on. */
TEST(no_descriptors_left)
{
    struct rig r;

    rig_up(&r, 0);
    init_session(&r);
    serve_now(&r, 0);
    check_read(&r, 0, 0, 4096);
    vnd_device_state good = r.st;
    for (int i = 0; i < 3; i++) { /* kick, call, err fd of the second ring */
        r.st.region_count = 0;
        r.st.region_gen = good.region_gen + 1;
        uint32_t *gens[] = { r.st.kick_gen, r.st.call_gen, r.st.err_gen };
        gens[i][RQ]++;
        set_descriptor_limit(3);
        CHECK_EQ(apply(&r), -EMFILE);
        set_descriptor_limit(1024);
        r.st = good;
        check_read(&r, 1, 1, 4096);
        check_read(&r, 0, 0, 4096);
    }
    rig_down(&r);
}

/* A memfd may be as long as all of the daemon's address space. */
TEST(too_much_memory)
{
    struct rig r;
    int fd = memfd_create("large", MFD_CLOEXEC);

    rig_up(&r, 0);
    init_session(&r);
    serve_now(&r, 0);
    uint64_t mapped = atomic_load(&r.fix.e->guest_bytes);
    uint32_t maps = atomic_load(&r.fix.e->guest_maps);
    CHECK_EQ(mapped, RAM_BYTES);
    CHECK_EQ(maps, 2);
    vnd_device_state good = r.st;
    CHECK(ftruncate(fd, GUESTMEM_BYTES_MAX + 4096) == 0);
    r.st.region_count = 3;
    r.st.region_gen++;
    r.st.regions[2] = (vnd_region){
        .gpa = 1ull << 44, .user_addr = 1ull << 60, .size_bytes = GUESTMEM_BYTES_MAX - RAM_BYTES + 4096, .fd = fd
    };
    CHECK_EQ(apply(&r), -E2BIG);
#if !defined(__SANITIZE_THREAD__) /* whose own maps leave no such range of addresses */
    r.st.regions[2].size_bytes = GUESTMEM_BYTES_MAX - RAM_BYTES;
    CHECK_EQ(apply(&r), 0);
#endif
    /* The dirty log is a file of the front-end's too. */
    r.st.log_fd = fd;
    r.st.log_size_bytes = GUESTLOG_BYTES_MAX + 1;
    r.st.log_gen++;
    CHECK_EQ(apply(&r), -E2BIG);
    r.st.log_gen--;
    r.st.log_fd = -1;
    good.region_gen = r.st.region_gen + 1;
    r.st = good;
    CHECK_EQ(apply(&r), 0);
    CHECK_EQ(atomic_load(&r.fix.e->guest_bytes), mapped);
    /* Other front-ends have nearly all. */
    atomic_fetch_add(&r.fix.e->guest_bytes, GUESTMEM_ALL_BYTES_MAX - mapped - 4096);
    r.st.region_count = 3;
    r.st.region_gen++;
    r.st.regions[2] = (vnd_region){ .gpa = 1ull << 44, .user_addr = 1ull << 60, .size_bytes = 8192, .fd = fd };
    CHECK_EQ(apply(&r), -ENOSPC);
    r.st.regions[2].size_bytes = 4096;
    CHECK_EQ(apply(&r), 0);
    atomic_fetch_sub(&r.fix.e->guest_bytes, GUESTMEM_ALL_BYTES_MAX - mapped - 4096);
    check_read(&r, 0, 0, 4096);
    unplug(&r);
    CHECK_EQ(atomic_load(&r.fix.e->guest_bytes), 0);
    CHECK_EQ(atomic_load(&r.fix.e->guest_maps), 0);
    close(fd);
    rig_down(&r);
}

/* A smaller in-flight region would have no room for the heads of a ring that runs. */
TEST(inflight_under_running_rings)
{
    struct rig r;
    uint64_t size;
    int fd = vnd_inflight_create(QUEUES, RING / 4, &size);

    rig_up(&r, 0);
    init_session(&r);
    serve_now(&r, 0);
    vnd_device_state good = r.st;
    r.st.inflight_fd = fd;
    r.st.inflight_goes_on = 0xffff;
    r.st.inflight_size_bytes = size;
    r.st.inflight_queues = QUEUES;
    r.st.inflight_queue_size = RING / 4;
    r.st.inflight_gen++;
    CHECK_EQ(apply(&r), -EBUSY);
    r.st = good;
    for (uint32_t i = 0; i < SLOTS; i++)
        check_read(&r, i, i, 4096);
    close(fd);
    rig_down(&r);
}

static uint64_t count_waits(const char *thread_name)
{
    char path[300], line[256];
    DIR *tasks = opendir("/proc/self/task");
    unsigned long long n = 0;

    for (struct dirent *e; (e = readdir(tasks)) != NULL;) {
        snprintf(path, sizeof(path), "/proc/self/task/%s/status", e->d_name);
        FILE *f = fopen(path, "r");
        bool mine = false;

        while (f && fgets(line, sizeof(line), f)) {
            if (strncmp(line, "Name:", 5) == 0)
                mine = strstr(line, thread_name) != NULL;
            if (mine)
                sscanf(line, "voluntary_ctxt_switches: %llu", &n);
        }
        if (f)
            fclose(f);
    }
    closedir(tasks);
    return n;
}

/* A ring without a kick fd that is not used is looked at ever less often: twelve looks take 200 ms at least, where each
 * after a millisecond would take 12. */
TEST(idle_ring_without_kick_fd)
{
    struct rig r;

    rig_up(&r, 0);
    stop_rings(&r);
    set_rings(&r, false);
    for (int i = 0; i < QUEUES; i++)
        r.st.rings[i].kick_fd = -1;
    CHECK_EQ(apply(&r), 0);
    init_session(&r);
    int64_t began = now_us();
    uint64_t first = count_waits("vnd-queue1");
    CHECK(first > 0);
    CHECK_SOON(count_waits("vnd-queue1") >= first + 12);
    CHECK(now_us() - began >= 200000);
    serve_now(&r, 0);
    check_read(&r, 0, 0, 4096); /* and is looked at all the same */
    rig_down(&r);
}
