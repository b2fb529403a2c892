"""A second opinion on what the writer wrote: a plain decoder of RAFS v6, made from the format description and sharing
nothing with the writer, that refuses whatever a strict reader may refuse. Slow; for tests.
"""

import hashlib
import stat
import struct
from dataclasses import dataclass, field

import lz4.block
import zstandard
from blake3 import blake3

BLOCK = 4096


@dataclass
class Node:
    nid: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    nlink: int
    xattrs: dict[bytes, bytes]
    rdev: int = 0
    target: bytes = b""
    chunks: list[tuple[int, int, int]] = field(default_factory=list)  # blob index, chunk index, uoff
    names: dict[bytes, "Node"] = field(default_factory=dict)


@dataclass
class BlobEntry:
    blob_id: str
    chunk_size: int
    chunk_count: int
    codec: int
    digester: int
    features: int
    compressed_size: int
    uncompressed_size: int
    toc_size: int
    ci_codec: int
    ci_offset: int
    ci_csize: int
    ci_usize: int
    toc_digest: bytes


class Bootstrap:
    """Decodes everything at once; AssertionError where the bytes break a rule."""

    def __init__(self, data: bytes) -> None:
        self.data = data = bytes(data)
        assert len(data) % BLOCK == 0
        assert data[:1024] == bytes(1024)
        fields = struct.unpack_from("<IIIBBHQQIIII", data, 1024)
        magic, checksum, compat, bits, slots, root_nid, inos, _, _, self.blocks, meta, xattr_start = fields
        assert (magic, checksum, compat, bits, slots, xattr_start) == (0xE0F5E1E2, 0, 0x40000000, 12, 0, 0)
        incompat, compression, devices, slot_offset = struct.unpack_from("<IHHH", data, 1024 + 80)
        assert (incompat, compression, slot_offset, root_nid) == (0xC, 0, 11, 128)
        fields = struct.unpack_from("<QQIIQQQI", data, 1152)
        self.flags, blob_off, blob_size, self.chunk_size, chunk_off, chunk_size, pre_off, pre_size = fields
        assert data[1152 + 56 : 1408] == bytes(200)
        assert blob_size == 256 * devices and blob_off % BLOCK == 0 and chunk_off % BLOCK == 0 and chunk_size % 80 == 0
        self.meta = meta * BLOCK
        self.meta_end = chunk_off
        assert chunk_off + chunk_size <= len(data)
        self.blobs = [self._blob(data, blob_off, index) for index in range(devices)]
        self.prefetch = list(struct.unpack_from(f"<{pre_size // 4}I", data, pre_off)) if pre_size else []
        if devices:
            assert self.meta >= blob_off + blob_size + pre_size
        self._check_devices(data, devices)
        self.chunks: dict[tuple[int, int], tuple[bytes, int, int, int, int, int]] = {}
        self._read_chunk_table(data, chunk_off, chunk_size)
        self._places: list[tuple[int, int]] = []
        self._nodes: dict[int, Node] = {}
        self.root = self._node(root_nid)
        self.name_count = 1
        self._read_tree()
        assert self.name_count == inos
        self._check_places()

    def _blob(self, data: bytes, offset: int, index: int) -> BlobEntry:
        f = struct.unpack_from("<64sIIIIIIQQIIQQQ32s32sQ8sI", data, offset + 256 * index)
        assert f[1] == index and f[2] == self.chunk_size
        assert f[15:] == (bytes(32), 0, bytes(8), 0)
        assert f[8] % BLOCK == 0 and f[3] < 1 << 24
        return BlobEntry(f[0].rstrip(b"\0").decode(), *f[2:15])

    def _check_devices(self, data: bytes, count: int) -> None:
        self.mapped = []
        end = len(data)
        for index in range(count):
            tag, blocks, mapped = struct.unpack_from("<64sII", data, 1408 + 128 * index)
            assert tag.rstrip(b"\0").decode() == self.blobs[index].blob_id
            assert blocks == self.blobs[index].uncompressed_size // BLOCK > 0
            assert mapped * BLOCK % (512 << 10) == 0 and mapped * BLOCK >= end
            end = (mapped + blocks) * BLOCK
            self.mapped.append(mapped)
        assert len({blob.blob_id for blob in self.blobs}) == count
        assert self.blocks == sum(blob.uncompressed_size for blob in self.blobs) // BLOCK

    def _read_chunk_table(self, data: bytes, offset: int, size: int) -> None:
        last = (b"", -1)
        for at in range(offset, offset + size, 80):
            digest, blob, flags, csize, usize, coff, uoff, _, index, crc = struct.unpack_from("<32sIIIIQQQII", data, at)
            assert (digest, blob) > last
            last = (digest, blob)
            assert flags == (0x11 if csize != usize else 0x10) and csize <= usize <= self.chunk_size and crc
            assert uoff % BLOCK == 0 and uoff + usize <= self.blobs[blob].uncompressed_size
            self.chunks[blob, index] = (digest, csize, usize, coff, uoff, flags)

    def _node(self, nid: int) -> Node:
        if nid in self._nodes:
            return self._nodes[nid]
        assert nid >= 128
        at = self.meta + 32 * nid
        (fmt, icount, mode, reserved, size, i_u, _ino, uid, gid, mtime, nsec, nlink) = struct.unpack_from(
            "<HHHHQIIIIqII", self.data, at
        )
        assert reserved == 0 and self.data[at + 48 : at + 64] == bytes(16) and nsec < 10**9 and fmt & 1 and not fmt >> 4
        body = 12 + 4 * (icount - 1) if icount else 0
        node = Node(nid, mode, uid, gid, size, mtime * 10**9 + nsec, nlink, self._xattrs(at + 64, body))
        self._nodes[nid] = node
        behind = at + 64 + body
        kind, form = fmt >> 1 & 7, stat.S_IFMT(mode)
        if form == stat.S_IFREG:
            assert kind == 4
            behind = self._index(node, behind, i_u)
        elif form in (stat.S_IFDIR, stat.S_IFLNK):
            content, behind = self._flat(at, behind, kind, i_u, size)
            if form == stat.S_IFLNK:
                assert 0 < len(content) <= 4095
                node.target = content
            else:
                node.target = content  # taken apart by _read_tree
        else:
            assert kind == 0 and size == 0
            node.rdev = i_u
        self._places.append((at, behind))
        assert behind <= self.meta_end
        return node

    def _xattrs(self, at: int, body: int) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        if not body:
            return found
        assert self.data[at : at + 12] == bytes(12)
        prefixes = {1: b"user.", 2: b"system.posix_acl_access", 3: b"system.posix_acl_default", 4: b"trusted.",
                    6: b"security."}  # fmt: skip
        end, at = at + body, at + 12
        while at < end:
            name_len, index, value_len = struct.unpack_from("<BBH", self.data, at)
            name = prefixes[index] + self.data[at + 4 : at + 4 + name_len]
            assert name not in found
            found[name] = self.data[at + 4 + name_len : at + 4 + name_len + value_len]
            at = at + 4 + (name_len + value_len + 3 & -4)
        assert at == end
        return found

    def _flat(self, at: int, behind: int, kind: int, block: int, size: int) -> tuple[bytes, int]:
        tail = size % BLOCK
        if kind == 2:
            assert tail and at // BLOCK == (behind + tail - 1) // BLOCK
            apart, end = size - tail, behind + tail
            inline = self.data[behind:end]
        else:
            assert kind == 0
            apart, end, inline = size, behind, b""
        if apart:
            start = block * BLOCK
            assert self.meta <= start and start + apart <= self.meta_end
            self._places.append((start, start + -(-apart // BLOCK) * BLOCK))
            return self.data[start : start + apart] + inline, end
        return inline, end

    def _index(self, node: Node, at: int, i_u: int) -> int:
        bits = (self.chunk_size // BLOCK).bit_length() - 1
        if not node.size:
            assert i_u == bits | 0x20
            return at
        at = at + 7 & -8
        for number in range(-(-node.size // self.chunk_size)):
            low, device, block = struct.unpack_from("<HHI", self.data, at)
            blob, index = (device & 0xFF) - 1, low | device >> 8 << 16
            assert 0 <= blob < len(self.blobs) and index < self.blobs[blob].chunk_count
            record = self.chunks[blob, index]
            assert record[4] == block * BLOCK
            assert record[2] == min(self.chunk_size, node.size - number * self.chunk_size)
            node.chunks.append((blob, index, block * BLOCK))
            at += 8
        first = node.chunks[0]
        step = self.chunk_size // BLOCK
        if len(node.chunks) > 1 and all(
            blob == first[0] and uoff == first[2] + number * step * BLOCK
            for number, (blob, _, uoff) in enumerate(node.chunks)
        ):
            bits = (node.size - 1).bit_length() - 12
        assert i_u == bits | 0x20
        return at

    def _read_tree(self) -> None:
        types = {1: stat.S_IFREG, 2: stat.S_IFDIR, 3: stat.S_IFCHR, 4: stat.S_IFBLK, 5: stat.S_IFIFO, 6: stat.S_IFSOCK,
                 7: stat.S_IFLNK}  # fmt: skip
        links: dict[int, int] = {}
        stack = [(self.root, self.root)]
        seen = {self.root.nid}
        while stack:
            node, parent = stack.pop()
            last, subdirs = b"", 0
            for name, nid, kind in self._dirents(node.target):
                assert name > last
                last = name
                if name in (b".", b".."):
                    assert nid == (node.nid if name == b"." else parent.nid) and kind == 2
                    continue
                assert 0 < len(name) <= 255 and b"/" not in name and b"\0" not in name
                child = self._node(nid)
                assert stat.S_IFMT(child.mode) == types[kind]
                node.names[name] = child
                self.name_count += 1
                if kind == 2:
                    assert nid not in seen
                    seen.add(nid)
                    subdirs += 1
                    stack.append((child, node))
                else:
                    links[nid] = links.get(nid, 0) + 1
            assert node.nlink == 2 + subdirs
        for nid, count in links.items():
            assert self._nodes[nid].nlink == count

    @staticmethod
    def _dirents(content: bytes) -> list[tuple[bytes, int, int]]:
        found = []
        for start in range(0, len(content), BLOCK):
            block = content[start : start + BLOCK]
            first = struct.unpack_from("<H", block, 8)[0]
            assert first % 12 == 0 and first
            heads = [struct.unpack_from("<QHBB", block, at) for at in range(0, first, 12)]
            for (nid, at, kind, reserved), following in zip(heads, [*heads[1:], None], strict=True):
                assert reserved == 0
                name = block[at : following[1]] if following else block[at:].partition(b"\0")[0]
                found.append((name, nid, kind))
        assert {b".", b".."} <= {name for name, _, _ in found}
        return found

    def _check_places(self) -> None:
        self._places.sort()
        end = self.meta + BLOCK
        self.wasted = 0  # bytes of the inode area that another inode could have had
        for start, stop in self._places:
            assert start >= end, "two things at one place"
            self.wasted += start - (end + 31 & -32)
            end = stop
        self.wasted += self.meta_end - (end + 31 & -32)

    def walk(self) -> dict[bytes, Node]:
        """Absolute path -> node, the root as b"/"."""
        found, stack = {b"/": self.root}, [(b"", self.root)]
        while stack:
            path, node = stack.pop()
            for name, child in node.names.items():
                found[path + b"/" + name] = child
                if stat.S_ISDIR(child.mode):
                    stack.append((path + b"/" + name, child))
        return found


class Blob:
    """A layer's blob, found from its end."""

    def __init__(self, data: bytes) -> None:
        self.data = bytes(data)
        self.blob_id = hashlib.sha256(data).hexdigest()
        name, toc_size = self._header(len(data) - 512)
        assert name == "rafs.blob.toc" and toc_size % 128 == 0
        toc = data[len(data) - 512 - toc_size :]
        self.toc_size, self.toc_digest = len(toc), hashlib.sha256(toc).digest()
        self.sections: dict[str, tuple[int, bytes, int, int, int]] = {}
        for at in range(0, toc_size, 128):
            flags, _, name_field, digest, coff, csize, usize = struct.unpack_from("<II16s32sQQQ", toc, at)
            self.sections[name_field.rstrip(b"\0").decode()] = (flags, digest, coff, csize, usize)
        order = ["image.blob", "blob.meta", "blob.meta.header", "blob.digest", "image.boot"]
        assert [name for name in order if name in self.sections] == list(self.sections)
        end = 0
        for name in self.sections:
            flags, digest, coff, csize, usize = self.sections[name]
            assert coff == end
            end = coff + csize
            if name == "image.blob":
                assert flags == 1 and hashlib.sha256(data[: csize + 512]).digest() == digest
            else:
                assert hashlib.sha256(self.section(name)).digest() == digest
                assert len(self.section(name)) == usize
            if name != "blob.meta":
                header_name, size = self._header(end)
                assert header_name == ("blob.meta" if name == "blob.meta.header" else name)
                assert size == (csize if name != "blob.meta.header" else self.sections["blob.meta"][3] + 4096)
                end += 512
        assert end == len(data) - self.toc_size
        self.chunks = self._chunk_infos() if "blob.meta" in self.sections else []

    def _header(self, at: int) -> tuple[str, int]:
        header = self.data[at : at + 512]
        assert len(header) == 512 and header[257:265] == b"ustar  \0" and header[156:157] == b"0"
        assert int(header[148:155], 8) == sum(header) - sum(header[148:156]) + 256
        assert header[100:124] == bytes(24)
        return header[:100].rstrip(b"\0").decode(), int(header[124:135], 8)

    def section(self, name: str) -> bytes:
        flags, _, coff, csize, usize = self.sections[name]
        raw = self.data[coff : coff + csize]
        return decode(raw, {1: 0, 2: 3, 4: 1}[flags], usize)

    def _chunk_infos(self) -> list[tuple[int, int, int, int]]:
        header = struct.unpack("<IIIIQQQQQI4032xI", self.section("blob.meta.header"))
        _, _, coff, csize, usize = self.sections["blob.meta"]
        count = usize // 16
        assert header[0] == header[10] == 0xB10BB10B and header[3] == count
        assert header[4:10] == (coff, csize, usize, 0, 0, 0)
        assert self.sections["blob.digest"][4] == 32 * count
        chunks = []
        next_uoff = next_coff = 0
        for first, second in struct.iter_unpack("<QQ", self.section("blob.meta")):
            uoff, usize = first & 0xFFFFFFFF000, (first >> 44 | (first >> 8 & 0xF) << 20) + 1
            coff, csize = second & 0xFFFFFFFFFF, (second >> 44 | (second >> 40 & 0xF) << 20) + 1
            assert first & 0xFF == 0 and uoff == next_uoff and coff == next_coff
            next_uoff, next_coff = uoff + (usize + 4095 & -4096), coff + csize
            chunks.append((uoff, usize, coff, csize))
        assert next_coff == self.sections["image.blob"][3] and next_uoff == self.sections["image.blob"][4]
        return chunks

    def read_chunk(self, index: int, codec: int, digester: int) -> bytes:
        """The chunk's bytes, checked against its digest."""
        _uoff, usize, coff, csize = self.chunks[index]
        data = decode(self.data[coff : coff + csize], codec if csize != usize else 0, usize)
        digest = self.section("blob.digest")[32 * index : 32 * index + 32]
        assert (hashlib.sha256(data).digest() if digester else blake3(data).digest()) == digest
        return data

    def expand(self, codec: int, digester: int) -> bytes:
        """The uncompressed blob, as the kernel wants it for a device."""
        out = bytearray(self.sections["image.blob"][4] if self.chunks else 0)
        for index, (uoff, usize, _, _) in enumerate(self.chunks):
            out[uoff : uoff + usize] = self.read_chunk(index, codec, digester)
        return bytes(out)


def decode(data: bytes, codec: int, usize: int) -> bytes:
    if codec == 0:
        return data
    if codec == 1:
        return bytes(lz4.block.decompress(data, uncompressed_size=usize))
    assert zstandard.frame_content_size(data) == usize
    return zstandard.ZstdDecompressor().decompress(data)


def check_blob_entry(entry: BlobEntry, blob: Blob) -> None:
    """The blob table's word on a blob against the blob."""
    assert entry.blob_id == blob.blob_id and entry.compressed_size == len(blob.data)
    assert (entry.toc_size, entry.toc_digest) == (blob.toc_size, blob.toc_digest)
    assert entry.chunk_count == len(blob.chunks) and entry.uncompressed_size == blob.sections["image.blob"][4]
    flags, _, coff, csize, usize = blob.sections["blob.meta"]
    assert (entry.ci_codec, entry.ci_offset, entry.ci_csize, entry.ci_usize) == (
        {1: 0, 2: 3, 4: 1}[flags], coff, csize, usize,
    )  # fmt: skip
    assert entry.features == 0x70000021


def read_file(node: Node, bootstrap: Bootstrap, blobs: dict[str, Blob]) -> bytes:
    parts = []
    for blob_index, index, uoff in node.chunks:
        entry = bootstrap.blobs[blob_index]
        blob = blobs[entry.blob_id]
        assert blob.chunks[index][0] == uoff
        digest, csize, usize, coff, _, _ = bootstrap.chunks[blob_index, index]
        assert blob.chunks[index] == (uoff, usize, coff, csize)
        assert blob.section("blob.digest")[32 * index : 32 * index + 32] == digest
        parts.append(blob.read_chunk(index, entry.codec, entry.digester))
    return b"".join(parts)
