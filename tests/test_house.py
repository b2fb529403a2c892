"""Facts that must stand in one place: causes, version, what is loaded before the daemon answers."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import virtiofsd_nydus
from virtiofsd_nydus.errors import Cause

ROOT = Path(__file__).resolve().parent.parent

# What the daemon may load before RUNNING costs start-up time (docs/architecture.md, start-up). These are the modules
# that were measured and are kept out until a thread loads them afterwards.
HEAVY = (
    "logging",
    "structlog",
    "urllib3",
    "http",
    "ssl",
    "asyncio",
    "dataclasses",
    "typing",
    "pathlib",
    "zstandard",
    "blake3",
    "hashlib",
    "lz4",
    "rich",
    "importlib.metadata",
    "inspect",
    "email",
    "tempfile",
    "subprocess",
)


def test_causes_are_those_of_the_seam() -> None:
    header = (ROOT / "csrc" / "vnd.h").read_text()
    declared = {name: int(value) for name, value in re.findall(r"VND_CAUSE_(\w+) = (\d+)", header)}
    assert declared == {cause.name: cause.value for cause in Cause}


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == virtiofsd_nydus.__version__
    assert f"## {virtiofsd_nydus.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_nothing_heavy_is_loaded_before_running() -> None:
    program = (
        "before = set(sys.modules)\n"
        "import argparse, virtiofsd_nydus.cli.main, virtiofsd_nydus.cli.virtiofs\n"
        "import virtiofsd_nydus.daemon.service, virtiofsd_nydus.storage.factory\n"
        "print(' '.join(sorted(set(sys.modules) - before)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{program}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    loaded = done.stdout.split()
    assert "virtiofsd_nydus._engine" in loaded
    assert [name for name in loaded if name in HEAVY] == []


def test_version_says_the_commit_that_the_api_says(capsys: pytest.CaptureFixture[str]) -> None:
    from virtiofsd_nydus.cli.main import main
    from virtiofsd_nydus.version import version_info

    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"virtiofsd-nydus \d", lines[0])
    assert f"Git Commit: \t{version_info()['git_commit']}" in lines
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", version_info()["git_commit"])
