"""The kernel's own EROFS as a second reader: the bootstrap of an uncompressed image mounts, and shows the same tree."""

import ctypes
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import tree_listing
from tests.rafs import decoder
from tests.system.conftest import Converter
from tests.system.daemon import ServedImage
from tests.system.guest_tree import Record, differences
from tests.system.image import LARGE_CHUNK_BYTES, SMALL_CHUNK_BYTES

MS_RDONLY = 1
FILES_AS_DEVICES_SINCE = (6, 12)  # the kernel from which EROFS mounts plain files


def make_devices(converter: Converter, image: ServedImage, directory: Path) -> list[Path]:
    """The image's blobs as devices: every chunk uncompressed at its place (in the blob itself, chunks follow each other
    without gaps). In the order of the bootstrap's device slots."""
    devices = []
    for entry in decoder.Bootstrap(image.bootstrap.read_bytes()).blobs:
        blob = decoder.Blob(converter.registry.blob_file(entry.blob_id).read_bytes())
        device = directory / entry.blob_id
        device.write_bytes(blob.expand(entry.codec, entry.digester))
        devices.append(device)
    return devices


@contextmanager
def mounted(bootstrap: Path, blobs: list[Path], where: Path) -> Iterator[Path]:
    """By mount(2) itself: the mount command would put a loop device in between."""
    where.mkdir()
    with ExitStack() as stack:
        major, minor = map(int, platform.release().split(".")[:2])
        if (major, minor) < FILES_AS_DEVICES_SINCE:
            bootstrap, *blobs = [stack.enter_context(loop_device(path)) for path in (bootstrap, *blobs)]
        options = ",".join(f"device={path}" for path in blobs)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(os.fsencode(bootstrap), os.fsencode(where), b"erofs", MS_RDONLY, options.encode()):
            code = ctypes.get_errno()
            raise OSError(code, f"mount -t erofs -o {options} {bootstrap}: {os.strerror(code)}")
        try:
            yield where
        finally:
            libc.umount2(os.fsencode(where), 0)


@contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    made = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", str(path)], check=True, capture_output=True, text=True
    )
    device = Path(made.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)


@pytest.fixture(autouse=True)
def need_erofs() -> None:
    if (
        "erofs" not in Path("/proc/filesystems").read_text()
        and subprocess.run(["modprobe", "erofs"], capture_output=True).returncode
    ):
        pytest.skip("this kernel has no EROFS")


@pytest.mark.parametrize(("digester", "chunk_bytes"), [("blake3", SMALL_CHUNK_BYTES), ("sha256", LARGE_CHUNK_BYTES)])
def test_kernel_shows_the_same_tree(
    converter: Converter, expected_tree: list[Record], tmp_path: Path, digester: str, chunk_bytes: int
) -> None:
    image = converter.convert("none", digester, chunk_bytes)
    with mounted(image.bootstrap, make_devices(converter, image, tmp_path), tmp_path / "mnt") as root:
        assert differences(expected_tree, list(tree_listing.list_tree(root))) == []


def test_fsck_passes(converter: Converter, tmp_path: Path) -> None:
    image = converter.convert("none", "blake3")
    devices = [f"--device={path}" for path in make_devices(converter, image, tmp_path)]
    done = subprocess.run(["fsck.erofs", "--extract", *devices, str(image.bootstrap)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_fsck_notices_damage(converter: Converter, tmp_path: Path) -> None:
    """Of the test itself: fsck.erofs does fail when a superblock is wrong."""
    image = converter.convert("none", "blake3")
    damaged = bytearray(image.bootstrap.read_bytes())
    damaged[1024 + 14] ^= 0xFF  # the root's nid
    (tmp_path / "damaged").write_bytes(damaged)
    devices = [f"--device={path}" for path in make_devices(converter, image, tmp_path)]
    done = subprocess.run(["fsck.erofs", *devices, str(tmp_path / "damaged")], capture_output=True)
    assert done.returncode != 0
