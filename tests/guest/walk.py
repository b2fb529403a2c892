"""Prints what a tree shows, an entry a line, sorted: run on the host on one tree and in a guest on another, the outputs
must be equal. Standard library only; a guest runs it with `python3 -c`.

    walk.py ROOT [DIRECTORY...]     walks only these directories of the root, if any are named
"""
# ruff: noqa: PTH115, PTH118, PTH208
# Names are bytes here, which pathlib does not do.

import hashlib
import json
import os
import stat
import sys

root = os.fsencode(sys.argv[1])


def describe(path: bytes) -> dict[str, object]:
    info = os.lstat(path)
    kind = stat.S_IFMT(info.st_mode)
    entry: dict[str, object] = {
        "mode": oct(info.st_mode), "owner": [info.st_uid, info.st_gid], "mtime_ns": info.st_mtime_ns,
        "xattrs": {name: os.getxattr(path, name, follow_symlinks=False).hex()
                   for name in sorted(os.listxattr(path, follow_symlinks=False))}}
    if kind != stat.S_IFDIR:        # a directory's size and link count are the file system's own affair
        entry["links"] = info.st_nlink
    if kind in (stat.S_IFREG, stat.S_IFLNK):
        entry["size"] = info.st_size
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        entry["device"] = [os.major(info.st_rdev), os.minor(info.st_rdev)]
    if kind == stat.S_IFLNK:
        entry["target"] = os.readlink(path).hex()
    if kind == stat.S_IFREG:
        with open(path, "rb") as stream:
            entry["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    return entry


def walk(relative: bytes, device: int) -> None:
    path = os.path.join(root, relative) if relative else root
    print(json.dumps([os.fsdecode(b"/" + relative), describe(path)]))
    for name in sorted(os.listdir(path)):
        below = os.path.join(relative, name)
        info = os.lstat(os.path.join(root, below))
        if stat.S_ISDIR(info.st_mode) and info.st_dev == device:
            walk(below, device)
        else:
            print(json.dumps([os.fsdecode(b"/" + below), describe(os.path.join(root, below))]))


for start in sys.argv[2:] or [""]:
    walk(os.fsencode(start).strip(b"/"), os.lstat(root).st_dev)
