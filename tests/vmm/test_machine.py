"""The life of a machine: it ends in order, by its deadline, by a panic, and each end leaves one clear line and no
process or directory behind."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.conftest import CLI, ROOT
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.vmm import accel
from virtiofsd_nydus.vmm.boot import BootOptions, TimedOut, boot_guest
from virtiofsd_nydus.vmm.guest import Deadline
from virtiofsd_nydus.vmm.qemu import GuestFiles, Machine, MachineConfig, Share
from virtiofsd_nydus.vmm.servers import PeerVirtiofsd

pytestmark = pytest.mark.guest


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every temporary directory is made in one of the test's own, which must be empty after; no child is left."""
    scratch = Path(tempfile.mkdtemp(prefix="left-"))
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    children = set(children_of(os.getpid()))
    yield
    assert list(scratch.iterdir()) == []
    assert set(children_of(os.getpid())) <= children
    scratch.rmdir()
    tempfile.tempdir = None


def children_of(pid: int) -> list[int]:
    return [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]


def boots(guest_files: GuestFiles, *command: str, timeout_s: float = 60) -> BootOptions:
    return BootOptions(guest_files, command, timeout_s=timeout_s)


def test_a_boot_reports_status_and_times(guest_files: GuestFiles, peer: PeerVirtiofsd) -> None:
    with peer as server:
        out = bytearray()
        report = boot_guest(
            server, boots(guest_files, "sh", "-c", "echo hello; exit 7"), started_at=time.monotonic(), stdout=out.extend
        )
    assert (report.status, bytes(out)) == (7, b"hello\n")
    assert 0 < report.init_s < report.root_s < report.end_s


def test_a_command_that_hangs_is_ended_by_the_deadline(guest_files: GuestFiles, peer: PeerVirtiofsd) -> None:
    begun = time.monotonic()
    with peer as server, pytest.raises(TimedOut, match="the command sleep did not end within 12 s"):
        boot_guest(server, boots(guest_files, "sleep", "1000", timeout_s=12), started_at=begun)
    assert time.monotonic() - begun < 20


def test_a_guest_that_stops_answering_is_ended_by_the_deadline(guest_files: GuestFiles) -> None:
    with Machine(MachineConfig(guest_files)) as machine:
        machine.guest.wait_hello(Deadline(60, "the boot"))
        machine.pause()
        with pytest.raises(Failure, match=r"did not end within 0\.5 s") as caught:
            machine.guest.run(["sh"], Deadline(0.5, "a command"), chroot=False)
        assert caught.value.cause == Cause.DEADLINE
        machine.resume()
        job = machine.guest.run(["/init-is-no-shell"], Deadline(60, "a command"), chroot=False)
        assert job.status == 127


def test_a_panic_is_told_by_its_line(guest_files: GuestFiles, peer: PeerVirtiofsd) -> None:
    with peer as server, pytest.raises(Failure, match="kernel died: Kernel panic - not syncing: sysrq") as caught:
        boot_guest(server, boots(guest_files, "sh", "-c", "echo c > /proc/sysrq-trigger"), started_at=time.monotonic())
    assert caught.value.cause == Cause.GUEST


def test_a_reset_guest_boots_again_on_the_same_devices(guest_files: GuestFiles) -> None:
    with Machine(MachineConfig(guest_files)) as machine:
        machine.guest.wait_hello(Deadline(60, "the boot"))
        machine.reset()
        machine.guest.wait_hello(Deadline(60, "the second boot"))
        machine.forbid_reboot()
        assert machine.guest.boots == 2
        assert machine.execute("query-status")["running"]
        machine.shut_down()


def test_a_command_qemu_refuses_is_one_line(guest_files: GuestFiles) -> None:
    with Machine(MachineConfig(guest_files)) as machine, pytest.raises(Failure, match="QEMU refused no-such"):
        machine.execute("no-such-command")


def test_qemu_killed(guest_files: GuestFiles) -> None:
    with Machine(MachineConfig(guest_files)) as machine:
        machine.process.send_signal(signal.SIGKILL)
        with pytest.raises(Failure, match="QEMU was killed by SIGKILL"):
            machine.guest.wait_hello(Deadline(60, "the boot"))


def test_words_qemu_does_not_know(guest_files: GuestFiles) -> None:
    config = MachineConfig(guest_files, extra=["-device", "no-such-device"])
    with pytest.raises(Failure, match=r"QEMU ended with status 1: .*no-such-device"), Machine(config) as machine:
        machine.guest.wait_hello(Deadline(60, "the boot"))


def test_a_server_that_does_not_start_is_named(guest_files: GuestFiles, peer: PeerVirtiofsd) -> None:
    with PeerVirtiofsd(Path("/no/such/tree")) as server, pytest.raises(Failure, match="virtiofsd ended with status"):
        boot_guest(server, boots(guest_files), started_at=time.monotonic())


def test_a_server_that_dies_ends_the_wait(guest_files: GuestFiles, peer: PeerVirtiofsd) -> None:
    with (
        peer as server,
        Machine(
            MachineConfig(guest_files, [Share(server.socket_path)], watches={server.pidfd: server.explain_end})
        ) as machine,
    ):
        server.process.kill()
        with pytest.raises(Failure, match="virtiofsd was killed by signal 9"):
            machine.guest.wait_hello(Deadline(60, "the boot"))


def test_a_share_that_is_not_there_is_an_error_of_the_guest(guest_files: GuestFiles, deadline: Deadline) -> None:
    with Machine(MachineConfig(guest_files)) as machine:
        machine.guest.wait_hello(deadline)
        with pytest.raises(Failure, match="in the guest: mount virtiofs: Invalid argument"):
            machine.guest.mount("nothing", deadline)


def test_socket_path_too_long(guest_files: GuestFiles) -> None:
    config = MachineConfig(guest_files, [Share("/" + "x" * 120)])
    with pytest.raises(Failure, match="socket path too long"), Machine(config):
        pass


def boot_cli(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, "boot", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, **env}
    )


@pytest.mark.parametrize(
    ("words", "env", "status", "line"),
    [
        (["/no/such/image"], {}, 125, "no image /no/such/image"),
        (["/etc/passwd"], {}, 2, "a bootstrap file needs --blob-dir"),
        (["/etc/passwd", "--blob-dir", "/no/such"], {}, 125, "no blob directory /no/such"),
        (["oci:/x", "--blob-dir", "/"], {}, 2, "--blob-dir and --config go with a bootstrap"),
        (["/x", "--kernel", "/no/such"], {}, 125, "no guest kernel at /no/such: run make guest"),
        (["/x", "--initrd", "/no/such"], {}, 125, "no guest initramfs at /no/such"),
        (["/x"], {"VIRTIOFSD_NYDUS_GUEST_DIR": "/no/such"}, 125, "no guest kernel at /no/such/vmlinuz"),
        (["/x"], {"PATH": "/no/such"}, 125, "qemu-system-x86_64 is not installed: apt-get install qemu-system-x86"),
        (["/x", "--memory", "much"], {}, 2, "'much' is no memory size"),
        (["/x", "--memory", "4M"], {}, 2, "give it 96M at least"),
        (["/x", "--timeout", "0"], {}, 2, "must be positive"),
    ],
)
def test_what_cannot_boot_is_one_line(words: list[str], env: dict[str, str], status: int, line: str) -> None:
    done = boot_cli(*words, **env)
    assert done.returncode == status
    assert done.stdout == "" and line in done.stderr and done.stderr.count("\n") == 1


def test_kvm_is_used_only_where_a_guest_boots_with_it(
    guest_files: GuestFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(accel, "KVM_DEVICE", tmp_path / "kvm")
    assert accel.choose_accel("tcg", guest_files) == "tcg"
    assert accel.choose_accel("auto", guest_files) == "tcg"
    with pytest.raises(Failure, match="KVM is not usable here: there is no"):
        accel.choose_accel("kvm", guest_files)
