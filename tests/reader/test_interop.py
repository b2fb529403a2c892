"""Every kind of image that Nydus' own builder makes, read here: sound for `check`, identical to its source.

Runs where the environment variable NYDUS_IMAGE names a nydus-image; docs/interop.md says which was used last.
"""

import gzip
import hashlib
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from virtiofsd_nydus.cli.check import check_data, check_structure
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.locate import Located
from virtiofsd_nydus.reader.bootstrap import Bootstrap
from virtiofsd_nydus.reader.data import directory_source, opened_with_data

NYDUS_IMAGE = os.environ.get("NYDUS_IMAGE", "")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not shutil.which(NYDUS_IMAGE), reason="NYDUS_IMAGE names no nydus-image"),
]
CHUNK = 0x10000


def fill(top: Path, seed: int, sizes: Sequence[int]) -> Path:
    """Compressible files, entries of several kinds beside them."""
    random = Random(seed)
    words = [random.randbytes(random.randrange(2, 9)) for _ in range(700)]
    (top / "deep" / "er").mkdir(parents=True)
    for number, size in enumerate(sizes):
        data = b" ".join(random.choices(words, k=size // 4 + 1))[:size]
        (top / ("deep" if number % 3 else "deep/er") / f"file-{number:03}").write_bytes(data)
    (top / "empty").write_bytes(b"")
    (top / "link").symlink_to("deep/er")
    os.link(top / "deep" / "file-001", top / "alias")
    (top / "empty").chmod(0o640)
    return top


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = [1, 5, 15, 16, 17, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 2_500_000]
    sizes += [Random(9).randrange(1, 12_000) for _ in range(60)]
    return fill(tmp_path_factory.mktemp("interop") / "source", 1, sizes)


def run_tool(*words: object) -> str:
    done = subprocess.run(
        [NYDUS_IMAGE, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def create(out: Path, source: Path, *options: object, kind: str = "directory") -> Path:
    """The bootstrap in out; blobs are in out/blobs."""
    (out / "blobs").mkdir(parents=True)
    run_tool("create", "--type", kind, *options, "--bootstrap", out / "boot", "--blob-dir", out / "blobs", source)
    return out / "boot"


def compare(bootstrap: Path, blobs: Path, source: Path, allow_unverified: bool = False) -> Bootstrap:
    """check finds nothing, and names, attributes and bytes are the source's."""
    report = check_structure(bootstrap)
    assert report.faults == []
    check_data(report, Located(bootstrap, directory_source(blobs)), None, allow_unverified)
    assert report.faults == []
    expected = {"/": source} | {f"/{path.relative_to(source)}": path for path in source.rglob("*")}
    with opened_with_data(bootstrap, blobs, None, allow_unverified) as image:
        walked = {entry.path: entry.attr for entry in image.walk()}
        assert walked.keys() == expected.keys()
        for path, real in expected.items():
            status, attr = real.lstat(), walked[path]
            assert attr.mode == status.st_mode, path
            if stat.S_ISREG(attr.mode):
                assert (attr.size_bytes, attr.nlink) == (status.st_size, status.st_nlink), path
                assert image.read(attr.ino) == real.read_bytes(), path
            elif stat.S_ISLNK(attr.mode):
                assert image.readlink(attr.ino) == str(real.readlink())
        return image


@pytest.mark.parametrize("chunk", [0x10000, 0x100000])
@pytest.mark.parametrize("digester", ["blake3", "sha256"])
@pytest.mark.parametrize("compressor", ["none", "lz4_block", "zstd"])
@pytest.mark.parametrize("version", [5, 6])
def test_matrix(source: Path, tmp_path: Path, version: int, compressor: str, digester: str, chunk: int) -> None:
    boot = create(
        tmp_path,
        source,
        "--fs-version",
        version,
        "--compressor",
        compressor,
        "--digester",
        digester,
        "--chunk-size",
        hex(chunk),
    )
    compare(boot, tmp_path / "blobs", source)


@pytest.mark.parametrize("compressor", ["none", "lz4_block", "zstd"])
@pytest.mark.parametrize("more", [(), ("--batch-size", "0x10000")])
def test_encrypted(source: Path, tmp_path: Path, compressor: str, more: tuple[str, ...]) -> None:
    boot = create(tmp_path, source, "--encrypt", "--compressor", compressor, "--chunk-size", hex(CHUNK), *more)
    compare(boot, tmp_path / "blobs", source)
    (blob,) = (tmp_path / "blobs").iterdir()
    assert (source / "deep" / "file-001").read_bytes() * 3 not in blob.read_bytes()


@pytest.mark.parametrize("compressor", ["lz4_block", "zstd"])
def test_batched(source: Path, tmp_path: Path, compressor: str) -> None:
    boot = create(tmp_path, source, "--compressor", compressor, "--chunk-size", hex(CHUNK), "--batch-size", "0x10000")
    compare(boot, tmp_path / "blobs", source)


@pytest.mark.parametrize("options", [("--features", "blob-toc"), ()])
def test_bootstrap_in_its_blob(source: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    run_tool("create", "--type", "directory", "--blob-inline-meta", *options, "--blob-dir", tmp_path, source)
    (blob,) = tmp_path.iterdir()
    compare(blob, tmp_path, source)


def make_tar(source: Path, path: Path) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(source, arcname=".")
    return path


def gzip_streams(data: bytes, streams: int) -> bytes:
    step = len(data) // streams + 1
    return b"".join(gzip.compress(data[at : at + step], 6, mtime=0) for at in range(0, len(data), step))


@pytest.fixture(scope="module")
def large_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough that a gzip layer has several contexts."""
    return fill(tmp_path_factory.mktemp("zran") / "source", 2, [3_000_000, 10, 5_000_000, 70_000] + [20_000] * 60)


@pytest.mark.parametrize("streams", [1, 2, 40])
def test_gzip_layer_as_it_is(large_source: Path, tmp_path: Path, streams: int) -> None:
    tar = make_tar(large_source, tmp_path / "layer.tar")
    layer = tmp_path / "layer.tar.gz"
    layer.write_bytes(gzip_streams(tar.read_bytes(), streams))
    boot = create(tmp_path / "image", layer, "--chunk-size", hex(CHUNK), kind="targz-ref")
    blobs = tmp_path / "image" / "blobs"
    layer_id = hashlib.sha256(layer.read_bytes()).hexdigest()
    shutil.copy(layer, blobs / layer_id)
    compare(boot, blobs, large_source)
    with opened_with_data(boot, blobs) as image:  # from the back: contexts are entered in the middle
        ino = image.resolve("/deep/file-002")
        data = (large_source / "deep" / "file-002").read_bytes()
        for at in range(len(data) - 4096, 0, -777_777):
            assert image.read(ino, at, 4096) == data[at : at + 4096]


def test_gzip_layer_with_its_bootstrap_in_the_table(large_source: Path, tmp_path: Path) -> None:
    layer = tmp_path / "layer.tar.gz"
    layer.write_bytes(gzip_streams(make_tar(large_source, tmp_path / "layer.tar").read_bytes(), 1))
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    run_tool(
        "create", "--type", "targz-ref", "--blob-inline-meta", "--features", "blob-toc", "--blob-dir", blobs, layer
    )
    (blob,) = blobs.iterdir()
    shutil.copy(layer, blobs / hashlib.sha256(layer.read_bytes()).hexdigest())
    compare(blob, blobs, large_source)


def test_tar_as_it_is_needs_the_operators_word(source: Path, tmp_path: Path) -> None:
    tar = make_tar(source, tmp_path / "layer.tar")
    blob_id = hashlib.sha256(tar.read_bytes()).hexdigest()
    boot = create(tmp_path / "image", tar, "--blob-id", blob_id, kind="tar-tarfs")
    blobs = tmp_path / "image" / "blobs"
    for old in blobs.iterdir():
        old.unlink()
    shutil.copy(tar, blobs / blob_id)
    compare(boot, blobs, source, allow_unverified=True)
    with pytest.raises(Failure, match="no chunk digests") as caught, opened_with_data(boot, blobs):
        pass
    assert caught.value.cause == Cause.DIGEST


@pytest.mark.parametrize("version", [5, 6])
def test_chunk_dictionary(source: Path, tmp_path: Path, version: int) -> None:
    """Half of the second image's files are in the first, which is its dictionary."""
    shutil.copytree(source / "deep", tmp_path / "more" / "deep", symlinks=True)
    (tmp_path / "more" / "own").write_bytes(Random(3).randbytes(200_000))
    common = ("--fs-version", version, "--chunk-size", hex(CHUNK))
    first = create(tmp_path / "first", source, *common)
    second = create(tmp_path / "second", tmp_path / "more", "--chunk-dict", f"bootstrap={first}", *common)
    blobs = tmp_path / "blobs"
    for image in ("first", "second"):
        shutil.copytree(tmp_path / image / "blobs", blobs, dirs_exist_ok=True)
    compare(second, blobs, tmp_path / "more")
    with Bootstrap(second) as image:
        assert len(image.blobs) == 2
    compare(first, blobs, source)


@pytest.mark.parametrize("version", [5, 6])
def test_merged_layers(source: Path, tmp_path: Path, version: int) -> None:
    """Three layers, the upper ones replace and remove."""
    layers, blobs, merged = [], tmp_path / "blobs", tmp_path / "merged"
    blobs.mkdir()
    shutil.copytree(source, merged, symlinks=True)
    (merged / "alias").unlink()
    os.link(merged / "deep" / "file-001", merged / "alias")
    middle, upper = tmp_path / "middle", tmp_path / "upper"
    (middle / "deep").mkdir(parents=True)
    (middle / "deep" / "file-002").write_bytes(b"replaced " * 20_000)
    (middle / "deep" / ".wh.file-004").write_bytes(b"")
    upper.mkdir()
    (upper / "new").write_bytes(Random(5).randbytes(100_000))
    (upper / ".wh.empty").write_bytes(b"")
    for number, layer in enumerate([source, middle, upper]):
        tar = make_tar(layer, tmp_path / f"layer-{number}.tar")  # of a directory it would drop the whiteouts
        boot = create(
            tmp_path / f"layer-{number}", tar, "--fs-version", version, "--chunk-size", hex(CHUNK), kind="tar-rafs"
        )
        shutil.copytree(boot.parent / "blobs", blobs, dirs_exist_ok=True)
        (blob,) = (boot.parent / "blobs").iterdir()
        layers.append(boot.rename(boot.parent / blob.name))
    run_tool("merge", "--bootstrap", tmp_path / "boot", *layers)
    shutil.copy(middle / "deep" / "file-002", merged / "deep" / "file-002")
    (merged / "deep" / "file-004").unlink()
    shutil.copy(upper / "new", merged / "new")
    (merged / "empty").unlink()
    compare(tmp_path / "boot", blobs, merged)
