"""The list of faults made on purpose fits the sources; scripts/mutate itself is run by hand and nightly."""

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mutate() -> ModuleType:
    loader = SourceFileLoader("mutate", str(ROOT / "scripts" / "mutate"))
    spec = importlib.util.spec_from_loader("mutate", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module
    loader.exec_module(module)
    return module


def test_every_edit_fits_its_file(mutate: ModuleType) -> None:
    mutations = mutate.read_list()
    assert mutate.find_faults(mutations, ROOT) == []
    assert len(mutations) >= 60


def test_what_does_not_fit_is_told(mutate: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    (tmp_path / "test_a.py").write_text("")
    wrong = [
        mutate.Mutation("twice", "a.py", "x = 1", "x = 2", ("test_a.py",)),
        mutate.Mutation("gone", "b.py", "x", "y", ("test_a.py::test_b",)),
        mutate.Mutation("gone", "a.py", "x = 1\nx", "y", ()),
        mutate.Mutation("no-test", "a.py", "1\nx", "2\nx", ("c:store/test_none",)),
    ]
    assert mutate.find_faults(wrong, tmp_path) == [
        "twice: the old text is in a.py 2 times, not once",
        "gone: the file is gone",
        "gone: there are two of this name",
        "gone: it changes nothing or names no test",
        "no-test: there is no test c:store/test_none",
    ]
