"""AES-128-XTS as Nydus encrypts blobs: each chunk is one data unit, all with the blob's key and tweak, which stand in
the blob table. So the bootstrap alone is enough to read the image."""

import secrets
from dataclasses import dataclass

from virtiofsd_nydus.errors import Cause, Failure

KEY_BYTES = 32  # two AES-128 keys, which must differ
IV_BYTES = 16
UNIT_BYTES_MIN = 16  # what XTS can take; less is padded to it
PADDING_MARK = b"\x78\x90"


@dataclass(frozen=True, slots=True)
class Cipher:
    """Key and tweak of one blob."""

    key: bytes
    iv: bytes

    @classmethod
    def make(cls) -> "Cipher":
        while True:
            key = secrets.token_bytes(KEY_BYTES)
            if key[:16] != key[16:]:
                return cls(key, secrets.token_bytes(IV_BYTES))

    def encrypt(self, data: bytes | bytearray | memoryview) -> bytes:
        """Encrypts one data unit. The result is as long as data, or 18 bytes for less than 16."""
        from virtiofsd_nydus.engine import ffi, lib

        if len(data) < UNIT_BYTES_MIN:
            missing = UNIT_BYTES_MIN - len(data)
            data = bytes(data) + bytes([missing]) * missing + PADDING_MARK
        out = bytearray(len(data))
        with ffi.from_buffer("uint8_t[]", data) as source, ffi.from_buffer("uint8_t[]", out) as target:
            if lib.vnd_xts_encrypt(self.key, self.iv, source, len(data), target):
                raise Failure("AES-128-XTS does not work on this machine", Cause.IO)
        return bytes(out)
