"""Kernel mounts under test. The cache must lie where pre-content events are: not on tmpfs."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.conftest import mounts_dir, start_host  # noqa: F401
from tests.kernelmount.kernel import KernelMount
from tests.peers.registry import LocalRegistry
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
from tests.system.range_proxy import RangeProxy


@pytest.fixture(autouse=True)
def need_erofs() -> None:
    if (
        "erofs" not in Path("/proc/filesystems").read_text()
        and subprocess.run(["modprobe", "erofs"], capture_output=True).returncode
    ):
        pytest.skip("this kernel has no EROFS")


@pytest.fixture
def proxy(registry: LocalRegistry) -> Iterator[RangeProxy]:  # noqa: F811
    with RangeProxy(registry.host) as server:
        yield server


@pytest.fixture
def kernel_mount(
    image: ServedImage,  # noqa: F811
    proxy: RangeProxy,
    mounts_dir: Path,  # noqa: F811
    tmp_path: Path,
) -> Iterator[KernelMount]:
    """A lazy mount with nothing in its cache, through the proxy."""
    with KernelMount(image.with_backend(host=proxy.host), mounts_dir / "k", tmp_path) as mount:
        yield mount
