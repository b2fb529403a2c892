"""Malformed FUSE requests in well-formed chains: each is answered by an error, or by nothing where there is no room."""

import errno
import struct

import pytest

from tests.vhost.hostile.tools import GETATTR_REPLY, GETATTR_ROOT, NEXT, WRITE, Bench
from virtiofsd_nydus.fakeguest.fuse_client import (
    BATCH_FORGET,
    FORGET,
    GETATTR,
    GETXATTR,
    INIT,
    INIT_IN,
    LISTXATTR,
    LOOKUP,
    LSEEK,
    READ,
    READ_IN,
    READDIR,
    READDIRPLUS,
    READLINK,
    pack_request,
)

ROOM = 4096


def offer(bench: Bench, request: bytes, room: int = ROOM, sent: int | None = None) -> None:
    """A request, sent bytes of it, with that much room for the reply."""
    bench.put_request(request)
    length = len(request) if sent is None else sent
    rows = [(bench.request_gpa, length, NEXT if room else 0, 1)]
    if room:
        rows.append((bench.out_gpa, room, WRITE, 0))
    bench.put_ring(rows)
    bench.offer([0])


def offer_only_room(bench: Bench, room: int) -> None:
    bench.put_ring([(bench.out_gpa, room, WRITE, 0)])
    bench.offer([0])


def read_at(node: int, offset: int, size: int, opcode: int = READ) -> bytes:
    return pack_request(opcode, 2, node, READ_IN.pack(0, offset, size, 0, 0, 0, 0))


INIT_BODY = INIT_IN.pack(7, 38, 131072, 0, 0)
# name -> request; each must be answered by an error
ERRORS = {
    "header claims more than was sent": pack_request(GETATTR, 2, 1, bytes(16), 4096),
    "header claims 4 GiB": pack_request(GETATTR, 2, 1, bytes(16), 0xFFFF_FFFF),
    "header claims less than itself": pack_request(GETATTR, 2, 1, bytes(16), 39),
    "header claims nothing": pack_request(GETATTR, 2, 1, bytes(16), 0),
    "arguments cut": pack_request(READ, 2, 1, bytes(39)),
    "no arguments": pack_request(READ, 2, 1),
    "look-up without a name": pack_request(LOOKUP, 2, 1),
    "look-up of the empty name": pack_request(LOOKUP, 2, 1, b"\0"),
    "look-up of a name without end": pack_request(LOOKUP, 2, 1, b"data"),
    "look-up of a name with a slash": pack_request(LOOKUP, 2, 1, b"sub/deep\0"),
    "look-up of a name of 256 bytes": pack_request(LOOKUP, 2, 1, b"x" * 256 + b"\0"),
    "look-up of a name of 3000 bytes": pack_request(LOOKUP, 2, 1, b"x" * 3000 + b"\0"),
    "unknown node": pack_request(GETATTR, 2, 0x7FFF_FFFF_FFFF, bytes(16)),
    "node of no mount": pack_request(GETATTR, 2, 0xFFFF << 48 | 1, bytes(16)),
    "node 0": pack_request(GETATTR, 2, 0, bytes(16)),
    "node of all ones": pack_request(GETATTR, 2, (1 << 64) - 1, bytes(16)),
    "look-up in an unknown node": pack_request(LOOKUP, 2, 0x7FFF_FFFF_FFF0, b"data\0"),
    "read of a directory": read_at(1, 0, 4096),
    "read of an unknown node": read_at(0x7FFF_FFFF_FFFF, 0, 4096),
    "read of more than there is room": read_at(1, 0, 0xFFFF_FFFF),
    "listing of an unknown node": read_at(0x7FFF_FFFF_FFFF, 0, 4000, READDIR),
    "link target of a directory": pack_request(READLINK, 2, 1),
    "xattr without a name": pack_request(GETXATTR, 2, 1, struct.pack("=II", 100, 0)),
    "xattr of a name without end": pack_request(GETXATTR, 2, 1, struct.pack("=II", 100, 0) + b"user.a"),
    "xattr of a name of 3000 bytes": pack_request(GETXATTR, 2, 1, struct.pack("=II", 100, 0) + b"u" * 3000 + b"\0"),
    "xattr of an unknown node": pack_request(GETXATTR, 2, 0x7FFF_FFFF_FFFF, struct.pack("=II", 100, 0) + b"user.a\0"),
    "lseek of no whence": pack_request(LSEEK, 2, 1, struct.pack("=QQII", 0, 0, 77, 0)),
    "init cut short": pack_request(INIT, 2, 0, bytes(7)),
    "init of major 6": pack_request(INIT, 2, 0, INIT_IN.pack(6, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_answered_by_an_error(bench: Bench, name: str) -> None:
    offer(bench, ERRORS[name])
    bench.assert_error(ROOM)


@pytest.mark.parametrize("opcode", [0, 7, 19, 53, 54, 99, 4096, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_unknown_opcode(bench: Bench, opcode: int) -> None:
    offer(bench, pack_request(opcode, 2, 1, bytes(64)))
    bench.assert_error(ROOM, errno.ENOSYS)


@pytest.mark.parametrize("opcode", range(1, 53))
def test_every_opcode_without_arguments(bench: Bench, opcode: int) -> None:
    """A header alone: an error, or the right reply of what needs none. Nothing is read past the request."""
    offer(bench, pack_request(opcode, 2, 1))
    bench.assert_answered(room=ROOM)
    bench.assert_recovers()


@pytest.mark.parametrize("sent", [1, 8, 16, 39])
def test_less_than_a_header(bench: Bench, sent: int) -> None:
    offer(bench, GETATTR_ROOT, ROOM, sent)
    length = bench.assert_answered(room=ROOM)
    assert length in (0, 16)
    bench.assert_serves()


def test_no_request_at_all(bench: Bench) -> None:
    offer_only_room(bench, ROOM)
    assert bench.assert_answered(room=ROOM) in (0, 16)
    bench.assert_serves()


@pytest.mark.parametrize("room", [1, 8, 15])
def test_room_for_less_than_a_header(bench: Bench, room: int) -> None:
    offer(bench, GETATTR_ROOT, room)
    assert bench.assert_answered(room=room) == 0
    bench.assert_serves()


@pytest.mark.parametrize("room", [16, 17, 119])
def test_room_too_small_for_the_reply(bench: Bench, room: int) -> None:
    offer(bench, GETATTR_ROOT, room)
    bench.assert_error(room)


def test_no_room_for_a_request_that_needs_a_reply(bench: Bench) -> None:
    for request in (
        GETATTR_ROOT,
        pack_request(LOOKUP, 2, 1, b"data\0"),
        read_at(1, 0, 4096),
        pack_request(38, 2, 0),
        pack_request(INIT, 2, 0, INIT_BODY),
        pack_request(99, 2, 1),
    ):
        offer(bench, request, 0)
        assert bench.assert_answered() == 0
    bench.assert_recovers()


def test_forget_with_room_for_a_reply(bench: Bench) -> None:
    offer(bench, pack_request(FORGET, 2, 1, struct.pack("=Q", 1)), ROOM)
    assert bench.assert_answered(room=ROOM) in (0, 16)
    bench.assert_serves()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        bytes(4),
        struct.pack("=II", 0xFFFF_FFFF, 0),
        struct.pack("=II", 0xFFFF_FFFF, 0) + bytes(64),
        struct.pack("=II", 3, 0) + bytes(16),
        struct.pack("=IIQQ", 1, 0, 1, (1 << 64) - 1),
    ],
    ids=["empty", "cut", "count alone", "huge count", "count of three for one", "underflow"],
)
def test_batch_forget_lies(bench: Bench, body: bytes) -> None:
    offer(bench, pack_request(BATCH_FORGET, 2, 0, body), 0)
    assert bench.assert_answered() == 0
    bench.assert_serves()


@pytest.mark.parametrize("node", [0, 1, 0xFFFF << 48, (1 << 64) - 1])
def test_forget_underflow(bench: Bench, node: int) -> None:
    for count in (1, (1 << 63), (1 << 64) - 1):
        offer(bench, pack_request(FORGET, 2, node, struct.pack("=Q", count)), 0)
        assert bench.assert_answered() == 0
    bench.assert_serves()


def test_requests_before_init(bench: Bench) -> None:
    bench.guest.reboot()
    offer(bench, pack_request(38, 2, 0))  # DESTROY, whether or not a session is left
    bench.assert_answered(room=ROOM)
    for request in (GETATTR_ROOT, pack_request(LOOKUP, 2, 1, b"data\0"), read_at(1, 0, 64)):
        offer(bench, request)
        assert bench.assert_answered(room=ROOM) == 16
        assert struct.unpack("=IiQ", bench.guest.memory.read(bench.out_gpa, 16))[1] < 0
    bench.assert_recovers()


def test_init_twice(bench: Bench) -> None:
    for _ in range(3):
        offer(bench, pack_request(INIT, 2, 0, INIT_BODY))
        assert bench.assert_answered(room=ROOM) == 80
    bench.assert_serves()


def test_init_of_any_length(bench: Bench) -> None:
    """Old kernels send 16 bytes, newer ones 64, future ones more."""
    for length in (16, 20, 64, 65, 200):
        offer(bench, pack_request(INIT, 2, 0, (INIT_BODY + bytes(200))[:length]))
        assert bench.assert_answered(room=ROOM) in (16, 24, 40, 80)
    bench.assert_recovers()


@pytest.mark.parametrize("opcode", [READDIR, READDIRPLUS])
def test_listing_from_cookies_nobody_gave(bench: Bench, opcode: int) -> None:
    node = bench.guest.fuse.walk("many").nodeid
    for cookie in (1, 3, 77, 4096, 0x10_0000, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1):
        offer(bench, read_at(node, cookie, ROOM - 16, opcode))
        assert bench.assert_answered(room=ROOM) >= 16
    bench.assert_recovers()


def test_read_at_offsets_past_everything(bench: Bench) -> None:
    node = bench.guest.fuse.walk("data").nodeid
    for offset in (1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        for size in (0, 1, 4080):
            offer(bench, read_at(node, offset, size))
            assert bench.assert_answered(room=ROOM) == 16
    bench.assert_recovers()


def test_sizes_that_lie_about_the_room(bench: Bench) -> None:
    """READDIR, LISTXATTR, GETXATTR and READ asking for more than the chain can take."""
    many, odd = bench.guest.fuse.walk("many").nodeid, bench.guest.fuse.walk("odd").nodeid
    huge = struct.pack("=II", 0xFFFF_FFFF, 0)
    for request in (
        read_at(many, 0, 0xFFFF_FFFF, READDIR),
        read_at(many, 0, 0xFFFF_FFFF, READDIRPLUS),
        pack_request(LISTXATTR, 2, odd, huge),
        pack_request(GETXATTR, 2, odd, huge + b"user.colour\0"),
        read_at(odd, 0, 0xFFFF_FFFF),
    ):
        for room in (16, 20, 200):
            offer(bench, request, room)
            assert bench.assert_answered(room=room) >= 16
    bench.assert_recovers()


def test_extension_length_lies(bench: Bench) -> None:
    """total_extlen claims more than the request holds."""
    request = bytearray(GETATTR_ROOT)
    struct.pack_into("=H", request, 36, 0xFFFF)
    offer(bench, bytes(request))
    bench.assert_answered(room=ROOM)
    bench.assert_recovers()
    assert GETATTR_REPLY == 120
