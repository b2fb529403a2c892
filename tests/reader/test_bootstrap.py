"""The RAFS reader's Python face: trees against what was built from, samples of the real tools, what it refuses."""

import errno
import hashlib
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.cli.build import build_image
from virtiofsd_nydus.cli.check import list_faults, opened_with_data
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.reader.bootstrap import Bootstrap

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = Path(os.environ.get("NYDUS_SAMPLES", ROOT.parent / "shared" / "samples"))
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no samples (NYDUS_SAMPLES)")


def fill_tree(top: Path) -> None:
    """Every kind of entry that a user may make, over the borders of blocks and chunks."""
    for name in ("many", "deep/a/b", "empty-dir"):
        (top / name).mkdir(parents=True)
    for number in range(700):
        (top / "many" / f"{number:04}-{'n' * (number % 60)}").write_bytes(b"%d" % number * (number % 11))
    sizes = {"!before-dot": 1, "one-chunk": 4096, "chunk-and-one": 65537, "empty": 0, "large": 3_000_001}
    for name, size in sizes.items():
        (top / name).write_bytes(hashlib.shake_128(name.encode()).digest(size))
    (top / "large").chmod(0o4755)
    os.link(top / "large", top / "deep" / "again")
    (top / "short-link").symlink_to("large")
    (top / "long-link").symlink_to("t" * 4000)
    (top / os.fsdecode(b"not-utf8-\xff\xfe")).write_text("x")
    os.mkfifo(top / "pipe")
    os.utime(top / "one-chunk", ns=(0, 987_654_321_123_456_789))
    try:
        os.setxattr(top / "one-chunk", "user.first", b"value")
        os.setxattr(top / "one-chunk", "user.second", bytes(range(256)))
    except OSError as error:
        if error.errno != errno.ENOTSUP:  # then the file system has none, and neither has the image
            raise


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("reader") / "source"
    top.mkdir()
    fill_tree(top)
    return top


@pytest.fixture(scope="module", params=["zstd", "none"])
def built(request: pytest.FixtureRequest, source: Path) -> tuple[Path, Path]:
    """(bootstrap, blob directory)"""
    top = source.parent / str(request.param)
    options = BuildOptions(compressor=str(request.param), chunk_size=65536)
    top.mkdir()
    build_image(source, top / "image.boot", top / "blobs", options)
    return top / "image.boot", top / "blobs"


def names_below(top: Path) -> Iterator[tuple[str, Path]]:
    yield "/", top
    for folder, directories, files in os.walk(top):
        for name in directories + files:
            path = Path(folder) / name
            yield "/" + str(path.relative_to(top)), path


def compare_entry(image: Bootstrap, path: str, real: Path) -> None:
    status, attr = real.lstat(), image.getattr(image.resolve(path))
    assert attr.mode == status.st_mode, path
    assert (attr.uid, attr.gid) == (status.st_uid, status.st_gid), path
    if path != "/":
        assert attr.mtime_ns == status.st_mtime_ns, path
    if not stat.S_ISDIR(attr.mode):
        assert (attr.nlink, attr.size_bytes) == (status.st_nlink, status.st_size), path
    if stat.S_ISLNK(attr.mode):
        assert image.readlink(attr.ino) == str(real.readlink())
    else:
        assert image.xattrs(attr.ino) == {name: os.getxattr(real, name) for name in os.listxattr(real)}, path


def test_tree_is_the_source(source: Path, built: tuple[Path, Path]) -> None:
    with Bootstrap(built[0]) as image:
        assert list_faults(image, 100) == []
        walked = {entry.path: entry.attr for entry in image.walk()}
        expected = dict(names_below(source))
        assert walked.keys() == expected.keys()
        for path, real in expected.items():
            compare_entry(image, path, real)
        assert walked["/large"].ino == walked["/deep/again"].ino
        assert len(image.blobs) == 1
        with pytest.raises(FileNotFoundError):
            image.resolve("/many/absent")
        with pytest.raises(NotADirectoryError):
            image.resolve("/large/x")


def test_walk_order_is_parents_first(built: tuple[Path, Path]) -> None:
    with Bootstrap(built[0]) as image:
        seen: set[str] = set()
        for entry in image.walk():
            assert entry.path == "/" or str(Path(entry.path).parent) in seen
            seen.add(entry.path)


def test_chunks_cover_their_file(built: tuple[Path, Path], source: Path) -> None:
    import blake3

    with Bootstrap(built[0]) as image:
        chunks = list(image.chunks(image.resolve("/large")))
        data = (source / "large").read_bytes()
        assert [chunk.file_off for chunk in chunks] == list(range(0, len(data), 65536))
        for chunk in chunks:
            part = data[chunk.file_off : chunk.file_off + chunk.usize_bytes]
            assert len(part) == chunk.usize_bytes
            assert chunk.digest == blake3.blake3(part).digest()
        assert sum(chunk.usize_bytes for chunk in chunks) == len(data)
        assert list(image.chunks(image.resolve("/empty"))) == []


def test_data_comes_through_the_engine(built: tuple[Path, Path], source: Path) -> None:
    with opened_with_data(built[0], built[1]) as image:
        for entry in image.walk():
            if stat.S_ISREG(entry.attr.mode):
                assert image.read(entry.attr.ino) == Path(f"{source}{entry.path}").read_bytes(), entry.path
        large = image.resolve("/large")
        assert image.read(large, 65_500, 100) == (source / "large").read_bytes()[65_500:65_600]
        assert image.read(large, 3_000_000, 100) == (source / "large").read_bytes()[3_000_000:]
        assert image.read(large, 5_000_000, 100) == b""


def test_data_needs_a_store(built: tuple[Path, Path]) -> None:
    with Bootstrap(built[0]) as image, pytest.raises(OSError, match="No such device"):
        image.read(image.resolve("/large"))


def test_blob_with_its_bootstrap_inside(built: tuple[Path, Path]) -> None:
    (blob,) = built[1].iterdir()
    with Bootstrap(built[0]) as plain, Bootstrap(blob) as inlined:
        assert inlined.blobs[0].id == blob.name
        assert [entry.path for entry in inlined.walk()] == [entry.path for entry in plain.walk()]


def damage(path: Path, offset: int, data: bytes) -> Path:
    broken = path.with_name(f"broken-{offset}")
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    broken.write_bytes(content)
    return broken


def refusal(path: Path) -> Failure:
    with pytest.raises(Failure) as caught:
        Bootstrap(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    return caught.value


def test_refusals_name_the_reason(built: tuple[Path, Path], tmp_path: Path) -> None:
    boot = built[0]
    assert "incompatible feature 0x20 (fragments)" in str(refusal(damage(boot, 1024 + 80, struct.pack("<I", 0x2C))))
    assert "feature 0x800" in str(refusal(damage(boot, 1152 + 1, b"\x08")))
    assert "plain EROFS" in str(refusal(damage(boot, 1024 + 8, b"\0\0\0\0")))
    short = tmp_path / "short"
    short.write_bytes(boot.read_bytes()[:5000])
    assert "truncated" in str(refusal(short))
    for name, content in {"empty": b"", "text": b"hello\n" * 1000}.items():
        (tmp_path / name).write_bytes(content)
        assert "not a RAFS bootstrap" in str(refusal(tmp_path / name))
        assert refusal(tmp_path / name).cause == Cause.FORMAT
    assert refusal(tmp_path).cause == Cause.IO
    assert "No such file" in str(refusal(tmp_path / "absent"))


def test_mkfs_erofs_image_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    if not shutil.which("mkfs.erofs"):
        pytest.skip("no mkfs.erofs (erofs-utils)")
    subprocess.run(["mkfs.erofs", "-d0", tmp_path / "plain", source / "many"], check=True, capture_output=True)
    assert "plain EROFS image, not RAFS" in str(refusal(tmp_path / "plain"))


def test_unverifiable_image_needs_the_operators_word(built: tuple[Path, Path]) -> None:
    """Without its chunk table nothing of the image can be verified; its blob says that it has no digests either."""
    broken = damage(built[0], 1152 + 32, bytes(8))
    features = struct.unpack_from("<I", broken.read_bytes(), 4096 + 84)[0]
    bare = damage(broken, 4096 + 84, struct.pack("<I", features & ~0x20))
    with pytest.raises(Failure, match="no chunk digests") as caught, opened_with_data(bare, built[1]):
        pass
    assert caught.value.cause == Cause.DIGEST


def test_directory_loop_ends(built: tuple[Path, Path]) -> None:
    """A directory's entry made to point to the root: the walk says so and stops."""
    with Bootstrap(built[0]) as image:
        meta = image.info.meta_blkaddr * 4096
        content = built[0].read_bytes()
        deep = struct.pack("<Q", image.resolve("/deep/a"))
        at = content.index(deep, meta)
        while content[at + 10] != 2:  # the dirent of type directory in /deep
            at = content.index(deep, at + 1)
        root = image.root_ino
    broken = damage(built[0], at, struct.pack("<Q", root))
    with Bootstrap(broken) as image:
        assert any("twice" in fault or "not its parent" in fault for fault in list_faults(image, 100))
        with pytest.raises(Failure, match="twice"):
            list(image.walk())


@needs_samples
def test_sample_of_the_real_tool() -> None:
    with opened_with_data(SAMPLES / "v6" / "rafs-v6-2.2.boot", SAMPLES / "v6" / "blobs") as image:
        assert list_faults(image, 100) == []
        files = {entry.path: entry.attr for entry in image.walk()}
        assert list(files) == ["/", "/lib.rs", "/sync_io.rs"]
        assert files["/lib.rs"].size_bytes == 16931
        assert files["/lib.rs"].mtime_nsec == 628661334
        assert len(image.read(files["/sync_io.rs"].ino)) == 13400
        (blob,) = image.blobs
        assert (blob.compressor, blob.digester, blob.chunk_count) == (3, 0, 2)


@needs_samples
@pytest.mark.parametrize(
    "name, reason",
    [
        ("negative/legacy-v5-prerelease.boot", "RAFS v5 layout from before"),
        ("negative/not-rafs.bin", "not a RAFS bootstrap"),
        ("v6/blobs/be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef", "give the bootstrap file"),
    ],
)
def test_samples_that_are_refused(name: str, reason: str) -> None:
    assert reason in str(refusal(SAMPLES / name))


NYDUS_IMAGE = os.environ.get("NYDUS_IMAGE", "")


@pytest.mark.peer
@pytest.mark.skipif(not shutil.which(NYDUS_IMAGE), reason="NYDUS_IMAGE names no nydus-image")
@pytest.mark.parametrize(
    "options",
    [
        "--compressor zstd",
        "--compressor none --chunk-size 4096",
        "--compressor lz4_block --digester sha256",
        "--features blob-toc",
        "--blob-inline-meta",
        "--blob-inline-meta --features blob-toc",
    ],
)
def test_images_of_the_real_tool(source: Path, tmp_path: Path, options: str) -> None:
    inline = "inline" in options
    where = ["-D", tmp_path / "blobs"] + ([] if inline else ["-B", tmp_path / "boot"])
    (tmp_path / "blobs").mkdir()
    subprocess.run(
        [NYDUS_IMAGE, "create", "--type", "directory", *options.split(), *where, source],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    boot = next((tmp_path / "blobs").iterdir()) if inline else tmp_path / "boot"
    with opened_with_data(boot, tmp_path / "blobs") as image:
        assert list_faults(image, 100) == []
        expected = dict(names_below(source))
        assert {entry.path for entry in image.walk()} == expected.keys()
        for path, real in expected.items():
            compare_entry(image, path, real)
            if stat.S_ISREG(real.lstat().st_mode):
                assert image.read(image.resolve(path)) == real.read_bytes()
