"""Trees to build images from, as plain data: made at random but repeatably, written as tars by the standard library,
compared with what a decoder finds.
"""

import io
import random
import stat
import tarfile
from dataclasses import dataclass, field, replace

from tests.rafs.decoder import Blob, Bootstrap, Node, check_blob_entry, read_file
from virtiofsd_nydus.builder.image import BuildOptions, Layer, LayerSource, build_layer, merge_layers

ACL = bytes.fromhex("0200000001000600ffffffff04000400ffffffff20000400ffffffff")


@dataclass
class Entry:
    """What one name shows. content: of a regular file; link: the path whose inode it shares."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    content: bytes = b""
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    link: bytes | None = None


Tree = dict[bytes, Entry]  # absolute path -> entry; parents come before children; b"/" is the root


def make_tree(seed: int, chunk_size: int) -> Tree:
    """Every kind of entry, odd names, sizes round the edges of blocks and chunks."""
    rng = random.Random(seed)
    tree: Tree = {b"/": Entry(stat.S_IFDIR | 0o755, 1, 2, 1_600_000_000_123_456_789)}

    def common() -> dict[str, object]:
        xattrs = {}
        if rng.random() < 0.15:
            xattrs[b"user.note"] = rng.randbytes(rng.choice([1, 2, 3, 4, 700]))  # a tar holds no empty ones
            xattrs[b"security.capability"] = bytes.fromhex("0100000200200000000000000000000000000000")
        if rng.random() < 0.05:
            xattrs[b"system.posix_acl_access"] = ACL
        return {
            "uid": rng.choice([0, 0, 1000, 65534, 0xFFFFFFFE]),
            "gid": rng.choice([0, 0, 42, 70000]),
            "mtime_ns": rng.choice([0, 1, 1_700_000_000_000_000_000 + rng.randrange(10**9), 4_294_967_296 * 10**9, -1]),
            "xattrs": xattrs,
        }

    def add(path: bytes, kind: int, mode: int, **more: object) -> None:
        tree[path] = Entry(kind | mode, **common(), **more)  # type: ignore[arg-type]

    dirs = [b""]
    for number in range(12):
        parent = rng.choice(dirs)
        path = parent + b"/" + rng.choice([b"dir", b"!dir", b"-dir", b"D", b".hidden"]) + b"%d" % number
        add(path, stat.S_IFDIR, rng.choice([0o755, 0o1777, 0o2750, 0o700]))
        dirs.append(path)
    edges = [0, 1, 2, 4095, 4096, 4097, chunk_size - 1, chunk_size, chunk_size + 1, 3 * chunk_size + 17]
    pieces = [rng.randbytes(chunk_size), bytes(chunk_size), b"text " * (chunk_size // 5 + 1)]
    for number, size in enumerate(edges * 2):
        content = b"".join(rng.choice(pieces)[:chunk_size] for _ in range(size // chunk_size + 1))[:size]
        mode = rng.choice([0o644, 0o4755, 0o600, 0])
        add(rng.choice(dirs) + b"/file%d" % number, stat.S_IFREG, mode, content=content)
    # names before "." in order, names at the limit, names that are not UTF-8
    for name in (b"!", b"#x", b"-", b"+a", b" ", b"...", b".a", b"..a", b"\xff\xfe", "ü".encode(), b"n" * 255, b"a\nb"):
        add(b"/" + name, stat.S_IFREG, 0o644, content=name * 3)
    for size in (1, 59, 60, 4031, 4032, 4033, 4095):
        add(rng.choice(dirs) + b"/link%d" % size, stat.S_IFLNK, 0o777, target=b"t" * size)
    add(b"/null", stat.S_IFCHR, 0o666, device=(1, 3))
    add(b"/disk", stat.S_IFBLK, 0o660, device=(259, 1048575))
    add(b"/pipe", stat.S_IFIFO, 0o600)
    # a directory of several blocks, one whose only block is full to the last byte, an empty one
    add(b"/many", stat.S_IFDIR, 0o755)
    for number in range(700):
        name = b"entry-%04d" % number + b"x" * rng.randrange(40)
        add(b"/many/" + name, stat.S_IFREG, 0o644, content=b"%d" % (number % 9))
    add(b"/full", stat.S_IFDIR, 0o755)
    left = 4096 - 27
    number = 0
    while left:
        size = min(250, left - 12) if left - 262 >= 13 or left <= 262 else left - 12 - 13
        add(b"/full/" + (b"%03d" % number).ljust(size, b"f")[:size], stat.S_IFREG, 0o644)
        left -= 12 + size
        number += 1
    add(b"/empty", stat.S_IFDIR, 0o755)
    files = [path for path, entry in tree.items() if stat.S_ISREG(entry.mode)]
    for number in range(8):
        source = rng.choice(files)
        tree[rng.choice(dirs) + b"/alias%d" % number] = replace(tree[source], link=source)
    return tree


def write_tar(tree: Tree, format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for path, entry in tree.items():
            info = tarfile.TarInfo("." + path.decode("utf-8", "surrogateescape"))
            info.mode, info.uid, info.gid = stat.S_IMODE(entry.mode), entry.uid, entry.gid
            seconds, nanoseconds = divmod(entry.mtime_ns, 10**9)
            info.mtime = seconds
            if nanoseconds:
                whole = f"{seconds}.{nanoseconds:09d}" if entry.mtime_ns >= 0 else f"-0.{10**9 - nanoseconds:09d}"
                info.pax_headers["mtime"] = whole
            for key, value in entry.xattrs.items():
                info.pax_headers[f"SCHILY.xattr.{key.decode()}"] = value.decode("utf-8", "surrogateescape")
            data = None
            form = stat.S_IFMT(entry.mode)
            if entry.link is not None:
                info.type, info.linkname = tarfile.LNKTYPE, "." + entry.link.decode("utf-8", "surrogateescape")
            elif form == stat.S_IFREG:
                info.size, data = len(entry.content), io.BytesIO(entry.content)
            elif form == stat.S_IFLNK:
                info.type, info.linkname = tarfile.SYMTYPE, entry.target.decode("utf-8", "surrogateescape")
            else:
                info.type = {
                    stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFCHR: tarfile.CHRTYPE,
                    stat.S_IFBLK: tarfile.BLKTYPE, stat.S_IFIFO: tarfile.FIFOTYPE,
                }[form]  # fmt: skip
                info.devmajor, info.devminor = entry.device
            tar.addfile(info, data)
    return out.getvalue()


def build_tar(data: bytes, options: BuildOptions) -> tuple[Layer, bytes]:
    """A layer and its blob from a tar's bytes."""
    out = io.BytesIO()
    layer = build_layer(LayerSource(io.BytesIO(data), "tar", "layer"), options=options, out_blob=out)
    return layer, out.getvalue()


def decode_image(layers: list[tuple[Layer, bytes]], options: BuildOptions) -> tuple[Bootstrap, dict[str, Blob]]:
    """Merges layers and decodes the image, everything checked that the decoder can check."""
    image = merge_layers([layer for layer, _ in layers], options=options)
    bootstrap = Bootstrap(image.bootstrap)
    blobs = {}
    for layer, data in layers:
        blob = Blob(data)
        assert blob.blob_id == layer.blob_id and len(data) == layer.blob_size
        blobs[blob.blob_id] = blob
    for entry in bootstrap.blobs:
        check_blob_entry(entry, blobs[entry.blob_id])
    return bootstrap, blobs


def encode_device(device: tuple[int, int]) -> int:
    major, minor = device
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def check_node(path: bytes, node: Node, entry: Entry, bootstrap: Bootstrap, blobs: dict[str, Blob]) -> None:
    mode = entry.mode
    assert node.mode == mode, path
    assert (node.uid, node.gid, node.mtime_ns) == (entry.uid, entry.gid, entry.mtime_ns), path
    assert node.xattrs == entry.xattrs and list(node.xattrs) == sorted(entry.xattrs), path
    if stat.S_ISREG(mode):
        assert node.size == len(entry.content), path
        assert read_file(node, bootstrap, blobs) == entry.content, path
    elif stat.S_ISLNK(mode):
        assert node.target == entry.target, path
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        assert node.rdev == encode_device(entry.device), path


def check_tree(tree: Tree, bootstrap: Bootstrap, blobs: dict[str, Blob]) -> None:
    """The image shows exactly the tree."""
    found = bootstrap.walk()
    assert sorted(found) == sorted(tree)
    for path, entry in tree.items():
        check_node(path, found[path], entry, bootstrap, blobs)
        if entry.link is not None:
            assert found[path] is found[entry.link], path
