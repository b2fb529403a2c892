"""Every fault on every way to a blob ends in right bytes or a clear error, in time, and poisons no cache."""

from pathlib import Path

from tests.storage.fault_matrix import CASES, HTTP_ROUTES, LOCAL_CASES, LOCAL_ROUTES, MODES, format_matrix, run_matrix


def test_fault_matrix(tmp_path: Path) -> None:
    outcomes = run_matrix(tmp_path / "image")
    assert len(outcomes) == len(CASES) * len(HTTP_ROUTES) * len(MODES) + len(LOCAL_CASES) * len(LOCAL_ROUTES) * 2
    assert [one for one in outcomes if not one.right] == [], "\n" + format_matrix(outcomes)
