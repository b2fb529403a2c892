"""SIGTERM and SIGKILL at any moment: the next start uses what is cached, and every byte is right."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.peers.registry import LocalRegistry
from tests.system.daemon import WAIT_SECONDS, Daemon, ServedImage, find_chunks
from tests.system.guest_tree import Record, differences, list_tree
from tests.system.range_proxy import RangeProxy, SentRange
from tests.system.test_integrity import Damage, outcome, read_all
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest, GuestFault, NoAnswer, Queue
from virtiofsd_nydus.fakeguest.frontend import HungUp
from virtiofsd_nydus.fakeguest.fuse_client import FuseClient

# Far from each other in the blobs: each round finds something cold
LARGE = ("large/random", "large/second", "sizes/1048576", "large/text", "sizes/1048577", "sizes/1048575")
# At which answer of the registry, and how long after it, the signal comes
MOMENTS = ((2, 0.001), (1, 0.0), (1, 0.005), (2, 0.0), (1, 0.02), (1, 0.001))


@pytest.fixture
def proxy(registry: LocalRegistry) -> Iterator[RangeProxy]:
    with RangeProxy(registry.host) as server:
        yield server


class Gone(Exception):
    """The daemon that should answer has ended."""


class MortalChannel:
    """A guest's queue that looks, while it waits, whether the daemon lives: nothing tells a guest that it does not."""

    def __init__(self, queue: Queue, daemon: Daemon) -> None:
        self.queue, self.daemon = queue, daemon

    def call(self, request: bytes, out_fixed: int, data_bytes: int) -> bytes:
        self.queue.submit(request, out_fixed, data_bytes)
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                return self.queue.reap(100)[1]
            except NoAnswer:
                if self.daemon.process.poll() is not None:
                    raise Gone from None
                if time.monotonic() > deadline:
                    raise


def read_until_killed(daemon: Daemon, paths: list[str]) -> None:
    """A guest that reads, until its daemon is gone (a ring that stops in an orderly end gives EIO, or nothing)."""
    try:
        with FakeGuest(daemon.socket_path) as guest:
            fuse = FuseClient(MortalChannel(guest.queues[1], daemon))
            fuse.init()
            for path in paths:
                fuse.read_file(path)
    except (OSError, HungUp, Gone, GuestFault):
        pass


def count_marked(cache: Path) -> int:
    """Chunks that the chunk maps say are in the cache: bits behind a header of 4096 bytes."""
    return sum(bin(int.from_bytes(path.read_bytes()[4096:], "big")).count("1") for path in cache.glob("*.chunk_map"))


class KillAt:
    """As a proxy's damage: kills the daemon just before, or just after, the n-th answer goes out."""

    def __init__(self, daemon: Daemon, count: int, how: signal.Signals, later_s: float) -> None:
        self.daemon, self.count, self.how, self.later_s = daemon, count, how, later_s
        self.seen = 0
        self.sent = False

    def send(self) -> None:
        """Sends the signal, once."""
        if not self.sent:
            self.sent = True
            self.daemon.process.send_signal(self.how)

    def __call__(self, sent: SentRange, body: bytes) -> bytes:
        self.seen += 1
        if self.seen == self.count:
            if self.later_s:
                threading.Timer(self.later_s, self.send).start()
            else:
                self.send()
        return body


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_under_cold_load(
    image: ServedImage, proxy: RangeProxy, expected_tree: list[Record], tmp_path: Path, how: signal.Signals
) -> None:
    served = image.with_backend(host=proxy.host)
    cache = tmp_path / "cache"
    random = Random(how)
    paths = [r["path"] for r in expected_tree if r["kind"] == "file" and r["path"].isprintable() and r["size"]]
    killed, marked = 0, [0]
    for first, (count, later_s) in zip(LARGE, MOMENTS, strict=True):
        with Daemon(served, cache) as daemon:
            proxy.damage = end = KillAt(daemon, count, how, later_s)
            random.shuffle(paths)
            read_until_killed(daemon, [first, *paths])  # more than is read before the end comes
            proxy.damage = None
            killed += end.seen >= count
            end.send()  # where all that was wanted came in fewer answers
            status = daemon.process.wait(10)
            assert status == (0 if how == signal.SIGTERM else -how), daemon.log_text()
        marked.append(count_marked(cache))
    assert marked == sorted(marked)
    assert killed >= len(LARGE) / 2, "most ends came when nothing was going on: the test shows nothing"
    assert marked[-1] > 0
    with Daemon(served, cache) as daemon, FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        assert differences(expected_tree, list(list_tree(guest.fuse))) == []
        counters = daemon.counters()
    assert counters["digest_failures"] == 0
    assert count_marked(cache) == marked[-1] + counters["fetched_chunks"], "a chunk that was there was fetched again"
    # Each death costs the jobs that were under way, no more
    assert proxy.sent_bytes() < sum(image.blobs.values()) * 3


def test_other_daemon_takes_over_what_a_killed_one_was_fetching(
    image: ServedImage, proxy: RangeProxy, expected_tree: list[Record], tmp_path: Path
) -> None:
    """Two on one cache want the same chunk; the one that fetches it dies before it comes."""
    served = image.with_backend(host=proxy.host)
    path = "large/second"
    with Daemon(served, tmp_path / "cache") as first, Daemon(served, tmp_path / "cache") as second:
        proxy.gate.clear()
        holder = threading.Thread(target=read_until_killed, args=(first, [path]))
        holder.start()
        assert proxy.held.acquire(timeout=10)
        found: list[dict[str, str]] = []
        wanted = [record for record in expected_tree if record["path"] == path]
        waiter = threading.Thread(target=lambda: found.append(read_all(second, wanted)))
        waiter.start()
        while second.counters()["parked"] == 0:
            waiter.join(0.01)
            assert waiter.is_alive()
        assert second.counters()["fetch_jobs"] == 0, "the second does not wait for the first"
        first.kill()
        proxy.gate.set()
        waiter.join(20)
        holder.join(20)
        assert outcome(expected_tree, found[0]) == (set(), set())


def test_terminated_while_the_registry_hangs(image: ServedImage, proxy: RangeProxy, tmp_path: Path) -> None:
    """SIGTERM ends it within seconds though a fetch is stuck, and leaves nothing half written that counts."""
    served = image.with_backend(host=proxy.host)
    with Daemon(served, tmp_path / "cache") as daemon:
        proxy.gate.clear()
        reader = threading.Thread(target=read_until_killed, args=(daemon, ["large/second"]))
        reader.start()
        assert proxy.held.acquire(timeout=10)
        assert daemon.kill(signal.SIGTERM) == 0
        reader.join(20)
    proxy.gate.set()


def test_a_torn_answer_sets_no_bit(
    image: ServedImage, proxy: RangeProxy, expected_tree: list[Record], tmp_path: Path
) -> None:
    """Killed after wrong bytes were refused: they are not believed on the next start either."""
    served = image.with_backend(host=proxy.host)
    blob_id, chunk = find_chunks(served, "large/second")[0]
    proxy.damage = Damage(blob_id, chunk.coff)
    with Daemon(served, tmp_path / "cache", deadline_ms=2000) as daemon:
        wanted = [record for record in expected_tree if record["path"] == "large/second"]
        assert read_all(daemon, wanted) == {"large/second": "EIO"}
        daemon.kill()
    proxy.damage = None
    with Daemon(served, tmp_path / "cache") as daemon:
        assert outcome(expected_tree, read_all(daemon, wanted)) == (set(), set())
