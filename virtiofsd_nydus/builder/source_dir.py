"""A directory of this machine as a tree, its file contents sent to the chunker on the way."""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from virtiofsd_nydus.builder.chunker import Chunker
from virtiofsd_nydus.builder.xattrs import is_kept_xattr
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import Form
from virtiofsd_nydus.rafs.nodes import ROOT
from virtiofsd_nydus.rafs.spill import RELIEVE_EVERY, relieve
from virtiofsd_nydus.rafs.tree import Attributes, RegularFile, Tree, Xattrs


class DirectorySource:
    """Builds the tree of a directory as it is: owners, times, xattrs, devices, hard links. File contents are read in
    the order of the tree, those that match a prefetch pattern first."""

    def __init__(
        self,
        path: Path,
        chunker: Chunker,
        form: Form,
        *,
        prefetch: Sequence[str] = (),
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.tree = Tree(form.directory)
        self.dropped_xattrs = 0
        self.files = 0
        self.file_bytes = 0
        self.prefetch_chunks = 0  # at the start of the blob, of the files to prefetch
        self._path = os.fsencode(path)
        self._chunker = chunker
        self._table = chunker.table
        self._chunk_size = form.chunk_size
        self._prefetch = [os.fsencode(pattern).rstrip(b"/") for pattern in prefetch]
        self._on_progress = on_progress
        self._links: dict[tuple[int, int], int] = {}  # st_dev, st_ino -> the node of the first name
        self._has_xattrs: dict[int, bool] = {}  # st_dev -> whether its file system answers listxattr at all

    def read(self) -> Tree:
        try:
            self._scan()
        except OSError as error:
            raise Failure(f"{os.fsdecode(error.filename or self._path)}: {error.strerror}", Cause.IO) from error
        sent = bytearray(self.tree.node_count)
        if self._prefetch:
            first = self._find_first_names()
            for pattern in self._prefetch:
                for path, node in self._list_matches(pattern):
                    if not sent[node] and first.get(node, path) == path:
                        sent[node] = 1
                        self._send(path, node)
            self._chunker.flush()
            self.prefetch_chunks = len(self._table)
        for path, node in self.tree.list_paths():
            if not sent[node]:
                sent[node] = 1
                self._send(path, node)
        return self.tree

    def _find_first_names(self) -> dict[int, bytes]:
        """Chooses for each set of hard links the name by which they are read, and which decides whether and when they
        are prefetched."""
        linked = set(self._links.values())
        first: dict[int, bytes] = {}
        for path, node in self.tree.list_paths():
            if node in linked:
                first.setdefault(node, path)
        return first

    def _list_matches(self, pattern: bytes) -> Iterator[tuple[bytes, int]]:
        """The entries that a pattern names, in the order of the tree: a path and all that is below it. The pattern is
        compared as it is, unlike the path of a mount."""
        node = self.tree.find_path(pattern)
        path = b"/".join((b"", *(part for part in pattern.split(b"/") if part and part != b".")))
        if not node or path != pattern:
            return
        if self.tree.is_directory(node):
            yield from self.tree.list_paths(node, pattern)
        else:
            yield pattern, node

    def _scan(self) -> None:
        tree = self.tree
        root = self._make_directory(self._path, Path(os.fsdecode(self._path)).stat())
        tree.copy_attributes(ROOT, tree, root)
        tree.clear_time(ROOT)  # as Nydus: a build directory's own time says nothing of the image
        stack = [(self._path, ROOT)]
        while stack:
            path, directory = stack.pop()
            found = os.listdir(path)  # noqa: PTH208 - bytes, and a million times; entries of scandir take ten times that
            found.sort()
            for number, name in enumerate(found):
                child_path = path + b"/" + name
                status = os.lstat(child_path)
                if stat.S_ISDIR(status.st_mode):
                    child = self._make_directory(child_path, status)
                    stack.append((child_path, child))
                else:
                    child = self._make_inode(child_path, status)
                tree.link(directory, name, child)
                if not number % RELIEVE_EVERY:
                    relieve()
        for directory in tree.walk_directories():
            tree.sort(directory)

    def _xattrs(self, path: bytes, status: os.stat_result) -> Xattrs:
        if self._has_xattrs.get(status.st_dev) is False:
            return ()
        try:
            names = os.listxattr(path, follow_symlinks=False)
        except OSError:
            self._has_xattrs[status.st_dev] = False
            return ()
        found = []
        for name in names:
            key = os.fsencode(name)
            value = os.getxattr(path, name, follow_symlinks=False)
            if is_kept_xattr(key, value):
                found.append((key, value))
            else:
                self.dropped_xattrs += 1
        return tuple(sorted(found))

    def _make_directory(self, path: bytes, status: os.stat_result) -> int:
        return self.tree.make_directory(self._attributes(path, status))

    def _attributes(self, path: bytes, status: os.stat_result) -> Attributes:
        xattrs = self._xattrs(path, status)
        return Attributes(status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, xattrs)

    def _make_inode(self, path: bytes, status: os.stat_result) -> int:
        key = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and key in self._links:
            return self._links[key]
        attributes = self._attributes(path, status)
        if stat.S_ISREG(status.st_mode):
            if status.st_size > layout.FILE_BYTES_MAX:
                raise Failure(f"{os.fsdecode(path)}: a file of {status.st_size} bytes is too large", Cause.FORMAT)
            node = self.tree.make_file(attributes, status.st_size, self._table)
            self.files += 1
            self.file_bytes += status.st_size
        elif stat.S_ISLNK(status.st_mode):
            target = os.readlink(path)  # noqa: PTH115 - bytes, and a million times
            if len(target) > layout.SYMLINK_BYTES_MAX:
                raise Failure(f"{os.fsdecode(path)}: a symbolic link to {len(target)} bytes is too long", Cause.FORMAT)
            node = self.tree.make_symlink(attributes, target)
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            node = self.tree.make_special(attributes, os.major(status.st_rdev), os.minor(status.st_rdev))
        else:
            node = self.tree.make_special(attributes)
        if status.st_nlink > 1:
            self._links[key] = node
        return node

    def _send(self, path: bytes, node: int) -> None:
        if not stat.S_ISREG(self.tree.mode(node)) or not self.tree.size(node):
            return
        file = RegularFile(self.tree, node, self.tree.size(node))
        path = self._path + path
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                self._read_chunks(fd, path, file)
            finally:
                os.close(fd)
        except OSError as error:
            raise Failure(f"{os.fsdecode(path)}: {error.strerror}", Cause.IO) from error
        if self._on_progress is not None:
            self._on_progress(file.size)

    def _read_chunks(self, fd: int, path: bytes, file: RegularFile) -> None:
        size, chunk_size = file.size, self._chunk_size
        # Only a file with fewer blocks than bytes can have holes; asking for them costs two calls.
        hole_end = 0  # nothing is stored up to here
        sparse = size > chunk_size and os.fstat(fd).st_blocks * 512 < size
        for start in range(0, size, chunk_size):
            take = min(chunk_size, size - start)
            if sparse and start + take > hole_end:
                try:
                    hole_end = os.lseek(fd, start, os.SEEK_DATA)
                except OSError:
                    hole_end = size  # no data up to the end
            if sparse and start + take <= hole_end:
                self._chunker.add(self._chunker.zeroes[:take], file)
                continue
            data = os.pread(fd, take, start)
            while len(data) < take:
                more = os.pread(fd, take - len(data), start + len(data))
                if not more:
                    raise Failure(f"{os.fsdecode(path)}: the file shrank while it was read", Cause.IO)
                data += more
            self._chunker.add(data, file)
