"""Digests and checksums of chunks, by the digester's name in an image."""

import hashlib
from collections.abc import Callable

from virtiofsd_nydus.rafs import layout

DigestFunction = Callable[[bytes], bytes]


def digest_function(digester: layout.Digester) -> DigestFunction:
    """The function from content to its digest of 32 bytes."""
    if digester is layout.Digester.SHA256:
        sha256 = hashlib.sha256
        return lambda data: sha256(data).digest()
    from blake3 import blake3

    return lambda data: blake3(data).digest()


def crc32c_function() -> Callable[[bytes], int]:
    """CRC-32C of content; releases the GIL."""
    from virtiofsd_nydus.engine import ffi, lib

    crc32c, from_buffer = lib.vnd_crc32c, ffi.from_buffer
    return lambda data: crc32c(from_buffer("uint8_t[]", data), len(data))
