"""Writes a RAFS v5 bootstrap: tables of fixed places, then one record for each name (rafs-format.md 2)."""

import copy
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import BlobInfo
from virtiofsd_nydus.rafs.bootstrap import BootstrapStats, ChunkPlace, encode_chunk_record
from virtiofsd_nydus.rafs.digest import digest_function
from virtiofsd_nydus.rafs.layout import align_up
from virtiofsd_nydus.rafs.tree import (
    Directory,
    Inode,
    RegularFile,
    Special,
    Symlink,
    Xattrs,
    find_inode,
    walk_directories,
)

SUPER_MAGIC = 0x52414653
VERSION = 0x500
SUPER_BYTES = 8192
# magic, version, sb_size, block_size, flags, inodes_count, inode_table_offset, prefetch_table_offset,
# blob_table_offset, inode_table_entries, prefetch_table_entries, blob_table_size, ext_blob_table_entries,
# ext_blob_table_offset
SUPER = struct.Struct("<IIIIQQQQQIIIIQ")
EXT_BLOB = struct.Struct("<IIQQ40x")  # chunk_count, features, uncompressed_size, compressed_size
# digest, parent, ino, uid, gid, projid, mode, size, blocks, flags, nlink, child_index, child_count, name_size,
# symlink_size, rdev, mtime_nsec, mtime
INODE = struct.Struct("<32sQQIIIIQQQIIIHHIIQ8x")
FLAG_SYMLINK, FLAG_HARDLINK, FLAG_XATTR = 1, 2, 4
BOOTSTRAP_BYTES_MAX = 2 << 30
CHUNK_BYTES = 80


def encode_xattrs_v5(xattrs: Xattrs) -> bytes:
    """The xattr area of a record, a multiple of 8 bytes long; empty without xattrs."""
    if not xattrs:
        return b""
    body = b"".join(struct.pack("<I", len(name) + 1 + len(value)) + name + b"\0" + value for name, value in xattrs)
    return struct.pack("<Q", len(body)) + body + bytes(-len(body) % 8)


def measure_directory_v5(directory: Directory) -> int:
    """The size a directory shows: a made-up one, for v5 has no blocks of names."""
    return max(align_up(sum(len(name) + 8 for name in directory.children), 4096), 4096)


class BootstrapWriterV5:
    """One use: BootstrapWriterV5(...).write(). The tree's children are put in order and its numbers are set: ino is the
    inode's number, nid its first slot."""

    def __init__(
        self, root: Directory, blobs: Sequence[BlobInfo], *, chunk_size: int, codec: layout.Codec,
        digester: layout.Digester, moved: Mapping[int, Mapping[int, ChunkPlace]] | None = None,
        prefetch: Iterable[bytes] = (),
    ) -> None:  # fmt: skip
        """As BootstrapWriter's."""
        self.root = root
        self.blobs = blobs
        self.chunk_size = chunk_size
        self.codec = codec
        self.digester = digester
        self.stats = BootstrapStats()
        self._moved = moved or {}
        self._blob_index = {id(blob.table): index for index, blob in enumerate(blobs)}
        self._prefetch = list(prefetch)
        self._digest = digest_function(digester)
        self._digests: dict[int, bytes] = {}  # by ino
        self._child_index: dict[int, int] = {}  # of directories, by ino
        self._used: set[ChunkPlace] = set()

    def write(self) -> bytearray:
        """The whole bootstrap."""
        self._number()
        self._digest_all()
        entries = self.stats.names
        prefetch = [inode.ino for path in self._prefetch if (inode := find_inode(self.root, path)) is not None]
        blob_table = b"\0".join(
            struct.pack("<II", 0, min(blob.prefetch_size, 0xFFFFFFFF)) + blob.blob_id.encode() for blob in self.blobs
        )
        blob_table += bytes(-len(blob_table) % 8)
        prefetch_offset = SUPER_BYTES + align_up(4 * entries, 8)
        blob_table_offset = prefetch_offset + align_up(4 * len(prefetch), 8)
        ext_offset = blob_table_offset + len(blob_table)

        out = bytearray(ext_offset)
        struct.pack_into(f"<{len(prefetch)}I", out, prefetch_offset, *prefetch)
        out[blob_table_offset:ext_offset] = blob_table
        for blob in self.blobs:
            out += EXT_BLOB.pack(len(blob.table), blob.features, blob.uncompressed_size, blob.compressed_size)
        has_xattrs = self._write_records(out)
        flags = (
            layout.CODEC_FLAG[self.codec] | layout.DIGESTER_FLAG[self.digester] | layout.SuperFlag.EXPLICIT_UID_GID
        )
        if has_xattrs:
            flags |= layout.SuperFlag.HAS_XATTR
        SUPER.pack_into(
            out, 0, SUPER_MAGIC, VERSION, SUPER_BYTES, self.chunk_size, flags, self.stats.inodes, SUPER_BYTES,
            prefetch_offset, blob_table_offset, entries, len(prefetch), len(blob_table), len(self.blobs), ext_offset,
        )  # fmt: skip
        self.stats.bootstrap_bytes = len(out)
        self.stats.chunks = len(self._used)
        return out

    def _number(self) -> None:
        """Slots: a directory's children one after the other, then those of its sub-directories in turn."""
        for directory in walk_directories(self.root):
            for child in directory.children.values():
                child.ino = 0
        for directory in walk_directories(self.root):
            order = list(directory.children)
            if order != sorted(order):
                directory.children = {name: directory.children[name] for name in sorted(order)}
            for name, child in directory.children.items():
                if child.ino < 0 and not isinstance(child, RegularFile | Directory):
                    child = directory.children[name] = copy.copy(child)  # v5 has hard links of regular files only
                child.ino, child.nid, child.nlink = -1, 0, 0
        self.root.ino, self.root.nid, self.root.nlink = 1, 1, 2
        slot = inodes = 1
        for directory in walk_directories(self.root):
            self._child_index[directory.ino] = slot + 1
            for child in directory.children.values():
                slot += 1
                if isinstance(child, Directory):
                    directory.nlink += 1
                    child.nlink = 2
                else:
                    child.nlink += 1
                    if child.ino > 0:
                        continue
                inodes += 1
                child.ino = child.nid = slot
        self.stats.names, self.stats.inodes = slot, inodes

    def _digest_all(self) -> None:
        """Leaves first: a directory's digest is made of its children's."""
        digest, digests = self._digest, self._digests
        empty = digest(b"")
        for directory in reversed(list(walk_directories(self.root))):
            for child in directory.children.values():
                if isinstance(child, Directory) or child.ino in digests:
                    continue
                if isinstance(child, RegularFile):
                    located = (child.table.locate(chunk) for chunk in child.chunks)
                    digests[child.ino] = digest(b"".join(table.digest(index) for table, index in located))
                elif isinstance(child, Symlink):
                    digests[child.ino] = digest(child.target)
                else:
                    digests[child.ino] = empty
            digests[directory.ino] = digest(b"".join(digests[child.ino] for child in directory.children.values()))

    def _write_records(self, out: bytearray) -> bool:
        """Records in the order of slots, and the table that tells where they are. Whether any inode has xattrs."""
        xattr_areas: dict[Xattrs, bytes] = {(): b""}
        slot = 1
        for name, parent, inode in self._list_records():
            if len(out) > BOOTSTRAP_BYTES_MAX:
                raise Failure("the bootstrap would pass 2 GiB, which RAFS v5 allows; use v6", Cause.FORMAT)
            struct.pack_into("<I", out, SUPER_BYTES + 4 * (slot - 1), len(out) >> 3)
            slot += 1
            area = xattr_areas.get(inode.xattrs)
            if area is None:
                area = xattr_areas[inode.xattrs] = encode_xattrs_v5(inode.xattrs)
            self._write_record(out, name, parent, inode, area)
        return len(xattr_areas) > 1

    def _list_records(self) -> Iterator[tuple[bytes, int, Inode]]:
        yield b"/", 0, self.root
        for directory in walk_directories(self.root):
            for name, child in directory.children.items():
                yield name, directory.ino, child

    def _write_record(self, out: bytearray, name: bytes, parent: int, inode: Inode, xattrs: bytes) -> None:
        target, size, rdev, flags = b"", 0, 0, FLAG_XATTR if xattrs else 0
        child_index = child_count = 0
        if isinstance(inode, Directory):
            size = measure_directory_v5(inode)
            child_index, child_count = self._child_index[inode.ino], len(inode.children)
        elif isinstance(inode, RegularFile):
            size, child_count = inode.size, len(inode.chunks)
            if inode.nlink > 1:
                flags |= FLAG_HARDLINK
        elif isinstance(inode, Symlink):
            target, size = inode.target, len(inode.target)
            flags |= FLAG_SYMLINK
        elif isinstance(inode, Special) and (stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode)):
            rdev = (inode.minor & 0xFF | inode.major << 8 | (inode.minor & ~0xFF) << 12) & 0xFFFFFFFF
        seconds, nanoseconds = divmod(inode.mtime_ns, 1_000_000_000)
        out += INODE.pack(
            self._digests[inode.ino], parent, inode.ino, inode.uid, inode.gid, 0, inode.mode, size,
            (size + len(xattrs) + 511) // 512, flags, inode.nlink, child_index, child_count, len(name), len(target),
            rdev, nanoseconds, seconds & 0xFFFFFFFFFFFFFFFF,
        )  # fmt: skip
        for text in (name, target):
            out += text
            out += bytes(-len(text) % 8)
        out += xattrs
        if isinstance(inode, RegularFile):
            self._write_chunks(out, inode)

    def _write_chunks(self, out: bytearray, inode: RegularFile) -> None:
        own_index = self._blob_index.get(id(inode.table))
        moved = self._moved.get(id(inode.table), {})
        file_offset = 0
        for chunk in inode.chunks:
            place = moved.get(chunk)
            if place is None:
                if own_index is None:
                    raise ValueError("a file's chunk is in no blob of the image")
                place = own_index, chunk
            self._used.add(place)
            blob_index, index = place
            out += encode_chunk_record(self.blobs[blob_index].table, index, blob_index, file_offset)
            file_offset += self.chunk_size
