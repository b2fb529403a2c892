"""Faults of images: each is one change of a good image, named for it, and what must be said or done about it.

Three classes (docs/architecture.md): refused at open, in a line that names the fault; EIO on the inode at its first
use; found by `check` alone, which walks everything, while the daemon, which does not, stays bounded and unharmed.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tests.hostile.images import ImageV5, ImageV6

OPEN, INODE, CHECK, DATA = "refused at open", "EIO at first use", "found by check", "EIO of its data"


@dataclass(frozen=True, slots=True)
class Fault:
    """name: of the file. line: part of the line at open, or of one of `check`'s; with INODE and DATA, path is what
    fails (a directory is listed, a link and its xattrs read, a file read)."""

    name: str
    version: int
    kind: str
    line: str
    change: Callable[..., None]
    path: str = ""


FAULTS: list[Fault] = []


def fault(name: str, version: int, kind: str, line: str, change: Callable[..., object], path: str = "") -> None:
    def apply(image: ImageV5 | ImageV6) -> None:
        change(image)

    assert all(name != one.name for one in FAULTS)
    FAULTS.append(Fault(name, version, kind, line, apply, path))


def cut(image: ImageV5 | ImageV6, size: int) -> None:
    del image.bytes[size:]


def write(image: ImageV5 | ImageV6, offset: int, data: bytes) -> None:
    image.bytes[offset : offset + len(data)] = data


def add_blob(image: ImageV6, blob_id: bytes | None) -> None:
    """A second blob that is the first but for its id (None: and for that too), in a blob table of its own behind all
    else, and mapped where the first is."""
    entry, slot = image.bytes[image.blob : image.blob + 256], image.bytes[image.DEVICE : image.DEVICE + 128]
    table = len(image.bytes)
    image.bytes += bytes(4096)
    write(image, table, entry + entry)
    image.put(table + 256 + 64, "I", 1)
    write(image, image.DEVICE + 128, slot)
    if blob_id is not None:
        write(image, table + 256, blob_id)
        write(image, image.DEVICE + 128, blob_id)
    image.put(image.SB + 86, "H", 2)
    image.put(image.EXT + 8, "Q", table)
    image.put(image.EXT + 16, "I", 512)


# ---- row 1: the file's size
fault("v5-size-no-multiple-of-8", 5, OPEN, "truncated", lambda i: i.bytes.extend(b"\0\0\0"))
fault("v5-no-more-than-superblock", 5, OPEN, "truncated", lambda i: cut(i, 8192))
fault("v5-shorter-than-superblock", 5, OPEN, "truncated", lambda i: cut(i, 1100))
fault("v6-shorter-than-a-block", 6, OPEN, "truncated", lambda i: cut(i, 2048))
fault("v6-size-no-whole-blocks", 6, OPEN, "truncated", lambda i: cut(i, len(i.bytes) - 100))

# ---- row 2: tables in the file, aligned, disjoint
fault("v5-inode-table-outside", 5, OPEN, "inode table", lambda i: i.put(32, "Q", len(i.bytes)))
fault("v5-inode-table-count-overflow", 5, OPEN, "inode table", lambda i: i.put(56, "I", 0xFFFFFFFF))
fault("v5-inode-table-offset-overflow", 5, OPEN, "inode table", lambda i: i.put(32, "Q", 2**64 - 8))
fault("v5-inode-table-unaligned", 5, OPEN, "inode table", lambda i: i.put(32, "Q", 8193))
fault("v5-blob-table-in-superblock", 5, OPEN, "blob table", lambda i: i.put(48, "Q", 128))
fault("v5-blob-table-over-inode-table", 5, OPEN, "overlap", lambda i: i.put(48, "Q", i.slots))
fault("v5-ext-table-over-blob-table", 5, OPEN, "overlap", lambda i: i.put(72, "Q", i.blob))
fault("v5-prefetch-table-outside", 5, OPEN, "prefetch table", lambda i: i.put(60, "I", 0x7FFFFFFF))
fault("v5-ext-table-count", 5, OPEN, "extended blob table", lambda i: i.put(68, "I", 2))
fault("v6-blob-table-outside", 6, OPEN, "blob table", lambda i: i.put(1152 + 8, "Q", 1 << 40))
fault("v6-blob-table-offset-overflow", 6, OPEN, "blob table", lambda i: i.put(1152 + 8, "Q", 2**64 - 4096))
fault("v6-blob-table-unaligned", 6, OPEN, "blob table", lambda i: i.put(1152 + 8, "Q", 4100))
fault("v6-blob-table-part-of-an-entry", 6, OPEN, "blob table", lambda i: i.put(1152 + 16, "I", 300))
fault("v6-chunk-table-outside", 6, OPEN, "chunk table", lambda i: i.put(1152 + 32, "Q", 80 << 32))
fault("v6-chunk-table-part-of-a-record", 6, OPEN, "chunk table", lambda i: i.put(1152 + 32, "Q", 81))
fault("v6-chunk-table-over-blob-table", 6, OPEN, "overlap", lambda i: i.put(1152 + 24, "Q", i.blob))
fault("v6-prefetch-table-over-blob-table", 6, OPEN, "overlap", lambda i: i.put(1152 + 40, "Q", i.blob + 4))
fault("v6-prefetch-table-outside", 6, OPEN, "prefetch table", lambda i: i.put(1152 + 48, "I", 0xFFFFFFFC))
# ---- rows 3 and 4
fault("v6-device-table-over-blob-table", 6, OPEN, "device table", lambda i: i.put(1024 + 88, "H", 32))
fault("v6-device-table-outside", 6, OPEN, "device table", lambda i: i.put(1024 + 88, "H", 0xFFFF))
fault("v6-device-count", 6, OPEN, "devices", lambda i: i.put(1024 + 86, "H", 2))
fault("v6-device-names-another-blob", 6, OPEN, "name different blobs", lambda i: i.put(i.DEVICE, "B", ord("z")))
fault("v6-blob-table-over-inodes", 6, OPEN, "overlap", lambda i: i.put(1152 + 8, "Q", i.inode("/") & ~4095))
# ---- rows 5 and 6
fault("v5-unknown-flag", 5, OPEN, "0x400, which is unknown", lambda i: i.put(16, "Q", i.get(16, "Q") | 0x400))
fault("v6-unknown-flag", 6, OPEN, "0x400, which is unknown", lambda i: i.put(1152, "Q", i.get(1152, "Q") | 0x400))
fault("v6-two-compressors", 6, OPEN, "exactly one compressor", lambda i: i.put(1152, "Q", i.get(1152, "Q") | 0xC3))
fault("v6-no-digester", 6, OPEN, "exactly one digest", lambda i: i.put(1152, "Q", i.get(1152, "Q") & ~0xC))
fault("v6-unknown-erofs-feature", 6, OPEN, "incompatible feature", lambda i: i.put(1024 + 80, "I", 0x8000000C))
fault("v6-block-size", 6, OPEN, "block size", lambda i: i.put(1024 + 12, "B", 31))
fault("v5-chunk-size-no-power", 5, OPEN, "chunk size", lambda i: i.put(12, "I", 65537))
fault("v6-chunk-size-zero", 6, OPEN, "chunk size", lambda i: i.put(1152 + 20, "I", 0))
fault("v6-chunk-size-huge", 6, OPEN, "chunk size", lambda i: i.put(1152 + 20, "I", 1 << 25))
fault("v5-more-inodes-than-slots", 5, OPEN, "inode table", lambda i: i.put(24, "Q", 1000))
fault("v5-unknown-version", 5, OPEN, "version 0x600", lambda i: i.put(4, "I", 0x600))
fault("v5-superblock-size", 5, OPEN, "superblock", lambda i: i.put(8, "I", 4096))
fault("v5-slot-outside", 5, INODE, "malformed", lambda i: i.put(i.slot("/e"), "I", 1 << 28), "/")
fault("v5-slot-in-superblock", 5, INODE, "malformed", lambda i: i.put(i.slot("/e"), "I", 16), "/")
fault("v5-root-slot-outside", 5, OPEN, "root inode", lambda i: i.put(i.slots, "I", 1 << 28))
fault("v6-root-outside", 6, OPEN, "root inode", lambda i: i.put(1024 + 14, "H", 0xFFFF))
fault("v6-root-no-directory", 6, OPEN, "root inode", lambda i: i.put(i.inode("/") + 4, "H", 0o100644))
# ---- row 7
fault("v5-ino-zero", 5, INODE, "malformed", lambda i: i.put(i.inode("/d") + 40, "Q", 0), "/")
fault("v5-ino-beyond-table", 5, INODE, "malformed", lambda i: i.put(i.inode("/d") + 40, "Q", 999), "/")
fault("v5-no-links", 5, INODE, "malformed", lambda i: i.put(i.inode("/d") + 88, "I", 0), "/")
fault("v5-name-empty", 5, INODE, "malformed", lambda i: i.put(i.inode("/d") + 100, "H", 0), "/")
fault("v5-name-too-long", 5, INODE, "malformed", lambda i: i.put(i.inode("/d") + 100, "H", 300), "/")
fault("v5-directory-with-another-number", 5, INODE, "malformed", lambda i: i.put(i.inode("/d") + 40, "Q", 1), "/")
# ---- row 8: cycles and children
fault("v5-children-are-the-parents", 5, INODE, "lie before it", lambda i: i.put(i.inode("/d") + 92, "I", 1), "/d")
fault("v5-children-beyond-table", 5, INODE, "outside", lambda i: i.put(i.inode("/e") + 96, "I", 5000), "/e")
fault("v5-children-count-overflow", 5, INODE, "outside", lambda i: i.put(i.inode("/e") + 96, "I", 2**32 - 1), "/e")
fault("v5-child-of-another-parent", 5, INODE, "its parent is not", lambda i: i.put(i.inode("/d/x") + 32, "Q", 1), "/d")
# ---- row 9
fault("v6-directory-in-itself", 6, CHECK, "twice", lambda i: i.put(i.dirent("/d", "x"), "Q", i.ino("/d")))
fault("v6-directory-loop-to-root", 6, CHECK, "twice", lambda i: i.put(i.dirent("/d", "x"), "Q", i.ino("/")))
fault("v6-directory-twice", 6, CHECK, "twice", lambda i: i.put(i.dirent("/d", "x"), "Q", i.ino("/e")))
fault("v6-wrong-parent", 6, CHECK, "is not its parent", lambda i: i.put(i.dirent("/d", ".."), "Q", i.ino("/e")))
fault("v6-wrong-self", 6, CHECK, "is another inode", lambda i: i.put(i.dirent("/d", "."), "Q", i.ino("/e")))
# ---- row 10
fault("v6-nid-outside", 6, INODE, "outside the image", lambda i: i.put(i.dirent("/d", "x"), "Q", 1 << 40), "/d/x")
fault("v6-nid-overflow", 6, INODE, "outside the image", lambda i: i.put(i.dirent("/d", "x"), "Q", 2**64 - 1), "/d/x")
fault("v6-xattrs-outside", 6, INODE, "malformed", lambda i: i.put(i.inode("/e/z") + 2, "H", 0xFFFF), "/e/z")
fault("v6-indexes-run-into-what-follows", 6, DATA, "outside", lambda i: i.put(i.inode("/a") + 8, "Q", 1 << 28), "/a")
# ---- row 11
fault("v6-nameoff-no-multiple", 6, INODE, "directory block", lambda i: i.put(i.body("/d") + 8, "H", 13), "/d")
fault("v6-nameoff-zero", 6, INODE, "directory block", lambda i: i.put(i.body("/d") + 8, "H", 0), "/d")
fault(
    "v6-nameoff-descending",
    6,
    INODE,
    "directory entry",
    lambda i: i.put(i.dirent("/d", "y") + 8, "H", i.get(i.dirent("/d", "x") + 8, "H") - 1),
    "/d",
)
fault("v6-nameoff-beyond-block", 6, INODE, "directory entry", lambda i: i.put(i.dirent("/d", "y") + 8, "H", 4095), "/d")
fault(
    "v6-first-nameoff-beyond-block", 6, INODE, "directory block", lambda i: i.put(i.body("/d") + 8, "H", 12 * 300), "/d"
)
fault(
    "v6-directory-larger-than-image",
    6,
    INODE,
    "directory block",
    lambda i: i.put(i.inode("/d") + 8, "Q", 1 << 50),
    "/d",
)
fault("v6-directory-size-negative", 6, INODE, "malformed", lambda i: i.put(i.inode("/d") + 8, "Q", 1 << 63), "/d")
# ---- row 12: names
fault("v6-name-with-slash", 6, INODE, "'/' or NUL", lambda i: write(i, i.name("/", "link"), b"l/nk"), "/")
fault("v6-name-with-nul", 6, INODE, "'/' or NUL", lambda i: write(i, i.name("/d", "x"), b"\0"), "/d")
fault("v6-name-twice", 6, CHECK, "ascending order", lambda i: write(i, i.name("/d", "x"), b"y"))
fault("v6-names-unsorted", 6, CHECK, "ascending order", lambda i: write(i, i.name("/d", "x"), b"z"))
fault("v6-dot-missing", 6, CHECK, 'without "."', lambda i: write(i, i.name("/d", "."), b"-"))
fault("v5-name-with-slash", 5, INODE, "'/' or NUL", lambda i: write(i, i.inode("/link") + 128, b"l/nk"), "/")
fault("v5-name-with-nul", 5, INODE, "'/' or NUL", lambda i: write(i, i.inode("/link") + 128, b"l\0nk"), "/")
fault("v5-name-dot", 5, INODE, '"." or ".."', lambda i: write(i, i.inode("/d/x") + 128, b"."), "/d")
fault("v5-name-twice", 5, CHECK, "ascending order", lambda i: write(i, i.inode("/d/x") + 128, b"y"))
fault("v5-names-unsorted", 5, CHECK, "ascending order", lambda i: write(i, i.inode("/d/x") + 128, b"z"))
# ---- row 13
fault("v6-type-of-entry", 6, CHECK, "type that is not", lambda i: i.put(i.dirent("/d", "x") + 10, "B", 2))
fault("v6-layout-unknown", 6, INODE, "malformed", lambda i: i.put(i.inode("/d/x"), "H", 1 | 5 << 1), "/d/x")
fault("v6-compressed-layout", 6, INODE, "malformed", lambda i: i.put(i.inode("/d/x"), "H", 1 | 1 << 1), "/d/x")
fault("v6-file-not-chunk-based", 6, DATA, "not chunk-based", lambda i: i.put(i.inode("/d/x"), "H", 1), "/d/x")
fault("v6-mode-without-type", 6, INODE, "malformed", lambda i: i.put(i.inode("/d/x") + 4, "H", 0o644), "/d/x")
fault(
    "v6-fifo-with-a-size",
    6,
    CHECK,
    "with a size",
    lambda i: (
        i.put(i.inode("/d/x") + 4, "H", 0o010644),
        i.put(i.inode("/d/x"), "H", 1),
        i.put(i.dirent("/d", "x") + 10, "B", 5),
    ),
)
# ---- row 14
fault("v5-too-few-chunks", 5, DATA, "number of chunks", lambda i: i.put(i.inode("/a") + 96, "I", 1), "/a")
fault("v5-size-beyond-chunks", 5, DATA, "number of chunks", lambda i: i.put(i.inode("/d/x") + 64, "Q", 1 << 24), "/d/x")
fault("v5-size-negative", 5, INODE, "malformed", lambda i: i.put(i.inode("/d/x") + 64, "Q", 1 << 63), "/d/x")
fault("v5-chunks-outside", 5, INODE, "malformed", lambda i: i.put(i.inode("/d/x") + 96, "I", 1 << 30), "/d/x")
fault("v5-short-chunk-in-the-middle", 5, DATA, "short chunk", lambda i: i.put(i.record("/a", 1) + 44, "I", 100), "/a")
fault(
    "v5-chunk-larger-than-chunk-size",
    5,
    DATA,
    "impossible size",
    lambda i: i.put(i.record("/d/x") + 44, "I", 1 << 24),
    "/d/x",
)
# ---- row 15
fault("v5-blob-not-there", 5, DATA, "names blob 7 of 1", lambda i: i.put(i.record("/d/x") + 32, "I", 7), "/d/x")
fault("v5-chunk-number-beyond", 5, DATA, "has index", lambda i: i.put(i.record("/d/x") + 72, "I", 1000), "/d/x")
fault("v6-device-zero", 6, DATA, "chunk index", lambda i: i.put(i.indexes("/d/x") + 2, "H", 0), "/d/x")
fault("v6-device-not-there", 6, DATA, "chunk index", lambda i: i.put(i.indexes("/d/x") + 2, "H", 9), "/d/x")
fault("v6-chunk-number-beyond", 6, DATA, "chunk index", lambda i: i.put(i.indexes("/d/x"), "H", 60000), "/d/x")
fault("v6-record-of-no-blob", 6, DATA, "names blob 7 of 1", lambda i: i.put(i.record("/d/x") + 32, "I", 7), "/d/x")
# ---- row 16
for number in (5, 6):
    fault(
        f"v{number}-stored-beyond-blob",
        number,
        DATA,
        "outside its blob",
        lambda i: i.put(i.record("/d/x") + 48, "Q", 1 << 39),
        "/d/x",
    )
    fault(
        f"v{number}-stored-offset-overflow",
        number,
        DATA,
        "outside its blob",
        lambda i: i.put(i.record("/d/x") + 48, "Q", 2**64 - 1),
        "/d/x",
    )
    fault(
        f"v{number}-plain-beyond-blob",
        number,
        DATA,
        "outside its blob",
        lambda i: i.put(i.record("/d/x") + 56, "Q", 1 << 43),
        "/d/x",
    )
    fault(
        f"v{number}-stored-size-huge",
        number,
        DATA,
        "bad sizes",
        lambda i: i.put(i.record("/d/x") + 40, "I", 0xFFFFFFFF),
        "/d/x",
    )
    fault(
        f"v{number}-plain-size-zero", number, DATA, "bad sizes", lambda i: i.put(i.record("/d/x") + 44, "I", 0), "/d/x"
    )
    fault(
        f"v{number}-raw-of-two-sizes", number, DATA, "bad sizes", lambda i: i.put(i.record("/d/x") + 36, "I", 0), "/d/x"
    )
    # ---- row 17
    fault(
        f"v{number}-chunks-share-bytes",
        number,
        DATA,
        "share bytes",
        lambda i: i.put(i.record("/d/x") + 56, "Q", i.get(i.record("/d/y") + 56, "Q")),
        "/d/x",
    )
    # ---- row 20: more or less comes out than the record says
    fault(
        f"v{number}-decodes-to-more",
        number,
        DATA,
        "",
        lambda i: (
            i.put(i.record("/d/y") + 44, "I", 100),
            i.put(i.inode("/d/y") + (64 if isinstance(i, ImageV5) else 8), "Q", 100),
        ),
        "/d/y",
    )
    fault(
        f"v{number}-compressed-in-part",
        number,
        DATA,
        "",
        lambda i: i.put(i.record("/d/x") + 40, "I", i.get(i.record("/d/x") + 40, "I") - 3),
        "/d/x",
    )
    # ---- row 27
    fault(f"v{number}-digest", number, DATA, "", lambda i: i.put(i.record("/d/x"), "I", 1), "/d/x")
fault("v5-digest-of-a-file", 5, CHECK, "/d/x: its digest", lambda i: i.put(i.inode("/d/x"), "I", 1))
fault("v5-digest-of-a-link", 5, CHECK, "/link: its digest", lambda i: i.put(i.inode("/link"), "I", 1))
fault("v5-digest-of-a-directory", 5, CHECK, "/d: its digest", lambda i: i.put(i.inode("/d"), "I", 1))
fault("v5-digest-of-the-root", 5, CHECK, "/: its digest", lambda i: i.put(i.inode("/"), "I", 1))
fault(
    "v5-number-described-twice",
    5,
    DATA,
    "described twice",
    lambda i: i.put(i.record("/d/x") + 72, "I", i.get(i.record("/d/y") + 72, "I")),
    "/d/x",
)
fault("v6-index-and-record-differ", 6, DATA, "", lambda i: i.put(i.indexes("/d/x") + 4, "I", 0), "/d/x")
fault("v6-blob-of-0-stored-bytes", 6, DATA, "chunks in 0 stored bytes", lambda i: i.put(i.blob + 88, "Q", 0), "/d/x")
fault(
    "v6-uoff-beyond-blob",
    6,
    DATA,
    "data outside its blob",
    lambda i: i.put(i.indexes("/d/x") + 4, "I", 2**32 - 1),
    "/d/x",
)
# ---- rows 22, 23, 28, 29
PATH_ID = b"../../../../etc/passwd"
fault("v5-blob-id-is-a-path", 5, OPEN, "id that is not", lambda i: write(i, i.blob + 8, PATH_ID))
fault(
    "v6-blob-id-is-a-path",
    6,
    OPEN,
    "id that is not",
    lambda i: (write(i, i.blob, PATH_ID), write(i, i.DEVICE, PATH_ID)),
)
fault(
    "v6-blob-id-empty",
    6,
    OPEN,
    "id that is not",
    lambda i: (write(i, i.blob, bytes(64)), write(i, i.DEVICE, bytes(64))),
)
fault("v6-blob-id-goes-on-after-nul", 6, OPEN, "id that is not", lambda i: i.put(i.blob + 10, "B", 0))
fault(
    "v5-blob-id-twice",
    5,
    OPEN,
    "same id",
    lambda i: (write(i, i.blob, bytes(8) + b"ab\0" + bytes(8) + b"ab"), i.put(64, "I", 21), i.put(68, "I", 0)),
)
fault(
    "v5-blob-id-too-long",
    5,
    OPEN,
    "blob table",
    lambda i: (
        i.put(i.blob + 72, "Q", 0x6161616161616161),
        i.put(64, "I", i.get(64, "I") + 8),
        i.put(68, "I", 0),
        i.put(72, "Q", 0),
    ),
)
fault("v6-blob-id-twice", 6, OPEN, "same id", lambda i: add_blob(i, None))
fault("v6-blob-size-huge", 6, OPEN, "out of range", lambda i: i.put(i.blob + 96, "Q", 1 << 45))
fault("v6-blob-stored-size-huge", 6, OPEN, "out of range", lambda i: i.put(i.blob + 88, "Q", 2**64 - 1))
fault("v6-chunk-count-huge", 6, OPEN, "out of range", lambda i: i.put(i.blob + 72, "I", 1 << 25))
fault("v5-chunk-count-huge", 5, OPEN, "out of range", lambda i: i.put(i.ext, "I", 1 << 25))
fault("v5-blob-size-huge", 5, OPEN, "out of range", lambda i: i.put(i.ext + 8, "Q", 1 << 45))
fault("v6-chunk-count-zero", 6, DATA, "has index", lambda i: i.put(i.blob + 72, "I", 0), "/d/x")
fault(
    "v6-blob-feature-unknown",
    6,
    OPEN,
    "which is unknown",
    lambda i: i.put(i.blob + 84, "I", i.get(i.blob + 84, "I") | 0x1000),
)
fault("v6-blob-number", 6, OPEN, "out of range", lambda i: i.put(i.blob + 64, "I", 3))
fault("v6-compressor-unknown", 6, OPEN, "out of range", lambda i: i.put(i.blob + 76, "I", 9))
fault("v6-cipher-unknown", 6, OPEN, "AES-256-GCM", lambda i: i.put(i.blob + 216, "I", 3))
fault("v6-cipher-without-feature", 6, OPEN, "not by both", lambda i: i.put(i.blob + 216, "I", 1))
fault(
    "v6-key-of-equal-halves",
    6,
    OPEN,
    "equal halves",
    lambda i: (
        i.put(i.blob + 216, "I", 1),
        i.put(i.blob + 84, "I", i.get(i.blob + 84, "I") | 0x100),
        write(i, i.blob + 168, b"k" * 32),
    ),
)
fault(
    "v6-gzip-layer-without-infos",
    6,
    OPEN,
    "gzip layer",
    lambda i: i.put(i.blob + 84, "I", i.get(i.blob + 84, "I") & ~4 | 8),
)
fault("v5-feature-of-v6", 5, OPEN, "no form for", lambda i: i.put(i.ext + 4, "I", 0x100))
# ---- row 24
fault("v6-xattrs-shared", 6, INODE, "malformed xattrs", lambda i: write(i, i.inode("/xattr") + 68, b"\1"), "/xattr")
fault(
    "v6-xattr-beyond-body",
    6,
    INODE,
    "malformed xattrs",
    lambda i: i.put(i.inode("/xattr") + 64 + 12 + 2, "H", 60000),
    "/xattr",
)
fault(
    "v6-xattr-prefix-unknown",
    6,
    INODE,
    "malformed xattrs",
    lambda i: i.put(i.inode("/xattr") + 64 + 13, "B", 77),
    "/xattr",
)
fault("v5-xattrs-outside", 5, INODE, "malformed", lambda i: i.put(i.inode("/xattr") + 128 + 8, "Q", 1 << 40), "/xattr")
fault(
    "v5-xattr-beyond-area",
    5,
    INODE,
    "malformed xattrs",
    lambda i: i.put(i.inode("/xattr") + 128 + 16, "I", 1 << 30),
    "/xattr",
)
fault(
    "v5-xattr-without-name",
    5,
    INODE,
    "malformed xattrs",
    lambda i: i.put(i.inode("/xattr") + 128 + 20, "B", 0),
    "/xattr",
)
fault(
    "v6-xattrs-that-the-superblock-denies",
    6,
    CHECK,
    "says that none has",
    lambda i: i.put(1152, "Q", i.get(1152, "Q") & ~0x20),
)
fault(
    "v5-xattrs-that-the-superblock-denies",
    5,
    CHECK,
    "says that none has",
    lambda i: i.put(16, "Q", i.get(16, "Q") & ~0x20),
)
# ---- row 25
fault("v6-link-empty", 6, INODE, "malformed symlink", lambda i: i.put(i.inode("/link") + 8, "Q", 0), "/link")
fault("v6-link-too-long", 6, INODE, "malformed symlink", lambda i: i.put(i.inode("/link") + 8, "Q", 5000), "/link")
fault("v6-link-with-nul", 6, INODE, "malformed symlink", lambda i: write(i, i.body("/link"), b"\0"), "/link")
fault("v5-link-empty", 5, INODE, "malformed symlink", lambda i: i.put(i.inode("/link") + 102, "H", 0), "/link")
fault("v5-link-too-long", 5, INODE, "malformed", lambda i: i.put(i.inode("/link") + 102, "H", 60000), "/link")
fault("v5-link-with-nul", 5, INODE, "malformed symlink", lambda i: write(i, i.inode("/link") + 136, b"\0"), "/link")
# ---- row 26
fault(
    "v6-blob-mapped-over-bootstrap",
    6,
    CHECK,
    "blob 0 is mapped over the bootstrap",
    lambda i: i.put(i.DEVICE + 68, "I", 1),
)
fault(
    "v6-blobs-mapped-over-each-other",
    6,
    CHECK,
    "mapped ranges of blobs 0 and 1 overlap",
    lambda i: add_blob(i, b"a" * 64),
)
# ---- row 30
fault("v6-prefetch-of-nothing", 6, CHECK, "prefetch table", lambda i: i.put(i.get(1152 + 40, "Q"), "I", 0x7FFFFFFF))
fault("v5-prefetch-of-nothing", 5, CHECK, "prefetch table", lambda i: i.put(i.get(40, "Q"), "I", 999))
# ---- rows 31, 32
fault(
    "v5-children-shared",
    5,
    INODE,
    "more than one directory",
    lambda i: (
        i.put(i.inode("/e") + 92, "I", i.get(i.inode("/d") + 92, "I")),
        i.put(i.inode("/e") + 96, "I", i.get(i.inode("/d") + 96, "I")),
    ),
    "/e",
)
fault("v5-alias-differs", 5, CHECK, "differs from its first", lambda i: i.put(i.inode("/c") + 48, "I", 77))
fault("v5-alias-of-a-directory", 5, INODE, "malformed", lambda i: i.put(i.inode("/d/x") + 40, "Q", 1), "/d/x")
fault("v5-link-count", 5, CHECK, "link count", lambda i: i.put(i.inode("/d/x") + 88, "I", 3))
fault("v6-link-count", 6, CHECK, "link count", lambda i: i.put(i.inode("/d/x") + 44, "I", 3))
fault("v5-slot-in-no-directory", 5, CHECK, "in no directory", lambda i: i.put(i.inode("/e") + 96, "I", 0))
fault("v5-time-with-too-many-nanoseconds", 5, CHECK, "nanoseconds", lambda i: i.put(i.inode("/e") + 108, "I", 10**9))
fault("v6-time-with-too-many-nanoseconds", 6, CHECK, "nanoseconds", lambda i: i.put(i.inode("/e") + 40, "I", 10**9))
