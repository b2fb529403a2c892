"""Layers that tell where each file lies in them: eStargz and zstd:chunked. Their tables make them lazy at once.

The manifest vouches for the table by an annotation of the layer's descriptor, the table for each chunk by its SHA-256.
A table that cannot be used (other sizes than an image can have, no digests) is no failure: the layer is then read
whole."""

import base64
import binascii
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from virtiofsd_nydus.builder.source_tar import TarSource
from virtiofsd_nydus.builder.tar_stream import TarEntry
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.manifest import Descriptor
from virtiofsd_nydus.oci.store import ImageStore
from virtiofsd_nydus.rafs.blob import Form, PlainBlobWriter
from virtiofsd_nydus.rafs.tree import RegularFile, Tree

ESTARGZ_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
# Of zstd:chunked, by today's names and those before: where the table is, and its digest
CHUNKED = tuple(
    (f"{prefix}.zstd-chunked.manifest-position", f"{prefix}.zstd-chunked.manifest-checksum")
    for prefix in ("io.github.containers", "io.containers")
)
ESTARGZ_FOOTER_BYTES = 51
STARGZ_INDEX = "stargz.index.json"
TABLE_BYTES_MAX = 64 << 20
# Of one piece of a file, decoded: a table with larger ones is not used.
PIECE_BYTES_MAX = 64 << 20
# Codecs of a frame
ZEROES, GZIP, ZSTD = 0, 1, 2
KINDS = {
    "reg": b"0", "hardlink": b"1", "symlink": b"2", "char": b"3", "block": b"4", "dir": b"5", "fifo": b"6",
}  # fmt: skip
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Frame:
    """A piece of a file as the layer stores it: csize bytes at coff decode (codec) to what holds usize bytes at
    `inner`. digest: "sha256:..." of those."""

    codec: int
    coff: int
    csize: int
    inner: int
    usize: int
    digest: str


@dataclass
class TocFile:
    """A name of the layer. frames: of a regular file's content, in order. digest: of the whole content, "": not
    told."""

    entry: TarEntry
    frames: list[Frame] = field(default_factory=list)
    digest: str = ""
    end: int = 0  # where its stored bytes end, 0: where the next begin


def has_table(layer: Descriptor) -> bool:
    """Whether the manifest tells of a table in this layer."""
    return ESTARGZ_DIGEST in layer.annotations or _find_chunked(layer) is not None


def _find_chunked(layer: Descriptor) -> tuple[str, str] | None:
    """Place and digest of a zstd:chunked layer's table."""
    told = layer.annotations
    return next(((told[place], told[digest]) for place, digest in CHUNKED if place in told and digest in told), None)


def read_table(store: ImageStore, layer: Descriptor) -> "tuple[list[TocFile], int]":
    """The layer's names, and the bytes fetched for them. Raises Failure: DIGEST for a table that is not the manifest's,
    FORMAT for one that cannot be used."""
    what = f"{store.name}: table of layer {layer.digest[7:19]}"
    chunked = _find_chunked(layer)
    data, end, fetched = _read_chunked(store, layer, chunked, what) if chunked else _read_estargz(store, layer, what)
    try:
        entries = json.loads(data)["entries"]
        files = list(_parse(entries, ZSTD if chunked else GZIP, end))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Failure(f"{what}: not a table of contents: {str(error)[:100]}", Cause.FORMAT) from error
    return files, fetched


def choose_chunk_size(files: list[TocFile], largest: int) -> int:
    """The chunk size that lets a layer's files be verified by the digests of its table: that of the pieces where all
    files are cut alike, else one in which most files are a single chunk, `largest` at most."""
    size = 1 << 20
    cut = {frame.usize for one in files for frame in one.frames[:-1]}
    if len(cut) == 1 and min(cut) & (min(cut) - 1) == 0 and size <= min(cut) <= largest:
        return min(cut)
    whole = largest if cut else max((one.entry.size for one in files), default=0)
    while size < min(whole, largest):
        size *= 2
    return size


def _read_range(store: ImageStore, layer: Descriptor, offset: int, length: int, what: str) -> bytes:
    if not 0 <= offset <= layer.size or not 0 <= length <= min(TABLE_BYTES_MAX, layer.size - offset):
        raise Failure(f"{what}: it is said to lie at {offset}, {length} bytes, beyond the layer", Cause.FORMAT)
    return b"".join(bytes(piece) for piece in store.read_blob_range(layer, offset, length))


def _require_digest(data: bytes, told: str, what: str) -> None:
    if f"sha256:{sha256(data).hexdigest()}" != told:
        raise Failure(f"{what} is not the one that the manifest names: damaged or falsified", Cause.DIGEST)


def _read_chunked(store: ImageStore, layer: Descriptor, told: tuple[str, str], what: str) -> tuple[bytes, int, int]:
    import zstandard

    parts = told[0].split(":")
    try:
        offset, csize, usize = (int(one) for one in parts[:3])
    except ValueError:
        raise Failure(f"{what}: its place is no place", Cause.FORMAT) from None
    if not 0 < usize <= TABLE_BYTES_MAX or len(parts) < 4 or parts[3] != "1":
        raise Failure(f"{what}: of a kind that is not known", Cause.FORMAT)
    packed = _read_range(store, layer, offset, csize, what)
    _require_digest(packed, told[1], what)
    try:
        # Not decompress(): that believes the size in the frame's head.
        return zstandard.ZstdDecompressor().stream_reader(packed).read(usize), offset, csize
    except zstandard.ZstdError as error:
        raise Failure(f"{what}: does not decode: {error}", Cause.FORMAT) from None


def _read_estargz(store: ImageStore, layer: Descriptor, what: str) -> tuple[bytes, int, int]:
    footer = _read_range(store, layer, layer.size - ESTARGZ_FOOTER_BYTES, ESTARGZ_FOOTER_BYTES, what)
    # A gzip member without content; its extra field "SG" holds 16 digits and STARGZ.
    extra = footer[16:38]
    if footer[:2] != b"\x1f\x8b" or footer[12:14] != b"SG" or not extra.endswith(b"STARGZ"):
        raise Failure(f"{what}: the layer has no footer of eStargz", Cause.FORMAT)
    try:
        offset = int(extra[:16], 16)
    except ValueError:
        raise Failure(f"{what}: its place is no place", Cause.FORMAT) from None
    size = layer.size - ESTARGZ_FOOTER_BYTES - offset
    packed = _read_range(store, layer, offset, size, what)
    try:
        inflater = zlib.decompressobj(31)
        plain = inflater.decompress(packed, TABLE_BYTES_MAX)
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as archive:
            member = archive.extractfile(STARGZ_INDEX)
            data = member.read() if member is not None else b""
    except (zlib.error, tarfile.TarError, KeyError) as error:
        raise Failure(f"{what}: does not decode: {error}", Cause.FORMAT) from None
    _require_digest(data, layer.annotations[ESTARGZ_DIGEST], what)
    return data, offset, size + ESTARGZ_FOOTER_BYTES


def _parse(entries: list[dict[str, Any]], codec: int, end: int) -> Iterator[TocFile]:
    """The names of a table. end: where the data before the table ends."""
    starts = sorted({int(one["offset"]) for one in entries if one.get("offset") and one["type"] in ("reg", "chunk")})
    next_start = dict(zip(starts, [*starts[1:], end], strict=False))
    current: TocFile | None = None
    for one in entries:
        kind = one["type"]
        if kind == "chunk":
            if current is None:
                raise ValueError("a piece before any file")
            _add_frame(current, one, codec, next_start)
            continue
        if current is not None:
            _check_file(current)
        current = TocFile(_make_entry(one, KINDS[kind]), [], str(one.get("digest") or ""))
        if kind == "reg" and current.entry.size:
            _add_frame(current, one, codec, next_start)
        yield current
    if current is not None:
        _check_file(current)


def _add_frame(file: TocFile, one: dict[str, Any], codec: int, next_start: dict[int, int]) -> None:
    at = int(one.get("chunkOffset") or 0)
    if at != sum(frame.usize for frame in file.frames):
        raise ValueError("pieces of a file are not in order")
    usize = int(one.get("chunkSize") or file.entry.size - at)
    if not 0 < usize <= file.entry.size - at:
        raise ValueError("a piece beyond its file")
    if usize > PIECE_BYTES_MAX and one.get("chunkType") != "zeros":
        raise ValueError(f"a piece of {usize} bytes")
    digest = str(one.get("chunkDigest") or (file.digest if usize == file.entry.size else ""))
    if one.get("chunkType") == "zeros":
        file.frames.append(Frame(ZEROES, 0, 0, 0, usize, ""))
        return
    coff = int(one["offset"])
    # A file's first piece tells where the file ends, in zstd:chunked.
    file.end = file.end or int(one.get("endOffset") or 0)
    stop = min(next_start[coff], file.end) if file.end else next_start[coff]
    inner = int(one.get("innerOffset") or 0)
    if (
        not 0 < coff + 1 <= stop
        or not 0 <= inner <= PIECE_BYTES_MAX
        or not digest.startswith("sha256:")
        or len(digest) != 71
    ):
        raise ValueError("a piece without place or digest")
    file.frames.append(Frame(codec, coff, stop - coff, inner, usize, digest))


def _check_file(file: TocFile) -> None:
    if sum(frame.usize for frame in file.frames) != (file.entry.size if file.entry.kind == b"0" else 0):
        raise ValueError("the pieces of a file are not all of it")


def _make_entry(one: dict[str, Any], kind: bytes) -> TarEntry:
    entry = TarEntry()
    entry.kind = kind
    # Tables are JSON: names that are not UTF-8 have lost their bytes in it.
    name = str(one["name"])
    if "\N{REPLACEMENT CHARACTER}" in name:
        raise ValueError("a name that JSON cannot hold")
    entry.name = name.encode("utf-8", "surrogateescape")
    entry.link = str(one.get("linkName") or "").encode("utf-8", "surrogateescape")
    entry.size = entry.real_size = int(one.get("size") or 0) if kind == b"0" else 0
    entry.mode = int(one.get("mode") or 0) & 0o7777
    entry.uid, entry.gid = int(one.get("uid") or 0), int(one.get("gid") or 0)
    entry.mtime_ns = _parse_time(str(one.get("modtime") or ""))
    entry.major, entry.minor = int(one.get("devMajor") or 0), int(one.get("devMinor") or 0)
    entry.regions = None
    entry.xattrs = []
    for key, value in (one.get("xattrs") or {}).items():
        try:
            entry.xattrs.append((str(key).encode(), base64.b64decode(value, validate=True)))
        except binascii.Error:
            raise ValueError("an extended attribute that is not base64") from None
    if entry.size < 0:
        raise ValueError("a negative size")
    return entry


def _parse_time(text: str) -> int:
    """RFC 3339 to nanoseconds; "": 0."""
    if not text:
        return 0
    head, dot, rest = text.partition(".")
    digits = ""
    if dot:
        digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
        head += rest[len(digits) :]
    delta = datetime.fromisoformat(head.replace("Z", "+00:00")) - EPOCH
    return (delta.days * 86400 + delta.seconds) * 1_000_000_000 + int((digits + "0" * 9)[:9])


# ---- to a tree


class TocSource(TarSource):
    """Builds a layer's tree of its table, without its data. Chunks of a file that the table has no digest for are read:
    read_file gives their bytes."""

    def __init__(self, files: list[TocFile], form: Form, label: str, read_file: Any) -> None:
        self.tree = Tree(form.directory)
        self.dropped_xattrs = self.files = self.file_bytes = 0
        self.writer = TocWriter(form)
        self.frames: list[tuple[int, ...]] = []
        self.frame_digests: list[str] = []
        self.read_bytes = 0
        self._toc = files
        self._by_entry = {id(one.entry): one for one in files}
        self._known: dict[tuple[bytes, int], int] = {}
        self._table = self.writer.table
        self._chunk_size = form.chunk_size
        self._label = label
        self._read_file = read_file
        self._parent_name = None
        self._parent = 1

    def read(self) -> Tree:
        from virtiofsd_nydus.builder.decoding import TarFailure

        try:
            for one in self._toc:
                self._add(one.entry)
        except TarFailure as failure:
            raise Failure(f"{self._label}: {failure}", failure.cause) from None
        return self.tree

    def _send(self, entry: TarEntry, file: RegularFile) -> None:
        """Each chunk is one piece of the table, or the whole file, or is read."""
        toc = self._by_entry[id(entry)]
        size, step = entry.size, self._chunk_size
        start = self.writer.size
        ends = []
        at = 0
        for frame in toc.frames:
            at += frame.usize
            ends.append(at)
        aligned = all(end % step == 0 for end in ends[:-1]) and all(frame.usize <= step for frame in toc.frames)
        if aligned and all(frame.digest for frame in toc.frames):
            digests = [bytes.fromhex(frame.digest[7:]) for frame in toc.frames]
        elif size <= step and toc.digest.startswith("sha256:"):
            digests = [bytes.fromhex(toc.digest[7:])]
        else:
            digests = [sha256(data).digest() for data in self._read_file(toc, step)]
            self.read_bytes += sum(frame.csize for frame in toc.frames)
        for number, digest in enumerate(digests):
            usize = min(step, size - number * step)
            index = self._known.get((digest, usize))
            if index is None:
                index = self.writer.add(digest, usize, start + number * step)
                self._known[digest, usize] = index
            file.add_chunk(index)
        for frame in toc.frames:
            self.frames.append((self.writer.size, frame.usize, frame.coff, frame.csize, frame.inner, frame.codec))
            self.frame_digests.append(frame.digest[7:])
            self.writer.size += frame.usize


class TocWriter(PlainBlobWriter):
    """The chunk table of a layer with a table: places in the files' contents one behind the other. Nothing is
    written."""

    def __init__(self, form: Form) -> None:
        super().__init__(io.BytesIO(), form, aligned=True)

    def add(self, digest: bytes, usize: int, place: int) -> int:
        return self._add_entry(digest, 0, usize, place, usize, 0)
