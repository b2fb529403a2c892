"""Writes a tar as a stream: ustar headers, and pax records for values that do not fit those. Names and xattrs are any
bytes. The same tree gives the same tar."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

RECORD = 512
END_RECORDS = 2
PATH_FIELD, LINK_FIELD = 100, 100
NUMBER_MAX = (1 << 21) - 1  # seven octal digits
SIZE_MAX = (1 << 33) - 1  # eleven
XATTR_KEY = b"SCHILY.xattr."


def encode_pax_record(key: bytes, value: bytes) -> bytes:
    """`LENGTH KEY=VALUE\\n`, where LENGTH counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def encode_time(mtime_ns: int) -> bytes:
    """Decimal seconds, exact."""
    seconds, nanoseconds = divmod(abs(mtime_ns), 1_000_000_000)
    text = b"%d.%09d" % (seconds, nanoseconds) if nanoseconds else b"%d" % seconds
    return b"-" + text if mtime_ns < 0 else text


@dataclass(frozen=True, slots=True, kw_only=True)
class TarMember:
    """What a header and its pax records tell. kind: the header's type, b"0" and so on. link: target of a hard or
    symbolic link. device: major and minor."""

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int = 0
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: Iterable[tuple[bytes, bytes]] = ()


PAX_HEADER = TarMember(name=b"././@PaxHeader", kind=b"x", mode=0o644, uid=0, gid=0, mtime_ns=0)


def encode_header(member: TarMember, size: int) -> bytes:
    """One header. A value that its field cannot hold is 0 there; a pax record has it."""
    header = bytearray(RECORD)

    def put_number(at: int, width: int, number: int) -> None:
        fits = 0 <= number < 1 << 3 * (width - 1)
        header[at : at + width] = b"%0*o\0" % (width - 1, number if fits else 0)

    header[: min(len(member.name), PATH_FIELD)] = member.name[:PATH_FIELD]
    put_number(100, 8, member.mode)
    put_number(108, 8, member.uid)
    put_number(116, 8, member.gid)
    put_number(124, 12, size)
    put_number(136, 12, member.mtime_ns // 1_000_000_000)
    header[156:157] = member.kind
    header[157 : 157 + min(len(member.link), LINK_FIELD)] = member.link[:LINK_FIELD]
    header[257:265] = b"ustar\00000"
    put_number(329, 8, member.device[0])
    put_number(337, 8, member.device[1])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


class TarWriter:
    """add() a member, then write() its data; close() at the end."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._padding = 0
        self._left = 0

    def add(self, member: TarMember) -> None:
        self._end_data()
        pax = b""
        if len(member.name) > PATH_FIELD:
            pax += encode_pax_record(b"path", member.name)
        if len(member.link) > LINK_FIELD:
            pax += encode_pax_record(b"linkpath", member.link)
        for key, number in ((b"uid", member.uid), (b"gid", member.gid)):
            if number > NUMBER_MAX:
                pax += encode_pax_record(key, b"%d" % number)
        if member.size > SIZE_MAX:
            pax += encode_pax_record(b"size", b"%d" % member.size)
        if member.mtime_ns % 1_000_000_000 or not 0 <= member.mtime_ns // 1_000_000_000 <= SIZE_MAX:
            pax += encode_pax_record(b"mtime", encode_time(member.mtime_ns))
        for key, value in sorted(member.xattrs):
            pax += encode_pax_record(XATTR_KEY + key, value)
        if pax:
            self._out.write(encode_header(PAX_HEADER, len(pax)))
            self._out.write(pax + bytes(-len(pax) % RECORD))
        self._out.write(encode_header(member, member.size))
        self._left, self._padding = member.size, -member.size % RECORD

    def write(self, data: bytes) -> None:
        """The next bytes of the member's data."""
        if len(data) > self._left:
            raise ValueError("more data than the member's size")
        self._left -= len(data)
        self._out.write(data)

    def _end_data(self) -> None:
        if self._left:
            raise ValueError("less data than the member's size")
        self._out.write(bytes(self._padding))
        self._padding = 0

    def close(self) -> None:
        self._end_data()
        self._out.write(bytes(END_RECORDS * RECORD))
        self._out.flush()
