"""Layers on top of each other, as OCI images stack them: whiteouts, opaque directories, replacement."""

from collections.abc import Mapping, Sequence

from virtiofsd_nydus.build.source_tar import resolve_directory
from virtiofsd_nydus.build.tar_stream import show
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs.tree import (
    FOREIGN_BASE,
    ChunkTable,
    Directory,
    Inode,
    LowerLink,
    RegularFile,
    Symlink,
    walk_directories,
)

WHITEOUT_PREFIX = b".wh."
OPAQUE_NAME = b".wh..wh..opq"


def merge_trees(trees: Sequence[Directory], labels: Sequence[str] = (), *, keep: bool = True) -> Directory:
    """The file system that layers make, lowest first. The result shares inodes with the layers (a file keeps its hard
    links, nothing is copied) but no directories, so the layers can be merged again with others. labels name the layers
    in errors. keep: False empties the layers' directories as they are taken over."""
    root = Directory(implied=True)
    for number, tree in enumerate(trees):
        label = labels[number] if number < len(labels) and labels[number] else f"layer {number + 1}"
        _apply_layer(root, tree, _find_lower_targets(root, tree, label), keep)
    return root


def list_lower_links(tree: Directory) -> list[tuple[Directory, bytes, LowerLink]]:
    """Every name of a layer that is a hard link into the layers below, with its directory."""
    return [(directory, name, child) for directory in walk_directories(tree)
            for name, child in directory.children.items() if isinstance(child, LowerLink)]  # fmt: skip


def _find_lower_targets(root: Directory, tree: Directory, label: str) -> dict[int, Inode]:
    """id(link) -> the inode it shares. Looked up before the layer changes anything: what the layer itself holds under
    the target's name was looked at when the layer was read."""
    found: dict[int, Inode] = {}
    for _, name, link in list_lower_links(tree):
        if name.startswith(WHITEOUT_PREFIX):
            continue
        try:
            parent = resolve_directory(root, list(link.target[:-1]), create=False)
        except Failure as failure:
            raise Failure(f"{label}: {show(name)}: {failure}", failure.cause) from None
        target = parent.children.get(link.target[-1]) if parent is not None else None
        if target is None or isinstance(target, Directory):
            why = "a directory" if target is not None else "neither in this layer nor below"
            raise Failure(f"{label}: {show(name)}: hard link to {show(b'/'.join(link.target))}, which is {why}",
                          Cause.FORMAT)  # fmt: skip
        found[id(link)] = target
    return found


def _apply_layer(root: Directory, upper_root: Directory, linked: Mapping[int, Inode], keep: bool) -> None:
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
                lower.children[name] = linked.get(id(child), child)
                continue
            target = _find_target(root, lower, child, name, path)
            if target is None:
                target = lower.children[name] = Directory()
                target.copy_attributes(child)
            elif not child.implied:
                target.copy_attributes(child)
            stack.append((target, child, (*path, name)))
        if not keep:
            upper.children = {}


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
    """Which of several equal chunks an image uses: the dictionary's, else the one of the lowest layer among those its
    files refer to."""

    def __init__(self, root: Directory, tables: Sequence[ChunkTable], dictionary: Sequence[ChunkTable] = ()) -> None:
        """tables: of the layers, lowest first; they count before the dictionary's in what this tells. used: whether the
        image needs a table's blob; moved: id(table) -> chunk -> (table, chunk) it uses instead."""
        every = [*tables, *dictionary]
        order = {id(table): number for number, table in enumerate(every)}
        needed = [bytearray(len(table)) for table in every]
        foreign: set[tuple[int, int]] = set()
        for directory in walk_directories(root):
            for child in directory.children.values():
                if isinstance(child, RegularFile) and child.chunks:
                    number = order[id(child.table)]
                    marks = needed[number]
                    for chunk in child.chunks:
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
        first: dict[tuple[bytes, int], tuple[int, int]] = {}
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
                place = first.setdefault((table.digest(chunk), table.usizes[chunk]), (number, chunk))
                if place[0] == number or number >= len(tables):
                    self.used[number] = True
                else:
                    moved[chunk] = place
            if moved:
                self.moved.setdefault(id(table), {}).update(moved)
