"""A directory becomes the image of what stands in it."""

import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rafs.decoder import Blob, Bootstrap, read_file
from tests.rafs.trees import ACL
from virtiofsd_nydus.builder.image import BuildOptions, LayerSource, build_layer, merge_layers
from virtiofsd_nydus.builder.options import UsageFailure
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.reader.bootstrap import Bootstrap as RafsBootstrap

OPTIONS = BuildOptions(chunk_size=65536)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    (root / "d/e").mkdir(parents=True)
    (root / "d/plain").write_bytes(os.urandom(200_000))
    (root / "d/e/empty").touch()
    os.link(root / "d/plain", root / "d/e/second")
    (root / "link").symlink_to("d/../nowhere" + "x" * 3000)
    os.mkfifo(root / "pipe", 0o600)
    (root / "d").chmod(0o2751)
    with (root / "holes").open("wb") as out:
        out.seek(1_000_000)
        out.write(b"data")
        out.truncate(3_000_000)
    os.utime(root / "d/plain", ns=(0, 1_234_567_890_987_654_321))
    os.utime(root / "link", ns=(0, 999_999_999), follow_symlinks=False)
    (root / os.fsdecode(b"\xff!")).write_bytes(b"odd")
    with socket.socket(socket.AF_UNIX) as sock:
        here = Path.cwd()
        os.chdir(root)
        try:
            sock.bind("socket")
        finally:
            os.chdir(here)
    return root


def build(source: Path, tmp_path: Path, options: BuildOptions = OPTIONS) -> tuple[Bootstrap, dict[str, Blob]]:
    blob = tmp_path / "blob"
    layer = build_layer(LayerSource(source, "dir"), options=options, out_blob=blob)
    image = merge_layers([layer], options=options)
    return Bootstrap(image.bootstrap), {layer.blob_id: Blob(blob.read_bytes())}


def test_image_shows_the_directory(source: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.lchown(source / "link", 7, 70_000)
        os.chown(source / "d/plain", 1000, 1000)
    try:
        os.setxattr(source / "d/plain", "user.a", b"1")
        os.setxattr(source / "d", "system.posix_acl_access", ACL)
    except OSError:
        pass  # the file system has none: then the image must have none
    bootstrap, blobs = build(source, tmp_path)
    found = bootstrap.walk()
    names = {b"/"}
    for folder, dirs, files in os.walk(os.fsencode(source)):
        names |= {folder[len(os.fsencode(source)) :] + b"/" + name for name in dirs + files}
    assert set(found) == names
    for path, node in found.items():
        full = os.fsencode(source) + path
        status = os.lstat(full)
        assert (node.mode, node.uid, node.gid) == (status.st_mode, status.st_uid, status.st_gid), path
        assert node.mtime_ns == (status.st_mtime_ns if path != b"/" else 0), path
        assert list(node.xattrs) == sorted(map(os.fsencode, os.listxattr(full, follow_symlinks=False))), path
        for name, value in node.xattrs.items():
            assert value == os.getxattr(full, name, follow_symlinks=False)
        if stat.S_ISREG(node.mode):
            assert node.nlink == status.st_nlink and node.size == status.st_size
            assert read_file(node, bootstrap, blobs) == Path(os.fsdecode(full)).read_bytes(), path
        elif stat.S_ISLNK(node.mode):
            assert node.target == os.readlink(full)  # noqa: PTH115
        elif stat.S_ISCHR(node.mode):
            assert node.rdev == 0x103
    assert found[b"/d/plain"] is found[b"/d/e/second"]
    assert len({index for _, index, _ in found[b"/holes"].chunks}) == 3  # zeroes, the data's chunk, the short last one


def test_times_of_reading_do_not_matter(source: Path, tmp_path: Path) -> None:
    first, _ = build(source, tmp_path)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", source, copy], check=True)
    second, _ = build(copy, tmp_path)
    assert first.data == second.data


def test_prefetched_files_come_first_in_the_blob(source: Path, tmp_path: Path) -> None:
    options = BuildOptions(chunk_size=65536, prefetch_policy="fs", prefetch_patterns=("/d", "/holes"))
    bootstrap, blobs = build(source, tmp_path, options)
    found = bootstrap.walk()
    assert [index for _, index, _ in found[b"/d/plain"].chunks] == [0, 1, 2, 3]
    assert found[b"/holes"].chunks[0][1] == 4 < found[os.fsencode(b"/\xff!")].chunks[0][1]
    assert bootstrap.prefetch == [found[b"/d"].nid, found[b"/holes"].nid]
    assert read_file(found[b"/holes"], bootstrap, blobs) == (source / "holes").read_bytes()


def test_the_blob_policy_tells_how_far_the_prefetched_files_go(source: Path, tmp_path: Path) -> None:
    """Of v5, whose blob table has a place for it: the stored bytes of the chunks that come first."""
    options = BuildOptions(fs_version=5, chunk_size=65536, prefetch_policy="blob", prefetch_patterns=("/d", "/holes"))
    layer = build_layer(LayerSource(source, "dir"), options=options, out_blob=tmp_path / "blob")
    (tmp_path / "boot").write_bytes(merge_layers([layer], options=options).bootstrap)
    with RafsBootstrap(tmp_path / "boot") as image:
        wanted = {path for entry in image.walk() if (path := entry.path).startswith(("/d/", "/holes"))}
        ends = {
            entry.path: max((chunk.coff + chunk.csize_bytes for chunk in image.chunks(entry.attr.ino)), default=0)
            for entry in image.walk()
            if stat.S_ISREG(entry.attr.mode)
        }
        assert image.prefetch() == []
        (blob,) = image.blobs
    assert layer.blob_info is not None
    assert layer.blob_info.prefetch_size == max(ends[path] for path in wanted if path in ends) < layer.blob_size
    assert blob.id.encode() in (tmp_path / "boot").read_bytes()
    table = (tmp_path / "boot").read_bytes().index(blob.id.encode()) - 8
    assert struct.unpack_from("<II", (tmp_path / "boot").read_bytes(), table) == (0, layer.blob_info.prefetch_size)


def test_whiteouts_in_a_directory_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a", ".wh.b", ".wh..wh..opq"):
        (source / name).touch()
    assert sorted(build(source, tmp_path)[0].walk()) == [b"/", b"/a"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="absent: No such file or directory"):
        build_layer(LayerSource(tmp_path / "absent", "dir"), options=OPTIONS, out_blob=tmp_path / "blob")
    assert not (tmp_path / "blob").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fs_version": 5, "batch_size": 4096}, "RAFS v5 has no batches"),
        ({"fs_version": 5, "encrypt": True}, "RAFS v5 has no encryption"),
        ({"aligned_chunk": True}, "aligned chunks"),
        ({"batch_size": 5000}, "batch size 5000"),
        ({"batch_size": 2 << 20}, "batch size"),
        ({"prefetch_patterns": ("etc",)}, "absolute path"),
        ({"fs_version": 4}, "no RAFS version 4"),
        ({"chunk_size": 5000}, "power of two"),
        ({"chunk_size": 2048}, "power of two"),
        ({"compressor": "gzip"}, "compressor"),
        ({"digester": "md5"}, "digester"),
        ({"compression_level": 0}, "level"),
        ({"prefetch_policy": "all"}, "prefetch policy"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], match: str) -> None:
    with pytest.raises(UsageFailure, match=match):
        BuildOptions(**options)  # type: ignore[arg-type]


# ---- the verb


def run_build(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "virtiofsd_nydus.cli.main", "build", *map(str, words)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def test_build_writes_bootstrap_and_blob(source: Path, tmp_path: Path) -> None:
    import json

    done = run_build(source, "--bootstrap", tmp_path / "b", "--blob-dir", tmp_path / "blobs", "--json",
                     "--compressor", "lz4_block", "--digester", "sha256", "--chunk-size", "64K")  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    result = json.loads(done.stdout)
    bootstrap = Bootstrap((tmp_path / "b").read_bytes())
    assert [blob.blob_id for blob in bootstrap.blobs] == result["blobs"]
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == result["blobs"]
    assert (bootstrap.blobs[0].codec, bootstrap.blobs[0].digester, bootstrap.chunk_size) == (1, 1, 65536)
    assert result["names"] == len(bootstrap.walk())
    blobs = {result["blobs"][0]: Blob((tmp_path / "blobs" / result["blobs"][0]).read_bytes())}
    assert read_file(bootstrap.walk()[b"/d/plain"], bootstrap, blobs) == (source / "d/plain").read_bytes()
    again = run_build(source, "--bootstrap", tmp_path / "b2", "--blob-dir", tmp_path / "blobs",
                      "--compressor", "lz4_block", "--digester", "sha256", "--chunk-size", "0x10000")  # fmt: skip
    assert result["blobs"][0] in again.stdout
    assert (tmp_path / "b2").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar")
def test_build_takes_tars(source: Path, tmp_path: Path) -> None:
    tar = tmp_path / "source.tar.gz"
    (source / "socket").unlink()  # tar leaves sockets out
    subprocess.run(["tar", "-C", source, "-czf", tar, "."], check=True, capture_output=True)
    done = run_build(tar, "--bootstrap", tmp_path / "b", "--blob-dir", tmp_path / "blobs")
    assert done.returncode == 0, done.stderr
    expected, _ = build(source, tmp_path)
    found = Bootstrap((tmp_path / "b").read_bytes()).walk()
    assert {path: (node.mode, node.size) for path, node in found.items()} == {
        path: (node.mode, node.size) for path, node in expected.walk().items()
    }


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["SOURCE/absent"], 1, "absent: no such file or directory"),
        (["SOURCE/holes"], 1, "neither a tar nor"),
        (["SOURCE", "--fs-version", "5", "--encrypt"], 2, "RAFS v5"),
        (["SOURCE", "--chunk-dict", "SOURCE/holes"], 1, "holes"),
        (["SOURCE", "--prefetch-files", "x"], 2, "--prefetch-policy"),
        (["SOURCE", "--chunk-size", "3000"], 2, "power of two"),
    ],
)
def test_build_fails_in_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, words: list[str], status: int, line: str
) -> None:
    (source / "holes").write_bytes(b"x" * 5000)
    words = [word.replace("SOURCE", str(source)) for word in words]
    done = run_build(*words, "--bootstrap", tmp_path / "b", "--blob-dir", tmp_path / "blobs")
    assert done.returncode == status and line in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "blobs").exists() or not list((tmp_path / "blobs").iterdir())


def test_build_names_a_bootstrap_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    done = run_build(source, "--bootstrap", tmp_path / "no/b", "--blob-dir", tmp_path / "blobs")
    assert done.returncode == 1 and "No such file or directory" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("way", ["stdin", "stdin named", "file", "pattern"])
def test_paths_to_prefetch_come_from_anywhere(source: Path, tmp_path: Path, way: str) -> None:
    """As nydus-image takes them, on standard input, or said otherwise: the table is the same."""
    names = sorted(entry.name for entry in os.scandir(source) if not entry.is_symlink())[:2]
    lines = "".join(f"/{name}\n" for name in names) + "\n/absent\n"
    (tmp_path / "list").write_text(lines)
    words = {"stdin": [], "stdin named": ["--prefetch-files", "-"], "file": ["--prefetch-files", tmp_path / "list"],
             "pattern": [word for name in names for word in ("--prefetch-pattern", f"/{name}")]}[way]  # fmt: skip
    command = [sys.executable, "-m", "virtiofsd_nydus.cli.main", "build", source, "--bootstrap", tmp_path / "b",
               "--blob-dir", tmp_path / "blobs", "--prefetch-policy", "fs", *words]  # fmt: skip
    done = subprocess.run([*map(str, command)], input=lines if way.startswith("stdin") else "", text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    with RafsBootstrap(tmp_path / "b") as image:
        assert image.prefetch() == [image.resolve(f"/{name}") for name in names]
