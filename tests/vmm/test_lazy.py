"""Guests on an image that stays in a real registry: what is fetched, how often, and what happens when it cannot be.

The registry's access log is the witness for what was sent.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.peers.registry import LocalRegistry
from tests.vmm.conftest import CLI, ROOT
from virtiofsd_nydus.vmm.boot import BootOptions, BootReport, boot_guest
from virtiofsd_nydus.vmm.guest import Deadline
from virtiofsd_nydus.vmm.image import WantedImage, prepare_image
from virtiofsd_nydus.vmm.qemu import GuestFiles, Machine, MachineConfig, Share
from virtiofsd_nydus.vmm.servers import NydusDaemon

pytestmark = pytest.mark.guest
IMPORTS = ["python3", "-c", "import json, ssl, sqlite3; print('imported')"]


def sent_by_blob(registry: LocalRegistry) -> dict[str, int]:
    sent: dict[str, int] = {}
    for request in registry.blob_requests():
        sent[request.blob_id] = sent.get(request.blob_id, 0) + request.body_bytes
    return sent


def boot_cli(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, "boot", *words], cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)


def test_a_boot_fetches_what_it_reads_and_the_next_one_nothing(
    nydus_image: str, registry: LocalRegistry, guest_files: GuestFiles, tmp_path: Path
) -> None:
    registry.clear_log()
    first = boot_cli(nydus_image, "--cache-dir", str(tmp_path), "--json", "--", *IMPORTS)
    assert (first.returncode, first.stderr) == (0, "imported\n")
    report = json.loads(first.stdout)
    assert 0 < report["fetched_bytes"] < 0.35 * report["image_bytes"]
    assert 0 < report["init_s"] < report["root_s"] < report["end_s"]
    sent = sent_by_blob(registry)
    (bootstrap,) = (tmp_path / "bootstraps").glob("*.boot")
    assert sum(size for blob, size in sent.items() if blob in report_blobs(tmp_path)) == report["fetched_bytes"]
    assert sent[bootstrap.stem] < report["image_bytes"] / 20

    registry.clear_log()
    second = boot_cli(nydus_image, "--cache-dir", str(tmp_path), "--json", "--", *IMPORTS)
    assert second.returncode == 0
    assert json.loads(second.stdout)["fetched_bytes"] == 0
    assert not set(sent_by_blob(registry)) & {bootstrap.stem, *report_blobs(tmp_path)}


def report_blobs(cache: Path) -> set[str]:
    """Blobs that the cache holds data of."""
    return {path.name.split(".")[0] for path in cache.glob("*.blob.data")}


def test_status_and_streams_are_the_commands_own(nydus_image: str, tmp_path: Path, guest_files: GuestFiles) -> None:
    done = boot_cli(nydus_image, "--cache-dir", str(tmp_path), "--", "sh", "-c", "echo out; echo err >&2; exit 9")
    assert (done.returncode, done.stdout) == (9, "out\n")
    assert done.stderr.startswith("err\n") and "chunks" in done.stderr


def test_timeout(nydus_image: str, tmp_path: Path, guest_files: GuestFiles) -> None:
    done = boot_cli(nydus_image, "--cache-dir", str(tmp_path), "--timeout", "0.5", "--", "true")
    assert done.returncode == 124
    assert "did not end within" in done.stderr and done.stderr.count("\n") == 1


def test_two_guests_on_two_daemons_fetch_each_chunk_once(
    nydus_image: str, registry: LocalRegistry, guest_files: GuestFiles, tmp_path: Path
) -> None:
    def boot() -> tuple[BootReport, dict[str, int]]:
        with (
            prepare_image(WantedImage(nydus_image, cache_dir=tmp_path)) as image,
            NydusDaemon(image.daemon_options) as daemon,
        ):
            report = boot_guest(daemon, BootOptions(guest_files, IMPORTS), started_at=time.monotonic())
            ready = {blob: state["ready_chunks"] for blob, state in daemon.stats()["blobs"].items()}
            return report, ready

    registry.clear_log()
    with ThreadPoolExecutor(2) as pool:
        ends = [future.result() for future in [pool.submit(boot), pool.submit(boot)]]
    reports = [report for report, _ in ends]
    assert [report.status for report in reports] == [0, 0]
    ready = max(sum(state.values()) for _, state in ends)
    assert sum(report.fetched_chunks for report in reports) == ready
    sent = sum(size for blob, size in sent_by_blob(registry).items() if blob in report_blobs(tmp_path))
    assert sent == sum(report.fetched_bytes for report in reports)


def test_a_registry_that_dies_gives_eio_and_the_guest_goes_on(
    nydus_image: str, registry: LocalRegistry, guest_files: GuestFiles, tmp_path: Path, deadline: Deadline
) -> None:
    with (
        prepare_image(WantedImage(nydus_image, cache_dir=tmp_path)) as image,
        NydusDaemon([*image.daemon_options, "--read-deadline-ms", "2000"]) as daemon,
        Machine(MachineConfig(guest_files, [Share(daemon.socket_path)])) as machine,
    ):
        guest = machine.guest
        guest.wait_hello(deadline)
        guest.mount("vfs", deadline)
        read = ["sha256sum", "/demo/hello.txt"]
        before = guest.run(read, deadline)
        assert before.status == 0
        registry.stop(signal.SIGKILL)
        try:
            lost = guest.run(["sha256sum", "/demo/noise"], deadline)
            assert lost.status == 1 and b"Input/output error" in lost.stderr
            again = guest.run(read, deadline)
            assert (again.status, again.text) == (0, before.text)
            told = [line for line in daemon.log_text().splitlines() if "network" in line.lower()]
            assert told, daemon.log_text()
        finally:
            registry.start()
        assert guest.run(["sha256sum", "/demo/noise"], deadline).status == 0


def test_a_guest_that_reboots_mounts_again_on_the_same_socket(
    nydus_image: str, guest_files: GuestFiles, tmp_path: Path, deadline: Deadline
) -> None:
    with (
        prepare_image(WantedImage(nydus_image, cache_dir=tmp_path)) as image,
        NydusDaemon(image.daemon_options) as daemon,
        Machine(MachineConfig(guest_files, [Share(daemon.socket_path)])) as machine,
    ):
        for boots in (1, 2):
            machine.guest.wait_hello(deadline)
            machine.guest.mount("vfs", deadline)
            job = machine.guest.run(["cat", "/demo/hello.txt"], deadline)
            assert (machine.guest.boots, job.text) == (boots, "read from an image that stays in the registry\n")
            if boots == 1:
                machine.reset()


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < at, what
        time.sleep(0.01)  # between two looks; the deadline decides


def descendants(pid: int) -> set[int]:
    try:
        below = {
            int(word)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for word in (task / "children").read_text().split()
        }
    except FileNotFoundError:
        return set()
    return below.union(*(descendants(child) for child in below)) if below else set()


@pytest.mark.parametrize(("how", "status"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_boot_that_is_ended_takes_its_guest_and_daemon_along(
    nydus_image: str, guest_files: GuestFiles, tmp_path: Path, how: signal.Signals, status: int
) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    process = subprocess.Popen(
        [*CLI, "boot", nydus_image, "--cache-dir", str(tmp_path / "cache"), "--", "sleep", "99"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    try:
        wait_for(lambda: len(descendants(process.pid)) == 4, 30, "QEMU and the daemon's three to start")
        below = descendants(process.pid)
    finally:
        process.send_signal(how)
    assert process.wait(30) == status
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), 10, "QEMU and the daemon to end")
    if how == signal.SIGTERM:
        assert list(scratch.iterdir()) == []
