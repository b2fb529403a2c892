"""Images of generated trees hold exactly those trees, whatever the options; the kernel and fsck.erofs agree."""

import ctypes
import io
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.rafs.decoder import Blob, Bootstrap
from tests.rafs.trees import Entry, Tree, build_tar, check_tree, decode_image, make_tree, write_tar
from virtiofsd_nydus.builder.image import BuildOptions, LayerSource, build_layer, merge_layers
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.rafs.blob import BlobInfo, Form
from virtiofsd_nydus.rafs.bootstrap import BootstrapWriter
from virtiofsd_nydus.rafs.chunktable import ChunkRecord, ChunkTable
from virtiofsd_nydus.rafs.layout import Codec, Digester
from virtiofsd_nydus.rafs.nodes import ROOT
from virtiofsd_nydus.rafs.tree import Attributes
from virtiofsd_nydus.rafs.tree import Tree as RafsTree

OPTIONS = [
    BuildOptions(compressor=compressor, digester=digester, chunk_size=chunk_size)
    for compressor in ("none", "lz4_block", "zstd")
    for digester in ("blake3", "sha256")
    for chunk_size in (64 << 10, 1 << 20)
]
SMALL = BuildOptions(chunk_size=4096)


def name_options(options: BuildOptions) -> str:
    return f"{options.compressor}-{options.digester}-{options.chunk_size >> 10}K"


@pytest.mark.parametrize("options", OPTIONS, ids=name_options)
def test_image_shows_the_tree(options: BuildOptions) -> None:
    tree = make_tree(options.chunk_size % 97, options.chunk_size)
    layer = build_tar(write_tar(tree), options)
    bootstrap, blobs = decode_image([layer], options)
    check_tree(tree, bootstrap, blobs)
    inner = Bootstrap(blobs[layer[0].blob_id].section("image.boot"))
    assert inner.blobs[0].blob_id == "x" * 64
    assert {path: (node.mode, node.size) for path, node in inner.walk().items()} == {
        path: (node.mode, node.size) for path, node in bootstrap.walk().items()
    }


@pytest.mark.parametrize("seed", range(6))
def test_image_with_small_chunks_shows_the_tree(seed: int) -> None:
    tree = make_tree(seed, 4096)
    bootstrap, blobs = decode_image([build_tar(write_tar(tree), SMALL)], SMALL)
    check_tree(tree, bootstrap, blobs)


def test_tree_in_gnu_format() -> None:
    tree = {path: entry for path, entry in make_tree(3, 4096).items()}
    for entry in tree.values():
        entry.xattrs, entry.mtime_ns = {}, entry.mtime_ns // 10**9 * 10**9
    bootstrap, blobs = decode_image([build_tar(write_tar(tree, tarfile.GNU_FORMAT), SMALL)], SMALL)
    check_tree(tree, bootstrap, blobs)


@pytest.mark.parametrize("compressor", ["none", "lz4_block", "zstd"])
def test_bytes_do_not_depend_on_threads(compressor: str) -> None:
    data = write_tar(make_tree(11, 4096) | {b"/big%d" % n: Entry(stat.S_IFREG, content=os.urandom(70_000) * 20)
                                            for n in range(3)})  # fmt: skip
    made = set()
    for threads in (1, 2, 7, 1, 7):
        options = BuildOptions(compressor=compressor, chunk_size=4096, threads=threads)
        layer, blob = build_tar(data, options)
        made.add((layer.blob_id, blob, bytes(merge_layers([layer], options=options).bootstrap)))
    assert len(made) == 1


def test_compression_in_batches_equals_compression_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import zstandard

    data = write_tar(make_tree(4, 65536))
    options = BuildOptions(chunk_size=65536)
    _, batched = build_tar(data, options)
    monkeypatch.setattr(zstandard, "backend_features", set())
    _, single = build_tar(data, options)
    assert batched == single


@pytest.mark.parametrize("compressor", ["none", "zstd"])
def test_layer_without_data_has_a_blob_that_no_image_names(compressor: str) -> None:
    options = BuildOptions(compressor=compressor)
    tree: Tree = {b"/": Entry(stat.S_IFDIR | 0o755), b"/empty": Entry(stat.S_IFREG | 0o644), b"/d": Entry(stat.S_IFDIR)}
    layer, data = build_tar(write_tar(tree), options)
    assert layer.blob_info is None and list(Blob(data).sections) == ["image.boot"]
    bootstrap, blobs = decode_image([(layer, data)], options)
    assert bootstrap.blobs == [] and bootstrap.meta == 0
    check_tree(tree, bootstrap, blobs)


def test_empty_tar_is_an_empty_root() -> None:
    bootstrap, _ = decode_image([build_tar(b"", SMALL)], SMALL)
    assert list(bootstrap.walk()) == [b"/"] and bootstrap.root.mode == stat.S_IFDIR | 0o755


def test_large_chunks_that_do_not_compress() -> None:
    options = BuildOptions(chunk_size=16 << 20)
    tree: Tree = {b"/": Entry(stat.S_IFDIR | 0o755), b"/big": Entry(stat.S_IFREG, content=os.urandom((16 << 20) + 7))}
    check_tree(tree, *decode_image([build_tar(write_tar(tree), options)], options))


def test_chunk_indexes_beyond_16_bits() -> None:
    table = ChunkTable()
    count = 0x21_0003
    table.resize(count)
    info = BlobInfo(
        blob_id="b" * 64, table=table, codec=Codec.NONE, digester=Digester.BLAKE3, chunk_size=4096, features=1,
        compressed_size=count << 12, uncompressed_size=count << 12,
    )  # fmt: skip
    tree = RafsTree()
    file = tree.make_file(Attributes(stat.S_IFREG, 0, 0, 0, ()), 4 * 4096, table)
    wanted = [0xFFFF, 0x1_0000, 0x12_3456, count - 1]
    for number, index in enumerate(wanted):
        table.set(index, ChunkRecord(bytes([number]) * 32, index << 12, index << 12, 4096, 4096, 4096, 0x10))
        tree.add_chunk(file, index)
    tree.link(ROOT, b"f", file)
    writer = BootstrapWriter(tree, [info], Form(4096, Codec.NONE, Digester.BLAKE3))
    node = Bootstrap(writer.write().view()).walk()[b"/f"]
    assert node.chunks == [(0, index, index << 12) for index in wanted]


def test_little_of_the_inode_area_is_wasted() -> None:
    tree = make_tree(6, 4096)
    bootstrap, _ = decode_image([build_tar(write_tar(tree), SMALL)], SMALL)
    assert bootstrap.wasted < (bootstrap.meta_end - bootstrap.meta) // 50 + 4096


def test_layers_of_other_options_are_refused() -> None:
    layer, _ = build_tar(write_tar(make_tree(2, 4096)), SMALL)
    with pytest.raises(Failure, match="other options"):
        merge_layers([layer], options=BuildOptions(chunk_size=8192))


def test_prefetch_table_names_the_patterns() -> None:
    tree = make_tree(1, 4096)
    options = BuildOptions(chunk_size=4096, prefetch_policy="fs", prefetch_patterns=("/many", "/absent", "/null"))
    bootstrap, blobs = decode_image([build_tar(write_tar(tree), options)], options)
    found = bootstrap.walk()
    assert bootstrap.prefetch == [found[b"/many"].nid, found[b"/null"].nid]
    check_tree(tree, bootstrap, blobs)
    default = BuildOptions(chunk_size=4096, prefetch_policy="fs")
    assert decode_image([build_tar(write_tar(tree), default)], default)[0].prefetch == [bootstrap.root.nid]


def test_output_needs_only_write_and_gets_everything_in_order() -> None:
    class Pipe:
        def __init__(self) -> None:
            self.parts: list[bytes] = []

        def write(self, data: memoryview) -> None:
            self.parts.append(bytes(data))

    pipe = Pipe()
    data = write_tar(make_tree(2, 4096))
    layer = build_layer(LayerSource(io.BytesIO(data), "tar"), options=SMALL, out_blob=pipe)
    assert b"".join(pipe.parts) == build_tar(data, SMALL)[1]
    assert layer.blob_size == sum(map(len, pipe.parts))


def test_progress_adds_up_to_the_source() -> None:
    data = write_tar(make_tree(2, 4096))
    seen: list[int] = []
    build_layer(LayerSource(io.BytesIO(data), "tar", on_progress=seen.append), options=SMALL, out_blob=io.BytesIO())
    assert sum(seen) == len(data)


# ---- the kernel and fsck.erofs


def mount_erofs(bootstrap: Path, devices: list[Path], target: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    options = ",".join(f"device={device}" for device in devices)
    if libc.mount(os.fsencode(bootstrap), os.fsencode(target), b"erofs", 1, options.encode()):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@pytest.fixture(scope="module")
def uncompressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tree, Path, list[Path]]:
    """A tree, its bootstrap of two layers, and each blob as the kernel wants it for a device."""
    folder = tmp_path_factory.mktemp("erofs")
    options = BuildOptions(compressor="none", chunk_size=65536)
    tree = make_tree(5, 65536)
    upper: Tree = {b"/": tree[b"/"], b"/added": Entry(stat.S_IFREG | 0o644, content=b"of the second layer" * 9000)}
    layers = [build_tar(write_tar(tree), options), build_tar(write_tar(upper), options)]
    bootstrap, blobs = decode_image(layers, options)
    tree = tree | upper
    check_tree(tree, bootstrap, blobs)
    path = folder / "image.boot"
    path.write_bytes(bootstrap.data)
    devices = []
    for entry in bootstrap.blobs:
        device = folder / f"{entry.blob_id}.device"
        device.write_bytes(blobs[entry.blob_id].expand(0, 0))
        devices.append(device)
    assert len(devices) == 2
    return tree, path, devices


@pytest.mark.skipif(shutil.which("fsck.erofs") is None, reason="erofs-utils is not installed")
def test_fsck_erofs_accepts_the_bootstrap(uncompressed: tuple[Tree, Path, list[Path]]) -> None:
    _, path, devices = uncompressed
    command = ["fsck.erofs", *(f"--device={device}" for device in devices), "--extract", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernel_shows_the_tree(uncompressed: tuple[Tree, Path, list[Path]], tmp_path: Path) -> None:
    tree, path, devices = uncompressed
    target = tmp_path / "mnt"
    target.mkdir()
    try:
        mount_erofs(path, devices, target)
    except OSError as error:
        pytest.skip(f"this machine does not mount EROFS from files (needs root and Linux 6.12): {error.strerror}")
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        compare_with_mount(tree, os.fsencode(target))
    finally:
        libc.umount2(os.fsencode(target), 2)


def compare_with_mount(tree: Tree, target: bytes) -> None:
    found = {b"/"}
    for folder, dirs, files in os.walk(target):
        found |= {folder[len(target) :] + b"/" + name for name in dirs + files}
    assert found == set(tree)
    for path, entry in tree.items():
        full = target + path
        status = os.lstat(full)
        assert (status.st_mode, status.st_uid, status.st_gid) == (entry.mode, entry.uid, entry.gid), path
        assert status.st_mtime_ns == entry.mtime_ns, path
        if stat.S_ISREG(entry.mode):
            assert Path(os.fsdecode(full)).read_bytes() == entry.content, path
        elif stat.S_ISLNK(entry.mode):
            assert os.readlink(full) == entry.target, path  # noqa: PTH115
        elif stat.S_ISCHR(entry.mode) or stat.S_ISBLK(entry.mode):
            assert (os.major(status.st_rdev), os.minor(status.st_rdev)) == entry.device, path
        for name, value in entry.xattrs.items():
            if name == b"system.posix_acl_access" and stat.S_ISLNK(entry.mode):
                continue
            assert os.getxattr(full, name, follow_symlinks=False) == value, (path, name)
        if entry.link is not None:
            assert status.st_ino == os.lstat(target + entry.link).st_ino and status.st_nlink > 1, path
