"""An OCI layer's tar as a tree, its file contents sent to the chunker on the way."""

import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from virtiofsd_nydus.build.chunker import Chunker
from virtiofsd_nydus.build.tar_stream import Readable, TarEntry, TarFailure, TarStream, ZranTarStream, show
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.bootstrap import encode_xattrs, is_storable_xattr
from virtiofsd_nydus.rafs.tree import ChunkTable, Directory, Inode, LowerLink, RegularFile, Special, Symlink, Xattrs

if TYPE_CHECKING:
    from virtiofsd_nydus.build.zran import ZranIndex

# Index files of eStargz layers: descriptions of the tar, not content.
SKIPPED_AT_ROOT = {b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark"}
KINDS = {b"3": stat.S_IFCHR, b"4": stat.S_IFBLK, b"6": stat.S_IFIFO}
SYMLINK_HOPS_MAX = 40  # as the kernel


def split_path(name: bytes) -> list[bytes]:
    """The components of a member's name below the root. Absolute names are taken as relative; names that climb out of
    the root are refused."""
    parts = [part for part in name.split(b"/") if part and part != b"."]
    if b".." in parts:
        kept: list[bytes] = []
        for part in parts:
            if part != b"..":
                kept.append(part)
            elif kept:
                kept.pop()
            else:
                raise TarFailure(f"{show(name)}: the name leaves the root")
        parts = kept
    if len(name) > layout.NAME_BYTES_MAX and max(map(len, parts), default=0) > layout.NAME_BYTES_MAX:
        raise TarFailure(f"{show(name)}: a name of more than {layout.NAME_BYTES_MAX} bytes")
    if len(name) > layout.PATH_BYTES_MAX:
        raise TarFailure(f"{show(name)}: a name of {len(name)} bytes")
    if b"\0" in name:
        raise TarFailure(f"{show(name)}: a NUL in the name")
    return parts


def resolve_directory(root: Directory, parts: list[bytes], *, create: bool) -> Directory | None:
    """The directory that a path below root leads to, symbolic links followed and kept inside root, as container
    runtimes do when they apply a layer. create: make what is missing (as implied directories). None: there is no such
    directory, or something else is in the way."""
    trail: list[Directory] = [root]
    todo = parts[::-1]
    hops = 0
    while todo:
        name = todo.pop()
        if name == b"..":
            if len(trail) > 1:
                trail.pop()
            continue
        if not name or name == b".":
            continue
        child = trail[-1].children.get(name)
        if child is None:
            if not create:
                return None
            child = trail[-1].children[name] = Directory(implied=True)
        if isinstance(child, Symlink):
            hops += 1
            if hops > SYMLINK_HOPS_MAX:
                return None
            if child.target.startswith(b"/"):
                del trail[1:]
            todo += child.target.split(b"/")[::-1]
        elif isinstance(child, Directory):
            trail.append(child)
            if len(trail) > layout.DEPTH_MAX:
                raise TarFailure(f"{show(b'/'.join(parts))}: more than {layout.DEPTH_MAX} directories deep")
        else:
            return None
    return trail[-1]


class TarSource:
    """Builds one layer's tree. Whiteouts stay in it as the files they are: merging gives them their meaning."""

    def __init__(
        self, source: Readable, chunker: Chunker, table: ChunkTable, *, chunk_size: int, label: str,
        index: "ZranIndex | None" = None,
    ) -> None:  # fmt: skip
        """index: decodes the source, which is gzip, and tells where each chunk is in it."""
        self.root = Directory(implied=True)
        self.dropped_xattrs = 0
        self.files = 0
        self.file_bytes = 0
        self._stream = TarStream(source) if index is None else ZranTarStream(index)
        self._index = index
        self._chunker = chunker
        self._table = table
        self._chunk_size = chunk_size
        self._label = label
        self._parent_name: bytes | None = None  # the last parent, as most members share it with the one before
        self._parent = self.root
        self._xattr_sets: dict[Xattrs, Xattrs] = {}
        self._times: dict[int, int] = {}  # equal numbers as one object: most members share their time

    def read(self) -> Directory:
        """The whole tar, to the end of the source."""
        try:
            for entry in self._stream.entries():
                self._add(entry)
            self._stream.drain()
        except TarFailure as failure:
            raise Failure(f"{self._label}: {failure}", failure.cause) from None
        return self.root

    def _find_parent(self, entry: TarEntry, parts: list[bytes]) -> Directory:
        prefix = b"/".join(parts[:-1])
        if prefix != self._parent_name:
            parent = resolve_directory(self.root, parts[:-1], create=True)
            if parent is None:
                raise TarFailure(f"{show(entry.name)}: a parent of it is not a directory")
            self._parent, self._parent_name = parent, prefix
        return self._parent

    def _add(self, entry: TarEntry) -> None:
        parts = split_path(entry.name)
        if not 0 <= entry.uid <= 0xFFFFFFFF or not 0 <= entry.gid <= 0xFFFFFFFF:
            raise TarFailure(f"{show(entry.name)}: owner {entry.uid}:{entry.gid} out of range")
        if not parts:
            if entry.kind == b"5":
                self.root.copy_attributes(self._make_directory(entry))
                return
            raise TarFailure(f"{show(entry.name)}: the root is not a directory")
        if len(parts) == 1 and parts[0] in SKIPPED_AT_ROOT:
            return
        parent = self._find_parent(entry, parts)
        name = parts[-1]
        old = parent.children.get(name)
        if entry.kind == b"5":
            new: Inode = self._make_directory(entry)
            if isinstance(old, Directory) and isinstance(new, Directory):
                old.copy_attributes(new)
                return
        elif entry.kind == b"1":
            new = self._find_link_target(entry)
            if new is old:
                return
        else:
            new = self._make_inode(entry)
        parent.children[name] = new

    def _find_link_target(self, entry: TarEntry) -> Inode:
        parts = split_path(entry.link)
        parent = resolve_directory(self.root, parts[:-1], create=False) if parts else None
        target = parent.children.get(parts[-1]) if parent is not None else None
        if target is None:
            if not parts:
                raise TarFailure(f"{show(entry.name)}: hard link to the root")
            return LowerLink(tuple(parts))
        if isinstance(target, Directory):
            raise TarFailure(f"{show(entry.name)}: hard link to the directory {show(entry.link)}")
        return target

    def _xattrs(self, entry: TarEntry) -> Xattrs:
        if not entry.xattrs:
            return ()
        kept = sorted(item for item in entry.xattrs if is_storable_xattr(*item))
        self.dropped_xattrs += len(entry.xattrs) - len(kept)
        key = tuple(kept)
        if key and key not in self._xattr_sets:
            try:
                encode_xattrs(key)
            except Failure as failure:
                raise TarFailure(f"{show(entry.name)}: {failure}") from None
        return self._xattr_sets.setdefault(key, key)

    def _time(self, entry: TarEntry) -> int:
        return self._times.setdefault(entry.mtime_ns, entry.mtime_ns)

    def _make_directory(self, entry: TarEntry) -> Directory:
        return Directory(stat.S_IFDIR | entry.mode, entry.uid, entry.gid, self._time(entry), self._xattrs(entry))

    def _make_inode(self, entry: TarEntry) -> Inode:
        common = (entry.uid, entry.gid, self._time(entry), self._xattrs(entry))
        if entry.kind == b"0":
            file = RegularFile(stat.S_IFREG | entry.mode, *common, entry.real_size, self._table)
            self.files += 1
            self.file_bytes += file.size
            self._send(entry, file)
            return file
        if entry.kind == b"2":
            if not 0 < len(entry.link) <= layout.SYMLINK_BYTES_MAX:
                raise TarFailure(f"{show(entry.name)}: a symbolic link to {len(entry.link)} bytes")
            return Symlink(stat.S_IFLNK | 0o777, *common, entry.link)
        if entry.kind in KINDS:
            if not 0 <= entry.major < 1 << 12 or not 0 <= entry.minor < 1 << 20:
                raise TarFailure(f"{show(entry.name)}: device number {entry.major}:{entry.minor} out of range")
            return Special(KINDS[entry.kind] | entry.mode, *common, entry.major, entry.minor)
        raise TarFailure(f"{show(entry.name)}: members of type {entry.kind!r} are not supported")

    def _send(self, entry: TarEntry, file: RegularFile) -> None:
        add, chunk_size = self._chunker.add, self._chunk_size
        if self._index is not None:
            self._send_places(entry, file, self._index)
            return
        if entry.regions is not None:
            for chunk in self._read_sparse(entry):
                add(chunk, file)
            return
        read, left = self._stream.read_data, entry.size
        while left > chunk_size:
            add(read(chunk_size), file)
            left -= chunk_size
        if left:
            add(read(left), file)

    def _send_places(self, entry: TarEntry, file: RegularFile, index: "ZranIndex") -> None:
        if entry.regions is not None:
            raise TarFailure(f"{show(entry.name)}: sparse members cannot be read in place: convert without --oci-ref")
        left = entry.size
        while left:
            size = min(left, self._chunk_size)
            index.begin_chunk()
            data = self._stream.read_data(size)
            self._chunker.add(data, file, index.end_chunk())
            left -= size

    def _read_sparse(self, entry: TarEntry) -> Iterator[bytes]:
        """The chunks of a sparse file, holes filled with zeroes (RAFS has no holes; equal chunks are stored once)."""
        regions = iter(entry.regions or ())
        zeroes = self._chunker.zeroes
        offset, length = next(regions, (entry.real_size, 0))
        for start in range(0, entry.real_size, self._chunk_size):
            end = min(start + self._chunk_size, entry.real_size)
            if offset >= end:
                yield zeroes[: end - start]  # the object itself when whole
                continue
            parts: list[bytes] = []
            position = start
            while position < end:
                hole = min(offset, end) - position
                if hole > 0:
                    parts.append(zeroes[:hole])
                    position += hole
                take = min(length, end - position)
                if take:
                    parts.append(self._stream.read_data(take))
                    position += take
                    offset, length = offset + take, length - take
                if not length:
                    offset, length = next(regions, (entry.real_size, 0))
            yield b"".join(parts)
