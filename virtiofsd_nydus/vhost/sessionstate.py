"""What a FUSE session is beyond its rings, as bytes: for a migration to another host, a snapshot, and a successor.

One front-end's session and the mount table behind it: INIT's answer, mounts with their serials, nodes and open files of
shared directories, requests in flight. An image adds nothing per inode, because a nodeid is serial << 48 | inode.

The bytes come from a network and are hostile. decode() takes each field by its own bound, raises Failure with one
line for whatever does not hold, and never gives half a state. What the fields mean is for the code that uses the state:
does that serial exist, does that path lie below the source.

    magic 8 | format version u32 | sections | END
    section: tag of 4 bytes, length u64, body. A tag that begins with a small letter may be left out by a reader.
    END: CRC-32 of all bytes before it: against a stream that was cut or damaged, not against forgery

All numbers are little-endian. Light: loaded before the daemon answers RUNNING.
"""

import json
import struct
import zlib

from virtiofsd_nydus.errors import Cause, Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAGIC = b"VNDSTATE"
FORMAT_VERSION = 1

STATE_MAX_BYTES = 1 << 30
JSON_MAX_BYTES = 16 << 20
MOUNTS_MAX = 0xFFFF  # serials
PSEUDO_MAX = 1 << 20
PATH_MAX_BYTES = 4096
NAME_MAX_BYTES = 255
HANDLE_MAX_BYTES = 128  # the kernel's MAX_HANDLE_SZ
NODES_MAX = 4 << 20  # csrc/passthrough/internal.h, PT_NODES_MAX
FILES_MAX = 1 << 19  # csrc/fuse/held.c, FILES_MAX
RINGS_MAX, HEADS_MAX = 16, 1024  # csrc/vnd.h, VND_QUEUE_MAX and VND_RING_MAX
CHUNKS_MAX = 1 << 25  # of one blob
INO_MAX = (1 << 48) - 1
U32_MAX, U64_MAX = (1 << 32) - 1, (1 << 64) - 1

FS_RAFS, FS_PASSTHROUGH = "rafs", "passthrough"

_HEAD = struct.Struct("<8sI")
_SECTION = struct.Struct("<4sQ")
_CRC = struct.Struct("<I")
_COUNT = struct.Struct("<I")
_NODE = struct.Struct("<HQQQIiHHH")  # serial ino generation lookups type, handle type, bytes of handle, mount, path
_FILE = struct.Struct("<HQQI")  # serial ino fh flags
_RING = struct.Struct("<HH")  # index, heads
_CHUNKS = struct.Struct("<HII")  # serial, blob, chunks

SESSION, NODES, FILES, RINGS, CHUNKS, END = b"SESS", b"NODE", b"FILE", b"RING", b"chnk", b"END "


class InitResult:
    """What INIT was answered: the guest does not send it again."""

    __slots__ = ("flags", "max_pages", "max_write", "minor")

    def __init__(self, minor: int, flags: int, max_write: int, max_pages: int) -> None:
        self.minor, self.flags, self.max_write, self.max_pages = minor, flags, max_write, max_pages


class PseudoNode:
    """A directory of the mount table's own. parent: the inode number of another, or 1."""

    __slots__ = ("ino", "name", "parent")

    def __init__(self, ino: int, parent: int, name: str) -> None:
        self.ino, self.parent, self.name = ino, parent, name


class MountState:
    """One mount. fs_type: FS_RAFS or FS_PASSTHROUGH. source: the bootstrap's or the directory's path, a hint.

    digest: SHA-256 of the bootstrap in hexadecimal, "" of a directory. config: ImageConfig's fields by name, {} of a
    directory; the caller takes secrets out of what is to leave the host. keep_top: as in Passthrough.
    """

    __slots__ = ("config", "digest", "fs_type", "keep_top", "path", "serial", "source")

    def __init__(
        self,
        serial: int,
        path: str,
        fs_type: str,
        source: str,
        *,
        digest: str = "",
        config: "dict[str, Any] | None" = None,
        keep_top: bool = False,
    ) -> None:
        self.serial, self.path, self.fs_type, self.source = serial, path, fs_type, source
        self.digest, self.keep_top = digest, keep_top
        self.config: dict[str, Any] = config or {}


class NodeState:
    """A file of a shared directory that the guest knows. path, below the source, and handle: either may be empty.

    mount: path below the source where the file's own mount begins, "" for the source's. type: S_IFMT bits.
    """

    __slots__ = ("generation", "handle", "handle_type", "ino", "lookups", "mount", "path", "serial", "type")

    def __init__(
        self,
        serial: int,
        ino: int,
        *,
        generation: int = 0,
        lookups: int = 1,
        type: int = 0,
        mount: bytes = b"",
        path: bytes = b"",
        handle_type: int = 0,
        handle: bytes = b"",
    ) -> None:
        self.serial, self.ino, self.generation, self.lookups, self.type = serial, ino, generation, lookups, type
        self.mount, self.path, self.handle_type, self.handle = mount, path, handle_type, handle


class FileState:
    """An open file of a shared directory. flags: of open(2)."""

    __slots__ = ("fh", "flags", "ino", "serial")

    def __init__(self, serial: int, ino: int, fh: int, flags: int) -> None:
        self.serial, self.ino, self.fh, self.flags = serial, ino, fh, flags


class RingState:
    """Heads of a ring that were fetched and not answered, oldest first."""

    __slots__ = ("heads", "index")

    def __init__(self, index: int, heads: "list[int]") -> None:
        self.index, self.heads = index, heads


class BlobChunks:
    """Which chunks of a blob the source had. bits: chunk i is bit i % 8 of byte i // 8."""

    __slots__ = ("bits", "blob", "count", "serial")

    def __init__(self, serial: int, blob: int, count: int, bits: bytes) -> None:
        self.serial, self.blob, self.count, self.bits = serial, blob, count, bits


class SessionState:
    """All of it. kind: SESSION_RAFS or SESSION_MIXED. init None: no INIT came yet, or the guest has unmounted."""

    __slots__ = ("chunks", "files", "init", "kind", "mounts", "next_serial", "nodes", "pseudo", "rings")

    def __init__(self, kind: int, next_serial: int = 1, init: InitResult | None = None) -> None:
        self.kind, self.next_serial, self.init = kind, next_serial, init
        self.pseudo: list[PseudoNode] = []
        self.mounts: list[MountState] = []
        self.nodes: list[NodeState] = []
        self.files: list[FileState] = []
        self.rings: list[RingState] = []
        self.chunks: list[BlobChunks] = []


# ---- writing


def encode(state: SessionState) -> bytes:
    """The state as bytes. Raises Failure where it is larger than a reader takes."""
    parts = [_HEAD.pack(MAGIC, FORMAT_VERSION)]
    for tag, body in (
        (SESSION, json.dumps(_session_document(state), separators=(",", ":")).encode()),
        (NODES, _encode_list(state.nodes, _encode_node)),
        (FILES, _encode_list(state.files, lambda one: _FILE.pack(one.serial, one.ino, one.fh, one.flags))),
        (RINGS, _encode_list(state.rings, _encode_ring)),
        (CHUNKS, _encode_list(state.chunks, _encode_chunks)),
    ):
        if tag != SESSION and len(body) == _COUNT.size:
            continue  # nothing in it
        if tag == SESSION and len(body) > JSON_MAX_BYTES:
            raise Failure(f"the mount table takes {len(body)} bytes of a session's state, at most {JSON_MAX_BYTES}")
        parts += (_SECTION.pack(tag, len(body)), body)
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    data = b"".join((*parts, _SECTION.pack(END, _CRC.size), _CRC.pack(crc)))
    if len(data) > STATE_MAX_BYTES:
        raise Failure(f"the session's state takes {len(data)} bytes, at most {STATE_MAX_BYTES}")
    return data


def _encode_list(items: "list[Any]", pack: "Callable[[Any], bytes]") -> bytes:
    return b"".join((_COUNT.pack(len(items)), *map(pack, items)))


def _encode_node(node: NodeState) -> bytes:
    return (
        _NODE.pack(
            node.serial,
            node.ino,
            node.generation,
            node.lookups,
            node.type,
            node.handle_type,
            len(node.handle),
            len(node.mount),
            len(node.path),
        )
        + node.handle
        + node.mount
        + node.path
    )


def _encode_ring(ring: RingState) -> bytes:
    return _RING.pack(ring.index, len(ring.heads)) + struct.pack(f"<{len(ring.heads)}H", *ring.heads)


def _encode_chunks(one: BlobChunks) -> bytes:
    return _CHUNKS.pack(one.serial, one.blob, one.count) + one.bits


def _session_document(state: SessionState) -> "dict[str, Any]":
    init = state.init
    return {
        "kind": state.kind,
        "next_serial": state.next_serial,
        "init": None if init is None else {name: getattr(init, name) for name in InitResult.__slots__},
        "pseudo": [[node.ino, node.parent, node.name] for node in state.pseudo],
        "mounts": [{name: getattr(mount, name) for name in MountState.__slots__} for mount in state.mounts],
    }


# ---- reading


def damaged(text: str) -> Failure:
    return Failure(f"session state: {text}", Cause.FORMAT)


class _Reader:
    """Takes a section's body apart. It never reads past its end."""

    def __init__(self, body: "memoryview", name: str) -> None:
        self._body, self._at, self._name = body, 0, name

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._body):
            raise damaged(f"section {self._name} ends after {len(self._body)} bytes, {end} are due")
        part = bytes(self._body[self._at : end])
        self._at = end
        return part

    def unpack(self, form: struct.Struct) -> "tuple[Any, ...]":
        return form.unpack(self.take(form.size))

    def count(self, limit: int) -> int:
        number: int = self.unpack(_COUNT)[0]
        if number > limit:
            raise damaged(f"section {self._name} has {number} entries, at most {limit} are taken")
        return number

    def end(self) -> None:
        if self._at != len(self._body):
            raise damaged(f"section {self._name} has {len(self._body) - self._at} bytes too many")


def decode(data: bytes) -> SessionState:
    """The state in these bytes. Raises Failure."""
    if len(data) > STATE_MAX_BYTES:
        raise damaged(f"{len(data)} bytes, at most {STATE_MAX_BYTES} are taken")
    if len(data) < _HEAD.size:
        raise damaged(f"it ends after {len(data)} bytes")
    magic, version = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise damaged("it is not one of virtiofsd-nydus")
    if version != FORMAT_VERSION:
        raise damaged(f"its format is {version}, {FORMAT_VERSION} is known here")
    sections = _split(memoryview(data))
    if SESSION not in sections:
        raise damaged("it has no session")
    state = _read_session(bytes(sections[SESSION]))
    for tag, read in ((NODES, _read_nodes), (FILES, _read_files), (RINGS, _read_rings), (CHUNKS, _read_chunks)):
        if tag in sections:
            reader = _Reader(sections[tag], tag.decode())
            read(reader, state)
            reader.end()
    return state


def _split(data: "memoryview") -> "dict[bytes, memoryview]":
    found: dict[bytes, memoryview] = {}
    at = _HEAD.size
    while True:
        if len(data) - at < _SECTION.size:
            raise damaged(f"it ends after {len(data)} bytes, in the middle")
        tag, length = _SECTION.unpack_from(data, at)
        begin = at + _SECTION.size
        if length > len(data) - begin:
            raise damaged(f"it ends after {len(data)} bytes, section {_shown(tag)} goes to {begin + length}")
        if tag == END:
            break
        if tag in found:
            raise damaged(f"section {_shown(tag)} is there twice")
        if tag not in (SESSION, NODES, FILES, RINGS, CHUNKS):
            if not tag[:1].islower():
                raise damaged(f"section {_shown(tag)} is not known here: a newer version wrote it")
        else:
            found[tag] = data[begin : begin + length]
        at = begin + length
    if length != _CRC.size or begin + length != len(data):
        raise damaged("bytes follow its end")
    if _CRC.unpack_from(data, begin)[0] != zlib.crc32(data[:at]):
        raise damaged("its checksum is wrong")
    return found


def _shown(tag: bytes) -> str:
    return repr(tag.decode("ascii", "backslashreplace"))


def _number(document: "dict[str, Any]", key: str, limit: int, least: int = 0) -> int:
    value = document.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= limit:
        raise damaged(f"{key} is not a number from {least} to {limit}")
    return value


def _text(value: object, what: str, limit: int) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise damaged(f"{what} is not a text")
    try:
        size = len(value.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        raise damaged(f"{what} is not a text") from None
    if size > limit:
        raise damaged(f"{what} has {size} bytes, at most {limit} are taken")
    return value


def _read_session(body: bytes) -> SessionState:
    if len(body) > JSON_MAX_BYTES:
        raise damaged(f"section SESS has {len(body)} bytes, at most {JSON_MAX_BYTES} are taken")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise damaged("section SESS is not JSON") from None
    if not isinstance(document, dict):
        raise damaged("section SESS is not an object")
    state = SessionState(_number(document, "kind", 1), _number(document, "next_serial", MOUNTS_MAX + 1, 1))
    init = document.get("init")
    if init is not None:
        if not isinstance(init, dict):
            raise damaged("init is not an object")
        state.init = InitResult(
            _number(init, "minor", U32_MAX),
            _number(init, "flags", U64_MAX),
            _number(init, "max_write", U32_MAX),
            _number(init, "max_pages", 0xFFFF),
        )
    state.pseudo = _read_pseudo(document.get("pseudo"))
    state.mounts = _read_mounts(document.get("mounts"), state.next_serial)
    return state


def _read_pseudo(value: object) -> "list[PseudoNode]":
    """Parents come before what is in them, because numbers only grow."""
    if not isinstance(value, list) or len(value) > PSEUDO_MAX:
        raise damaged("pseudo is not a list of directories")
    found: list[PseudoNode] = []
    known, names = {1}, set()
    for entry in value:
        if not isinstance(entry, list) or len(entry) != 3:
            raise damaged("pseudo has an entry that is none")
        fields = {"ino": entry[0], "parent": entry[1]}
        node = PseudoNode(
            _number(fields, "ino", INO_MAX, 2),
            _number(fields, "parent", INO_MAX, 1),
            _text(entry[2], "the name of a directory", NAME_MAX_BYTES),
        )
        if node.name in ("", ".", "..") or "/" in node.name:
            raise damaged(f"a directory has the name {node.name!r}")
        if (found and node.ino <= found[-1].ino) or node.parent not in known or (node.parent, node.name) in names:
            raise damaged(f"directory {node.ino} is out of order, twice there or without a parent")
        known.add(node.ino)
        names.add((node.parent, node.name))
        found.append(node)
    return found


def _read_mounts(value: object, next_serial: int) -> "list[MountState]":
    if not isinstance(value, list) or len(value) > MOUNTS_MAX:
        raise damaged("mounts is not a list")
    found: list[MountState] = []
    paths: set[str] = set()
    for entry in value:
        if not isinstance(entry, dict):
            raise damaged("mounts has an entry that is none")
        mount = _read_mount(entry)
        if mount.serial >= next_serial or (found and mount.serial <= found[-1].serial):
            raise damaged(f"mount number {mount.serial} is out of order")
        if mount.path in paths:
            raise damaged(f"two mounts are at {mount.path}")
        paths.add(mount.path)
        found.append(mount)
    return found


def _read_mount(entry: "dict[str, Any]") -> MountState:
    fs_type = entry.get("fs_type")
    if fs_type not in (FS_RAFS, FS_PASSTHROUGH):
        raise damaged(f"a mount is of type {fs_type!r:.40}")
    path = _text(entry.get("path"), "a mount point", PATH_MAX_BYTES)
    if not path.startswith("/"):
        raise damaged(f"mount point {path!r:.100} is not absolute")
    digest = _text(entry.get("digest"), "a digest", 64)
    if (fs_type == FS_RAFS) != bool(digest) or digest.strip("0123456789abcdef") or len(digest) not in (0, 64):
        raise damaged(f"the digest of mount {path} is none")
    config = entry.get("config")
    if not isinstance(config, dict):
        raise damaged(f"the configuration of mount {path} is not an object")
    return MountState(
        _number(entry, "serial", MOUNTS_MAX, 1),
        path,
        fs_type,
        _text(entry.get("source"), f"the source of mount {path}", PATH_MAX_BYTES),
        digest=digest,
        config=config,
        keep_top=entry.get("keep_top") is True,
    )


def _read_nodes(reader: _Reader, state: SessionState) -> None:
    for _ in range(reader.count(NODES_MAX)):
        serial, ino, generation, lookups, kind, handle_type, handle, mount, path = reader.unpack(_NODE)
        if ino > INO_MAX or handle > HANDLE_MAX_BYTES or mount >= PATH_MAX_BYTES or path >= PATH_MAX_BYTES:
            raise damaged(f"node {ino} has a number or a length that is too large")
        node = NodeState(
            serial,
            ino,
            generation=generation,
            lookups=lookups,
            type=kind,
            handle_type=handle_type,
            handle=reader.take(handle),
            mount=_below(reader.take(mount)),
            path=_below(reader.take(path)),
        )
        state.nodes.append(node)


def _below(path: bytes) -> bytes:
    """A path below a directory: plain names with one '/' between two of them; "" is the directory."""
    if path and (
        b"\0" in path or any(name in (b"", b".", b"..") or len(name) > NAME_MAX_BYTES for name in path.split(b"/"))
    ):
        raise damaged(f"path {path!r:.100} does not lie below a directory")
    return path


def _read_files(reader: _Reader, state: SessionState) -> None:
    for _ in range(reader.count(FILES_MAX)):
        serial, ino, fh, flags = reader.unpack(_FILE)
        if ino > INO_MAX or fh == 0:
            raise damaged(f"open file {fh:#x} is none")
        state.files.append(FileState(serial, ino, fh, flags))


def _read_rings(reader: _Reader, state: SessionState) -> None:
    seen: set[int] = set()
    for _ in range(reader.count(RINGS_MAX)):
        index, count = reader.unpack(_RING)
        if index >= RINGS_MAX or count > HEADS_MAX or index in seen:
            raise damaged(f"ring {index} with {count} requests in flight")
        seen.add(index)
        heads = list(struct.unpack(f"<{count}H", reader.take(2 * count)))
        if len(set(heads)) < count or any(head >= HEADS_MAX for head in heads):
            raise damaged(f"ring {index}: a request in flight is there twice or beyond the ring")
        state.rings.append(RingState(index, heads))


def _read_chunks(reader: _Reader, state: SessionState) -> None:
    for _ in range(reader.count(MOUNTS_MAX)):
        serial, blob, count = reader.unpack(_CHUNKS)
        if count > CHUNKS_MAX:
            raise damaged(f"blob {blob} of mount number {serial} with {count} chunks")
        state.chunks.append(BlobChunks(serial, blob, count, reader.take((count + 7) // 8)))
