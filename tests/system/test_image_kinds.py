"""Every kind of image of ours through the daemon and a guest's FUSE: trees and bytes, as `check` reads them."""

import hashlib
import stat
from pathlib import Path

import pytest

from tests.hostile.images import build, write_source
from tests.system.conftest import Converter, resolve, run_verb
from tests.system.daemon import Daemon, ServedImage
from tests.system.guest_tree import Record, differences, list_tree
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.reader.data import opened_with_data

KINDS: dict[str, dict[str, object]] = {
    "v5": {"fs_version": 5}, "v5-aligned": {"fs_version": 5, "aligned_chunk": True, "compressor": "none"},
    "encrypted": {"encrypt": True}, "encrypted-batches": {"encrypt": True, "batch_size": 0x10000},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_served_as_read(kind: str, tmp_path: Path) -> None:
    write_source(tmp_path / "source.tar")
    boot = build(tmp_path / "source.tar", tmp_path / "image", **KINDS[kind])
    blobs = boot.parent / "blobs"
    image = ServedImage(boot, "localfs", {"dir": str(blobs)}, {p.name: p.stat().st_size for p in blobs.iterdir()})
    with Daemon(image, tmp_path / "cache") as daemon, FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        seen = {record["path"]: record for record in list_tree(guest.fuse)}
        assert daemon.counters()["digest_failures"] == 0
    with opened_with_data(boot, blobs) as read:
        walked = {entry.path.lstrip("/") or ".": entry.attr for entry in read.walk()}
        assert seen.keys() == walked.keys()
        for path, attr in walked.items():
            assert (seen[path]["mode"], seen[path]["mtime_ns"]) == (stat.S_IMODE(attr.mode), attr.mtime_ns), path
            if stat.S_ISREG(attr.mode):
                assert seen[path]["sha256"] == hashlib.sha256(read.read(attr.ino)).hexdigest(), path
        assert seen["xattr"]["xattrs"] == {"user.mark": b"value".hex()}


@pytest.mark.parametrize(
    "way", ["--oci-ref", "--encrypt", "--encrypt --batch-size 64K", "--batch-size 64K", "--fs-version 5"]
)
def test_converted_and_served_from_a_registry(
    converter: Converter, expected_tree: list[Record], tmp_path: Path, way: str
) -> None:
    """What umoci unpacks is what the guest sees, cold and then from the cache; of a referred image the registry holds
    the OCI layers and no data beside them."""
    name = f"kinds{way.replace(' ', '').replace('--', '-').lower()}"
    reference = f"docker://{converter.registry.host}/{name}:v1"
    run_verb("convert", f"oci:{converter.oci_image}", reference, "--chunk-size", "64K", *way.split())
    image = resolve(reference, tmp_path / "bootstraps")
    for cold in (True, False):
        with Daemon(image, tmp_path / "cache") as daemon, FakeGuest(daemon.socket_path) as guest:
            guest.fuse.init()
            assert differences(expected_tree, list(list_tree(guest.fuse))) == []
            counters = daemon.counters()
        assert counters["digest_failures"] == counters["fuse_errors"] == 0
        assert (counters["fetched_chunks"] > 0) == cold
