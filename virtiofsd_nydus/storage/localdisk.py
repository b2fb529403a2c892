"""Backend `localdisk`: blobs are GPT partitions of a block device (or of a disk image file).

A blob's 64-character id is its partition's name (32) and unique GUID (32 hex digits), as nydusd has it. The
partition table is that of UEFI 2.10, 5.3. Light.
"""

import os
import struct
import threading

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.storage.backoff import Backoff
from virtiofsd_nydus.storage.localfs import read_pieces
from virtiofsd_nydus.storage.meter import BackendMeter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

SECTOR_SIZES_BYTES = (512, 4096)
ENTRIES_MAX = 1024
# signature, revision, header size, CRC, reserved, own LBA, backup LBA, first and last usable LBA, disk GUID,
# LBA of the entries, their number and size, their CRC
HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
# type GUID, unique GUID, first and last LBA, attributes, name (UTF-16)
ENTRY = struct.Struct("<16s16sQQQ72s")


class LocaldiskBackend:
    """See storage.backend.Backend. with_gpt False: the device as a whole is the one blob."""

    kind = "localdisk"

    def __init__(self, device_path: str, *, with_gpt: bool = True) -> None:
        self._path = device_path
        self._with_gpt = with_gpt
        self._lock = threading.Lock()
        self._fd = -1
        self._blobs: dict[str, tuple[int, int]] = {}  # id -> offset and size in bytes
        self.meter = BackendMeter(self.kind)
        self.source = f"{self.kind} {device_path}"
        self.backoff = Backoff(self.source)

    def close(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def distrust(self, blob_id: str) -> None:
        """There is no other way to a local file."""

    def status(self) -> "dict[str, object]":
        return {}

    def blob_size(self, blob_id: str) -> int:
        return self._find(blob_id)[2]

    def prepare(self) -> None:
        pass

    def read_range(
        self, blob_id: str, offset: int, length: int, *, prefetch: bool = False, deadline: float | None = None
    ) -> "Iterator[memoryview]":
        if offset < 0 or length < 0:
            raise ValueError(f"range of {length} bytes at {offset}")
        return self._read_range(blob_id, offset, length)

    def _read_range(self, blob_id: str, offset: int, length: int) -> "Iterator[memoryview]":
        fd, start, size = self._find(blob_id)
        what = f"{self._path}, partition of blob {blob_id[:12]}"
        if offset + length > size:
            raise Failure(
                f"{what} has {size} bytes, the image wants {length} at {offset}: it is not the blob the "
                "image was made with",
                Cause.FORMAT,
            )
        yield from read_pieces(fd, what, start + offset, length, self.meter)

    def _find(self, blob_id: str) -> tuple[int, int, int]:
        """Descriptor, offset and size of a blob."""
        with self._lock:
            if self._fd < 0:
                self._open()
            if not self._with_gpt:
                return self._fd, 0, os.lseek(self._fd, 0, os.SEEK_END)
            found = self._blobs.get(blob_id)
        if found is None:
            raise Failure(
                f"{self._path}: no partition whose name and GUID are the blob id {blob_id[:64]!r}", Cause.MISSING
            )
        return self._fd, *found

    def _open(self) -> None:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Failure(
                f"cannot open the device {self._path}: {error.strerror}",
                Cause.MISSING if isinstance(error, FileNotFoundError) else Cause.IO,
            ) from error
        try:
            size = os.lseek(fd, 0, os.SEEK_END)
            if self._with_gpt:
                self._blobs = read_gpt(fd, self._path, size)
        except OSError as error:
            os.close(fd)
            raise Failure(f"cannot read {self._path}: {error.strerror}", Cause.IO) from error
        except Failure:
            os.close(fd)
            raise
        self._fd = fd


def read_gpt(fd: int, path: str, disk_bytes: int) -> dict[str, tuple[int, int]]:
    """{name + GUID: (offset, size) in bytes} of every partition, by the backup table where the first is damaged."""
    for sector_bytes in SECTOR_SIZES_BYTES:
        for at in (sector_bytes, disk_bytes - sector_bytes):
            entries = _read_table(fd, at, sector_bytes, disk_bytes)
            if entries is not None:
                return entries
    raise Failure(f"{path} has no GUID partition table: give a disk made for Nydus blobs, or disable_gpt", Cause.FORMAT)


def _read_table(fd: int, at: int, sector_bytes: int, disk_bytes: int) -> dict[str, tuple[int, int]] | None:
    import binascii
    import uuid

    raw = os.pread(fd, sector_bytes, at) if at >= 0 else b""
    if len(raw) < HEADER.size:
        return None
    (signature, _, header_bytes, checksum, _, _, _, _, _, _, entries_lba, count, entry_bytes, entries_checksum) = (
        HEADER.unpack_from(raw)
    )
    if signature != b"EFI PART" or not HEADER.size <= header_bytes <= sector_bytes:
        return None
    if binascii.crc32(raw[:16] + bytes(4) + raw[20:header_bytes]) != checksum:
        return None
    if not 0 < count <= ENTRIES_MAX or not ENTRY.size <= entry_bytes <= 4096:
        return None
    if entries_lba > disk_bytes // sector_bytes:
        return None
    table = os.pread(fd, count * entry_bytes, entries_lba * sector_bytes)
    if len(table) != count * entry_bytes or binascii.crc32(table) != entries_checksum:
        return None
    found: dict[str, tuple[int, int]] = {}
    for index in range(count):
        kind, guid, first, last, _, name = ENTRY.unpack_from(table, index * entry_bytes)
        if not any(kind) or last < first or (last + 1) * sector_bytes > disk_bytes:
            continue
        text = name.decode("utf-16-le", "replace").partition("\0")[0]
        found[text + uuid.UUID(bytes_le=guid).hex] = first * sector_bytes, (last - first + 1) * sector_bytes
    return found
