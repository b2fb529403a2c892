"""The worker dies under a guest: nothing is lost, nothing is wrong, and the log says why."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.keeper.conftest import Image, KeptDaemon, children, wait_until
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.vmm.servers import NydusDaemon

ROUNDS = 4
KINDS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)


def check_files(guest: FakeGuest, image: Image) -> None:
    for name, data in image.files.items():
        assert guest.fuse.read_file(name) == data


def test_guest_goes_on(daemon: KeptDaemon, guest: FakeGuest, image: Image) -> None:
    """The same guest, without INIT again, reads everything after each death."""
    check_files(guest, image)
    nodeid = guest.fuse.walk("file3").nodeid
    for round_ in range(ROUNDS):
        os.kill(daemon.worker, KINDS[round_ % len(KINDS)])
        assert guest.fuse.read_all(nodeid) == image.files["file3"]  # by a number of the last worker's
        check_files(guest, image)
    for kind in KINDS:
        daemon.await_line(f"the worker was ended by {kind.name}; ")


def test_killed_while_it_serves(daemon: KeptDaemon, guest: FakeGuest, image: Image) -> None:
    """Deaths come at any moment of a load: each request is answered, with the right bytes."""
    done = threading.Event()

    def kill() -> None:
        for _ in range(ROUNDS):
            daemon.kill_worker()
            if done.wait(0.55):  # long enough to be no crash loop
                return

    killer = threading.Thread(target=kill)
    killer.start()
    while killer.is_alive():
        check_files(guest, image)
    done.set()
    killer.join()


def test_front_end_is_answered_while_no_worker_lives(daemon: KeptDaemon, guest: FakeGuest, image: Image) -> None:
    """A VMM waits for each answer with its main loop stopped."""
    check_files(guest, image)
    os.kill(daemon.worker, signal.SIGKILL)
    guest.stop()
    guest.start()
    guest.fuse.init()
    check_files(guest, image)


def test_front_end_comes_while_no_worker_lives(daemon: KeptDaemon, image: Image) -> None:
    os.kill(daemon.worker, signal.SIGKILL)
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        check_files(guest, image)


def test_mounts_of_the_api_keep_their_numbers(image: Image, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What was mounted and unmounted by calls is so in the next worker, at the same node numbers."""
    other = Image(tmp_path_factory.mktemp("other"), seed=2)

    def mount(daemon: KeptDaemon, path: str, what: Image) -> None:
        config = {
            "device": {
                "backend": {"type": "localfs", "config": {"dir": str(what.blobs)}},
                "cache": {"type": "blobcache", "config": {"work_dir": str(what.blobs)}},
            },
            "mode": "direct",
        }
        import json

        body = {"fs_type": "rafs", "source": str(what.bootstrap), "config": json.dumps(config)}
        assert daemon.call("POST", f"/api/v1/mount?mountpoint={path}", body)[0] == 204

    with KeptDaemon([]) as daemon, FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        mount(daemon, "/a", image)
        mount(daemon, "/b", other)
        mount(daemon, "/c", image)
        assert daemon.call("DELETE", "/api/v1/mount?mountpoint=/a")[0] == 204
        node = guest.fuse.walk("b/file1").nodeid
        before = daemon.call("GET", "/api/v1/daemon")[1]["backend_collection"]
        daemon.kill_worker()
        assert guest.fuse.read_all(node) == other.files["file1"]
        assert daemon.call("GET", "/api/v1/daemon")[1]["backend_collection"] == before
        mount(daemon, "/d", other)
        serials = {path: guest.fuse.walk(f"{path}/file1").nodeid >> 48 for path in "bcd"}
        assert serials == {"b": 2, "c": 3, "d": 4}


def test_crash_loop_pauses(image: Image) -> None:
    """Workers that die before they serve are started less and less often, and the log says why and when."""
    with KeptDaemon(image.options) as daemon:
        pid = daemon.worker
        for _ in range(4):
            wait_until(daemon.is_running, "a worker")
            os.kill(daemon.worker, signal.SIGKILL)
            pid = daemon.await_worker(pid) if _ == 3 else daemon.worker
        daemon.await_line("another one is started in 0.1 s")
        daemon.await_line("another one is started in 0.2 s")


def test_template_dies(daemon: KeptDaemon, guest: FakeGuest, image: Image) -> None:
    """The process that workers are forked from is replaced; the worker serves on, and can die then."""
    worker, template = daemon.worker, daemon.template
    os.kill(template, signal.SIGKILL)
    daemon.await_line("the process that workers are forked from ended")
    check_files(guest, image)
    wait_until(lambda: children(daemon.process.pid) not in ([], [template]), "another template")
    os.kill(worker, signal.SIGKILL)
    check_files(guest, image)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(("how", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, -9)])
def test_no_process_outlives_the_keeper(image: Image, how: signal.Signals, status: int) -> None:
    """Its end is the daemon's, and its standard output closes with it."""
    with KeptDaemon(image.options) as daemon:
        others = [daemon.template, daemon.worker]
        daemon.process.send_signal(how)
        assert daemon.process.wait(10) == status
        wait_until(lambda: all(map(is_gone, others)), "the end of the keeper's processes")


def test_usage_and_failures_are_one_line(image: Image) -> None:
    """What only the worker finds out is the daemon's failure all the same."""
    with NydusDaemon(["--bootstrap", "/none", "--localfs-dir", str(image.blobs)]) as daemon:
        assert daemon.process.wait(10) == 1
        lines = daemon.log_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith("virtiofsd-nydus virtiofs: ") and "/none" in lines[0]


@pytest.fixture
def hung_up(daemon: KeptDaemon) -> Iterator[KeptDaemon]:
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
    yield daemon


def test_front_ends_leave_nothing(hung_up: KeptDaemon) -> None:
    """What a front-end gave is closed in keeper and worker when it has gone."""

    def count() -> list[int]:
        return [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (hung_up.process.pid, hung_up.worker)]

    first = wait_until(count, "descriptors")
    for _ in range(3):
        with FakeGuest(hung_up.socket_path) as guest:
            guest.fuse.init()

    def none_left() -> bool:
        return all(now <= then for now, then in zip(count(), first, strict=True))

    wait_until(none_left, f"no more descriptors than {first}")
