"""The inodes of a tree that a bootstrap is written from, one record each in an arena.

A node is a number, from 1 on; 0 is none. This module alone knows how a record is laid out; what stands in it is got and
set by the methods of Nodes, and those that are called for every inode of an image do several things in one call.
"""

import os
import stat
import struct

from virtiofsd_nydus.rafs.spill import RELIEVE_EVERY, Arena, relieve

NODE_BYTES, NODE_WORDS, NODE_QUADS = 64, 16, 8
# The attributes: mode (the whole st_mode), uid, gid, place of the xattrs, mtime seconds and nanoseconds.
ATTRIBUTES = struct.Struct("<IIIIQI")
# The attributes, then the three numbers of the writer.
RECORD = struct.Struct("<IIIIQI24xIII")
# Words of a record. EXTRA: of a file, its chunk table's number; of a directory, FLAG_*. SIZE, 64 bits: of a file's
# content, a symbolic link's target; of a directory the writer's. DATA, 64 bits: of a file its chunk's number, with
# several chunks where they begin in the pool; of a symbolic link, where its target is; of a device its rdev; of a
# directory its first entry and, in the upper half, its parent. COUNT: of chunks, of entries. INO, NID and NLINK are the
# writer's.
XATTRS, EXTRA, SIZE, DATA, COUNT, INO, NID, NLINK = 3, 7, 8, 10, 12, 13, 14, 15
PARENT = DATA + 1
SIZE_QUAD, DATA_QUAD = SIZE // 2, DATA // 2
FLAG_IMPLIED, FLAG_SORTED, FLAG_SUBDIRS = 1, 2, 4  # the last: it has had a sub-directory
# st_mode >> 12, as kind() gives it
REGULAR, DIRECTORY, SYMLINK = stat.S_IFREG >> 12, stat.S_IFDIR >> 12, stat.S_IFLNK >> 12
TIME_MASK = 0xFFFFFFFFFFFFFFFF
ROOT = 1

Attributes = tuple[int, int, int, int, int, int]


class Nodes:
    """Records of inodes. directory: where the arena's file goes (default: TMPDIR)."""

    def __init__(self, directory: "str | os.PathLike[str] | None" = None) -> None:
        self._arena = Arena(directory)
        self._count = ROOT

    @property
    def node_count(self) -> int:
        """Every node is less."""
        return self._count

    def add_node(self, mode: int, uid: int, gid: int, mtime_ns: int, place: int) -> int:
        """Makes a node. place: of its xattrs, 0 for none."""
        node = self._count
        end = (node + 1) * NODE_BYTES
        if end > len(self._arena.data):
            self._arena.reserve(end)
        self._count = node + 1
        seconds, nanoseconds = divmod(mtime_ns, 1_000_000_000)
        start = end - NODE_BYTES
        ATTRIBUTES.pack_into(self._arena.data, start, mode, uid, gid, place, seconds & TIME_MASK, nanoseconds)
        if not node % RELIEVE_EVERY:
            relieve()
        return node

    def dump_nodes(self) -> bytes:
        """All records, for restore_nodes() of this program on this kind of machine."""
        return bytes(self._arena.data[: self._count * NODE_BYTES])

    def restore_nodes(self, data: "bytes | memoryview") -> None:
        """Takes the records of another tree instead of its own."""
        self._arena.reserve(len(data))
        self._arena.data[: len(data)] = data
        self._count = len(data) // NODE_BYTES

    # ---- attributes

    def attributes(self, node: int) -> Attributes:
        """mode, uid, gid, place of the xattrs, seconds (as 64 bits without a sign) and nanoseconds of mtime."""
        return ATTRIBUTES.unpack_from(self._arena.data, node * NODE_BYTES)

    def set_attributes(self, node: int, attributes: Attributes, place: int) -> None:
        """Sets all that attributes() gives; place: of the xattrs in this tree."""
        mode, uid, gid, _, seconds, nanoseconds = attributes
        ATTRIBUTES.pack_into(self._arena.data, node * NODE_BYTES, mode, uid, gid, place, seconds, nanoseconds)

    def clear_time(self, node: int) -> None:
        """Sets mtime to 0."""
        self._arena.data[node * NODE_BYTES + 16 : node * NODE_BYTES + 28] = bytes(12)

    def mode(self, node: int) -> int:
        """st_mode, file type included."""
        return self._arena.words[node * NODE_WORDS]

    def kind(self, node: int) -> int:
        """The file type: st_mode >> 12."""
        return self._arena.words[node * NODE_WORDS] >> 12

    def is_directory(self, node: int) -> bool:
        return self._arena.words[node * NODE_WORDS] >> 12 == DIRECTORY

    def xattrs_place(self, node: int) -> int:
        """Where the xattrs are; 0: it has none."""
        return self._arena.words[node * NODE_WORDS + XATTRS]

    def size(self, node: int) -> int:
        """Bytes of a file's content or of a symbolic link's target; of a directory what set_size() set."""
        return self._arena.quads[node * NODE_QUADS + SIZE_QUAD]

    def set_size(self, node: int, size: int) -> None:
        self._arena.quads[node * NODE_QUADS + SIZE_QUAD] = size

    # ---- files

    def table_number(self, file: int) -> int:
        """The number of a file's chunk table."""
        return self._arena.words[file * NODE_WORDS + EXTRA]

    def set_file(self, node: int, size: int, table_number: int) -> None:
        self._arena.quads[node * NODE_QUADS + SIZE_QUAD] = size
        self._arena.words[node * NODE_WORDS + EXTRA] = table_number

    def chunk_count(self, file: int) -> int:
        return self._arena.words[file * NODE_WORDS + COUNT]

    def chunk_place(self, file: int) -> tuple[int, int]:
        """How many chunks a file has and, of one, its number, of several, where they begin in the pool."""
        return self._arena.words[file * NODE_WORDS + COUNT], self._arena.quads[file * NODE_QUADS + DATA_QUAD]

    def set_chunk_place(self, file: int, count: int, place: int) -> None:
        """Sets what chunk_place() gives."""
        self._arena.quads[file * NODE_QUADS + DATA_QUAD] = place
        self._arena.words[file * NODE_WORDS + COUNT] = count

    # ---- symbolic links and devices

    def text_place(self, node: int) -> int:
        """Where a symbolic link's target begins."""
        return self._arena.quads[node * NODE_QUADS + DATA_QUAD]

    def set_text(self, node: int, size: int, place: int) -> None:
        self._arena.quads[node * NODE_QUADS + SIZE_QUAD] = size
        self._arena.quads[node * NODE_QUADS + DATA_QUAD] = place

    def rdev(self, node: int) -> int:
        return self._arena.quads[node * NODE_QUADS + DATA_QUAD]

    def set_rdev(self, node: int, rdev: int) -> None:
        self._arena.quads[node * NODE_QUADS + DATA_QUAD] = rdev

    # ---- directories

    def has_flag(self, directory: int, flag: int) -> bool:
        return bool(self._arena.words[directory * NODE_WORDS + EXTRA] & flag)

    def set_flag(self, directory: int, flag: int, on: bool) -> None:
        at = directory * NODE_WORDS + EXTRA
        self._arena.words[at] = self._arena.words[at] & ~flag | (flag if on else 0)

    def first_entry(self, directory: int) -> int:
        """The directory's first entry; 0: none."""
        return self._arena.words[directory * NODE_WORDS + DATA]

    def set_first_entry(self, directory: int, entry: int) -> None:
        self._arena.words[directory * NODE_WORDS + DATA] = entry

    def push_entry(self, directory: int, entry: int) -> int:
        """Makes entry the first one of a directory that thus has one more, in no order. Returns the former first."""
        words, base = self._arena.words, directory * NODE_WORDS
        former = words[base + DATA]
        words[base + DATA] = entry
        words[base + COUNT] += 1
        words[base + EXTRA] &= ~FLAG_SORTED
        return former

    def drop_entry(self, directory: int) -> None:
        """A directory has one entry less."""
        self._arena.words[directory * NODE_WORDS + COUNT] -= 1

    def child_count(self, directory: int) -> int:
        return self._arena.words[directory * NODE_WORDS + COUNT]

    def note_name(self, directory: int, node: int) -> None:
        """A node gets a name in a directory: one more link and, of a directory, its parent."""
        words, base = self._arena.words, node * NODE_WORDS
        if words[base] >> 12 == DIRECTORY:
            words[base + PARENT] = directory
            words[directory * NODE_WORDS + EXTRA] |= FLAG_SUBDIRS
        words[base + NLINK] += 1

    def parent(self, directory: int) -> int:
        """The directory that a directory is in; 0 for the root."""
        return self._arena.words[directory * NODE_WORDS + PARENT]

    # ---- the writer's numbers

    def clear_numbers(self) -> None:
        """Sets ino, nid and the count of links of every node to 0."""
        words = self._arena.words
        for base in range(0, self._count * NODE_WORDS, NODE_WORDS):
            words[base + INO] = words[base + NID] = words[base + NLINK] = 0
            if not base % (NODE_WORDS * RELIEVE_EVERY):
                relieve()

    def begin_numbers(self) -> None:
        """Clears the numbers and gives the root the first one and its links to itself."""
        self.clear_numbers()
        words, base = self._arena.words, ROOT * NODE_WORDS
        words[base + INO], words[base + NLINK] = 1, 2

    def count_link(self, directory: int, child: int, number: int) -> bool:
        """Counts one name of child. The first name gives it the number: True."""
        words, base = self._arena.words, child * NODE_WORDS
        if words[base] >> 12 == DIRECTORY:
            words[directory * NODE_WORDS + NLINK] += 1
            words[base + NLINK] = 2
        else:
            words[base + NLINK] += 1
            if words[base + INO]:
                return False
        words[base + INO] = number
        return True

    def ino(self, node: int) -> int:
        return self._arena.words[node * NODE_WORDS + INO]

    def nid(self, node: int) -> int:
        return self._arena.words[node * NODE_WORDS + NID]

    def set_nid(self, node: int, nid: int) -> None:
        self._arena.words[node * NODE_WORDS + NID] = nid

    def link_count(self, node: int) -> int:
        """Names of the node, as they were counted last."""
        return self._arena.words[node * NODE_WORDS + NLINK]

    def placing(self, node: int) -> tuple[int, int, int, int]:
        """kind, place of the xattrs, number of chunks or entries, nid: what a writer needs to give the node a place."""
        words, base = self._arena.words, node * NODE_WORDS
        return words[base] >> 12, words[base + XATTRS], words[base + COUNT], words[base + NID]

    def dirent(self, node: int) -> tuple[int, int]:
        """nid and kind."""
        base = node * NODE_WORDS
        return self._arena.words[base + NID], self._arena.words[base] >> 12

    def record(self, node: int) -> tuple[int, int, int, int, int, int, int, int, int]:
        """What attributes() gives, then ino, nid and the count of links."""
        return RECORD.unpack_from(self._arena.data, node * NODE_BYTES)
