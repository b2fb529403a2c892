"""`mount --kernel` and `umount`: the tree that the kernel shows, what is refused, and what is left behind."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tree_listing
from tests.fuse.host import VERB
from tests.kernelmount.kernel import ROLES, KernelMount
from tests.passthrough.privileges import check_reduced
from tests.peers.registry import LocalRegistry
from tests.system.conftest import CODECS, Converter, resolve, run_verb
from tests.system.daemon import ServedImage, data_ends, wait_until
from tests.system.guest_tree import Record, differences
from tests.system.range_proxy import RangeProxy
from virtiofsd_nydus.fuse.background import BackgroundMount
from virtiofsd_nydus.fuse.mounts import MS_RDONLY, find_mount, mount, umount
from virtiofsd_nydus.kernelmount.record import wait_ended


@pytest.mark.parametrize("options", [(), ("--fetch-all",)], ids=["lazy", "whole"])
@pytest.mark.parametrize("codec", CODECS)
def test_tree_is_what_umoci_unpacks(
    converter: Converter,
    expected_tree: list[Record],
    mounts_dir: Path,
    tmp_path: Path,
    codec: str,
    options: tuple[str, ...],
) -> None:
    with KernelMount(converter.convert(codec), mounts_dir / "k", tmp_path, *options) as mounted:
        assert mounted.is_lazy() == (not options)
        assert differences(expected_tree, list(tree_listing.list_tree(mounted.target))) == []
        run_verb("umount", str(mounted.target))
        assert list(mounted.target.iterdir()) == []
        assert mounted.is_gone()


@pytest.mark.parametrize("way", ["--batch-size 64K", "--oci-ref", "--encrypt"])
def test_ways_of_storing_chunks(
    oci_image: str, registry: LocalRegistry, expected_tree: list[Record], mounts_dir: Path, tmp_path: Path, way: str
) -> None:
    """Of batches and gzip layers the blob's own table says where chunks are: it is fetched before the mount."""
    reference = f"docker://{registry.host}/kernel{way.partition(' ')[0]}:v1"
    run_verb("convert", f"oci:{oci_image}", reference, *way.split())
    with KernelMount(resolve(reference, tmp_path / "bootstraps"), mounts_dir / "k", tmp_path) as mounted:
        assert mounted.is_lazy()
        assert differences(expected_tree, list(tree_listing.list_tree(mounted.target))) == []


def test_a_file_costs_its_chunks(kernel_mount: KernelMount, proxy: RangeProxy, unpacked: Path) -> None:
    """And what is here is read from the kernel alone."""
    image_bytes = sum(data_ends(kernel_mount.image).values())
    proxy.clear()
    path = "large/text"
    assert (kernel_mount.target / path).read_bytes() == (unpacked / path).read_bytes()
    assert 0 < proxy.sent_bytes() < image_bytes * 0.4
    proxy.clear()
    assert (kernel_mount.target / path).read_bytes() == (unpacked / path).read_bytes()
    assert proxy.sent_bytes() == 0


def test_processes_have_given_up_what_they_do_not_need(kernel_mount: KernelMount) -> None:
    for role in ROLES:
        check_reduced(kernel_mount.pid(role))
        check_reduced(kernel_mount.kill(role))  # so is one that another process starts


def test_nothing_stays_once_all_is_fetched(
    kernel_mount: KernelMount, expected_tree: list[Record], mounts_dir: Path
) -> None:
    assert f"process {kernel_mount.pid('worker')}" in kernel_mount.said
    second = mounts_dir / "second"
    second.mkdir()
    words = ["mount", str(kernel_mount.image.bootstrap), str(second), *kernel_mount.words[3:]]
    run_verb(*words, "--fetch-all")  # another process brings the rest
    assert wait_ended(kernel_mount.place.directory, 10)
    assert not kernel_mount.is_lazy()
    assert differences(expected_tree, list(tree_listing.list_tree(kernel_mount.target))) == []
    run_verb("umount", str(second))
    # What is complete from the start needs no process either
    assert "there is no daemon" in run_verb(*words).stdout
    assert differences(expected_tree, list(tree_listing.list_tree(second))) == []
    run_verb("umount", str(second))
    assert not BackgroundMount(str(second)).directory.exists()


def test_cache_files_removed_under_the_mount(kernel_mount: KernelMount, unpacked: Path) -> None:
    """The kernel keeps the files it has; what comes later comes into others, and from there into these."""
    files = [path for path in kernel_mount.cache.rglob("*") if path.is_file()]
    data = [path for path in files if path.name.endswith(".blob.data")]
    assert data
    for path in files:
        path.unlink()
    wait_until(lambda: all(path.exists() for path in data), "the cache's new files")
    for path in ("large/random", "large/text"):
        assert (kernel_mount.target / path).read_bytes() == (unpacked / path).read_bytes()
    kernel_mount.kill("worker")
    assert (kernel_mount.target / "large/second").read_bytes() == (unpacked / "large/second").read_bytes()
    assert kernel_mount.is_lazy()


def test_in_use_elsewhere(kernel_mount: KernelMount, unpacked: Path, tmp_path: Path, mounts_dir: Path) -> None:
    """An overlay outlives the mount below it: reads go on, and the processes end with it."""
    merged = mounts_dir / "merged"
    for name in (merged, tmp_path / "upper", tmp_path / "work"):
        name.mkdir()
    mount(
        "overlay",
        str(merged),
        "overlay",
        0,
        f"lowerdir={kernel_mount.target},upperdir={tmp_path}/upper,workdir={tmp_path}/work",
    )
    done = run_verb("umount", str(kernel_mount.target))
    assert "still in use" in done.stdout and find_mount(str(kernel_mount.target)) is None
    for path in ("large/random", "large/second"):
        assert (merged / path).read_bytes() == (unpacked / path).read_bytes()
    assert kernel_mount.pids("worker")
    umount(str(merged), lazy=True)
    wait_until(lambda: not kernel_mount.pids("worker") + kernel_mount.pids("guard"), "the processes' end")


def test_a_mount_of_others_is_refused(kernel_mount: KernelMount, mounts_dir: Path) -> None:
    """Also where a mount of ours had been."""
    devices = ",".join(f"device={path}" for path in sorted(kernel_mount.cache.glob("*.blob.data")))
    foreign = mounts_dir / "foreign"
    foreign.mkdir()
    for place in (foreign, kernel_mount.target):
        if place == kernel_mount.target:
            umount(str(place), lazy=True)
        mount(str(kernel_mount.image.bootstrap), str(place), "erofs", MS_RDONLY, devices)
        done = run_verb("umount", str(place), status=1)
        assert "no image of ours is mounted" in done.stderr and len(done.stderr.strip().splitlines()) == 1
        assert find_mount(str(place)) is not None
        umount(str(place), lazy=True)


def test_a_verb_that_is_killed_leaves_nothing(
    oci_image: str, registry: LocalRegistry, proxy: RangeProxy, mounts_dir: Path, tmp_path: Path
) -> None:
    """While its worker waits for the table of a blob."""
    reference = f"docker://{registry.host}/kernel--oci-ref:v1"
    run_verb("convert", f"oci:{oci_image}", reference, "--oci-ref")
    image = resolve(reference, tmp_path / "bootstraps").with_backend(host=proxy.host)
    mounted = KernelMount(image, mounts_dir / "k", tmp_path)
    proxy.gate.clear()
    verb = subprocess.Popen([*VERB, *mounted.words])
    assert proxy.held.acquire(timeout=20)
    assert mounted.pid("worker")
    verb.kill()
    verb.wait()
    proxy.gate.set()
    wait_until(lambda: not mounted.pids("worker") + mounted.pids("guard"), "the processes' end")
    assert find_mount(str(mounted.target)) is None


def test_version_5_is_refused_in_a_line(mounts_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("x")
    run_verb(
        "build",
        "--fs-version",
        "5",
        "--bootstrap",
        str(tmp_path / "b"),
        "--blob-dir",
        str(tmp_path / "blobs"),
        str(tmp_path / "tree"),
    )
    image = ServedImage(tmp_path / "b", "localfs", {"dir": str(tmp_path / "blobs")}, {})
    for options in ((), ("--fetch-all",)):
        done = run_verb(*KernelMount.prepare(image, mounts_dir / "k", tmp_path, *options), status=1)
        assert "RAFS version 5" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not BackgroundMount(str(mounts_dir / "k")).directory.exists()


def test_a_compressed_cache_is_refused_in_a_line(image: ServedImage, mounts_dir: Path, tmp_path: Path) -> None:
    for options in ((), ("--fetch-all",)):
        words = KernelMount.prepare(image, mounts_dir / "k", tmp_path, *options)
        config = tmp_path / "kernel.json"
        document = json.loads(config.read_text())
        document["cache"]["compressed"] = True
        config.write_text(json.dumps(document))
        done = run_verb(*words, status=1)
        assert "compressed" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def memory_dir(mounts_dir: Path) -> Iterator[Path]:
    directory = mounts_dir / "memory"
    directory.mkdir()
    mount("tmpfs", str(directory), "tmpfs", 0, "")
    yield directory
    umount(str(directory), lazy=True)


def test_a_cache_without_events_is_refused_in_a_line(image: ServedImage, mounts_dir: Path, memory_dir: Path) -> None:
    target = mounts_dir / "k"
    done = run_verb(*KernelMount.prepare(image, target, memory_dir), status=1)
    assert "--fetch-all" in done.stderr and "--cache-dir" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert find_mount(str(target)) is None and not BackgroundMount(str(target)).directory.exists()


def test_without_the_right_to_it_is_refused_in_a_line(image: ServedImage, mounts_dir: Path, tmp_path: Path) -> None:
    """As in a container: root, but without CAP_SYS_ADMIN."""
    for options in ((), ("--fetch-all",)):
        words = KernelMount.prepare(image, mounts_dir / "k", tmp_path, *options)
        done = subprocess.run(
            ["setpriv", "--bounding-set", "-sys_admin", *VERB, *words], capture_output=True, text=True
        )
        assert done.returncode == 1 and "needs root" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not BackgroundMount(str(mounts_dir / "k")).directory.exists()
