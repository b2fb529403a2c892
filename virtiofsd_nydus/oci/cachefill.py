"""Cache files filled while a layer is first read, so that what was streamed once is not fetched again.

They are Nydus's files (docs/rafs-format.md 6): the chunks at their places, and their bits in the chunk map. Such a bit
is a hint: the engine compares a chunk with its digest when it is first read, so that nothing here has to be believed.
"""

import contextlib
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from virtiofsd_nydus.rafs.chunktable import ChunkTable

MAP_HEADER = struct.Struct("<IIII")
MAP_HEADER_BYTES = 4096
TABLE_XATTR, TABLE_OPEN = "user.virtiofsd-nydus.table", b"-"  # csrc/cache/cache.h: for the first table that comes
MAP_MAGIC, MAP_MAGIC2, MAP_ALL = 0x424D4150, 0x434D4150, 0x4D4D4150


class CacheFill:
    """Takes a blob's chunks as they are made; publish() gives the files their names. A disk that is full, or files that
    are there already, end it without a word: the chunks are then fetched when they are read. One thread."""

    def __init__(self, directory: Path, blob_id: str, say: Callable[[str], None] = lambda line: None) -> None:
        self._directory, self._blob_id, self._say = directory, blob_id, say
        self._fd = -1
        self._temporary = ""
        if not (directory / f"{blob_id}.blob.data").exists():
            with contextlib.suppress(OSError):
                self._open()
        self.bytes = 0

    def _open(self) -> None:
        """A file without a name, which goes with a process that is killed; with one where the file system has no
        such."""
        try:
            self._fd = os.open(self._directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except OSError:
            self._fd, self._temporary = tempfile.mkstemp(dir=self._directory, prefix=f".{self._blob_id[:12]}.fill-")

    def add(self, table: ChunkTable, index: int, data: bytes) -> None:
        """Chunk index of the table has these bytes."""
        if self._fd < 0:
            return
        try:
            done, offset = 0, table.uoff(index)
            while done < len(data):
                done += os.pwrite(self._fd, data[done:] if done else data, offset + done)
            self.bytes += len(data)
        except OSError as error:
            self._say(f"cache of layer {self._blob_id[:12]} is not filled ahead: {error.strerror}")
            self.close()

    def publish(self, count: int, size_bytes: int) -> bool:
        """Names the files of a blob of `count` chunks, all of which were added. The map comes first: a process that
        opens the blob between the two finds marks without bytes, which it compares with the digests."""
        if self._fd < 0:
            return False
        chunk_map = self._directory / f"{self._blob_id}.blob.data.chunk_map"
        bits = bytearray(b"\xff" * (count // 8))
        if count % 8:
            bits.append(0xFF << 8 - count % 8 & 0xFF)
        try:
            os.ftruncate(self._fd, size_bytes)
            os.fchmod(self._fd, 0o644)
            with contextlib.suppress(
                OSError
            ):  # without it the engine copies what it reads: never wrong, twice the disk
                os.setxattr(self._fd, TABLE_XATTR, TABLE_OPEN)
            handle, temporary = tempfile.mkstemp(dir=self._directory, prefix=f".{self._blob_id[:12]}.map-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(MAP_HEADER.pack(MAP_MAGIC, 1, MAP_MAGIC2, MAP_ALL).ljust(MAP_HEADER_BYTES, b"\0") + bits)
                    os.fchmod(file.fileno(), 0o644)
                os.link(temporary, chunk_map)
            finally:
                os.unlink(temporary)  # noqa: PTH108
            self._link_data()
        except OSError:
            return False  # another process was first, or the disk is full: then chunks are fetched
        finally:
            self.close()
        return True

    def _link_data(self) -> None:
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            source = self._temporary or f"/proc/self/fd/{self._fd}"
            # Python follows the link only with a directory's descriptor: without one it calls link(2), which does not.
            os.link(source, f"{self._blob_id}.blob.data", dst_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Removes what has no name yet."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self._temporary:
                with contextlib.suppress(OSError):
                    os.unlink(self._temporary)  # noqa: PTH108
