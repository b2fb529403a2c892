"""Writes what the kept corpora of the readers' fuzz targets were chosen from, one folder a target.

    python -m tests.fuzz.make_seeds DIRECTORY

Choose with the target itself: build/fuzz/TARGET -merge=1 tests/fuzz/corpus/TARGET DIRECTORY/TARGET
"""

import gzip
import hashlib
import struct
import sys
import zlib
from pathlib import Path

import lz4.block
import zstandard

from tests.hostile.faults import FAULTS
from tests.hostile.images import ImageV5, build, write_source
from tests.hostile.make import good_images, make_file
from tests.hostile.test_hostile_blobs import TOC_FAULTS
from virtiofsd_nydus.rafs.cipher import Cipher


def write_seed(folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hashlib.sha1(content, usedforsecurity=False).hexdigest()).write_bytes(content)


def make_bootstraps(top: Path, work: Path) -> None:
    good = good_images(work / "good")
    (work / "bad").mkdir()
    for version, path in good.items():
        write_seed(top / ("fuzz_rafs" if version == 6 else "fuzz_rafs_v5"), path.read_bytes())
    for one in FAULTS:
        path = make_file(one, good[one.version], work / "bad")
        write_seed(top / ("fuzz_rafs" if one.version == 6 else "fuzz_rafs_v5"), path.read_bytes())
    plain = bytearray(good[5].read_bytes())
    plain[68:80] = bytes(12)  # without an extended blob table
    write_seed(top / "fuzz_rafs_v5", bytes(plain))
    for starts in ((0, 100_000, 200_000), (70_000, 10, 5), (5, 6, 2**40)):
        holes = ImageV5(good[5])
        inode = holes.inode("/a")
        holes.put(inode + 80, "Q", holes.get(inode + 80, "Q") | 8)
        holes.put(inode + 64, "Q", 400_000)
        for k, start in enumerate(starts):
            holes.put(holes.record("/a", k) + 64, "Q", start)
        holes.put(holes.record("/a", 1) + 36, "I", 2 if starts[0] == 0 else 1)
        write_seed(top / "fuzz_rafs_v5", bytes(holes.bytes))
    for path in (good[6], *sorted((work / "bad").iterdir())):  # in tarfs mode chunks are looked for in the tree
        tarfs = bytearray(path.read_bytes())
        if len(tarfs) >= 1160 and struct.unpack_from("<I", tarfs, 1024)[0] == 0xE0F5E1E2:
            struct.pack_into("<Q", tarfs, 1152, struct.unpack_from("<Q", tarfs, 1152)[0] | 0x200)
            write_seed(top / "fuzz_rafs", bytes(tarfs))
    encrypted = bytearray(good[6].read_bytes())
    blob = struct.unpack_from("<Q", encrypted, 1152 + 8)[0]
    struct.pack_into("<I", encrypted, blob + 84, struct.unpack_from("<I", encrypted, blob + 84)[0] | 0x100)
    struct.pack_into("<I", encrypted, blob + 216, 1)
    encrypted[blob + 168 : blob + 200] = bytes(range(32))
    write_seed(top / "fuzz_rafs", bytes(encrypted))
    separate = bytearray(good[6].read_bytes())
    struct.pack_into("<I", separate, blob + 84, struct.unpack_from("<I", separate, blob + 84)[0] | 0x10)
    separate[blob + 168 : blob + 200] = bytes(range(32))
    write_seed(top / "fuzz_rafs", bytes(separate))


def make_blobs(top: Path, work: Path) -> None:
    write_source(work / "source.tar")
    boot = build(work / "source.tar", work / "inlined")
    (blob,) = (boot.parent / "blobs").iterdir()
    content = blob.read_bytes()
    for fix in (b"\0", b"\1"):
        write_seed(top / "fuzz_toc", fix + content)
        for _, change in TOC_FAULTS.values():
            changed = bytearray(content)
            change(changed)
            write_seed(top / "fuzz_toc", fix + bytes(changed))
        for name, size in (
            (b"image.boot", boot.stat().st_size),
            (b"image.boot", 1 << 30),
            (b"image.boot", 100),
            (b"other", 100),
        ):
            header = bytearray(512)
            header[: len(name)] = name
            header[124:136] = b"%011o\0" % size
            header[156:157] = b"0"
            header[257:265] = b"ustar  \0"
            header[148:156] = b" " * 8
            header[148:156] = b"%07o\0" % sum(header)
            write_seed(top / "fuzz_toc", fix + boot.read_bytes() + header)


def meta_seed(
    features: int,
    compressor: int,
    csize: int,
    usize: int,
    table: bytes,
    count: int,
    *,
    ctx: tuple[int, ...],
    fixed: int = 1,
    choice: tuple[int, int] = (0, 0),
) -> bytes:
    """choice: header bytes 5 and 6, see fuzz_blobmeta.c."""
    header = bytearray(64)
    header[4:9] = bytes((fixed, *choice, 0, compressor))
    struct.pack_into("<QQI", header, 40, *ctx)
    return struct.pack("<BBBI", count, features, compressor, csize) + usize.to_bytes(6, "little") + header + table


def entry_v1(uoff: int, usize: int, coff: int, csize: int) -> bytes:
    high = lambda size: (size - 1 & 0xFFFFF) << 44 | (size - 1 >> 20)  # noqa: E731
    return struct.pack("<QQ", uoff | (usize - 1 & 0xFFFFF) << 44, coff | high(csize))


def entry_v2(uoff: int, usize: int, flags: int, coff: int, csize: int, low: int = 0, context: int = 0) -> bytes:
    return struct.pack("<QQII", uoff >> 12 | usize - 1 << 32 | flags << 56, coff | csize << 40, low, context)


def make_tables(top: Path) -> None:
    def add(*args: object, **more: object) -> None:
        write_seed(top / "fuzz_blobmeta", meta_seed(*args, **more))  # type: ignore[arg-type]

    v1 = entry_v1(0, 100, 0, 50) + entry_v1(4096, 200, 50, 200)
    v2 = entry_v2(0, 100, 1, 0, 50) + entry_v2(4096, 200, 0, 50, 200)
    batch = entry_v2(0, 100, 5, 0, 0, 0, 0) + entry_v2(4096, 200, 5, 0, 0, 100, 0) + struct.pack("<II32x", 150, 300)
    context = struct.pack("<QQQIIIBBH", 10, 0, 0, 500, 1000, 16, 7, 3, 0)
    zran = entry_v2(0, 100, 3, 0, 9, 0, 0) + entry_v2(4096, 200, 3, 20, 9, 100, 0) + context + bytes(16)
    none = (0, 0, 0)
    for choice in ((0, 0), (0, 1), (0, 2), (0x5A, 0), (1, 0)):
        for fixed in (0, 1):
            add(0, 1, 1000, 8192, v1, 2, ctx=none, choice=choice, fixed=fixed)
            add(0x4, 1, 1000, 8192, v2, 2, ctx=none, choice=choice, fixed=fixed)
            add(0x84, 1, 1000, 8192, batch, 2, ctx=(48, 40, 1), choice=choice, fixed=fixed)
            add(0xC, 2, 1000, 8192, zran, 2, ctx=(48, 56, 1), choice=choice, fixed=fixed)
    for ctx in ((0, 40, 1), (48, 40, 9), (48, 40, 0), (1 << 40, 40, 1), (48, 1 << 40, 1)):
        add(0x84, 1, 1000, 8192, batch, 2, ctx=ctx)
        add(0xC, 2, 1000, 8192, zran, 2, ctx=ctx)
    add(0x84, 1, 100, 8192, batch, 2, ctx=(48, 40, 1))
    add(0x4, 1, 1000, 100, v2, 2, ctx=none)
    add(0x4, 1, 1000, 8192, v2[:24] * 2, 2, ctx=none)
    add(0x4, 0, 1000, 8192, v2, 2, ctx=none)
    add(0x4, 1, 1000, 8192, entry_v2(0, 100, 9, 0, 50) + v2[24:], 2, ctx=none, choice=(1, 0))
    add(0x4, 1, 1000, 8192, entry_v2(0, 100, 3, 0, 50) + v2[24:], 2, ctx=none)
    add(0xC, 2, 1000, 8192, zran[:48] + context[:24] + bytes(16) + bytes(16), 2, ctx=(48, 56, 1))
    for compressor in (0, 1, 3):  # a table with its header behind it: decoded and decrypted
        body = zlib.compress(v2) if compressor else v2
        add(0x4, compressor, 1000, 8192, (body + bytes(24 * 2))[:48] + bytes(4096), 2, ctx=none, choice=(1, 0))


def make_contexts(top: Path) -> None:
    plain = b"".join(b"line %d\n" % number for number in range(3000))
    window = plain[:2000]
    packer = zlib.compressobj(6, zlib.DEFLATED, -15, zdict=window)
    raw = packer.compress(plain[2000:]) + packer.flush()
    streams = gzip.compress(plain[:9000], mtime=0) + gzip.compress(plain[9000:18000], mtime=0) * 2

    def context(data: bytes, out: int, dictionary: int, *, at: int = 0, bits: int = 0) -> bytes:
        return struct.pack("<QQQIIIBBH", at, 0, 0, len(data) - at, out, dictionary, 0xA5, bits, 0)

    def add(contexts: bytes, dictionary: bytes, data: bytes) -> None:
        head = struct.pack("<BHB", len(contexts) // 40, len(dictionary), 0)
        write_seed(top / "fuzz_zran", head + contexts + dictionary + data)

    add(context(raw, len(plain) - 2000, 2000), window, raw)
    add(context(raw, 100, 2000, bits=3) + context(raw, 1 << 20, 2000), window, raw)
    for out in (100, 9000, 9001, 18000, 26999, 27000, 27001):
        add(context(streams, out, 0, at=10), b"", streams)
    add(context(streams[:5000], 27000, 0, at=10), b"", streams)
    cut = gzip.compress(plain, mtime=0)
    for left in range(0, 12, 3):
        add(context(cut[: len(cut) - left], len(plain) + 1, 0, at=10), b"", cut)
    for out, dictionary, bits in ((0, 0, 0), (1 << 25, 0, 0), (100, 40000, 0), (100, 2001, 0), (100, 0, 8)):
        add(context(raw, out, dictionary, bits=bits), window, raw)


def make_batches(top: Path) -> None:
    """See fuzz_batch.c: chunks, contexts, compressor, step, pages of plain bytes, cipher."""
    cipher = Cipher(bytes([1]) * 16 + bytes([2]) * 16, bytes(16))
    packers = (
        bytes,
        lambda data: lz4.block.compress(data, store_size=False),
        lambda data: gzip.compress(data, mtime=0),
        zstandard.ZstdCompressor().compress,
    )

    def add(
        batches: list[list[bytes]],
        compressor: int,
        step: int,
        *,
        encrypted: bool = False,
        stored: bool = False,
        spoil: int = -1,
    ) -> None:
        entries, contexts, blob, page = bytearray(), bytearray(), bytearray(), 0
        for number, members in enumerate(batches):
            plain = b"".join(members)
            packed = packers[compressor & 3](plain)
            if len(packed) >= len(plain):
                packed = plain
            if encrypted:
                packed = cipher.encrypt(packed)
            alone, at = len(members) == 1, 0
            for member in members:
                flags = (1 if alone and compressor and packed != plain else 0 if alone else 5) | (8 if encrypted else 0)
                entries += entry_v2(page << 12, len(member), flags, len(blob), len(packed) if alone else 0, at, number)
                at += len(member)
                page += -(-len(member) // 4096)
            contexts += struct.pack("<II32x", len(packed), len(plain))
            blob += packed
        if spoil >= 0:
            blob[spoil] ^= 0x40
        head = struct.pack(
            "<BBBBHBB", len(entries) // 24, len(batches), compressor, step, page, encrypted | stored << 1, 0
        )
        write_seed(top / "fuzz_batch", head + entries + contexts + blob)

    small = [b"a" * 900, b"bc" * 700, b"d" * 40]
    for compressor in range(4):
        for step in (0, 1, 255):
            add([small, [b"alone" * 500], small[:2]], compressor, step)
            add([small, [b"e" * 2000], small], compressor, step, encrypted=True)
        for spoil in (0, 5, 20):
            add([small, small, [b"z" * 300]], compressor, 255, spoil=spoil)
            add([small, small], compressor, 1, encrypted=True, spoil=spoil)
        add([[b"f" * 300], [b"gh" * 2500], [b"i" * 9]], compressor, 1, stored=True)
        add([[b"f" * 9], [b"gh" * 2500], [b"i" * 3]], compressor, 255, encrypted=True)
    add([small], 4, 255)  # a compressor that there is not
    add([[b"x" * 5000, b"y" * 4097] * 6], 3, 3)
    add([[b"%d" % (number % 10) * 300_000 for number in range(5)], [b"q" * 900_000], [b"r" * 900_000]], 3, 255)


def main() -> int:
    top = Path(sys.argv[1])
    make_bootstraps(top, top / "work" / "bootstraps")
    (top / "work" / "blobs").mkdir()
    make_blobs(top, top / "work" / "blobs")
    make_tables(top)
    make_contexts(top)
    make_batches(top)
    return 0


if __name__ == "__main__":
    sys.exit(main())
