"""The image of these tests: small, and holding all that is easily got wrong. umoci makes it, and unpacks it to say
what is right."""

import io
import subprocess
import tarfile
from pathlib import Path
from random import Random

EPOCH = 1_700_000_000
TAG = "nasty"
# The chunk sizes that images of this are made with: small, so that a few MiB make a hundred chunks, and the default
SMALL_CHUNK_BYTES = 65536
LARGE_CHUNK_BYTES = 1 << 20
LONGEST_TARGET = "../" * 1360 + "fifteen-bytes.."  # 4095 bytes, all that PATH_MAX allows
CAPABILITY = "\x01\x00\x00\x02\x00\x20" + "\x00" * 14  # cap_net_raw+ep, as setcap writes it


class LayerTar:
    """A layer's tar. Every entry gets an mtime of its own, so that a mix-up shows."""

    def __init__(self, path: Path, seed: int, form: int = tarfile.PAX_FORMAT) -> None:
        self.tar = tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        self.random = Random(seed)

    def add(
        self,
        name: str,
        data: bytes = b"",
        *,
        kind: bytes = tarfile.REGTYPE,
        mode: int = 0o644,
        link: str = "",
        owner: tuple[int, int] = (0, 0),
        device: tuple[int, int] = (0, 0),
        mtime: float | None = None,
        xattrs: dict[str, str] | None = None,
    ) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode, entry.linkname, entry.size = kind, mode, link, len(data)
        entry.mtime = EPOCH + self.random.randrange(10_000_000) if mtime is None else mtime
        entry.uid, entry.gid = owner
        entry.devmajor, entry.devminor = device
        entry.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
        self.tar.addfile(entry, io.BytesIO(data) if kind == tarfile.REGTYPE else None)

    def make_dir(self, name: str, mode: int = 0o755, **more: object) -> None:
        self.add(name, kind=tarfile.DIRTYPE, mode=mode, **more)  # type: ignore[arg-type]

    def make_link(self, name: str, target: str) -> None:
        self.add(name, kind=tarfile.LNKTYPE, link=target)

    def make_symlink(self, name: str, target: str) -> None:
        self.add(name, kind=tarfile.SYMTYPE, mode=0o777, link=target)

    def delete(self, name: str) -> None:
        directory, slash, base = name.rpartition("/")
        self.add(f"{directory}{slash}.wh.{base}")

    def close(self) -> None:
        self.tar.close()


def make_text(random: Random, size: int) -> bytes:
    """Bytes that compress about as program text does."""
    words = [random.randbytes(random.randrange(3, 12)) for _ in range(200)]
    return b" ".join(random.choices(words, k=size // 4 + 1))[:size]


def make_base_layer(path: Path, seed: int) -> None:
    layer = LayerTar(path, seed)
    random = layer.random
    layer.make_dir("./", mode=0o755, mtime=EPOCH + 77)
    for name in (
        "etc",
        "usr",
        "usr/bin",
        "usr/lib",
        "usr/share",
        "var",
        "var/cache",
        "var/log",
        "sizes",
        "large",
        "nodes",
        "gone",
        "gone/deep",
    ):
        layer.make_dir(name)
    layer.make_dir("tmp", mode=0o1777)
    layer.make_dir("secret", mode=0o2750, owner=(33, 4_000_000_000), xattrs={"user.on-a-directory": "yes"})
    layer.add("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    layer.add("etc/replaced", b"of the base layer\n")
    layer.add("etc/deleted", b"never to be seen\n")
    layer.add("etc/becomes-a-directory", b"a file at first\n")
    layer.make_dir("etc/becomes-a-file")
    layer.add("etc/becomes-a-file/inside", b"goes with it\n")
    layer.add("etc/set-user", b"#!/bin/sh\n", mode=0o4755)
    layer.add("etc/no-mode", b"unreadable but by root\n", mode=0)
    layer.add("etc/nanoseconds", b"x", mtime=EPOCH + 0.123456)
    layer.add("etc/before-1970", b"x", mtime=-86400)
    layer.add("etc/after-2038", b"x", mtime=1 << 33)
    # One inode, names in three directories
    layer.add("usr/bin/tool", make_text(random, 5000), mode=0o755, owner=(7, 8), xattrs={"user.of": "the inode"})
    layer.make_link("usr/bin/tool-2", "usr/bin/tool")
    layer.make_link("usr/share/tool-3", "usr/bin/tool")
    layer.make_link("var/tool-4", "usr/bin/tool")
    layer.make_link("var/empty-file-2", "usr/bin/tool")
    layer.make_symlink("bin", "usr/bin")
    layer.make_symlink("usr/lib/longest", LONGEST_TARGET)
    layer.make_symlink("usr/lib/one-block-less-one", "x" * 4000)
    layer.make_symlink("usr/lib/dangling", "/nowhere/at/all")
    layer.add(
        "usr/lib/attributes",
        b"y",
        xattrs={
            "user.short": "v",
            "user.long": "w" * 2000,
            "user.no-value": "",
            "trusted.roots": "own",
            "security.capability": CAPABILITY,
        },
    )
    layer.add("nodes/null", kind=tarfile.CHRTYPE, mode=0o666, device=(1, 3))
    layer.add("nodes/large-numbers", kind=tarfile.CHRTYPE, mode=0o600, device=(300, 70_000))
    layer.add("nodes/disk", kind=tarfile.BLKTYPE, mode=0o660, owner=(0, 6), device=(8, 17))
    layer.add("nodes/fifo", kind=tarfile.FIFOTYPE, mode=0o640)
    for size in (0, 1, 4095, 4096, 4097):
        layer.add(f"sizes/{size}", random.randbytes(size))
    for chunk in (SMALL_CHUNK_BYTES, LARGE_CHUNK_BYTES):
        for size in (chunk - 1, chunk, chunk + 1):
            layer.add(f"sizes/{size}", make_text(random, size))
    layer.add("large/random", random.randbytes((2 << 20) + 12_345))
    layer.add("large/text", make_text(random, 3 << 20))
    layer.add("large/zeros", bytes((1 << 20) + 5))
    # The same chunk again and again, within the file and in another one
    repeated = random.randbytes(SMALL_CHUNK_BYTES)
    layer.add("large/repeated", repeated * 5 + b"end")
    layer.add("large/repeated-elsewhere", b"head".ljust(SMALL_CHUNK_BYTES, b".") + repeated * 2)
    for number in range(40):
        layer.add(f"var/cache/{number:02}", make_text(random, 100 * number))
        layer.add(f"gone/deep/{number:02}", make_text(random, 50 * number))
    layer.close()


def make_second_layer(path: Path, seed: int) -> None:
    layer = LayerTar(path, seed)
    random = layer.random
    # etc has no entry here: it keeps its attributes
    layer.delete("etc/deleted")
    layer.delete("gone")
    layer.add("etc/replaced", b"of the second layer, longer than before\n", mode=0o600, owner=(5, 6))
    layer.delete("etc/becomes-a-directory")
    layer.make_dir("etc/becomes-a-directory", mode=0o711)
    layer.add("etc/becomes-a-directory/inside", b"in a directory now\n")
    layer.delete("etc/becomes-a-file")
    layer.add("etc/becomes-a-file", b"in a file now\n")
    # An opaque directory: what was in it is gone, what comes with it stays
    layer.make_dir("var/cache", mode=0o700, owner=(42, 43))
    layer.add("var/cache/.wh..wh..opq")
    layer.add("var/cache/only", make_text(random, 70_000))
    layer.make_dir("var/cache/sub")
    layer.add("var/cache/sub/file", b"below\n")
    # One of several names of an inode goes
    layer.delete("usr/bin/tool-2")
    layer.make_dir("names")
    layer.add("names/" + "n" * 255, b"the longest name\n")
    layer.add("names/ünïcode ☃", b"beyond ASCII\n")
    layer.add("names/ leading and trailing ", b"spaces\n")
    layer.add("names/new\nline", b"a name of two lines\n")
    layer.add("names/-rf", b"an option\n")
    layer.add("names/back\\slash\"quote'", b"shells\n")
    layer.add("names/...", b"dots\n")
    layer.add("names/.hidden", b"hidden\n")
    layer.make_dir("many")
    for number in range(700):
        layer.add(f"many/entry-{number:04}-{'long' * (number % 20)}", f"{number}\n".encode())
    layer.add("large/second", random.randbytes((1 << 20) + 1))
    layer.close()


def make_third_layer(path: Path, seed: int) -> None:
    # ustar and GNU, not PAX: names that are no UTF-8 pass through as they are
    layer = LayerTar(path, seed, tarfile.GNU_FORMAT)
    layer.make_dir("names/bytes")
    layer.add("names/bytes/caf\udce9", b"Latin-1\n")
    layer.add("names/bytes/\udcff\udcfe", b"no character at all\n")
    for name in ("opt", "opt/deep", "opt/deep/er", "opt/deep/er/and", "opt/deep/er/and/deeper"):
        layer.make_dir(name)
    layer.add("opt/of-the-third", b"third\n" * 10)
    layer.make_link("opt/again", "opt/of-the-third")
    # a name for what a layer below holds
    layer.make_link("opt/of-the-base", "sizes/4097")
    layer.add("etc/replaced", b"of the third layer\n")
    layer.delete("var/log")
    layer.make_dir("var/log", mode=0o750)
    layer.add("var/log/fresh", b"log\n")
    layer.close()


def make_image(directory: Path, seed: int = 20) -> str:
    """An OCI layout in directory/oci; umoci's name of the image."""
    layout = directory / "oci"
    image = f"{layout}:{TAG}"
    run_tool("umoci", "init", "--layout", str(layout))
    run_tool("umoci", "new", "--image", image)
    for number, make in enumerate((make_base_layer, make_second_layer, make_third_layer)):
        tar = directory / f"layer-{number}.tar"
        make(tar, seed + number)
        run_tool("umoci", "raw", "add-layer", "--image", image, str(tar))
    run_tool("umoci", "config", "--image", image, "--config.cmd", "true", "--no-history")
    return image


def unpack_image(image: str, directory: Path) -> Path:
    """What umoci makes of an image: the root directory."""
    run_tool("umoci", "unpack", "--image", image, str(directory))
    return directory / "rootfs"


def run_tool(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
