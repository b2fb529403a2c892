"""Another program's garbage collection takes cache files away under running daemons: no read goes wrong, and what is
gone is fetched again."""

from pathlib import Path

import pytest

from tests.peers.registry import LocalRegistry
from tests.system.conftest import Converter, run_verb
from tests.system.daemon import Daemon
from tests.system.guest_tree import Record
from tests.system.image import SMALL_CHUNK_BYTES
from tests.system.range_proxy import RangeProxy
from tests.system.test_integrity import outcome, read_all

RIGHT: tuple[set[str], set[str]] = (set(), set())
ENDINGS = {
    "data": (".blob.data",),
    "map": (".chunk_map",),
    "meta": (".blob.meta",),
    "all": (".blob.data", ".chunk_map", ".blob.meta"),
}


def remove(cache: Path, what: str) -> int:
    """The snapshotter's way: names are unlinked while daemons have the files open."""
    gone = [one for one in cache.iterdir() if one.name.endswith(ENDINGS[what])]
    for one in gone:
        one.unlink()
    return len(gone)


@pytest.mark.parametrize("what", list(ENDINGS))
def test_removed_under_a_running_daemon(
    converter: Converter, registry: LocalRegistry, expected_tree: list[Record], tmp_path: Path, what: str
) -> None:
    """Half of the image is read before, the whole after; by this daemon, by one that starts then, and by both again."""
    image = converter.convert(batch_bytes=SMALL_CHUNK_BYTES)  # such an image has a blob.meta
    half = [record for record in expected_tree if record["kind"] == "file"][::2]
    cache = tmp_path / "cache"
    with Daemon(image, cache) as first:
        assert outcome(expected_tree, read_all(first, half)) == RIGHT
        assert remove(cache, what) > 0
        assert outcome(expected_tree, read_all(first, expected_tree)) == RIGHT
        with Daemon(image, cache) as second:
            assert outcome(expected_tree, read_all(second, expected_tree)) == RIGHT
            assert outcome(expected_tree, read_all(first, expected_tree)) == RIGHT
            assert all(daemon.counters()["fuse_errors"] == 0 for daemon in (first, second))
    run_verb("cache", "verify", str(cache))
    with RangeProxy(registry.host) as proxy:
        with Daemon(image.with_backend(host=proxy.host), cache) as third:
            assert outcome(expected_tree, read_all(third, expected_tree)) == RIGHT
        assert proxy.sent_bytes() == 0, "the cache is whole again"
