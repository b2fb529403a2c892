"""Nydus's own tools as peers, in both directions: they take our images, and we serve theirs.

Runs where NYDUS_IMAGE and NYDUSD name the real nydus-image and nydusd.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.conftest import CODECS, DIGESTERS, Converter
from tests.system.daemon import Daemon, ServedImage, wait_until
from tests.system.guest_tree import Record, differences, list_tree
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.fuse_client import OUT_HEADER, FuseClient
from virtiofsd_nydus.oci.image import open_store
from virtiofsd_nydus.oci.manifest import Descriptor
from virtiofsd_nydus.oci.reference import parse_reference
from virtiofsd_nydus.oci.store import Access

NYDUS_IMAGE, NYDUSD = os.environ.get("NYDUS_IMAGE", ""), os.environ.get("NYDUSD", "")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        not (shutil.which(NYDUS_IMAGE) and shutil.which(NYDUSD)),
        reason="NYDUS_IMAGE and NYDUSD do not name nydus-image and nydusd",
    ),
]
FILES = {"one": b"1", "block": b"b" * 4096, "odd": bytes(range(256)) * 700, "empty": b""}
VARIANTS = [(codec, digester) for codec in CODECS for digester in DIGESTERS]


def run_tool(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class OutLenChannel:
    """Requests to a server that says used.len = 0, as nydusd does: how long a reply is, its own header tells. One
    chain at a time, in the guest's scratch memory."""

    REPLY_AT = 0x10000

    def __init__(self, guest: FakeGuest) -> None:
        self.guest, self.queue = guest, guest.queues[1]

    def call(self, request: bytes, out_fixed: int, data_bytes: int) -> bytes:
        memory, at = self.guest.memory, self.guest.scratch_gpa
        room = OUT_HEADER.size + out_fixed + data_bytes
        memory.write(at, request)
        memory.write(at + self.REPLY_AT, bytes(OUT_HEADER.size))
        self.queue.add([(at, len(request), False), (at + self.REPLY_AT, room, True)])
        self.queue.publish()
        self.queue.pop()
        length = OUT_HEADER.unpack(memory.read(at + self.REPLY_AT, OUT_HEADER.size))[0]
        assert OUT_HEADER.size <= length <= room
        return memory.read(at + self.REPLY_AT, length)


def list_nydusds_tree(sock: Path) -> list[Record]:
    with FakeGuest(sock) as guest:
        fuse = FuseClient(OutLenChannel(guest))
        fuse.init()
        return list(list_tree(fuse, types=False))


def without_root_mtime(tree: list[Record]) -> list[Record]:
    """nydus-image gives the root of a directory the time 0."""
    return [{**record, "mtime_ns": 0} if record["path"] == "." else record for record in tree]


@pytest.mark.parametrize(("codec", "digester"), VARIANTS)
def test_nydus_image_finds_no_fault_in_ours(converter: Converter, tmp_path: Path, codec: str, digester: str) -> None:
    image = converter.convert(codec, digester)
    report = tmp_path / "report.json"
    run_tool(NYDUS_IMAGE, "check", "--bootstrap", image.bootstrap, "--verbose", "--output-json", report)
    assert set(json.loads(report.read_text())["blobs"]) == set(image.blobs)


@pytest.mark.parametrize(("codec", "digester"), VARIANTS)
def test_we_serve_what_nydus_image_built(
    unpacked: Path, expected_tree: list[Record], tmp_path: Path, codec: str, digester: str
) -> None:
    image = create_image(unpacked, tmp_path, codec, digester)
    with Daemon(image, tmp_path / "cache") as daemon, FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        seen = list(list_tree(guest.fuse))
        assert daemon.counters()["digest_failures"] == 0
    assert differences(without_root_mtime(expected_tree), without_root_mtime(seen)) == []


def create_image(source: Path, directory: Path, codec: str, digester: str, *more: str) -> ServedImage:
    blobs, bootstrap = directory / "blobs", directory / "image.boot"
    blobs.mkdir()
    run_tool(
        NYDUS_IMAGE,
        "create",
        "--type",
        "directory",
        "--fs-version",
        "6",
        "--compressor",
        codec,
        "--digester",
        digester,
        "--chunk-size",
        "0x10000",
        "--whiteout-spec",
        "none",
        *more,
        "--bootstrap",
        bootstrap,
        "--blob-dir",
        blobs,
        source,
    )
    return ServedImage(bootstrap, "localfs", {"dir": str(blobs)}, {p.name: p.stat().st_size for p in blobs.iterdir()})


@pytest.mark.parametrize("codec", ["lz4_block", "zstd"])
def test_we_serve_batches_that_nydus_image_built(
    unpacked: Path, expected_tree: list[Record], tmp_path: Path, codec: str
) -> None:
    image = create_image(unpacked, tmp_path, codec, "sha256", "--batch-size", "0x10000")
    with Daemon(image, tmp_path / "cache") as daemon, FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        seen = list(list_tree(guest.fuse))
    assert differences(without_root_mtime(expected_tree), without_root_mtime(seen)) == []


def test_we_serve_a_tar_as_it_is(converter: Converter, tmp_path: Path) -> None:
    """tarfs: the blob is the tar in the registry, and nothing vouches for its bytes but the operator's word."""
    tar, bootstrap, blobs = tmp_path / "layer.tar", tmp_path / "image.boot", tmp_path / "blobs"
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    blob_id = hashlib.sha256(tar.read_bytes()).hexdigest()
    blobs.mkdir()
    run_tool(
        NYDUS_IMAGE,
        "create",
        "--type",
        "tar-tarfs",
        "--blob-id",
        blob_id,
        "--bootstrap",
        bootstrap,
        "--blob-dir",
        blobs,
        tar,
    )
    store = open_store(parse_reference(f"docker://{converter.registry.host}/tarfs/a:1"), Access(plain_http=True))
    store.put_blob(Descriptor("application/octet-stream", f"sha256:{blob_id}", tar.stat().st_size), tar)
    store.close()
    image = ServedImage(
        bootstrap,
        "registry",
        {"scheme": "http", "host": converter.registry.host, "repo": "tarfs/a"},
        {blob_id: tar.stat().st_size},
    )
    with (
        Daemon(image, tmp_path / "cache", extra=("--allow-unverified",)) as daemon,
        FakeGuest(daemon.socket_path) as guest,
    ):
        guest.fuse.init()
        assert {name: guest.fuse.read_file(name) for name in FILES} == FILES
        assert daemon.counters()["fetched_chunks"] > 0
    with pytest.raises(Failure, match=r"no chunk digests.*--allow-unverified"), Daemon(image, tmp_path / "cache-2"):
        pass


@contextmanager
def nydusd(image: ServedImage, directory: Path) -> Iterator[Path]:
    """The real daemon on it; its vhost-user socket."""
    work_dir = directory / "nydusd-cache"
    work_dir.mkdir(exist_ok=True)
    config, sock, log = directory / "nydusd.json", directory / "nydusd.sock", directory / "nydusd.log"
    config.write_text(
        json.dumps(
            {
                "device": {
                    "backend": {"type": image.backend_type, "config": image.backend_config},
                    "cache": {"type": "blobcache", "config": {"work_dir": str(work_dir)}},
                },
                "mode": "direct",
                "digest_validate": False,
                "enable_xattr": True,
            }
        )
    )
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                NYDUSD,
                "virtiofs",
                "--bootstrap",
                str(image.bootstrap),
                "--config",
                str(config),
                "--sock",
                str(sock),
                "--rlimit-nofile",
                "0",
                "--log-level",
                "error",
            ],
            stdout=out,
            stderr=out,
        )
    try:
        wait_until(lambda: sock.exists() or process.poll() is not None, "nydusd's start")
        assert process.poll() is None, log.read_text()
        yield sock
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("codec", CODECS)
def test_nydusd_serves_ours(converter: Converter, expected_tree: list[Record], tmp_path: Path, codec: str) -> None:
    image = converter.convert(codec)
    with nydusd(image, tmp_path) as sock:
        assert differences(expected_tree, list_nydusds_tree(sock)) == []


def test_what_nydusd_cached_is_used_once_verified(
    converter: Converter, expected_tree: list[Record], tmp_path: Path
) -> None:
    """Its cache directory becomes ours: its bits are hints, the bytes are verified in place, nothing is fetched."""
    image = converter.convert("zstd")
    with nydusd(image, tmp_path) as sock:
        list_nydusds_tree(sock)
    cache = tmp_path / "nydusd-cache"
    assert sorted(path.name for path in cache.glob("*.chunk_map"))
    with Daemon(image.with_backend(host="127.0.0.1:9"), cache) as daemon, FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        assert differences(expected_tree, list(list_tree(guest.fuse))) == []
        counters = daemon.counters()
    assert counters["verified_chunks"] > 100 and counters["fetched_chunks"] == 0
    before = {path: path.read_bytes()[4096:] for path in cache.glob("*.chunk_map")}
    with nydusd(image, tmp_path) as sock:
        assert differences(expected_tree, list_nydusds_tree(sock)) == []
    assert all(path.read_bytes()[4096:] == bits for path, bits in before.items())


def test_nydusd_uses_what_we_cached(converter: Converter, expected_tree: list[Record], tmp_path: Path) -> None:
    image = converter.convert("lz4_block")
    cache = tmp_path / "nydusd-cache"
    with Daemon(image, cache) as daemon, FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        list(list_tree(guest.fuse))
    converter.registry.clear_log()
    with nydusd(image, tmp_path) as sock:
        assert differences(expected_tree, list_nydusds_tree(sock)) == []
    # it reads the chunk table at each start
    assert converter.registry.blob_bytes() < sum(image.blobs.values()) / 4
