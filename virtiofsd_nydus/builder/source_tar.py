"""An OCI layer's tar as a tree, its file contents sent to the chunker on the way."""

import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from virtiofsd_nydus.builder.chunker import Chunker
from virtiofsd_nydus.builder.decoding import Hash, InPlaceFailure, Readable, TarFailure
from virtiofsd_nydus.builder.tar_stream import TarEntry, TarStream, ZranTarStream, show
from virtiofsd_nydus.builder.xattrs import is_kept_xattr
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import Form
from virtiofsd_nydus.rafs.bootstrap import encode_xattrs
from virtiofsd_nydus.rafs.nodes import ROOT
from virtiofsd_nydus.rafs.tree import Attributes, RegularFile, Tree, Xattrs

if TYPE_CHECKING:
    from virtiofsd_nydus.builder.zran import ZranIndex

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


def resolve_directory(tree: Tree, parts: list[bytes], *, create: bool) -> int:
    """The directory that a path below the root leads to, symbolic links followed and kept inside the root, as container
    runtimes do when they apply a layer. create: make what is missing (as implied directories). 0: there is no such
    directory, or something else is in the way."""
    trail: list[int] = [ROOT]
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
        child = tree.find(trail[-1], name)
        if not child:
            if not create:
                return 0
            child = tree.make_directory(implied=True)
            tree.link(trail[-1], name, child)
        kind = stat.S_IFMT(tree.mode(child))
        if kind == stat.S_IFLNK:
            hops += 1
            if hops > SYMLINK_HOPS_MAX:
                return 0
            target = tree.target(child)
            if target.startswith(b"/"):
                del trail[1:]
            todo += target.split(b"/")[::-1]
        elif kind == stat.S_IFDIR:
            trail.append(child)
            if len(trail) > layout.DEPTH_MAX:
                raise TarFailure(f"{show(b'/'.join(parts))}: more than {layout.DEPTH_MAX} directories deep")
        else:
            return 0
    return trail[-1]


class TarSource:
    """Builds one layer's tree. Whiteouts stay in it as the files they are: merging gives them their meaning."""

    def __init__(
        self,
        source: Readable,
        chunker: Chunker,
        form: Form,
        *,
        label: str,
        index: "ZranIndex | None" = None,
        hashed: Hash | None = None,
    ) -> None:
        """index: decodes the source, which is gzip, and tells where each chunk is in it. hashed: gets the bytes of the
        decoded tar."""
        self.tree = Tree(form.directory)
        self.dropped_xattrs = 0
        self.files = 0
        self.file_bytes = 0
        self._stream = TarStream(source, hashed) if index is None else ZranTarStream(index, hashed)
        self._index = index
        self._chunker = chunker
        self._table = chunker.table
        self._chunk_size = form.chunk_size
        self._label = label
        self._parent_name: bytes | None = None  # the last parent, as most members share it with the one before
        self._parent = ROOT

    def read(self) -> Tree:
        """The whole tar, to the end of the source."""
        try:
            for entry in self._stream.entries():
                self._add(entry)
            self._stream.drain()
        except InPlaceFailure as failure:
            raise InPlaceFailure(f"{self._label}: {failure}") from None
        except TarFailure as failure:
            raise Failure(f"{self._label}: {failure}", failure.cause) from None
        return self.tree

    def _find_parent(self, entry: TarEntry, parts: list[bytes]) -> int:
        prefix = b"/".join(parts[:-1])
        if prefix != self._parent_name:
            parent = resolve_directory(self.tree, parts[:-1], create=True)
            if not parent:
                raise TarFailure(f"{show(entry.name)}: a parent of it is not a directory")
            self._parent, self._parent_name = parent, prefix
        return self._parent

    def _add(self, entry: TarEntry) -> None:
        parts = split_path(entry.name)
        if not 0 <= entry.uid <= 0xFFFFFFFF or not 0 <= entry.gid <= 0xFFFFFFFF:
            raise TarFailure(f"{show(entry.name)}: owner {entry.uid}:{entry.gid} out of range")
        tree = self.tree
        if not parts:
            if entry.kind == b"5":
                tree.copy_attributes(ROOT, tree, self._make_directory(entry))
                return
            raise TarFailure(f"{show(entry.name)}: the root is not a directory")
        if len(parts) == 1 and parts[0] in SKIPPED_AT_ROOT:
            return
        parent = self._find_parent(entry, parts)
        name = parts[-1]
        if entry.kind == b"5":
            new = self._make_directory(entry)
            old = tree.find(parent, name)
            if old and tree.is_directory(old):
                tree.copy_attributes(old, tree, new)
                return
        elif entry.kind == b"1":
            new = self._find_link_target(entry)
            if new == tree.find(parent, name):
                return
        else:
            new = self._make_inode(entry)
        tree.link(parent, name, new)

    def _find_link_target(self, entry: TarEntry) -> int:
        parts = split_path(entry.link)
        tree = self.tree
        parent = resolve_directory(tree, parts[:-1], create=False) if parts else 0
        target = tree.find(parent, parts[-1]) if parent else 0
        if not target:
            if not parts:
                raise TarFailure(f"{show(entry.name)}: hard link to the root")
            return tree.make_lower_link(b"/".join(parts))
        if tree.is_directory(target):
            raise TarFailure(f"{show(entry.name)}: hard link to the directory {show(entry.link)}")
        return target

    def _xattrs(self, entry: TarEntry) -> Xattrs:
        if not entry.xattrs:
            return ()
        kept = sorted(item for item in entry.xattrs if is_kept_xattr(*item))
        self.dropped_xattrs += len(entry.xattrs) - len(kept)
        key = tuple(kept)
        try:
            encode_xattrs(key)
        except Failure as failure:
            raise TarFailure(f"{show(entry.name)}: {failure}") from None
        return key

    def _make_directory(self, entry: TarEntry) -> int:
        return self.tree.make_directory(self._attributes(entry, stat.S_IFDIR | entry.mode))

    def _attributes(self, entry: TarEntry, mode: int) -> Attributes:
        return Attributes(mode, entry.uid, entry.gid, entry.mtime_ns, self._xattrs(entry))

    def _make_inode(self, entry: TarEntry) -> int:
        tree = self.tree
        if entry.kind == b"0":
            node = tree.make_file(self._attributes(entry, stat.S_IFREG | entry.mode), entry.real_size, self._table)
            self.files += 1
            self.file_bytes += entry.real_size
            if entry.real_size:
                self._send(entry, RegularFile(tree, node, entry.real_size))
            return node
        if entry.kind == b"2":
            if not 0 < len(entry.link) <= layout.SYMLINK_BYTES_MAX:
                raise TarFailure(f"{show(entry.name)}: a symbolic link to {len(entry.link)} bytes")
            return tree.make_symlink(self._attributes(entry, stat.S_IFLNK | 0o777), entry.link)
        if entry.kind in KINDS:
            if not 0 <= entry.major < 1 << 12 or not 0 <= entry.minor < 1 << 20:
                raise TarFailure(f"{show(entry.name)}: device number {entry.major}:{entry.minor} out of range")
            attributes = self._attributes(entry, KINDS[entry.kind] | entry.mode)
            return tree.make_special(attributes, entry.major, entry.minor)
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
            raise InPlaceFailure(
                f"{show(entry.name)}: sparse members cannot be read in place: convert without --oci-ref"
            )
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
