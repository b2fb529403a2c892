"""Writes a RAFS v5 bootstrap: tables of fixed places, then one record for each name (docs/rafs-format.md 2)."""

import stat
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import BlobInfo, Form
from virtiofsd_nydus.rafs.bootstrap import XATTR_BODIES_MAX, BootstrapStats, ChunkPlace, encode_chunk_record
from virtiofsd_nydus.rafs.digest import digest_function
from virtiofsd_nydus.rafs.layout import align_up
from virtiofsd_nydus.rafs.nodes import ROOT
from virtiofsd_nydus.rafs.spill import RELIEVE_EVERY, Arena, relieve
from virtiofsd_nydus.rafs.tree import Tree, Xattrs

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
DIGEST_BYTES = 32


def encode_xattrs_v5(xattrs: Xattrs) -> bytes:
    """The xattr area of a record, a multiple of 8 bytes long; empty without xattrs."""
    if not xattrs:
        return b""
    body = b"".join(struct.pack("<I", len(name) + 1 + len(value)) + name + b"\0" + value for name, value in xattrs)
    return struct.pack("<Q", len(body)) + body + bytes(-len(body) % 8)


def measure_directory_v5(tree: Tree, directory: int) -> int:
    """The size that a directory shows. v5 has no blocks of names, so the size is computed from the names."""
    return max(align_up(tree.measure_names(directory) + 8 * tree.child_count(directory), 4096), 4096)


class BootstrapWriterV5:
    """One use: BootstrapWriterV5(...).write(). The tree's directories are sorted and its numbers are set: ino is the
    inode's number, its first slot; a directory's nid is the slot of its first child."""

    def __init__(
        self,
        tree: Tree,
        blobs: Sequence[BlobInfo],
        form: Form,
        *,
        moved: Mapping[int, Mapping[int, ChunkPlace]] | None = None,
        prefetch: Iterable[bytes] = (),
    ) -> None:
        """Parameters are those of BootstrapWriter."""
        self.tree = tree
        self.blobs = blobs
        self.chunk_size = form.chunk_size
        self.codec = form.codec
        self.digester = form.digester
        self.stats = BootstrapStats()
        self._moved = moved or {}
        self._blob_index = {id(blob.table): index for index, blob in enumerate(blobs)}
        self._prefetch = list(prefetch)
        self._digest = digest_function(form.digester)
        self._digests = Arena(form.directory)  # by ino
        self._used = [bytearray(len(blob.table)) for blob in blobs]
        self._out = Arena(form.directory)

    def write(self) -> Arena:
        """Writes the whole bootstrap and returns a view of it in the arena."""
        self._number()
        self._digest_all()
        entries = self.stats.names
        found = [self.tree.find_path(path) for path in self._prefetch]
        prefetch = [self.tree.ino(node) for node in found if node]
        blob_table = b"\0".join(
            struct.pack("<II", 0, min(blob.prefetch_size, 0xFFFFFFFF)) + blob.blob_id.encode() for blob in self.blobs
        )
        blob_table += bytes(-len(blob_table) % 8)
        prefetch_offset = SUPER_BYTES + align_up(4 * entries, 8)
        blob_table_offset = prefetch_offset + align_up(4 * len(prefetch), 8)
        ext_offset = blob_table_offset + len(blob_table)

        arena = self._out
        arena.reserve(ext_offset)
        struct.pack_into(f"<{len(prefetch)}I", arena.data, prefetch_offset, *prefetch)
        arena.data[blob_table_offset:ext_offset] = blob_table
        arena.used = ext_offset
        for blob in self.blobs:
            arena.append(EXT_BLOB.pack(len(blob.table), blob.features, blob.uncompressed_size, blob.compressed_size))
        has_xattrs = self._write_records(arena)
        out = arena.view()
        flags = layout.CODEC_FLAG[self.codec] | layout.DIGESTER_FLAG[self.digester] | layout.SuperFlag.EXPLICIT_UID_GID
        if has_xattrs:
            flags |= layout.SuperFlag.HAS_XATTR
        SUPER.pack_into(
            out, 0, SUPER_MAGIC, VERSION, SUPER_BYTES, self.chunk_size, flags, self.stats.inodes, SUPER_BYTES,
            prefetch_offset, blob_table_offset, entries, len(prefetch), len(blob_table), len(self.blobs), ext_offset,
        )  # fmt: skip
        self.stats.bootstrap_bytes = len(out)
        self.stats.chunks = sum(used.count(1) for used in self._used)
        return arena

    def _number(self) -> None:
        """Gives slots: to a directory's children one after the other, then to those of its sub-directories in turn."""
        tree = self.tree
        tree.clear_numbers()
        for directory in tree.walk_directories():
            tree.sort(directory)
            copied: list[tuple[bytes, int]] = []
            for name, child in tree.names(directory):
                kind = stat.S_IFMT(tree.mode(child))
                if tree.nid(child) and kind not in (stat.S_IFREG, stat.S_IFDIR):
                    copied.append((name, child))  # v5 has hard links of regular files only
                tree.set_nid(child, 1)
            for name, child in copied:
                tree.link(directory, name, tree.copy_node(tree, child))
        tree.begin_numbers()
        slot = inodes = 1
        for directory in tree.walk_directories():
            tree.set_nid(directory, slot + 1)
            for child in tree.children(directory):
                slot += 1
                inodes += tree.count_link(directory, child, slot)
        self.stats.names, self.stats.inodes = slot, inodes
        self._digests.reserve(DIGEST_BYTES * (slot + 1))

    def _digest_all(self) -> None:
        """Computes all digests, leaves first: a directory's digest is made of its children's."""
        tree, digest, digests = self.tree, self._digest, self._digests.data
        ino = tree.ino
        empty = digest(b"")
        order = array("I", tree.walk_directories())
        while order:
            directory = order.pop()
            joined = bytearray()
            for child in tree.children(directory):
                start = DIGEST_BYTES * ino(child)
                kind = stat.S_IFMT(tree.mode(child))
                if kind != stat.S_IFDIR:
                    if kind == stat.S_IFREG:
                        found = digest(self._join_digests(child)) if tree.chunk_count(child) else empty
                    else:
                        found = digest(tree.target(child)) if kind == stat.S_IFLNK else empty
                    digests[start : start + DIGEST_BYTES] = found
                joined += digests[start : start + DIGEST_BYTES]
            start = DIGEST_BYTES * ino(directory)
            digests[start : start + DIGEST_BYTES] = digest(bytes(joined))
            if not len(order) % RELIEVE_EVERY:
                relieve()

    def _join_digests(self, file: int) -> bytes:
        table = self.tree.table(file)
        located = (table.locate(chunk) for chunk in self.tree.chunks(file))
        return b"".join(table.digest(index) for table, index in located)

    def _write_records(self, out: Arena) -> bool:
        """Writes the records in the order of slots, and the table of their places. Returns whether any inode has
        xattrs."""
        xattr_areas: dict[int, bytes] = {0: b""}  # by their place in the tree, the latest of them
        has_xattrs = False
        slot = 1
        for name, parent, node in self._list_records():
            if out.used > BOOTSTRAP_BYTES_MAX:
                raise Failure("the bootstrap would pass 2 GiB, which RAFS v5 allows; use v6", Cause.FORMAT)
            struct.pack_into("<I", out.data, SUPER_BYTES + 4 * (slot - 1), out.used >> 3)
            slot += 1
            place = self.tree.xattrs_place(node)
            area = xattr_areas.get(place)
            if area is None:
                if len(xattr_areas) > XATTR_BODIES_MAX:
                    xattr_areas = {0: b""}
                has_xattrs = True
                area = xattr_areas[place] = encode_xattrs_v5(self.tree.xattrs_at(place))
            self._write_record(out, name, parent, node, area)
        return has_xattrs

    def _list_records(self) -> Iterator[tuple[bytes, int, int]]:
        tree = self.tree
        yield b"/", 0, ROOT
        for directory in tree.walk_directories():
            ino = tree.ino(directory)
            for name, child in tree.names(directory):
                yield name, ino, child

    def _write_record(self, out: Arena, name: bytes, parent: int, node: int, xattrs: bytes) -> None:
        tree = self.tree
        mode, uid, gid, _, seconds, nanoseconds, ino, nid, nlink = tree.record(node)
        kind = stat.S_IFMT(mode)
        target, size, rdev, flags = b"", 0, 0, FLAG_XATTR if xattrs else 0
        child_index = child_count = 0
        if kind == stat.S_IFDIR:
            size = measure_directory_v5(tree, node)
            child_index, child_count = nid, tree.child_count(node)
        elif kind == stat.S_IFREG:
            size, child_count = tree.size(node), tree.chunk_count(node)
            if nlink > 1:
                flags |= FLAG_HARDLINK
        elif kind == stat.S_IFLNK:
            target = tree.target(node)
            size = len(target)
            flags |= FLAG_SYMLINK
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            rdev = tree.rdev(node)
        digest = bytes(self._digests.data[DIGEST_BYTES * ino : DIGEST_BYTES * ino + DIGEST_BYTES])
        record = INODE.pack(
            digest, parent, ino, uid, gid, 0, mode, size, (size + len(xattrs) + 511) // 512, flags, nlink, child_index,
            child_count, len(name), len(target), rdev, nanoseconds, seconds,
        )  # fmt: skip
        out.append(b"".join((record, name, bytes(-len(name) % 8), target, bytes(-len(target) % 8), xattrs)))
        if child_count and kind == stat.S_IFREG:
            self._write_chunks(out, node)

    def _write_chunks(self, out: Arena, node: int) -> None:
        table = id(self.tree.table(node))
        own_index = self._blob_index.get(table)
        moved = self._moved.get(table, {})
        file_offset = 0
        for chunk in self.tree.chunks(node):
            place = moved.get(chunk)
            if place is None:
                if own_index is None:
                    raise ValueError("a file's chunk is in no blob of the image")
                place = own_index, chunk
            blob_index, index = place
            self._used[blob_index][index] = 1
            out.append(encode_chunk_record(self.blobs[blob_index].table, index, blob_index, file_offset))
            file_offset += self.chunk_size
