"""A real guest whose worker dies and is upgraded under it (scripts/kill-worker does it as often as wanted)."""

from pathlib import Path

import pytest

from tests.keeper.conftest import Image
from tests.keeper.kills import SIGNALS, kill_workers

pytestmark = pytest.mark.guest
MONITOR_S = 5.0  # on a busy machine; scripts/kill-worker tells what an idle one needs


def test_worker_dies_under_a_real_guest(image: Image, tmp_path: Path) -> None:
    found = kill_workers(image, tmp_path, len(SIGNALS), list(SIGNALS), seed="1")
    assert found.wrong == []
    assert found.deaths == len(SIGNALS) and found.hashes > 0 and found.writes > 0
    assert max(found.monitor) < MONITOR_S
