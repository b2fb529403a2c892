"""A layer's bytes as they are stored to those of its tar: gzip, zstd or plain, told apart by the first bytes."""

import zlib
from collections.abc import Iterator
from typing import Protocol

from virtiofsd_nydus.errors import Cause, Failure

READ_BYTES = 256 << 10
# zstandard decodes all of its input at once, up to 32 KiB a byte: small pieces bound the memory.
ZSTD_FEED_BYTES = 2 << 10


class Hash(Protocol):
    """What takes the bytes of a tar to digest them."""

    def update(self, data: bytes, /) -> None: ...


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class TarFailure(Failure):
    """What is wrong with a tar. The caller that knows the layer's name puts it in front."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Cause.FORMAT)


class InPlaceFailure(TarFailure):
    """The layer is sound, but its chunks cannot be read where they lie in it."""


def _gunzip(source: Readable, head: bytes) -> Iterator[bytes]:
    """Decoded pieces of a gzip stream of any number of members; zero padding behind them is allowed."""
    data = head
    inflater = zlib.decompressobj(31)
    started = False
    while True:
        if not data:
            data = source.read(READ_BYTES)
            if not data:
                if started:
                    raise TarFailure("the gzip stream ends too early")
                return
        if not started:
            data = data.lstrip(b"\0")
            if not data:
                continue
            started = True
        try:
            piece = inflater.decompress(data, 4 * READ_BYTES)
        except zlib.error as error:
            raise TarFailure(f"the gzip stream is damaged: {error}") from None
        if piece:
            yield piece
        if inflater.eof:
            data = inflater.unused_data
            inflater = zlib.decompressobj(31)
            started = False
        else:
            data = inflater.unconsumed_tail


def _unzstd(source: Readable, head: bytes) -> Iterator[bytes]:
    """Decoded pieces of zstd frames, one frame at a time, because zstandard tells a frame's end only then."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    inflater = decompressor.decompressobj()
    data, started = head, False
    while True:
        for start in range(0, len(data), ZSTD_FEED_BYTES):
            rest = data[start : start + ZSTD_FEED_BYTES]
            while rest:
                started = True
                try:
                    piece = inflater.decompress(rest)
                except zstandard.ZstdError as error:
                    raise TarFailure(f"the zstd stream is damaged: {error}") from None
                if piece:
                    yield piece
                rest = b""
                if inflater.eof:
                    rest, started = inflater.unused_data, False
                    inflater = decompressor.decompressobj()
        data = source.read(READ_BYTES)
        if not data:
            if started:
                raise TarFailure("the zstd stream ends too early")
            return


def _plain(source: Readable, head: bytes) -> Iterator[bytes]:
    data = head
    while data:
        yield data
        data = source.read(READ_BYTES)


def is_zstd(head: bytes) -> bool:
    """Whether a stream begins with a zstd frame: one of data, or a skippable one (RFC 8878 3.1.2)."""
    return head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5)


def open_pieces(source: Readable) -> Iterator[bytes]:
    """The decoded bytes of a tar that may be gzip, zstd or plain, told apart by its first bytes."""
    head = source.read(READ_BYTES)
    while 0 < len(head) < 4:
        more = source.read(READ_BYTES)
        if not more:
            break
        head += more
    if head[:2] == b"\x1f\x8b":
        return _gunzip(source, head)
    if is_zstd(head):
        return _unzstd(source, head)
    return _plain(source, head)


def hash_pieces(pieces: Iterator[bytes], hashed: "Hash") -> Iterator[bytes]:
    for piece in pieces:
        hashed.update(piece)
        yield piece
