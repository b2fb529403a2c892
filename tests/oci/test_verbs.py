"""Every verb that uses an image takes a reference, of a Nydus image and of a plain one alike."""

import json
import tarfile
from pathlib import Path

import pytest

from tests.oci.conftest import BIG, skopeo
from tests.oci.test_served import FILES, read_everything
from tests.peers.memory_registry import MemoryRegistry
from virtiofsd_nydus.cli.main import main
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.vmm.servers import NydusDaemon, call_api


@pytest.fixture(params=["nydus", "plain"])
def reference(request: pytest.FixtureRequest, convert, image: Path, tmp_path: Path) -> str:
    if request.param == "plain":
        return f"oci:{image}:t"
    convert(f"oci:{image}:t", f"oci:{tmp_path / 'out'}:n")
    return f"oci:{tmp_path / 'out'}:n"


def test_check_inspect_unpack_cache(reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ["--cache-dir", str(tmp_path / "cache")]
    assert main(["check", reference, *cache, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bootstrap"] == reference and report["bytes"] >= len(BIG) and report["faults"] == []
    assert main(["inspect", reference, *cache, "--file", "/etc/two", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size_bytes"] == 4
    assert main(["unpack", reference, *cache, "--output", str(tmp_path / "all.tar")]) == 0
    with tarfile.open(tmp_path / "all.tar") as tar:
        found = {member.name.removeprefix("./"): member for member in tar}
        assert {name for name in FILES} <= set(found) and "etc/gone" not in found
        stream = tar.extractfile(found["copy"])
        assert stream is not None and stream.read() == BIG
    capsys.readouterr()
    assert main(["bootstrap", "get", reference, str(tmp_path / "image.boot"), *cache]) == 0
    assert main(["inspect", str(tmp_path / "image.boot")]) == 0
    capsys.readouterr()
    assert main(["cache", "ls", reference, *cache, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed) == (2 if "layers" in str(list((tmp_path / "cache").iterdir())) else 0)


def test_the_daemon_takes_a_reference(reference: str, tmp_path: Path) -> None:
    options = ["--bootstrap", reference, "--cache-dir", str(tmp_path / "cache")]
    with NydusDaemon(options) as daemon, FakeGuest(daemon.socket_path, queue_size=64) as guest:
        guest.fuse.init()
        read_everything(guest)


def test_the_api_mounts_a_reference(reference: str, tmp_path: Path) -> None:
    config = {
        "device": {"cache": {"type": "blobcache", "config": {"work_dir": str(tmp_path / "cache")}}}, "mode": "direct"
    }  # fmt: skip
    mount = "/api/v1/mount?mountpoint="
    with NydusDaemon([]) as daemon, FakeGuest(daemon.socket_path, queue_size=64) as guest:
        guest.fuse.init()
        body = {"source": reference, "fs_type": "rafs", "config": json.dumps(config)}
        assert call_api(daemon.api_path, "POST", f"{mount}/image", body) == (204, None)
        assert guest.fuse.read_file("image/etc/two") == b"two\n"
        assert guest.fuse.read_file("image/big") == BIG
        body["source"] = "oci:/nowhere:t"
        status, answer = call_api(daemon.api_path, "POST", f"{mount}/other", body)
        assert status == 500 and "no OCI layout" in answer["message"]


def test_an_index_saves_other_nodes_the_layers(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MemoryRegistry() as memory:
        reference = f"docker://{memory.host}/x:t"
        skopeo("copy", "-q", "--dest-tls-verify=false", f"oci:{image}:t", reference)
        digest = memory.tags["t"]
        layers = [one["digest"] for one in json.loads(memory.manifests[digest][1])["layers"]]
        assert main(["index", "push", reference, "--cache-dir", str(tmp_path / "one"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["index"] in memory.manifests and memory.tags["t"] == digest
        memory.seen.clear()
        assert main(["index", "pull", reference, "--cache-dir", str(tmp_path / "two"), "--json"]) == 0
        assert not any(memory.gets(layer) for layer in layers)
        options = ["--bootstrap", reference, "--cache-dir", str(tmp_path / "two")]
        with NydusDaemon(options) as daemon, FakeGuest(daemon.socket_path, queue_size=64) as guest:
            guest.fuse.init()
            read_everything(guest)
        # a reference that is pinned promises content; an index without a signature does not
        memory.seen.clear()
        pinned = f"docker://{memory.host}/x@{digest}"
        assert main(["index", "pull", pinned, "--cache-dir", str(tmp_path / "three")]) == 0
        assert "is not used" in capsys.readouterr().err
        assert all(memory.gets(layer) for layer in layers)
