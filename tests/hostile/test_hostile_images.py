"""Images with one fault each: the three ways in which they are met, and that nothing of them is ever without end."""

import errno
import stat
from pathlib import Path

import pytest

from tests.hostile.faults import CHECK, DATA, FAULTS, INODE, OPEN, Fault
from tests.hostile.make import good_images, make_file
from virtiofsd_nydus.cli.check import list_faults
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.reader.bootstrap import Bootstrap
from virtiofsd_nydus.reader.data import opened_with_data

NAMES_MAX = 200  # that a walk may meet in an image of a dozen


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return good_images(tmp_path_factory.mktemp("hostile") / "good")


def use_everything(image: Bootstrap) -> None:
    """What a guest may ask of every inode it can reach; a directory is entered once."""
    seen: set[int] = set()
    todo = [image.root_ino]
    while todo:
        ino = todo.pop()
        if ino in seen:
            continue
        seen.add(ino)
        assert len(seen) < NAMES_MAX
        for call in (
            image.getattr,
            image.xattrs,
            image.readlink,
            lambda one: list(image.chunks(one)),
            lambda one: image.read(one, 0, 100_000),
        ):
            try:
                call(ino)
            except OSError as error:
                assert error.errno in (errno.EIO, errno.EINVAL, errno.EISDIR, errno.ENODEV)
        try:
            todo += [entry.ino for entry in image.listdir(ino)]
        except OSError as error:
            assert error.errno in (errno.EIO, errno.ENOTDIR)


def use(image: Bootstrap, path: str, data: bool) -> None:
    """The first use of an inode: a directory is listed and its entries looked at, a link read, a file opened or
    read."""
    ino = image.lookup(image.root_ino, ".") if path == "/." else image.resolve(path)
    attr = image.getattr(ino)
    if stat.S_ISDIR(attr.mode):
        for entry in image.listdir(ino):
            image.getattr(entry.ino)
    elif stat.S_ISLNK(attr.mode):
        image.readlink(ino)
    elif data:
        image.read(ino)
    image.xattrs(ino)


def assert_eio(image: Bootstrap, path: str, data: bool) -> None:
    with pytest.raises(OSError, match="Input/output error") as caught:
        use(image, path, data)
    assert caught.value.errno == errno.EIO


def test_good_images_are_good(good: dict[int, Path]) -> None:
    for path in good.values():
        with opened_with_data(path, path.parent / "blobs") as image:
            assert list_faults(image, 100) == []
            for entry in image.walk():
                use(image, entry.path, True)


@pytest.mark.parametrize("one", FAULTS, ids=lambda one: one.name)
def test_fault(one: Fault, good: dict[int, Path], tmp_path: Path) -> None:
    path = make_file(one, good[one.version], tmp_path)
    blobs = good[one.version].parent / "blobs"
    assert path.read_bytes() != good[one.version].read_bytes()
    if one.kind == OPEN:
        with pytest.raises(Failure) as caught:
            Bootstrap(path)
        assert one.line in str(caught.value)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
        assert caught.value.cause == Cause.FORMAT
        return
    with Bootstrap(path) as image:
        faults = list_faults(image, 100)
        if one.line:
            assert any(one.line in line for line in faults), faults
    with opened_with_data(path, blobs) as image:
        use_everything(image)
        if one.kind in (INODE, DATA):
            assert_eio(image, one.path, one.kind == DATA)
        else:
            assert one.kind == CHECK
