"""A few of the kills that scripts/kill-beside makes by the thousand: our daemons, a nydusd, a kernel mount."""

import os
import shutil
from pathlib import Path

import pytest

from tests.kernelmount.conftest import need_erofs  # noqa: F401 - a fixture of every test here
from tests.proofs import beside

NYDUSD = os.environ.get("NYDUSD", "")
KILLS = 8


@pytest.mark.peer
@pytest.mark.skipif(not shutil.which(NYDUSD) or os.geteuid() != 0, reason="NYDUSD names no nydusd, or not root")
def test_no_wrong_byte_beside_others(tmp_path: Path) -> None:
    found = beside.run(tmp_path, KILLS, "a seed", NYDUSD)
    assert found.wrong == []
    assert found.kill_count >= KILLS and {"daemon", "nydusd", "kernel mount"} <= set(found.files)
