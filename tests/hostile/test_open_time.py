"""Opening an image takes time that grows with its size, not with size times blobs: it runs while a mount is made."""

import stat
import struct
import time
from pathlib import Path

from virtiofsd_nydus.reader.bootstrap import Bootstrap

SUPERBLOCK, INODE, RECORD = 8192, 128, 80
BLOBS, RECORDS = 4096, 90_000
OPEN_CPU_S = 1.5  # where each blob costs a walk over all records: more than 5


def inode(number: int, mode: int, name: bytes, children: tuple[int, int]) -> bytes:
    """children: first entry of the inode table and number of entries, of a file: of chunks."""
    record = bytearray(INODE)
    struct.pack_into("<QQ", record, 32, 1, number)
    struct.pack_into("<I", record, 60, mode)
    struct.pack_into("<Q", record, 64, children[1] * 4096 if stat.S_ISREG(mode) else 0)
    struct.pack_into("<IIIH", record, 88, 2 if stat.S_ISDIR(mode) else 1, *children, len(name))
    return bytes(record) + name.ljust(8, b"\0")


def old_image(path: Path) -> None:
    """An image of RAFS v5 without an extended blob table, as old builders wrote them: its chunks have no numbers."""
    records = bytearray(RECORD * RECORDS)
    for k in range(RECORDS):
        struct.pack_into("<IIIIQQQ", records, k * RECORD + 32, k % BLOBS, 0, 4096, 4096, k * 4096, k * 4096, k * 4096)
    table = b"\0".join(struct.pack("<II", 0, 0) + b"blob%04d" % k for k in range(BLOBS))
    table += bytes(-len(table) % 8)
    inodes_at = SUPERBLOCK + 8 + len(table)
    root = inode(1, stat.S_IFDIR | 0o755, b"/", (2, 1))
    file = inode(2, stat.S_IFREG | 0o644, b"f", (0, RECORDS)) + records
    head = struct.pack("<IIIIQ", 0x52414653, 0x500, SUPERBLOCK, 4096, 0x1 | 0x8)
    head += struct.pack("<QQQQIIIIQ", 2, SUPERBLOCK, 0, SUPERBLOCK + 8, 2, 0, len(table), 0, 0)
    entries = struct.pack("<II", inodes_at >> 3, (inodes_at + len(root)) >> 3)
    path.write_bytes(head.ljust(SUPERBLOCK, b"\0") + entries + table + root + file)


def test_old_v5_image_of_many_blobs(tmp_path: Path) -> None:
    old_image(tmp_path / "boot")
    began = time.thread_time()
    with Bootstrap(str(tmp_path / "boot")) as image:
        took = time.thread_time() - began
        blobs = image.blobs
        assert len(blobs) == BLOBS
        assert sum(blob.chunk_count for blob in blobs) == RECORDS
        chunks = list(image.chunks(2))
        assert [(c.blob_index, c.chunk_index) for c in chunks[:: BLOBS + 1]] == [
            (k % BLOBS, k // BLOBS) for k in range(0, RECORDS, BLOBS + 1)
        ]
    assert took < OPEN_CPU_S
