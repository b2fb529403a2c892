"""`bench io` end to end, short: what it prints can be read by a machine and by a person, and adds up."""

import json
import os
import subprocess
import sys

import pytest

from virtiofsd_nydus.vmm.servers import C_VIRTIOFSD, RUST_VIRTIOFSD

SHORT = ["--rounds", "2", "--seconds", "0.05", "--files", "200", "--data-mib", "4"]


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
    assert result["peer"] is None
    assert {(row["workload"], row["depth"]) for row in result["rows"]} == {
        (name, depth) for name in ("4 KiB random read", "1 MiB sequential read", "look-up") for depth in (1, 16)
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
    assert "virtiofsd" in result["peer"] and result["peer"][-1].isdecimal()
    for row in result["rows"]:
        check_side(row["ours"])
        check_side(row["peer"])
        assert row["ops_ratio"] > 0 and row["cpu_ratio"] > 0
    assert result["peer"] in bench()


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
