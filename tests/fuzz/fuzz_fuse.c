/* fuzz_fuse.c -- any bytes as a conversation: requests of every opcode, length and reply room, between mounts
 * that come and go. The reply memory is exactly as long as told.
 *
 * Input: byte 0 bit 0 = session kind, bit 1 = INIT first; then records of
 *   u8 opcode, u8 what (below), u16 reply room, u8 body bytes, body.
 * what: bits 0-2 choose the nodeid (6: the body's first 8 bytes, 7: nonsense), bit 3 a wrong in.len, bit 4 an
 * old generation, bits 5-7 = 7 a mount or unmount instead.
 */
#include "../c/fake_req.h"
#include "../c/v6_image.h"
#include "fs/vfs.h"

static vnd_engine *engine;
static vnd_rafs *image, *second;
static struct img_nids nids;
static struct fuse_worker worker; /* its scratch is a megabyte: once */

static vnd_rafs *open_tree(void)
{
    char path[32], err[VND_ERR_MAX];
    static struct img m;
    int cause, fd;

    img_init(&m, 0x35);
    nids = img_tree(&m);
    fd = img_fd(m.b, sizeof(m.b), path);
    vnd_rafs *r = vnd_rafs_open(engine, path, NULL, NULL, &cause, err, sizeof(err));

    close(fd);
    return r;
}

static uint32_t room_of(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8;
}

static void check_reply(const struct fake_req *f, enum req_verdict verdict)
{
    struct fuse_out_header h;

    if (verdict == REQ_NOREPLY) {
        if (f->r.out_len != 0)
            __builtin_trap();
        return;
    }
    if (verdict != REQ_REPLY || f->r.out_len < 16 || f->r.out_len > f->r.out_cap)
        __builtin_trap();
    memcpy(&h, f->out, sizeof(h));
    if (h.len != f->r.out_len || h.unique != 77 || h.error > 0 || h.error <= -512 || (h.error && h.len != 16))
        __builtin_trap();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuse_init_in init = { .major = 7, .minor = 38, .flags = ~0u };
    struct fake_req f;

    if (!engine) {
        engine = vnd_engine_new(&(vnd_engine_cfg){ 0 });
        image = open_tree();
        second = open_tree();
        if (!image || !second)
            abort();
    }
    if (size < 1)
        return 0;
    vnd_vfs *vfs = vnd_vfs_new(engine, data[0] & 1);
    struct fuse_session *s = fuse_session_new(engine, vfs);

    if (!worker.scratch && fuse_worker_init(&worker, engine, vfs))
        abort();
    vnd_vfs_mount_rafs(vfs, data[0] & 4 ? "/a/b" : "/", image);
    if (data[0] & 2) {
        fake_fill(&f, FUSE_OP_INIT, 0, &init, sizeof(init), 80);
        check_reply(&f, fuse_session_serve(s, &worker, &f.r));
        fake_done(&f);
    }
    for (size_t at = 1; size - at >= 5;) {
        const uint64_t nodes[8] = { 1,
                                    1ull << 48 | nids.file,
                                    1ull << 48 | nids.big,
                                    1ull << 48 | nids.xfile,
                                    2,
                                    1ull << 48 | nids.sub,
                                    0,
                                    UINT64_MAX };
        uint8_t op = data[at], what = data[at + 1];
        uint32_t room = room_of(data + at + 2), len = data[at + 4];
        uint64_t nodeid = nodes[what & 7];

        at += 5;
        if (len > size - at)
            len = (uint32_t)(size - at);
        if (what >> 5 == 7) {
            if (vnd_vfs_mount_rafs(vfs, op & 1 ? "/sub/deep" : "/c", second))
                vnd_vfs_umount(vfs, op & 1 ? "/sub/deep" : "/c");
            at += len;
            continue;
        }
        if ((what & 7) == 6 && len >= 8)
            memcpy(&nodeid, data + at, 8);
        fake_fill(&f, op, nodeid, data + at, len, room);
        f.r.in.len += what >> 3 & 1;
        f.r.session_gen = fuse_session_gen(s) - (what >> 4 & 1);
        check_reply(&f, fuse_session_serve(s, &worker, &f.r));
        fake_done(&f);
        at += len;
    }
    fuse_session_free(s);
    vnd_vfs_free(vfs);
    return 0;
}
