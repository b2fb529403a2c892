"""Whatever a person gets wrong is one line on standard error that names it, and exit 1 (125 from boot, whose other
statuses are the command's)."""

import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.peers.registry import LocalRegistry, find_free_port
from tests.system.daemon import Daemon, ServedImage
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest

FAILED, BOOT_FAILED = 1, 125
SUPERBLOCK = 1024  # where EROFS has it
FEATURE_INCOMPAT = 80  # in it
EXT_FLAGS = 1024 + 128  # RAFS's own superblock follows; its u64 of flags is first


def refuse(*words: str, status: int = FAILED, env: dict[str, str] | None = None) -> str:
    """Runs the command line, which must end at once with that status: its one line."""
    done = subprocess.run(
        [sys.executable, "-m", "virtiofsd_nydus.cli.main", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("virtiofsd-nydus "), done.stderr
    return lines[0]


def damage(change: Callable[[bytearray], object]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        changed = bytearray(data)
        change(changed)
        return bytes(changed)

    return apply


def set_u32(offset: int, value: int) -> Callable[[bytes], bytes]:
    return damage(lambda data: struct.pack_into("<I", data, offset, value))


BOOTSTRAPS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "text": (lambda _: b"#!/bin/sh\necho this is no bootstrap\n" * 200, "not a RAFS bootstrap"),
    "empty": (lambda _: b"", "not a RAFS bootstrap"),
    "zeroes": (lambda data: bytes(len(data)), "not a RAFS bootstrap"),
    "cut in the superblock": (lambda data: data[:1100], "not a RAFS bootstrap"),
    "cut in the middle": (lambda data: data[: len(data) // 2 + 1], "truncated|does not fit"),
    "cut by a block": (lambda data: data[:-4096], "truncated|does not fit"),
    "an unknown feature": (set_u32(SUPERBLOCK + FEATURE_INCOMPAT, 0x8000_0004), "feature 0x80000000"),
    "an unknown flag": (damage(lambda data: data.__setitem__(EXT_FLAGS + 5, 0x80)), "feature 0x8"),
}


@pytest.mark.parametrize("case", BOOTSTRAPS)
def test_daemon_refuses_bootstrap(image: ServedImage, tmp_path: Path, case: str) -> None:
    change, words = BOOTSTRAPS[case]
    bad = tmp_path / "bad.boot"
    bad.write_bytes(change(image.bootstrap.read_bytes()))
    (tmp_path / "blobs").mkdir()
    line = refuse(
        "virtiofs",
        "--sock",
        str(tmp_path / "fs.sock"),
        "--bootstrap",
        str(bad),
        "--localfs-dir",
        str(tmp_path / "blobs"),
    )
    assert str(bad) in line and re.search(words, line), line
    assert not (tmp_path / "fs.sock").exists()


def test_the_bootstrap_those_were_made_of_is_served(image: ServedImage, tmp_path: Path) -> None:
    """Of the test above itself."""
    with Daemon(image, tmp_path / "cache") as daemon, FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        assert guest.fuse.read_file("etc/becomes-a-file") == b"in a file now\n"


@pytest.mark.parametrize("case", BOOTSTRAPS)
def test_check_refuses_bootstrap(image: ServedImage, tmp_path: Path, case: str) -> None:
    bad = tmp_path / "bad.boot"
    bad.write_bytes(BOOTSTRAPS[case][0](image.bootstrap.read_bytes()))
    assert str(bad) in refuse("check", str(bad))


def test_no_such_bootstrap(tmp_path: Path) -> None:
    line = refuse(
        "virtiofs",
        "--sock",
        str(tmp_path / "fs.sock"),
        "--bootstrap",
        str(tmp_path / "none"),
        "--localfs-dir",
        str(tmp_path),
    )
    assert str(tmp_path / "none") in line


def test_missing_blob(image: ServedImage, tmp_path: Path) -> None:
    """check says which one, a line for each; what a guest gets is test_faults'."""
    (tmp_path / "blobs").mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "virtiofsd_nydus.cli.main",
            "check",
            str(image.bootstrap),
            "--blob-dir",
            str(tmp_path / "blobs"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == FAILED
    told = done.stdout + done.stderr
    assert all(blob[:12] in told for blob in image.blobs)
    assert len(told.splitlines()) <= len(image.blobs) + 2, told


@pytest.fixture
def guest_dir(tmp_path: Path) -> dict[str, str]:
    """Environment with a guest kernel that nothing gets as far as booting."""
    directory = tmp_path / "guest"
    directory.mkdir()
    for name in ("vmlinuz", "initramfs.cpio"):
        (directory / name).write_bytes(b"")
    return {"VIRTIOFSD_NYDUS_GUEST_DIR": str(directory)}


@pytest.fixture
def locked_registry(tmp_path: Path) -> Iterator[LocalRegistry]:
    with LocalRegistry(tmp_path / "locked", auth="htpasswd") as server:
        yield server


def test_refused_login(
    oci_image: str, locked_registry: LocalRegistry, guest_dir: dict[str, str], tmp_path: Path
) -> None:
    target = f"docker://{locked_registry.host}/some/image:v1"
    for creds in ([], ["--creds", "someone:wrong-secret"]):
        line = refuse("convert", f"oci:{oci_image}", target, *creds)
        assert locked_registry.host in line and "login" in line.lower() and "wrong-secret" not in line
        line = refuse("boot", target, "--cache-dir", str(tmp_path / "cache"), *creds, status=BOOT_FAILED, env=guest_dir)
        assert locked_registry.host in line and "login" in line.lower() and "wrong-secret" not in line


def test_unreachable_registry(oci_image: str, guest_dir: dict[str, str], tmp_path: Path) -> None:
    host = f"127.0.0.1:{find_free_port()}"
    assert host in refuse("convert", f"oci:{oci_image}", f"docker://{host}/some/image:v1")
    assert host in refuse(
        "boot", f"docker://{host}/some/image:v1", "--cache-dir", str(tmp_path), status=BOOT_FAILED, env=guest_dir
    )


def test_no_such_image(registry: LocalRegistry, guest_dir: dict[str, str], tmp_path: Path) -> None:
    reference = f"docker://{registry.host}/no/such/image:v1"
    line = refuse("boot", reference, "--cache-dir", str(tmp_path), status=BOOT_FAILED, env=guest_dir)
    assert "no/such/image" in line
    assert "no-layout" in refuse("convert", f"oci:{tmp_path}/no-layout:v1", reference)


def test_socket_path_too_long(image: ServedImage, tmp_path: Path) -> None:
    long = str(tmp_path / ("x" * 108))
    for words in (["--sock", long], ["--sock", str(tmp_path / "fs"), "--apisock", long]):
        line = refuse("virtiofs", *words, "--bootstrap", str(image.bootstrap), "--localfs-dir", str(tmp_path))
        assert long in line and "107" in line


def test_busy_socket(image: ServedImage, tmp_path: Path) -> None:
    """One that a process listens on is left alone; one that none listens on is replaced."""
    path = tmp_path / "fs.sock"
    words = ["--bootstrap", str(image.bootstrap), "--localfs-dir", str(tmp_path)]
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(1)
        line = refuse("virtiofs", "--sock", str(path), *words)
        assert str(path) in line and "in use" in line
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert path.exists()
    process = subprocess.Popen(
        [sys.executable, "-m", "virtiofsd_nydus.cli.main", "virtiofs", "--sock", str(path), *words],
        stderr=subprocess.DEVNULL,
    )
    try:
        with FakeGuest(path) as guest:
            guest.fuse.init()
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_no_kernel_and_no_qemu(tmp_path: Path) -> None:
    assert "make guest" in refuse("boot", "/x", "--kernel", str(tmp_path / "none"), status=BOOT_FAILED)
    assert "apt-get install" in refuse("boot", "/x", status=BOOT_FAILED, env={"PATH": str(tmp_path)})
