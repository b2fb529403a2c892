"""`mount` and `umount`, and what people do with such a mount: containers on an overlay over it."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tree_listing
from tests.fuse.host import VERB
from tests.peers.registry import LocalRegistry
from tests.system.conftest import run_verb
from tests.system.daemon import wait_until
from tests.system.guest_tree import Record, differences
from virtiofsd_nydus.fuse.background import BackgroundMount
from virtiofsd_nydus.fuse.mounts import find_mount

BUSYBOX = Path("/bin/busybox")


@pytest.fixture
def target(mounts_dir: Path) -> Path:
    directory = mounts_dir / "image"
    directory.mkdir()
    return directory


def test_reference(
    oci_image: str, registry: LocalRegistry, expected_tree: list[Record], target: Path, tmp_path: Path
) -> None:
    reference = f"docker://{registry.host}/on-the-host:v1"
    run_verb("convert", f"oci:{oci_image}", reference)
    done = run_verb("mount", reference, str(target), "--cache-dir", str(tmp_path / "cache"))
    assert f"is on {target}" in done.stdout
    assert differences(expected_tree, list(tree_listing.list_tree(target))) == []
    place = BackgroundMount(str(target))
    assert place.is_running()
    run_verb("umount", str(target))
    assert find_mount(str(target)) is None
    assert not place.is_running() and not place.directory.exists()


def test_refusals(registry: LocalRegistry, target: Path, tmp_path: Path) -> None:
    cache = ("--cache-dir", str(tmp_path / "cache"))
    done = run_verb("mount", f"docker://{registry.host}/no-such:v1", str(target), *cache, status=1)
    assert len(done.stderr.strip().splitlines()) == 1
    (tmp_path / "bad.boot").write_bytes(b"x" * 8192)
    done = run_verb("mount", str(tmp_path / "bad.boot"), str(target), "--blob-dir", str(tmp_path), *cache, status=1)
    assert len(done.stderr.strip().splitlines()) == 1
    assert find_mount(str(target)) is None and not BackgroundMount(str(target)).directory.exists()
    done = run_verb("umount", str(target), status=1)
    assert "no image of ours is mounted" in done.stderr


@pytest.fixture
def rootfs(target: Path, tmp_path: Path) -> Iterator[Path]:
    """An overlay over a lazily mounted image."""
    tree = tmp_path / "tree"
    for name in ("bin", "etc", "proc", "dev", "sys", "tmp", "data/deep"):
        (tree / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, tree / "bin/busybox")
    (tree / "bin/sh").symlink_to("busybox")
    (tree / "etc/lower").write_text("of the image\n")
    (tree / "data/gone").write_text("to be deleted\n")
    (tree / "data/deep/kept").write_text("kept\n")
    run_verb("build", "--bootstrap", str(tmp_path / "c.boot"), "--blob-dir", str(tmp_path / "blobs"), str(tree))
    run_verb(
        "mount",
        str(tmp_path / "c.boot"),
        str(target),
        "--blob-dir",
        str(tmp_path / "blobs"),
        "--cache-dir",
        str(tmp_path / "cache"),
    )
    merged = target.parent / "rootfs"
    for name in (merged, tmp_path / "upper", tmp_path / "work"):
        name.mkdir()
    subprocess.run(
        [
            "mount",
            "-t",
            "overlay",
            "overlay",
            "-o",
            f"lowerdir={target},upperdir={tmp_path}/upper,workdir={tmp_path}/work",
            str(merged),
        ],
        check=True,
    )
    yield merged
    subprocess.run(["umount", str(merged)], check=True)
    run_verb("umount", str(target))


FIRST = (
    "set -e; cd /data; rm gone; rm -r deep; mkdir deep; echo new >>/etc/lower; echo mine >made; ls; ls deep; "
    "cat /etc/lower"
)
SECOND = "cd /data; ls; ls deep; cat made /etc/lower; test ! -e gone"
# crun wants pure cgroup 2, runc what the host has; either way in a mount namespace of its own
INSIDE = """
if [ "$1" = crun ]; then umount -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; fi
exec "$@"
"""


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_containers(rootfs: Path, tmp_path: Path, runtime: str) -> None:
    if shutil.which(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    subprocess.run([runtime, "spec"], cwd=bundle, check=True)
    config = json.loads((bundle / "config.json").read_text())
    config["root"] = {"path": str(rootfs), "readonly": False}
    config["process"]["terminal"] = False
    config["process"].pop("rlimits", None)  # not for every root to raise
    config["linux"].pop("resources", None)  # crun raises a limit to load its device filter

    def run(name: str, script: str) -> str:
        config["process"]["args"] = [
            "/bin/busybox",
            "sh",
            "-c",
            f'for i in rm mkdir ls cat; do alias $i="busybox $i"; done; export PATH=/bin; {script}',
        ]
        (bundle / "config.json").write_text(json.dumps(config))
        words = [runtime, "--root", str(tmp_path / "state"), "run", name]
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", INSIDE, "-", *words], cwd=bundle, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = run("one", FIRST)
    assert said.split() == ["deep", "made", "of", "the", "image", "new"]
    assert run("two", SECOND).split() == ["deep", "made", "mine", "of", "the", "image", "new"]  # restarted
    gone = (tmp_path / "upper/data/gone").lstat()
    assert gone.st_rdev == 0 and not (rootfs / "data/gone").exists()  # a whiteout


def test_usage() -> None:
    done = subprocess.run([*VERB, "mount"], capture_output=True, text=True)
    assert done.returncode == 2 and "IMAGE" in done.stderr


@pytest.fixture
def mounted(target: Path, tmp_path: Path) -> Iterator[BackgroundMount]:
    """A small image on target."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("of the image\n")
    run_verb(
        "build", "--bootstrap", str(tmp_path / "m.boot"), "--blob-dir", str(tmp_path / "b"), str(tmp_path / "tree")
    )
    mount_again(target, tmp_path)
    place = BackgroundMount(str(target))
    yield place
    if find_mount(str(target)):
        run_verb("umount", "--lazy", str(target))
    wait_until(lambda: not place.is_running(), "the daemon's end")


def mount_again(target: Path, tmp_path: Path) -> None:
    words = ["--blob-dir", str(tmp_path / "b"), "--cache-dir", str(tmp_path / "cache")]
    run_verb("mount", str(tmp_path / "m.boot"), str(target), *words)


def test_a_busy_mount_is_left_alone(mounted: BackgroundMount, target: Path) -> None:
    with (target / "file").open() as file:
        done = run_verb("umount", str(target), status=1)
        assert "is in use: end the processes that use it" in done.stderr and len(done.stderr.splitlines()) == 1
        assert find_mount(str(target)) is not None and mounted.is_running()
        assert file.read() == "of the image\n"
    run_verb("umount", str(target))
    assert not mounted.directory.exists()


def test_a_busy_mount_goes_lazily(mounted: BackgroundMount, target: Path, tmp_path: Path) -> None:
    """The place is free at once, for another mount too; the old one's end takes nothing of it away."""
    with (target / "file").open() as file:
        done = run_verb("umount", "--lazy", str(target))
        assert "still in use" in done.stdout and find_mount(str(target)) is None
        mount_again(target, tmp_path)
        assert file.read() == "of the image\n"
    assert mounted.is_running() and (target / "file").read_text() == "of the image\n"
    run_verb("umount", str(target))
    assert not mounted.directory.exists()


def test_the_systems_umount_leaves_nothing(mounted: BackgroundMount, target: Path) -> None:
    subprocess.run(["umount", str(target)], check=True)
    wait_until(lambda: not mounted.directory.exists(), "the run directory's end")
