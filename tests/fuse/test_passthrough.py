"""FUSE passthrough: the kernel reads files that are wholly in the cache by itself; no open is answered wrong."""

import hashlib
import os
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fuse.conftest import StartHost
from tests.fuse.host import VERB, HostDaemon
from tests.system.daemon import WAIT_SECONDS, ServedImage, wait_until

LARGE_BYTES = 3 << 20
PART_BYTES = 1 << 20


def build(base: Path, name: str, *, version: str = "6") -> tuple[Path, ServedImage]:
    """A tree with two large files and a small one, and its image."""
    tree, blobs = base / f"tree-{name}", base / f"blobs-{name}"
    tree.mkdir()
    noise = random.Random(name)
    for file, size in (("large", LARGE_BYTES), ("other", LARGE_BYTES + 4097), ("small", 9000)):
        (tree / file).write_bytes(noise.randbytes(size))
    subprocess.run(
        [
            *VERB,
            "build",
            "--fs-version",
            version,
            "--bootstrap",
            str(base / f"{name}.boot"),
            "--blob-dir",
            str(blobs),
            str(tree),
        ],
        check=True,
        capture_output=True,
    )
    return tree, ServedImage(base / f"{name}.boot", "localfs", {"dir": str(blobs)}, {})


@pytest.fixture
def tree_and_image(tmp_path: Path) -> tuple[Path, ServedImage]:
    return build(tmp_path, "one")


def loops_of(directory: Path) -> list[str]:
    """Loop devices whose file lies below a directory."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            name = entry.read_text().strip()
        except OSError:  # ended meanwhile
            continue
        if name.startswith(f"{directory}/"):
            found.append(name)
    return found


def digest(path: Path) -> str:
    """Nothing is asked of the file but its bytes: Python's open() would ask whether it is a terminal too."""
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def requests(host: HostDaemon) -> dict[str, int]:
    counters = host.counters()
    return {name: counters[name] for name in ("read_bytes", "fuse_requests")}


def test_a_compressed_cache_is_not_read_past_us(
    start_host: StartHost, tree_and_image: tuple[Path, ServedImage]
) -> None:
    tree, image = tree_and_image
    host = start_host(served=replace(image, compressed=True))
    large = host.mountpoint / "large"
    for _ in range(2):
        assert digest(large) == digest(tree / "large")
    before = requests(host)["read_bytes"]
    with large.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert stream.read(PART_BYTES) == (tree / "large").read_bytes()[:PART_BYTES]
    assert requests(host)["read_bytes"] >= before + PART_BYTES


def test_complete_files_are_read_past_us(
    start_host: StartHost, tree_and_image: tuple[Path, ServedImage], tmp_path: Path
) -> None:
    tree, image = tree_and_image
    host = start_host(served=image)
    large = host.mountpoint / "large"
    with large.open("rb") as stream:  # not complete: through us
        assert stream.read(PART_BYTES) == (tree / "large").read_bytes()[:PART_BYTES]
    assert loops_of(tmp_path) == []
    assert digest(large) == digest(tree / "large")
    through_us = requests(host)["read_bytes"]
    assert through_us >= LARGE_BYTES
    subprocess.run(["sync", "-f", str(tmp_path)], check=True)
    for _ in range(2):
        assert digest(large) == digest(tree / "large")
    with large.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(stream.fileno(), 8192, LARGE_BYTES - 4096) == (tree / "large").read_bytes()[-4096:]
        assert os.pread(stream.fileno(), 1, LARGE_BYTES) == b""
    assert requests(host)["read_bytes"] == through_us
    assert sorted(loops_of(tmp_path)) != []
    assert digest(host.mountpoint / "small") == digest(tree / "small")
    assert requests(host)["read_bytes"] == through_us + 9000  # small ones stay with FUSE's own page cache
    host.process.terminate()
    assert host.process.wait(WAIT_SECONDS) == 0
    wait_until(lambda: loops_of(tmp_path) == [], "the loop devices' end")


def test_overlay_on_top(start_host: StartHost, tree_and_image: tuple[Path, ServedImage], mounts_dir: Path) -> None:
    tree, image = tree_and_image
    host = start_host(served=image)
    assert digest(host.mountpoint / "large") == digest(tree / "large")
    for name in ("upper", "work", "merged"):
        (mounts_dir / name).mkdir()
    merged = mounts_dir / "merged"
    through_us = requests(host)["read_bytes"]
    layers = f"lowerdir={host.mountpoint},upperdir={mounts_dir}/upper,workdir={mounts_dir}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(merged)], check=True)
    assert digest(merged / "large") == digest(tree / "large")
    assert requests(host)["read_bytes"] == through_us
    with (merged / "large").open("ab") as stream:
        stream.write(b"tail")
    assert (merged / "large").read_bytes() == (tree / "large").read_bytes() + b"tail"


def test_opens_of_one_file_agree(start_host: StartHost, tree_and_image: tuple[Path, ServedImage]) -> None:
    """A file that a process opened before it was complete stays as it is until the last one closes it; the kernel
    fails an open that is answered otherwise."""
    tree, image = tree_and_image
    host = start_host(served=image)
    path = host.mountpoint / "large"
    expected = (tree / "large").read_bytes()
    early = os.open(path, os.O_RDONLY)
    try:
        assert path.read_bytes() == expected  # complete now, and opened twice
        through_us = requests(host)["read_bytes"]
        assert path.read_bytes() == expected
        assert os.pread(early, 100, 5) == expected[5:105]
    finally:
        os.close(early)
    wait_until(
        lambda: (
            path.read_bytes() == expected
            and requests(host)["read_bytes"] == through_us
            and loops_of(host.config.parent.parent) != []
        ),
        "a read past the daemon",
    )
    late = os.open(path, os.O_RDONLY)
    try:
        assert path.read_bytes() == expected and os.pread(late, 100, 5) == expected[5:105]
    finally:
        os.close(late)


def test_open_files_outlive_the_daemon(
    start_host: StartHost, tree_and_image: tuple[Path, ServedImage], tmp_path: Path
) -> None:
    tree, image = tree_and_image
    host = start_host(served=image)
    path = host.mountpoint / "other"
    assert digest(path) == digest(tree / "other")
    fd = os.open(path, os.O_RDONLY)
    host.kill()
    try:
        with pytest.raises(OSError):
            path.read_bytes()
        assert os.pread(fd, LARGE_BYTES + 5000, 0) == (tree / "other").read_bytes()
    finally:
        os.close(fd)
        subprocess.run(["umount", "-l", str(host.mountpoint)], check=True)
    wait_until(lambda: loops_of(tmp_path) == [], "the loop devices' end")


def test_a_second_image_in_the_same_mount(start_host: StartHost, tmp_path: Path) -> None:
    """Images that the API mounts and unmounts, each with its own files past us."""
    host = start_host(bootstrap=False, served=build(tmp_path, "zero")[1])
    for name in ("a", "b"):
        tree, image = build(tmp_path, name)
        config = image.write_config(tmp_path / f"{name}.json", tmp_path / "cache").read_text()
        status, answer = host.request(
            "POST",
            f"/api/v1/mount?mountpoint=/{name}",
            {"source": str(image.bootstrap), "fs_type": "rafs", "config": config},
        )
        assert status == 204, answer
        path = host.mountpoint / name / "large"
        assert digest(path) == digest(tree / "large")
        through_us = requests(host)["read_bytes"]
        assert digest(path) == digest(tree / "large")
        assert requests(host)["read_bytes"] == through_us
    fd = os.open(host.mountpoint / "a/large", os.O_RDONLY)
    assert host.request("DELETE", "/api/v1/mount?mountpoint=/a")[0] == 204
    assert os.pread(fd, 4096, 0) == (tmp_path / "tree-a/large").read_bytes()[:4096]
    os.close(fd)
    assert digest(host.mountpoint / "b/large") == digest(tmp_path / "tree-b/large")
    wait_until(lambda: not any(name.endswith("/a.boot") for name in loops_of(tmp_path)), "the end of a's loop devices")


@pytest.mark.parametrize(("version", "words"), [("5", ()), ("6", ("--fuse-passthrough", "off"))])
def test_where_it_is_not_used_nobody_asks_for_opens(
    start_host: StartHost, tmp_path: Path, version: str, words: tuple[str, ...]
) -> None:
    tree, image = build(tmp_path, "plain", version=version)
    host = start_host(served=image, extra=words)
    for _ in range(2):
        assert digest(host.mountpoint / "large") == digest(tree / "large")
    before = requests(host)["fuse_requests"]
    for _ in range(20):
        assert digest(host.mountpoint / "large") == digest(tree / "large")
    assert requests(host)["fuse_requests"] == before
    assert loops_of(tmp_path) == []
