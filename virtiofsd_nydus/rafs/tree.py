"""The tree a bootstrap is written from, as records in arenas: an image can have millions of inodes (spill.py).

A node is a number, from ROOT on; 0 is none. It has no name: a directory's entries map names to nodes, and a hard link
is one node under several names. Nodes and entries that are no longer in the tree stay where they are.
"""

import marshal
import os
import stat
import struct
from array import array
from collections.abc import Iterator, Sequence

from virtiofsd_nydus.rafs.chunktable import ChunkTable
from virtiofsd_nydus.rafs.spill import RELIEVE_EVERY, Arena, relieve

Xattrs = tuple[tuple[bytes, bytes], ...]

ROOT = 1
NODE_BYTES, ENTRY_BYTES = 64, 32
# mode (the whole st_mode), uid, gid, xattrs (place in texts / 8), mtime seconds and nanoseconds; the rest below
ATTRIBUTES = struct.Struct("<IIIIQI")
# Words of a node beyond its attributes. EXTRA: of a file, its chunk table's number; of a directory, FLAG_*. SIZE, 64
# bits: of a file's content, a symbolic link's target; of a directory the writer's. DATA, 64 bits: of a file its chunk's
# number, with several where they begin in the pool; of a symbolic link, where its target is in texts; of a device its
# rdev; of a directory its first entry and, in the upper half, its parent. COUNT: of chunks, of entries. The last three
# are the writer's.
XATTRS, EXTRA, SIZE, DATA, COUNT, INO, NID, NLINK = 3, 7, 8, 10, 12, 13, 14, 15
FLAG_IMPLIED, FLAG_SORTED, FLAG_SUBDIRS = 1, 2, 4  # the last: it has had one
DIRECTORY = stat.S_IFDIR >> 12
# Words of an entry. TEXT: where the name is in texts, 64 bits.
PARENT, NODE, NEXT, LENGTH, TEXT, HASH, CHAIN = 0, 1, 2, 3, 4, 6, 7
CACHED_XATTRS = 4096
TIME_MASK = 0xFFFFFFFFFFFFFFFF


class RegularFile:
    """What gets a file's chunks, in order, while its content goes through the chunker."""

    __slots__ = ("node", "size", "tree")

    def __init__(self, tree: "Tree", node: int, size: int) -> None:
        self.tree = tree
        self.node = node
        self.size = size

    def add_chunk(self, index: int) -> None:
        nodes, at = self.tree.nodes, self.node * 16 + COUNT
        if nodes.words[at]:
            self.tree.add_chunk(self.node, index)
        else:
            nodes.quads[self.node * 8 + DATA // 2] = index
            nodes.words[at] = 1


class Tree:
    """directory: where the arenas' files go (default: TMPDIR). tables: the chunk tables of its files.

    Names and attributes are not checked here; the writers check them."""

    def __init__(self, directory: "str | os.PathLike[str] | None" = None) -> None:
        self.tables: list[ChunkTable] = []
        self.lower_links = 0  # nodes made so
        self.nodes = Arena(directory)
        self._entries = Arena(directory)
        self._buckets = Arena(directory)
        self._texts = Arena(directory)
        self._pool = Arena(directory)  # chunk numbers of files with several
        self._texts.append(bytes(8))  # so that no place is 0
        self._node_count = ROOT
        self._entry_count = 1
        self._table_numbers: dict[int, int] = {}
        self._xattr_places: dict[Xattrs, int] = {(): 0}
        self._xattrs_at: dict[int, Xattrs] = {0: ()}
        self.make_directory(implied=True)

    # ---- making nodes
    def _make(self, mode: int, uid: int, gid: int, mtime_ns: int, xattrs: Xattrs) -> int:
        node = self._node_count
        end = (node + 1) * NODE_BYTES
        if end > len(self.nodes.data):
            self.nodes.reserve(end)
        self._node_count = node + 1
        seconds, nanoseconds = divmod(mtime_ns, 1_000_000_000)
        place = self._xattr_places.get(xattrs)
        if place is None:
            place = self._store_xattrs(xattrs)
        ATTRIBUTES.pack_into(self.nodes.data, end - NODE_BYTES, mode, uid, gid, place, seconds & TIME_MASK, nanoseconds)
        if not node % RELIEVE_EVERY:
            relieve()
        return node

    def _store_xattrs(self, xattrs: Xattrs) -> int:
        if len(self._xattr_places) > CACHED_XATTRS:
            self._xattr_places = {(): 0}
        packed = marshal.dumps(xattrs)
        self._texts.append(bytes(-self._texts.used % 8))
        place = self._texts.append(struct.pack("<I", len(packed)) + packed) >> 3
        self._xattr_places[xattrs] = place
        return place

    def make_directory(
        self, mode: int = stat.S_IFDIR | 0o755, uid: int = 0, gid: int = 0, mtime_ns: int = 0, xattrs: Xattrs = (),
        *, implied: bool = False,
    ) -> int:  # fmt: skip
        """implied: no entry of the source describes the directory, but a path needs it; in a merge the other layer's
        attributes win."""
        node = self._make(mode, uid, gid, mtime_ns, xattrs)
        self.nodes.words[node * 16 + EXTRA] = FLAG_IMPLIED if implied else 0
        return node

    def make_file(
        self, mode: int, uid: int, gid: int, mtime_ns: int, xattrs: Xattrs, size: int, table: ChunkTable
    ) -> int:
        """Makes a file. Its chunks are indexes into table, one for each chunk_size bytes of size; add_chunk adds
        them."""
        node = self._make(mode, uid, gid, mtime_ns, xattrs)
        self.nodes.quads[node * 8 + SIZE // 2] = size
        self.nodes.words[node * 16 + EXTRA] = self._number_table(table)
        return node

    def _number_table(self, table: ChunkTable) -> int:
        number = self._table_numbers.get(id(table))
        if number is None:
            number = self._table_numbers[id(table)] = len(self.tables)
            self.tables.append(table)
        return number

    def add_chunk(self, node: int, index: int) -> None:
        """The next chunk of a file. Most files have one, which then lies in the node itself."""
        words, quads = self.nodes.words, self.nodes.quads
        count = words[node * 16 + COUNT]
        if not count:
            quads[node * 8 + DATA // 2] = index
        else:
            pool, start = self._pool, quads[node * 8 + DATA // 2]
            if count == 1:
                start, first = pool.used // 4, start
                pool.append(first.to_bytes(4, "little"))
            elif start + count != pool.used // 4:  # another file came between
                moved = bytes(pool.data[4 * start : 4 * (start + count)])
                start = pool.append(moved) // 4
            quads[node * 8 + DATA // 2] = start
            pool.append(index.to_bytes(4, "little"))
        words[node * 16 + COUNT] = count + 1

    def make_symlink(self, mode: int, uid: int, gid: int, mtime_ns: int, xattrs: Xattrs, target: bytes) -> int:
        node = self._make(mode, uid, gid, mtime_ns, xattrs)
        self._set_target(node, target)
        return node

    def _set_target(self, node: int, target: bytes) -> None:
        self.nodes.quads[node * 8 + SIZE // 2] = len(target)
        self.nodes.quads[node * 8 + DATA // 2] = self._texts.append(target)

    def make_lower_link(self, target: bytes) -> int:
        """Makes a name that shares the inode of a path in the layers below. Only merging can tell which inode that
        is, so the node has no attributes, not even a type."""
        node = self._make(0, 0, 0, 0, ())
        self._set_target(node, target)
        self.lower_links += 1
        return node

    def make_special(
        self, mode: int, uid: int, gid: int, mtime_ns: int, xattrs: Xattrs, major: int = 0, minor: int = 0
    ) -> int:
        """A device node, FIFO or socket."""
        node = self._make(mode, uid, gid, mtime_ns, xattrs)
        rdev = minor & 0xFF | major << 8 | (minor & ~0xFF) << 12  # as glibc's low 32 bits
        self.nodes.quads[node * 8 + DATA // 2] = rdev & 0xFFFFFFFF
        return node

    def copy_node(self, other: "Tree", node: int) -> int:
        """Copies a node of another tree into this one; a directory comes without its entries."""
        mode, uid, gid, place, seconds, nanoseconds = ATTRIBUTES.unpack_from(other.nodes.data, node * NODE_BYTES)
        made = self._make(mode, uid, gid, 0, other.xattrs_at(place))
        place = self.nodes.words[made * 16 + XATTRS]
        ATTRIBUTES.pack_into(self.nodes.data, made * NODE_BYTES, mode, uid, gid, place, seconds, nanoseconds)
        kind = stat.S_IFMT(mode)
        if kind == stat.S_IFREG:
            self.nodes.quads[made * 8 + SIZE // 2] = other.size(node)
            self.nodes.words[made * 16 + EXTRA] = self._number_table(other.table(node))
            for chunk in other.chunks(node):
                self.add_chunk(made, chunk)
        elif kind in (stat.S_IFLNK, 0):
            self._set_target(made, other.target(node))
        elif kind == stat.S_IFDIR:
            self.nodes.words[made * 16 + EXTRA] = other.nodes.words[node * 16 + EXTRA] & FLAG_IMPLIED
        else:
            self.nodes.quads[made * 8 + DATA // 2] = other.rdev(node)
        return made

    def copy_attributes(self, directory: int, other: "Tree", node: int) -> None:
        """Copies the attributes of a directory of another tree to one of this tree."""
        mode, uid, gid, place, seconds, nanoseconds = ATTRIBUTES.unpack_from(other.nodes.data, node * NODE_BYTES)
        xattrs = other.xattrs_at(place)
        found = self._xattr_places.get(xattrs)
        place = self._store_xattrs(xattrs) if found is None else found
        ATTRIBUTES.pack_into(self.nodes.data, directory * NODE_BYTES, mode, uid, gid, place, seconds, nanoseconds)
        flags = self.nodes.words[directory * 16 + EXTRA] & ~FLAG_IMPLIED
        self.nodes.words[directory * 16 + EXTRA] = flags | other.nodes.words[node * 16 + EXTRA] & FLAG_IMPLIED

    # ---- reading nodes
    def mode(self, node: int) -> int:
        return self.nodes.words[node * 16]

    def is_directory(self, node: int) -> bool:
        return self.nodes.words[node * 16] >> 12 == DIRECTORY

    def is_implied(self, directory: int) -> bool:
        return bool(self.nodes.words[directory * 16 + EXTRA] & FLAG_IMPLIED)

    def attributes(self, node: int) -> tuple[int, int, int, int, int, int]:
        """mode, uid, gid, place of the xattrs, seconds (as 64 bits without a sign) and nanoseconds of mtime."""
        return ATTRIBUTES.unpack_from(self.nodes.data, node * NODE_BYTES)

    def clear_time(self, node: int) -> None:
        self.nodes.data[node * NODE_BYTES + 16 : node * NODE_BYTES + 28] = bytes(12)

    def xattrs_at(self, place: int) -> Xattrs:
        """The xattrs at a place that `attributes` gave; place 0: none. Equal sets mostly share a place."""
        found = self._xattrs_at.get(place)
        if found is None:
            if len(self._xattrs_at) > CACHED_XATTRS:
                self._xattrs_at = {0: ()}
            start = place * 8 + 4
            size = self._texts.words[place * 2]
            found = self._xattrs_at[place] = marshal.loads(self._texts.data[start : start + size])  # our own bytes
        return found

    def size(self, node: int) -> int:
        return self.nodes.quads[node * 8 + SIZE // 2]

    def set_size(self, directory: int, size: int) -> None:
        self.nodes.quads[directory * 8 + SIZE // 2] = size

    def rdev(self, node: int) -> int:
        return self.nodes.quads[node * 8 + DATA // 2]

    def target(self, node: int) -> bytes:
        """The target of a symbolic link, or the path that a link into lower layers names."""
        start = self.nodes.quads[node * 8 + DATA // 2]
        return bytes(self._texts.data[start : start + self.nodes.quads[node * 8 + SIZE // 2]])

    def table(self, node: int) -> ChunkTable:
        return self.tables[self.nodes.words[node * 16 + EXTRA]]

    def chunks(self, node: int) -> Sequence[int]:
        """A file's chunk numbers in its table."""
        count, start = self.nodes.words[node * 16 + COUNT], self.nodes.quads[node * 8 + DATA // 2]
        if count == 1:
            return (start,)
        return self._pool.words[start : start + count] if count else ()

    def chunk_count(self, node: int) -> int:
        return self.nodes.words[node * 16 + COUNT]

    @property
    def node_count(self) -> int:
        """One more than the largest node number."""
        return self._node_count

    def clear_numbers(self) -> None:
        """Sets the numbers that a writer keeps in the nodes to 0."""
        words = self.nodes.words
        for base in range(0, self._node_count * 16, 16):
            words[base + INO] = words[base + NID] = words[base + NLINK] = 0
            if not base % (16 * RELIEVE_EVERY):
                relieve()

    # ---- names
    def _hash(self, directory: int, name: bytes) -> int:
        # Python's hash of bytes is keyed: an attacker cannot choose names that collide.
        return (hash(name) ^ directory * 0x9E3779B1) & 0xFFFFFFFF

    def _find_entry(self, directory: int, name: bytes, hashed: int) -> int:
        words = self._entries.words
        buckets = self._buckets.words
        entry = buckets[hashed & len(buckets) - 1]
        while entry:
            base = entry * 8
            if words[base + HASH] == hashed and words[base + PARENT] == directory and self._name(base) == name:
                return entry
            entry = words[base + CHAIN]
        return 0

    def _name(self, base: int) -> bytes:
        start = self._entries.quads[(base + TEXT) // 2]
        return bytes(self._texts.data[start : start + self._entries.words[base + LENGTH]])

    def find(self, directory: int, name: bytes) -> int:
        """The node under a name; 0: none."""
        entry = self._find_entry(directory, name, self._hash(directory, name))
        return self._entries.words[entry * 8 + NODE] if entry else 0

    def link(self, directory: int, name: bytes, node: int) -> None:
        """Gives a node a name in a directory; replaces the node that had the name."""
        nodes, own = self.nodes.words, directory * 16
        if nodes[node * 16] >> 12 == DIRECTORY:
            nodes[node * 16 + DATA + 1] = directory
            nodes[own + EXTRA] |= FLAG_SUBDIRS
        nodes[node * 16 + NLINK] += 1
        hashed = (hash(name) ^ directory * 0x9E3779B1) & 0xFFFFFFFF
        entry = self._find_entry(directory, name, hashed)
        if entry:
            self._entries.words[entry * 8 + NODE] = node
            return
        entry = self._entry_count
        end = (entry + 1) * ENTRY_BYTES
        if end > len(self._entries.data):
            self._entries.reserve(end)
        self._entry_count = entry + 1
        if entry > len(self._buckets.words):
            self._grow_buckets()
        words, base = self._entries.words, entry * 8
        words[base + PARENT], words[base + NODE], words[base + LENGTH] = directory, node, len(name)
        self._entries.quads[(base + TEXT) // 2] = self._texts.append(name)
        buckets = self._buckets.words
        slot = hashed & len(buckets) - 1
        words[base + HASH], words[base + CHAIN] = hashed, buckets[slot]
        buckets[slot] = entry
        words[base + NEXT] = nodes[own + DATA]
        nodes[own + DATA] = entry
        nodes[own + COUNT] += 1
        nodes[own + EXTRA] &= ~FLAG_SORTED

    def _grow_buckets(self) -> None:
        self._buckets.reserve(2 * len(self._buckets.data))
        buckets, words = self._buckets.words, self._entries.words
        self._buckets.data[:] = bytes(len(self._buckets.data))
        mask = len(buckets) - 1
        for base in range(8, self._entry_count * 8 - 8, 8):
            if words[base + NODE]:
                slot = words[base + HASH] & mask
                words[base + CHAIN] = buckets[slot]
                buckets[slot] = base >> 3

    def unlink(self, directory: int, name: bytes) -> None:
        """Removes a name, if the directory has it."""
        hashed = self._hash(directory, name)
        entry = self._find_entry(directory, name, hashed)
        if entry:
            self._drop(directory, entry)

    def _drop(self, directory: int, entry: int) -> None:
        words, buckets = self._entries.words, self._buckets.words
        slot = words[entry * 8 + HASH] & len(buckets) - 1
        at = buckets[slot]
        if at == entry:
            buckets[slot] = words[entry * 8 + CHAIN]
        else:
            while words[at * 8 + CHAIN] != entry:
                at = words[at * 8 + CHAIN]
            words[at * 8 + CHAIN] = words[entry * 8 + CHAIN]
        words[entry * 8 + NODE] = 0  # it stays in the directory's list, where it is passed over
        self.nodes.words[directory * 16 + COUNT] -= 1

    def clear(self, directory: int) -> None:
        """Removes all names of a directory."""
        words = self._entries.words
        entry = self.nodes.words[directory * 16 + DATA]
        while entry:
            if words[entry * 8 + NODE]:
                self._drop(directory, entry)
            entry = words[entry * 8 + NEXT]
        self.nodes.words[directory * 16 + DATA] = 0

    def child_count(self, directory: int) -> int:
        return self.nodes.words[directory * 16 + COUNT]

    def parent(self, directory: int) -> int:
        """The directory that a directory is in; 0 for the root."""
        return self.nodes.words[directory * 16 + DATA + 1]

    def children(self, directory: int) -> Iterator[int]:
        """The nodes of a directory, once for each name. Names added meanwhile may or may not be among them."""
        words = self._entries.words
        entry = self.nodes.words[directory * 16 + DATA]
        while entry:
            node = words[entry * 8 + NODE]
            if node:
                yield node
            entry = words[entry * 8 + NEXT]

    def names(self, directory: int) -> Iterator[tuple[bytes, int]]:
        """The names of a directory and their nodes, in order if it is sorted. No name may be added meanwhile."""
        words, quads, texts = self._entries.words, self._entries.quads, self._texts.data
        entry = self.nodes.words[directory * 16 + DATA]
        while entry:
            base = entry * 8
            node = words[base + NODE]
            if node:
                start = quads[entry * 4 + TEXT // 2]
                yield bytes(texts[start : start + words[base + LENGTH]]), node
            entry = words[base + NEXT]

    def measure_names(self, directory: int) -> int:
        """Bytes of all names of a directory."""
        words, total = self._entries.words, 0
        entry = self.nodes.words[directory * 16 + DATA]
        while entry:
            base = entry * 8
            if words[base + NODE]:
                total += words[base + LENGTH]
            entry = words[base + NEXT]
        return total

    def sort(self, directory: int) -> None:
        """Puts a directory's names in the order of their bytes."""
        own = directory * 16
        if self.nodes.words[own + EXTRA] & FLAG_SORTED:
            return
        words = self._entries.words
        keys = []
        entry = self.nodes.words[own + DATA]
        while entry:
            if words[entry * 8 + NODE]:
                # One object a name; no name holds a NUL, so the number behind it does not change the order.
                keys.append(self._name(entry * 8) + b"\0" + entry.to_bytes(4, "big"))
            entry = words[entry * 8 + NEXT]
        keys.sort()
        following = 0
        for key in reversed(keys):
            entry = int.from_bytes(key[-4:], "big")
            words[entry * 8 + NEXT] = following
            following = entry
        self.nodes.words[own + DATA] = following
        self.nodes.words[own + EXTRA] |= FLAG_SORTED

    def walk_directories(self, start: int = ROOT) -> Iterator[int]:
        """Every directory, parents first, sub-directories in the order of the names; not recursive. The caller may
        sort a directory that was yielded before it goes on."""
        stack = array("I", [start])
        visited = 0
        while stack:
            directory = stack.pop()
            yield directory
            visited += 1 + self.nodes.words[directory * 16 + COUNT]
            if visited >= RELIEVE_EVERY:
                visited = 0
                relieve()
            if self.nodes.words[directory * 16 + EXTRA] & FLAG_SUBDIRS:
                nodes = self.nodes.words
                subdirs = array("I", (node for node in self.children(directory) if nodes[node * 16] >> 12 == DIRECTORY))
                subdirs.reverse()
                stack.extend(subdirs)

    def find_path(self, path: bytes) -> int:
        """The node at a path of plain names; symbolic links are not followed. 0: none."""
        node = ROOT
        for name in path.split(b"/"):
            if not name or name == b".":
                continue
            node = self.find(node, name) if self.is_directory(node) else 0
            if not node:
                return 0
        return node

    def list_paths(self, start: int = ROOT, path: bytes = b"") -> Iterator[tuple[bytes, int]]:
        """Every name below start, a directory at path, with its own path, parents first; hard links come once for each
        name. Directories must be sorted for them to come in order."""
        stack: list[tuple[bytes, int]] = [(path, start)]
        while stack:
            path, directory = stack.pop()
            subdirs = []
            for name, node in self.names(directory):
                child_path = path + b"/" + name
                yield child_path, node
                if self.is_directory(node):
                    subdirs.append((child_path, node))
            stack.extend(reversed(subdirs))
