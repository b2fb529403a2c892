"""RAFS v5: samples of the real tool to the last md5, images without chunk numbers, images with holes, our own writer's
images."""

import hashlib
import json
import os
import re
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reader.test_bootstrap import SAMPLES, compare_entry, fill_tree, names_below, needs_samples
from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.cli.build import build_image
from virtiofsd_nydus.cli.check import list_faults
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.reader.bootstrap import Bootstrap
from virtiofsd_nydus.reader.data import opened_with_data

NYDUS_IMAGE = os.environ.get("NYDUS_IMAGE", "")
RESULT = "sha256-nocompress-repeatable.result"
HAS_HOLE = 8


def listed_names(entries: list[dict[str, Any]], parent: str) -> Iterator[tuple[str, str, str]]:
    """(path, type, link target) of a listing as tree(1) prints it."""
    for entry in entries:
        if entry["type"] != "report":
            path = f"{parent}/{entry['name']}" if entry["name"] else ""
            yield path or "/", entry["type"], entry.get("target", "")
            yield from listed_names(entry.get("contents", []), path)


def compare_with_result(bootstrap: Path) -> None:
    text = (SAMPLES / "v5" / RESULT).read_text()
    listing, end = json.JSONDecoder().raw_decode(text)
    digests = dict(reversed(line) for line in re.findall(r"^(\w{32})  (.*)$", text[end:], re.MULTILINE))
    types = {"directory": stat.S_IFDIR, "file": stat.S_IFREG, "link": stat.S_IFLNK}
    with opened_with_data(bootstrap, SAMPLES / "v5" / "blobs") as image:
        assert list_faults(image, 100) == []
        walked = {entry.path: entry.attr for entry in image.walk()}
        listed = {path: (kind, target) for path, kind, target in listed_names(listing, "")}
        assert walked.keys() == listed.keys()
        for path, (kind, target) in listed.items():
            assert stat.S_IFMT(walked[path].mode) == types[kind], path
            if kind == "link":
                assert image.readlink(walked[path].ino) == target
        files = {path: attr for path, attr in walked.items() if stat.S_ISREG(attr.mode)}
        assert {path: hashlib.md5(image.read(attr.ino)).hexdigest() for path, attr in files.items()} == digests
        for path in files:
            for chunk in image.chunks(files[path].ino):
                assert chunk.chunk_index < image.blobs[0].chunk_count


@needs_samples
@pytest.mark.parametrize("name", ["sha256-nocompress-repeatable", "blake3-lz4_block-non_repeatable"])
def test_samples_are_their_listing(name: str) -> None:
    compare_with_result(SAMPLES / "v5" / name)


def inode_offsets(content: bytes) -> list[int]:
    (table,) = struct.unpack_from("<Q", content, 32)
    (slots,) = struct.unpack_from("<I", content, 56)
    return [slot << 3 for slot in struct.unpack_from(f"<{slots}I", content, table)]


def chunk_offsets(content: bytes, inode: int) -> list[int]:
    (flags,) = struct.unpack_from("<Q", content, inode + 80)
    (mode,) = struct.unpack_from("<I", content, inode + 60)
    count, name, _ = struct.unpack_from("<IHH", content, inode + 96)
    if not stat.S_ISREG(mode):
        return []
    at = inode + 128 + (name + 7 & ~7)
    if flags & 4:
        at += 8 + (struct.unpack_from("<Q", content, at)[0] + 7 & ~7)
    return [at + 80 * k for k in range(count)]


def without_numbers(bootstrap: Path, to: Path) -> Path:
    """The image as builders before the extended blob table wrote it: no sizes of blobs, each chunk index 0."""
    content = bytearray(bootstrap.read_bytes())
    content[68:80] = bytes(12)
    for inode in inode_offsets(content):
        for chunk in chunk_offsets(content, inode):
            content[chunk + 72 : chunk + 76] = bytes(4)
    to.write_bytes(content)
    return to


@needs_samples
def test_chunks_without_numbers(tmp_path: Path) -> None:
    """Ranks by place are the numbers that the extended image has."""
    sample = SAMPLES / "v5" / "sha256-nocompress-repeatable"
    bare = without_numbers(sample, tmp_path / "bare")
    compare_with_result(bare)
    with Bootstrap(sample) as numbered, Bootstrap(bare) as image:
        assert numbered.blobs[0].chunk_count == image.blobs[0].chunk_count == 23
        for entry in image.walk():
            if stat.S_ISREG(entry.attr.mode):
                assert list(image.chunks(entry.attr.ino)) == list(numbered.chunks(entry.attr.ino))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("v5") / "source"
    top.mkdir()
    fill_tree(top)
    return top


def compare_with_source(source: Path, bootstrap: Path, blobs: Path) -> None:
    with opened_with_data(bootstrap, blobs) as image:
        assert list_faults(image, 100) == []
        expected = dict(names_below(source))
        assert {entry.path for entry in image.walk()} == expected.keys()
        for path, real in expected.items():
            compare_entry(image, path, real)
            if stat.S_ISREG(real.lstat().st_mode):
                assert image.read(image.resolve(path)) == real.read_bytes(), path
        with pytest.raises(FileNotFoundError):
            image.resolve("/many/absent")
        with pytest.raises(NotADirectoryError):
            image.resolve("/large/x")
        assert image.resolve("/many/..") == image.root_ino == image.resolve("/..")


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("compressor, digester", [("none", "sha256"), ("lz4_block", "blake3"), ("zstd", "sha256")])
def test_our_own(source: Path, tmp_path: Path, compressor: str, digester: str, aligned: bool) -> None:
    options = BuildOptions(
        fs_version=5, compressor=compressor, digester=digester, chunk_size=65536, aligned_chunk=aligned
    )
    build_image(source, tmp_path / "boot", tmp_path / "blobs", options)
    compare_with_source(source, tmp_path / "boot", tmp_path / "blobs")
    compare_with_source(source, without_numbers(tmp_path / "boot", tmp_path / "bare"), tmp_path / "blobs")


def test_holes(tmp_path: Path) -> None:
    """A file of three chunks that stand apart: what lies between them, before and behind reads as zeroes."""
    (tmp_path / "source").mkdir()
    data = hashlib.shake_128(b"holes").digest(3 * 65536)
    (tmp_path / "source" / "file").write_bytes(data)
    build_image(
        tmp_path / "source",
        tmp_path / "boot",
        tmp_path / "blobs",
        BuildOptions(fs_version=5, chunk_size=65536, compressor="none"),
    )
    content = bytearray((tmp_path / "boot").read_bytes())
    inode = next(at for at in inode_offsets(content) if chunk_offsets(content, at))
    starts, size = [10_000, 200_000, 200_000 + 65536], 400_000
    struct.pack_into("<Q", content, inode + 64, size)
    (flags,) = struct.unpack_from("<Q", content, inode + 80)
    struct.pack_into("<Q", content, inode + 80, flags | HAS_HOLE)
    expected = bytearray(size)
    for k, (at, start) in enumerate(zip(chunk_offsets(content, inode), starts, strict=True)):
        struct.pack_into("<Q", content, at + 64, start)
        expected[start : start + 65536] = data[k * 65536 : (k + 1) * 65536]
    (tmp_path / "holes").write_bytes(content)
    with opened_with_data(tmp_path / "holes", tmp_path / "blobs") as image:
        assert list_faults(image, 100) == []
        ino = image.resolve("/file")
        assert image.read(ino) == expected
        for off, length in ((0, 5), (9_999, 2), (75_535, 2), (199_999, 65_538), (331_071, 10), (399_990, 100)):
            assert image.read(ino, off, length) == expected[off : off + length]
        assert [chunk.file_off for chunk in image.chunks(ino)] == starts


@needs_samples
def test_layout_before_1_0_is_refused() -> None:
    with pytest.raises(Failure, match=r"RAFS v5 layout from before version 1\.0, which is not supported"):
        Bootstrap(SAMPLES / "negative" / "legacy-v5-prerelease.boot")


@pytest.mark.peer
@pytest.mark.skipif(not shutil.which(NYDUS_IMAGE), reason="NYDUS_IMAGE names no nydus-image")
@pytest.mark.parametrize(
    "options",
    [
        "--compressor zstd",
        "--compressor none --chunk-size 4096",
        "--compressor lz4_block --digester sha256",
        "--compressor zstd --aligned-chunk",
        "--blob-inline-meta",
    ],
)
def test_images_of_the_real_tool(source: Path, tmp_path: Path, options: str) -> None:
    inline = "inline" in options
    where = ["-D", tmp_path / "blobs"] + ([] if inline else ["-B", tmp_path / "boot"])
    (tmp_path / "blobs").mkdir()
    subprocess.run(
        [NYDUS_IMAGE, "create", "--type", "directory", "--fs-version", "5", *options.split(), *where, source],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    boot = next((tmp_path / "blobs").iterdir()) if inline else tmp_path / "boot"
    compare_with_source(source, boot, tmp_path / "blobs")
