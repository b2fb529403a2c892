"""Writes a RAFS v6 bootstrap, which is an EROFS image that the kernel can mount beside its uncompressed blobs.

Three walks over the tree, all in the same order (a directory, its children that are not directories, then its
sub-directories): number the names and count links; give every inode its place; write. A place is known before any
dirent is written, so nothing is patched afterwards.
"""

import stat
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import BlobInfo, Form
from virtiofsd_nydus.rafs.chunktable import ChunkTable
from virtiofsd_nydus.rafs.layout import BLOCK_BYTES, CHUNK_INDEX_BYTES, INODE_BYTES, NID_BYTES, align_up
from virtiofsd_nydus.rafs.nodes import DIRECTORY, REGULAR, ROOT, SYMLINK
from virtiofsd_nydus.rafs.spill import Arena, relieve
from virtiofsd_nydus.rafs.tree import Tree, Xattrs

# st_mode >> 12 -> dirent file type
FILE_TYPES = {
    stat.S_IFREG >> 12: 1, stat.S_IFDIR >> 12: 2, stat.S_IFCHR >> 12: 3, stat.S_IFBLK >> 12: 4,
    stat.S_IFIFO >> 12: 5, stat.S_IFSOCK >> 12: 6, stat.S_IFLNK >> 12: 7,
}  # fmt: skip

XATTR_BODIES_MAX = 4096  # encoded ones kept
TOO_MANY_INODES = "the inodes take more than 128 GiB"
INODE_PACK_INTO, CHUNK_INDEX_PACK_INTO = layout.INODE.pack_into, layout.CHUNK_INDEX.pack_into

# A chunk somewhere else: blob index, index in that blob
ChunkPlace = tuple[int, int]


@dataclass(slots=True)
class BootstrapStats:
    """Counts of a bootstrap that was written."""

    names: int = 0  # the root and every alias of a hard link included
    inodes: int = 0
    chunks: int = 0  # that files refer to
    bootstrap_bytes: int = 0


def encode_xattrs(xattrs: Xattrs) -> bytes:
    """The inline xattr area of an inode, a multiple of 4 bytes long. Prefixes must be ones the format can hold."""
    out = bytearray(layout.XATTR_HEADER_BYTES)
    for name, value in xattrs:
        if not is_storable_xattr(name, value):
            raise Failure(f"RAFS v6 cannot hold the extended attribute {name!r} of {len(value)} bytes", Cause.FORMAT)
        prefix, index = next(known for known in layout.XATTR_PREFIXES if name.startswith(known[0]))
        suffix = name[len(prefix) :]
        out += layout.XATTR_ENTRY.pack(len(suffix), index, len(value)) + suffix + value
        out += bytes(-len(out) % 4)
    if len(out) > layout.XATTR_BODY_MAX:
        raise Failure(f"the extended attributes of one inode take {len(out)} bytes, too many", Cause.FORMAT)
    return bytes(out)


def is_storable_xattr(name: bytes, value: bytes) -> bool:
    """Whether the format can hold an extended attribute of this name and size."""
    if len(name) > layout.XATTR_NAME_MAX or len(value) > layout.XATTR_VALUE_MAX:
        return False
    return any(
        name == prefix if index in (2, 3) else name.startswith(prefix) and len(name) > len(prefix)
        for prefix, index in layout.XATTR_PREFIXES
    )


def encode_chunk_record(table: ChunkTable, index: int, blob_index: int, file_offset: int) -> bytes:
    """The 80 bytes that tell a chunk, in the chunk table of v6 and behind each file of v5. A batched chunk is told
    without its place, which only blob.meta has."""
    digest, uoff, coff, csize, usize, crc, flags = table.record(index)
    batched = not csize and not flags & layout.ChunkFlag.COMPRESSED
    return layout.CHUNK_RECORD.pack(
        digest, blob_index, flags, csize, usize, 0 if batched else coff, uoff, file_offset, index, crc
    )


class MetaArea:
    """Allocates places in the inode area. Offsets count from the area's start, whose first block stays unused (so that
    no nid is 0, which readdir would hide). Ends of blocks that stayed free are given to small things later."""

    def __init__(self) -> None:
        self.end = BLOCK_BYTES
        self._gaps: list[list[int]] = [[] for _ in range(BLOCK_BYTES // NID_BYTES)]  # by length in nids
        self._gap_mask = 0

    def _add_gap(self, offset: int, size: int) -> None:
        slots = size // NID_BYTES
        if slots:
            self._gaps[slots].append(offset)
            self._gap_mask |= 1 << slots

    def _take_gap(self, size: int) -> int | None:
        need = align_up(size, NID_BYTES) // NID_BYTES
        fitting = self._gap_mask >> need
        if not fitting:
            return None
        slots = need + (fitting & -fitting).bit_length() - 1
        offset = self._gaps[slots].pop()
        if not self._gaps[slots]:
            self._gap_mask &= ~(1 << slots)
        if slots > need:
            self._add_gap(offset + need * NID_BYTES, (slots - need) * NID_BYTES)
        return offset

    def place(self, size: int, *, one_block: bool) -> int:
        """size bytes at a multiple of 32; with one_block they do not cross the boundary of a block."""
        if self._gap_mask and size < BLOCK_BYTES:
            gap = self._take_gap(size)
            if gap is not None:
                return gap
        offset = self.end
        if one_block and offset % BLOCK_BYTES + size > BLOCK_BYTES:
            start = align_up(offset, BLOCK_BYTES)
            self._add_gap(offset, start - offset)
            offset = start
        self.end = offset + align_up(size, NID_BYTES)
        return offset

    def place_blocks(self, blocks: int) -> int:
        """Whole blocks; returns their offset."""
        start = align_up(self.end, BLOCK_BYTES)
        self._add_gap(self.end, start - self.end)
        self.end = start + blocks * BLOCK_BYTES
        return start


def list_dirents(tree: Tree, directory: int) -> Iterator[tuple[bytes, int]]:
    """The names of a sorted directory as they are stored: "." and ".." among the others."""
    dots = [(b"..", tree.parent(directory) or directory), (b".", directory)]
    for name, node in tree.names(directory):
        while dots and dots[-1][0] < name:
            yield dots.pop()
        yield name, node
    while dots:
        yield dots.pop()


def split_dirents(dirents: Iterable[tuple[bytes, int]]) -> Iterator[tuple[list[tuple[bytes, int]], int]]:
    """Splits a directory's entries into blocks: the entries of each block, and the bytes they take."""
    block: list[tuple[bytes, int]] = []
    used = 0
    for dirent in dirents:
        need = layout.DIRENT_BYTES + len(dirent[0])
        if used + need > BLOCK_BYTES:
            yield block, used
            block, used = [], 0
        block.append(dirent)
        used += need
    yield block, used


class BootstrapWriter:
    """One use: BootstrapWriter(...).write(). The tree's directories are sorted and its numbers are set."""

    def __init__(
        self,
        tree: Tree,
        blobs: Sequence[BlobInfo],
        form: Form,
        *,
        moved: Mapping[int, Mapping[int, ChunkPlace]] | None = None,
        prefetch: Iterable[bytes] = (),
    ) -> None:
        """blobs: in the order of the blob table; every chunk table a file names is in one of them, or all its used
        chunks are in `moved`. moved: id(chunk table) -> chunk index -> the place that is used instead. prefetch:
        absolute paths; those that do not exist are left out."""
        if len(blobs) > layout.BLOBS_MAX:
            raise Failure(
                f"the image needs {len(blobs)} blobs, RAFS v6 holds {layout.BLOBS_MAX}; squash layers", Cause.FORMAT
            )
        self.tree = tree
        self.blobs = blobs
        self.chunk_size = form.chunk_size
        self.codec = form.codec
        self.digester = form.digester
        self.stats = BootstrapStats()
        self._moved = moved or {}
        self._blob_index = {id(blob.table): index for index, blob in enumerate(blobs)}
        self._prefetch = list(prefetch) if blobs else []
        self._chunk_bits = form.chunk_size.bit_length() - 1 - layout.BLOCK_BITS
        self._area = MetaArea()
        self._blocks: dict[int, int] = {}  # nid -> offset of its whole blocks in the area
        self._xattr_bodies: dict[int, bytes] = {0: b""}  # by their place in the tree; the latest of them
        self._has_xattrs = False
        # Of each blob's chunks: 0 not used, else 1 + the number of the chunk in the file that used it first
        self._used = [Arena(form.directory, 4 * len(blob.table)) for blob in blobs]
        self._out = Arena(form.directory)

    def write(self) -> Arena:
        """Writes the whole bootstrap and returns a view of it in the arena."""
        self._number()
        self._place_all()
        devices_end = layout.DEVICE_TABLE_OFFSET + layout.DEVICE_SLOT_BYTES * len(self.blobs)
        blob_table_offset = align_up(devices_end, BLOCK_BYTES)
        blob_table_bytes = layout.BLOB_ENTRY_BYTES * len(self.blobs)
        nids = self._find_prefetch()
        prefetch_offset = blob_table_offset + blob_table_bytes
        meta_start = align_up(prefetch_offset + 4 * len(nids), BLOCK_BYTES) if self.blobs else 0
        chunk_table_offset = align_up(meta_start + self._area.end, BLOCK_BYTES)

        arena = self._out
        arena.reserve(chunk_table_offset)
        self._write_inodes(arena.data, meta_start)
        arena.used = chunk_table_offset
        for records in self._list_chunks():
            arena.append(records)
        chunk_table_bytes = arena.used - chunk_table_offset
        arena.append(bytes(-arena.used % BLOCK_BYTES))
        out = arena.view()

        flags = layout.CODEC_FLAG[self.codec] | layout.DIGESTER_FLAG[self.digester] | layout.SuperFlag.EXPLICIT_UID_GID
        if any(blob.cipher is not None for blob in self.blobs):
            flags |= layout.SuperFlag.ENCRYPTION_AES_128_XTS
        else:
            flags |= layout.SuperFlag.ENCRYPTION_NONE
        if self._has_xattrs:
            flags |= layout.SuperFlag.HAS_XATTR
        if all(blob.features & layout.BlobFeature.INLINED_CHUNK_DIGEST for blob in self.blobs):
            flags |= layout.SuperFlag.INLINED_CHUNK_DIGEST
        layout.EXT_SUPER.pack_into(
            out, layout.EXT_SUPER_OFFSET, flags, blob_table_offset, blob_table_bytes, self.chunk_size,
            chunk_table_offset, chunk_table_bytes, prefetch_offset if nids else 0, 4 * len(nids),
        )  # fmt: skip
        self._write_blobs(out, blob_table_offset)
        if nids:
            struct.pack_into(f"<{len(nids)}I", out, prefetch_offset, *nids)
        layout.SUPER.pack_into(
            out, layout.SUPER_OFFSET, layout.SUPER_MAGIC, 0, layout.FEATURE_COMPAT_RAFS, layout.BLOCK_BITS, 0,
            self.tree.nid(ROOT), self.stats.names, 0, 0,
            sum(blob.uncompressed_size for blob in self.blobs) >> layout.BLOCK_BITS & 0xFFFFFFFF,
            meta_start >> layout.BLOCK_BITS, 0, b"", b"", layout.FEATURE_INCOMPAT, 0, len(self.blobs),
            layout.DEVICE_TABLE_OFFSET // layout.DEVICE_SLOT_BYTES,
        )  # fmt: skip
        self.stats.bootstrap_bytes = len(out)
        return arena

    # ---- first walk
    def _number(self) -> None:
        tree = self.tree
        tree.begin_numbers()
        count_link = tree.count_link
        number = names = 1
        for directory in tree.walk_directories():
            tree.sort(directory)
            names += tree.child_count(directory)
            for child in tree.children(directory):
                number += count_link(directory, child, number + 1)
        self.stats.names = names
        self.stats.inodes = number

    # ---- second walk
    def _place_all(self) -> None:
        tree, place = self.tree, self._area.place
        placing, set_nid = tree.placing, tree.set_nid
        for directory in tree.walk_directories():
            tree.set_size(directory, self._measure_directory(directory))
            self._place_flat(directory, tree.size(directory))
            for child in tree.children(directory):
                kind, xattrs, chunks, placed = placing(child)
                if placed or kind == DIRECTORY:
                    continue
                if kind == SYMLINK:
                    self._place_flat(child, tree.size(child))
                    continue
                size = INODE_BYTES
                if xattrs:
                    size += len(self._xattr_body(xattrs))
                if kind == REGULAR and chunks:
                    size = (size + 7 & ~7) + CHUNK_INDEX_BYTES * chunks
                nid = place(size, one_block=False) // NID_BYTES
                if nid > 0xFFFFFFFF:
                    raise Failure(TOO_MANY_INODES, Cause.FORMAT)
                set_nid(child, nid)

    def _set_nid(self, node: int, offset: int) -> None:
        nid = offset // NID_BYTES
        if nid > 0xFFFFFFFF:
            raise Failure(TOO_MANY_INODES, Cause.FORMAT)
        self.tree.set_nid(node, nid)

    def _xattr_body(self, place: int) -> bytes:
        body = self._xattr_bodies.get(place)
        if body is None:
            if len(self._xattr_bodies) > XATTR_BODIES_MAX:
                self._xattr_bodies = {0: b""}
            self._has_xattrs = True
            body = self._xattr_bodies[place] = encode_xattrs(self.tree.xattrs_at(place))
        return body

    def _measure_directory(self, directory: int) -> int:
        total = self.tree.measure_names(directory) + layout.DIRENT_BYTES * (self.tree.child_count(directory) + 2) + 3
        if total <= BLOCK_BYTES:
            return total
        blocks = last = 0
        for _, used in split_dirents(list_dirents(self.tree, directory)):
            blocks, last = blocks + 1, used
        return (blocks - 1) * BLOCK_BYTES + last

    def _place_flat(self, node: int, size: int) -> None:
        """A directory or symbolic link: whole blocks apart, the tail behind the inode where one block holds both."""
        head = INODE_BYTES + len(self._xattr_body(self.tree.xattrs_place(node)))
        tail = size % BLOCK_BYTES
        inline = tail and head + tail <= BLOCK_BYTES
        blocks = size // BLOCK_BYTES if inline else align_up(size, BLOCK_BYTES) // BLOCK_BYTES
        self._set_nid(node, self._area.place(head + tail if inline else head, one_block=bool(inline)))
        if blocks:
            self._blocks[node] = self._area.place_blocks(blocks)

    def _find_prefetch(self) -> list[int]:
        found = (self.tree.find_path(path) for path in self._prefetch)
        return [self.tree.nid(node) for node in found if node]

    # ---- third walk
    def _write_inodes(self, out: memoryview, meta_start: int) -> None:
        tree = self.tree
        for directory in tree.walk_directories():
            for child in tree.children(directory):
                kind = tree.kind(child)
                if kind == REGULAR:  # once for each name: the same bytes at the same place
                    self._write_file(out, meta_start, child)
                elif kind == SYMLINK:
                    target = tree.target(child)
                    self._write_flat(out, meta_start, child, len(target), [target])
                elif kind != DIRECTORY:
                    self._write_inode(out, meta_start, child, layout.LAYOUT_PLAIN, 0, tree.rdev(child))
            self._write_flat(out, meta_start, directory, tree.size(directory), self._pack_dirents(directory))

    def _write_inode(self, out: memoryview, meta_start: int, node: int, data: int, size: int, i_u: int) -> int:
        """Returns the offset behind inode and xattrs."""
        mode, uid, gid, place, seconds, nanoseconds, ino, nid, nlink = self.tree.record(node)
        offset = meta_start + nid * NID_BYTES
        body = self._xattr_body(place) if place else b""
        INODE_PACK_INTO(
            out, offset, layout.FORMAT_EXTENDED | data, (len(body) - layout.XATTR_HEADER_BYTES) // 4 + 1 if body else 0,
            mode, 0, size, i_u, ino, uid, gid, seconds, nanoseconds, nlink,
        )  # fmt: skip
        offset += INODE_BYTES
        if body:
            out[offset : offset + len(body)] = body
            offset += len(body)
        return offset

    def _write_flat(
        self, out: memoryview, meta_start: int, node: int, size: int, content: Iterable[bytes | bytearray]
    ) -> None:
        """content: of all blocks in turn, the last of which alone may be short."""
        head = INODE_BYTES + len(self._xattr_body(self.tree.xattrs_place(node)))
        tail = size % BLOCK_BYTES
        inline = bool(tail and head + tail <= BLOCK_BYTES)
        blocks = meta_start + self._blocks[node] if node in self._blocks else 0
        offset = self._write_inode(
            out, meta_start, node, layout.LAYOUT_INLINE if inline else layout.LAYOUT_PLAIN, size,
            blocks >> layout.BLOCK_BITS,
        )  # fmt: skip
        left = size - tail if inline else size
        for block in content:
            if left:
                out[blocks : blocks + len(block)] = block
                blocks += len(block)
                left -= len(block)
            else:
                out[offset : offset + len(block)] = block

    def _pack_dirents(self, directory: int) -> Iterator[bytearray]:
        tree, dirent = self.tree, self.tree.dirent
        pack = layout.DIRENT.pack
        full: bytearray | None = None
        for block, used in split_dirents(list_dirents(tree, directory)):
            if full is not None:
                yield full
            out = bytearray()
            name_offset = layout.DIRENT_BYTES * len(block)
            for name, node in block:
                nid, kind = dirent(node)
                out += pack(nid, name_offset, FILE_TYPES[kind], 0)
                name_offset += len(name)
            for name, _ in block:
                out += name
            full = out
            full += bytes(BLOCK_BYTES - used)
        if full is not None:
            yield full[:used]

    def _write_file(self, out: memoryview, meta_start: int, node: int) -> None:
        tree = self.tree
        size, count = tree.size(node), tree.chunk_count(node)
        bits = self._chunk_bits
        if count > 1:
            whole = (size - 1).bit_length() - layout.BLOCK_BITS
            if whole <= layout.CHUNK_FORMAT_BITS and self._is_contiguous(node):
                bits = whole  # one chunk to the kernel, which reads the first index alone; RAFS readers do not look
        i_u = bits | layout.CHUNK_FORMAT_INDEXES
        offset = self._write_inode(out, meta_start, node, layout.LAYOUT_CHUNKED, size, i_u) + 7 & ~7
        for number, (blob_index, index) in enumerate(self._list_places(node) if count else (), 1):
            used = self._used[blob_index].words
            if not used[index]:
                used[index] = number
            CHUNK_INDEX_PACK_INTO(
                out, offset, index & 0xFFFF, blob_index + 1 | index >> 16 << 8,
                self.blobs[blob_index].table.uoff(index) >> layout.BLOCK_BITS,
            )  # fmt: skip
            offset += CHUNK_INDEX_BYTES

    def _list_places(self, node: int) -> Iterable[ChunkPlace]:
        """Where each chunk of a file is."""
        table = id(self.tree.table(node))
        own_index = self._blob_index.get(table, -1)
        moved = self._moved.get(table)
        chunks = self.tree.chunks(node)
        if moved is None and own_index >= 0:
            return [(own_index, chunk) for chunk in chunks] if len(chunks) < 1024 else zip(repeat(own_index), chunks)
        return self._find_places(own_index, moved or {}, chunks)

    @staticmethod
    def _find_places(own_index: int, moved: Mapping[int, ChunkPlace], chunks: Iterable[int]) -> Iterator[ChunkPlace]:
        for chunk in chunks:
            place = moved.get(chunk)
            if place is not None:
                yield place
            elif own_index >= 0:
                yield own_index, chunk
            else:
                raise ValueError("a file's chunk is in no blob of the image")

    def _is_contiguous(self, node: int) -> bool:
        """Whether all chunks are on one blob, one behind the other."""
        places = iter(self._list_places(node))
        blob_index, index = next(places)
        table = self.blobs[blob_index].table
        expected = table.uoff(index)
        for other, index in places:
            expected += self.chunk_size
            if other != blob_index or table.uoff(index) != expected:
                return False
        return True

    # ---- tables
    def _list_chunks(self) -> Iterator[bytes]:
        """Records of the chunks that files use, by digest, then blob. A record starts with the digest and the blob
        index, which fits its lowest byte: the order of the bytes is the order of the table. Sorted in portions, by the
        digest's first byte, so that only one portion's records are there at a time."""
        portions = [array("Q") for _ in range(256)]
        for blob_index, (blob, used) in enumerate(zip(self.blobs, self._used, strict=True)):
            for index, is_used in enumerate(used.words[: len(blob.table)]):
                if is_used:
                    portions[blob.table.digest(index)[0]].append(blob_index << 32 | index)
        for portion in portions:
            self.stats.chunks += len(portion)
            records = []
            for place in portion:
                blob_index, index = place >> 32, place & 0xFFFFFFFF
                file_offset = (self._used[blob_index].words[index] - 1) * self.chunk_size
                records.append(encode_chunk_record(self.blobs[blob_index].table, index, blob_index, file_offset))
            records.sort()
            yield b"".join(records)
            relieve()

    def _write_blobs(self, out: memoryview, blob_table_offset: int) -> None:
        position = len(out)
        for index, blob in enumerate(self.blobs):
            blocks = blob.uncompressed_size >> layout.BLOCK_BITS
            mapped = align_up(position, layout.MAPPED_ALIGN_BYTES) >> layout.BLOCK_BITS
            position = mapped + blocks << layout.BLOCK_BITS
            if mapped + blocks > 0xFFFFFFFF:
                raise Failure("the image is larger than EROFS can address (16 TiB)", Cause.FORMAT)
            tag = blob.blob_id.encode()
            layout.DEVICE_SLOT.pack_into(
                out, layout.DEVICE_TABLE_OFFSET + layout.DEVICE_SLOT_BYTES * index, tag, blocks, mapped
            )
            layout.BLOB_ENTRY.pack_into(
                out, blob_table_offset + layout.BLOB_ENTRY_BYTES * index, tag, index, blob.chunk_size, len(blob.table),
                blob.codec, blob.digester, blob.features, blob.compressed_size, blob.uncompressed_size, blob.toc_size,
                blob.ci_codec, blob.ci_offset, blob.ci_csize, blob.ci_usize, blob.toc_digest, *_describe_meta(blob),
            )  # fmt: skip


def _describe_meta(blob: BlobInfo) -> tuple[bytes, int, bytes, int]:
    """meta_digest, meta_size, cipher_iv and cipher: the first two hold the key where the blob is encrypted."""
    if blob.cipher is None:
        return blob.meta_digest, blob.meta_size, b"", 0
    iv = blob.cipher.iv
    return blob.cipher.key, int.from_bytes(iv[:8], "little"), iv[8:], layout.CIPHER_AES_128_XTS
