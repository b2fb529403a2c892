"""The tree as a guest sees it: the records of tests/tree_listing.py, made of FUSE replies."""

import errno
import hashlib
import stat
from collections.abc import Iterator
from typing import Any

from tests.tree_listing import KINDS
from virtiofsd_nydus.fakeguest.fuse_client import ROOT, Attr, FuseClient

Record = dict[str, Any]
READ_BYTES = 131072
NO_XATTRS = (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOSYS)


def list_tree(fuse: FuseClient, types: bool = True) -> Iterator[Record]:
    """All entries from the root down, files read whole. types: directories must tell what kind their entries are."""
    pending = [(b".", ROOT, fuse.getattr(ROOT))]
    while pending:
        name, node, attr = pending.pop()
        record = describe_node(fuse, name, node, attr)
        yield record
        if record["kind"] == "dir":
            below = []
            for entry in fuse.readdir(node, size=32768):
                if entry.name in (b".", b".."):
                    continue
                # Half of what a guest knows comes from READDIRPLUS, half from LOOKUP
                found = entry.entry if entry.entry and len(below) % 2 else fuse.lookup(node, entry.name)
                if (types or entry.type) and entry.type != stat.S_IFMT(found.attr.mode) >> 12:
                    raise AssertionError(f"{entry.name!r}: d_type {entry.type}, mode {found.attr.mode:o}")
                path = entry.name if name == b"." else name + b"/" + entry.name
                below.append((path, found.nodeid, found.attr))
            pending += sorted(below, reverse=True)


def describe_node(fuse: FuseClient, name: bytes, node: int, attr: Attr) -> Record:
    kind = KINDS[stat.S_IFMT(attr.mode)]
    seconds = attr.mtime - (1 << 64 if attr.mtime >> 63 else 0)
    record: Record = {
        "path": name.decode(errors="surrogateescape"),
        "kind": kind,
        "mode": stat.S_IMODE(attr.mode),
        "uid": attr.uid,
        "gid": attr.gid,
        "mtime_ns": seconds * 1_000_000_000 + attr.mtime_nsec,
    }
    if kind != "dir":
        record["nlink"] = attr.nlink
    if kind in ("file", "symlink"):
        record["size"] = attr.size
    if kind in ("char", "block"):  # the kernel's new_encode_dev
        record["rdev"] = [attr.rdev >> 8 & 0xFFF, attr.rdev & 0xFF | attr.rdev >> 12 & 0xFFF00]
    if kind == "symlink":
        record["target"] = fuse.readlink(node).decode(errors="surrogateescape")
    elif kind == "file":
        record["sha256"] = hashlib.sha256(fuse.read_all(node, READ_BYTES)).hexdigest()
    try:
        names = fuse.listxattr(node)
    except OSError as error:
        if error.errno not in NO_XATTRS:
            raise
        names = []
    record["xattrs"] = {key.decode(): fuse.getxattr(node, key).hex() for key in sorted(names)}
    return record


def differences(expected: list[Record], found: list[Record], limit: int = 10) -> list[str]:
    """What two lists of records do not agree on, a line each; empty when they are the same tree."""
    left, right = {r["path"]: r for r in expected}, {r["path"]: r for r in found}
    lines = [f"missing: {path!r}" for path in left.keys() - right.keys()]
    lines += [f"too much: {path!r}" for path in right.keys() - left.keys()]
    if len(right) != len(found):
        lines.append("a path came twice")
    for path in left.keys() & right.keys():
        for key in left[path].keys() | right[path].keys():
            want, got = left[path].get(key), right[path].get(key)
            if want != got:
                lines.append(f"{path!r}: {key} is {str(got)[:80]}, not {str(want)[:80]}")
    return sorted(lines)[:limit]
