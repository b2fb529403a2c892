"""Commands in a guest: output, status and phases come back as they were."""

import hashlib
import signal

import pytest

from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.vmm.guest import Deadline
from virtiofsd_nydus.vmm.qemu import Machine

pytestmark = pytest.mark.guest


def test_output_and_status(machine: Machine, deadline: Deadline) -> None:
    job = machine.guest.run(["sh", "-c", "echo out; echo err >&2; exit 3"], deadline)
    assert (bytes(job.stdout), bytes(job.stderr), job.status) == (b"out\n", b"err\n", 3)
    assert job.started_at <= job.ended_at


def test_output_is_passed_on_byte_for_byte_and_as_it_comes(machine: Machine, deadline: Deadline) -> None:
    pieces: list[bytes] = []
    job = machine.guest.run(["sh", "-c", "cat /bin/busybox; echo end >&2"], deadline, stdout=pieces.append)
    expected = machine.guest.run(["sha256sum", "/bin/busybox"], deadline).text.split()[0]
    assert hashlib.sha256(b"".join(pieces)).hexdigest() == expected
    assert len(pieces) > 10 and not job.stdout and job.stderr == b"end\n"


def test_arguments_environment_and_directory(machine: Machine, deadline: Deadline) -> None:
    job = machine.guest.run(
        ["sh", "-c", 'echo "$0|$1|$COLOUR|$PWD"', "a b", ""], deadline, cwd="/bin", env={"COLOUR": "grün"}
    )
    assert job.text == "a b||grün|/bin\n"


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["/bin/nothing"], 127, b"/bin/nothing: No such file or directory\n"),
        (["/lower.txt"], 126, b"/lower.txt: Permission denied\n"),
        (["sh", "-c", "kill -9 $$"], 128 + 9, b""),
    ],
)
def test_commands_that_do_not_run(
    machine: Machine, deadline: Deadline, argv: list[str], status: int, said: bytes
) -> None:
    job = machine.guest.run(argv, deadline)
    assert (job.status, bytes(job.stderr)) == (status, said)


def test_several_at_once_and_kill(machine: Machine, deadline: Deadline) -> None:
    sleeper = machine.guest.start(["sh", "-c", "echo ready; sleep 1000"])
    other = machine.guest.run(["echo", "meanwhile"], deadline)
    assert other.text == "meanwhile\n" and sleeper.status is None
    machine.guest.kill(sleeper, signal.SIGTERM)
    assert machine.guest.wait(sleeper, deadline).status == 128 + signal.SIGTERM


def test_a_grandchild_that_keeps_the_pipe_does_not_keep_the_command(machine: Machine, deadline: Deadline) -> None:
    job = machine.guest.run(["sh", "-c", "sleep 1000 & echo started"], deadline)
    assert (job.text, job.status) == ("started\n", 0)


def test_more_commands_than_slots_is_an_error_not_an_end(machine: Machine, deadline: Deadline) -> None:
    jobs = [machine.guest.start(["sleep", "1000"]) for _ in range(17)]
    refused = machine.guest.wait(jobs[-1], deadline)
    assert refused.status == 126 and b"exec request" in refused.stderr
    for job in jobs[:-1]:
        machine.guest.kill(job, signal.SIGKILL)
    for job in jobs[:-1]:
        assert machine.guest.wait(job, deadline).status == 128 + signal.SIGKILL


def test_root_is_the_image_under_a_writable_layer(machine: Machine, deadline: Deadline) -> None:
    script = "cat /lower.txt; echo new > /lower.txt; cat /lower.txt; ls /proc/self >/dev/null && ls -l /dev/null"
    job = machine.guest.run(["sh", "-c", script], deadline)
    assert job.status == 0 and job.text.startswith("from the lower layer\nnew\n") and "/dev/null" in job.text


def test_words_the_guest_cannot_take_are_refused_here(machine: Machine) -> None:
    with pytest.raises(Failure, match="NUL"):
        machine.guest.start(["echo", "a\0b"])
    with pytest.raises(Failure, match="the guest takes"):
        machine.guest.start(["echo", "x" * 300_000])


def test_phases_are_in_order(machine: Machine) -> None:
    phases = machine.guest.phases
    assert 0 < phases["init"] <= phases["ready"] <= phases["root"]
    assert machine.guest.kernel
