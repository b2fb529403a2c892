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

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import BlobInfo
from virtiofsd_nydus.rafs.layout import BLOCK_BYTES, CHUNK_INDEX_BYTES, INODE_BYTES, NID_BYTES, align_up
from virtiofsd_nydus.rafs.tree import (
    ChunkTable,
    Directory,
    Inode,
    RegularFile,
    Special,
    Symlink,
    Xattrs,
    find_inode,
    walk_directories,
)

# st_mode >> 12 -> dirent file type
FILE_TYPES = {
    stat.S_IFREG >> 12: 1, stat.S_IFDIR >> 12: 2, stat.S_IFCHR >> 12: 3, stat.S_IFBLK >> 12: 4,
    stat.S_IFIFO >> 12: 5, stat.S_IFSOCK >> 12: 6, stat.S_IFLNK >> 12: 7,
}  # fmt: skip

# A chunk somewhere else: blob index, index in that blob
ChunkPlace = tuple[int, int]


@dataclass(slots=True)
class BootstrapStats:
    """What a bootstrap came to."""

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
    return any(name == prefix if index in (2, 3) else name.startswith(prefix) and len(name) > len(prefix)
               for prefix, index in layout.XATTR_PREFIXES)  # fmt: skip


def encode_chunk_record(table: ChunkTable, index: int, blob_index: int, file_offset: int) -> bytes:
    """The 80 bytes that tell a chunk, in the chunk table of v6 and behind each file of v5. A batched chunk is told
    without its place, which only blob.meta has."""
    csize, flags = table.csizes[index], table.flags[index]
    batched = not csize and not flags & layout.ChunkFlag.COMPRESSED
    return layout.CHUNK_RECORD.pack(
        table.digest(index), blob_index, flags, csize, table.usizes[index],
        0 if batched else table.coffs[index], table.uoffs[index], file_offset, index, table.crcs[index],
    )  # fmt: skip


class MetaArea:
    """Hands out places in the inode area. Offsets count from the area's start, whose first block stays unused (so that
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


def split_dirents(names: Sequence[bytes]) -> list[int]:
    """How many of the sorted names go into each block of a directory."""
    total = layout.DIRENT_BYTES * len(names) + sum(map(len, names))
    if total <= BLOCK_BYTES:
        return [len(names)]
    counts, count, used = [], 0, 0
    for name in names:
        need = layout.DIRENT_BYTES + len(name)
        if used + need > BLOCK_BYTES:
            counts.append(count)
            count = used = 0
        count += 1
        used += need
    counts.append(count)
    return counts


def list_names(directory: Directory) -> list[bytes]:
    """The names of a directory as they are stored: "." and ".." sorted among the others."""
    names = [*directory.children, b".", b".."]
    names.sort()
    return names


class BootstrapWriter:
    """One use: BootstrapWriter(...).write(). The tree's children are put in order and its numbers are set."""

    def __init__(
        self, root: Directory, blobs: Sequence[BlobInfo], *, chunk_size: int, codec: layout.Codec,
        digester: layout.Digester, moved: Mapping[int, Mapping[int, ChunkPlace]] | None = None,
        prefetch: Iterable[bytes] = (),
    ) -> None:  # fmt: skip
        """blobs: in the order of the blob table; every chunk table a file names is in one of them, or all its used
        chunks are in `moved`. moved: id(chunk table) -> chunk index -> the place that is used instead. prefetch:
        absolute paths; those that do not exist are left out."""
        if len(blobs) > layout.BLOBS_MAX:
            raise Failure(
                f"the image needs {len(blobs)} blobs, RAFS v6 holds {layout.BLOBS_MAX}; squash layers", Cause.FORMAT
            )
        self.root = root
        self.blobs = blobs
        self.chunk_size = chunk_size
        self.codec = codec
        self.digester = digester
        self.stats = BootstrapStats()
        self._moved = moved or {}
        self._blob_index = {id(blob.table): index for index, blob in enumerate(blobs)}
        self._prefetch = list(prefetch) if blobs else []
        self._area = MetaArea()
        self._blocks: dict[int, int] = {}  # nid -> offset of its whole blocks in the area
        self._xattr_bodies: dict[Xattrs, bytes] = {(): b""}
        self._used = [bytearray(len(blob.table)) for blob in blobs]
        self._file_offsets: dict[ChunkPlace, int] = {}  # of chunks first used at another offset than 0

    def write(self) -> bytearray:
        """The whole bootstrap."""
        self._number()
        self._place_all()
        devices_end = layout.DEVICE_TABLE_OFFSET + layout.DEVICE_SLOT_BYTES * len(self.blobs)
        blob_table_offset = align_up(devices_end, BLOCK_BYTES)
        blob_table_bytes = layout.BLOB_ENTRY_BYTES * len(self.blobs)
        nids = self._find_prefetch()
        prefetch_offset = blob_table_offset + blob_table_bytes
        meta_start = align_up(prefetch_offset + 4 * len(nids), BLOCK_BYTES) if self.blobs else 0
        chunk_table_offset = align_up(meta_start + self._area.end, BLOCK_BYTES)

        out = bytearray(chunk_table_offset)
        self._write_inodes(out, meta_start)
        for record in self._list_chunks():
            out += record
        chunk_table_bytes = len(out) - chunk_table_offset
        out += bytes(-len(out) % BLOCK_BYTES)

        flags = (
            layout.CODEC_FLAG[self.codec] | layout.DIGESTER_FLAG[self.digester] | layout.SuperFlag.EXPLICIT_UID_GID
        )
        if any(blob.cipher is not None for blob in self.blobs):
            flags |= layout.SuperFlag.ENCRYPTION_AES_128_XTS
        else:
            flags |= layout.SuperFlag.ENCRYPTION_NONE
        if len(self._xattr_bodies) > 1:
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
            self.root.nid, self.stats.names, 0, 0,
            sum(blob.uncompressed_size for blob in self.blobs) >> layout.BLOCK_BITS & 0xFFFFFFFF,
            meta_start >> layout.BLOCK_BITS, 0, b"", b"", layout.FEATURE_INCOMPAT, 0, len(self.blobs),
            layout.DEVICE_TABLE_OFFSET // layout.DEVICE_SLOT_BYTES,
        )  # fmt: skip
        self.stats.bootstrap_bytes = len(out)
        return out

    # ---- first walk
    def _number(self) -> None:
        for directory in walk_directories(self.root):
            order = list(directory.children)
            if order != sorted(order):
                directory.children = {name: directory.children[name] for name in sorted(order)}
            for child in directory.children.values():
                child.ino = child.nid = child.nlink = 0
        number = names = 1
        self.root.ino, self.root.nid, self.root.nlink = 1, 0, 2
        for directory in walk_directories(self.root):
            names += len(directory.children)
            for child in directory.children.values():
                if isinstance(child, Directory):
                    directory.nlink += 1
                    child.nlink = 2
                else:
                    child.nlink += 1
                    if child.ino:
                        continue
                number += 1
                child.ino = number
        self.stats.names = names
        self.stats.inodes = number

    # ---- second walk
    def _place_all(self) -> None:
        for directory in walk_directories(self.root):
            counts, last = self._measure_directory(directory)
            self._place_flat(directory, (counts - 1) * BLOCK_BYTES + last)
            for child in directory.children.values():
                if child.nid or isinstance(child, Directory):
                    continue
                if isinstance(child, Symlink):
                    self._place_flat(child, len(child.target))
                    continue
                size = INODE_BYTES + len(self._xattr_body(child))
                if isinstance(child, RegularFile) and child.size:
                    size = align_up(size, 8) + CHUNK_INDEX_BYTES * len(child.chunks)
                child.nid = self._area.place(size, one_block=False) // NID_BYTES

    def _xattr_body(self, inode: Inode) -> bytes:
        body = self._xattr_bodies.get(inode.xattrs)
        if body is None:
            body = self._xattr_bodies[inode.xattrs] = encode_xattrs(inode.xattrs)
        return body

    @staticmethod
    def _measure_directory(directory: Directory) -> tuple[int, int]:
        """Number of blocks, bytes used of the last."""
        children = directory.children
        total = layout.DIRENT_BYTES * (len(children) + 2) + sum(map(len, children)) + 3
        if total <= BLOCK_BYTES:
            return 1, total
        names = list_names(directory)
        counts = split_dirents(names)
        rest = names[len(names) - counts[-1] :]
        return len(counts), layout.DIRENT_BYTES * len(rest) + sum(map(len, rest))

    def _place_flat(self, inode: Inode, size: int) -> None:
        """A directory or symbolic link: whole blocks apart, the tail behind the inode where one block holds both."""
        head = INODE_BYTES + len(self._xattr_body(inode))
        tail = size % BLOCK_BYTES
        inline = tail and head + tail <= BLOCK_BYTES
        blocks = size // BLOCK_BYTES if inline else align_up(size, BLOCK_BYTES) // BLOCK_BYTES
        place = self._area.place(head + tail if inline else head, one_block=bool(inline))
        inode.nid = place // NID_BYTES
        if blocks:
            self._blocks[inode.nid] = self._area.place_blocks(blocks)

    def _find_prefetch(self) -> list[int]:
        found = (find_inode(self.root, path) for path in self._prefetch)
        return [inode.nid for inode in found if inode is not None]

    # ---- third walk
    def _write_inodes(self, out: bytearray, meta_start: int) -> None:
        parents = {self.root.nid: self.root.nid}
        for directory in walk_directories(self.root):
            nid = directory.nid
            for child in directory.children.values():
                if isinstance(child, Directory):
                    parents[child.nid] = nid
                    continue
                if isinstance(child, RegularFile):  # once for each name: the same bytes at the same place
                    self._write_file(out, meta_start, child)
                elif isinstance(child, Symlink):
                    self._write_flat(out, meta_start, child, child.target)
                elif isinstance(child, Special):
                    rdev = child.minor & 0xFF | child.major << 8 | (child.minor & ~0xFF) << 12
                    self._write_inode(out, meta_start, child, layout.LAYOUT_PLAIN, 0, rdev & 0xFFFFFFFF)
            self._write_flat(out, meta_start, directory, self._pack_dirents(directory, parents.pop(nid)))

    def _write_inode(self, out: bytearray, meta_start: int, inode: Inode, data: int, size: int, i_u: int) -> int:
        """Returns the offset behind inode and xattrs."""
        offset = meta_start + inode.nid * NID_BYTES
        seconds, nanoseconds = divmod(inode.mtime_ns, 1_000_000_000)
        body = self._xattr_bodies[inode.xattrs]
        layout.INODE.pack_into(
            out, offset, layout.FORMAT_EXTENDED | data, (len(body) - layout.XATTR_HEADER_BYTES) // 4 + 1 if body else 0,
            inode.mode, 0, size, i_u, inode.ino & 0xFFFFFFFF, inode.uid, inode.gid, seconds & 0xFFFFFFFFFFFFFFFF,
            nanoseconds, inode.nlink,
        )  # fmt: skip
        offset += INODE_BYTES
        if body:
            out[offset : offset + len(body)] = body
            offset += len(body)
        return offset

    def _write_flat(self, out: bytearray, meta_start: int, inode: Inode, content: bytes | bytearray) -> None:
        head = INODE_BYTES + len(self._xattr_bodies[inode.xattrs])
        tail = len(content) % BLOCK_BYTES
        inline = bool(tail and head + tail <= BLOCK_BYTES)
        blocks = meta_start + self._blocks[inode.nid] if inode.nid in self._blocks else 0
        offset = self._write_inode(
            out, meta_start, inode, layout.LAYOUT_INLINE if inline else layout.LAYOUT_PLAIN, len(content),
            blocks >> layout.BLOCK_BITS,
        )  # fmt: skip
        apart = len(content) - tail if inline else len(content)
        if apart:
            out[blocks : blocks + apart] = content[:apart]
        if inline:
            out[offset : offset + tail] = content[apart:] if apart else content

    def _pack_dirents(self, directory: Directory, parent_nid: int) -> bytearray:
        children = directory.children
        names = list_names(directory)
        out = bytearray()
        pack, start = layout.DIRENT.pack, 0
        for count in split_dirents(names):
            if start:
                out += bytes(-len(out) % BLOCK_BYTES)
            block = names[start : start + count]
            name_offset = layout.DIRENT_BYTES * count
            for name in block:
                child = children.get(name)
                if child is not None:
                    out += pack(child.nid, name_offset, FILE_TYPES[child.mode >> 12], 0)
                else:
                    out += pack(directory.nid if name == b"." else parent_nid, name_offset, 2, 0)
                name_offset += len(name)
            out += b"".join(block)
            start += count
        return out

    def _write_file(self, out: bytearray, meta_start: int, inode: RegularFile) -> None:
        bits = self.chunk_size.bit_length() - 1 - layout.BLOCK_BITS
        whole = (inode.size - 1).bit_length() - layout.BLOCK_BITS if inode.size else 0
        if len(inode.chunks) > 1 and whole <= layout.CHUNK_FORMAT_BITS and self._is_contiguous(inode):
            bits = whole  # one chunk to the kernel, which then reads the first index alone; RAFS readers do not look
        i_u = bits | layout.CHUNK_FORMAT_INDEXES
        offset = align_up(self._write_inode(out, meta_start, inode, layout.LAYOUT_CHUNKED, inode.size, i_u), 8)
        if not inode.size:
            return
        pack_into, file_offset = layout.CHUNK_INDEX.pack_into, 0
        for blob_index, index in self._places(inode):
            used = self._used[blob_index]
            if not used[index]:
                used[index] = 1
                if file_offset:
                    self._file_offsets[blob_index, index] = file_offset
            pack_into(
                out, offset, index & 0xFFFF, blob_index + 1 | index >> 16 << 8,
                self.blobs[blob_index].table.uoffs[index] >> layout.BLOCK_BITS,
            )  # fmt: skip
            offset += CHUNK_INDEX_BYTES
            file_offset += self.chunk_size

    def _places(self, inode: RegularFile) -> Iterator[ChunkPlace]:
        """Where each chunk of a file is."""
        own_index = self._blob_index.get(id(inode.table))
        moved = self._moved.get(id(inode.table), {})
        for chunk in inode.chunks:
            place = moved.get(chunk)
            if place is not None:
                yield place
            elif own_index is not None:
                yield own_index, chunk
            else:
                raise ValueError("a file's chunk is in no blob of the image")

    def _is_contiguous(self, inode: RegularFile) -> bool:
        """Whether all chunks are on one blob, one behind the other."""
        places = self._places(inode)
        blob_index, index = next(places)
        uoffs = self.blobs[blob_index].table.uoffs
        expected = uoffs[index]
        for other, index in places:
            expected += self.chunk_size
            if other != blob_index or uoffs[index] != expected:
                return False
        return True

    # ---- tables
    def _list_chunks(self) -> Iterator[bytes]:
        """Records of the chunks that files use, by digest, then blob. A record starts with the digest and the blob
        index, which fits its lowest byte: the order of the bytes is the order of the table. Sorted in portions, by the
        digest's first byte, so that only one portion's records are there at a time."""
        portions = [array("Q") for _ in range(256)]
        for blob_index, (blob, used) in enumerate(zip(self.blobs, self._used, strict=True)):
            digests = blob.table.digests
            for index, is_used in enumerate(used):
                if is_used:
                    portions[digests[32 * index]].append(blob_index << 32 | index)
        for portion in portions:
            self.stats.chunks += len(portion)
            records = []
            for place in portion:
                blob_index, index = place >> 32, place & 0xFFFFFFFF
                file_offset = self._file_offsets.get((blob_index, index), 0)
                records.append(encode_chunk_record(self.blobs[blob_index].table, index, blob_index, file_offset))
            records.sort()
            yield from records

    def _write_blobs(self, out: bytearray, blob_table_offset: int) -> None:
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
