"""From file contents to a blob: threads digest and compress, one thread writes in the order of input.

A chunk's form depends on its bytes and the options alone, and its place on the order of input alone, so the blob is the
same for any number of threads. Small chunks travel in batches: a hand-over between threads
costs more than compressing a small file does, and zstandard compresses a whole batch without coming back to Python.
"""

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import BlobWriter, ReferencePlace
from virtiofsd_nydus.rafs.chunktable import FOREIGN_BASE, ChunkTable, DigestIndex
from virtiofsd_nydus.rafs.digest import crc32c_function, digest_function
from virtiofsd_nydus.rafs.layout import ChunkFlag
from virtiofsd_nydus.rafs.tree import RegularFile

BATCH_BYTES = 1 << 20
BATCH_CHUNKS = 512
THREADS_MAX = 8  # reading, hashing and writing keep one processor busy: more threads would wait for it
QUEUE_BYTES_MAX = 64 << 20  # input that is queued and not yet written; with its compressed form twice that
# A tar of some kilobytes can claim files of terabytes that are holes; their chunk indexes end up in memory.
REFERENCES_MAX = 1 << 26

Place = ReferencePlace | None
DictionaryIndex = Mapping[bytes, tuple[ChunkTable, int]]
# digest, crc, payload (bytes-like; None when the chunk was known to be there already), flags
Packed = list[tuple[bytes, int, Any, int]]


class Chunker:
    """add() chunks in order, then close(). Memory: a few batches a thread, whatever the input's size.

    batch_size: single-chunk files under half of it are compressed together. dictionary: chunks that other blobs hold,
    by digest; they are not written again."""

    def __init__(
        self,
        writer: BlobWriter,
        *,
        level: int,
        threads: int = 0,
        batch_size: int = 0,
        dictionary: DictionaryIndex | None = None,
        observe: Callable[[int, bytes], None] | None = None,
    ) -> None:
        """observe: gets each of the blob's chunks, its index and its bytes, once it is in the blob."""
        self._writer = writer
        self._level = level
        self._small_bytes = batch_size // 2
        self._dictionary = dictionary or {}
        self._observe = observe
        self._threads = threads or min(THREADS_MAX, max(2, len(os.sched_getaffinity(0))))
        self._queue_max = max(2, min(self._threads + 2, QUEUE_BYTES_MAX // max(BATCH_BYTES, writer.chunk_size)))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="chunker")
        self._digest = digest_function(writer.digester)
        self._crc32c = crc32c_function()
        self._index = DigestIndex(writer.table.digest)  # of the blob's chunks
        self._foreign: dict[bytes, int] = {}  # digest -> chunk number of the dictionary's in use
        self._queue: deque[tuple[Future[Packed], list[bytes], list[RegularFile], list[Place]]] = deque()
        self._chunks: list[bytes] = []
        self._files: list[RegularFile] = []
        self._places: list[Place] = []
        self._bytes = 0
        self._references = 0
        self._zero_digest: tuple[bytes, int] | None = None
        self.zeroes = bytes(writer.chunk_size)  # a hole's chunk; this very object is known without looking at it
        self.deduplicated_bytes = 0
        self.dictionary_bytes = 0  # of them, those the dictionary had

    @property
    def table(self) -> ChunkTable:
        """Of the blob's chunks."""
        return self._writer.table

    def add(self, data: bytes, file: RegularFile, place: Place = None) -> None:
        """data, at most one chunk's worth and not empty, is the next chunk of file. place: where the data is already,
        of a blob that refers to a layer."""
        self._references += 1
        if self._references > REFERENCES_MAX:
            raise Failure("a layer's files make too many chunks; use a larger chunk size", Cause.FORMAT)
        self._chunks.append(data)
        self._files.append(file)
        self._places.append(place)
        self._bytes += len(data)
        if self._bytes >= BATCH_BYTES or len(self._chunks) >= BATCH_CHUNKS:
            self._submit()

    def _submit(self) -> None:
        chunks, files, places = self._chunks, self._files, self._places
        small = [self._is_small(data, file) for data, file in zip(chunks, files, strict=True)]
        self._queue.append((self._pool.submit(self._pack, chunks, small), chunks, files, places))
        self._chunks, self._files, self._places, self._bytes = [], [], [], 0
        while self._queue and (len(self._queue) > self._queue_max or self._queue[0][0].done()):
            self._write_next()

    def _is_small(self, data: bytes, file: RegularFile) -> bool:
        return len(data) < self._small_bytes and len(data) == file.size

    def _write_next(self) -> None:
        future, chunks, files, places = self._queue.popleft()
        find, foreign = self._index.find, self._foreign
        for data, file, place, packed in zip(chunks, files, places, future.result(), strict=True):
            digest = packed[0]
            index = find(digest)
            if index is None:
                index = foreign.get(digest)
                if index is not None:
                    self.dictionary_bytes += len(data)
            if index is None:
                index = self._write(data, file, packed, place)
                if index < FOREIGN_BASE:
                    self._index.add(digest, index)
                    if self._observe is not None:
                        self._observe(index, data)
                else:
                    foreign[digest] = index
            else:
                self.deduplicated_bytes += len(data)
            file.add_chunk(index)

    def _write(self, data: bytes, file: RegularFile, packed: tuple[bytes, int, Any, int], place: Place) -> int:
        digest, crc, payload, flags = packed
        known = self._dictionary.get(digest)
        if known is not None:
            foreign = self._writer.table.foreign
            foreign.append(known)
            self.deduplicated_bytes += len(data)
            self.dictionary_bytes += len(data)
            return FOREIGN_BASE + len(foreign) - 1
        # Only bytes already in the blob or the dictionary are left out by _pack, so payload is there.
        if place is not None:
            return self._writer.write_reference(digest, crc, len(data), place)
        if self._is_small(data, file):
            return self._writer.write_batched(digest, crc, data)
        return self._writer.write_chunk(digest, crc, payload, len(data), flags)

    def _pack(self, chunks: Sequence[bytes], small: Sequence[bool]) -> Packed:
        """Runs in the pool. The writing thread only ever adds to _index, so what is found here is found there."""
        digest, zeroes, find, dictionary = self._digest, self.zeroes, self._index.find, self._dictionary
        keys = [digest(data) if data is not zeroes else self._check_zeroes()[0] for data in chunks]
        # once: the writing thread adds to it meanwhile
        fresh = [find(key) is None and key not in dictionary for key in keys]
        wanted = [data for data, new, batched in zip(chunks, fresh, small, strict=True) if new and not batched]
        payloads = iter(self._compress(wanted))
        done: Packed = []
        for data, key, new, batched in zip(chunks, keys, fresh, small, strict=True):
            if not new:
                done.append((key, 0, None, 0))
                continue
            crc = self._crc32c(data) if data is not zeroes else self._check_zeroes()[1]
            if batched:
                done.append((key, crc, data, 0))
            else:
                done.append((key, crc, *next(payloads)))
        return done

    def _check_zeroes(self) -> tuple[bytes, int]:
        if self._zero_digest is None:
            self._zero_digest = self._digest(self.zeroes), self._crc32c(self.zeroes)
        return self._zero_digest

    def _compress(self, chunks: list[bytes]) -> list[tuple[Any, int]]:
        codec = self._writer.codec
        packed: list[Any]
        if not chunks or codec in (layout.Codec.NONE, layout.Codec.GZIP):  # gzip: data stays in the layer it is in
            packed = list(chunks)
        elif codec is layout.Codec.LZ4_BLOCK:
            import lz4.block

            packed = [lz4.block.compress(data, store_size=False) for data in chunks]
        else:
            import zstandard

            compressor = zstandard.ZstdCompressor(level=self._level)
            if len(chunks) > 1 and "multi_compress_to_buffer" in zstandard.backend_features:
                batch: Any = compressor.multi_compress_to_buffer([*chunks], threads=1)
                packed = list(batch)
            else:
                packed = [compressor.compress(data) for data in chunks]
        done = [
            (result, int(ChunkFlag.COMPRESSED)) if len(result) < len(data) else (data, 0)
            for result, data in zip(packed, chunks, strict=True)
        ]
        cipher = self._writer.cipher
        if cipher is None:
            return done
        return [(cipher.encrypt(bytes(payload)), flags | ChunkFlag.ENCRYPTED) for payload, flags in done]

    def flush(self) -> None:
        """Writes to the blob everything that was added so far."""
        if self._chunks:
            self._submit()
        while self._queue:
            self._write_next()

    def close(self) -> None:
        """Flushes, then ends the threads."""
        self.flush()
        self._pool.shutdown()

    def cancel(self) -> None:
        """Ends the threads without writing, after a failure."""
        self._pool.shutdown(wait=True, cancel_futures=True)
