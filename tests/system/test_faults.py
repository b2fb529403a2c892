"""What goes wrong around the daemon: a guest gets EIO in time, the log says why, and what is cached stays readable."""

import base64
import errno
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.peers.registry import LocalRegistry
from tests.system.daemon import Daemon, ServedImage, wait_until
from tests.system.guest_tree import Record
from tests.system.range_proxy import RangeProxy
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.frontend import Request
from virtiofsd_nydus.fakeguest.fuse_client import OUT_HEADER, READ, READ_IN, FuseClient, pack_request

DEADLINE_MS = 2000
SLACK_S = 8.0  # of a loaded machine, over the deadline
CACHED, COLD = "large/text", "large/second"  # in blobs of their own


def read_error(guest: FakeGuest, path: str) -> int:
    """The errno that reading it ends with, 0 if it does not."""
    try:
        guest.fuse.read_file(path)
    except OSError as error:
        return error.errno or -1
    return 0


def sha256_of(guest: FakeGuest, path: str) -> str:
    return hashlib.sha256(guest.fuse.read_file(path)).hexdigest()


def expected_sha256(tree: list[Record], path: str) -> str:
    return str(next(record["sha256"] for record in tree if record["path"] == path))


@pytest.fixture
def own_registry(registry: LocalRegistry, tmp_path: Path) -> Iterator[LocalRegistry]:
    """A registry that a test may kill, on the storage of the shared one."""
    directory = tmp_path / "own"
    directory.mkdir()
    (directory / "storage").symlink_to(registry.directory / "storage")
    with LocalRegistry(directory) as server:
        yield server


def test_registry_killed_between_reads(
    image: ServedImage, own_registry: LocalRegistry, expected_tree: list[Record], tmp_path: Path
) -> None:
    served = image.with_backend(host=own_registry.host)
    with Daemon(served, tmp_path / "cache", deadline_ms=DEADLINE_MS) as daemon, FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        assert sha256_of(guest, CACHED) == expected_sha256(expected_tree, CACHED)
        own_registry.stop(signal.SIGKILL)
        started = time.monotonic()
        assert read_error(guest, COLD) == errno.EIO
        assert time.monotonic() - started < DEADLINE_MS / 1000 + SLACK_S
        assert own_registry.host in daemon.wait_for_line("cause=network")
        assert sha256_of(guest, CACHED) == expected_sha256(expected_tree, CACHED)
        own_registry.start()
        assert sha256_of(guest, COLD) == expected_sha256(expected_tree, COLD)


def test_registry_hangs_in_an_answer(
    image: ServedImage, registry: LocalRegistry, expected_tree: list[Record], tmp_path: Path
) -> None:
    """The request was taken and is never answered: the deadline ends the read; another read goes on meanwhile."""
    with RangeProxy(registry.host) as proxy:
        served = image.with_backend(host=proxy.host)
        with (
            Daemon(served, tmp_path / "cache", deadline_ms=DEADLINE_MS) as daemon,
            FakeGuest(daemon.socket_path, request_queues=2) as guest,
        ):
            guest.fuse.init()
            assert sha256_of(guest, CACHED) == expected_sha256(expected_tree, CACHED)
            cold = guest.fuse.walk(COLD).nodeid
            proxy.gate.clear()
            caught: list[int] = []

            def read_cold() -> None:
                try:
                    FuseClient(guest.queues[2]).read(cold, 0, 4096)
                    caught.append(0)
                except OSError as error:
                    caught.append(error.errno or -1)

            started = time.monotonic()
            reader = threading.Thread(target=read_cold)
            reader.start()
            assert proxy.held.acquire(timeout=10)
            assert not caught
            assert sha256_of(guest, CACHED) == expected_sha256(expected_tree, CACHED)
            reader.join(DEADLINE_MS / 1000 + SLACK_S)
            assert caught == [errno.EIO]
            assert time.monotonic() - started >= DEADLINE_MS / 1000 * 0.9
            daemon.wait_for_line("cause=(deadline|network)")
            proxy.gate.set()
            assert sha256_of(guest, COLD) == expected_sha256(expected_tree, COLD)


def test_read_parked_over_a_ring_stop(
    image: ServedImage, registry: LocalRegistry, expected_tree: list[Record], tmp_path: Path
) -> None:
    """QEMU's stop and cont while a read waits for the registry: it ends with its bytes, not with EIO."""
    with RangeProxy(registry.host) as proxy:
        served = image.with_backend(host=proxy.host)
        with Daemon(served, tmp_path / "cache") as daemon, FakeGuest(daemon.socket_path) as guest:
            guest.fuse.init()
            guest.fuse.read_file("sizes/1")
            node = guest.fuse.walk(COLD).nodeid
            whole = guest.fuse.getattr(node).size
            proxy.gate.clear()
            queue = guest.queues[1]
            queue.submit(pack_request(READ, 2222, node, READ_IN.pack(0, whole - 4096, 4096, 0, 0, 0, 0)), 0, 4096)
            assert proxy.held.acquire(timeout=10)
            for one in guest.queues:
                guest.enable(one, False)
            bases = [guest.get_base(one) for one in guest.queues]
            proxy.gate.set()
            for one, base in zip(guest.queues, bases, strict=True):
                guest.send_ring(one, base)
                guest.send_fd(Request.SET_VRING_CALL, one, one.call_fd)
                guest.enable(one)
            _, reply = queue.reap()
            assert OUT_HEADER.unpack_from(reply)[1:] == (0, 2222)
            assert reply[OUT_HEADER.size :] == guest.fuse.read(node, whole - 4096, 4096)


def test_refused_login(
    image: ServedImage, registry: LocalRegistry, expected_tree: list[Record], tmp_path: Path
) -> None:
    directory = tmp_path / "own"
    directory.mkdir()
    (directory / "storage").symlink_to(registry.directory / "storage")
    with LocalRegistry(directory, auth="htpasswd") as server:

        def login(password: str) -> str:
            return base64.b64encode(f"{server.username}:{password}".encode()).decode()

        for auth in (login("wrong"), ""):
            served = image.with_backend(host=server.host, auth=auth)
            with (
                Daemon(served, tmp_path / "cache", deadline_ms=DEADLINE_MS) as daemon,
                FakeGuest(daemon.socket_path) as guest,
            ):
                guest.fuse.init()
                assert read_error(guest, COLD) == errno.EIO
                assert server.host in daemon.wait_for_line("cause=auth")
            assert "wrong" not in daemon.log_text() and (not auth or auth not in daemon.log_text())
        served = image.with_backend(host=server.host, auth=login(server.password))
        with Daemon(served, tmp_path / "cache") as daemon, FakeGuest(daemon.socket_path) as guest:
            guest.fuse.init()
            assert sha256_of(guest, COLD) == expected_sha256(expected_tree, COLD)


@pytest.mark.parametrize("tls", [False, True], ids=["https-to-plain", "http-to-tls"])
def test_wrong_scheme(image: ServedImage, registry: LocalRegistry, tmp_path: Path, tls: bool) -> None:
    directory = tmp_path / "own"
    directory.mkdir()
    (directory / "storage").symlink_to(registry.directory / "storage")
    with LocalRegistry(directory, tls=tls) as server:
        served = image.with_backend(host=server.host, scheme="http" if tls else "https")
        with (
            Daemon(served, tmp_path / "cache", deadline_ms=DEADLINE_MS) as daemon,
            FakeGuest(daemon.socket_path) as guest,
        ):
            guest.fuse.init()
            assert read_error(guest, COLD) == errno.EIO
            assert server.host in daemon.wait_for_line("cause=scheme")


def test_missing_blob(image: ServedImage, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    with (
        Daemon(image.from_directory(tmp_path / "blobs"), tmp_path / "cache", deadline_ms=DEADLINE_MS) as daemon,
        FakeGuest(daemon.socket_path) as guest,
    ):
        guest.fuse.init()
        assert read_error(guest, COLD) == errno.EIO
        assert any(blob in daemon.wait_for_line("cause=missing") for blob in image.blobs)


def test_full_cache_disk(image: ServedImage, expected_tree: list[Record], tmp_path: Path) -> None:
    """No space for what is fetched: reads go on from memory, and the log says so."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs CAP_SYS_ADMIN")
    try:
        with Daemon(image, small / "cache") as daemon, FakeGuest(daemon.socket_path) as guest:
            guest.fuse.init()
            for path in (CACHED, COLD, "large/random"):
                assert sha256_of(guest, path) == expected_sha256(expected_tree, path)
            daemon.wait_for_line("cause=space")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_running_before_the_network(image: ServedImage, expected_tree: list[Record], tmp_path: Path) -> None:
    """A registry that never answers delays neither the start nor what needs no data; nor the end."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        with Daemon(image.with_backend(host=host), tmp_path / "cache") as daemon:
            assert daemon.state() == "RUNNING"
            with FakeGuest(daemon.socket_path) as guest:
                guest.fuse.init()
                names = {entry.name for entry in guest.fuse.readdir(1)}
                assert {b"etc", b"usr", b"large"} <= names
            started = time.monotonic()
            assert daemon.kill(signal.SIGTERM) == 0
            assert time.monotonic() - started < 4 + SLACK_S


def test_nothing_is_asked_before_running(image: ServedImage, tmp_path: Path) -> None:
    """By system calls: no socket but unix ones before the API says RUNNING."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    config = image.with_backend(host="127.0.0.1:9").write_config(tmp_path / "config.json", tmp_path)
    trace, api = tmp_path / "trace", tmp_path / "api"
    process = subprocess.Popen(
        [
            "strace",
            "-f",
            "-qq",
            "-e",
            "trace=socket,connect,accept4,accept",
            "-o",
            str(trace),
            sys.executable,
            "-m",
            "virtiofsd_nydus.cli.main",
            "virtiofs",
            "--sock",
            str(tmp_path / "fs"),
            "--apisock",
            str(api),
            "--bootstrap",
            str(image.bootstrap),
            "--config",
            str(config),
        ],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        with socket.socket(socket.AF_UNIX) as client:

            def connected() -> bool:
                try:
                    client.connect(str(api))
                except OSError:
                    return False
                return True

            wait_until(connected, "the API socket")
            client.sendall(b"GET /api/v1/daemon HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b'"RUNNING"' in client.recv(65536)
            client.sendall(b"PUT /api/v1/daemon/exit HTTP/1.1\r\nHost: x\r\n\r\n")
        assert process.wait(20) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    lines = trace.read_text().splitlines()
    accepted = next(i for i, line in enumerate(lines) if "accept" in line and line.rstrip().split("= ")[-1].isdigit())
    assert not [line for line in lines[:accepted] if "AF_INET" in line]


def test_converted_image_needs_its_own_registry(image: ServedImage, tmp_path: Path) -> None:
    """A repository that lacks the blobs: missing, not a hang."""
    served = replace(image, backend_config={**image.backend_config, "repo": "no/such/repository"})
    with Daemon(served, tmp_path / "cache", deadline_ms=DEADLINE_MS) as daemon, FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        assert read_error(guest, COLD) == errno.EIO
        assert any(blob[:12] in daemon.wait_for_line("cause=missing") for blob in image.blobs)
