"""What readers see of servers that are away, hang, limit or refuse: through the engine and the fetch threads."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from tests.peers.faulty_server import FaultyServer
from tests.peers.gate import GateRegistry
from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.cli.build import build_image
from virtiofsd_nydus.engine import Engine, Rafs, Store
from virtiofsd_nydus.errors import Cause
from virtiofsd_nydus.reader.bootstrap import Bootstrap
from virtiofsd_nydus.storage import pump as pump_module
from virtiofsd_nydus.storage.factory import create_backend
from virtiofsd_nydus.storage.localfs import LocalfsBackend
from virtiofsd_nydus.storage.pump import FIRST_SLOTS, SOURCE_SLOTS, FetchPump

CHUNK = 64 << 10
CHUNKS = 200
APART = 3 * CHUNK  # two wanted chunks so far apart are two requests
FAR = 6 * CHUNK  # the same where a fetch takes its neighbours along
PATIENT_S = 60  # no test waits that long


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENT_S
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.005)  # between two looks; the deadline decides


class Image:
    """One file of chunks that are no two alike, and its blob."""

    def __init__(self, directory: Path, seed: int) -> None:
        source = directory / "source"
        source.mkdir(parents=True)
        self.data = Random(seed).randbytes(CHUNK * CHUNKS)
        (source / "file").write_bytes(self.data)
        self.bootstrap, self.blobs = directory / "image.boot", directory / "blobs"
        build_image(source, self.bootstrap, self.blobs, BuildOptions(compressor="none", chunk_size=CHUNK))
        (blob,) = [path for path in self.blobs.iterdir() if not path.name.startswith(".")]
        self.served = {blob.name: blob.read_bytes()}
        with Bootstrap(self.bootstrap) as opened:
            self.ino = opened.lookup(opened.root_ino, "file")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Image, Image]:
    return Image(tmp_path_factory.mktemp("one"), 1), Image(tmp_path_factory.mktemp("two"), 2)


class Node:
    """An engine, its fetch threads, and images that are opened in it."""

    def __init__(self, directory: Path, *, deadline_s: float = PATIENT_S, slots: int = pump_module.FETCH_SLOTS) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.engine = Engine(read_deadline_ms=int(deadline_s * 1000))
        self.store = Store(self.engine, str(directory))
        self.pump = FetchPump(self.engine, slots)
        self.opened: list[tuple[Rafs, object]] = []
        self.closed = False
        self.pump.start()

    def open(self, image: Image, backend) -> "Reader":
        rafs = Rafs(self.engine, str(image.bootstrap), self.store)
        rafs.set_amplify(0)
        for blob in rafs.blobs():
            self.pump.add_backend(blob.key, backend)
        self.opened.append((rafs, backend))
        return Reader(image, rafs)

    def events(self) -> list[tuple[Cause, str]]:
        found = []
        while (event := self.engine.next_event(20)) is not None:
            found.append((Cause(event.cause), event.text))
        return found

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.engine.shutdown()
        for _, backend in self.opened:
            backend.close()
        assert self.pump.join(PATIENT_S)
        for rafs, _ in self.opened:
            rafs.close()
        self.store.close()
        self.engine.close()


class Reader:
    def __init__(self, image: Image, rafs: Rafs) -> None:
        self.image, self.rafs = image, rafs

    def read(self, place: int) -> str:
        """Reads a little of a chunk: right, wrong or error."""
        try:
            got = self.rafs.read(self.image.ino, place * APART, 1000)
        except OSError:
            return "error"
        return "right" if got == self.image.data[place * APART : place * APART + 1000] else "wrong"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    made: list[Node] = []

    def make(directory: Path | None = None, **settings) -> Node:
        made.append(Node(directory or tmp_path / f"cache{len(made)}", **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def many() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def make_registry(host: str, lines: list[str] | None = None, **settings):
    said = lines.append if lines is not None else None
    config = {"scheme": "http", "host": host, "repo": "a/b", "timeout": 600, "connect_timeout": 600, **settings}
    return create_backend("registry", config, warn=said)


def test_server_that_hangs_holds_its_own_slots_alone(images, node, many: ThreadPoolExecutor) -> None:
    sick_image, well_image = images
    one = node()
    with GateRegistry(sick_image.blobs) as gate:
        sick = one.open(sick_image, make_registry(gate.host))
        well = one.open(well_image, LocalfsBackend(str(well_image.blobs)))
        assert sick.read(31) == "right"
        gate.close()
        waiting = [many.submit(sick.read, place) for place in range(20)]
        for _ in range(SOURCE_SLOTS):
            gate.wait_asked()
        assert [well.read(place) for place in range(5)] == ["right"] * 5
        assert not any(read.done() for read in waiting)
        gate.open()
        assert {read.result(PATIENT_S) for read in waiting} == {"right"}


@pytest.mark.parametrize("how", ["refused", "503", "reset"])
def test_outage_shorter_than_the_deadline_is_no_error(images, node, many: ThreadPoolExecutor, how: str) -> None:
    """Four rounds of attempts fail before the server is back: more than a second."""
    image, _ = images
    lines: list[str] = []
    one = node()
    with FaultyServer(image.served) as server:
        backend = make_registry(server.host, lines)
        reader = one.open(image, backend)
        assert reader.read(31) == "right"
        if how == "refused":
            server.go_away()
        else:
            server.inject(*{"503": ["status"], "reset": ["reset"]}[how], status=503, times=-1)
        waiting = [many.submit(reader.read, place) for place in range(20)]
        (blob_id,) = image.served
        wait_until(lambda: backend.backoff.failures(blob_id) >= 4)
        assert backend.status()["breaker"] == "shut"
        assert not any(read.done() for read in waiting)
        if how == "refused":
            server.come_back()
        server.heal()
        assert {read.result(PATIENT_S) for read in waiting} == {"right"}
    assert backend.status()["breaker"] == "open"
    assert ["fetching fails" in line for line in lines] == [True, False] and "answers again" in lines[1]
    assert one.events() == []


def test_status_429_once_is_no_error(images, node) -> None:
    image, _ = images
    one = node()
    with FaultyServer(image.served) as server:
        reader = one.open(image, make_registry(server.host))
        server.inject("status", status=429, headers={"Retry-After": "1"})
        assert reader.read(0) == "right"
        assert [request.status for request in server.requests] == [429, 206]


def test_wait_for_another_attempt_holds_no_slot(images, node, many: ThreadPoolExecutor) -> None:
    """One slot in all: it is free for another server while this one wants to be left alone."""
    sick_image, well_image = images
    one = node(slots=1)
    with FaultyServer(sick_image.served) as server:
        server.inject("status", status=429, headers={"Retry-After": "30"}, times=-1)
        sick = one.open(sick_image, make_registry(server.host))
        well = one.open(well_image, LocalfsBackend(str(well_image.blobs)))
        waiting = [many.submit(sick.read, place) for place in range(12)]
        wait_until(lambda: server.requests)
        assert [well.read(place) for place in range(5)] == ["right"] * 5
        assert not any(read.done() for read in waiting)
        assert len(server.requests) == 1  # a server that fails as a whole is asked by one at a time
        one.engine.shutdown()
        assert {read.result(PATIENT_S) for read in waiting} == {"error"}


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ({"kind": "status", "status": 404}, Cause.MISSING),
        ({"kind": "status", "status": 401}, Cause.AUTH),
        ({"kind": "status", "status": 403}, Cause.AUTH),
        ({"kind": "corrupt", "at_bytes": 10}, Cause.DIGEST),
    ],
)
def test_what_no_attempt_can_mend_is_an_error_at_once(images, node, fault: dict, cause: Cause) -> None:
    image, _ = images
    one = node()
    with FaultyServer(image.served) as server:
        server.inject(times=-1, **fault)
        reader = one.open(image, make_registry(server.host))
        began_s = time.monotonic()
        assert reader.read(0) == "error"
        assert time.monotonic() - began_s < PATIENT_S / 2
        assert one.events()[-1][0] is cause


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 503},
        {"kind": "status", "status": 500},
        {"kind": "status", "status": 429, "headers": {"Retry-After": "3"}},
        {"kind": "ignore_range"},
        {"kind": "delay", "seconds": 30},
        {"kind": "slow_headers", "seconds": 0.02},
        {"kind": "trickle", "at_bytes": 1, "seconds": 0.02},
        {"kind": "stall", "at_bytes": 1, "seconds": 30},
    ],
)
def test_deadline_ends_a_read_and_names_the_cause(images, node, many: ThreadPoolExecutor, fault: dict) -> None:
    """Whatever a thread waits for; and then the server's slots are free."""
    image, _ = images
    one = node(deadline_s=1)
    with FaultyServer(image.served) as server:
        injected = server.inject(times=-1, **fault)
        reader = one.open(image, make_registry(server.host))
        waiting = [many.submit(reader.read, place) for place in range(20)]
        assert {read.result(PATIENT_S) for read in waiting} == {"error"}
        lines = [(cause, text) for cause, text in one.events() if "did not come within 1000 ms" in text]
        assert {cause for cause, _ in lines} <= {Cause.NETWORK, Cause.DEADLINE}
        if fault["kind"] == "status":  # of an attempt that is cut off by the deadline itself nothing is known in time
            assert any(cause is Cause.NETWORK and f"status {fault['status']}" in text for cause, text in lines)
        injected.times = 0
        server.stopping.set()  # what hangs is let go, should the deadline not have ended it
        wait_until(lambda: reader.read(30) == "right")


def test_threads_come_and_go(images, node, many: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump_module, "IDLE_S", 0.0)
    image, _ = images
    one = node()
    with GateRegistry(image.blobs) as gate:
        reader = one.open(image, make_registry(gate.host))
        assert reader.read(31) == "right"
        gate.close()
        waiting = [many.submit(reader.read, place) for place in range(5)]
        for _ in range(5):
            gate.wait_asked()
        wait_until(lambda: one.pump.thread_count == 6)  # one waits for a job
        gate.open()
        assert {read.result(PATIENT_S) for read in waiting} == {"right"}
        wait_until(lambda: one.pump.thread_count == 1)
        assert reader.read(6) == "right"


def test_session_that_floods_leaves_a_slot_to_another(images, tmp_path: Path) -> None:
    """Two guests of one daemon: one has more cold reads under way than the server has slots, the other has one."""
    from tests.system.daemon import Daemon, ServedImage
    from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
    from virtiofsd_nydus.fakeguest.fuse_client import READ, READ_IN, pack_request

    image, _ = images
    with GateRegistry(image.blobs) as gate:
        settings = {"scheme": "http", "host": gate.host, "repo": "a/b", "timeout": 30}
        served = ServedImage(image.bootstrap, "registry", settings, {})
        with (
            Daemon(served, tmp_path / "cache", deadline_ms=PATIENT_S * 1000) as daemon,
            FakeGuest(daemon.socket_path, slot_count=24, slot_data_bytes=4096) as flooding,
            FakeGuest(daemon.socket_path) as quiet,
        ):
            for guest in (flooding, quiet):
                guest.fuse.init()
                node = guest.fuse.walk("file").nodeid
            quiet.fuse.read(node, 31 * FAR, 100)  # the login's questions are asked
            gate.close()
            for place in range(24):
                request = pack_request(READ, 1000 + place, node, READ_IN.pack(0, place * FAR, 100, 0, 0, 0, 0))
                flooding.queues[1].submit(request, 0, 100, place)
            for _ in range(SOURCE_SLOTS):
                gate.wait_asked()
            answer: list[bytes] = []
            reader = threading.Thread(target=lambda: answer.append(quiet.fuse.read(node, 28 * FAR, 100)))
            reader.start()
            for _ in range(FIRST_SLOTS):
                gate.wait_asked()  # though all of the source's share is taken
            gate.open()
            reader.join(PATIENT_S)
            assert answer == [image.data[28 * FAR : 28 * FAR + 100]]
            for _ in range(24):
                flooding.queues[1].reap_length()


def test_wrong_bytes_of_the_cache_are_no_word_against_a_mirror(images, node) -> None:
    image, _ = images
    with FaultyServer(image.served) as server, FaultyServer(image.served) as mirror:
        mirrors = [{"host": mirror.url}]
        one = node()
        assert one.open(image, make_registry(server.host, mirrors=mirrors)).read(0) == "right"
        one.close()
        (side,) = (one.directory / ".virtiofsd-nydus").glob("*.vnd")
        side.unlink()  # what is in the cache is to be checked
        (file,) = one.directory.glob("*.blob.data")
        with file.open("r+b") as stream:
            stream.write(bytes(100))
        again = node(directory=one.directory)
        reader = again.open(image, make_registry(server.host, mirrors=mirrors))
        assert [reader.read(place) for place in range(3)] == ["right"] * 3
        assert server.requests == []
