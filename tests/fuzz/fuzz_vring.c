/* fuzz_vring.c -- the guest writes what it likes: descriptors, indirect tables, indices. Whatever is accepted must lie
 * within the limits that the rest relies on. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "vhost/guestmem.h"
#include "vhost/vring.h"

#define RING_NUM 16u
#define REGION 8192u
#define USER 0x10000u

/* Two regions with a hole between; rings at the start of the first. */
static struct guestmem *mem;
static uint8_t *first, *second;
static struct vring ring;
static _Atomic bool lost;
static struct vring_chain chain;

static void set_up(void)
{
    vnd_region r[2] = { { .gpa = 0, .size_bytes = REGION, .user_addr = USER },
                        { .gpa = 2 * REGION, .size_bytes = REGION, .user_addr = 8 * USER, .mmap_offset = REGION } };
    struct failure failure = { 0 };
    uint64_t got;
    uint32_t hint = 0;
    int fd = memfd_create("guest", MFD_CLOEXEC);

    if (fd < 0 || ftruncate(fd, 2 * REGION) != 0)
        abort();
    r[0].fd = r[1].fd = fd;
    if (guestmem_new(r, 2, &(struct map_request){ .lost = &lost }, &mem, &failure) != 0 ||
        vring_resolve(&ring, mem, RING_NUM, USER, USER + 0x200, USER + 0x400) != 0)
        abort();
    first = guestmem_host(mem, &hint, 0, REGION, &got);
    second = guestmem_host(mem, &hint, 2 * REGION, REGION, &got);
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    size_t part = size < REGION ? size : REGION;
    uint32_t hint = 0;
    const char *why;
    uint16_t head;

    if (mem == NULL)
        set_up();
    memset(first, 0, REGION);
    memcpy(first, data, part);
    memcpy(second, data + size - part, part);
    ring.event_idx = size & 1;
    ring.last_avail = ring.used_idx = 0;
    ring.n_staged = 0;
    for (int pending; (pending = vring_pending(&ring)) > 0;) {
        if (pending > (int)RING_NUM)
            abort();
        if (vring_next(&ring, &head) != 0)
            break;
        if (head >= RING_NUM)
            abort();
        if (vring_walk(&ring, mem, &hint, head, &chain, &why) == 0) {
            uint64_t in = 0, out = 0;

            if (chain.n_in + chain.n_out > VRING_CHAIN_MAX)
                abort();
            for (uint32_t i = 0; i < chain.n_in + chain.n_out; i++) {
                const struct vring_seg *s = &chain.seg[i];

                if (s->len == 0 || s->gpa + s->len < s->gpa)
                    abort();
                *(i < chain.n_in ? &in : &out) += s->len;
            }
            if (in != chain.in_bytes || out != chain.out_bytes)
                abort();
        }
        vring_stage(&ring, head, 0);
        vring_publish(&ring);
        vring_disarm(&ring);
        vring_arm(&ring);
    }
    return 0;
}
