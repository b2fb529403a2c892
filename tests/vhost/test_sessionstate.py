"""A session's state as bytes: what goes in comes out, and nothing that a network can send does more than be refused."""

import json
import random
import struct
import zlib
from collections.abc import Callable

import pytest

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.vhost import sessionstate as states
from virtiofsd_nydus.vhost.sessionstate import SessionState

MUTATIONS = 4000


def sample() -> SessionState:
    state = SessionState(1, 9, states.InitResult(38, 0x73FFFFFB, 1 << 20, 256))
    state.pseudo = [states.PseudoNode(2, 1, "run"), states.PseudoNode(5, 2, "pod")]
    state.mounts = [
        states.MountState(3, "/run/pod/image", states.FS_RAFS, "/var/boot", digest="ab" * 32, config={"id": "i"}),
        states.MountState(8, "/run/pod/shared", states.FS_PASSTHROUGH, "/shared", keep_top=True),
    ]
    state.nodes = [
        states.NodeState(8, 77, lookups=3, type=0o40000, path=b"dir"),
        states.NodeState(8, 78, generation=2, type=0o100000, mount=b"dir", path=b"dir/f", handle_type=-7, handle=b"h"),
    ]
    state.files = [states.FileState(8, 78, 0x1_0000_0001, 2)]
    state.rings = [states.RingState(1, [5, 0, 1023])]
    state.chunks = [states.BlobChunks(3, 0, 11, b"\xff\x07")]
    return state


def fields(value: object) -> object:
    """A state as plain values, to be compared."""
    if isinstance(value, list):
        return [fields(one) for one in value]
    names = getattr(type(value), "__slots__", None)
    return value if names is None else {name: fields(getattr(value, name)) for name in names}


def sealed(body: bytes) -> bytes:
    """Sections with a right end behind them."""
    return body + struct.pack("<4sQI", b"END ", 4, zlib.crc32(body))


def section(tag: bytes, body: bytes) -> bytes:
    return struct.pack("<4sQ", tag, len(body)) + body


def with_session(change: Callable[[dict[str, object]], None]) -> bytes:
    """The sample's session alone, its document changed, well sealed."""
    state = sample()
    state.nodes, state.files, state.rings, state.chunks = [], [], [], []
    data = states.encode(state)
    document = json.loads(data[24:-16])
    change(document)
    return sealed(data[:12] + section(b"SESS", json.dumps(document).encode()))


def test_a_state_comes_back_as_it_was() -> None:
    data = states.encode(sample())
    assert fields(states.decode(data)) == fields(sample())
    assert states.encode(states.decode(data)) == data


def test_a_session_of_images_is_some_hundred_bytes() -> None:
    state = SessionState(0, 2, states.InitResult(38, 1, 4096, 256))
    state.mounts = [states.MountState(1, "/", states.FS_RAFS, "/image.boot", digest="0" * 64, config={"id": "x"})]
    assert len(states.encode(state)) < 400


def test_every_cut_and_every_changed_byte_is_refused() -> None:
    data = states.encode(sample())
    for end in range(len(data)):
        with pytest.raises(Failure, match="session state") as refusal:
            states.decode(data[:end])
        assert refusal.value.cause is Cause.FORMAT
    for at in range(len(data)):
        with pytest.raises(Failure, match="session state"):
            states.decode(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
    with pytest.raises(Failure, match="follow its end"):
        states.decode(data + b"\0")


def test_bytes_with_a_right_checksum_are_a_state_or_refused() -> None:
    """A front-end that makes a state up knows the checksum too."""
    chance = random.Random(13)
    data = states.encode(sample())[:-16]
    good = 0
    for _ in range(MUTATIONS):
        changed = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(12, len(changed))
            changed[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        if chance.random() < 0.3:
            at = chance.randrange(12, len(changed))
            del changed[at : at + chance.randrange(1, 9)]
        try:
            state = states.decode(sealed(bytes(changed)))
        except Failure as failure:
            assert failure.cause is Cause.FORMAT
            assert "\n" not in str(failure)
            continue
        good += 1
        assert fields(states.decode(states.encode(state))) == fields(state)
    assert 0 < good < MUTATIONS


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", 2),
        ("kind", True),
        ("next_serial", 0),
        ("next_serial", 1 << 80),
        ("next_serial", 3),  # below a mount's
        ("init", 7),
        ("init", {"minor": -1}),
        ("pseudo", [[2, 1, ".."]]),
        ("pseudo", [[2, 1, "a/b"]]),
        ("pseudo", [[2, 1, "a\0"]]),
        ("pseudo", [[2, 1, "\ud800"]]),
        ("pseudo", [[2, 3, "a"]]),
        ("pseudo", [[2, 1, "a"], [3, 1, "a"]]),
        ("pseudo", [[3, 1, "a"], [2, 1, "b"]]),
        ("pseudo", None),
        ("mounts", None),
        ("mounts", [1]),
        ("mounts", [{"serial": 1, "path": "relative", "fs_type": "rafs", "digest": "0" * 64, "config": {}}]),
        ("mounts", [{"serial": 1, "path": "/", "fs_type": "ext4", "digest": "", "config": {}, "source": ""}]),
        ("mounts", [{"serial": 1, "path": "/", "fs_type": "rafs", "digest": "xyz", "config": {}, "source": ""}]),
        ("mounts", [{"serial": 1, "path": "/" * 5000, "fs_type": "passthrough", "digest": "", "config": {}}]),
    ],
)
def test_a_session_that_cannot_be_is_refused(key: str, value: object) -> None:
    with pytest.raises(Failure, match="session state"):
        states.decode(with_session(lambda document: document.update({key: value})))


NODE = struct.Struct("<HQQQIiHHH")


@pytest.mark.parametrize(
    ("tag", "body"),
    [
        (b"NODE", struct.pack("<I", 5 << 20)),  # more than there may be
        (b"NODE", struct.pack("<I", 1) + NODE.pack(1, 1 << 48, 0, 1, 0, 0, 0, 0, 0)),
        (b"NODE", struct.pack("<I", 1) + NODE.pack(1, 2, 0, 1, 0, 0, 129, 0, 0) + bytes(129)),
        (b"NODE", struct.pack("<I", 1) + NODE.pack(1, 2, 0, 1, 0, 0, 0, 0, 4) + b"../x"),
        (b"NODE", struct.pack("<I", 1) + NODE.pack(1, 2, 0, 1, 0, 0, 0, 0, 2) + b"/x"),
        (b"NODE", struct.pack("<I", 1) + NODE.pack(1, 2, 0, 1, 0, 0, 0, 4, 0) + b"a//b"),
        (b"NODE", struct.pack("<I", 0) + b"?"),
        (b"FILE", struct.pack("<IHQQI", 1, 1, 2, 0, 0)),  # handle 0 is none
        (b"RING", struct.pack("<IHH", 1, 16, 0)),
        (b"RING", struct.pack("<IHHHH", 1, 0, 2, 7, 7)),
        (b"RING", struct.pack("<IHHH", 1, 0, 1, 1024)),
        (b"chnk", struct.pack("<IHII", 1, 1, 0, 1 << 30)),
        (b"chnk", struct.pack("<IHII", 1, 1, 0, 9) + b"\0"),  # a byte too few
        (b"MORE", b""),
        (b"SESS", b"{}"),
    ],
)
def test_a_section_that_cannot_be_is_refused(tag: bytes, body: bytes) -> None:
    data = with_session(lambda document: None)[:-16]
    with pytest.raises(Failure, match="session state"):
        states.decode(sealed(data + section(tag, body)))


def test_a_section_that_may_be_left_out_is() -> None:
    data = with_session(lambda document: None)[:-16]
    assert states.decode(sealed(data + section(b"late", b"anything"))).next_serial == 9


def test_another_format_and_another_program_are_told_apart() -> None:
    data = states.encode(sample())
    with pytest.raises(Failure, match="its format is 2, 1 is known here"):
        states.decode(data[:8] + b"\2" + data[9:])
    with pytest.raises(Failure, match="not one of virtiofsd-nydus"):
        states.decode(b"QEVM" + data[4:])
