"""`bench io` end to end, short: what it prints can be read by a machine and by a person, and adds up."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.daemon import wait_until
from virtiofsd_nydus.vmm.servers import C_VIRTIOFSD, RUST_VIRTIOFSD

SHORT = ["--rounds", "2", "--seconds", "0.05", "--files", "200", "--data-mib", "4"]
SMALL = ["--files", "10", "--data-mib", "2"]


def bench(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "virtiofsd_nydus.cli.main", "bench", "io", *SHORT, *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_side(side: dict[str, float]) -> None:
    for value in ("ops_per_s", "cpu_us_per_op"):
        assert 0 < side[f"{value}_min"] <= side[value] <= side[f"{value}_max"]


def test_ours_alone() -> None:
    result = json.loads(bench("--no-peer", "--json"))
    assert result["peers"] == []
    assert {(row["workload"], row["depth"]) for row in result["rows"]} == {
        *(("4 KiB random read", depth) for depth in (1, 4, 16, 64)),
        *((name, depth) for name in ("1 MiB sequential read", "look-up") for depth in (1, 4, 16)),
    }
    for row in result["rows"]:
        check_side(row["ours"])


@pytest.mark.skipif("VIRTIOFSD_NYDUS_SANITIZED" in os.environ, reason="the other server does not run under a sanitizer")
@pytest.mark.skipif(
    not (C_VIRTIOFSD.exists() or RUST_VIRTIOFSD.exists()) or os.geteuid() != 0,
    reason="needs another virtio-fs server (qemu-system-common or virtiofsd) and root",
)
def test_beside_the_other_server() -> None:
    result = json.loads(bench("--json"))
    (peer,) = result["peers"]
    assert "virtiofsd" in peer and peer[-1].isdecimal()
    for row in result["rows"]:
        check_side(row["ours"])
        check_side(row["peers"][peer])
        assert row["peers"][peer]["ops_ratio"] > 0 and row["peers"][peer]["cpu_ratio"] > 0
    assert peer in bench()


def test_a_peer_by_its_command() -> None:
    ours = f"{sys.executable} -m virtiofsd_nydus.cli.main virtiofs --sock {{sock}} --bootstrap {{bootstrap}}"
    result = json.loads(bench("--no-peer", "--json", "--peer", f"twin={ours} --localfs-dir {{blob_dir}}"))
    assert result["peers"] == ["twin"]
    for row in result["rows"]:
        check_side(row["peers"]["twin"])


def test_a_peer_that_ends_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "virtiofsd_nydus.cli.main", "bench", "io", *SHORT, "--peer", "bad=false {sock}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "bad ended with status 1" in done.stderr


def test_bad_sizes_are_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "virtiofsd_nydus.cli.main", "bench", "io", "--files", "20000"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "--files" in done.stderr


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing(tmp_path: Path, how: signal.Signals) -> None:
    """No daemon and no directory is left of a measurement that a signal ends."""
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "virtiofsd_nydus.cli.main",
            "bench",
            "io",
            "--no-peer",
            "--files",
            "10",
            "--data-mib",
            "2",
            "--rounds",
            "100000",
        ],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGHUP)],
    ) as process:
        wait_until(lambda: any(tmp_path.glob("vnd-fs-*/api.sock")), "its daemon")
        (daemon,) = children(process.pid)
        process.send_signal(how)
        assert process.wait(30) == 128 + how
    assert list(tmp_path.iterdir()) == []
    assert not Path(f"/proc/{daemon}").exists()


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(one) for one in found]
