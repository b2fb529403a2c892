"""Front-ends that take more than their share of the daemon's descriptors and threads."""

import contextlib
import os
import resource
import time
from pathlib import Path

from tests.fakeguest.support import Image, assert_alive, open_fds, undisturbed, wait_until
from virtiofsd_nydus.fakeguest import frontend as vhost
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.frontend import HungUp, Request, VhostFrontend
from virtiofsd_nydus.vmm.servers import NydusDaemon


def cpu_seconds(daemon: NydusDaemon) -> float:
    """Of all its processes."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in daemon.family]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


def leave_descriptors(daemon: NydusDaemon, count: int) -> None:
    """Each of its processes may have so many more than it has."""
    for pid in daemon.family:
        limit = len(list(Path(f"/proc/{pid}/fd").iterdir())) + count
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, limit))


def test_out_of_descriptors(image: Image) -> None:
    """Connections until the daemon has no descriptor left: guests that are there read on, and it recovers."""
    with NydusDaemon(["--bootstrap", str(image.bootstrap), "--localfs-dir", str(image.blob_dir)]) as daemon:
        with undisturbed(daemon):
            leave_descriptors(daemon, 40)
            fronts: list[VhostFrontend] = []
            with contextlib.suppress(OSError):
                for _ in range(80):
                    fronts.append(VhostFrontend(daemon.socket_path))
                    fronts[-1].send(Request.SET_OWNER)
            begin, spent = time.monotonic(), cpu_seconds(daemon)
            wait_until(lambda: time.monotonic() - begin > 0.5, "half a second passes")
            assert cpu_seconds(daemon) - spent < 0.45, "it spins on what it cannot accept"
            for front in fronts:
                front.close()
        with undisturbed(daemon):
            pass
        assert_alive(daemon)


def test_descriptors_of_a_message_do_not_fit(image: Image) -> None:
    """A message's descriptors find no room: that connection suffers alone."""
    with NydusDaemon(["--bootstrap", str(image.bootstrap), "--localfs-dir", str(image.blob_dir)]) as daemon:
        fd = os.memfd_create("region", os.MFD_CLOEXEC)
        os.ftruncate(fd, 1 << 20)
        with undisturbed(daemon):
            front = VhostFrontend(daemon.socket_path)
            front.get_u64(Request.GET_FEATURES)
            leave_descriptors(daemon, 3)
            regions = [(i << 12, 4096, 0x7000_0000_0000 + (i << 12), 0) for i in range(8)]
            with contextlib.suppress(HungUp):
                front.send(Request.SET_MEM_TABLE, vhost.pack_regions(regions), [fd] * 8)
                front.get_u64(Request.GET_FEATURES)
            front.close()
        os.close(fd)
        assert_alive(daemon)


def test_descriptors_replaced_for_ever(daemon: NydusDaemon) -> None:
    with undisturbed(daemon), FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        before = open_fds(daemon)
        for _ in range(300):
            for queue in guest.queues:
                guest.swap_call(queue)
                guest.send_fd(Request.SET_VRING_ERR, queue, queue.err_fd)
        guest.front.get_u64(Request.GET_FEATURES)
        assert open_fds(daemon) <= before + 2
