"""The pipeline between file contents and a blob: threads digest and compress, one thread writes in the order of input.

What a chunk becomes depends on nothing but its bytes and the options, and the place it gets on nothing but the order of
input, so the blob is the same for any number of threads. Small chunks travel in batches: a hand-over between threads
costs more than compressing a small file does, and zstandard compresses a whole batch without coming back to Python.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import BlobWriter
from virtiofsd_nydus.rafs.tree import RegularFile

BATCH_BYTES = 1 << 20
BATCH_CHUNKS = 512
THREADS_MAX = 8  # by default; reading, hashing and writing keep one processor busy, more than eight would wait for it
QUEUE_BYTES_MAX = 64 << 20  # of input handed over and not yet written, twice that with what it is compressed to
# A tar of some kilobytes can claim files of terabytes that are holes; their chunk indexes end up in memory.
REFERENCES_MAX = 1 << 26

Packed = list[tuple[bytes, Any]]  # digest, payload: bytes-like, None when the chunk was known to be there already


class Chunker:
    """add() chunks in order, then close(). Memory: a few batches a thread, whatever the input's size."""

    def __init__(self, writer: BlobWriter, *, level: int, threads: int = 0) -> None:
        self._writer = writer
        self._level = level
        self._threads = threads or min(THREADS_MAX, max(2, len(os.sched_getaffinity(0))))
        self._queue_max = max(2, min(self._threads + 2, QUEUE_BYTES_MAX // max(BATCH_BYTES, writer.chunk_size)))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="chunker")
        self._digest = _digest_function(writer.digester)
        self._index: dict[bytes, int] = {}  # digest -> chunk index in the blob
        self._queue: deque[tuple[Future[Packed], list[bytes], list[RegularFile]]] = deque()
        self._chunks: list[bytes] = []
        self._files: list[RegularFile] = []
        self._bytes = 0
        self._references = 0
        self._zero_digest = b""
        self.zeroes = bytes(writer.chunk_size)  # a hole's chunk; this very object is known without looking at it
        self.deduplicated_bytes = 0

    def add(self, data: bytes, file: RegularFile) -> None:
        """data, at most one chunk's worth and not empty, is the next chunk of file."""
        self._references += 1
        if self._references > REFERENCES_MAX:
            raise Failure("a layer's files make too many chunks; use a larger chunk size", Cause.FORMAT)
        self._chunks.append(data)
        self._files.append(file)
        self._bytes += len(data)
        if self._bytes >= BATCH_BYTES or len(self._chunks) >= BATCH_CHUNKS:
            self._submit()

    def _submit(self) -> None:
        chunks, files = self._chunks, self._files
        self._queue.append((self._pool.submit(self._pack, chunks), chunks, files))
        self._chunks, self._files, self._bytes = [], [], 0
        while self._queue and (len(self._queue) > self._queue_max or self._queue[0][0].done()):
            self._write_next()

    def _write_next(self) -> None:
        future, chunks, files = self._queue.popleft()
        index_of, write_chunk = self._index, self._writer.write_chunk
        for data, file, (digest, payload) in zip(chunks, files, future.result(), strict=True):
            index = index_of.get(digest)
            if index is None:
                # Only bytes already in the blob are left out by _pack, so payload is there.
                index = index_of[digest] = write_chunk(digest, payload, len(data))
            else:
                self.deduplicated_bytes += len(data)
            file.add_chunk(index)

    def _pack(self, chunks: Sequence[bytes]) -> Packed:
        """Runs in the pool. The writing thread only ever adds to _index, so what is found here is found there."""
        digest, zeroes = self._digest, self.zeroes
        digests = [digest(data) if data is not zeroes else self._digest_zeroes() for data in chunks]
        fresh = [key not in self._index for key in digests]  # once: the writing thread adds to it meanwhile
        payloads = iter(self._compress([data for data, new in zip(chunks, fresh, strict=True) if new]))
        return [(key, next(payloads) if new else None) for key, new in zip(digests, fresh, strict=True)]

    def _digest_zeroes(self) -> bytes:
        if not self._zero_digest:
            self._zero_digest = self._digest(self.zeroes)
        return self._zero_digest

    def _compress(self, chunks: list[bytes]) -> list[Any]:
        codec = self._writer.codec
        if codec is layout.Codec.NONE or not chunks:
            return list(chunks)
        packed: list[Any]
        if codec is layout.Codec.LZ4_BLOCK:
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
        return [
            result if len(result) < len(data) else data for result, data in zip(packed, chunks, strict=True)
        ]

    def close(self) -> None:
        """Everything that was added is in the blob when this returns."""
        if self._chunks:
            self._submit()
        while self._queue:
            self._write_next()
        self._pool.shutdown()

    def cancel(self) -> None:
        """Gives up: after a failure, so that no thread outlives the build."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _digest_function(digester: layout.Digester) -> Callable[[bytes], bytes]:
    if digester is layout.Digester.SHA256:
        sha256 = hashlib.sha256
        return lambda data: sha256(data).digest()
    from blake3 import blake3

    return lambda data: blake3(data).digest()
