"""The tree a bootstrap is written from. Small objects on purpose: an image can have a million of them.

An inode has no name; a directory's children map names to inodes, and a hard link is one inode under several names.
"""

import stat
from array import array
from collections.abc import Iterator, Sequence

Xattrs = tuple[tuple[bytes, bytes], ...]


# A file's chunk number from here on is not a chunk of its own blob: it counts in ChunkTable.foreign.
FOREIGN_BASE = 1 << 24


class ChunkTable:
    """The chunks of one blob, in index order, as columns. uoffs ascend (block aligned in RAFS v6).

    flags: those of a chunk record (layout.ChunkFlag). contexts: of a batched or zran chunk, the number of its context,
    and in `slices` where it lies in what that context decodes to; NO_CONTEXT for others; both empty in a blob without
    such chunks. A batched chunk has no coff and csize of its own. foreign: chunks of other blobs that files of this
    layer use, from the chunk dictionary."""

    __slots__ = ("coffs", "contexts", "crcs", "csizes", "digests", "flags", "foreign", "slices", "uoffs", "usizes")

    def __init__(self) -> None:
        self.digests = bytearray()  # 32 bytes each
        self.uoffs = array("Q")
        self.coffs = array("Q")
        self.csizes = array("I")
        self.usizes = array("I")
        self.crcs = array("I")  # CRC-32C of the content; 0: not known
        self.flags = bytearray()
        self.contexts = array("i")
        self.slices = array("I")
        self.foreign: list[tuple[ChunkTable, int]] = []

    def resize(self, count: int) -> None:
        """Makes room for chunks that are set by their index."""
        self.digests = bytearray(32 * count)
        self.uoffs, self.coffs = array("Q", bytes(8 * count)), array("Q", bytes(8 * count))
        self.csizes, self.usizes = array("I", bytes(4 * count)), array("I", bytes(4 * count))
        self.crcs, self.flags = array("I", bytes(4 * count)), bytearray(count)

    def locate(self, chunk: int) -> "tuple[ChunkTable, int]":
        """The table and index a file's chunk number stands for."""
        return self.foreign[chunk - FOREIGN_BASE] if chunk >= FOREIGN_BASE else (self, chunk)

    def __len__(self) -> int:
        return len(self.uoffs)

    def digest(self, index: int) -> bytes:
        return bytes(self.digests[32 * index : 32 * index + 32])


class Inode:
    """What every inode has. mode: the whole st_mode; xattrs: sorted by name. ino, nid and nlink are the writer's."""

    __slots__ = ("gid", "ino", "mode", "mtime_ns", "nid", "nlink", "uid", "xattrs")

    def __init__(self, mode: int, uid: int = 0, gid: int = 0, mtime_ns: int = 0, xattrs: Xattrs = ()) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime_ns = mtime_ns
        self.xattrs = xattrs
        self.ino = 0
        self.nid = 0
        self.nlink = 0


class Directory(Inode):
    """implied: no entry of the source described it, it only had to exist; its attributes give way in a merge."""

    __slots__ = ("children", "implied")

    def __init__(
        self, mode: int = stat.S_IFDIR | 0o755, uid: int = 0, gid: int = 0, mtime_ns: int = 0, xattrs: Xattrs = (),
        *, implied: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(mode, uid, gid, mtime_ns, xattrs)
        self.children: dict[bytes, Inode] = {}
        self.implied = implied

    def copy_attributes(self, other: "Directory") -> None:
        self.mode, self.uid, self.gid = other.mode, other.uid, other.gid
        self.mtime_ns, self.xattrs, self.implied = other.mtime_ns, other.xattrs, other.implied


class RegularFile(Inode):
    """chunks are indexes into table, one for each chunk_size bytes of size."""

    __slots__ = ("chunks", "size", "table")

    def __init__(
        self, mode: int, uid: int, gid: int, mtime_ns: int, xattrs: Xattrs, size: int, table: ChunkTable
    ) -> None:
        super().__init__(mode, uid, gid, mtime_ns, xattrs)
        self.size = size
        self.table = table
        self.chunks: Sequence[int] = ()

    def add_chunk(self, index: int) -> None:
        """Most files have one chunk: a tuple of one costs less than an array."""
        if not self.chunks:
            self.chunks = (index,)
        elif isinstance(self.chunks, array):
            self.chunks.append(index)
        else:
            self.chunks = array("I", (*self.chunks, index))


class Symlink(Inode):
    __slots__ = ("target",)

    def __init__(self, mode: int, uid: int, gid: int, mtime_ns: int, xattrs: Xattrs, target: bytes) -> None:
        super().__init__(mode, uid, gid, mtime_ns, xattrs)
        self.target = target


class LowerLink(Inode):
    """A name that shares the inode of a path in the layers below; only merging can tell which that is. target: the
    path's components. It has no attributes of its own."""

    __slots__ = ("target",)

    def __init__(self, target: tuple[bytes, ...]) -> None:
        super().__init__(0)
        self.target = target


class Special(Inode):
    """A device node, FIFO or socket."""

    __slots__ = ("major", "minor")

    def __init__(
        self, mode: int, uid: int, gid: int, mtime_ns: int, xattrs: Xattrs, major: int = 0, minor: int = 0
    ) -> None:
        super().__init__(mode, uid, gid, mtime_ns, xattrs)
        self.major = major
        self.minor = minor


def walk_directories(root: Directory) -> Iterator[Directory]:
    """Every directory, parents first, sub-directories in the order of the children. Depth costs no stack."""
    stack = [root]
    while stack:
        directory = stack.pop()
        yield directory
        subdirs = [child for child in directory.children.values() if isinstance(child, Directory)]
        stack.extend(reversed(subdirs))


def walk_names(root: Directory) -> Iterator[tuple[bytes, Inode]]:
    """Every name below root with its absolute path, parents first; hard links come once for each name."""
    stack: list[tuple[bytes, Directory]] = [(b"", root)]
    while stack:
        path, directory = stack.pop()
        subdirs = []
        for name, child in directory.children.items():
            child_path = path + b"/" + name
            yield child_path, child
            if isinstance(child, Directory):
                subdirs.append((child_path, child))
        stack.extend(reversed(subdirs))


def find_inode(root: Directory, path: bytes) -> Inode | None:
    """The inode at a path of plain names; symbolic links are not followed."""
    inode: Inode = root
    for name in path.split(b"/"):
        if not name or name == b".":
            continue
        child = inode.children.get(name) if isinstance(inode, Directory) else None
        if child is None:
            return None
        inode = child
    return inode
