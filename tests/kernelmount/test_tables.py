"""One blob id, two tables: a kernel mount reads the files that hold its own image's bytes."""

import os
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest

from tests.kernelmount.kernel import KernelMount
from tests.proofs.beside import make_borrowed, read_mounted
from tests.system.daemon import ServedImage


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
@pytest.mark.parametrize("options", [("--fetch-all",), ()])
def test_each_mount_has_its_own_images_bytes(mounts_dir: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    mounts = []
    with ExitStack() as stack:
        for number, (boot, blobs, files) in enumerate(make_borrowed(tmp_path / "images", Random("tables"))):
            directory = tmp_path / f"blobs-{number}"
            directory.mkdir()
            for name, raw in blobs.items():
                (directory / name).write_bytes(raw)
            served = ServedImage(boot, "localfs", {"dir": str(directory)}, {})
            mount = stack.enter_context(KernelMount(served, mounts_dir / str(number), tmp_path, *options))
            mounts.append((mount, files))
            for one, wanted in (*mounts, mounts[0]):
                assert [name for name in wanted if read_mounted(one.target, name) != wanted[name]] == []
