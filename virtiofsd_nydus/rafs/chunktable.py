"""The chunks of a blob while images are written from it."""

import os
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from virtiofsd_nydus.rafs.spill import RELIEVE_EVERY, Arena, relieve

# A file's chunk number from this value on is an index into ChunkTable.foreign, not a chunk of its own blob.
FOREIGN_BASE = 1 << 24

# digest, uoff, coff, csize, usize, crc32c, flags
RECORD = struct.Struct("<32sQQIIII")
RECORD_BYTES = RECORD.size
CONTEXT_BYTES = 8  # context + 1, slice
NUMBER_BITS = 34
NUMBER_MASK = (1 << NUMBER_BITS) - 1
HASH_MASK = (1 << 64 - NUMBER_BITS) - 1


class ChunkRecord(NamedTuple):
    """One chunk, in the order of RECORD."""

    digest: bytes
    uoff: int
    coff: int
    csize: int
    usize: int
    crc: int  # CRC-32C of the content; 0: not known
    flags: int  # layout.ChunkFlag


class ChunkTable:
    """The chunks of one blob, in index order. uoffs ascend (block aligned in RAFS v6).

    Each is a record: digest (32 bytes), uoff, coff, csize, usize, CRC-32C of the content (0: not known), flags (those
    of a chunk record, layout.ChunkFlag). Of a batched or zran chunk a second one: the number of its context, and where
    it lies in what that context decodes to. A batched chunk has no coff and csize of its own. foreign: chunks of other
    blobs that files of this layer use, from the chunk dictionary. directory: of the arenas' files."""

    __slots__ = ("_contexts", "_count", "_records", "foreign")

    def __init__(self, directory: "str | os.PathLike[str] | None" = None) -> None:
        self._records = Arena(directory)
        self._contexts = Arena(directory)
        self._count = 0
        self.foreign: list[tuple[ChunkTable, int]] = []

    def append(self, record: ChunkRecord) -> int:
        """Returns the chunk's index."""
        index = self._count
        end = (index + 1) * RECORD_BYTES
        if end > len(self._records.data):
            self._records.reserve(end)
        RECORD.pack_into(self._records.data, end - RECORD_BYTES, *record)
        self._count = index + 1
        if not index % RELIEVE_EVERY:
            relieve()
        return index

    def dump(self) -> list[bytes]:
        """Records and contexts, for restore(). Chunks of other blobs are not kept."""
        return [bytes(self._records.data[: self._count * RECORD_BYTES]), bytes(self._contexts.data)]

    @classmethod
    def restore(
        cls, parts: "Sequence[bytes | memoryview]", directory: "str | os.PathLike[str] | None" = None
    ) -> "ChunkTable":
        """A table of what dump() gave, which must be what this program wrote: it is not checked."""
        records, contexts = parts
        table = cls(directory)
        table.resize(len(records) // RECORD_BYTES)
        table._records.data[: len(records)] = records
        table._contexts.reserve(len(contexts))
        table._contexts.data[: len(contexts)] = contexts
        return table

    def resize(self, count: int) -> None:
        """Makes room for chunks that are set by their index."""
        self._records.reserve(count * RECORD_BYTES)
        self._count = count

    def set(self, index: int, record: ChunkRecord) -> None:
        RECORD.pack_into(self._records.data, index * RECORD_BYTES, *record)

    def set_coff(self, index: int, coff: int) -> None:
        self._records.quads[index * 8 + 5] = coff

    def set_context(self, index: int, context: int, offset: int) -> None:
        self._contexts.reserve((index + 1) * CONTEXT_BYTES)
        self._contexts.words[2 * index] = context + 1
        self._contexts.words[2 * index + 1] = offset

    def context(self, index: int) -> tuple[int, int]:
        """A chunk's context and where it lies in it; -1: it has none."""
        if (index + 1) * CONTEXT_BYTES > len(self._contexts.data):
            return -1, 0
        return self._contexts.words[2 * index] - 1, self._contexts.words[2 * index + 1]

    def record(self, index: int) -> tuple[bytes, int, int, int, int, int, int]:
        """digest, uoff, coff, csize, usize, crc, flags."""
        if index >= self._count:
            raise IndexError(index)
        return RECORD.unpack_from(self._records.data, index * RECORD_BYTES)

    def locate(self, chunk: int) -> "tuple[ChunkTable, int]":
        """The table and index that a file's chunk number stands for."""
        return self.foreign[chunk - FOREIGN_BASE] if chunk >= FOREIGN_BASE else (self, chunk)

    def __len__(self) -> int:
        return self._count

    def digest(self, index: int) -> bytes:
        start = index * RECORD_BYTES
        return bytes(self._records.data[start : start + 32])

    def digests(self, start: int, end: int) -> bytes:
        """The digests of a range of chunks, joined."""
        data = self._records.data
        return b"".join(data[at : at + 32] for at in range(start * RECORD_BYTES, end * RECORD_BYTES, RECORD_BYTES))

    def uoff(self, index: int) -> int:
        return self._records.quads[index * 8 + 4]

    def coff(self, index: int) -> int:
        return self._records.quads[index * 8 + 5]

    def csize(self, index: int) -> int:
        return self._records.words[index * 16 + 12]

    def usize(self, index: int) -> int:
        return self._records.words[index * 16 + 13]


class DigestIndex:
    """Finds a number by a digest. A dict of a million digests takes 180 MB, this 24 at most, and in an arena.

    digest_of tells the digest that a number stands for. One thread adds; others may look meanwhile, and may then miss
    what was added last."""

    __slots__ = ("_count", "_digest_of", "_directory", "_slots")

    def __init__(self, digest_of: Callable[[int], bytes], directory: "str | os.PathLike[str] | None" = None) -> None:
        self._digest_of = digest_of
        self._directory = directory
        self._slots = Arena(directory)  # each 64 bits: the low bits of the digest's hash, number + 1
        self._count = 0

    def find(self, digest: bytes) -> int | None:
        slots = self._slots.quads
        mask = len(slots) - 1
        # Python's hash of bytes is keyed: the author of an image cannot choose digests that collide.
        mark = hash(digest) & HASH_MASK
        at = mark & mask
        while value := slots[at]:
            if value >> NUMBER_BITS == mark and self._digest_of((value & NUMBER_MASK) - 1) == digest:
                return (value & NUMBER_MASK) - 1
            at = at + 1 & mask
        return None

    def add(self, digest: bytes, number: int) -> None:
        """Adds a digest that the index does not hold; number is below 2^34 - 1."""
        if self._count * 3 >= len(self._slots.quads) * 2:
            self._grow()
        self._put(self._slots.quads, (hash(digest) & HASH_MASK) << NUMBER_BITS | number + 1)
        self._count += 1

    @staticmethod
    def _put(slots: "memoryview[int]", value: int) -> None:
        mask = len(slots) - 1
        at = value >> NUMBER_BITS & mask
        while slots[at]:
            at = at + 1 & mask
        slots[at] = value

    def _grow(self) -> None:
        grown = Arena(self._directory, 2 * len(self._slots.data))
        for value in self._slots.quads:
            if value:
                self._put(grown.quads, value)
        self._slots = grown
