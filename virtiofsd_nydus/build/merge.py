"""Layers on top of each other, as OCI images stack them: whiteouts, opaque directories, replacement."""

from collections.abc import Sequence

from virtiofsd_nydus.build.source_tar import resolve_directory
from virtiofsd_nydus.rafs.tree import ChunkTable, Directory, RegularFile, Symlink, walk_directories

WHITEOUT_PREFIX = b".wh."
OPAQUE_NAME = b".wh..wh..opq"


def merge_trees(trees: Sequence[Directory]) -> Directory:
    """The file system that layers make, lowest first. The result shares inodes with the layers (a file keeps its hard
    links, nothing is copied) but no directories, so the layers can be merged again with others."""
    root = Directory(implied=True)
    for tree in trees:
        _apply_layer(root, tree)
    return root


def _apply_layer(root: Directory, upper_root: Directory) -> None:
    if not upper_root.implied:
        root.copy_attributes(upper_root)
    stack: list[tuple[Directory, Directory, tuple[bytes, ...]]] = [(root, upper_root, ())]
    while stack:
        lower, upper, path = stack.pop()
        # Whiteouts first: they speak of the layers below only, wherever they stand in the tar.
        if OPAQUE_NAME in upper.children:
            lower.children.clear()
        for name in upper.children:
            if name.startswith(WHITEOUT_PREFIX):
                lower.children.pop(name[len(WHITEOUT_PREFIX) :], None)
        for name, child in upper.children.items():
            if name.startswith(WHITEOUT_PREFIX):
                continue
            if not isinstance(child, Directory):
                lower.children[name] = child
                continue
            target = _find_target(root, lower, child, name, path)
            if target is None:
                target = lower.children[name] = Directory()
                target.copy_attributes(child)
            elif not child.implied:
                target.copy_attributes(child)
            stack.append((target, child, (*path, name)))


def _find_target(
    root: Directory, lower: Directory, child: Directory, name: bytes, path: tuple[bytes, ...]
) -> Directory | None:
    """The directory below that an upper one comes to lie on. A directory that no entry of the layer describes is only a
    way to its children: where the lower layers have a symbolic link to a directory there, the way leads through it."""
    old = lower.children.get(name)
    if isinstance(old, Directory):
        return old
    if isinstance(old, Symlink) and child.implied:
        return resolve_directory(root, [*path, name], create=False)
    return None


class ChunkChoice:
    """Which of several equal chunks an image uses: the one of the lowest layer among those its files refer to."""

    def __init__(self, root: Directory, tables: Sequence[ChunkTable]) -> None:
        """tables: of the layers, lowest first. used: whether the image needs a layer's blob; moved: id(table) -> chunk
        -> (layer, chunk) it uses instead."""
        order = {id(table): layer for layer, table in enumerate(tables)}
        needed = [bytearray(len(table)) for table in tables]
        for directory in walk_directories(root):
            for child in directory.children.values():
                if isinstance(child, RegularFile) and child.chunks:
                    marks = needed[order[id(child.table)]]
                    for chunk in child.chunks:
                        marks[chunk] = 1
        first: dict[tuple[bytes, int], tuple[int, int]] = {}
        self.used = [False] * len(tables)
        self.moved: dict[int, dict[int, tuple[int, int]]] = {}
        several = sum(1 for marks in needed if any(marks)) > 1
        for layer, (table, marks) in enumerate(zip(tables, needed, strict=True)):
            if not several:
                self.used[layer] = any(marks)
                continue
            moved: dict[int, tuple[int, int]] = {}
            for chunk, mark in enumerate(marks):
                if not mark:
                    continue
                place = first.setdefault((table.digest(chunk), table.usizes[chunk]), (layer, chunk))
                if place[0] == layer:
                    self.used[layer] = True
                else:
                    moved[chunk] = place
            if moved:
                self.moved[id(table)] = moved
