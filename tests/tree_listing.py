"""What a tree holds, one JSON object a line: all that two file systems with the same image must agree on.

    python3 tree_listing.py DIR

Standard library alone, so that the same file runs on the host and inside a guest. What may differ between file systems
is left out: inode numbers, sizes and link counts of directories, times other than mtime.
"""

# Paths are bytes here, which pathlib does not take
# ruff: noqa: PTH115, PTH118, PTH208
import errno
import hashlib
import json
import os
import stat
import sys

KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
READ_BYTES = 1 << 20


def describe_entry(path, name):
    """The record of one entry; path and name are bytes, name is relative to the root ('.' is the root itself)."""
    status = os.lstat(path)
    kind = KINDS[stat.S_IFMT(status.st_mode)]
    record = {
        "path": os.fsdecode(name),
        "kind": kind,
        "mode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mtime_ns": status.st_mtime_ns,
    }
    if kind != "dir":
        record["nlink"] = status.st_nlink
    if kind in ("file", "symlink"):
        record["size"] = status.st_size
    if kind in ("char", "block"):
        record["rdev"] = [os.major(status.st_rdev), os.minor(status.st_rdev)]
    if kind == "symlink":
        record["target"] = os.fsdecode(os.readlink(path))
    elif kind == "file":
        record["sha256"] = hash_file(path)
    record["xattrs"] = {
        os.fsdecode(key): os.getxattr(path, key, follow_symlinks=False).hex()
        for key in sorted(map(os.fsencode, list_xattrs(path)))
    }
    return record


def list_xattrs(path):
    """Names of extended attributes; none where the file system has no such thing."""
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return []
        raise


def hash_file(path):
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while True:
            piece = stream.read(READ_BYTES)
            if not piece:
                return digest.hexdigest()
            digest.update(piece)


def list_tree(root):
    """Records of root and all below it, in the order of names; what other file systems are mounted on shows as empty
    directories."""
    device = os.lstat(root).st_dev
    pending = [b"."]
    while pending:
        name = pending.pop()
        path = os.fsencode(root) if name == b"." else os.path.join(os.fsencode(root), name)
        record = describe_entry(path, name)
        yield record
        if record["kind"] == "dir" and os.lstat(path).st_dev == device:
            below = [entry if name == b"." else name + b"/" + entry for entry in os.listdir(path)]
            pending += sorted(below, reverse=True)


def main(argv):
    if len(argv) != 2:
        print("usage: tree_listing.py DIR", file=sys.stderr)
        return 2
    for record in list_tree(argv[1]):
        print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
