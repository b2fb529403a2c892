"""Care points of a shared host directory: a hostile guest reaches nothing beyond the source, holds nothing down and
owns what it makes as its own users, not as the daemon.

1 names from the wire: test_names_from_the_wire, test_dot_dot_stays_inside; test_races.py:
  test_what_follows_a_names_end, test_names_without_an_end
2 one component a call, no link followed: test_symlinks_are_data; test_races.py:
  test_a_directory_that_turns_into_a_symlink
3 links are data, also to xattrs and chmod: test_symlinks_are_data; test_operations.py: test_xattrs_unmapped
4 only files and directories are opened: test_only_files_and_directories_are_opened; test_races.py:
  test_a_file_that_turns_into_a_device
5 nodes are counted, a FORGET of too many saturates: test_nodes_are_counted, test_a_number_taken_by_another_file,
  test_numbers_are_unique_over_mounts
6 credentials, groups, umask, set-id bits: test_new_objects_are_the_callers, test_set_id_bits_are_cleared,
  test_security_xattrs_are_roots; test_privileges.py: test_groups_of_the_daemon_do_not_count
7 bounds: test_descriptors_are_bounded, test_nodes_outlive_their_descriptors, test_sizes_and_offsets,
  test_sizes_of_xattrs
8 capabilities, no_new_privs: test_privileges.py
9 mounts are not pinned: test_mounts_are_not_pinned, test_a_mount_is_found_again
10 the top of a writable share: test_api.py: test_top_of_runtime_rs_is_kept
"""

import errno
import os
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakeguest.support import open_fds
from tests.passthrough.conftest import DESCRIPTORS, ShareDaemon, only_handles
from virtiofsd_nydus.fakeguest import fuse_client as fc
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.fuse_client import ROOT, FuseClient
from virtiofsd_nydus.vmm.servers import NydusDaemon

WAIT_S = 20.0


def expect(*numbers: int) -> Any:
    return pytest.raises(OSError, match="|".join(rf"\[Errno {number}\]" for number in numbers))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)  # between two polls; the deadline decides


BAD_NAMES = [b"", b"/", b"a/b", b"/etc/passwd", b"../outside", b"..", b".", b"x" * 256]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_names_from_the_wire(tmp_path: Path, source: Path, fuse: FuseClient, name: bytes) -> None:
    """Care 1: in every operation that takes a name."""
    (source / "f").write_text("f")
    node = fuse.lookup(ROOT, b"f").nodeid
    calls: list[Callable[[], object]] = [
        lambda: fuse.mkdir(ROOT, name),
        lambda: fuse.mknod(ROOT, name, stat.S_IFREG | 0o644),
        lambda: fuse.symlink(ROOT, name, b"x"),
        lambda: fuse.link(node, ROOT, name),
        lambda: fuse.create(ROOT, name),
        lambda: fuse.unlink(ROOT, name),
        lambda: fuse.rmdir(ROOT, name),
        lambda: fuse.rename(ROOT, name, ROOT, b"g"),
        lambda: fuse.rename(ROOT, b"f", ROOT, name),
        lambda: fuse.rename(ROOT, name, ROOT, b"g", 0),
        lambda: fuse.rename(ROOT, b"f", ROOT, name, 2),
    ]
    if name not in (b".", b".."):
        calls.append(lambda: fuse.lookup(ROOT, name))
    for call in calls:
        with expect(errno.EINVAL, errno.ENAMETOOLONG):
            call()
    assert [p.name for p in source.iterdir()] == ["f"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outside", "source"]


def test_dot_dot_stays_inside(tmp_path: Path, source: Path, fuse: FuseClient) -> None:
    (source / "d" / "e").mkdir(parents=True)
    root = fuse.lookup(ROOT, b"..")
    assert root.attr.ino in (ROOT, fuse.getattr(ROOT).ino)
    d = fuse.lookup(ROOT, b"d").nodeid
    e = fuse.lookup(d, b"e").nodeid
    assert fuse.lookup(e, b"..").nodeid == d
    assert fuse.lookup(d, b"..").nodeid == ROOT
    assert fuse.lookup(e, b".").nodeid == e
    (source / "d").rename(tmp_path / "moved")
    with expect(errno.ESTALE):
        fuse.lookup(d, b"..")


def test_symlinks_are_data(tmp_path: Path, source: Path, fuse: FuseClient) -> None:
    """Care 2 and 3: the server follows none, not even one that took a directory's place."""
    (source / "out").symlink_to(tmp_path)
    (source / "file").symlink_to(tmp_path / "outside")
    out = fuse.lookup(ROOT, b"out")
    assert stat.S_ISLNK(out.attr.mode)
    for call in (lambda: fuse.lookup(out.nodeid, b"outside"), lambda: fuse.create(out.nodeid, b"new")):
        with expect(errno.ENOTDIR):
            call()
    link = fuse.lookup(ROOT, b"file").nodeid
    for call in (
        lambda: fuse.open_flags(link, os.O_RDONLY),
        lambda: fuse.create(ROOT, b"file", flags=os.O_RDWR),
        lambda: fuse.setattr(link, fc.Change(valid=fc.SET_SIZE, size=0)),
    ):
        with expect(errno.EBADF, errno.ELOOP, errno.EINVAL):
            call()
    (source / "d").mkdir()
    (source / "d" / "mine").write_text("mine")
    d = fuse.lookup(ROOT, b"d").nodeid
    (source / "d").rename(source / "old")
    (source / "d").symlink_to(tmp_path)
    with expect(errno.ENOENT):
        fuse.lookup(d, b"outside")
    assert fuse.lookup(d, b"mine").nodeid
    assert (tmp_path / "outside").read_text() == "not for guests\n"


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_only_files_and_directories_are_opened(source: Path, fuse: FuseClient, kind: int) -> None:
    """Care 4: a device can be made (whiteouts are) and not be opened, also not by creating over it."""
    node = fuse.mknod(ROOT, b"x", kind | 0o666, 1 << 8 | 5).nodeid
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_PATH, os.O_RDWR | os.O_CREAT):
        with expect(errno.EBADF):
            fuse.open_flags(node, flags)
    with expect(errno.EBADF):
        fuse.create(ROOT, b"x", flags=os.O_RDWR | os.O_CREAT)
    with expect(errno.EINVAL):
        fuse.setattr(node, fc.Change(valid=fc.SET_SIZE, size=0))


def test_nodes_are_counted(source: Path, daemon: NydusDaemon, guest: FakeGuest) -> None:
    """Care 5: FORGET shrinks the table, a count too high does no more than that."""
    fuse = guest.fuse
    for i in range(50):
        (source / f"f{i}").touch()
    nodes = [fuse.lookup(ROOT, f"f{i}".encode()).nodeid for i in range(50)]
    assert len(set(nodes)) == 50
    again = fuse.lookup(ROOT, b"f0")
    assert again.nodeid == nodes[0]

    def known() -> int:
        return int(daemon.stats()["shares"]["/"]["inodes"])

    assert known() == 51
    guest.hiprio.forget(nodes[0], 1)
    assert fuse.getattr(nodes[0]).ino == nodes[0]
    guest.hiprio.forget(nodes[0], 1 << 60)
    with expect(errno.ESTALE):
        fuse.getattr(nodes[0])
    body = struct.pack("=II", 49, 0) + b"".join(struct.pack("=QQ", node, 1) for node in nodes[1:])
    guest.hiprio.send_without_reply(fc.BATCH_FORGET, 0, body)
    guest.hiprio.forget(ROOT, 99)
    guest.hiprio.forget(0xDEAD << 32, 1)
    assert known() == 1
    assert fuse.lookup(ROOT, b"f1").nodeid == nodes[1]  # the same number while the host's is the same
    assert fuse.getattr(ROOT).mode & stat.S_IFDIR
    fuse.init()
    assert known() == 1


@only_handles  # a descriptor keeps the number from being given again
def test_a_number_taken_by_another_file(source: Path, fuse: FuseClient) -> None:
    """The host deletes a file and makes others: no node of the guest's turns into one of them unseen."""
    (source / "a").write_text("first")
    entry = fuse.lookup(ROOT, b"a")
    number = (source / "a").stat().st_ino
    (source / "a").unlink()
    with expect(errno.ESTALE):
        fuse.getattr(entry.nodeid)
    for i in range(2000):
        (source / f"n{i}").write_text("later")
        if (source / f"n{i}").stat().st_ino == number:
            break
    else:
        pytest.skip("the host's file system does not give the number again")
    with expect(errno.ESTALE):
        fuse.open_flags(entry.nodeid, os.O_RDONLY)
    found = fuse.lookup(ROOT, f"n{i}".encode())
    assert found.nodeid == entry.nodeid and found.generation > entry.generation


class As:
    """Requests of a user."""

    def __init__(self, fuse: FuseClient, uid: int, gid: int) -> None:
        self.fuse, self.ids = fuse, (uid, gid)

    def __enter__(self) -> FuseClient:
        self.fuse.uid, self.fuse.gid = self.ids
        return self.fuse

    def __exit__(self, *_: object) -> None:
        self.fuse.uid = self.fuse.gid = 0


def test_new_objects_are_the_callers(source: Path, fuse: FuseClient) -> None:
    """Care 6: owner, group, mode without the daemon's umask, set-group-id directories."""
    source.chmod(0o755)  # the guest's kernel has decided already, so the caller need not be allowed by its ids
    with As(fuse, 1000, 1001):
        fuse.create(ROOT, b"f", 0o666)
        fuse.mkdir(ROOT, b"d", 0o777)
        fuse.symlink(ROOT, b"l", b"x")
        fuse.mknod(ROOT, b"p", stat.S_IFIFO | 0o622)
        fuse.mknod(ROOT, b"c", stat.S_IFCHR | 0o600)
        fuse.link(fuse.create(ROOT, b"/", opcode=fc.TMPFILE)[0].nodeid, ROOT, b"t")
    for name in "fdlpct":
        found = (source / name).lstat()
        assert (found.st_uid, found.st_gid) == (1000, 1001), name
    assert [stat.S_IMODE((source / name).stat().st_mode) for name in "fdp"] == [0o666, 0o777, 0o622]
    os.chown(source / "d", 0, 2000)
    (source / "d").chmod(0o2777)
    d = fuse.lookup(ROOT, b"d").nodeid
    with As(fuse, 1000, 1001):
        fuse.create(d, b"f", 0o2775)
        fuse.mkdir(d, b"sub", 0o755)
    inside, sub = (source / "d" / "f").stat(), (source / "d" / "sub").stat()
    assert (inside.st_uid, inside.st_gid) == (1000, 2000)
    assert not inside.st_mode & stat.S_ISGID  # not a member: as the host does it
    assert sub.st_gid == 2000 and sub.st_mode & stat.S_ISGID
    fuse.create(ROOT, b"root")
    assert (source / "root").stat().st_uid == 0


def test_set_id_bits_are_cleared(source: Path, fuse: FuseClient) -> None:
    """KILLPRIV_V2: by a write, a truncation and an owner's change of a plain user; not by root's write."""
    entry, handle = fuse.create(ROOT, b"f", 0o755)
    path = source / "f"

    def armed() -> None:
        path.chmod(0o6755)
        os.setxattr(path, "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))

    def bits() -> int:
        return path.stat().st_mode & 0o6000

    armed()
    fuse.write(entry.nodeid, handle, 0, b"root")
    assert bits() == 0o6000
    fuse.write(entry.nodeid, handle, 0, b"user", write_flags=fc.WRITE_KILL_SUIDGID)
    assert bits() == 0
    with pytest.raises(OSError):
        os.getxattr(path, "security.capability")
    armed()
    fuse.setattr(entry.nodeid, fc.Change(valid=fc.SET_SIZE | fc.SET_KILL_SUIDGID, size=1))
    assert bits() == 0
    armed()
    fuse.open_flags(entry.nodeid, os.O_WRONLY | os.O_TRUNC, kill=True)
    assert bits() == 0
    armed()
    fuse.setattr(entry.nodeid, fc.Change(valid=fc.SET_UID, uid=5))
    assert bits() == 0
    armed()
    fuse.write(entry.nodeid, handle, 0, b"root")  # the daemon has its capability back
    assert bits() == 0o6000


def test_security_xattrs_are_roots(source: Path, fuse: FuseClient) -> None:
    """Care 6: security.* of a plain user's, which some guests' kernels let through. Those all decide for themselves who
    sets file capabilities: root of a user namespace does."""
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    with As(fuse, 1000, 1000):
        node = fuse.create(ROOT, b"f")[0].nodeid
        fuse.setxattr(node, b"user.own", b"v")
        for name in (b"security.a", b"security.ima", b"security.selinux", b"security."):
            with expect(errno.EPERM):
                fuse.setxattr(node, name, b"v")
        fuse.setxattr(node, b"security.capability", capability)
    fuse.setxattr(node, b"security.a", b"v")
    with As(fuse, 1000, 1000):
        for name in (b"security.a", b"security.capability", b"security.none"):
            with expect(errno.EPERM):
                fuse.removexattr(node, name)
        assert fuse.getxattr(node, b"security.a") == b"v"
    found = set(os.listxattr(source / "f"))
    assert found - {"security.selinux"} == {"user.own", "security.a", "security.capability"}
    for name in (b"security.a", b"security.capability"):
        fuse.removexattr(node, name)
    assert set(os.listxattr(source / "f")) - {"security.selinux"} == {"user.own"}


def test_descriptors_are_bounded(tmp_path: Path, source: Path) -> None:
    """Care 7: no descriptor per inode, and a guest that opens without end is told ENFILE and served on."""
    for i in range(3000):
        (source / f"f{i}").touch()
    with ShareDaemon(source, open_files=1024) as daemon, FakeGuest(daemon.socket_path, queue_size=64) as guest:
        fuse = guest.fuse
        fuse.init()
        nodes = [fuse.lookup(ROOT, f"f{i}".encode()).nodeid for i in range(3000)]
        assert open_fds(daemon) < 700
        opened = []
        with expect(errno.ENFILE):
            for node in nodes:
                opened.append((node, fuse.open_flags(node, os.O_RDONLY)))
        assert len(opened) > 200
        for name in (b"one-more", b"f2999"):  # what cannot be given to the guest is not left on the host
            with expect(errno.ENFILE):
                fuse.create(ROOT, name)
        assert not (source / "one-more").exists() and (source / "f2999").exists()
        for node, handle in opened:
            fuse.release(node, handle)
        assert fuse.open_flags(nodes[-1], os.O_RDONLY)


@pytest.fixture(params=["plain", "overlayfs"])
def handleless(request: pytest.FixtureRequest, tmp_path: Path, source: Path) -> Iterator[Path]:
    """A directory of which the daemon can open no file handles."""
    if request.param == "plain":
        yield source
        return
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", str(source)], check=True)
    yield source
    subprocess.run(["umount", str(source)], check=True)


def test_nodes_outlive_their_descriptors(tmp_path: Path, handleless: Path) -> None:
    """Care 7, without file handles: a quarter of the descriptors is for nodes. All others are found by their names, and
    what is not the same file any more is not taken for it."""
    source, count = handleless, 1200
    (source / "d/e").mkdir(parents=True)
    (source / "d/e/leaf").write_text("leaf")
    (source / "other").mkdir()
    for i in range(count):
        (source / f"f{i}").write_text(f"text {i}")
    with ShareDaemon(source, DESCRIPTORS, 1024) as daemon, FakeGuest(daemon.socket_path, queue_size=64) as guest:
        fuse = guest.fuse
        fuse.init()
        deep = [fuse.walk(path).nodeid for path in ("d", "d/e", "d/e/leaf", "other")]
        nodes = [fuse.lookup(ROOT, f"f{i}".encode()).nodeid for i in range(count)]
        assert open_fds(daemon) < 500

        def text_of(node: int) -> bytes:
            handle = fuse.open_flags(node, os.O_RDONLY)
            try:
                return fuse.read(node, 0, 100, handle)
            finally:
                fuse.release(node, handle)

        for i, node in enumerate(nodes):
            assert fuse.getattr(node).size == len(f"text {i}")
        assert [text_of(nodes[i]) for i in range(0, count, 50)] == [b"text %d" % i for i in range(0, count, 50)]
        assert sum(entry.entry is not None for entry in fuse.readdir(ROOT)) == count + 2
        assert text_of(deep[2]) == b"leaf"
        # The guest's own renames are followed, of directories and what is in them
        fuse.rename(ROOT, b"d", deep[3], b"moved")
        assert text_of(deep[2]) == b"leaf"
        fuse.rename(deep[1], b"leaf", ROOT, b"leaf")
        assert text_of(deep[2]) == b"leaf"
        fuse.rename(ROOT, b"f1", ROOT, b"f2", 2)  # RENAME_EXCHANGE
        for node in nodes:  # each loses its descriptor to a later one
            fuse.getattr(node)
        assert (text_of(nodes[1]), text_of(nodes[2])) == (b"text 1", b"text 2")
        # What the host puts in a file's place is not that file
        for i, replace in ((3, "file"), (4, "symlink"), (5, "link"), (6, "nothing")):
            place = source / f"f{i}"
            place.unlink()
            if replace == "file":
                place.write_text("another")
            elif replace == "symlink":
                place.symlink_to(tmp_path / "outside")
            elif replace == "link":
                os.link(source / "f7", place)
            for flags in (os.O_RDONLY, os.O_WRONLY):
                with expect(errno.ESTALE, errno.EBADF):
                    fuse.open_flags(nodes[i], flags)
        assert text_of(fuse.lookup(ROOT, b"f3").nodeid) == b"another"
        assert text_of(fuse.lookup(ROOT, b"f5").nodeid) == b"text 7"
        (source / "other/moved").rename(
            tmp_path / "away" if source.stat().st_dev == tmp_path.stat().st_dev else source / "x"
        )
        (source / "other/moved").symlink_to(tmp_path)
        with expect(errno.ESTALE):
            fuse.lookup(deep[1], b"outside")
        for make in (
            lambda: fuse.mkdir(ROOT, b"new-dir"),
            lambda: fuse.symlink(ROOT, b"new-link", b"x"),
            lambda: fuse.mknod(ROOT, b"new-node", stat.S_IFREG | 0o644),
        ):
            assert fuse.getattr(make().nodeid).nlink > 0
        entry, handle = fuse.create(ROOT, b"new")
        assert fuse.write(entry.nodeid, handle, 0, b"x") == 1
        fuse.unlink(ROOT, b"new")
        assert fuse.getattr(entry.nodeid).nlink == 0  # it is open
        fuse.release(entry.nodeid, handle)
        assert open_fds(daemon) < 600
        for node in nodes:
            guest.hiprio.forget(node, 1 << 20)
        assert open_fds(daemon) < 150


def test_sizes_and_offsets(source: Path, fuse: FuseClient) -> None:
    entry, handle = fuse.create(ROOT, b"f")
    node = entry.nodeid
    with expect(errno.EINVAL):
        fuse.read(node, 1 << 63, 100, handle)
    with expect(errno.EINVAL):
        fuse.write(node, handle, (1 << 63) - 10, b"x" * 100)
    with expect(errno.EINVAL):  # says more than it carries
        fuse.request(fc.WRITE, node, fc.WRITE_IN.pack(handle, 0, 1000, 0, 0, 0, 0) + b"x", 8)
    with expect(errno.EINVAL):
        fuse.setattr(node, fc.Change(valid=fc.SET_SIZE, size=1 << 63))
    for wrong in (0, 1, handle + 1, handle ^ 1 << 32, 1 << 63):
        with expect(errno.EBADF):
            fuse.read(node, 0, 10, wrong)
    with expect(errno.EBADF):  # an open file of another node
        fuse.read(fuse.create(ROOT, b"g")[0].nodeid, 0, 10, handle)
    assert (source / "f").stat().st_size == 0


def test_sizes_of_xattrs(source: Path, fuse: FuseClient) -> None:
    """Care 7: at most 64 KiB of a value and 255 bytes of a name, and no more than the request carries."""
    node = fuse.create(ROOT, b"f")[0].nodeid
    with expect(errno.E2BIG):
        fuse.setxattr(node, b"user.a", b"v" * 65537)
    with expect(errno.E2BIG, errno.ENOSPC):  # the host's file system may have less room than there may be
        fuse.setxattr(node, b"user.a", b"v" * 65536)
    with expect(errno.ERANGE):
        fuse.setxattr(node, b"user." + b"a" * 251, b"v")
    for body in (
        struct.pack("=II", 100, 0) + b"user.a\0v",
        struct.pack("=II", 0, 0) + b"user.a",
        struct.pack("=II", 0, 0) + b"\0",
    ):
        with expect(errno.EINVAL):
            fuse.request(fc.SETXATTR, node, body)
    assert [name for name in os.listxattr(source / "f") if name.startswith("user.")] == []


# ---- mounts below the source


def run(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@pytest.fixture
def bind(tmp_path: Path, source: Path) -> Iterator[Path]:
    """A directory bound at source/c1/vol."""
    real = tmp_path / "real"
    real.mkdir()
    (real / "inside").write_text("inside")
    place = source / "c1" / "vol"
    place.mkdir(parents=True)
    run("mount", "--bind", real, place)
    yield place
    subprocess.run(["umount", "-l", str(place)], capture_output=True)


@only_handles  # without them what the guest knows pins its mount, docs/kata.md says
def test_mounts_are_not_pinned(bind: Path, fuse: FuseClient) -> None:
    """Care 9: a plain umount succeeds soon after the guest has looked, and a new mount there is another place."""
    c1 = fuse.lookup(ROOT, b"c1").nodeid
    vol = fuse.lookup(c1, b"vol").nodeid
    inside = fuse.lookup(vol, b"inside").nodeid
    handle = fuse.open_flags(inside, os.O_RDONLY)
    assert fuse.read(inside, 0, 100, handle) == b"inside"
    fuse.release(inside, handle)

    def unmounted() -> bool:
        return subprocess.run(["umount", str(bind)], capture_output=True).returncode == 0

    wait_until(unmounted, "the daemon pins the mount")
    with expect(errno.ESTALE):
        fuse.getattr(inside)
    below = fuse.lookup(c1, b"vol").nodeid
    assert below != vol
    with expect(errno.ENOENT):
        fuse.lookup(below, b"inside")


@only_handles
def test_a_mount_is_found_again(bind: Path, fuse: FuseClient, daemon: NydusDaemon) -> None:
    vol = fuse.lookup(fuse.lookup(ROOT, b"c1").nodeid, b"vol").nodeid
    inside = fuse.lookup(vol, b"inside").nodeid
    wait_until(lambda: daemon.stats()["shares"]["/"]["cached_fds"] == 0, "descriptors are kept for ever")
    assert fuse.getattr(inside).size == 6
    assert (bind / "inside").stat().st_ino != inside


def test_read_only_binds_stay_so(bind: Path, fuse: FuseClient) -> None:
    run("mount", "-o", "remount,bind,ro", bind)
    vol = fuse.lookup(fuse.lookup(ROOT, b"c1").nodeid, b"vol").nodeid
    with expect(errno.EROFS):
        fuse.create(vol, b"new")
    inside = fuse.lookup(vol, b"inside").nodeid
    with expect(errno.EROFS):
        fuse.open_flags(inside, os.O_RDWR)
    for call in (
        lambda: fuse.setattr(inside, fc.Change(valid=fc.SET_MODE, mode=0o777)),
        lambda: fuse.unlink(vol, b"inside"),
        lambda: fuse.setxattr(inside, b"user.x", b"y"),
    ):
        with expect(errno.EROFS):
            call()
    with expect(errno.EXDEV, errno.EROFS):
        fuse.link(inside, ROOT, b"out")


def test_numbers_are_unique_over_mounts(tmp_path: Path, bind: Path, source: Path, fuse: FuseClient) -> None:
    """st_ino: equal host numbers of two mounts, and the same file by two mounts, are different nodes."""
    (source / "twin").mkdir()
    run("mount", "--bind", tmp_path / "real", source / "twin")
    try:
        vol = fuse.lookup(fuse.lookup(ROOT, b"c1").nodeid, b"vol")
        twin = fuse.lookup(ROOT, b"twin")
        assert vol.nodeid != twin.nodeid and vol.attr.ino == vol.nodeid
        one, other = fuse.lookup(vol.nodeid, b"inside"), fuse.lookup(twin.nodeid, b"inside")
        assert one.attr.ino != other.attr.ino
    finally:
        subprocess.run(["umount", "-l", str(source / "twin")], capture_output=True)


def test_later_mounts_and_changes_are_seen(tmp_path: Path, source: Path, fuse: FuseClient) -> None:
    """The host's changes appear at once to a guest that asks; how long it does not ask is in the reply (1 s)."""
    (source / "d").mkdir()
    d = fuse.lookup(ROOT, b"d")
    assert d.attr_valid_s <= 5 and d.entry_valid_s <= 5
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "secret").write_text("one")
    run("mount", "--bind", tmp_path / "v1", source / "d")
    try:
        over = fuse.lookup(ROOT, b"d")
        assert over.nodeid != d.nodeid
        entry = fuse.lookup(over.nodeid, b"secret")
        handle = fuse.open_flags(entry.nodeid, 0)
        assert fuse.read(entry.nodeid, 0, 10, handle) == b"one"
        (tmp_path / "v1" / "secret").write_text("longer")
        assert fuse.getattr(entry.nodeid).size == 6
        assert fuse.read(entry.nodeid, 0, 10, handle) == b"longer"
    finally:
        subprocess.run(["umount", "-l", str(source / "d")], capture_output=True)
