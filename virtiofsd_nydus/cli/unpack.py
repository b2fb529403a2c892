"""`unpack`: the files of an image as a tar, which extracts to the tree the image shows. All data is read and verified
by the engine, over a cache that is thrown away."""

import argparse
import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from virtiofsd_nydus.arguments import add_data_arguments
from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.oci.locate import locate
from virtiofsd_nydus.reader.data import opened_with_data

if TYPE_CHECKING:
    from virtiofsd_nydus.builder.tar_writer import TarWriter
    from virtiofsd_nydus.reader.bootstrap import Attr, Bootstrap, Entry

READ_BYTES = 4 << 20
KINDS = {
    stat.S_IFREG: b"0", stat.S_IFLNK: b"2", stat.S_IFCHR: b"3", stat.S_IFBLK: b"4", stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser, "unpack all of it")
    parser.add_argument("--output", required=True, metavar="TAR", help="tar to write; - is standard output")


def run(args: argparse.Namespace) -> int:
    located = locate(args)
    source = located.source
    if source is None:
        raise UsageFailure("say where the blobs are: either --blob-dir or --config")
    with opened_with_data(located.bootstrap, source, args.blob_id, args.allow_unverified, located.work_dir) as image:
        try:
            with open_output(args.output) as out:
                skipped = unpack_image(image, out)
        except BrokenPipeError:
            raise Failure(f"{args.output}: the reader of the tar has gone away", Cause.IO) from None
        except OSError as error:
            cause = Cause.SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else Cause.IO
            raise Failure(f"{args.output}: {error.strerror}", cause) from error
    for path in skipped:
        print(f"{path}: a socket, which a tar cannot hold, is left out", file=sys.stderr)
    return 0


@contextmanager
def open_output(name: str) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole, or standard output."""
    if name == "-":
        yield sys.stdout.buffer
        return
    path = Path(name)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb", buffering=1 << 20) as out:
            yield out
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def unpack_image(
    image: "Bootstrap", out: BinaryIO, leave_out: "Callable[[Entry], bool]" = lambda entry: False
) -> list[str]:
    """Writes every entry that is not to be left out, each directory right before what is in it (tar restores a
    directory's time when it meets the first name outside); returns the sockets' paths. Failure when something cannot
    be read."""
    from virtiofsd_nydus.builder.tar_writer import TarWriter

    tar = TarWriter(out)
    skipped: list[str] = []
    first: dict[int, bytes] = {}  # inode -> the name its data came under
    for entry in walk_depth_first(image):
        if leave_out(entry):
            continue
        kind = KINDS.get(stat.S_IFMT(entry.attr.mode))
        if kind is None:
            skipped.append(entry.path)
            continue
        try:
            _add_entry(image, tar, entry, kind, first)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise Failure(f"{image.path}: {entry.path} cannot be read: {error.strerror}", Cause.IO) from error
    tar.close()
    return skipped


def read_time(attr: "Attr") -> int:
    """The mtime in nanoseconds; the field is 64 bits without a sign, times before 1970 are in its upper half."""
    return attr.mtime_ns - (1 << 64) * 1_000_000_000 if attr.mtime_s >> 63 else attr.mtime_ns


def walk_depth_first(image: "Bootstrap") -> Iterator["Entry"]:
    """Every name. Failure (FORMAT) when a directory is in the tree twice."""
    from virtiofsd_nydus.reader.bootstrap import Entry

    root = image.root_ino
    yield Entry("/", image.getattr(root))
    seen = {root}
    stack = [("", iter(image.listdir(root)))]
    while stack:
        parent, names = stack[-1]
        one = next(names, None)
        if one is None:
            stack.pop()
            continue
        path = f"{parent}/{one.name}"
        attr = image.getattr(one.ino)
        yield Entry(path, attr)
        if stat.S_ISDIR(attr.mode):
            if one.ino in seen:
                raise Failure(f"{image.path}: directory {path} is in the tree twice", Cause.FORMAT)
            seen.add(one.ino)
            stack.append((path, iter(image.listdir(one.ino))))


def _add_entry(image: "Bootstrap", tar: "TarWriter", entry: "Entry", kind: bytes, first: dict[int, bytes]) -> None:
    from virtiofsd_nydus.builder.tar_writer import TarMember

    attr = entry.attr
    name = b"." + os.fsencode(entry.path)
    if kind == b"5" and name != b"./":
        name += b"/"
    link = first.get(attr.ino, b"") if kind != b"5" else b""
    if link:
        kind = b"1"
    elif kind == b"2":
        link = os.fsencode(image.readlink(attr.ino))
    if attr.nlink > 1 and kind not in (b"1", b"5"):
        first[attr.ino] = name
    device = (os.major(attr.os_device), os.minor(attr.os_device)) if kind in (b"3", b"4") else (0, 0)
    size = attr.size_bytes if kind == b"0" else 0
    xattrs = [] if kind == b"1" else [(os.fsencode(key), value) for key, value in image.xattrs(attr.ino).items()]
    tar.add(
        TarMember(
            name=name,
            kind=kind,
            mode=stat.S_IMODE(attr.mode),
            uid=attr.uid,
            gid=attr.gid,
            mtime_ns=read_time(attr),
            size=size,
            link=link,
            device=device,
            xattrs=xattrs,
        )
    )
    position = 0
    while position < size:
        data = image.read(attr.ino, position, min(READ_BYTES, size - position))
        if not data:
            raise OSError(errno.EIO, f"ends at {position} of {size} bytes")
        tar.write(data)
        position += len(data)
