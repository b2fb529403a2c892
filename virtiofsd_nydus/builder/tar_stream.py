"""Reads a tar as a stream: headers of every kind found in OCI layers, one pass, nothing held but the entry at hand.

Not the standard library's tarfile: that spends some 100 us on each member (checksums twice in Python, an object of
twenty attributes, seeks), this about a tenth, and a layer easily has 100,000 members. Formats: ustar, GNU (long names,
sparse, base-256 numbers), pax (with sparse 0.0, 0.1 and 1.0) and pre-POSIX.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Protocol

from virtiofsd_nydus.builder.decoding import READ_BYTES, Hash, Readable, TarFailure, hash_pieces, open_pieces
from virtiofsd_nydus.rafs import layout

RECORD = 512
# No honest name or pax header is longer: such a one is refused before memory is allocated for it.
EXTENSION_BYTES_MAX = 8 << 20
SPARSE_REGIONS_MAX = 1 << 20
ZERO_RECORD = bytes(RECORD)


class TarEntry:
    """One member. name and link are as stored; size is of the data that follows, real_size of the file it makes.

    regions: of a sparse file, (offset, length) of what is stored, ascending; None for a plain file.
    """

    __slots__ = (
        "gid", "kind", "link", "major", "minor", "mode", "mtime_ns", "name", "real_size", "regions", "size", "uid",
        "xattrs",
    )  # fmt: skip

    kind: bytes
    name: bytes
    link: bytes
    size: int
    real_size: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    major: int
    minor: int
    xattrs: list[tuple[bytes, bytes]]
    regions: list[tuple[int, int]] | None


@lru_cache(4096)  # the same modes, owners and times come again and again
def parse_number(field: bytes, what: str) -> int:
    """A numeric header field: octal, or base-256 when the first byte says so."""
    if field[0] in (0x80, 0xFF):
        value = int.from_bytes(field[1:], "big")
        return value - (1 << 8 * (len(field) - 1)) if field[0] == 0xFF else value
    text = field.partition(b"\0")[0].strip()
    if not text:
        return 0
    try:
        return int(text, 8)
    except ValueError:
        raise TarFailure(f"{what} is not a number: {field!r}") from None


def parse_pax(data: bytes) -> dict[bytes, bytes]:
    """Records `LENGTH KEY=VALUE\\n`. Sparse 0.0 repeats its keys; those are joined with commas as 0.1 writes them."""
    records: dict[bytes, bytes] = {}
    sparse_map: list[bytes] = []
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        try:
            length = int(data[position:space]) if space > 0 else 0
        except ValueError:
            length = 0
        end = position + length
        if length < 5 or end > len(data) or data[end - 1] != 0x0A:
            if not data[position:].strip(b"\0"):
                break
            raise TarFailure("a pax header is malformed")
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals or not key:
            raise TarFailure("a pax header is malformed")
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            sparse_map.append(value)
        else:
            records[key] = value
        position = end
    if sparse_map:
        records.setdefault(b"GNU.sparse.map", b",".join(sparse_map))
    return records


def parse_time(text: bytes) -> int:
    """A pax time, decimal seconds, in nanoseconds; exact, which a float is not."""
    seconds, _, fraction = text.partition(b".")
    negative = seconds.startswith(b"-")
    digits = int((fraction + b"000000000")[:9]) if fraction else 0
    whole = int(seconds or b"0")
    if not -(1 << 62) < whole < 1 << 62:
        raise ValueError("a time beyond the field of an inode")
    return whole * 1_000_000_000 + (-digits if negative else digits)


def _set_name(entry: TarEntry, value: bytes) -> None:
    entry.name = value


def _set_link(entry: TarEntry, value: bytes) -> None:
    entry.link = value


def _set_time(entry: TarEntry, value: bytes) -> None:
    entry.mtime_ns = parse_time(value)


def _set_size(entry: TarEntry, value: bytes) -> None:
    entry.size = entry.real_size = int(value)


def _set_uid(entry: TarEntry, value: bytes) -> None:
    entry.uid = int(value)


def _set_gid(entry: TarEntry, value: bytes) -> None:
    entry.gid = int(value)


PAX_XATTR = b"SCHILY.xattr."
# What a pax record sets by its key. Each raises ValueError for a value that cannot be.
PAX_FIELDS: dict[bytes, Callable[[TarEntry, bytes], None]] = {
    b"path": _set_name,
    b"linkpath": _set_link,
    b"mtime": _set_time,
    b"size": _set_size,
    b"uid": _set_uid,
    b"gid": _set_gid,
}


def _apply_pax_sparse(entry: TarEntry, pax: dict[bytes, bytes]) -> None:
    """The records of GNU's sparse formats 0.1 and 1.0. Raises ValueError and KeyError for those that do not fit."""
    if b"GNU.sparse.map" in pax:
        numbers = [int(number) for number in pax[b"GNU.sparse.map"].split(b",") if number]
        entry.regions = list(zip(numbers[::2], numbers[1::2], strict=True))
        entry.real_size = int(pax[b"GNU.sparse.size"])
    elif pax.get(b"GNU.sparse.major") == b"1":
        entry.regions = []
        entry.real_size = -int(pax[b"GNU.sparse.realsize"]) - 1  # negative: the map is in the data
    if b"GNU.sparse.name" in pax and entry.regions is not None:
        entry.name = pax[b"GNU.sparse.name"]


class TarStream:
    """for entry in stream.entries(): ... stream.read_data(n) ... ; data not read is skipped."""

    def __init__(self, source: Readable, hashed: "Hash | None" = None) -> None:
        """hashed: gets all bytes of the decoded tar, once drain() has been called."""
        self._pieces = open_pieces(source)
        if hashed is not None:
            self._pieces = hash_pieces(self._pieces, hashed)
        self._buffer = b""
        self._position = 0
        self._left = 0  # data bytes of the entry at hand not yet read
        self._padding = 0
        self.offset = 0  # bytes of the decoded tar consumed

    def _read(self, size: int) -> bytes:
        """Exactly size bytes, or fewer at the end of the stream."""
        start, end = self._position, self._position + size
        if end <= len(self._buffer):
            self._position = end
            self.offset += size
            return self._buffer[start:end]
        parts = [self._buffer[start:]] if start < len(self._buffer) else []
        have = len(self._buffer) - start
        self._buffer, self._position = b"", 0
        while have < size:
            piece = next(self._pieces, b"")
            if not piece:
                break
            if have + len(piece) > size:
                self._buffer, self._position = piece, size - have
                piece = piece[: size - have]
            parts.append(piece)
            have += len(piece)
        self.offset += have
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _skip(self, size: int) -> None:
        while size:
            data = self._read(min(size, READ_BYTES))
            if not data:
                raise TarFailure("the tar ends in the middle of an entry")
            size -= len(data)

    def read_data(self, size: int) -> bytes:
        """The next size bytes of the entry's data; size must not pass what is left of it."""
        data = self._read(size)
        if len(data) != size or size > self._left:
            raise TarFailure("the tar ends in the middle of an entry")
        self._left -= size
        return data

    def _read_extension(self, size: int) -> bytes:
        if not 0 <= size <= EXTENSION_BYTES_MAX:
            raise TarFailure(f"an extended header of {size} bytes")
        padded = size + (-size % RECORD)
        data = self._read(padded)
        if len(data) != padded:
            raise TarFailure("the tar ends in the middle of an extended header")
        return data[:size]

    def drain(self) -> None:
        """Reads the source to its end, so that a hash over it covers all of it."""
        self._buffer, self._position = b"", 0
        for _piece in self._pieces:
            pass

    def entries(self) -> Iterator[TarEntry]:
        long_name = long_link = b""
        pax: dict[bytes, bytes] = {}
        while True:
            if self._left or self._padding:
                self._skip(self._left)
                # A tar may end right after its last data: umoci's `insert` closes none of the layers it writes.
                self._read(self._padding)
                self._left = self._padding = 0
            header = self._read(RECORD)
            if not header:
                break
            if header == ZERO_RECORD:
                break  # the second zero record and any padding go with drain()
            if len(header) != RECORD:
                raise TarFailure("the tar ends in the middle of a header")
            try:
                stored = parse_number(header[148:156], "a checksum")
            except TarFailure:
                stored = -1
            if sum(header) - sum(header[148:156]) + 256 != stored:
                self._check_signed(header, stored)
            kind = header[156:157]
            size = parse_number(header[124:136], "a size")
            if kind == b"x":
                pax.update(parse_pax(self._read_extension(size)))
                continue
            if kind == b"g":  # what runs images gives a global header no meaning in a layer
                self._skip(size + -size % RECORD)
                continue
            if kind == b"L":
                long_name = self._read_extension(size).partition(b"\0")[0]
                continue
            if kind == b"K":
                long_link = self._read_extension(size).partition(b"\0")[0]
                continue
            if kind == b"V":  # a volume's label
                self._skip(size + -size % RECORD)
                continue
            entry = self._make_entry(header, kind, size, long_name, long_link)
            if pax:
                self._apply_pax(entry, pax)
            long_name = long_link = b""
            pax = {}
            if entry.size < 0 or entry.size > layout.FILE_BYTES_MAX:
                raise TarFailure(f"{show(entry.name)}: a size of {entry.size} bytes")
            # Only regular files have data; the size field of others is not looked at (hard links often repeat the
            # file's size).
            if entry.kind in b"123456":
                entry.size = entry.real_size = 0
            self._left, self._padding = entry.size, -entry.size % RECORD
            if entry.kind == b"S":
                self._read_gnu_sparse(header, entry)
            elif entry.regions == [] and entry.real_size < 0:
                self._read_sparse_map(entry)
            if entry.regions is not None:
                self._check_regions(entry)
            yield entry

    def _check_signed(self, header: bytes, stored: int) -> None:
        """Old tars summed signed bytes."""
        total = sum(byte - 256 if byte > 127 else byte for byte in header[:148] + b" " * 8 + header[156:])
        if total != stored:
            if self.offset == RECORD:
                raise TarFailure("neither a tar nor a gzip or zstd stream of one")
            raise TarFailure(f"the header at byte {self.offset - RECORD} of the tar is damaged")

    @staticmethod
    def _make_entry(header: bytes, kind: bytes, size: int, long_name: bytes, long_link: bytes) -> TarEntry:
        entry = TarEntry()
        name = header[:100].partition(b"\0")[0]
        if header[257:263] == b"ustar\0" and header[345]:
            name = header[345:500].partition(b"\0")[0] + b"/" + name
        entry.name = long_name or name
        entry.link = long_link or header[157:257].partition(b"\0")[0]
        if kind in b"\0007":
            kind = b"5" if kind == b"\0" and entry.name.endswith(b"/") else b"0"
        entry.kind = kind
        entry.size = entry.real_size = size
        entry.mode = parse_number(header[100:108], "a mode") & 0o7777
        entry.uid = parse_number(header[108:116], "an owner")
        entry.gid = parse_number(header[116:124], "a group")
        entry.mtime_ns = parse_number(header[136:148], "a time") * 1_000_000_000
        entry.major = entry.minor = 0
        if kind in b"34":
            entry.major = parse_number(header[329:337], "a device number")
            entry.minor = parse_number(header[337:345], "a device number")
        entry.xattrs = []
        entry.regions = None
        return entry

    @staticmethod
    def _apply_pax(entry: TarEntry, pax: dict[bytes, bytes]) -> None:
        """Sets what pax records say of an entry. A field's record without a value leaves the header's, says pax(1); an
        xattr may be empty."""
        try:
            for key, value in pax.items():
                if key.startswith(PAX_XATTR):
                    entry.xattrs.append((key.removeprefix(PAX_XATTR), value))
                elif value and (apply := PAX_FIELDS.get(key)) is not None:
                    apply(entry, value)
            _apply_pax_sparse(entry, pax)
        except (ValueError, KeyError):
            raise TarFailure(f"{show(entry.name)}: a pax header is malformed") from None

    def _read_gnu_sparse(self, header: bytes, entry: TarEntry) -> None:
        """The old format: four regions in the header, more in records behind it."""
        entry.kind = b"0"
        entry.real_size = parse_number(header[483:495], "a size")
        entry.regions = []
        table, more = header[386:482], header[482]
        while True:
            for start in range(0, len(table), 24):
                if table[start]:
                    entry.regions.append(
                        (
                            parse_number(table[start : start + 12], "an offset"),
                            parse_number(table[start + 12 : start + 24], "a length"),
                        )
                    )
            if not more:
                return
            record = self._read(RECORD)
            if len(record) != RECORD or len(entry.regions) > SPARSE_REGIONS_MAX:
                raise TarFailure(f"{show(entry.name)}: a sparse map without end")
            table, more = record[:504], record[504]

    def _read_sparse_map(self, entry: TarEntry) -> None:
        """Format 1.0: decimal lines at the start of the data, padded to a record."""
        entry.real_size = -entry.real_size - 1
        numbers: list[int] = []
        rest, want = b"", 1
        try:
            while len(numbers) < want:
                rest += self.read_data(RECORD)
                *lines, rest = rest.split(b"\n")
                numbers += [int(line) for line in lines]
                if numbers:
                    want = 1 + 2 * numbers[0]
                if not 0 < want <= 2 * SPARSE_REGIONS_MAX:
                    raise ValueError
        except ValueError:
            raise TarFailure(f"{show(entry.name)}: a malformed sparse map") from None
        entry.size = self._left
        entry.regions = list(zip(numbers[1:want:2], numbers[2:want:2], strict=True))

    @staticmethod
    def _check_regions(entry: TarEntry) -> None:
        position = stored = 0
        for offset, length in entry.regions or ():
            if offset < position or length < 0:
                raise TarFailure(f"{show(entry.name)}: sparse regions out of order")
            position = offset + length
            stored += length
        if position > entry.real_size or stored != entry.size or entry.real_size > layout.FILE_BYTES_MAX:
            raise TarFailure(f"{show(entry.name)}: sparse regions do not fit the file's size")
        entry.regions = [region for region in entry.regions or () if region[1]]


class ExactReader(Protocol):
    """A source decoded no further than it is asked for."""

    def read(self, size: int, /) -> bytes:
        """size bytes, fewer only at the end."""
        ...

    def drain(self) -> None: ...


class ZranTarStream(TarStream):
    """Reads the tar at the pace of its consumer, so that the decoder stands where the reader does."""

    def __init__(self, reader: ExactReader, hashed: "Hash | None" = None) -> None:
        self._reader = reader
        self._hashed = hashed
        self._left = self._padding = 0
        self.offset = 0

    def _read(self, size: int) -> bytes:
        data = self._reader.read(size)
        if self._hashed is not None:
            self._hashed.update(data)
        self.offset += len(data)
        return data

    def drain(self) -> None:
        while self._hashed is not None and self._read(READ_BYTES):
            pass
        self._reader.drain()


def show(name: bytes) -> str:
    """A name for a message: one line, whatever bytes it holds."""
    text = ascii(name.decode("utf-8", "surrogateescape"))[1:-1]
    return text if len(text) <= 200 else text[:200] + "..."
