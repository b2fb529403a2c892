"""scripts/install-packages: silent when all is there, one line when something is missing and it may not install."""

import os
import stat
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "install-packages"


def run_script(bin_directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": f"{bin_directory}:{os.environ['PATH']}"},
    )


def put_program(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def list_packages(directory: Path) -> list[str]:
    return run_script(directory, "--list").stdout.split()


def test_all_there_is_silent(tmp_path: Path) -> None:
    names = list_packages(tmp_path)
    put_program(tmp_path, "dpkg-query", "printf '%s ' " + " ".join(f"installed/{name}" for name in names))
    put_program(tmp_path, "apt-get", "echo must not run >&2; exit 1")
    done = run_script(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_missing_without_root_is_one_line_that_names_it(tmp_path: Path) -> None:
    names = [name for name in list_packages(tmp_path) if name not in ("umoci", "strace")]
    put_program(
        tmp_path, "dpkg-query", "printf '%s ' config-files/strace " + " ".join(f"installed/{name}" for name in names)
    )
    put_program(tmp_path, "id", "echo 1000")
    done = run_script(tmp_path)
    assert done.returncode == 1
    assert done.stderr == "missing packages: umoci strace: run as root, or apt-get install them\n"


def test_missing_with_root_is_installed_with_lists_fetched_only_when_needed(tmp_path: Path) -> None:
    names = [name for name in list_packages(tmp_path) if name != "umoci"]
    put_program(tmp_path, "dpkg-query", "printf '%s ' " + " ".join(f"installed/{name}" for name in names))
    put_program(tmp_path, "id", "echo 0")
    calls = tmp_path / "calls"
    put_program(
        tmp_path,
        "apt-get",
        f'echo "$*" >> {calls}; case "$*" in *umoci*) [ -e {tmp_path}/lists ];; '
        f"*update*) touch {tmp_path}/lists;; esac",
    )
    done = run_script(tmp_path)
    assert done.returncode == 0, done.stderr
    install = "install -y -q --no-install-recommends umoci"
    assert calls.read_text().splitlines() == [install, "update -q", install]


def test_a_failing_installation_gives_apts_own_reason(tmp_path: Path) -> None:
    put_program(tmp_path, "dpkg-query", "exit 1")
    put_program(tmp_path, "id", "echo 0")
    put_program(tmp_path, "apt-get", "echo 'E: Unable to locate package nowhere'; exit 100")
    done = run_script(tmp_path)
    assert done.returncode == 1
    assert done.stderr == "install-packages: apt-get failed: E: Unable to locate package nowhere\n"
