"""A directory of this machine as a tree, its file contents sent to the chunker on the way."""

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from virtiofsd_nydus.build.chunker import Chunker
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.bootstrap import is_storable_xattr
from virtiofsd_nydus.rafs.tree import ChunkTable, Directory, Inode, RegularFile, Special, Symlink, Xattrs, walk_names


class DirectorySource:
    """Builds the tree of a directory as it is: owners, times, xattrs, devices, hard links. File contents are read in
    the order of the tree, those that match a prefetch pattern first."""

    def __init__(
        self, path: Path, chunker: Chunker, table: ChunkTable, *, chunk_size: int, prefetch: Sequence[str] = (),
        on_progress: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        self.dropped_xattrs = 0
        self.files = 0
        self.file_bytes = 0
        self.prefetch_chunks = 0  # at the start of the blob, of the files to prefetch
        self._path = os.fsencode(path)
        self._chunker = chunker
        self._table = table
        self._chunk_size = chunk_size
        self._prefetch = [os.fsencode(pattern).rstrip(b"/") for pattern in prefetch]
        self._on_progress = on_progress
        self._links: dict[tuple[int, int], Inode] = {}  # st_dev, st_ino -> the inode of the first name
        self._has_xattrs: dict[int, bool] = {}  # st_dev -> whether its file system answers listxattr at all

    def read(self) -> Directory:
        try:
            root = self._scan()
        except OSError as error:
            raise Failure(f"{os.fsdecode(error.filename or self._path)}: {error.strerror}", Cause.IO) from error
        files: dict[int, tuple[bytes, RegularFile]] = {}
        for path, inode in walk_names(root):
            if isinstance(inode, RegularFile):
                files.setdefault(id(inode), (path, inode))
        ordered, wanted = self._order(list(files.values()))
        for number, (path, file) in enumerate(ordered):
            if number == wanted and wanted:
                self._chunker.flush()
                self.prefetch_chunks = len(self._table)
            self._send(self._path + path, file)
        if wanted == len(ordered) and wanted:
            self._chunker.flush()
            self.prefetch_chunks = len(self._table)
        return root

    def _order(self, files: list[tuple[bytes, RegularFile]]) -> tuple[list[tuple[bytes, RegularFile]], int]:
        """Those to prefetch first, and how many they are. Stable, so that the order of the tree remains within a
        pattern and behind all of them."""

        def rank(item: tuple[bytes, RegularFile]) -> int:
            for index, pattern in enumerate(self._prefetch):
                if item[0] == pattern or item[0].startswith(pattern + b"/"):
                    return index
            return len(self._prefetch)

        if not self._prefetch:
            return files, 0
        return sorted(files, key=rank), sum(rank(item) < len(self._prefetch) for item in files)

    def _scan(self) -> Directory:
        root = self._make_directory(self._path, Path(os.fsdecode(self._path)).stat())
        root.mtime_ns = 0  # as Nydus: a build directory's own time says nothing of the image
        stack = [(self._path, root)]
        while stack:
            path, directory = stack.pop()
            with os.scandir(path) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
            for entry in found:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    child: Inode = self._make_directory(entry.path, status)
                    stack.append((entry.path, child))  # type: ignore[arg-type]
                else:
                    child = self._make_inode(entry.path, status)
                directory.children[entry.name] = child
        for directory in (inode for _, inode in [(b"", root), *walk_names(root)] if isinstance(inode, Directory)):
            directory.children = dict(sorted(directory.children.items()))
        return root

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
            if is_storable_xattr(key, value):
                found.append((key, value))
            else:
                self.dropped_xattrs += 1
        return tuple(sorted(found))

    def _make_directory(self, path: bytes, status: os.stat_result) -> Directory:
        return Directory(status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, self._xattrs(path, status))

    def _make_inode(self, path: bytes, status: os.stat_result) -> Inode:
        key = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and key in self._links:
            return self._links[key]
        common = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, self._xattrs(path, status))
        inode: Inode
        if stat.S_ISREG(status.st_mode):
            if status.st_size > layout.FILE_BYTES_MAX:
                raise Failure(f"{os.fsdecode(path)}: a file of {status.st_size} bytes is too large", Cause.FORMAT)
            inode = RegularFile(*common, status.st_size, self._table)
            self.files += 1
            self.file_bytes += status.st_size
        elif stat.S_ISLNK(status.st_mode):
            target = os.readlink(path)  # noqa: PTH115 - bytes, and a million times
            if len(target) > layout.SYMLINK_BYTES_MAX:
                raise Failure(f"{os.fsdecode(path)}: a symbolic link to {len(target)} bytes is too long", Cause.FORMAT)
            inode = Symlink(*common, target)
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            inode = Special(*common, os.major(status.st_rdev), os.minor(status.st_rdev))
        else:
            inode = Special(*common)
        if status.st_nlink > 1:
            self._links[key] = inode
        return inode

    def _send(self, path: bytes, file: RegularFile) -> None:
        if not file.size:
            return
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
