"""Opening an image takes time that grows with its size, not with size times blobs: it runs while a mount is made."""

import stat
import struct
import time
from pathlib import Path

from virtiofsd_nydus.reader.bootstrap import Bootstrap

SUPERBLOCK, INODE, RECORD = 8192, 128, 80
RECORDS = 90_000
FEW, MANY = 4, 4096  # blobs
TIMES = 20  # where each blob costs a walk over all records: several hundred


def inode(number: int, mode: int, name: bytes, children: tuple[int, int]) -> bytes:
    """children: first entry of the inode table and number of entries, of a file: of chunks."""
    record = bytearray(INODE)
    struct.pack_into("<QQ", record, 32, 1, number)
    struct.pack_into("<I", record, 60, mode)
    struct.pack_into("<Q", record, 64, children[1] * 4096 if stat.S_ISREG(mode) else 0)
    struct.pack_into("<IIIH", record, 88, 2 if stat.S_ISDIR(mode) else 1, *children, len(name))
    return bytes(record) + name.ljust(8, b"\0")


def old_image(path: Path, blobs: int) -> None:
    """An image of RAFS v5 without an extended blob table, as old builders wrote them: its chunks have no numbers."""
    records = bytearray(RECORD * RECORDS)
    for k in range(RECORDS):
        struct.pack_into("<IIIIQQQ", records, k * RECORD + 32, k % blobs, 0, 4096, 4096, k * 4096, k * 4096, k * 4096)
    table = b"\0".join(struct.pack("<II", 0, 0) + b"blob%04d" % k for k in range(blobs))
    table += bytes(-len(table) % 8)
    inodes_at = SUPERBLOCK + 8 + len(table)
    root = inode(1, stat.S_IFDIR | 0o755, b"/", (2, 1))
    file = inode(2, stat.S_IFREG | 0o644, b"f", (0, RECORDS)) + records
    head = struct.pack("<IIIIQ", 0x52414653, 0x500, SUPERBLOCK, 4096, 0x1 | 0x8)
    head += struct.pack("<QQQQIIIIQ", 2, SUPERBLOCK, 0, SUPERBLOCK + 8, 2, 0, len(table), 0, 0)
    entries = struct.pack("<II", inodes_at >> 3, (inodes_at + len(root)) >> 3)
    path.write_bytes(head.ljust(SUPERBLOCK, b"\0") + entries + table + root + file)


def open_image(path: Path, blobs: int) -> float:
    """Processor seconds that it takes."""
    old_image(path, blobs)
    began = time.thread_time()
    with Bootstrap(str(path)) as image:
        took = time.thread_time() - began
        assert len(image.blobs) == blobs
        assert sum(blob.chunk_count for blob in image.blobs) == RECORDS
        assert [(c.blob_index, c.chunk_index) for c in list(image.chunks(2))[:: blobs + 1]] == [
            (k % blobs, k // blobs) for k in range(0, RECORDS, blobs + 1)
        ]
    return took


def test_old_v5_image_of_many_blobs(tmp_path: Path) -> None:
    few = open_image(tmp_path / "few", FEW)
    assert open_image(tmp_path / "many", MANY) < few * TIMES
