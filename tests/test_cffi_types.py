"""No thread meets a cffi type that another one is just making (virtiofsd_nydus/cffi_types.py)."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEADERS = {"virtiofsd_nydus.engine": "csrc/vnd.h", "virtiofsd_nydus.fakeguest.fakeguest": "csrc/fakeguest/fakeguest.h"}

# A collection inside the first use of `what` in the main thread waits until another thread has used it too. argv: the
# module to import, what to do, which collection.
FIRST_USE = """
import gc, importlib, sys, threading
name, what, turn = sys.argv[1], compile(sys.argv[2], "what", "exec"), int(sys.argv[3])
module = importlib.import_module(name)
ffi, lib = module.ffi, module.lib
go, done = threading.Event(), threading.Event()
seen = 0
def use():
    go.wait()
    exec(what)
    done.set()
def collected(phase, info):
    global seen
    if phase == "start" and threading.current_thread() is threading.main_thread():
        seen += 1
        if seen == turn:
            go.set()
            done.wait(10)
other = threading.Thread(target=use)
other.start()
gc.collect()
gc.callbacks.append(collected)
gc.set_threshold(1)
exec(what)
gc.set_threshold(0)
go.set()
other.join()
"""


@pytest.mark.parametrize("module", HEADERS)
def test_every_struct_is_made_at_import(module: str) -> None:
    declared = re.findall(r"^\} (\w+);", (ROOT / HEADERS[module]).read_text(), re.MULTILINE)
    assert len(declared) > 3
    found = subprocess.run(
        [sys.executable, "-c", f"import {module} as m; print(*m.STRUCTS)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    structs = {name.removeprefix("struct ") for name in found.stdout.split()}
    assert {name for name in declared if not name.endswith("_fn")} <= structs


@pytest.mark.parametrize(
    "module, what",
    [
        ("virtiofsd_nydus.engine", "ffi.new('vnd_device_state *')"),
        ("virtiofsd_nydus.engine", "lib.vnd_job_next; lib.vnd_device_apply"),
        ("virtiofsd_nydus.fakeguest.fakeguest", "ffi.new('fg_load *')"),
    ],
)
def test_two_threads_may_use_a_type_first(module: str, what: str) -> None:
    """Whichever of the collections inside the first use lets the second thread in."""

    def run(turn: int) -> int:
        words = [sys.executable, "-c", FIRST_USE, module, what, str(turn)]
        return subprocess.run(words, capture_output=True, cwd=ROOT, timeout=60).returncode

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(1, 13))) == [0] * 12


def test_only_the_wrappers_import_cffi_modules() -> None:
    """So that no module uses a type before it is made."""
    users = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "virtiofsd_nydus").rglob("*.py")
        if re.search(r"^\s*(from|import) virtiofsd_nydus\._(engine|fakeguest)\b", path.read_text(), re.MULTILINE)
    }
    assert users == {"virtiofsd_nydus/engine.py", "virtiofsd_nydus/fakeguest/fakeguest.py"}
