"""Host mounts under test: whatever a test mounted is gone when it ends, also when it fails."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fuse.host import HostDaemon, has_fuse, umount_below
from tests.system.conftest import (  # noqa: F401
    Converter,
    converter,
    expected_tree,
    image,
    oci_image,
    registry,
    unpacked,
)
from tests.system.daemon import ServedImage

StartHost = Callable[..., HostDaemon]


@pytest.fixture(autouse=True)
def need_fuse() -> None:
    reason = has_fuse()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def mounts_dir(tmp_path: Path) -> Iterator[Path]:
    """A directory for mountpoints; all below is unmounted at the end."""
    directory = tmp_path / "mounts"
    directory.mkdir()
    yield directory
    umount_below(directory)


@pytest.fixture
def start_host(mounts_dir: Path, tmp_path: Path, image: ServedImage) -> Iterator[StartHost]:  # noqa: F811
    """Starts `fuse` daemons; they end with the test."""
    with ExitStack() as stack:

        def start(name: str = "m", served: ServedImage | None = None, **options: object) -> HostDaemon:
            options.setdefault("cache", tmp_path / "cache")
            daemon = HostDaemon(served or image, mounts_dir / name, tmp_path / f"run-{name}", **options)  # type: ignore[arg-type]
            return stack.enter_context(daemon)

        yield start
