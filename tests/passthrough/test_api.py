"""Mounts over the API while a guest runs: images at any path beside the passthrough, statuses and words as nydusd's."""

import errno
import http.client
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakeguest.support import assert_alive, build_image
from virtiofsd_nydus.fakeguest import fuse_client as fc
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.fuse_client import ROOT
from virtiofsd_nydus.vmm.servers import NydusDaemon, UnixConnection

OTHER = "Mount(MountFilesystem(Other({})))"


class Api:
    """A daemon without an image, and calls to it."""

    def __init__(self, daemon: NydusDaemon) -> None:
        self.daemon = daemon

    def call(self, method: str, target: str, body: object = None) -> tuple[int, Any]:
        connection = UnixConnection(self.daemon.api_path, 30)
        connection.request(method, target, body if isinstance(body, str) or body is None else json.dumps(body))
        answer = connection.getresponse()
        raw = answer.read()
        connection.close()
        assert answer.headers["Server"] == "Nydus API"
        return answer.status, json.loads(raw) if raw else None

    def mount(self, path: str, kind: str, source: Path, config: str = "", method: str = "POST") -> tuple[int, Any]:
        return self.call(
            method, f"/api/v1/mount?mountpoint={path}", {"fs_type": kind, "source": str(source), "config": config}
        )

    def umount(self, path: str) -> tuple[int, Any]:
        return self.call("DELETE", f"/api/v1/mount?mountpoint={path}")


def connect_api(daemon: NydusDaemon) -> Api:
    api = Api(daemon)
    while True:  # the API socket is there once the daemon runs; the process's end ends this, too
        try:
            api.call("GET", "/api/v1/daemon")
            return api
        except OSError:
            daemon.check_alive()


@pytest.fixture
def api() -> Iterator[Api]:
    with NydusDaemon([], die_with_parent=True) as running:
        yield connect_api(running)
        assert_alive(running)


def make_image(base: Path, name: str, text: str) -> tuple[Path, str]:
    """Bootstrap and configuration of an image that holds a file "which" with that text."""
    tree = base / f"{name}-tree"
    tree.mkdir()
    (tree / "which").write_text(text)
    image = build_image(tree, base / name)
    return image.bootstrap, json.dumps(
        {
            "device": {
                "backend": {"type": "localfs", "config": {"dir": str(image.blob_dir)}},
                "cache": {"type": "blobcache", "config": {"work_dir": str(base / "cache")}},
            },
            "mode": "direct",
        }
    )


def test_words_and_statuses(api: Api, tmp_path: Path) -> None:
    bootstrap, config = make_image(tmp_path, "image", "one")
    missing = "QueryString(\"'mountpoint' should be specified in query string\")"

    def error(answer: tuple[int, Any]) -> tuple[int, str]:
        assert answer[1]["code"] == "UNDEFINED"
        return answer[0], answer[1]["message"]

    assert api.mount("/a", "rafs", bootstrap, config) == (204, None)
    assert api.mount("/containers", "passthrough_fs", tmp_path) == (204, None)
    exists = OTHER.format('"object or filesystem already exists"')
    absent = OTHER.format('"object or filesystem doesn\'t exist"')
    assert error(api.mount("/a", "rafs", bootstrap, config)) == (500, exists)
    assert error(api.mount("/a", "passthrough", tmp_path)) == (500, exists)
    assert error(api.umount("/none")) == (500, absent)
    assert error(api.mount("/none", "rafs", bootstrap, config, "PUT")) == (500, absent)
    assert error(api.mount("/containers", "rafs", bootstrap, config, "PUT")) == (
        500,
        OTHER.format('"filesystem type mismatch, expect RAFS"'),
    )
    assert error(api.mount("/b", "nfs", tmp_path)) == (
        500,
        OTHER.format("\"invalid argument `only 'rafs' and 'passthrough_fs' are supported, but nfs was specified`\""),
    )
    assert api.mount("/b", "passthroughfs", tmp_path / "absent")[0] == 500
    assert api.mount("/b", "rafs", tmp_path / "absent", config)[0] == 500
    assert error(api.call("POST", "/api/v1/mount", "{}")) == (400, missing)
    assert error(api.call("DELETE", "/api/v1/mount")) == (400, missing)
    assert api.call("POST", "/api/v1/mount?mountpoint=/b", "no json")[0] == 400
    assert api.call("POST", "/api/v1/mount?mountpoint=/b", {"fs_type": "rafs"})[0] == 400
    assert error(api.call("DELETE", "/api/v1/mount?mountpoint=/b", "{}")) == (400, "BadRequest")
    assert error(api.call("GET", "/api/v1/nothing")) == (404, "NoRoute")
    collection = api.call("GET", "/api/v1/daemon")[1]["backend_collection"]
    assert {path: entry["backend_type"] for path, entry in collection.items()} == {
        "/a": "Rafs",
        "/containers": "PassthroughFs",
    }
    assert api.call("DELETE", "/api/v1/mount?mountpoint=%2Fa") == (204, None)
    assert api.umount("/containers") == (204, None)


def test_mounts_come_and_go(api: Api, tmp_path: Path) -> None:
    """300 times mount, verify, unmount, two images in turn: no nodeid of one ever means the other."""
    images = [make_image(tmp_path, name, name) for name in ("one", "other")]
    with FakeGuest(api.daemon.socket_path, queue_size=64) as guest:
        fuse = guest.fuse
        fuse.init()
        seen: set[int] = set()
        for turn in range(300):
            name = ("one", "other")[turn % 2]
            assert api.mount("/rafs/c1/lowerdir", "rafs", *images[turn % 2])[0] == 204
            found = fuse.walk("rafs/c1/lowerdir/which")
            assert found.nodeid not in seen
            seen.add(found.nodeid)
            assert fuse.read(found.nodeid, 0, 100) == name.encode()
            assert api.umount("/rafs/c1/lowerdir")[0] == 204
            with pytest.raises(OSError, match=rf"\[Errno {errno.ESTALE}\]"):
                fuse.read(found.nodeid, 0, 100)
        with pytest.raises(OSError, match=rf"\[Errno {errno.ENOENT}\]"):
            fuse.lookup(ROOT, b"rafs")


def test_remount(api: Api, tmp_path: Path) -> None:
    one, other = make_image(tmp_path, "one", "one"), make_image(tmp_path, "other", "other")
    assert api.mount("/a", "rafs", *one)[0] == 204
    with FakeGuest(api.daemon.socket_path, queue_size=64) as guest:
        guest.fuse.init()
        assert guest.fuse.read_file("a/which") == b"one"
        assert api.mount("/a", "rafs", *other, "PUT")[0] == 204
        assert guest.fuse.read_file("a/which") == b"other"
        assert api.mount("/a", "rafs", tmp_path / "absent", one[1], "PUT")[0] == 500
        assert guest.fuse.read_file("a/which") == b"other"


def test_remount_of_the_same_image(api: Api, tmp_path: Path) -> None:
    """What the guest holds stays good while only the configuration changes, also with a copy of the bootstrap."""
    bootstrap, config = make_image(tmp_path, "one", "one")
    copy, changed = tmp_path / "copy.boot", json.loads(config)
    copy.write_bytes(bootstrap.read_bytes())
    changed["device"]["backend"]["config"]["alt_dirs"] = [str(tmp_path)]
    assert api.mount("/a", "rafs", bootstrap, config)[0] == 204
    with FakeGuest(api.daemon.socket_path, queue_size=64) as guest:
        guest.fuse.init()
        held = guest.fuse.walk("a/which").nodeid
        for source in (bootstrap, copy):
            assert api.mount("/a", "rafs", source, json.dumps(changed), "PUT")[0] == 204
            assert guest.fuse.walk("a/which").nodeid == held
            assert guest.fuse.read(held, 0, 100) == b"one"
        shown = api.call("GET", "/api/v1/daemon")[1]["backend_collection"]["/a"]["config"]
        assert shown["backend"]["localfs"]["alt_dirs"] == [str(tmp_path)]
        # A file that was overwritten is another image, whatever its name
        copy.write_bytes(make_image(tmp_path, "other", "other")[0].read_bytes())
        other = json.loads(config)
        other["device"]["backend"]["config"]["dir"] = str(tmp_path / "other")
        assert api.mount("/a", "rafs", copy, json.dumps(other), "PUT")[0] == 204
        assert guest.fuse.walk("a/which").nodeid != held
        assert guest.fuse.read_file("a/which") == b"other"


def test_idle_connections_delay_nobody(api: Api) -> None:
    idle = []
    for _ in range(50):
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(str(api.daemon.api_path))
        stream.sendall(b"GET /api/v1/daemon HTTP/1.1\r\nHost: unix\r\n\r\n")
        answer = http.client.HTTPResponse(stream)
        answer.begin()
        assert json.loads(answer.read())["state"] == "RUNNING"
        idle.append(stream)
    assert api.call("GET", "/api/v1/daemon")[0] == 200
    for stream in idle:
        stream.close()


def test_enosys_never_latches_for_a_neighbour(api: Api, tmp_path: Path) -> None:
    """A kernel remembers ENOSYS for the whole connection: no image and no pseudo directory says it to an operation that
    the passthrough has (MKDIR apart, whose ENOSYS it does not remember and Kata's agent expects)."""
    assert api.mount("/a", "rafs", *make_image(tmp_path, "image", "one"))[0] == 204
    assert api.mount("/containers", "passthrough_fs", tmp_path)[0] == 204
    with FakeGuest(api.daemon.socket_path, queue_size=64) as guest:
        fuse = guest.fuse
        fuse.init()
        nodes = [ROOT, fuse.walk("a").nodeid, fuse.walk("a/which").nodeid]
        shared = [fuse.walk("containers").nodeid, fuse.create(fuse.walk("containers").nodeid, b"file")[0].nodeid]

        def answers_enosys(operation: int, node: int) -> bool:
            for body in (b"", bytes(56), bytes(16) + b"name\0other\0" + bytes(80)):
                try:
                    fuse.request(operation, node, body, 256, 4096)
                except OSError as error:
                    if error.errno == errno.ENOSYS:
                        return True
            return False

        # Every number there is and some that are not yet, but those that get no answer or end the session
        asked = set(range(1, 64)) - {fc.FORGET, fc.BATCH_FORGET, fc.INIT, fc.DESTROY, 36, 41}
        offered = {operation for operation in asked if not all(answers_enosys(operation, node) for node in shared)}
        assert len(offered) >= 34 and fc.TMPFILE in offered and fc.SYNCFS in offered
        for operation in offered:
            for node in nodes:
                if (operation, node) != (fc.MKDIR, ROOT):
                    assert not answers_enosys(operation, node), (operation, node)
        with pytest.raises(OSError, match=rf"\[Errno {errno.ENOSYS}\]"):
            fuse.mkdir(ROOT, b"new")
        with pytest.raises(OSError, match=rf"\[Errno {errno.EROFS}\]"):
            fuse.mkdir(nodes[1], b"new")
        with pytest.raises(OSError, match=rf"\[Errno {errno.ENOTTY}\]"):
            fuse.request(39, nodes[2], bytes(32))


def test_top_of_runtime_rs_is_kept(api: Api, tmp_path: Path) -> None:
    """Care 10: the guest makes nothing where the host will bind; below a bind it does."""
    if os.geteuid() != 0:
        pytest.skip("mounts need root")
    rw, volume = tmp_path / "rw", tmp_path / "volume"
    (rw / "passthrough" / "c1").mkdir(parents=True)
    volume.mkdir()
    subprocess.run(["mount", "--bind", str(volume), str(rw / "passthrough" / "c1")], check=True)
    try:
        assert api.mount("/containers", "passthrough_fs", rw)[0] == 204
        with FakeGuest(api.daemon.socket_path, queue_size=64) as guest:
            fuse = guest.fuse
            fuse.init()
            top = fuse.walk("containers").nodeid
            passthrough = fuse.lookup(top, b"passthrough").nodeid
            bound = fuse.lookup(passthrough, b"c1").nodeid
            for node in (top, passthrough):
                for call in (
                    lambda at=node: fuse.mkdir(at, b"x"),
                    lambda at=node: fuse.symlink(at, b"x", b"/"),
                    lambda at=node: fuse.create(at, b"x"),
                    lambda at=node: fuse.rename(bound, b"a", at, b"x"),
                    lambda at=node: fuse.rmdir(at, b"passthrough"),
                    lambda at=node: fuse.unlink(at, b"c1"),
                ):
                    with pytest.raises(OSError, match=rf"\[Errno {errno.EROFS}\]"):
                        call()
            fuse.create(bound, b"allowed")
            assert (volume / "allowed").exists()
            assert api.umount("/containers")[0] == 204
            subprocess.run(["umount", str(rw / "passthrough" / "c1")], check=True)  # nothing pins it
    finally:
        subprocess.run(["umount", "-l", str(rw / "passthrough" / "c1")], capture_output=True)


def test_passthrough_needs_a_session_for_it(tmp_path: Path) -> None:
    bootstrap, _ = make_image(tmp_path, "image", "one")
    options = ["--bootstrap", str(bootstrap), "--localfs-dir", str(bootstrap.parent)]
    with NydusDaemon(options, die_with_parent=True) as daemon:
        with FakeGuest(daemon.socket_path, queue_size=64) as guest:
            guest.fuse.init()
        assert Api(daemon).mount("/containers", "passthrough_fs", tmp_path)[0] == 501


def test_other_routes(api: Api, tmp_path: Path) -> None:
    assert api.mount("/a", "rafs", *make_image(tmp_path, "image", "one"))[0] == 204
    status, facts = api.call("GET", "/api/v1/daemon/backend?mountpoint=/a")
    assert status == 200 and facts["magic"] == 0xE0F5E1E2 and facts["chunk_size"] >= 4096
    assert api.call("GET", "/api/v1/daemon/backend?mountpoint=/b")[1]["message"] == (
        'FsBackendInfo(Metrics(Daemon(Other("object or filesystem doesn\'t exist"))))'
    )
    status, events = api.call("GET", "/api/v1/daemon/events")
    assert status == 200 and events["errors"] == [] and events["max_errors"] == 500
    for method, target, body in (
        ("PUT", "/api/v2/blobs", '{"type": "bootstrap", "id": "x"}'),
        ("DELETE", "/api/v2/blobs?domain_id=x", None),
        ("PUT", "/api/v1/daemon/fuse/sendfd", None),
    ):
        assert api.call(method, target, body)[0] == 501


OPENAPI = Path(__file__).resolve().parents[2] / "docs" / "api.json"


def test_own_routes_are_described(api: Api) -> None:
    """docs/api.json has every route and method of ours, and no other; what GET answers has the described keys."""
    from virtiofsd_nydus.daemon.api import ROUTES

    described = json.loads(OPENAPI.read_text())["paths"]
    ours = {
        path: {method.lower() for method in methods}
        for path, methods in ROUTES.items()
        if path.startswith("/api/ext/v1/")
    }
    assert {path: set(methods) for path, methods in described.items()} == ours
    for path, methods in described.items():
        content = methods["get"]["responses"]["200"]["content"] if "get" in methods else {}
        if "application/json" in content and not methods["get"].get("parameters"):
            keys = content["application/json"]["schema"].get("required", [])
            status, answer = api.call("GET", path)
            assert status == 200 and set(answer) == set(keys), path


def test_guests_share_a_directory(api: Api, tmp_path: Path) -> None:
    """A second guest's start and end take nothing from the first; when the last is gone, so is what they knew."""
    assert api.mount("/containers", "passthrough_fs", tmp_path)[0] == 204
    with FakeGuest(api.daemon.socket_path, queue_size=64) as first:
        first.fuse.init()
        entry, handle = first.fuse.create(first.fuse.walk("containers").nodeid, b"file")
        with FakeGuest(api.daemon.socket_path, queue_size=64) as second:
            second.fuse.init()
            assert second.fuse.walk("containers/file").nodeid == entry.nodeid
        assert first.fuse.write(entry.nodeid, handle, 0, b"still") == 5
    share = {}
    # The hang-up is noticed by itself, files before nodes; the test's time limit ends this.
    while (share.get("files"), share.get("inodes")) != (0, 1):
        share = api.daemon.stats()["shares"]["/containers"]
