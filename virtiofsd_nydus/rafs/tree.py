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
from typing import NamedTuple, Self

from virtiofsd_nydus.rafs.chunktable import ChunkTable
from virtiofsd_nydus.rafs.nodes import FLAG_IMPLIED, FLAG_SORTED, FLAG_SUBDIRS, ROOT, Nodes
from virtiofsd_nydus.rafs.spill import RELIEVE_EVERY, Arena, relieve

Xattrs = tuple[tuple[bytes, bytes], ...]

ENTRY_BYTES = 32
# Words of an entry. TEXT: where the name is in texts, 64 bits.
PARENT, NODE, NEXT, LENGTH, TEXT, HASH, CHAIN = 0, 1, 2, 3, 4, 6, 7
CACHED_XATTRS = 4096


class RegularFile:
    """What gets a file's chunks, in order, while its content goes through the chunker."""

    __slots__ = ("node", "size", "tree")

    def __init__(self, tree: "Tree", node: int, size: int) -> None:
        self.tree = tree
        self.node = node
        self.size = size

    def add_chunk(self, index: int) -> None:
        self.tree.add_chunk(self.node, index)


class Attributes(NamedTuple):
    """What a node is given when it is made."""

    mode: int = 0  # with its type
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    xattrs: Xattrs = ()


PLAIN_DIRECTORY = Attributes(stat.S_IFDIR | 0o755)


class Tree(Nodes):
    """Nodes and their names. directory: where the arenas' files go (default: TMPDIR). tables: the chunk tables of its
    files. The tree takes names and attributes as they are given; the writers check them."""

    def __init__(self, directory: "str | os.PathLike[str] | None" = None) -> None:
        self.tables: list[ChunkTable] = []
        self.lower_links = 0  # nodes made so
        super().__init__(directory)
        self._entries = Arena(directory)
        self._buckets = Arena(directory)
        self._texts = Arena(directory)
        self._pool = Arena(directory)  # chunk numbers of files with several
        self._texts.append(bytes(8))  # so that no place is 0
        self._entry_count = 1
        self._table_numbers: dict[int, int] = {}
        self._xattr_places: dict[Xattrs, int] = {(): 0}
        self._xattrs_at: dict[int, Xattrs] = {0: ()}
        self.make_directory(implied=True)

    # ---- keeping it
    DUMPED = 4  # parts that dump() gives

    def dump(self) -> list[bytes]:
        """The tree of one layer in parts, for restore(). Its chunk table is the caller's to keep."""
        return [
            self.dump_nodes(),
            bytes(self._entries.data[: self._entry_count * ENTRY_BYTES]),
            bytes(self._texts.view()),
            bytes(self._pool.view()),
        ]

    @classmethod
    def restore(
        cls,
        parts: "Sequence[bytes | memoryview]",
        lower_links: int,
        table: ChunkTable,
        directory: "str | os.PathLike[str] | None" = None,
    ) -> Self:
        """A tree of what dump() gave, which must be what this program wrote: it is not checked. table: of its files."""
        nodes, entries, texts, pool = parts
        tree = cls(directory)
        tree.restore_nodes(nodes)
        tree.lower_links = lower_links
        for arena, data in ((tree._texts, texts), (tree._pool, pool)):
            arena.used = 0
            arena.append(memoryview(data))
        tree._entries.reserve(len(entries))
        tree._entries.data[: len(entries)] = entries
        tree._entry_count = len(entries) // ENTRY_BYTES
        tree.tables, tree._table_numbers = [table], {id(table): 0}
        tree._index_names()
        return tree

    def _index_names(self) -> None:
        """Makes the buckets anew: hashes hold for one process only."""
        self._buckets.reserve(4 * self._entry_count)
        self._buckets.data[:] = bytes(len(self._buckets.data))
        words, buckets = self._entries.words, self._buckets.words
        mask = len(buckets) - 1
        for base in range(8, self._entry_count * 8, 8):
            if words[base + NODE]:
                hashed = self._hash(words[base + PARENT], self._name(base))
                words[base + HASH], words[base + CHAIN] = hashed, buckets[hashed & mask]
                buckets[hashed & mask] = base >> 3

    # ---- making nodes
    def _make(self, a: Attributes) -> int:
        place = self._xattr_places.get(a.xattrs)
        if place is None:
            place = self._store_xattrs(a.xattrs)
        return self.add_node(a.mode, a.uid, a.gid, a.mtime_ns, place)

    def _store_xattrs(self, xattrs: Xattrs) -> int:
        if len(self._xattr_places) > CACHED_XATTRS:
            self._xattr_places = {(): 0}
        packed = marshal.dumps(xattrs)
        self._texts.append(bytes(-self._texts.used % 8))
        place = self._texts.append(struct.pack("<I", len(packed)) + packed) >> 3
        self._xattr_places[xattrs] = place
        return place

    def make_directory(self, attributes: Attributes = PLAIN_DIRECTORY, *, implied: bool = False) -> int:
        """implied: no entry of the source describes the directory, but a path needs it; in a merge the other layer's
        attributes win."""
        node = self._make(attributes)
        if implied:
            self.set_flag(node, FLAG_IMPLIED, True)
        return node

    def make_file(self, attributes: Attributes, size: int, table: ChunkTable) -> int:
        """Makes a file. Its chunks are indexes into table, one for each chunk_size bytes of size; add_chunk adds
        them."""
        node = self._make(attributes)
        self.set_file(node, size, self._number_table(table))
        return node

    def _number_table(self, table: ChunkTable) -> int:
        number = self._table_numbers.get(id(table))
        if number is None:
            number = self._table_numbers[id(table)] = len(self.tables)
            self.tables.append(table)
        return number

    def add_chunk(self, node: int, index: int) -> None:
        """The next chunk of a file. Most files have one, which then lies in the node itself."""
        count, place = self.chunk_place(node)
        if not count:
            self.set_chunk_place(node, 1, index)
            return
        pool = self._pool
        if count == 1:
            first, place = place, pool.used // 4
            pool.append(first.to_bytes(4, "little"))
        elif place + count != pool.used // 4:  # another file came between
            moved = bytes(pool.data[4 * place : 4 * (place + count)])
            place = pool.append(moved) // 4
        pool.append(index.to_bytes(4, "little"))
        self.set_chunk_place(node, count + 1, place)

    def make_symlink(self, attributes: Attributes, target: bytes) -> int:
        node = self._make(attributes)
        self._set_target(node, target)
        return node

    def _set_target(self, node: int, target: bytes) -> None:
        self.set_text(node, len(target), self._texts.append(target))

    def make_lower_link(self, target: bytes) -> int:
        """Makes a name that shares the inode of a path in the layers below. Only merging can tell which inode that
        is, so the node has no attributes, not even a type."""
        node = self._make(Attributes())
        self._set_target(node, target)
        self.lower_links += 1
        return node

    def make_special(self, attributes: Attributes, major: int = 0, minor: int = 0) -> int:
        """A device node, FIFO or socket."""
        node = self._make(attributes)
        rdev = minor & 0xFF | major << 8 | (minor & ~0xFF) << 12  # as glibc's low 32 bits
        self.set_rdev(node, rdev & 0xFFFFFFFF)
        return node

    def copy_node(self, other: "Tree", node: int) -> int:
        """Copies a node of another tree into this one; a directory comes without its entries."""
        attributes = other.attributes(node)
        made = self._make(Attributes(xattrs=other.xattrs_at(attributes[3])))
        self.set_attributes(made, attributes, self.xattrs_place(made))
        kind = stat.S_IFMT(attributes[0])
        if kind == stat.S_IFREG:
            self.set_file(made, other.size(node), self._number_table(other.table(node)))
            for chunk in other.chunks(node):
                self.add_chunk(made, chunk)
        elif kind in (stat.S_IFLNK, 0):
            self._set_target(made, other.target(node))
        elif kind == stat.S_IFDIR:
            self.set_flag(made, FLAG_IMPLIED, other.is_implied(node))
        else:
            self.set_rdev(made, other.rdev(node))
        return made

    def copy_attributes(self, directory: int, other: "Tree", node: int) -> None:
        """Copies the attributes of a directory of another tree to one of this tree."""
        attributes = other.attributes(node)
        xattrs = other.xattrs_at(attributes[3])
        found = self._xattr_places.get(xattrs)
        place = self._store_xattrs(xattrs) if found is None else found
        self.set_attributes(directory, attributes, place)
        self.set_flag(directory, FLAG_IMPLIED, other.is_implied(node))

    # ---- reading nodes
    def is_implied(self, directory: int) -> bool:
        """Whether no entry of the source described the directory."""
        return self.has_flag(directory, FLAG_IMPLIED)

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

    def target(self, node: int) -> bytes:
        """The target of a symbolic link, or the path that a link into lower layers names."""
        start = self.text_place(node)
        return bytes(self._texts.data[start : start + self.size(node)])

    def table(self, node: int) -> ChunkTable:
        """The chunk table of a file."""
        return self.tables[self.table_number(node)]

    def chunks(self, node: int) -> Sequence[int]:
        """A file's chunk numbers in its table."""
        count, start = self.chunk_place(node)
        if count == 1:
            return (start,)
        return self._pool.words[start : start + count] if count else ()

    # ---- names
    def _hash(self, directory: int, name: bytes) -> int:
        # Python's hash of bytes is keyed: the author of an image cannot choose names that collide.
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
        """Gives a node a name, which another one may have had."""
        self.note_name(directory, node)
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
        words[base + NEXT] = self.push_entry(directory, entry)

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
        self.drop_entry(directory)

    def clear(self, directory: int) -> None:
        """Removes all names of a directory."""
        words = self._entries.words
        entry = self.first_entry(directory)
        while entry:
            if words[entry * 8 + NODE]:
                self._drop(directory, entry)
            entry = words[entry * 8 + NEXT]
        self.set_first_entry(directory, 0)

    def children(self, directory: int) -> Iterator[int]:
        """The nodes of a directory, once for each name. Names added meanwhile may or may not be among them."""
        words = self._entries.words
        entry = self.first_entry(directory)
        while entry:
            node = words[entry * 8 + NODE]
            if node:
                yield node
            entry = words[entry * 8 + NEXT]

    def names(self, directory: int) -> Iterator[tuple[bytes, int]]:
        """The names of a directory and their nodes, in order if it is sorted. No name may be added meanwhile."""
        words, quads, texts = self._entries.words, self._entries.quads, self._texts.data
        entry = self.first_entry(directory)
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
        entry = self.first_entry(directory)
        while entry:
            base = entry * 8
            if words[base + NODE]:
                total += words[base + LENGTH]
            entry = words[base + NEXT]
        return total

    def sort(self, directory: int) -> None:
        """Puts a directory's names in the order of their bytes."""
        if self.has_flag(directory, FLAG_SORTED):
            return
        words = self._entries.words
        keys = []
        entry = self.first_entry(directory)
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
        self.set_first_entry(directory, following)
        self.set_flag(directory, FLAG_SORTED, True)

    def walk_directories(self, start: int = ROOT) -> Iterator[int]:
        """Every directory, parents first, sub-directories in the order of the names; not recursive. The caller may
        sort a directory that was yielded before it goes on."""
        stack = array("I", [start])
        visited = 0
        while stack:
            directory = stack.pop()
            yield directory
            visited += 1 + self.child_count(directory)
            if visited >= RELIEVE_EVERY:
                visited = 0
                relieve()
            if self.has_flag(directory, FLAG_SUBDIRS):
                subdirs = array("I", filter(self.is_directory, self.children(directory)))
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
