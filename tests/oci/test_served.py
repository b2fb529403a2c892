"""From the registry to a guest: what convert pushed is served by our daemon to the fake guest, cold and warm, by two
daemons at once, and while the registry fails in each way."""

import errno
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.oci.conftest import BIG, SMALL
from tests.peers.faulty_server import FaultyServer
from tests.peers.registry import LocalRegistry
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.vmm.image import WantedImage, prepare_image
from virtiofsd_nydus.vmm.servers import NydusDaemon

pytestmark = pytest.mark.peer

FILES = {
    "etc/hosts": b"hosts\n",
    "etc/two": b"two\n",
    "again": BIG[: 2 << 20],
    "big": BIG,
    "copy": BIG,
    **{f"small{index}": data for index, data in enumerate(SMALL)},
}


@contextmanager
def serving(
    reference: str, cache_dir: Path, flags: Sequence[str] = (), **options: object
) -> Iterator[tuple[NydusDaemon, FakeGuest]]:
    with (
        prepare_image(WantedImage(reference, cache_dir=cache_dir, **options)) as prepared,
        NydusDaemon([*prepared.daemon_options, *flags]) as daemon,
        FakeGuest(daemon.socket_path, queue_size=64) as guest,
    ):
        guest.fuse.init()
        yield daemon, guest


def read_everything(guest: FakeGuest) -> None:
    for name, data in FILES.items():
        assert guest.fuse.read_file(name) == data, name


def wait_for_log(daemon: NydusDaemon, word: str) -> None:
    deadline = time.monotonic() + 10
    while word not in daemon.log_text().lower():
        assert time.monotonic() < deadline, daemon.log_text()[-2000:]
        time.sleep(0.02)


@pytest.mark.parametrize("compressor", ["zstd", "lz4_block", "none"])
@pytest.mark.parametrize("place", ["registry", "layout"])
def test_every_file(convert, image: Path, registry: LocalRegistry, tmp_path: Path, compressor: str, place: str) -> None:
    reference = f"oci:{tmp_path / 'out'}:n" if place == "layout" else f"docker://{registry.host}/served/{compressor}:n"
    convert(f"oci:{image}:t", reference, "--compressor", compressor)
    with serving(reference, tmp_path / "cache") as (_, guest):
        read_everything(guest)
        assert sorted(
            entry.name for entry in guest.fuse.readdir(guest.fuse.walk("etc").nodeid) if entry.name not in (b".", b"..")
        ) == [b"hosts", b"two"]


@pytest.fixture
def reference(convert, image: Path, registry: LocalRegistry) -> str:
    reference = f"docker://{registry.host}/served/a:n"
    convert(f"oci:{image}:t", reference)
    registry.clear_log()
    return reference


def test_what_is_cached_is_not_fetched(reference: str, registry: LocalRegistry, tmp_path: Path) -> None:
    with serving(reference, tmp_path / "cache") as (_, guest):
        read_everything(guest)
        once = registry.blob_bytes()
        read_everything(guest)
        assert registry.blob_bytes() == once
    registry.clear_log()
    with serving(reference, tmp_path / "cache") as (_, guest):
        read_everything(guest)
    # the configuration of the image is a blob too
    assert registry.blob_bytes() < 2000


def test_two_daemons_at_once_fetch_each_chunk_once(
    convert, image: Path, reference: str, registry: LocalRegistry, tmp_path: Path
) -> None:
    blob_bytes = convert(f"oci:{image}:t", reference)["target_bytes"]
    registry.clear_log()
    failed: list[BaseException] = []
    with serving(reference, tmp_path / "cache") as (_, one), serving(reference, tmp_path / "cache") as (_, two):
        before = registry.blob_bytes()

        def run(guest: FakeGuest) -> None:
            try:
                read_everything(guest)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=run, args=(guest,)) for guest in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failed
    # Chunks once; what describes them (some KiB a blob) perhaps by both
    assert registry.blob_bytes() - before <= blob_bytes + 100_000


def test_a_registry_that_dies_and_comes_back(convert, image: Path, tmp_path: Path) -> None:
    with LocalRegistry(tmp_path / "registry") as registry:
        reference = f"docker://{registry.host}/served/b:n"
        convert(f"oci:{image}:t", reference)
        with serving(reference, tmp_path / "cache", ["--read-deadline-ms", "3000"]) as (daemon, guest):
            assert guest.fuse.read_file("etc/two") == FILES["etc/two"]
            big = guest.fuse.walk("big").nodeid
            registry.stop(signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(OSError) as caught:
                guest.fuse.read(big, 2 << 20, 4096)
            assert caught.value.errno == errno.EIO
            assert time.monotonic() - began < 20
            wait_for_log(daemon, "network")
            assert registry.host in daemon.log_text()
            assert guest.fuse.read_file("etc/two") == FILES["etc/two"]
            registry.start()
            read_everything(guest)


def test_a_login_that_is_refused_later(convert, image: Path, tmp_path: Path) -> None:
    with LocalRegistry(tmp_path / "registry", auth="token") as registry:
        reference, creds = f"docker://{registry.host}/served/c:n", f"{registry.username}:{registry.password}"
        convert(f"oci:{image}:t", reference, "--creds", creds)
        with prepare_image(WantedImage(reference, cache_dir=tmp_path / "cache", creds=creds)) as prepared:
            assert registry.token_server is not None
            registry.token_server.users.clear()
            with NydusDaemon(prepared.daemon_options) as daemon, FakeGuest(daemon.socket_path) as guest:
                guest.fuse.init()
                with pytest.raises(OSError) as caught:
                    guest.fuse.read_file("etc/two")
                assert caught.value.errno == errno.EIO
                wait_for_log(daemon, "auth")
                assert registry.username in daemon.log_text() and registry.password not in daemon.log_text()


@pytest.mark.parametrize("compressor", ["zstd", "lz4_block", "none"])
def test_a_flipped_byte_never_arrives(
    convert, image: Path, registry: LocalRegistry, tmp_path: Path, compressor: str
) -> None:
    reference = f"docker://{registry.host}/served/flip-{compressor}:n"
    convert(f"oci:{image}:t", reference, "--compressor", compressor)
    with FaultyServer(upstream=registry.host) as front:
        through = reference.replace(registry.host, front.host)
        with serving(through, tmp_path / "cache") as (daemon, guest):
            assert guest.fuse.read_file("etc/hosts") == FILES["etc/hosts"]
            big = guest.fuse.walk("big")
            front.inject("corrupt", at_bytes=1000, match="GET /v2/served", times=-1)
            with pytest.raises(OSError) as caught:
                guest.fuse.read(big.nodeid, 2 << 20, 4096)
            assert caught.value.errno == errno.EIO
            wait_for_log(daemon, "digest")
            front.heal()
            read_everything(guest)
