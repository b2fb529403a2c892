"""A host that changes under the guest's hands, and names that are not names: nothing outside the source is reached."""

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from virtiofsd_nydus.fakeguest import fuse_client as fc
from virtiofsd_nydus.fakeguest.fuse_client import ROOT, FuseClient

ROUNDS = 400
AT_FDCWD, RENAME_EXCHANGE = -100, 2
LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[Callable[[], int]]:
    """A thread that exchanges two names all the time; gives the number of exchanges so far."""
    stop, count = threading.Event(), 0

    def swap() -> None:
        nonlocal count
        while not stop.is_set():
            assert LIBC.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0
            count += 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield lambda: count
    finally:
        stop.set()
        thread.join()


def test_a_directory_that_turns_into_a_symlink(tmp_path: Path, source: Path, fuse: FuseClient) -> None:
    """Care 2 and 3: between any two requests, and within one, "d" is a directory or a link to what lies outside."""
    (source / "d").mkdir()
    (source / "d" / "mine").touch()
    (source / "other").symlink_to(tmp_path)
    inside: set[str] = set()
    with swapping(source / "d", source / "other") as swaps:
        rounds = 0
        while rounds < ROUNDS or (swaps() < ROUNDS and rounds < 50 * ROUNDS):
            rounds += 1
            name = b"n%d" % (rounds % 7)
            for at in (b"d", b"other"):
                with suppress(OSError):
                    found = fuse.lookup(ROOT, at).nodeid
                    with pytest.raises(OSError, match=rf"\[Errno ({errno.ENOENT}|{errno.ENOTDIR}|{errno.ESTALE})\]"):
                        fuse.lookup(found, b"outside")
                    with suppress(OSError):
                        entry, handle = fuse.create(found, name, flags=os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                        inside.add(name.decode())
                        fuse.release(entry.nodeid, handle)
                    with suppress(OSError):
                        fuse.rename(found, name, found, b"moved")
                        inside.add("moved")
                    for entry_of in fuse.readdir(found):
                        assert entry_of.name != b"outside"
    assert inside, "the guest never met the directory"
    assert {p.name for p in tmp_path.iterdir()} == {"outside", "source"}
    assert (tmp_path / "outside").read_text() == "not for guests\n"


def test_a_file_that_turns_into_a_device(source: Path, fuse: FuseClient) -> None:
    """Care 4: what was found as a file is opened as that file or not at all; a FIFO would hold the daemon."""
    (source / "f").write_bytes(b"file")
    os.mkfifo(source / "other")
    with swapping(source / "f", source / "other") as swaps:
        rounds = opened = 0
        while rounds < ROUNDS or (swaps() < ROUNDS and rounds < 50 * ROUNDS):
            rounds += 1
            for flags in (os.O_RDONLY, os.O_RDWR):
                with suppress(OSError):
                    entry, handle = fuse.create(ROOT, b"f", flags=flags | os.O_CREAT)
                    assert fuse.read(entry.nodeid, 0, 10, handle) == b"file"
                    opened += 1
                    fuse.release(entry.nodeid, handle)
    assert opened


@pytest.mark.parametrize("tail", [b"", b"../x\0", b"/etc/passwd\0", b"\0" * 8], ids=repr)
def test_what_follows_a_names_end(tmp_path: Path, source: Path, fuse: FuseClient, tail: bytes) -> None:
    """Care 1: a name ends at its NUL, whatever the request carries behind it."""
    fuse.request(fc.MKDIR, ROOT, (0o755).to_bytes(4, "little") + bytes(4) + b"d\0" + tail, 128)
    assert [p.name for p in source.iterdir()] == ["d"]
    assert fuse.request(fc.LOOKUP, ROOT, b"d\0" + tail, 128)
    fuse.request(fc.RMDIR, ROOT, b"d\0" + tail)
    assert list(source.iterdir()) == []
    assert {p.name for p in tmp_path.iterdir()} == {"outside", "source"}


@pytest.mark.parametrize(
    "opcode, head",
    [
        (fc.LOOKUP, 0),
        (fc.UNLINK, 0),
        (fc.RMDIR, 0),
        (fc.MKDIR, 8),
        (fc.MKNOD, 16),
        (fc.CREATE, 16),
        (fc.LINK, 8),
        (fc.RENAME, 8),
        (fc.RENAME2, 16),
        (fc.SYMLINK, 0),
        (fc.GETXATTR, 8),
        (fc.SETXATTR, 8),
        (fc.REMOVEXATTR, 0),
    ],
)
def test_names_without_an_end(source: Path, fuse: FuseClient, opcode: int, head: int) -> None:
    """Care 1 and 7: nothing is read beyond the request."""
    second = [b"n\0m"] if opcode in (fc.RENAME, fc.RENAME2, fc.SYMLINK) else []
    for name in (b"", b"n", b"n" * 255, b"n" * 300, b"n" * 5000, *second):
        with pytest.raises(OSError, match=rf"\[Errno ({errno.EINVAL}|{errno.ENAMETOOLONG}|{errno.ERANGE})\]"):
            fuse.request(opcode, ROOT, bytes(head) + name, 144)
    assert list(source.iterdir()) == []
