"""A guest that is closed while a thread of the test still uses a queue of it."""

import errno
import threading

import pytest

from tests.fakeguest.support import BackgroundLoad, Load, wait_until
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.vmm.servers import NydusDaemon


def test_a_running_load_ends_first(daemon: NydusDaemon) -> None:
    guest = FakeGuest(daemon.socket_path)
    with guest:
        guest.fuse.init()
        queue = guest.queues[1]
        load = BackgroundLoad(queue, Load(guest), may_fail=True)
        load.thread.start()
        wait_until(lambda: queue.used_index() > 100, "the load runs")
    load.thread.join(20)
    assert not load.thread.is_alive()
    assert isinstance(load.error, OSError)
    assert load.error.errno == errno.ECANCELED


def test_a_thread_that_waits_leaves_first(daemon: NydusDaemon) -> None:
    found: list[BaseException] = []
    began = threading.Event()

    def wait() -> None:
        began.set()
        try:
            queue.reap()
        except OSError as error:
            found.append(error)

    with FakeGuest(daemon.socket_path) as guest:
        queue = guest.queues[1]
        thread = threading.Thread(target=wait)
        thread.start()
        began.wait()
    thread.join(20)
    assert len(found) == 1


def test_a_closed_queue_is_refused(daemon: NydusDaemon) -> None:
    with FakeGuest(daemon.socket_path) as guest:
        queue = guest.queues[1]
    with pytest.raises(TypeError):
        queue.reap()
