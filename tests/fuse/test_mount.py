"""`fuse`: the tree of a host mount is the image's; how it starts, ends and fails."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tree_listing
from tests.fuse.conftest import StartHost
from tests.fuse.host import VERB, HostDaemon
from tests.peers.registry import LocalRegistry
from tests.system.conftest import CODECS, Converter
from tests.system.daemon import WAIT_SECONDS, ServedImage
from tests.system.guest_tree import Record, differences
from tests.system.range_proxy import RangeProxy


@pytest.fixture
def proxy(registry: LocalRegistry) -> Iterator[RangeProxy]:
    with RangeProxy(registry.host) as server:
        yield server


def listing(root: Path) -> list[Record]:
    return list(tree_listing.list_tree(root))


@pytest.mark.parametrize("codec", CODECS)
def test_tree_is_what_umoci_unpacks(
    converter: Converter, expected_tree: list[Record], start_host: StartHost, codec: str
) -> None:
    host = start_host(served=converter.convert(codec))
    assert differences(expected_tree, listing(host.mountpoint)) == []
    counters = host.counters()
    assert counters["fetched_chunks"] > 0 and counters["digest_failures"] == 0


def test_version_5(unpacked: Path, expected_tree: list[Record], start_host: StartHost, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    subprocess.run(
        [
            *VERB,
            "build",
            "--fs-version",
            "5",
            "--bootstrap",
            str(tmp_path / "v5.boot"),
            "--blob-dir",
            str(blobs),
            str(unpacked),
        ],
        check=True,
        capture_output=True,
    )
    served = ServedImage(tmp_path / "v5.boot", "localfs", {"dir": str(blobs)}, {})
    host = start_host(served=served)
    # As Nydus: the root of a directory that an image is made of gives no time to it
    expected = [{**record, "mtime_ns": 0} if record["path"] == "." else record for record in expected_tree]
    assert differences(expected, listing(host.mountpoint)) == []


def test_read_only_errors(start_host: StartHost, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (tree / "loop").symlink_to("loop")
    subprocess.run(
        [*VERB, "build", "--bootstrap", str(tmp_path / "b.boot"), "--blob-dir", str(tmp_path / "blobs"), str(tree)],
        check=True,
        capture_output=True,
    )
    served = ServedImage(tmp_path / "b.boot", "localfs", {"dir": str(tmp_path / "blobs")}, {})
    root = start_host(served=served).mountpoint

    def fails(code: int, call: object, *args: object) -> None:
        with pytest.raises(OSError) as caught:
            call(*args)  # type: ignore[operator]
        assert caught.value.errno == code

    passwd = root / "etc/passwd"
    for call, args in (
        (os.mkdir, (root / "new",)),
        (os.unlink, (passwd,)),
        (os.rename, (passwd, root / "x")),
        (os.chmod, (passwd, 0o600)),
        (os.truncate, (passwd, 0)),
        (os.symlink, ("a", root / "l")),
        (os.link, (passwd, root / "l")),
        (os.setxattr, (passwd, "user.a", b"1")),
        (os.open, (passwd, os.O_RDWR)),
        (os.open, (root / "new", os.O_CREAT | os.O_WRONLY)),
    ):
        fails(errno.EROFS, call, *args)
    fails(errno.ENOENT, os.stat, root / "no-such")
    fails(errno.ENOENT, os.stat, root / "no-such/below")
    fails(errno.ENOTDIR, os.stat, passwd / "below")
    fails(errno.ENAMETOOLONG, os.stat, root / ("n" * 256))
    fails(errno.ELOOP, os.stat, root / "loop")


def test_sigterm_unmounts(start_host: StartHost) -> None:
    host = start_host()
    assert host.is_mounted()
    inside = os.open(host.mountpoint / "etc/passwd", os.O_RDONLY)  # a process is in it: gone all the same
    assert host.kill(signal.SIGTERM) == 0
    assert not host.is_mounted() and not host.api_path.exists()
    with contextlib.suppress(OSError):
        os.close(inside)


def test_exit_keeps_the_mount(start_host: StartHost) -> None:
    host = start_host()
    host.put("exit")
    assert host.process.wait(WAIT_SECONDS) == 0
    assert host.is_mounted()
    with pytest.raises(OSError) as caught:
        list(host.mountpoint.iterdir())
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
    assert [path.name for path in host.mountpoint.iterdir()] == ["two"]
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
    assert "at most 107 are possible: use a shorter one" in run_fuse("-M", str(host.mountpoint), *long_api)
    assert not host.is_mounted() and not (tmp_path / "a").exists()


# In a mount namespace of its own, with a /dev/fuse for all users whatever this system's is like
UNPRIVILEGED = """
mount -t tmpfs none /mnt && mknod -m 666 /mnt/fuse c 10 229 && mount --bind /mnt/fuse /dev/fuse || exit 77
as_user() { setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; }
where=$1 file=$2; shift 2
setpriv --reuid=65534 --regid=65534 --clear-groups "$@" >&2 & daemon=$!
for _ in $(seq 500); do mountpoint -q "$where" && break; sleep 0.02; done
as_user cat "$where/$file" || { kill $daemon; exit 1; }
kill $daemon; wait $daemon || exit 1
! mountpoint -q "$where"
"""


def is_for_all(python: Path) -> bool:
    """Others reach this interpreter, and it is of our version."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return (
        python.exists()
        and python.resolve().name == version
        and all(parent.stat().st_mode & 0o001 for parent in python.resolve().parents)
    )


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that all users reach: pytest keeps its own to its user, and says so again whenever it starts."""
    with tempfile.TemporaryDirectory(prefix="virtiofsd-nydus-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_unprivileged_through_fusermount(image: ServedImage, open_dir: Path, unpacked: Path) -> None:
    if "VIRTIOFSD_NYDUS_SANITIZED" in os.environ:
        pytest.skip("set-user-id programs load no sanitizer")
    helper = Path("/usr/bin/fusermount3")
    if not helper.exists() or not helper.stat().st_mode & 0o4000:
        pytest.skip("no fusermount3 with the set-user-id bit")
    where, boot, cache = open_dir / "m", open_dir / "image.boot", open_dir / "cache"
    boot.write_bytes(image.bootstrap.read_bytes())
    cache.mkdir()
    where.mkdir()
    config = image.write_config(open_dir / "config.json", cache)
    for path in (where, cache, boot, config):
        os.chown(path, 65534, 65534)
    python = next((path for path in (sys.executable, "/usr/bin/python3") if is_for_all(Path(path))), None)
    if python is None:
        pytest.skip("no Python of this version that others may run")
    daemon = (python, *VERB[1:], "fuse", "-M", str(where), "--bootstrap", str(boot), "--config", str(config))
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", UNPRIVILEGED, "-", str(where), "large/text", *daemon],
        capture_output=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )
    if done.returncode == 77:
        pytest.skip("no mount namespace with a device of its own here")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == (unpacked / "large/text").read_bytes()


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
        assert len(list((host.mountpoint / "sizes").iterdir())) > 3
        reader.join(WAIT_SECONDS)
        assert outcome == [errno.EIO]
    finally:
        proxy.gate.set()


def test_killed_reader_is_gone_at_once(image: ServedImage, proxy: RangeProxy, start_host: StartHost) -> None:
    host = start_host(served=image.with_backend(host=proxy.host), deadline_ms=60_000)
    list((host.mountpoint / "large").iterdir())
    proxy.gate.clear()
    try:
        reader = subprocess.Popen(["cat", f"{host.mountpoint}/large/random"], stdout=subprocess.DEVNULL)
        assert proxy.held.acquire(timeout=WAIT_SECONDS)
        began = time.monotonic()
        reader.kill()
        reader.wait(WAIT_SECONDS)
        assert time.monotonic() - began < 10
    finally:
        proxy.gate.set()


def test_guest_and_host_in_one_process(
    image: ServedImage, registry: LocalRegistry, start_host: StartHost, tmp_path: Path, unpacked: Path
) -> None:
    """What the guest read is warm on the host, and the other way round."""
    from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest

    sock = tmp_path / "fs.sock"
    host: HostDaemon = start_host(extra=("--sock", str(sock)))
    with FakeGuest(sock) as guest:
        guest.fuse.init()
        text = guest.fuse.read_all(guest.fuse.walk("large/text").nodeid)
        waited = host.counters()["parked"]
        assert (host.mountpoint / "large/text").read_bytes() == text == (unpacked / "large/text").read_bytes()
        assert host.counters()["parked"] == waited
        random = (host.mountpoint / "large/random").read_bytes()
        waited = host.counters()["parked"]
        assert guest.fuse.read_all(guest.fuse.walk("large/random").nodeid) == random
        assert host.counters()["parked"] == waited
