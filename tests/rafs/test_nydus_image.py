"""Nydus' own tool as the judge: it checks and unpacks our images, and builds the same tree to compare with.

Runs where the environment variable NYDUS_IMAGE names a nydus-image.
"""

import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.rafs.decoder import Blob, Bootstrap
from tests.rafs.trees import Entry, Tree, build_tar, make_tree, write_tar
from virtiofsd_nydus.builder.image import BuildOptions, LayerSource, build_layer, merge_layers
from virtiofsd_nydus.cli.main import main

NYDUS_IMAGE = os.environ.get("NYDUS_IMAGE", "")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not shutil.which(NYDUS_IMAGE), reason="NYDUS_IMAGE names no nydus-image"),
]
OPTIONS = [
    (compressor, digester, chunk_size)
    for compressor in ("none", "lz4_block", "zstd")
    for digester in ("blake3", "sha256")
    for chunk_size in (64 << 10, 1 << 20)
]


def run(*arguments: object) -> str:
    done = subprocess.run(
        [NYDUS_IMAGE, *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def make_judged_tree(chunk_size: int) -> Tree:
    """Without what the tool's unpack cannot do: special files (it panics, "not implemented", for RAFS v6)."""
    tree = make_tree(chunk_size % 89, chunk_size)
    for path in (b"/pipe", b"/null", b"/disk"):
        del tree[path]
    return tree


def write_image(folder: Path, trees: list[Tree], options: BuildOptions) -> tuple[Path, Path]:
    blobs = folder / "blobs"
    blobs.mkdir()
    layers = []
    for tree in trees:
        layer, data = build_tar(write_tar(tree), options)
        (blobs / layer.blob_id).write_bytes(data)
        layers.append(layer)
    bootstrap = folder / "image.boot"
    merge_layers(layers, options=options, out_bootstrap=bootstrap)
    return bootstrap, blobs


@pytest.mark.parametrize("version", [5, 6])
@pytest.mark.parametrize(("compressor", "digester", "chunk_size"), OPTIONS)
def test_judge_checks_and_unpacks(
    tmp_path: Path, compressor: str, digester: str, chunk_size: int, version: int
) -> None:
    options = BuildOptions(fs_version=version, compressor=compressor, digester=digester, chunk_size=chunk_size,
                           prefetch_policy="fs")  # fmt: skip
    (tmp_path / "whole").mkdir()
    whole, whole_blobs = write_image(tmp_path / "whole", [make_tree(chunk_size % 83, chunk_size)], options)
    assert "metadata is valid" in run("check", "-B", whole, "-D", whole_blobs, "-v")
    tree = make_judged_tree(chunk_size)
    upper: Tree = {b"/": tree[b"/"], b"/upper": Entry(stat.S_IFREG | 0o644, content=os.urandom(chunk_size + 5))}
    largest = max(tree.values(), key=lambda entry: len(entry.content))
    upper[b"/copy"] = Entry(stat.S_IFREG | 0o600, content=largest.content)  # its chunks are those of the layer below
    bootstrap, blobs = write_image(tmp_path, [tree, upper], options)
    assert "metadata is valid" in run("check", "-B", bootstrap, "-D", blobs, "-v")
    run("unpack", "-B", bootstrap, "-D", blobs, "--output", tmp_path / "out.tar")
    tree = tree | upper
    seen = set()
    with tarfile.open(tmp_path / "out.tar", encoding="utf-8", errors="surrogateescape") as tar:
        for member in tar:
            path = b"/" + member.name.encode("utf-8", "surrogateescape").strip(b"/")
            seen.add(path)
            entry = tree[path]
            assert (member.mode, member.uid, member.gid) == (stat.S_IMODE(entry.mode), entry.uid, entry.gid), path
            if member.isreg():
                extracted = tar.extractfile(member)
                assert extracted is not None and extracted.read() == entry.content, path
            elif member.islnk():
                linked = b"/" + member.linkname.encode("utf-8", "surrogateescape").strip(b"/")
                assert tree[linked].content == entry.content
            elif member.issym():
                assert member.linkname.encode("utf-8", "surrogateescape") == entry.target
    assert seen | {b"/"} == set(tree)


@pytest.mark.parametrize(("compressor", "digester", "chunk_size"), OPTIONS)
def test_structure_equals_the_judges(tmp_path: Path, compressor: str, digester: str, chunk_size: int) -> None:
    """The same tar, built by both: the same names, sizes, chunk digests and nearly the same bootstrap size."""
    tree = make_judged_tree(chunk_size)
    del tree[b"/a\nb"]  # the judge's pax parser stops at a newline in a value
    for entry in tree.values():
        entry.xattrs, entry.mtime_ns = {}, abs(entry.mtime_ns)
    data = write_tar(tree)
    options = BuildOptions(compressor=compressor, digester=digester, chunk_size=chunk_size)
    layer, blob_bytes = build_tar(data, options)
    ours = Bootstrap(merge_layers([layer], options=options).bootstrap)
    source = tmp_path / "layer.tar"
    source.write_bytes(data)
    run("create", "-t", "tar-rafs", "--blob-inline-meta", "--features", "blob-toc", "--compressor", compressor,
        "--digester", digester, "--chunk-size", hex(chunk_size), "--whiteout-spec", "none", "-b", tmp_path / "blob",
        source)  # fmt: skip
    run("create", "-t", "tar-rafs", "--features", "blob-toc", "--compressor", compressor, "--digester", digester,
        "--chunk-size", hex(chunk_size), "-B", tmp_path / "judge.boot", "-D", tmp_path, source)  # fmt: skip
    judged = Blob((tmp_path / "blob").read_bytes())
    our_blob = Blob(blob_bytes)
    assert our_blob.section("blob.digest") == judged.section("blob.digest")
    assert [chunk[:2] for chunk in our_blob.chunks] == [chunk[:2] for chunk in judged.chunks]
    assert list(our_blob.sections) == list(judged.sections)
    theirs = (tmp_path / "judge.boot").read_bytes()
    assert abs(len(ours.data) - len(theirs)) <= max(4096, len(theirs) // 100)
    if compressor == "none":
        size = sum(chunk[3] for chunk in our_blob.chunks)
        assert size == judged.sections["image.blob"][3] and our_blob.data[:size] == judged.data[:size]


WAYS = {
    "v5 aligned": BuildOptions(fs_version=5, aligned_chunk=True, prefetch_policy="blob"),
    "batch": BuildOptions(batch_size=64 << 10), "batch none": BuildOptions(batch_size=4096, compressor="none"),
    "encrypted": BuildOptions(encrypt=True), "encrypted batch": BuildOptions(encrypt=True, batch_size=1 << 20),
    "largest chunks": BuildOptions(chunk_size=16 << 20), "smallest chunks": BuildOptions(chunk_size=4096),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_judge_checks(tmp_path: Path, way: str) -> None:
    """What its unpack cannot read of its own images either, it can check."""
    options = WAYS[way]
    tree = make_tree(41, min(options.chunk_size, 1 << 20))
    upper: Tree = {b"/": tree[b"/"], b"/upper": Entry(stat.S_IFREG | 0o644, content=os.urandom(77777))}
    bootstrap, blobs = write_image(tmp_path, [tree, upper], options)
    assert "metadata is valid" in run("check", "-B", bootstrap, "-D", blobs, "-v")


def write_source(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("version", [5, 6])
def test_dictionaries_go_both_ways(tmp_path: Path, version: int, capsys: pytest.CaptureFixture[str]) -> None:
    shared = os.urandom(300_000)
    first = write_source(tmp_path / "first", {"a": shared, "b": b"first" * 1000})
    second = write_source(tmp_path / "second", {"c": shared, "d": b"second" * 1000})
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    chunk = ["--chunk-size", "0x10000"]
    # theirs for us
    run("create", "-v", str(version), *chunk, "-B", tmp_path / "theirs", "-D", blobs, first)
    words = ["--bootstrap", str(tmp_path / "ours2"), "--blob-dir", str(blobs), "--fs-version", str(version)]
    status = main(["build", str(second), *words, *chunk, "--chunk-dict", str(tmp_path / "theirs"), "--json"])
    out, said = capsys.readouterr()
    assert status == 0, said
    assert f'"dictionary_bytes": {len(shared)}' in out
    # ours for them
    words[1] = str(tmp_path / "ours")
    assert main(["build", str(first), *words, *chunk, "--json"]) == 0
    run("create", "-v", str(version), *chunk, "--chunk-dict", f"bootstrap={tmp_path / 'ours'}", "-B",
        tmp_path / "theirs2", "-D", blobs, second)  # fmt: skip
    assert len(list(blobs.iterdir())) in (2, 4)  # the same codec, and the same blob
    for name in ("ours2", "theirs2"):
        said = run("check", "-B", tmp_path / name, "-D", blobs)
        assert "metadata is valid" in said and said.count("compressed size") >= 2
        run("unpack", "-B", tmp_path / name, "-D", blobs, "--output", tmp_path / "out.tar")
        with tarfile.open(tmp_path / "out.tar") as tar:
            extracted = tar.extractfile("c")
            assert extracted is not None and extracted.read() == shared


def test_index_of_a_gzip_layer_equals_the_judges(tmp_path: Path) -> None:
    """Every context, every chunk, the whole bootstrap but the digest of the compressed table."""
    import gzip
    import struct

    import zstandard

    tree = make_judged_tree(1 << 20)
    del tree[b"/a\nb"]
    for entry in tree.values():
        entry.xattrs, entry.mtime_ns = {}, abs(entry.mtime_ns)
    tree[b"/random"] = Entry(stat.S_IFREG | 0o644, content=os.urandom(5 << 20))
    layer_file = tmp_path / "layer.tar.gz"
    layer_file.write_bytes(gzip.compress(write_tar(tree), mtime=0))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    run("create", "-t", "targz-ref", "-B", tmp_path / "judge.boot", "-D", theirs, layer_file)
    options = BuildOptions(oci_ref=True)
    layer = build_layer(LayerSource(layer_file, "tar", "layer"), options=options, out_blob=tmp_path / "meta")
    merge_layers([layer], options=options, out_bootstrap=tmp_path / "boot")
    (judged,) = theirs.iterdir()

    def expand(blob: bytes) -> bytes:
        csize = struct.unpack_from("<Q", blob, len(blob) - 4096 + 24)[0]
        return zstandard.ZstdDecompressor().decompress(blob[:csize])

    assert layer.blob_info is not None
    ours = expand((tmp_path / "meta").read_bytes())
    count = len(layer.blob_info.table)
    assert ours[: 24 * count] == expand(judged.read_bytes())[: 24 * count]
    (theirs / layer.blob_info.meta_digest.hex()).write_bytes((tmp_path / "meta").read_bytes())
    (theirs / layer.blob_id).write_bytes(layer_file.read_bytes())
    assert "metadata is valid" in run("check", "-B", tmp_path / "boot", "-D", theirs)
