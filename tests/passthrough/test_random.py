"""Random work through the passthrough and the same work on the host's file system, compared step by step: results,
errors, attributes, bytes, and at last the whole trees."""

import errno
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from virtiofsd_nydus.fakeguest import fuse_client as fc
from virtiofsd_nydus.fakeguest.fuse_client import ROOT, FuseClient

STEPS = 400
NAMES = [f"n{i}" for i in range(8)]
DIRECTORIES = ["", "d0", "d1", "d0/e"]
FILE_BYTES = 200_000


class Host:
    """The reference: system calls on a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, directory: str, name: str) -> Path:
        return self.root / directory / name


class Passed:
    """The same by FUSE requests."""

    def __init__(self, fuse: FuseClient) -> None:
        self.fuse = fuse

    def node(self, directory: str) -> int:
        at = ROOT
        for part in filter(None, directory.split("/")):
            at = self.fuse.lookup(at, part.encode()).nodeid
        return at


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def host_write(path: Path, offset: int, data: bytes) -> int:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        return os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def describe(path: Path) -> tuple[Any, ...]:
    st = path.lstat()
    if stat.S_ISREG(st.st_mode):
        body: Any = path.read_bytes()
    elif stat.S_ISLNK(st.st_mode):
        body = str(path.readlink())
    else:
        body = st.st_rdev
    nlink = 0 if stat.S_ISDIR(st.st_mode) else st.st_nlink
    names = [
        (name, os.getxattr(path, name, follow_symlinks=False))
        for name in sorted(os.listxattr(path, follow_symlinks=False))
    ]
    return st.st_mode, st.st_uid, st.st_gid, nlink, body, names


def tree(root: Path) -> dict[str, tuple[Any, ...]]:
    return {str(path.relative_to(root)): describe(path) for path in sorted(root.rglob("*"))}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_names(source: Path, tmp_path: Path, fuse: FuseClient, seed: int) -> None:
    chance = random.Random(seed)
    host, passed = Host(tmp_path / "reference"), Passed(fuse)
    for directory in ("", *DIRECTORIES[1:]):
        (host.root / directory).mkdir(exist_ok=True)
        (source / directory).mkdir(exist_ok=True)
    for step in range(STEPS):
        directory, name = chance.choice(DIRECTORIES), chance.choice(NAMES)
        other_directory, other = chance.choice(DIRECTORIES), chance.choice(NAMES)
        path, other_path = host.path(directory, name), host.path(other_directory, other)
        node, raw, other_raw = passed.node(directory), name.encode(), other.encode()
        other_node = passed.node(other_directory)
        mode = chance.choice([0o644, 0o600, 0o4755, 0o2711])
        what = chance.randrange(11)
        if what == 0:

            def make(at: Path = path, bits: int = mode) -> None:
                old = os.umask(0)
                try:
                    os.close(os.open(at, os.O_CREAT | os.O_EXCL | os.O_RDWR, bits))
                finally:
                    os.umask(old)

            pair = (make, lambda n=node, r=raw, m=mode: fuse.create(n, r, m, os.O_RDWR | os.O_EXCL) and None)
        elif what == 1:
            pair = (lambda p=path: p.unlink(), lambda n=node, r=raw: fuse.unlink(n, r))
        elif what == 2:
            pair = (
                lambda p=path, o=other_path: p.rename(o) and None,
                lambda n=node, r=raw, m=other_node, o=other_raw: fuse.rename(n, r, m, o),
            )
        elif what == 3:
            pair = (
                lambda p=path, o=other_path: os.link(p, o, follow_symlinks=False),
                lambda n=node, r=raw, m=other_node, o=other_raw: fuse.link(fuse.lookup(n, r).nodeid, m, o) and None,
            )
        elif what == 4:
            pair = (lambda p=path: p.symlink_to("t"), lambda n=node, r=raw: fuse.symlink(n, r, b"t") and None)
        elif what == 5:
            pair = (lambda p=path: p.mkdir(0o755), lambda n=node, r=raw: fuse.mkdir(n, r) and None)
        elif what == 6:
            pair = (lambda p=path: p.rmdir(), lambda n=node, r=raw: fuse.rmdir(n, r))
        elif what == 7:
            pair = (
                lambda p=path: os.mknod(p, stat.S_IFCHR | 0o600, 0),
                lambda n=node, r=raw: fuse.mknod(n, r, stat.S_IFCHR | 0o600) and None,
            )
        elif what == 8:
            pair = (
                lambda p=path: os.chown(p, 5, 6, follow_symlinks=False),
                lambda n=node, r=raw: (
                    fuse.setattr(fuse.lookup(n, r).nodeid, fc.Change(valid=fc.SET_UID | fc.SET_GID, uid=5, gid=6))
                    and None
                ),
            )
        elif what == 9:
            pair = (
                lambda p=path: os.setxattr(p, "trusted.x", b"1", follow_symlinks=False),
                lambda n=node, r=raw: fuse.setxattr(fuse.lookup(n, r).nodeid, b"trusted.x", b"1"),
            )
        else:
            pair = (
                lambda p=path: (p.lstat().st_mode, p.lstat().st_nlink if not p.is_dir() else 0),
                lambda n=node, r=raw: (lambda a: (a.mode, a.nlink if not stat.S_ISDIR(a.mode) else 0))(
                    fuse.lookup(n, r).attr
                ),
            )
        expected, got = outcome(pair[0]), outcome(pair[1])
        assert got == expected, (step, what, path, other_path)
    assert tree(source) == tree(host.root)


@pytest.mark.parametrize("seed", [1, 2])
def test_bytes(source: Path, tmp_path: Path, fuse: FuseClient, seed: int) -> None:
    """As fsx does: one file, reads, writes, truncations, holes and copies at random places."""
    chance = random.Random(seed)
    reference = tmp_path / "reference"
    reference.touch()
    entry, handle = fuse.create(ROOT, b"file")
    node = entry.nodeid
    fd = os.open(reference, os.O_RDWR)
    for step in range(STEPS):
        offset, size = chance.randrange(FILE_BYTES), chance.randrange(1, 70_000)
        what = chance.randrange(6)
        if what == 0:
            data = chance.randbytes(size)
            assert fuse.write(node, handle, offset, data) == os.pwrite(fd, data, offset)
        elif what == 1:
            assert fuse.read(node, offset, size, handle) == os.pread(fd, size, offset), step
        elif what == 2:
            os.ftruncate(fd, offset)
            assert (
                fuse.setattr(node, fc.Change(valid=fc.SET_SIZE, size=offset, handle=chance.choice([0, handle]))).size
                == offset
            )
        elif what == 3:
            os.posix_fallocate(fd, offset, size)
            fuse.fallocate(node, handle, 0, offset, size)
        elif what == 4:
            data = chance.randbytes(100)
            os.pwrite(fd, data, os.fstat(fd).st_size)
            fuse.write(node, handle, 0, data, flags=os.O_APPEND)
        else:
            assert fuse.getattr(node).size == os.fstat(fd).st_size
        if step % 50 == 0:
            fuse.fsync(node, handle)
    os.close(fd)
    assert (source / "file").read_bytes() == reference.read_bytes()
