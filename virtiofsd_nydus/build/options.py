"""What a person can choose about an image."""

from dataclasses import dataclass

from virtiofsd_nydus.errors import UsageFailure
from virtiofsd_nydus.rafs import layout

CODECS = {"none": layout.Codec.NONE, "lz4_block": layout.Codec.LZ4_BLOCK, "zstd": layout.Codec.ZSTD}
DIGESTERS = {"blake3": layout.Digester.BLAKE3, "sha256": layout.Digester.SHA256}
PREFETCH_POLICIES = ("none", "fs", "blob")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Options of one image; a layer's blob depends on these and on the layer alone (threads change nothing).

    prefetch_patterns: absolute paths; the default with a policy is the whole tree.
    """

    fs_version: int = 6
    compressor: str = "zstd"
    digester: str = "blake3"
    chunk_size: int = 1 << 20
    compression_level: int = 3
    prefetch_policy: str = "none"
    prefetch_patterns: tuple[str, ...] = ("/",)
    threads: int = 0  # 0: as many as there are processors

    def __post_init__(self) -> None:
        if self.fs_version == 5:
            raise UsageFailure("building RAFS v5 images is not supported yet; use --fs-version 6")
        if self.fs_version != 6:
            raise UsageFailure(f"no RAFS version {self.fs_version}; use --fs-version 6")
        if self.compressor not in CODECS:
            raise UsageFailure(f"no compressor {self.compressor!r}; one of {', '.join(CODECS)}")
        if self.digester not in DIGESTERS:
            raise UsageFailure(f"no digester {self.digester!r}; one of {', '.join(DIGESTERS)}")
        size = self.chunk_size
        if not layout.CHUNK_BYTES_MIN <= size <= layout.CHUNK_BYTES_MAX or size & (size - 1):
            raise UsageFailure(f"chunk size {size} is not a power of two from 4 KiB to 16 MiB")
        if not 1 <= self.compression_level <= 19:
            raise UsageFailure(f"compression level {self.compression_level} is not from 1 to 19")
        if self.prefetch_policy not in PREFETCH_POLICIES:
            raise UsageFailure(f"no prefetch policy {self.prefetch_policy!r}; one of {', '.join(PREFETCH_POLICIES)}")

    @property
    def codec(self) -> layout.Codec:
        return CODECS[self.compressor]

    @property
    def digest_kind(self) -> layout.Digester:
        return DIGESTERS[self.digester]
