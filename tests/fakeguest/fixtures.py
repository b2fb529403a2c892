"""The fixtures of the socket tests; conftest.py of each directory imports them."""

from collections.abc import Iterator

import pytest

from tests.fakeguest.support import DaemonKeeper, Image, assert_alive, build_image, make_tree
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.vmm.servers import NydusDaemon


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """A small image of files whose bytes the fake guest can check."""
    base = tmp_path_factory.mktemp("image")
    tree = base / "tree"
    tree.mkdir()
    make_tree(tree)
    return build_image(tree, base / "out")


@pytest.fixture(scope="session")
def daemon_keeper(image: Image) -> Iterator[DaemonKeeper]:
    keeper = DaemonKeeper(image)
    yield keeper
    keeper.close()


@pytest.fixture
def daemon(daemon_keeper: DaemonKeeper) -> Iterator[NydusDaemon]:
    """Our daemon on the image, shared by the tests; it must live when a test ends."""
    running = daemon_keeper.get()
    yield running
    assert_alive(running)


@pytest.fixture
def guest(daemon: NydusDaemon) -> Iterator[FakeGuest]:
    """A guest that has mounted."""
    with FakeGuest(daemon.socket_path, queue_size=64) as started:
        started.fuse.init()
        yield started
