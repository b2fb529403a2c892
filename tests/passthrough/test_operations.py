"""Every operation of the passthrough, seen from the guest's requests and from the host's directory."""

import errno
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from virtiofsd_nydus.fakeguest import fuse_client as fc
from virtiofsd_nydus.fakeguest.fuse_client import ROOT, FuseClient

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4


def expect(number: int) -> Any:
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


def test_init_flags(guest: object, fuse: FuseClient) -> None:
    reply = fuse.init()
    assert reply.max_write == 1 << 20 and reply.max_pages == 256
    for bit in (3, 5, 12, 28):  # ATOMIC_O_TRUNC, BIG_WRITES, AUTO_INVAL_DATA, HANDLE_KILLPRIV_V2
        assert reply.flags >> bit & 1, bit
    assert not reply.flags >> 16 & 1  # WRITEBACK_CACHE: the host's files are not the guest's alone


def test_create_write_read(source: Path, fuse: FuseClient) -> None:
    entry, handle = fuse.create(ROOT, b"new", 0o640)
    assert stat.S_IMODE(entry.attr.mode) == 0o640 and entry.attr.size == 0
    assert (entry.entry_valid_s, entry.attr_valid_s) == (1, 1)
    data = os.urandom(300_000)
    assert fuse.write(entry.nodeid, handle, 0, data) == len(data)
    assert (source / "new").read_bytes() == data
    assert fuse.read(entry.nodeid, 0, 1 << 20, handle) == data
    assert fuse.read(entry.nodeid, 299_990, 4096, handle) == data[-10:]
    assert fuse.read(entry.nodeid, 300_000, 4096, handle) == b""
    assert fuse.write(entry.nodeid, handle, 0, b"at its end", flags=os.O_APPEND) == 10
    assert (source / "new").read_bytes() == data + b"at its end"
    # A page of the guest's cache goes to its place, whatever file carries it
    assert fuse.write(entry.nodeid, handle, 0, b"front", flags=os.O_APPEND, write_flags=fc.WRITE_CACHE) == 5
    assert (source / "new").read_bytes()[:5] == b"front"
    fuse.flush(entry.nodeid, handle)
    fuse.fsync(entry.nodeid, handle)
    fuse.fsync(entry.nodeid, handle, data_only=True)
    fuse.syncfs()
    fuse.release(entry.nodeid, handle)
    with expect(errno.EBADF):
        fuse.read(entry.nodeid, 0, 10, handle)


def test_create_over_what_is_there(source: Path, fuse: FuseClient) -> None:
    (source / "old").write_bytes(b"before")
    entry, handle = fuse.create(ROOT, b"old", flags=os.O_RDWR | os.O_CREAT)
    assert fuse.read(entry.nodeid, 0, 100, handle) == b"before"
    with expect(errno.EEXIST):
        fuse.create(ROOT, b"old", flags=os.O_RDWR | os.O_CREAT | os.O_EXCL)
    fuse.create(ROOT, b"old", flags=os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    assert (source / "old").read_bytes() == b""


def test_directories(source: Path, fuse: FuseClient) -> None:
    made = fuse.mkdir(ROOT, b"d", 0o1755)
    assert stat.S_IMODE((source / "d").stat().st_mode) == 0o1755
    names = {f"entry-{i:03}".encode() for i in range(200)}
    for name in names:
        (source / "d" / name.decode()).touch()
    for plus in (False, True):
        found = list(fuse.readdir(made.nodeid, plus=plus))
        assert {e.name for e in found} == names | {b".", b".."}
        assert all(e.type == stat.S_IFREG >> 12 for e in found if e.name not in (b".", b".."))
    with_entry = {e.name: e.entry for e in fuse.readdir(made.nodeid)}
    one = with_entry[b"entry-007"]
    assert one is not None and fuse.lookup(made.nodeid, b"entry-007").nodeid == one.nodeid
    with expect(errno.ENOTEMPTY):
        fuse.rmdir(ROOT, b"d")
    with expect(errno.EISDIR):
        fuse.unlink(ROOT, b"d")
    for name in names:
        fuse.unlink(made.nodeid, name)
    handle = fuse.open_flags(made.nodeid, 0, directory=True)
    fuse.fsync(made.nodeid, handle, directory=True)
    fuse.rmdir(ROOT, b"d")
    assert list(source.iterdir()) == []


def test_rename_and_its_flags(source: Path, fuse: FuseClient) -> None:
    (source / "a").write_text("a")
    (source / "b").write_text("b")
    fuse.mkdir(ROOT, b"d")
    d = fuse.lookup(ROOT, b"d").nodeid
    with expect(errno.EEXIST):
        fuse.rename(ROOT, b"a", ROOT, b"b", NOREPLACE)
    fuse.rename(ROOT, b"a", ROOT, b"b", EXCHANGE)
    assert (source / "a").read_text() == "b"
    fuse.rename(ROOT, b"a", d, b"moved", WHITEOUT)
    left = (source / "a").lstat()
    assert stat.S_ISCHR(left.st_mode) and left.st_rdev == 0
    assert (source / "d" / "moved").read_text() == "b"
    fuse.rename(d, b"moved", ROOT, b"b")
    assert (source / "b").read_text() == "b"
    with expect(errno.EINVAL):
        fuse.rename(ROOT, b"b", ROOT, b"c", 64)


def test_links_and_nodes(source: Path, fuse: FuseClient) -> None:
    entry, handle = fuse.create(ROOT, b"f")
    fuse.release(entry.nodeid, handle)
    again = fuse.link(entry.nodeid, ROOT, b"g")
    assert again.nodeid == entry.nodeid and again.attr.nlink == 2
    link = fuse.symlink(ROOT, b"l", b"/etc/passwd")
    assert fuse.readlink(link.nodeid) == b"/etc/passwd"
    long = b"x" * 4000
    assert fuse.readlink(fuse.symlink(ROOT, b"long", long).nodeid) == long
    whiteout = fuse.mknod(ROOT, b"white", stat.S_IFCHR | 0o600, 0)
    assert whiteout.attr.rdev == 0 and stat.S_ISCHR((source / "white").lstat().st_mode)
    device = fuse.mknod(ROOT, b"dev", stat.S_IFBLK | 0o600, 0x12 << 8 | 0x34 | 0x5 << 20)
    host = (source / "dev").lstat().st_rdev
    assert (os.major(host), os.minor(host)) == (0x12, 0x534) and device.attr.rdev == 0x12 << 8 | 0x34 | 0x5 << 20
    fuse.mknod(ROOT, b"fifo", stat.S_IFIFO | 0o600)
    fuse.mknod(ROOT, b"sock", stat.S_IFSOCK | 0o600)
    plain = fuse.mknod(ROOT, b"plain", stat.S_IFREG | 0o644)
    assert stat.S_ISREG(plain.attr.mode)


def test_setattr(source: Path, fuse: FuseClient) -> None:
    entry, handle = fuse.create(ROOT, b"f")
    node = entry.nodeid
    fuse.write(node, handle, 0, b"0123456789")
    assert stat.S_IMODE(fuse.setattr(node, fc.Change(valid=fc.SET_MODE, mode=0o100750)).mode) == 0o750
    attr = fuse.setattr(node, fc.Change(valid=fc.SET_UID | fc.SET_GID, uid=1234, gid=5678))
    assert (attr.uid, attr.gid) == (1234, 5678) == ((source / "f").stat().st_uid, (source / "f").stat().st_gid)
    assert fuse.setattr(node, fc.Change(valid=fc.SET_SIZE, size=4, handle=handle)).size == 4
    assert fuse.setattr(node, fc.Change(valid=fc.SET_SIZE, size=3)).size == 3
    assert (source / "f").read_bytes() == b"012"
    attr = fuse.setattr(
        node, fc.Change(valid=fc.SET_ATIME | fc.SET_MTIME, atime_ns=1_500_000_000_123_456_789, mtime_ns=7)
    )
    assert (attr.atime, attr.atime_nsec, attr.mtime, attr.mtime_nsec) == (1_500_000_000, 123_456_789, 0, 7)
    fuse.setattr(node, fc.Change(valid=fc.SET_MTIME | fc.SET_MTIME_NOW))
    assert abs((source / "f").stat().st_mtime - time.time()) < 60
    link = fuse.symlink(ROOT, b"l", b"f")
    fuse.setattr(link.nodeid, fc.Change(valid=fc.SET_UID, uid=77))
    assert (source / "l").lstat().st_uid == 77 and (source / "f").stat().st_uid == 1234
    fuse.setattr(link.nodeid, fc.Change(valid=fc.SET_MTIME, mtime_ns=5_000_000_000))
    assert (source / "l").lstat().st_mtime == 5
    with expect(errno.EOPNOTSUPP):
        fuse.setattr(link.nodeid, fc.Change(valid=fc.SET_MODE, mode=0o777))


def test_an_open_file_outlives_its_name(source: Path, fuse: FuseClient) -> None:
    entry, handle = fuse.create(ROOT, b"f")
    fuse.write(entry.nodeid, handle, 0, b"kept")
    fuse.unlink(ROOT, b"f")
    assert fuse.getattr(entry.nodeid).nlink == 0
    assert fuse.setattr(entry.nodeid, fc.Change(valid=fc.SET_MODE, mode=0o600)).nlink == 0
    again = fuse.open_flags(entry.nodeid, os.O_RDONLY)
    assert fuse.read(entry.nodeid, 0, 10, again) == b"kept"
    fuse.setattr(entry.nodeid, fc.Change(valid=fc.SET_SIZE, size=2))
    assert fuse.read(entry.nodeid, 0, 10, handle) == b"ke"


def test_tmpfile(source: Path, fuse: FuseClient) -> None:
    entry, handle = fuse.create(ROOT, b"/", opcode=fc.TMPFILE)
    fuse.write(entry.nodeid, handle, 0, b"unnamed")
    assert list(source.iterdir()) == []
    fuse.link(entry.nodeid, ROOT, b"named")
    assert (source / "named").read_bytes() == b"unnamed"


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "device"])
def test_xattrs_unmapped(source: Path, fuse: FuseClient, kind: str) -> None:
    node = {
        "file": lambda: fuse.create(ROOT, b"x")[0],
        "directory": lambda: fuse.mkdir(ROOT, b"x"),
        "symlink": lambda: fuse.symlink(ROOT, b"x", b"nowhere"),
        "device": lambda: fuse.mknod(ROOT, b"x", stat.S_IFCHR | 0o600),
    }[kind]().nodeid
    name = "trusted.overlay.opaque"
    fuse.setxattr(node, name.encode(), b"y")
    assert os.getxattr(source / "x", name, follow_symlinks=False) == b"y"
    assert fuse.getxattr(node, name.encode()) == b"y"
    assert name.encode() in fuse.listxattr(node)
    assert int.from_bytes(fuse.getxattr(node, name.encode(), 0)[:4], "little") == 1
    with expect(errno.EEXIST):
        fuse.setxattr(node, name.encode(), b"z", os.XATTR_CREATE)
    fuse.removexattr(node, name.encode())
    with expect(errno.ENODATA):
        fuse.getxattr(node, name.encode())
    if kind in ("file", "directory"):
        fuse.setxattr(node, b"user.big", b"v" * 3000)
        with expect(errno.ERANGE):
            fuse.getxattr(node, b"user.big", 100)
        with expect(errno.E2BIG):
            fuse.setxattr(node, b"user.huge", b"v" * 65537)


def test_space_and_places(source: Path, fuse: FuseClient) -> None:
    entry, handle = fuse.create(ROOT, b"f")
    node = entry.nodeid
    fuse.fallocate(node, handle, 0, 0, 1 << 20)
    assert (source / "f").stat().st_size == 1 << 20
    fuse.write(node, handle, 0, b"a" * 65536)
    fuse.fallocate(node, handle, 3, 0, 32768)  # PUNCH_HOLE | KEEP_SIZE
    assert fuse.read(node, 0, 65536, handle) == bytes(32768) + b"a" * 32768
    assert fuse.lseek(node, 0, os.SEEK_DATA, handle) == os.lseek(os.open(source / "f", os.O_RDONLY), 0, os.SEEK_DATA)
    with expect(errno.ENXIO):
        fuse.lseek(node, 1 << 21, os.SEEK_DATA, handle)
    other, to = fuse.create(ROOT, b"copy")
    assert fuse.copy_file_range(fc.Place(node, handle, 32768), fc.Place(other.nodeid, to, 100), 1000) == 1000
    assert (source / "copy").read_bytes() == bytes(100) + b"a" * 1000
    stats = fuse.statfs()
    here = os.statvfs(source)
    assert stats[0] == here.f_blocks and stats[5] == here.f_bsize


def test_what_is_not_cached_is_read(source: Path, fuse: FuseClient) -> None:
    data = os.urandom(3 << 20)
    (source / "cold").write_bytes(data)
    fd = os.open(source / "cold", os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    entry = fuse.lookup(ROOT, b"cold")
    handle = fuse.open_flags(entry.nodeid, 0)
    got = b"".join(fuse.read(entry.nodeid, at, 1 << 20, handle) for at in range(0, 3 << 20, 1 << 20))
    assert got == data
