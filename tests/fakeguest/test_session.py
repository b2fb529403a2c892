"""The FUSE session as a guest kernel uses it, on an image."""

import contextlib
import errno
import os
import stat
from pathlib import Path

import pytest

from tests.fakeguest.support import FILES, LINKS, MANY, Image, pattern
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.fuse_client import ROOT, DirEntry, FuseClient
from virtiofsd_nydus.vmm.servers import NydusDaemon

EROFS_OPS = {
    "SETATTR": (4, bytes(88), 104),
    "SYMLINK": (6, b"a\0b\0", 128),
    "MKNOD": (8, bytes(16) + b"a\0", 128),
    "MKDIR": (9, bytes(8) + b"a\0", 128),
    "UNLINK": (10, b"data\0", 0),
    "RMDIR": (11, b"sub\0", 0),
    "RENAME": (12, b"\1" + bytes(7) + b"data\0b\0", 0),
    "LINK": (13, b"\1" + bytes(7) + b"a\0", 128),
    "WRITE": (16, bytes(40), 8),
    "SETXATTR": (21, bytes(8) + b"user.a\0", 0),
    "REMOVEXATTR": (24, b"user.a\0", 0),
    "CREATE": (35, bytes(16) + b"a\0", 144),
    "RENAME2": (45, b"\1" + bytes(15) + b"data\0b\0", 0),
    "FALLOCATE": (43, bytes(32), 0),
    "COPY_FILE_RANGE": (47, bytes(56), 8),
    "TMPFILE": (51, bytes(16), 144),
}


def listing(fuse: FuseClient, node: int, size: int, plus: bool) -> list[DirEntry]:
    return list(fuse.readdir(node, plus, size))


def check_tree(fuse: FuseClient, node: int, place: Path) -> int:
    """Compares a directory and all below it with the source tree: entries seen."""
    entries = {entry.name.decode(): entry for entry in fuse.readdir(node)}
    assert set(entries) == {".", "..", *(child.name for child in place.iterdir())}
    seen = 0
    for child in place.iterdir():
        there, status = entries[child.name], child.lstat()
        assert there.entry is not None and there.entry.entry_valid_s > 0
        attr = there.entry.attr
        assert attr == fuse.lookup(node, child.name.encode()).attr == fuse.getattr(there.entry.nodeid)
        assert there.type == stat.S_IFMT(status.st_mode) >> 12
        assert (attr.mode, attr.uid, attr.gid, attr.mtime) == (
            status.st_mode,
            status.st_uid,
            status.st_gid,
            int(status.st_mtime),
        )
        seen += 1
        if child.is_symlink():
            assert fuse.readlink(there.entry.nodeid) == os.fsencode(child.readlink())
        elif child.is_dir():
            seen += check_tree(fuse, there.entry.nodeid, child)
        else:
            assert (attr.size, attr.nlink) == (status.st_size, status.st_nlink)
            assert fuse.read_all(there.entry.nodeid) == child.read_bytes()
    return seen


def test_whole_tree_is_the_source(guest: FakeGuest, image: Image) -> None:
    assert check_tree(guest.fuse, ROOT, image.tree) == len(FILES) + len(LINKS) + MANY + 4


def test_init_reply(daemon: NydusDaemon) -> None:
    with FakeGuest(daemon.socket_path) as guest:
        reply = guest.fuse.init()
        assert reply.major == 7 and 31 <= reply.minor <= 38
        assert reply.max_pages == 256 and reply.max_write == 4096 and reply.max_background >= 256
        offered = 0xB_7BFF_FFFB
        assert reply.flags & ~offered == 0, "only what was offered"
        for bit in (0, 13, 14, 15, 18, 20, 22, 23, 25):  # 20: what ACLs say is obeyed
            assert reply.flags & 1 << bit, bit
        for bit in (3, 5, 12, 16, 26, 27, 28, 32, 33):
            assert not reply.flags & 1 << bit, bit


def test_init_of_a_newer_major_is_asked_again(daemon: NydusDaemon) -> None:
    with FakeGuest(daemon.socket_path) as guest:
        assert guest.fuse.init(major=8, minor=0).major == 7
        assert guest.fuse.init().major == 7
        guest.fuse.getattr(ROOT)


def test_absent_name_is_cached(guest: FakeGuest) -> None:
    entry = guest.fuse.lookup(ROOT, b"nothing-here")
    assert entry.nodeid == 0 and entry.entry_valid_s > 0


@pytest.mark.parametrize("plus", [True, False])
def test_listing_at_every_size(guest: FakeGuest, plus: bool) -> None:
    """The boundary of a READDIRPLUS reply: whatever the buffer, each entry comes once, whole, in the same order."""
    node = guest.fuse.walk("many").nodeid
    whole = [entry.name for entry in listing(guest.fuse, node, 65536, plus)]
    assert len(set(whole)) == len(whole) == MANY + 2
    for size in (232, 233, 239, 240, 300, 511, 1000, 4095, 4096, 4097):
        assert [entry.name for entry in listing(guest.fuse, node, size, plus)] == whole, size


def test_listing_too_small_for_an_entry(guest: FakeGuest) -> None:
    node = guest.fuse.walk("many").nodeid
    for size in (1, 16, 31, 100, 151):
        with contextlib.suppress(OSError):
            assert listing(guest.fuse, node, size, True) == []


def test_listing_continues_from_any_cookie(guest: FakeGuest) -> None:
    import struct

    node = guest.fuse.walk("many").nodeid
    whole = listing(guest.fuse, node, 65536, False)
    for at in (0, 1, 2, 17, MANY - 1):
        body = struct.pack("=QQIIQII", 0, whole[at].next_off, 65536, 0, 0, 0, 0)
        rest = guest.fuse.request(28, node, body, 0, 65536)
        from virtiofsd_nydus.fakeguest.fuse_client import parse_dirents

        assert [e.name for e in parse_dirents(rest, False)] == [e.name for e in whole[at + 1 :]]


def test_reads_at_every_edge(guest: FakeGuest) -> None:
    for name in ("odd", "empty", "page", "over", "sub/deep/file"):
        seed, size = FILES[name]
        node, whole = guest.fuse.walk(name).nodeid, pattern(size, seed)
        for offset in {0, 1, 7, size // 2, max(0, size - 1), size, size + 1, size + 5000, 1 << 40, (1 << 63) - 1}:
            for length in (1, 100, 4095, 4096, 4097, 65536, 131072):
                assert guest.fuse.read(node, offset, length) == whole[offset : offset + length], (name, offset, length)


def test_read_larger_than_the_buffers_is_refused_or_cut(guest: FakeGuest) -> None:
    """The request asks for more than its writable part holds."""
    from virtiofsd_nydus.fakeguest.fuse_client import READ, READ_IN

    node = guest.fuse.walk("data").nodeid
    for size in (8193, 1 << 20, 0xFFFF_FFFF):
        body = READ_IN.pack(0, 0, size, 0, 0, 0, 0)
        try:
            data = guest.fuse.request(READ, node, body, 0, 8192)
            assert data == pattern(8192, FILES["data"][0])[: len(data)]
        except OSError as error:
            assert error.errno in (errno.EINVAL, errno.EIO)


def test_xattrs(guest: FakeGuest) -> None:
    node = guest.fuse.walk("odd").nodeid
    assert guest.fuse.getxattr(node, b"user.colour") == b"green"
    assert guest.fuse.getxattr(node, b"user.colour", 0) == (5).to_bytes(4, "little") + bytes(4)
    assert guest.fuse.listxattr(node) == [b"user.colour"]
    for name, size, code in (
        (b"user.colour", 4, errno.ERANGE),
        (b"user.none", 100, errno.ENODATA),
        (b"security.capability", 24, errno.ENODATA),
    ):
        with pytest.raises(OSError) as caught:
            guest.fuse.getxattr(node, name, size)
        assert caught.value.errno == code
    assert guest.fuse.listxattr(guest.fuse.walk("page").nodeid) == []


@pytest.mark.parametrize("name", EROFS_OPS)
def test_changes_are_refused(guest: FakeGuest, name: str) -> None:
    opcode, body, out = EROFS_OPS[name]
    with pytest.raises(OSError) as caught:
        guest.fuse.request(opcode, ROOT, body, out)
    assert caught.value.errno in (errno.EROFS, errno.ENOSYS)


def test_what_is_not_there_latches(guest: FakeGuest) -> None:
    """ENOSYS makes the kernel stop asking: no open, no flush, no statx."""
    node = guest.fuse.walk("data").nodeid
    for opcode, asked, body, out in (
        (14, node, bytes(8), 16),
        (27, ROOT, bytes(8), 16),
        (25, node, bytes(24), 0),
        (52, node, bytes(24), 288),
    ):
        with pytest.raises(OSError) as caught:
            guest.fuse.request(opcode, asked, body, out)
        assert caught.value.errno == errno.ENOSYS, opcode


def test_lseek_statfs_access(guest: FakeGuest) -> None:
    node = guest.fuse.walk("odd").nodeid
    assert guest.fuse.lseek(node, 5, os.SEEK_DATA) == 5
    assert guest.fuse.lseek(node, 5, os.SEEK_HOLE) == FILES["odd"][1]
    with pytest.raises(OSError) as caught:
        guest.fuse.lseek(node, FILES["odd"][1], os.SEEK_DATA)
    assert caught.value.errno == errno.ENXIO
    blocks, bfree, _, files, *_ = guest.fuse.statfs()
    assert blocks > 0 and bfree == 0 and files >= MANY
    with contextlib.suppress(OSError):
        guest.fuse.access(node, os.R_OK)


def test_forget_leaves_nodes_valid(guest: FakeGuest) -> None:
    """Node ids are the image's own numbers: forgetting one, even too often, costs nothing."""
    entry = guest.fuse.walk("sub/deep/file")
    guest.hiprio.forget(entry.nodeid, 1)
    guest.hiprio.forget(entry.nodeid, (1 << 64) - 1)
    guest.fuse.forget(entry.nodeid, 1 << 40)
    guest.hiprio.forget(ROOT, 1 << 63)
    assert guest.fuse.getattr(entry.nodeid) == entry.attr


def test_destroy_ends_the_session(guest: FakeGuest) -> None:
    guest.fuse.request(38, ROOT)
    with pytest.raises(OSError):
        guest.fuse.getattr(ROOT)
    guest.fuse.init()
    guest.fuse.getattr(ROOT)
