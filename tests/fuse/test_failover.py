"""Failover and upgrade in the order nydus-snapshotter does them: readers pause and go on."""

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.conftest import StartHost
from tests.fuse.host import HostDaemon
from tests.peers.registry import LocalRegistry
from tests.system.daemon import WAIT_SECONDS, ServedImage, wait_until
from tests.system.range_proxy import RangeProxy

# Reads every file over and over, past the page cache as far as it can; says a line a round; errors end it
READER = """
import hashlib, os, sys
root, first = sys.argv[1], None
while True:
    total = hashlib.sha256()
    for base, dirs, names in os.walk(root):
        dirs.sort()
        for name in sorted(names):
            path = os.path.join(base, name)
            if not os.path.isfile(path) or os.path.islink(path):
                continue
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            while piece := os.read(fd, 1 << 20):
                total.update(piece)
            os.close(fd)
    first = first or total.digest()
    if total.digest() != first:
        sys.exit("other bytes than before")
    print(total.hexdigest(), flush=True)
"""


class Supervisor:
    """What nydus-snapshotter's does: listens for the time of one transfer, keeps the newest state and descriptor."""

    def __init__(self, path: Path) -> None:
        self.path, self.state, self.fd = path, b"", -1
        self._thread: threading.Thread | None = None

    def _listen(self) -> socket.socket:
        self.path.unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX)
        server.settimeout(WAIT_SECONDS)
        server.bind(str(self.path))
        server.listen(1)
        return server

    @contextlib.contextmanager
    def receiving(self) -> Iterator[None]:
        server = self._listen()

        def receive() -> None:
            connection, _ = server.accept()
            with connection:
                state, fds, _, _ = socket.recv_fds(connection, 32 << 10, 1)
                while more := connection.recv(256 << 10):
                    state += more
            self.drop()
            self.state, self.fd = state, fds[0]

        yield from self._beside(server, receive)

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        server = self._listen()

        def send() -> None:
            connection, _ = server.accept()
            with connection:
                sent = socket.send_fds(connection, [self.state], [self.fd])
                connection.sendall(self.state[sent:])

        yield from self._beside(server, send)

    def _beside(self, server: socket.socket, work: object) -> Iterator[None]:
        thread = threading.Thread(target=work)  # type: ignore[arg-type]
        thread.start()
        try:
            yield
        finally:
            thread.join(WAIT_SECONDS)
            server.close()
        assert not thread.is_alive()

    def drop(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    keeper = Supervisor(tmp_path / "supervisor.sock")
    yield keeper
    keeper.drop()


@pytest.fixture
def proxy(registry: LocalRegistry) -> Iterator[RangeProxy]:
    with RangeProxy(registry.host) as server:
        yield server


class Reader:
    """The reading process; rounds() counts what it read whole."""

    def __init__(self, root: Path, log: Path) -> None:
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen([sys.executable, "-c", READER, str(root)], stdout=out, stderr=out)

    def rounds(self) -> int:
        assert self.process.poll() is None, self.log.read_text()
        return self.log.read_text().count("\n")

    def wait_rounds(self, more: int) -> None:
        until = self.rounds() + more
        wait_until(lambda: self.rounds() >= until, "the reader goes on", 90)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_SECONDS)


@pytest.fixture
def readers(tmp_path: Path) -> Iterator[list[Reader]]:
    running: list[Reader] = []
    yield running
    for reader in running:
        reader.stop()


def options(keeper: Supervisor) -> tuple[str, ...]:
    return ("--id", "one", "--supervisor", str(keeper.path))


def take_over(keeper: Supervisor, daemon: HostDaemon) -> None:
    with keeper.sending():
        daemon.put("fuse/takeover")
    assert daemon.api_state() == "READY"


def test_kill_under_load(start_host: StartHost, supervisor: Supervisor, readers: list[Reader], tmp_path: Path) -> None:
    host = start_host(extra=options(supervisor))
    with supervisor.receiving():
        host.put("fuse/sendfd")
    readers += [Reader(host.mountpoint, tmp_path / f"reader{n}") for n in range(2)]
    for reader in readers:
        reader.wait_rounds(1)
    for _ in range(3):
        host.kill()
        host = start_host(extra=options(supervisor), state="INIT")
        assert host.is_mounted()
        take_over(supervisor, host)
        host.put("start")
        assert host.api_state() == "RUNNING"
        for reader in readers:
            reader.wait_rounds(2)
        with supervisor.receiving():
            host.put("fuse/sendfd")


def test_the_dead_mount_can_be_looked_at(start_host: StartHost, supervisor: Supervisor, image: ServedImage) -> None:
    """nydus-snapshotter looks at a shared daemon's mount point before it starts a successor: no daemon would answer."""
    host = start_host(extra=options(supervisor), bootstrap=False)
    before = host.mountpoint.stat().st_nlink
    mount = {"fs_type": "rafs", "source": str(image.bootstrap), "config": host.config.read_text()}
    assert host.request("POST", "/api/v1/mount?mountpoint=/s1", mount)[0] == 204
    assert host.mountpoint.stat().st_nlink == before + 1  # kept, and asked again when it changed
    with supervisor.receiving():
        host.put("fuse/sendfd")
    host.kill()
    assert subprocess.run(["test", "-d", str(host.mountpoint)], timeout=WAIT_SECONDS).returncode == 0
    successor = start_host(extra=options(supervisor), state="INIT", bootstrap=False)
    take_over(supervisor, successor)
    successor.put("start")
    assert any((host.mountpoint / "s1").iterdir())


def test_kill_with_a_read_under_way(
    image: ServedImage, proxy: RangeProxy, start_host: StartHost, supervisor: Supervisor, unpacked: Path
) -> None:
    """A read that waits for the registry when its server dies is answered by the next one."""
    served = image.with_backend(host=proxy.host)
    host = start_host(served=served, extra=options(supervisor), deadline_ms=60_000)
    with supervisor.receiving():
        host.put("fuse/sendfd")
    proxy.gate.clear()
    # A process of its own: one that forks while it has the file open would wait with it
    reader = subprocess.Popen(["sha256sum", str(host.mountpoint / "large/random")], stdout=subprocess.PIPE, text=True)
    try:
        assert proxy.held.acquire(timeout=WAIT_SECONDS)
        host.kill()
        proxy.gate.set()
        successor = start_host(served=served, extra=options(supervisor), state="INIT")
        assert reader.poll() is None
        take_over(supervisor, successor)
        successor.put("start")
        out, _ = reader.communicate(timeout=WAIT_SECONDS)
    finally:
        proxy.gate.set()
        reader.kill()
    expected = hashlib.sha256((unpacked / "large/random").read_bytes()).hexdigest()
    assert reader.returncode == 0 and out.split()[0] == expected


def test_upgrade(start_host: StartHost, supervisor: Supervisor, readers: list[Reader], tmp_path: Path) -> None:
    old = start_host(extra=options(supervisor))
    readers.append(Reader(old.mountpoint, tmp_path / "reader"))
    with supervisor.receiving():
        old.put("fuse/sendfd")
    readers[0].wait_rounds(1)
    new = start_host(extra=(*options(supervisor), "--upgrade"), state="INIT", number=1)
    assert new.request("PUT", "/api/v1/daemon/start")[0] == 400
    take_over(supervisor, new)
    readers[0].wait_rounds(1)  # the old one serves until it is told to go
    old.put("exit")
    assert old.process.wait(WAIT_SECONDS) == 0
    assert new.is_mounted()
    new.put("start")
    readers[0].wait_rounds(2)
    readers[0].stop()
    with supervisor.receiving():
        new.put("fuse/sendfd")
    supervisor.drop()
    new.__exit__(None, None, None)
    assert not new.is_mounted()


def test_shared_daemon_keeps_its_images(start_host: StartHost, supervisor: Supervisor, unpacked: Path) -> None:
    """Mounts by the API, one taken away before: files open in the others stay the same files."""
    host = start_host(bootstrap=False, extra=options(supervisor))
    body = {"fs_type": "rafs", "source": str(host.image.bootstrap), "config": host.config.read_text()}
    for name in ("one", "two", "three"):
        assert host.request("POST", f"/api/v1/mount?mountpoint=/{name}", body)[0] == 204
    assert host.request("DELETE", "/api/v1/mount?mountpoint=/one")[0] == 204
    name = host.mountpoint / "three/large/text"
    holder = subprocess.Popen(
        ["sh", "-c", 'exec 9<"$1"; echo; read _; exec sha256sum <&9', "-", str(name)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout and holder.stdout.readline()
    before = name.stat()
    with supervisor.receiving():
        host.put("fuse/sendfd")
    host.kill()
    host = start_host(bootstrap=False, extra=options(supervisor), state="INIT")
    take_over(supervisor, host)
    host.put("start")
    out, _ = holder.communicate("\n", timeout=WAIT_SECONDS)
    assert out.split()[0] == hashlib.sha256((unpacked / "large/text").read_bytes()).hexdigest()
    after = name.stat()
    assert (after.st_ino, after.st_dev) == (before.st_ino, before.st_dev)
    assert sorted(path.name for path in host.mountpoint.iterdir()) == ["three", "two"]


def test_states_and_refusals(start_host: StartHost, supervisor: Supervisor) -> None:
    host = start_host(extra=options(supervisor))
    assert host.request("PUT", "/api/v1/daemon/fuse/sendfd")[0] == 500  # no supervisor listens there
    assert host.request("PUT", "/api/v1/daemon/fuse/takeover")[0] == 400
    waiting = start_host(extra=(*options(supervisor), "--upgrade"), state="INIT", number=1)
    assert waiting.request("PUT", "/api/v1/daemon/fuse/sendfd")[0] == 503
    supervisor.state, supervisor.fd = b"not ours", os.open("/dev/null", os.O_RDONLY)
    with supervisor.sending():
        assert waiting.request("PUT", "/api/v1/daemon/fuse/takeover")[0] == 500
    supervisor.state = b'{"version": 1, "kind": 0, "mounts": [{"path": "/"}], "next_serial": 2}'
    with supervisor.sending():
        assert waiting.request("PUT", "/api/v1/daemon/fuse/takeover")[0] == 500
    assert waiting.api_state() == "INIT" and host.api_state() == "RUNNING"
    assert (host.mountpoint / "etc/passwd").read_bytes()
