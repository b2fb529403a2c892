"""The swarm with a real Dragonfly, where its programs are: DRAGONFLY_SCHEDULER and DRAGONFLY_DFDAEMON name them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "dragonfly-demo"


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "VENV": sys.prefix}
    return subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, env=env, timeout=220)


def test_what_is_missing_is_named() -> None:
    done = run("--scheduler", "/nowhere/scheduler", "--dfdaemon", "/nowhere/dfdaemon")
    assert done.returncode == 77 and "scheduler is not here" in done.stdout and "docs/dragonfly.md" in done.stdout


@pytest.mark.peer
@pytest.mark.parametrize("mode", ["mirror", "proxy"])
def test_three_nodes_one_fetch(mode: str) -> None:
    programs = {name: os.environ.get(f"DRAGONFLY_{name.upper()}") or "" for name in ("scheduler", "dfdaemon")}
    for name, program in programs.items():
        if not program:
            pytest.skip(f"DRAGONFLY_{name.upper()} names no {name} of Dragonfly (docs/dragonfly.md)")
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    done = run(
        *(word for name, program in programs.items() for word in (f"--{name}", program)), "--mode", mode, "--size", "16"
    )
    assert done.returncode == 0, done.stdout + done.stderr
