"""Packets between the keeper's processes: whole, in pieces, too large, torn, and a device's state in them."""

import os
import socket
from collections.abc import Iterator

import pytest

from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.keeper import protocol
from virtiofsd_nydus.keeper.protocol import Channel, Message, Sent
from virtiofsd_nydus.vhost.state import DeviceState, Region

RINGS = 3
LONG = 3 << 20  # more than a socket holds


class Pair:
    """Two channels, and the bare socket of the first."""

    def __init__(self, *, blocking: bool) -> None:
        self.raw, other = protocol.pair()
        self.left, self.right = Channel(self.raw, blocking=blocking), Channel(other, blocking=blocking)

    def receive(self) -> Message:
        """At the right, with what the left still owes."""
        while True:
            self.left.flush()
            if (message := self.right.receive()) is not None:
                return message


@pytest.fixture(params=[True, False])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(blocking=request.param)
    yield made
    made.left.close()
    made.right.close()


def new_files(count: int) -> list[int]:
    return [os.memfd_create("file", os.MFD_CLOEXEC) for _ in range(count)]


def same_file(left: int, right: int) -> bool:
    return os.path.sameopenfile(left, right)


@pytest.mark.parametrize("fds", [0, 1, protocol.PACKET_FDS, protocol.FDS_MAX])
def test_messages_in_one_packet_or_many(pair: Pair, fds: int) -> None:
    files = new_files(fds)
    pair.left.send(protocol.RECORD, {"record": 7, "put": "x" * 100}, files)
    message = pair.receive()
    assert (message.kind, message.number("record")) == (protocol.RECORD, 7)
    assert len(message.fds) == fds and all(map(same_file, files, message.fds))
    assert not any(os.get_inheritable(fd) for fd in message.fds)
    message.close()
    protocol.close_all(files)


def test_what_does_not_go_at_once_waits() -> None:
    """The keeper never waits for a process that does not read; what it owes goes later, descriptors and all."""
    pair = Pair(blocking=False)
    files = new_files(2)
    pair.left.send(protocol.RECORD, {"put": "x" * LONG}, files[:1])
    pair.left.send(protocol.KEPT, {"record": 1}, files[1:])
    assert pair.left.waits
    first, second = pair.receive(), pair.receive()
    assert len(first.text("put")) == LONG and same_file(first.fds[0], files[0])
    assert second.kind == protocol.KEPT and same_file(second.fds[0], files[1])
    assert not pair.left.waits
    with pytest.raises(ConnectionAbortedError):
        for _ in range(10):
            pair.left.send(protocol.RECORD, {"put": "x" * (12 << 20)})


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"x",
        protocol.HEADER.pack(1, 0, 5) + b"{}",
        protocol.HEADER.pack(1, 2, 2) + b"{}",
        protocol.HEADER.pack(1, 0, 2) + b"[]",
        protocol.HEADER.pack(1, 0, 1) + b"{",
        protocol.HEADER.pack(1, 0, 4) + b"\xff\xfe{}",
        protocol.HEADER.pack(1, 0, 60000) + b"[" * 60000,
        b"x" * (protocol.PACKET_BYTES + 100),
    ],
)
def test_what_is_no_message(packet: bytes) -> None:
    pair = Pair(blocking=False)
    pair.raw.send(packet)
    with pytest.raises((Failure, EOFError)):
        pair.right.receive()


def test_messages_that_never_end_are_refused() -> None:
    pair = Pair(blocking=False)
    piece = protocol.HEADER.pack(1, 1, protocol.PACKET_BYTES) + b" " * protocol.PACKET_BYTES
    with pytest.raises(Failure, match="too large"):
        for _ in range(protocol.BODY_MAX_BYTES // protocol.PACKET_BYTES + 2):
            pair.raw.send(piece)
            pair.right.receive()
    files = new_files(protocol.PACKET_FDS)
    pair = Pair(blocking=False)
    with pytest.raises(Failure, match="too large"):
        for _ in range(4):
            socket.send_fds(pair.raw, [protocol.HEADER.pack(1, 1, 0)], files)
            pair.right.receive()
    protocol.close_all(files)


@pytest.mark.parametrize("body", [{}, {"record": -1}, {"record": 1.5}, {"record": True}, {"record": 1 << 64}])
def test_numbers_are_checked(body: dict[str, object]) -> None:
    with pytest.raises(Failure):
        Message(protocol.RECORD, body, []).number("record")


def test_versions() -> None:
    protocol.agree(Message(protocol.HELLO, {"version": protocol.VERSION}, []))
    for kind, version in ((protocol.HELLO, protocol.VERSION + 1), (protocol.FORK, protocol.VERSION)):
        with pytest.raises(Failure):
            protocol.agree(Message(kind, {"version": version}, []))


def make_state() -> DeviceState:
    state = DeviceState(RINGS)
    state.features = 1 << 32
    state.regions = [Region(at << 30, 1 << 30, at << 40, at << 12, fd) for at, fd in enumerate(new_files(2))]
    state.region_gen = 5
    for at, ring in enumerate(state.rings):
        ring.num, ring.base, ring.started, ring.desc_addr = 16 << at, at, bool(at), 0x7F00 << 32
        ring.set_call(new_files(1)[0])
    state.rings[1].set_kick(new_files(1)[0])
    state.set_inflight(new_files(1)[0], 4096, 64, 3, 128)
    state.inflight_goes_on, state.inflight_died = 2, True
    return state


def test_a_state_passes_whole(pair: Pair) -> None:
    """Every number, and each descriptor once: what the worker has already is not sent again."""
    state, sent, there = make_state(), Sent(), DeviceState(RINGS)

    def pass_on() -> tuple[Message, int]:
        body, fds = protocol.pack_state(state, sent, protocol.plain_rings(state))
        pair.left.send(protocol.APPLY, {"device": 1, "state": body}, fds)
        message = pair.receive()
        count = len(message.fds)
        protocol.unpack_state(message, there)
        return message, count

    assert pass_on()[1] == 2 + RINGS + 1 + 1
    for name in protocol.STATE_PLAIN:
        assert getattr(there, name) == getattr(state, name)
    assert protocol.plain_rings(there) == protocol.plain_rings(state)
    assert same_file(there.rings[1].kick_fd, state.rings[1].kick_fd) and there.rings[0].kick_fd == -1
    assert same_file(there.inflight_fd, state.inflight_fd)
    assert (there.inflight_size_bytes, there.inflight_offset, there.inflight_queues) == (4096, 64, 3)
    for ours, theirs in zip(state.regions, there.regions, strict=True):
        assert same_file(ours.fd, theirs.fd)
        assert (ours.gpa, ours.size_bytes, ours.user_addr, ours.mmap_offset) == (
            theirs.gpa,
            theirs.size_bytes,
            theirs.user_addr,
            theirs.mmap_offset,
        )
    there.close()
    state.rings[1].enabled = True
    state.rings[2].set_kick(new_files(1)[0])
    assert pass_on()[1] == 1  # the new kick
    assert there.rings[1].enabled and same_file(there.rings[2].kick_fd, state.rings[2].kick_fd)
    there.close()
    state.close()


def test_states_that_make_no_sense() -> None:
    state = make_state()
    body, _ = protocol.pack_state(state, Sent(), protocol.plain_rings(state))
    for broken in ({}, {**body, "rings": body["rings"][:1]}, {**body, "log": None}, {**body, "regions": [[1]]}, body):
        with pytest.raises(Failure):
            protocol.unpack_state(Message(protocol.APPLY, {"state": broken}, []), DeviceState(RINGS))
    state.close()
