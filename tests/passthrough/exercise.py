"""The exerciser (tests/exercise): built here, run on two file systems, its logs compared line by line."""

import itertools
import os
import shlex
import subprocess
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "exercise"
# Of the host and of the guest that must agree: who may open and link what in a sticky directory
SHOWN = 8
PROTECTIONS = ("protected_fifos", "protected_hardlinks", "protected_regular", "protected_symlinks")


def build(output: Path) -> Path:
    """A static program: it runs in the guest's initramfs too."""
    program = output / "exercise"
    subprocess.run(
        [
            *shlex.split(os.environ.get("CC", "cc")),
            "-std=c11",
            "-D_GNU_SOURCE",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Wshadow",
            "-Werror",
            "-Wno-unused-parameter",
            "-Wno-unused-result",
            "-static",
            "-o",
            str(program),
            *map(str, sorted(SOURCES.glob("*.c"))),
        ],
        check=True,
    )
    return program


def arguments(directory: Path | str, seed: int, steps: tuple[int, int, int]) -> list[str]:
    return [str(directory), str(seed), *map(str, steps)]


def compare(expected: str, got: str) -> None:
    """Fails with the first lines that differ, and the calls that led to them."""
    call, wrong = "", []
    for number, (a, b) in enumerate(itertools.zip_longest(expected.splitlines(), got.splitlines()), 1):
        if a and not a.startswith(" "):
            call = a
        if a != b:
            wrong.append(f"line {number}, after {call!r}:\n  host {a!r}\n  ours {b!r}")
            if len(wrong) == SHOWN:
                break
    assert not wrong, "\n".join(wrong)
    assert expected.endswith("end\n"), "the exerciser did not come to its end"
