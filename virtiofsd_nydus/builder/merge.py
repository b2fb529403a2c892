"""Layers on top of each other, as OCI images stack them: whiteouts, opaque directories, replacement."""

import stat
from collections.abc import Sequence

from virtiofsd_nydus.builder.source_tar import resolve_directory
from virtiofsd_nydus.builder.tar_stream import show
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs.chunktable import FOREIGN_BASE, ChunkTable, DigestIndex
from virtiofsd_nydus.rafs.nodes import REGULAR, ROOT
from virtiofsd_nydus.rafs.spill import RELIEVE_EVERY, relieve
from virtiofsd_nydus.rafs.tree import Tree

WHITEOUT_PREFIX = b".wh."
OPAQUE_NAME = b".wh..wh..opq"


def merge_trees(
    trees: Sequence[Tree], labels: Sequence[str] = (), *, keep: bool = True, directory: str | None = None
) -> Tree:
    """The file system that layers make, lowest first, as a tree of its own, so that the layers can be merged again with
    others. labels name the layers in errors. keep: False makes the lowest layer's tree the result, which saves a copy.
    directory: for the tree's files."""
    first = 0
    if not keep and trees and not trees[0].lower_links and all(tree is not trees[0] for tree in trees[1:]):
        root, first = trees[0], 1
        _drop_whiteouts(root)
    else:
        root = Tree(directory)
    for number in range(first, len(trees)):
        label = labels[number] if number < len(labels) and labels[number] else f"layer {number + 1}"
        _Merge(root, trees[number], label).apply()
    return root


def list_lower_links(tree: Tree) -> list[tuple[int, bytes, int]]:
    """Every name of a layer that is a hard link into the layers below: its directory, itself, its node."""
    if not tree.lower_links:
        return []
    return [
        (directory, name, node)
        for directory in tree.walk_directories()
        for name, node in tree.names(directory)
        if not tree.mode(node)
    ]


def _drop_whiteouts(tree: Tree) -> None:
    """Removes the whiteouts of the lowest layer: nothing is below it."""
    for directory in tree.walk_directories():
        for name in [name for name, _ in tree.names(directory) if name.startswith(WHITEOUT_PREFIX)]:
            tree.unlink(directory, name)


class _Merge:
    """Puts one layer on the tree of the layers below."""

    def __init__(self, lower: Tree, upper: Tree, label: str) -> None:
        self._lower = lower
        self._upper = upper
        self._taken: dict[int, int] = {}  # nodes of the layer that have several names -> their copies
        self._find_lower_targets(label)

    def _find_lower_targets(self, label: str) -> None:
        """Finds the inodes that this layer's links into the layers below share. It runs before the layer changes
        anything. A target in the layer itself was found when the layer was read."""
        lower = self._lower
        for _, name, link in list_lower_links(self._upper):
            if name.startswith(WHITEOUT_PREFIX):
                continue
            path = self._upper.target(link)
            parts = path.split(b"/")
            try:
                parent = resolve_directory(lower, parts[:-1], create=False)
            except Failure as failure:
                raise Failure(f"{label}: {show(name)}: {failure}", failure.cause) from None
            target = lower.find(parent, parts[-1]) if parent else 0
            if not target or lower.is_directory(target):
                why = "a directory" if target else "neither in this layer nor below"
                raise Failure(f"{label}: {show(name)}: hard link to {show(path)}, which is {why}", Cause.FORMAT)
            self._taken[link] = target

    def _take(self, node: int) -> int:
        """Copies a node of the layer into the tree below."""
        taken = self._taken.get(node)
        if taken is None:
            taken = self._lower.copy_node(self._upper, node)
            if self._upper.link_count(node) > 1:
                self._taken[node] = taken
        return taken

    def apply(self) -> None:
        lower, upper = self._lower, self._upper
        if not upper.is_implied(ROOT):
            lower.copy_attributes(ROOT, upper, ROOT)
        stack: list[tuple[int, int, tuple[bytes, ...]]] = [(ROOT, ROOT, ())]
        visited = 0
        while stack:
            below, above, path = stack.pop()
            # Whiteouts first: they speak of the layers below only, wherever they stand in the tar.
            if upper.find(above, OPAQUE_NAME):
                lower.clear(below)
            for name, _ in upper.names(above):
                if name.startswith(WHITEOUT_PREFIX):
                    lower.unlink(below, name[len(WHITEOUT_PREFIX) :])
            for name, child in upper.names(above):
                visited += 1
                if not visited % RELIEVE_EVERY:
                    relieve()
                if name.startswith(WHITEOUT_PREFIX):
                    continue
                if not upper.is_directory(child):
                    lower.link(below, name, self._take(child))
                    continue
                target = self._find_target(below, child, name, path)
                if not target:
                    target = lower.copy_node(upper, child)
                    lower.link(below, name, target)
                elif not upper.is_implied(child):
                    lower.copy_attributes(target, upper, child)
                stack.append((target, child, (*path, name)))

    def _find_target(self, below: int, child: int, name: bytes, path: tuple[bytes, ...]) -> int:
        """The directory below that an upper one comes to lie on; 0: none. A directory that no entry of the layer
        describes is only a way to its children: where the lower layers have a symbolic link to a directory there, the
        way leads through it."""
        lower = self._lower
        old = lower.find(below, name)
        if old and lower.is_directory(old):
            return old
        if old and stat.S_ISLNK(lower.mode(old)) and self._upper.is_implied(child):
            return resolve_directory(lower, [*path, name], create=False)
        return 0


class ChunkChoice:
    """Which of several equal chunks an image uses: the dictionary's, else the one of the lowest layer among those its
    files refer to."""

    def __init__(self, tree: Tree, tables: Sequence[ChunkTable], dictionary: Sequence[ChunkTable] = ()) -> None:
        """tables: of the layers, lowest first; they count before the dictionary's in what this tells. used: whether the
        image needs a table's blob; moved: id(table) -> chunk -> (table, chunk) it uses instead."""
        every = [*tables, *dictionary]
        order = {id(table): number for number, table in enumerate(every)}
        needed = [bytearray(len(table)) for table in every]
        foreign: set[tuple[int, int]] = set()
        for directory in tree.walk_directories():
            for child in tree.children(directory):
                if tree.kind(child) == REGULAR and tree.chunk_count(child):
                    number = order[id(tree.table(child))]
                    marks = needed[number]
                    for chunk in tree.chunks(child):
                        if chunk < FOREIGN_BASE:
                            marks[chunk] = 1
                        else:
                            foreign.add((number, chunk))
        self.used = [False] * len(every)
        self.moved: dict[int, dict[int, tuple[int, int]]] = {}
        for number, chunk in foreign:
            table, index = every[number].locate(chunk)
            place = order[id(table)], index
            needed[place[0]][index] = 1
            self.moved.setdefault(id(every[number]), {})[chunk] = place
        # A number stands for a table and a chunk of it.
        first = DigestIndex(lambda number: _chunk_key(every[number >> 24], number & 0xFFFFFF))
        several = sum(1 for marks in needed if any(marks)) > 1
        for number in (*range(len(tables), len(every)), *range(len(tables))):
            table, marks = every[number], needed[number]
            if not several or number >= len(tables):
                self.used[number] = any(marks)
                if not several:
                    continue
            moved: dict[int, tuple[int, int]] = {}
            for chunk, mark in enumerate(marks):
                if not mark:
                    continue
                key = _chunk_key(table, chunk)
                found = first.find(key)
                if found is None:
                    first.add(key, number << 24 | chunk)
                if found is None or found >> 24 == number or number >= len(tables):
                    self.used[number] = True
                else:
                    moved[chunk] = found >> 24, found & 0xFFFFFF
                if not chunk % RELIEVE_EVERY:
                    relieve()
            if moved:
                self.moved.setdefault(id(table), {}).update(moved)


def _chunk_key(table: ChunkTable, index: int) -> bytes:
    """Two chunks with this key are equal: digest and size."""
    return table.digest(index) + table.usize(index).to_bytes(4, "little")
