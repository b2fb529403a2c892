"""A front-end that connects again and replays its state, as Cloud Hypervisor does: with a keeper and without one, to
the same daemon and to another after a death. The guest sends no INIT again."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.keeper.conftest import Image, wait_until
from virtiofsd_nydus.fakeguest import frontend as vhost
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.frontend import Protocol, Request, VhostFrontend

ACKED = Protocol.MQ | Protocol.REPLY_ACK | Protocol.INFLIGHT_SHMFD | Protocol.BACKEND_REQ


class Replayer:
    """A guest whose front-end keeps the in-flight region that the back-end gave, and connects again with it."""

    def __init__(self, path: Path) -> None:
        self.guest = FakeGuest(path, queue_size=64)
        self.guest.connect()
        queues, entries = len(self.guest.queues), 128
        self.guest.front.send(Request.GET_INFLIGHT_FD, vhost.INFLIGHT.pack(0, 0, queues, entries))
        self.region, (self.region_fd,) = self.guest.front.receive(Request.GET_INFLIGHT_FD)
        self.guest.front.command(Request.SET_INFLIGHT_FD, self.region, [self.region_fd], self.guest.acks)
        self.guest.start()
        self.guest.fuse.init()

    def connect_again(self) -> None:
        """Cloud Hypervisor's order of messages; bases are the guest's next avail indexes."""
        guest = self.guest
        guest.front.close()
        guest.front = front = VhostFrontend(guest.path)
        front.get_u64(Request.GET_FEATURES)
        front.get_u64(Request.GET_PROTOCOL_FEATURES)
        front.send(Request.SET_PROTOCOL_FEATURES, vhost.U64.pack(ACKED))
        front.send(Request.SET_OWNER)
        front.send(Request.SET_FEATURES, vhost.U64.pack(guest.features))
        guest.send_memory_table(guest.memory.wire_regions())
        for queue in guest.queues:
            front.send(Request.SET_VRING_NUM, vhost.VRING_STATE.pack(queue.index, queue.size))
        front.command(Request.SET_INFLIGHT_FD, self.region, [self.region_fd], True)
        for queue in guest.queues:
            at = guest.memory.user_address
            words = (at(queue.desc_gpa), at(queue.used_gpa), at(queue.avail_gpa), queue.used_gpa)
            front.command(Request.SET_VRING_ADDR, vhost.VRING_ADDR.pack(queue.index, 0, *words), (), True)
            front.send(Request.SET_VRING_BASE, vhost.VRING_STATE.pack(queue.index, queue.avail_index()))
            guest.send_fd(Request.SET_VRING_CALL, queue, queue.call_fd)
            guest.send_fd(Request.SET_VRING_KICK, queue, queue.kick_fd)
        for queue in guest.queues:
            guest.enable(queue)

    def close(self) -> None:
        os.close(self.region_fd)
        self.guest.close()


class Daemon:
    """`virtiofs` on a socket path, which another one can take over."""

    def __init__(self, image: Image, path: Path, *options: str) -> None:
        words = ["virtiofs", "--sock", str(path), *image.options, *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "virtiofsd_nydus.cli.main", *words], stderr=subprocess.DEVNULL
        )
        wait_until(lambda: self.listens(path), "the daemon's socket")

    @staticmethod
    def listens(path: Path) -> bool:
        try:
            VhostFrontend(path).close()
        except OSError:
            return False
        return True

    def end(self, how: signal.Signals) -> None:
        self.process.send_signal(how)
        self.process.wait(20)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fs.sock"


@pytest.fixture(params=["--keeper", "--no-keeper"])
def daemons(request: pytest.FixtureRequest, image: Image, path: Path) -> Iterator[list[Daemon]]:
    started = [Daemon(image, path, request.param)]
    yield started
    for daemon in started:
        daemon.end(signal.SIGKILL)


def check_files(replayer: Replayer, image: Image) -> None:
    for name, data in image.files.items():
        assert replayer.guest.fuse.read_file(name) == data


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_another_daemon_goes_on(daemons: list[Daemon], image: Image, path: Path, how: signal.Signals) -> None:
    replayer = Replayer(path)
    check_files(replayer, image)
    nodeid = replayer.guest.fuse.walk("file3").nodeid
    daemons[0].end(how)
    daemons.append(Daemon(image, path, "--no-keeper"))
    replayer.connect_again()
    assert replayer.guest.fuse.read_all(nodeid) == image.files["file3"]
    check_files(replayer, image)
    replayer.close()


def test_the_same_daemon_goes_on(daemons: list[Daemon], image: Image, path: Path) -> None:
    replayer = Replayer(path)
    check_files(replayer, image)
    replayer.connect_again()
    check_files(replayer, image)
    replayer.close()
