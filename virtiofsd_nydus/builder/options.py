"""Options of an image."""

from dataclasses import dataclass

from virtiofsd_nydus.errors import UsageFailure
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import Form

CODECS = {"none": layout.Codec.NONE, "lz4_block": layout.Codec.LZ4_BLOCK, "zstd": layout.Codec.ZSTD}
DIGESTERS = {"blake3": layout.Digester.BLAKE3, "sha256": layout.Digester.SHA256}
PREFETCH_POLICIES = ("none", "fs", "blob")
FS_VERSIONS = (5, 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Options of one image; a layer's blob depends on these and on the layer alone (threads, diff_id and spill_dir
    change nothing; encryption does, its keys are random).

    prefetch_patterns: absolute paths; the default with a policy is the whole tree. batch_size: files under half of it
    are compressed together, 0: not. aligned_chunk: v5 with block-aligned chunks, which v6 always has. oci_ref: no data
    of its own, the image's chunks are found in the gzip layers themselves."""

    fs_version: int = 6
    compressor: str = "zstd"
    digester: str = "blake3"
    chunk_size: int = 1 << 20
    compression_level: int = 3
    batch_size: int = 0
    aligned_chunk: bool = False
    encrypt: bool = False
    oci_ref: bool = False
    prefetch_policy: str = "none"
    prefetch_patterns: tuple[str, ...] = ("/",)
    diff_id: bool = False  # tell the digest of a layer's decoded tar
    spill_dir: str | None = None  # where tables go that are too large for memory; TMPDIR
    threads: int = 0  # 0: as many as there are processors

    def __post_init__(self) -> None:
        if self.fs_version not in FS_VERSIONS:
            raise UsageFailure(f"no RAFS version {self.fs_version}; 5 and 6 are")
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
        for path in self.prefetch_patterns:
            if not path.startswith("/"):
                raise UsageFailure(f"prefetch pattern {path!r} is not an absolute path in the image")
        batch = self.batch_size
        if batch and (not layout.CHUNK_BYTES_MIN <= batch <= size or batch & (batch - 1)):
            raise UsageFailure(f"batch size {batch} is not a power of two from 4 KiB to the chunk size")
        if self.fs_version == 5:
            for name, chosen in (("batches", batch), ("encryption", self.encrypt), ("OCI references", self.oci_ref)):
                if chosen:
                    raise UsageFailure(f"RAFS v5 has no {name}; use --fs-version 6")
        elif self.aligned_chunk:
            raise UsageFailure("aligned chunks are a choice of RAFS v5; those of v6 always are")
        if self.oci_ref and (batch or self.encrypt):
            raise UsageFailure("an image that refers to the OCI layers has no data of its own to batch or encrypt")
        if self.oci_ref and self.digester != "sha256":
            object.__setattr__(self, "digester", "sha256")  # such images have no other

    @property
    def form(self) -> Form:
        return Form(self.chunk_size, self.codec, self.digest_kind, self.spill_dir)

    @property
    def codec(self) -> layout.Codec:
        return layout.Codec.GZIP if self.oci_ref else CODECS[self.compressor]

    @property
    def digest_kind(self) -> layout.Digester:
        return DIGESTERS[self.digester]
