"""A few of each crash; scripts/prove-crashes makes as many as one likes."""

from pathlib import Path

import pytest

from tests.proofs import kills, power_cut
from tests.proofs.sample import Sample, make_sample

KILLS = 12
CUTS = 6


@pytest.fixture(scope="module")
def sample_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sample")
    make_sample(directory)
    return directory


@pytest.fixture
def loops() -> None:
    reason = power_cut.can_mount()
    if reason:
        pytest.skip(reason)


def load(sample_dir: Path) -> Sample:
    from tests.proofs.sample import load_sample

    return load_sample(sample_dir)


def test_killed_at_random(sample_dir: Path, tmp_path: Path) -> None:
    found = kills.kill_daemons(load(sample_dir), tmp_path, KILLS, "a seed")
    assert found.wrong == []
    assert found.files > 0 and found.under_load >= KILLS / 2


def test_power_cut_at_random(sample_dir: Path, tmp_path: Path, loops: None) -> None:
    """No wrong byte; and some of what was there was trusted, or nothing would be shown."""
    found = power_cut.cut_power(sample_dir, tmp_path, CUTS, "a seed")
    assert (found.cuts, found.wrong) == (CUTS, 0), found.lines
    assert found.trusted > 0 and found.fetched > 0


def test_the_power_cut_notices_a_missing_sync(sample_dir: Path, tmp_path: Path, loops: None) -> None:
    found = power_cut.cut_power(sample_dir, tmp_path, CUTS, "a seed", sync=False)
    assert found.wrong > 0
