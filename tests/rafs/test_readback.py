"""Random trees, built in every way there is, read back by all who can: the engine (`unpack`), a guest on the daemon,
the kernel's EROFS."""

import hashlib
import os
import stat
import struct
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.rafs import decoder
from tests.rafs.trees import Entry, Tree, build_tar, make_tree, write_tar
from tests.system.daemon import Daemon, ServedImage
from tests.system.guest_tree import Record, differences, list_tree
from tests.system.test_kernel_erofs import mounted
from tests.tree_listing import KINDS
from virtiofsd_nydus.builder.image import BuildOptions, merge_layers
from virtiofsd_nydus.builder.tar_stream import parse_time
from virtiofsd_nydus.cli.main import main
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest

CHUNK = 64 << 10
WAYS: dict[str, dict[str, Any]] = {
    "v6": {}, "v6-lz4-sha256": {"compressor": "lz4_block", "digester": "sha256"}, "v6-none-4K": {"chunk_size": 4096},
    "v6-batch": {"batch_size": CHUNK}, "v6-batch-none": {"batch_size": 4096, "compressor": "none"},
    "v6-encrypted": {"encrypt": True}, "v6-encrypted-batch": {"encrypt": True, "batch_size": CHUNK},
    "v5": {"fs_version": 5}, "v5-lz4-sha256": {"fs_version": 5, "compressor": "lz4_block", "digester": "sha256"},
    "v5-aligned-none": {"fs_version": 5, "aligned_chunk": True, "compressor": "none"},
}  # fmt: skip


def write_image(folder: Path, tree: Tree, options: BuildOptions) -> tuple[Path, Path]:
    blobs = folder / "blobs"
    blobs.mkdir()
    layer, data = build_tar(write_tar(tree), options)
    (blobs / layer.blob_id).write_bytes(data)
    merge_layers([layer], options=options, out_bootstrap=folder / "boot")
    return folder / "boot", blobs


def describe_entry(tree: Tree, path: bytes) -> tuple[object, ...]:
    """All that a name shows but its inode."""
    entry = tree[path]
    value: object = {stat.S_IFREG: entry.content, stat.S_IFLNK: entry.target}.get(stat.S_IFMT(entry.mode), entry.device)
    return (entry.mode, entry.uid, entry.gid, entry.mtime_ns, value, entry.xattrs)


def describe_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[object, ...]:
    form = {
        tarfile.REGTYPE: stat.S_IFREG, tarfile.SYMTYPE: stat.S_IFLNK, tarfile.CHRTYPE: stat.S_IFCHR,
        tarfile.BLKTYPE: stat.S_IFBLK, tarfile.FIFOTYPE: stat.S_IFIFO, tarfile.DIRTYPE: stat.S_IFDIR,
    }[member.type]  # fmt: skip
    value: object = (member.devmajor, member.devminor) if member.isdev() and not member.isfifo() else (0, 0)
    if member.isreg():
        extracted = tar.extractfile(member)
        assert extracted is not None
        value = extracted.read()
    elif member.issym():
        value = member.linkname.encode("utf-8", "surrogateescape")
    headers = {key: text.encode("utf-8", "surrogateescape") for key, text in member.pax_headers.items()}
    mtime_ns = parse_time(headers["mtime"]) if "mtime" in headers else int(member.mtime) * 10**9
    xattrs = {key.removeprefix("SCHILY.xattr.").encode(): text for key, text in headers.items() if "xattr" in key}
    return (form | member.mode, member.uid, member.gid, mtime_ns, value, xattrs)


def check_tar(path: Path, tree: Tree) -> None:
    """The tar holds the tree, aliases as hard links to a name that came before."""
    seen: dict[bytes, tuple[object, ...]] = {}
    targets: dict[bytes, bytes] = {}
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        for member in tar:
            name = member.name.encode("utf-8", "surrogateescape")[1:] or b"/"
            if member.islnk():
                targets[name] = member.linkname.encode("utf-8", "surrogateescape")[1:]
                seen[name] = seen[targets[name]]
            else:
                seen[name] = describe_member(tar, member)
    assert sorted(seen) == sorted(tree)
    for name in tree:
        assert seen[name] == describe_entry(tree, name), name
    groups: dict[bytes, set[bytes]] = {}
    for name, target in targets.items():
        groups.setdefault(target, {target}).add(name)
    expected: dict[bytes, set[bytes]] = {}
    for name, entry in tree.items():
        if entry.link is not None:
            first = entry.link
            while tree[first].link is not None:
                first = tree[first].link  # type: ignore[assignment]
            expected.setdefault(first, {first}).add(name)
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, expected.values()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", [11, 12])
def test_unpack_gives_the_tree(seed: int, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = BuildOptions(**{"chunk_size": CHUNK, **WAYS[way]})
    tree = make_tree(seed, options.chunk_size)
    bootstrap, blobs = write_image(tmp_path, tree, options)
    status = main(["unpack", str(bootstrap), "--blob-dir", str(blobs), "--output", str(tmp_path / "out.tar")])
    said = capsys.readouterr().err
    assert status == 0, said
    check_tar(tmp_path / "out.tar", tree)


def test_unpacked_tar_builds_the_same_blob(tmp_path: Path) -> None:
    """Round and round: the tar of an image makes that image's chunks again."""
    options = BuildOptions(chunk_size=CHUNK)
    tree = make_tree(13, CHUNK)
    bootstrap, blobs = write_image(tmp_path, tree, options)
    assert main(["unpack", str(bootstrap), "--blob-dir", str(blobs), "--output", str(tmp_path / "1.tar")]) == 0
    (tmp_path / "again").mkdir()
    layer, data = build_tar((tmp_path / "1.tar").read_bytes(), options)
    (tmp_path / "again" / layer.blob_id).write_bytes(data)
    merge_layers([layer], options=options, out_bootstrap=tmp_path / "boot2")
    words = ["--blob-dir", str(tmp_path / "again"), "--output", str(tmp_path / "2.tar")]
    assert main(["unpack", str(tmp_path / "boot2"), *words]) == 0
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()


def list_records(tree: Tree) -> list[Record]:
    """The tree as tests/tree_listing.py tells one."""
    first = {}
    for path, entry in tree.items():
        while entry.link is not None:
            path = entry.link
            entry = tree[path]
        first[path] = first.get(path, 0) + 1
    records = []
    for path, entry in tree.items():
        kind = KINDS[stat.S_IFMT(entry.mode)]
        record: Record = {
            "path": path[1:].decode(errors="surrogateescape") or ".", "kind": kind, "mode": stat.S_IMODE(entry.mode),
            "uid": entry.uid, "gid": entry.gid, "mtime_ns": entry.mtime_ns,
            "xattrs": {key.decode(): value.hex() for key, value in sorted(entry.xattrs.items())},
        }  # fmt: skip
        if kind != "dir":
            source = path
            while (link := tree[source].link) is not None:
                source = link
            record["nlink"] = first[source]
        if kind == "file":
            record["size"], record["sha256"] = len(entry.content), hashlib.sha256(entry.content).hexdigest()
        if kind == "symlink":
            record["size"], record["target"] = len(entry.target), entry.target.decode(errors="surrogateescape")
        if kind in ("char", "block"):
            record["rdev"] = list(entry.device)
        records.append(record)
    return records


@pytest.mark.parametrize("way", WAYS)
def test_a_guest_sees_the_tree(way: str, tmp_path: Path) -> None:
    options = BuildOptions(**{"chunk_size": CHUNK, **WAYS[way]})
    tree = make_tree(14, options.chunk_size)
    bootstrap, blobs = write_image(tmp_path, tree, options)
    image = ServedImage(bootstrap, "localfs", {"dir": str(blobs)}, {})
    with Daemon(image, tmp_path / "cache") as daemon, FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        assert differences(list_records(tree), list(list_tree(guest.fuse))) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("seed", "chunk_size"), [(21, 4096), (22, CHUNK), (23, 1 << 20)])
def test_kernel_shows_the_tree(seed: int, chunk_size: int, flat: bool, tmp_path: Path) -> None:
    """flat: bootstrap and blob as one device, the blob where the bootstrap says that it is mapped."""
    known = "erofs" in Path("/proc/filesystems").read_text()
    if not known and subprocess.run(["modprobe", "erofs"], capture_output=True).returncode:
        pytest.skip("this kernel has no EROFS")
    tree = make_tree(seed, chunk_size)
    # files of many chunks one behind the other: the kernel reads them by their first chunk alone
    tree[b"/long"] = Entry(stat.S_IFREG | 0o644, content=os.urandom(5 * chunk_size + 77))
    tree[b"/broken"] = Entry(stat.S_IFREG | 0o644, content=os.urandom(chunk_size) + bytes(2 * chunk_size))
    options = BuildOptions(compressor="none", chunk_size=chunk_size)
    bootstrap, blobs = write_image(tmp_path, tree, options)
    (blob,) = blobs.iterdir()
    device = tmp_path / "device"
    device.write_bytes(decoder.Blob(blob.read_bytes()).expand(0, 0))
    devices = [device]
    if flat:
        blocks, mapped = struct.unpack_from("<II", bootstrap.read_bytes(), 1408 + 64)
        with bootstrap.open("r+b") as out:
            out.seek(mapped * 4096)
            out.write(device.read_bytes())
            out.truncate((mapped + blocks) * 4096)
        devices = []
    with mounted(bootstrap, devices, tmp_path / "mnt") as root:
        names = set()
        for folder, dirs, files in os.walk(os.fsencode(root)):
            for name in (*dirs, *files):
                full = os.path.join(folder, name)  # noqa: PTH118 - bytes
                path = full[len(os.fsencode(root)) :]
                names.add(path)
                shown, wanted = describe_file(full), describe_entry(tree, path)
                # The kernel gives a symbolic link or device none of the xattrs that only files may have.
                last = None if stat.S_IFMT(tree[path].mode) in (stat.S_IFREG, stat.S_IFDIR) else -1
                assert shown[:last] == wanted[:last], path
        assert names | {b"/"} == set(tree)
        for path, entry in tree.items():
            if entry.link is not None:
                one, other = (os.lstat(os.fsencode(root) + name) for name in (path, entry.link))
                assert one.st_ino == other.st_ino


def describe_file(path: bytes) -> tuple[object, ...]:
    status = os.lstat(path)
    form = stat.S_IFMT(status.st_mode)
    value: object = (0, 0)
    if form == stat.S_IFREG:
        value = Path(os.fsdecode(path)).read_bytes()
    elif form == stat.S_IFLNK:
        value = os.readlink(path)  # noqa: PTH115
    elif form in (stat.S_IFCHR, stat.S_IFBLK):
        value = os.major(status.st_rdev), os.minor(status.st_rdev)
    xattrs = {}
    if form in (stat.S_IFREG, stat.S_IFDIR):
        xattrs = {os.fsencode(name): os.getxattr(path, name) for name in os.listxattr(path)}
    return (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, value, xattrs)
