"""Good images, and where in their bytes a fault is to be put. The offsets are those of the format (RAFS v5, v6)."""

import io
import struct
import tarfile
from pathlib import Path

from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.cli.build import build_image
from virtiofsd_nydus.reader.bootstrap import Bootstrap

CHUNK = 0x10000
RECORD = 80


def write_source(path: Path) -> None:
    """A tar of /a of three chunks with an alias /c, /d/x and /d/y, /e/z, /link, and /xattr with an attribute."""
    files = {
        "a": b"".join(b"%09d\n" % number for number in range(15_000)),
        "d/x": b"x" * 9000,
        "d/y": b"y" * 9000,
        "e/z": b"z" * 9000,
        "xattr": b"with an attribute",
    }
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, link in (
            ("d", tarfile.DIRTYPE, ""),
            ("e", tarfile.DIRTYPE, ""),
            *((name, tarfile.REGTYPE, "") for name in files),
            ("c", tarfile.LNKTYPE, "a"),
            ("link", tarfile.SYMTYPE, "d/x"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode = kind, link, 0o755
            data = files.get(name, b"") if kind == tarfile.REGTYPE else b""
            info.size = len(data)
            if name == "xattr":
                info.pax_headers["SCHILY.xattr.user.mark"] = "value"
            tar.addfile(info, io.BytesIO(data))


def build(source: Path, to: Path, **options: object) -> Path:
    """The bootstrap; its blob is in blobs/ beside it."""
    to.mkdir(parents=True)
    build_image(source, to / "boot", to / "blobs", BuildOptions(chunk_size=CHUNK, prefetch_policy="fs", **options))  # type: ignore[arg-type]
    return to / "boot"


class Image:
    """A bootstrap's bytes, to be changed in place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = bytearray(path.read_bytes())
        self.added = b""

    def get(self, offset: int, form: str) -> int:
        value: int = struct.unpack_from(f"<{form}", self.bytes, offset)[0]
        return value

    def put(self, offset: int, form: str, value: int) -> None:
        struct.pack_into(f"<{form}", self.bytes, offset, value)

    def ino(self, path: str) -> int:
        with Bootstrap(self.path) as image:
            return image.resolve(path)


class ImageV6(Image):
    SB, EXT = 1024, 1152
    DEVICE = 1408

    @property
    def blob(self) -> int:
        return self.get(self.EXT + 8, "Q")

    @property
    def chunks(self) -> int:
        return self.get(self.EXT + 24, "Q")

    def inode(self, path: str) -> int:
        return self.get(self.SB + 40, "I") * 4096 + self.ino(path) * 32

    def body(self, path: str) -> int:
        """What follows the inode and its xattrs: inline data, or the chunk indexes."""
        inode = self.inode(path)
        count = self.get(inode + 2, "H")
        return inode + 64 + (12 + 4 * (count - 1) if count else 0)

    def indexes(self, path: str) -> int:
        return self.body(path) + 7 & ~7

    def dirent(self, directory: str, name: str) -> int:
        """Offset of an entry in a directory of one inline block."""
        base = self.body(directory)
        size = self.get(self.inode(directory) + 8, "Q")
        count = self.get(base + 8, "H") // 12
        starts = [self.get(base + 12 * k + 8, "H") for k in range(count)] + [size]
        for k in range(count):
            if self.bytes[base + starts[k] : base + starts[k + 1]] == name.encode():
                return base + 12 * k
        raise KeyError(name)

    def name(self, directory: str, name: str) -> int:
        return self.body(directory) + self.get(self.dirent(directory, name) + 8, "H")

    def record(self, path: str, k: int = 0) -> int:
        """The chunk record of a file's k-th chunk."""
        index = self.get(self.indexes(path) + 8 * k, "H")
        for at in range(self.chunks, self.chunks + self.get(self.EXT + 32, "Q"), RECORD):
            if self.get(at + 72, "I") == index:
                return at
        raise KeyError(path)


class ImageV5(Image):
    @property
    def slots(self) -> int:
        return self.get(32, "Q")

    @property
    def blob(self) -> int:
        return self.get(48, "Q")

    @property
    def ext(self) -> int:
        return self.get(72, "Q")

    def slot(self, path: str) -> int:
        """Where the inode table says where a name's record is. Aliases have slots of their own."""
        parent, _, name = path.rpartition("/")
        if not name:
            return self.slots
        directory = self.get(self.slot(parent), "I") << 3
        first, count = self.get(directory + 92, "I"), self.get(directory + 96, "I")
        for k in range(first, first + count):
            at = self.slots + 4 * (k - 1)
            record = self.get(at, "I") << 3
            if self.bytes[record + 128 : record + 128 + self.get(record + 100, "H")] == name.encode():
                return at
        raise KeyError(path)

    def inode(self, path: str) -> int:
        return self.get(self.slot(path), "I") << 3

    def record(self, path: str, k: int = 0) -> int:
        inode = self.inode(path)
        return inode + 128 + (self.get(inode + 100, "H") + 7 & ~7) + RECORD * k
