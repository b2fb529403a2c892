"""A guest goes from one daemon to another: what it knows stays valid, and what cannot be taken along is refused."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakeguest.fixtures import image  # noqa: F401
from tests.fakeguest.support import FILES, BackgroundLoad, Image, Load, pattern, wait_until
from tests.fakeguest.test_migration import memory_end, memory_file, start_logging
from tests.peers.gate import GateRegistry
from virtiofsd_nydus.fakeguest import frontend as vhost
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.frontend import Request
from virtiofsd_nydus.fakeguest.fuse_client import OUT_HEADER, READ, READ_IN, pack_request
from virtiofsd_nydus.vhost import sessionstate as states
from virtiofsd_nydus.vmm.servers import NydusDaemon, call_api

PAGE = 4096


def words(image: Image) -> list[str]:  # noqa: F811
    return ["--bootstrap", str(image.bootstrap), "--localfs-dir", str(image.blob_dir)]


@pytest.fixture
def source(image: Image) -> Iterator[NydusDaemon]:  # noqa: F811
    with NydusDaemon(words(image)) as daemon:
        yield daemon


@pytest.fixture
def target(image: Image) -> Iterator[NydusDaemon]:  # noqa: F811
    with NydusDaemon(words(image)) as daemon:
        yield daemon


def test_a_guest_goes_on_elsewhere(source: NydusDaemon, target: NydusDaemon) -> None:
    """Without a second INIT, with the nodeids that it has. The state of an image's session is small."""
    with FakeGuest(source.socket_path) as guest:
        guest.fuse.init()
        node = guest.fuse.walk("sub/deep/file").nodeid
        state = guest.move_to(target.socket_path)
        assert len(state) < 4096
        assert guest.fuse.read(node, 0, 70_000) == pattern(FILES["sub/deep/file"][1], FILES["sub/deep/file"][0])
        assert guest.fuse.read_file("odd") == pattern(FILES["odd"][1], FILES["odd"][0])


def test_to_and_fro_under_load(source: NydusDaemon, target: NydusDaemon) -> None:
    """Each move stops rings in the middle of work; every byte is right, nothing is answered twice or never."""
    with FakeGuest(source.socket_path, queue_size=64) as guest:
        guest.fuse.init()
        with BackgroundLoad(guest.queues[1], Load(guest, depth=8, block_bytes=65536)) as load:
            for _ in range(5):
                for there in (target, source):
                    load.wait_progress(20)
                    guest.move_to(there.socket_path)
            load.wait_progress(20)


def test_reads_that_wait_for_a_registry_go_along(
    image: Image,  # noqa: F811
    target: NydusDaemon,
    tmp_path: Path,
) -> None:
    """Neither is the stop held up, nor does a read fail: the target serves it."""
    with GateRegistry(image.blob_dir) as gate:
        gate.close()
        config = {
            "device": {
                "backend": {"type": "registry", "config": {"host": gate.host, "repo": "image", "scheme": "http"}},
                "cache": {"type": "blobcache", "config": {"work_dir": str(tmp_path)}},
            },
            "mode": "direct",
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        options = ["--bootstrap", str(image.bootstrap), "--config", str(tmp_path / "config.json")]
        with NydusDaemon(options) as source, FakeGuest(source.socket_path) as guest, memory_file(8 * PAGE) as log:
            guest.fuse.init()
            start_logging(guest, log, memory_end(guest) // PAGE // 8 + 1)
            node = guest.fuse.walk("data").nodeid
            for slot in range(3):
                request = pack_request(READ, 100 + 2 * slot, node, READ_IN.pack(0, slot << 20, PAGE, 0, 0, 0, 0))
                guest.queues[1].submit(request, 0, PAGE, slot)
            gate.wait_asked()
            state = states.decode(guest.move_to(target.socket_path))
            assert [(ring.index, len(ring.heads)) for ring in state.rings] == [(1, 3)]
            whole = pattern(FILES["data"][1], FILES["data"][0])
            seen = set()
            for _ in range(3):
                slot, reply = guest.queues[1].reap()
                assert OUT_HEADER.unpack_from(reply) == (16 + PAGE, 0, 100 + 2 * slot)
                assert reply[16:] == whole[slot << 20 :][:PAGE]
                seen.add(slot)
            assert seen == {0, 1, 2}


def test_four_clones_of_one_snapshot(source: NydusDaemon, target: NydusDaemon) -> None:
    """One state, loaded by several guests at one daemon."""
    with FakeGuest(source.socket_path) as guest:
        guest.fuse.init()
        node = guest.fuse.walk("odd").nodeid
        bases = guest.stop()
        state = guest.front.save_state()
        guest.go_on(bases)
        assert guest.fuse.getattr(node).size == FILES["odd"][1]
    for _ in range(4):
        clone = FakeGuest(target.socket_path)
        try:
            clone.connect()
            clone.front.load_state(state)
            clone.start()
            assert clone.fuse.getattr(node).size == FILES["odd"][1]
            assert clone.fuse.read(node, 0, 20_000) == pattern(FILES["odd"][1], FILES["odd"][0])
        finally:
            clone.close()


def test_the_source_goes_on_when_the_target_refuses(source: NydusDaemon, tmp_path: Path) -> None:
    with FakeGuest(source.socket_path) as guest:
        guest.fuse.init()
        bases = guest.stop()
        state = guest.front.save_state()
        with NydusDaemon([]) as other:
            elsewhere = FakeGuest(other.socket_path)
            try:
                elsewhere.connect()
                with pytest.raises(vhost.Refused):
                    elsewhere.front.load_state(state)
                for data in (b"", b"VNDSTATE", state[:-1], state + b"\0", os.urandom(200_000)):
                    with pytest.raises(vhost.Refused):
                        elsewhere.front.load_state(data)
                elsewhere.front.get_u64(Request.GET_FEATURES)  # the connection lives
            finally:
                elsewhere.close()
            wait_until(lambda: "start it with the words of the other one" in other.log_text(), "the refusal is said")
        guest.go_on(bases)
        assert guest.fuse.read_file("odd") == pattern(FILES["odd"][1], FILES["odd"][0])


@pytest.mark.parametrize(("direction", "phase"), [(0, 1), (2, 0), (1, 7)])
def test_unknown_transfers_are_refused(target: NydusDaemon, direction: int, phase: int) -> None:
    with FakeGuest(target.socket_path) as guest:
        guest.stop()
        ours, theirs = os.pipe()
        guest.front.send(Request.SET_DEVICE_STATE_FD, struct.pack("=II", direction, phase), [theirs])
        body, _ = guest.front.receive(Request.SET_DEVICE_STATE_FD)
        assert vhost.U64.unpack(body) == (1,)
        os.close(ours)
        os.close(theirs)
        with pytest.raises(vhost.Refused):
            guest.front._check_state()


def test_nothing_is_saved_while_rings_run(target: NydusDaemon) -> None:
    with FakeGuest(target.socket_path) as guest:
        guest.fuse.init()
        with pytest.raises(vhost.Refused):
            guest.front.save_state()
        guest.fuse.getattr(1)


def test_a_front_end_that_hangs_up_in_the_middle(target: NydusDaemon) -> None:
    """The daemon lets go of the pipe, and serves others."""
    guest = FakeGuest(target.socket_path)
    guest.connect()
    theirs, ours = os.pipe()
    guest.front._offer_state(vhost.LOAD, theirs)
    guest.front.send(Request.CHECK_DEVICE_STATE)
    guest.close()
    os.close(theirs)
    os.close(ours)
    with FakeGuest(target.socket_path) as other:
        other.fuse.init()
        other.fuse.getattr(1)
    wait_until(lambda: "the session's state: session state" in target.log_text(), "what came is none")


def mount_image(daemon: NydusDaemon, image: Image, path: str, work_dir: Path) -> None:  # noqa: F811
    config = {
        "device": {
            "backend": {"type": "localfs", "config": {"dir": str(image.blob_dir)}},
            "cache": {"type": "blobcache", "config": {"work_dir": str(work_dir)}},
        }
    }
    body = {"fs_type": "rafs", "source": str(image.bootstrap), "config": json.dumps(config)}
    wait_until(lambda: daemon.api_path.exists(), "the API is there")
    status, answer = call_api(daemon.api_path, "POST", f"/api/v1/mount?mountpoint={path}", body)
    assert status == 204, answer


def test_mounts_get_the_numbers_that_they_had(image: Image, tmp_path: Path) -> None:  # noqa: F811
    """Mounts that came and went gave the source's mounts and directories numbers that a new daemon would not give."""
    with NydusDaemon([]) as source, NydusDaemon([]) as target:
        for path in ("/pod/old", "/pod/a", "/b"):
            mount_image(source, image, path, tmp_path)
        call_api(source.api_path, "DELETE", "/api/v1/mount?mountpoint=/pod/old")
        mount_image(source, image, "/pod/c", tmp_path)
        for path in ("/pod/c", "/b"):
            mount_image(target, image, path, tmp_path)
        with FakeGuest(source.socket_path) as guest:
            guest.fuse.init()
            nodes = {path: guest.fuse.walk(f"{path}/odd").nodeid for path in ("pod/a", "b", "pod/c")}
            directory = guest.fuse.walk("pod").nodeid
            bases = guest.stop()
            state = guest.front.save_state()
            clone = FakeGuest(target.socket_path)
            try:
                clone.connect()
                with pytest.raises(vhost.Refused):
                    clone.front.load_state(state)
                wait_until(lambda: "no image is mounted at /pod/a: mount it first" in target.log_text(), "said")
                mount_image(target, image, "/pod/a", tmp_path)
                clone.front.load_state(state)
                clone.start()
                for node in nodes.values():
                    assert clone.fuse.read(node, 0, 20_000) == pattern(FILES["odd"][1], FILES["odd"][0])
                assert clone.fuse.getattr(directory).mode & 0o170000 == 0o040000
                assert {path: clone.fuse.walk(f"{path}/odd").nodeid for path in nodes} == nodes
            finally:
                clone.close()
            guest.go_on(bases)
            guest.fuse.getattr(directory)
