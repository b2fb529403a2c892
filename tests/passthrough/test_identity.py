"""Which file of the host a guest reaches, and what of a file the host must not change by itself."""

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakeguest.support import assert_alive
from tests.passthrough.conftest import ShareDaemon
from tests.passthrough.gate_fs import ENTRIES, GateFs
from virtiofsd_nydus.fakeguest import fuse_client as fc
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.fuse_client import ROOT, FuseClient

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
MANY = 64


@pytest.fixture
def layers(source: Path, tmp_path: Path) -> Iterator[Path]:
    """source is an overlayfs whose lower layers are two file systems that number their files alike. Both have MANY
    empty files, whose numbers are those of the root and others; "one" and "two" are made last."""
    mounted = []

    def mount(kind: str, options: str, at: Path) -> Path:
        at.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", kind, "-o", options, kind, str(at)], check=True)
        mounted.append(at)
        return at

    try:
        first, second, upper = (mount("tmpfs", "size=16m", tmp_path / name) for name in ("first", "second", "upper"))
        (upper / "u").mkdir()
        (upper / "w").mkdir()
        for layer, name in ((first, "one"), (second, "two")):
            for k in range(MANY):
                (layer / f"{name}.{k}").touch()
            (layer / name).write_text(f"contents of {name}")
        mount("overlay", f"lowerdir={first}:{second},upperdir={upper}/u,workdir={upper}/w", source)
        yield source
    finally:
        for at in reversed(mounted):
            subprocess.run(["umount", str(at)], check=True)


def test_files_of_two_devices_with_one_number(layers: Path) -> None:
    hosts = [(layers / name).stat() for name in ("one", "two")]
    assert hosts[0].st_ino == hosts[1].st_ino
    assert hosts[0].st_dev != hosts[1].st_dev
    with ShareDaemon(layers) as daemon, FakeGuest(daemon.socket_path, queue_size=64, slot_data_bytes=1 << 20) as guest:
        fuse = guest.fuse
        fuse.init()
        nodes = [fuse.lookup(ROOT, name).nodeid for name in (b"one", b"two")]
        assert len({fuse.getattr(node).ino for node in nodes}) == 2
        entries = list(layers.iterdir())
        assert layers.stat().st_ino in {path.stat().st_ino for path in entries}
        for path in entries:
            fuse.lookup(ROOT, path.name.encode())
        assert stat.S_ISDIR(fuse.getattr(ROOT).mode)
        handles = [fuse.open_flags(node, os.O_RDONLY) for node in nodes]
        for node, handle, name in zip(nodes, handles, ("one", "two"), strict=True):
            assert fuse.read(node, 0, 100, handle) == f"contents of {name}".encode()
        handle = fuse.open_flags(nodes[1], os.O_RDWR)
        fuse.write(nodes[1], handle, 0, b"CONTENTS")
        assert (layers / "one").read_text() == "contents of one"
        assert (layers / "two").read_text() == "CONTENTS of two"
        assert_alive(daemon)


@pytest.mark.parametrize("plus", [False, True])
def test_cookies_of_64_bits(source: Path, plus: bool) -> None:
    """An lseek to them fails on the host; a listing goes on all the same, from where it stood or from the start."""
    (source / "dir").mkdir()
    with GateFs(source / "dir"), ShareDaemon(source) as daemon, FakeGuest(daemon.socket_path, queue_size=64) as guest:
        fuse = guest.fuse
        fuse.init()
        node = fuse.lookup(ROOT, b"dir").nodeid
        names = [entry.name for entry in fuse.readdir(node, plus=plus, size=512)]
        assert names == [b"entry_%03d" % k for k in range(ENTRIES)]
        opcode = fc.READDIRPLUS if plus else fc.READDIR
        handle = fuse.open_flags(node, os.O_RDONLY, directory=True)

        def some(offset: int) -> list[fc.DirEntry]:
            body = fc.READ_IN.pack(handle, offset, 4096, 0, 0, 0, 0)
            return fc.parse_dirents(fuse.request(opcode, node, body, data_bytes=4096), plus)

        first = some(0)
        some(first[-1].next_off)
        again = some(first[2].next_off)  # goes back: read from the start up to there
        assert again[0].name == first[3].name
        with pytest.raises(OSError, match=rf"Errno {errno.EINVAL}\]"):
            some((1 << 63) + 5)  # no entry's
        assert some(0) == first
        assert_alive(daemon)


def test_capabilities_stay_where_the_guest_keeps_them(source: Path, fuse: FuseClient) -> None:
    """The guest's kernel removes them itself where they are to go. Its overlayfs copies a file up: attributes first,
    then size, mode and owner; the host's own removal must not show."""
    entry, handle = fuse.create(ROOT, b"f")
    node = entry.nodeid
    for value in (None, CAPABILITY):
        if value:
            fuse.setxattr(node, b"security.capability", value)
        fuse.setattr(node, fc.Change(valid=fc.SET_SIZE, size=1000))
        fuse.setattr(node, fc.Change(valid=fc.SET_SIZE, size=500, handle=handle))
        # As Linux sends it: KILL_SUIDGID comes with every change of owner
        owner = fc.SET_UID | fc.SET_GID | fc.SET_KILL_SUIDGID
        fuse.setattr(node, fc.Change(valid=fc.SET_MODE | owner, mode=0o755, uid=7, gid=8))
        fuse.setattr(node, fc.Change(valid=owner, uid=0, gid=0))
        fuse.setattr(node, fc.Change(valid=fc.SET_UID, uid=1))
        if value:
            assert os.getxattr(source / "f", "security.capability") == value
        else:
            assert "security.capability" not in os.listxattr(source / "f")
    fuse.setattr(node, fc.Change(valid=fc.SET_SIZE | fc.SET_KILL_SUIDGID, size=1))  # as a plain user
    assert "security.capability" not in os.listxattr(source / "f")


@pytest.mark.parametrize("name", [b"redirect", b"metacopy", b"overlay.redirect", b"overlay.overlay.metacopy"])
def test_redirects_of_overlayfs_are_refused(source: Path, fuse: FuseClient, name: bytes) -> None:
    """The host's overlayfs would follow them out of what the guest was given."""
    node = fuse.mkdir(ROOT, b"d").nodeid
    with pytest.raises(OSError, match=rf"Errno {errno.EPERM}\]"):
        fuse.setxattr(node, b"trusted.overlay." + name, b"/etc")
    assert os.listxattr(source / "d") == []
    fuse.setxattr(node, b"trusted.overlay.opaque", b"y")
    fuse.setxattr(node, b"trusted.redirect", b"/etc")
