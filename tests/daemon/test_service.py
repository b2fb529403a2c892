"""The daemon's stop has a deadline: what waits for storage must not hold it up."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUCK = """
import threading
from virtiofsd_nydus.daemon.service import StopWatch
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.log import Log
log = Log()
log.activate()
watch = StopWatch(log, 0.05, {failure})
with watch.step("what never comes"):
    threading.Event().wait()
"""


@pytest.mark.parametrize(
    "failure, status, line", [("None", 0, ""), ("Failure('no such image')", 1, "virtiofsd-nydus: no such image\n")]
)
def test_a_step_that_never_ends_ends_with_the_process(failure: str, status: int, line: str) -> None:
    """A failed start is told all the same."""
    words = [sys.executable, "-c", STUCK.format(failure=failure)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == status
    assert done.stderr.startswith(line) and "stopped without waiting for what never comes" in done.stderr
