"""`fuse`: the tree of a host mount is the image's; how it starts, ends and fails."""

import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tree_listing
from tests.fusedev.conftest import StartHost
from tests.fusedev.host import VERB, HostDaemon
from tests.peers.registry import LocalRegistry
from tests.system.conftest import CODECS, Converter
from tests.system.daemon import WAIT_SECONDS, ServedImage, wait_until
from tests.system.guest_tree import Record, differences
from tests.system.range_proxy import RangeProxy


@pytest.fixture
def proxy(registry: LocalRegistry) -> Iterator[RangeProxy]:
    with RangeProxy(registry.host) as server:
        yield server


def listing(root: Path) -> list[Record]:
    return list(tree_listing.list_tree(root))


@pytest.mark.parametrize("codec", CODECS)
def test_tree_is_what_umoci_unpacks(converter: Converter, expected_tree: list[Record], start_host: StartHost,
                                    codec: str) -> None:
    host = start_host(served=converter.convert(codec))
    assert differences(expected_tree, listing(host.mountpoint)) == []
    counters = host.counters()
    assert counters["fetched_chunks"] > 0 and counters["digest_failures"] == 0 and counters["fuse_errors"] == 0


def test_version_5(unpacked: Path, expected_tree: list[Record], start_host: StartHost, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    subprocess.run([*VERB, "build", "--fs-version", "5", "--bootstrap", str(tmp_path / "v5.boot"), "--blob-dir",
                    str(blobs), str(unpacked)], check=True, capture_output=True)
    served = ServedImage(tmp_path / "v5.boot", "localfs", {"dir": str(blobs)}, {})
    host = start_host(served=served)
    assert differences(expected_tree, listing(host.mountpoint)) == []


def test_read_only_errors(start_host: StartHost) -> None:
    root = start_host().mountpoint

    def fails(code: int, call: object, *args: object) -> None:
        with pytest.raises(OSError) as caught:
            call(*args)     # type: ignore[operator]
        assert caught.value.errno == code

    passwd = root / "etc/passwd"
    for call, args in ((os.mkdir, (root / "new",)), (os.unlink, (passwd,)), (os.rename, (passwd, root / "x")),
                       (os.chmod, (passwd, 0o600)), (os.truncate, (passwd, 0)), (os.symlink, ("a", root / "l")),
                       (os.link, (passwd, root / "l")), (os.setxattr, (passwd, "user.a", b"1")),
                       (os.open, (passwd, os.O_RDWR)), (os.open, (root / "new", os.O_CREAT | os.O_WRONLY))):
        fails(errno.EROFS, call, *args)
    fails(errno.ENOENT, os.stat, root / "no-such")
    fails(errno.ENOENT, os.stat, root / "no-such/below")
    fails(errno.ENOTDIR, os.stat, passwd / "below")
    fails(errno.ENAMETOOLONG, os.stat, root / ("n" * 256))
    fails(errno.ENODATA, os.getxattr, passwd, "user.none")
    loops = [path for path in root.rglob("*") if path.is_symlink() and os.readlink(path) == path.name]
    for loop in loops:
        fails(errno.ELOOP, os.stat, loop)


def test_sigterm_unmounts(start_host: StartHost) -> None:
    host = start_host()
    assert host.is_mounted()
    with (host.mountpoint / "etc/passwd").open("rb"):       # somebody is in it: gone all the same
        assert host.kill(signal.SIGTERM) == 0
        assert not host.is_mounted()
    assert not host.api_path.exists()


def test_exit_keeps_the_mount(start_host: StartHost) -> None:
    host = start_host()
    host.put("exit")
    assert host.process.wait(WAIT_SECONDS) == 0
    assert host.is_mounted()
    with pytest.raises(OSError) as caught:
        os.listdir(host.mountpoint)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)


def test_umount_from_outside_ends_the_daemon(start_host: StartHost) -> None:
    host = start_host()
    subprocess.run(["umount", "-l", str(host.mountpoint)], check=True)
    assert host.process.wait(WAIT_SECONDS) == 0


def test_mounts_by_the_api(start_host: StartHost, expected_tree: list[Record]) -> None:
    """One daemon for many images, as nydus-snapshotter runs it."""
    host = start_host(bootstrap=False)
    body = {"fs_type": "rafs", "source": str(host.image.bootstrap), "config": host.config.read_text()}
    for name in ("one", "two"):
        assert host.request("POST", f"/api/v1/mount?mountpoint=/{name}", body)[0] == 204
    assert differences(expected_tree, listing(host.mountpoint / "one")) == []
    assert host.request("DELETE", "/api/v1/mount?mountpoint=/one")[0] == 204
    assert os.listdir(host.mountpoint) == ["two"]
    assert host.request("PUT", "/api/v1/daemon/fuse/takeover")[0] == 400
    assert host.request("PUT", "/api/v1/daemon/start")[0] == 400


def run_fuse(*words: str, prefix: tuple[str, ...] = ()) -> str:
    """The one line that a `fuse` that cannot start says."""
    done = subprocess.run([*prefix, *VERB, "fuse", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and not done.stdout, done
    return lines[0]


def test_impossible_mountpoints(image: ServedImage, start_host: StartHost, mounts_dir: Path, tmp_path: Path) -> None:
    host = start_host()
    options = ("--bootstrap", str(image.bootstrap), "--config", str(host.config), "--apisock", str(tmp_path / "a"))
    assert "make the directory first" in run_fuse("-M", str(tmp_path / "missing"), *options)
    (tmp_path / "file").touch()
    assert "is not a directory" in run_fuse("-M", str(tmp_path / "file"), *options)
    assert "is busy: virtiofsd-nydus (fuse.nydus)" in run_fuse("-M", str(host.mountpoint), *options)
    host.kill()
    assert "umount -l" in run_fuse("-M", str(host.mountpoint), *options)
    subprocess.run(["umount", "-l", str(host.mountpoint)], check=True)
    hidden = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev && : >/dev/null && exec "$@"', "-")
    assert "modprobe fuse" in run_fuse("-M", str(host.mountpoint), *options, prefix=hidden)
    long_api = (*options[:4], "--apisock", str(tmp_path / ("x" * 120)))
    assert "longer than" in run_fuse("-M", str(host.mountpoint), *long_api)
    assert not host.is_mounted() and not (tmp_path / "a").exists()


def test_unprivileged_through_fusermount(converter: Converter, image: ServedImage, tmp_path_factory: pytest.TempPathFactory,
                                         unpacked: Path) -> None:
    helper = Path("/usr/bin/fusermount3")
    if not helper.exists() or not helper.stat().st_mode & 0o4000:
        pytest.skip("no fusermount3 with the set-user-id bit")
    if Path("/dev/fuse").stat().st_mode & 0o006 != 0o006:
        pytest.skip("/dev/fuse is root's alone here")
    base = Path(tmp_path_factory.mktemp("user"))
    for directory in (base, *base.parents):
        if directory.is_relative_to("/tmp") and directory != Path("/tmp"):
            directory.chmod(0o755)
    where, boot = base / "m", base / "image.boot"
    boot.write_bytes(image.bootstrap.read_bytes())
    (base / "cache").mkdir()
    where.mkdir()
    config = image.write_config(base / "config.json", base / "cache")
    for path in (where, base / "cache", boot, config):
        os.chown(path, 65534, 65534)
    process = subprocess.Popen(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *VERB, "fuse", "-M",
                                str(where), "--bootstrap", str(boot), "--config", str(config)],
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "HOME": str(base)})
    try:
        wait_until(lambda: process.poll() is not None or os.path.ismount(where), "the mount")
        assert process.poll() is None, process.stderr and process.stderr.read()
        read = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat",
                               str(where / "large/text")], capture_output=True, timeout=60)
        assert read.stdout == (unpacked / "large/text").read_bytes()
        process.terminate()
        assert process.wait(WAIT_SECONDS) == 0
        assert not os.path.ismount(where)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        subprocess.run(["umount", "-l", str(where)], check=False, capture_output=True)


def test_cold_read_ends_by_deadline_and_by_kill(image: ServedImage, proxy: RangeProxy, start_host: StartHost) -> None:
    """A registry that says nothing: metadata and cached data are served beside it, the read ends in EIO in time, and
    a reader that is killed is gone at once."""
    host = start_host(served=image.with_backend(host=proxy.host), deadline_ms=2000)
    warm = (host.mountpoint / "etc/passwd").read_bytes()
    proxy.gate.clear()
    try:
        outcome: list[int] = []

        def read() -> None:
            try:
                (host.mountpoint / "large/random").read_bytes()
            except OSError as error:
                outcome.append(error.errno or 0)

        reader = threading.Thread(target=read)
        reader.start()
        assert proxy.held.acquire(timeout=WAIT_SECONDS)
        assert (host.mountpoint / "etc/passwd").read_bytes() == warm
        assert len(os.listdir(host.mountpoint / "sizes")) > 3
        reader.join(WAIT_SECONDS)
        assert outcome == [errno.EIO]
    finally:
        proxy.gate.set()


def test_killed_reader_is_gone_at_once(image: ServedImage, proxy: RangeProxy, start_host: StartHost) -> None:
    host = start_host(served=image.with_backend(host=proxy.host), deadline_ms=60_000)
    os.listdir(host.mountpoint / "large")
    proxy.gate.clear()
    try:
        reader = subprocess.Popen(["dd", f"if={host.mountpoint}/large/random", "of=/dev/null", "bs=64k",
                                   "iflag=direct"], stderr=subprocess.DEVNULL)
        assert proxy.held.acquire(timeout=WAIT_SECONDS)
        began = time.monotonic()
        reader.kill()
        reader.wait(WAIT_SECONDS)
        assert time.monotonic() - began < 10
    finally:
        proxy.gate.set()


def test_guest_and_host_in_one_process(image: ServedImage, registry: LocalRegistry, start_host: StartHost,
                                       tmp_path: Path, unpacked: Path) -> None:
    """What the guest read is warm on the host, and the other way round."""
    from virtiofsd_nydus.vmm.fakeguest import FakeGuest

    sock = tmp_path / "fs.sock"
    host: HostDaemon = start_host(extra=("--sock", str(sock)))
    with FakeGuest(sock) as guest:
        guest.fuse.init()
        text = guest.fuse.read_all(guest.fuse.walk("large/text").nodeid)
        fetched = host.counters()["fetched_chunks"]
        assert (host.mountpoint / "large/text").read_bytes() == text == (unpacked / "large/text").read_bytes()
        assert host.counters()["fetched_chunks"] == fetched
        random = (host.mountpoint / "large/random").read_bytes()
        fetched = host.counters()["fetched_chunks"]
        assert guest.fuse.read_all(guest.fuse.walk("large/random").nodeid) == random
        assert host.counters()["fetched_chunks"] == fetched
