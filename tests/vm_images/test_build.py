"""The recipe of the test guest: load order of modules, the archive the kernel unpacks, and what makes it build anew."""

import importlib.util
import json
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "vm-images" / "build.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("guest_recipe", BUILD)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_deb(path: Path, modules: dict[str, str], builtin: str = "", *, kernel: bool = True) -> None:
    """A package with empty modules that name their dependencies as real ones do."""
    tree = path.parent / "tree"
    places = {"overlay": "fs/overlayfs", "fuse": "fs/fuse", "virtiofs": "fs/fuse", "virtio_console": "drivers/char"}
    for name, depends in modules.items():
        place = tree / "lib/modules/6.0/kernel" / places.get(name, "drivers/virtio") / f"{name}.ko"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(f"\0license=GPL\0depends={depends}\0name={name}\0".encode())
    (tree / "lib/modules/6.0").mkdir(parents=True, exist_ok=True)
    (tree / "lib/modules/6.0/modules.builtin").write_text(builtin)
    (tree / "boot").mkdir()
    if kernel:
        (tree / "boot/vmlinuz-6.0").write_bytes(b"a kernel")
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        "Package: linux-image-6.0\nVersion: 1\nArchitecture: amd64\n"
        "Maintainer: nobody <nobody@localhost>\nDescription: a test's kernel\n"
    )
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, path], check=True, capture_output=True)


MODULES = {
    "virtio": "",
    "virtio_ring": "virtio",
    "virtio_pci": "virtio_ring,virtio",
    "virtio_console": "virtio_ring",
    "fuse": "",
    "virtiofs": "fuse,virtio_ring",
    "overlay": "",
}


def test_modules_come_after_what_they_need(recipe: ModuleType, tmp_path: Path) -> None:
    make_deb(tmp_path / "linux-image-6.0.deb", MODULES)
    order = recipe.Kernel(tmp_path / "linux-image-6.0.deb").load_order(recipe.MODULES)
    assert sorted(order) == sorted(MODULES)
    for name, depends in MODULES.items():
        assert all(order.index(word) < order.index(name) for word in depends.split(",") if word)


def test_what_the_kernel_has_built_in_needs_no_file(recipe: ModuleType, tmp_path: Path) -> None:
    builtin = "kernel/fs/fuse/fuse.ko\nkernel/drivers/virtio/virtio-ring.ko\nkernel/drivers/virtio/virtio.ko\n"
    there = {name: depends for name, depends in MODULES.items() if name not in ("fuse", "virtio", "virtio_ring")}
    make_deb(tmp_path / "linux-image-6.0.deb", there, builtin)
    order = recipe.Kernel(tmp_path / "linux-image-6.0.deb").load_order(recipe.MODULES)
    assert sorted(order) == sorted(there)


def test_a_missing_module_and_a_missing_kernel_are_named(recipe: ModuleType, tmp_path: Path) -> None:
    make_deb(tmp_path / "linux-image-6.0.deb", {"virtio": ""})
    with pytest.raises(recipe.BuildError, match="no module virtio_pci"):
        recipe.Kernel(tmp_path / "linux-image-6.0.deb").load_order(recipe.MODULES)
    (tmp_path / "other").mkdir()
    make_deb(tmp_path / "other" / "x.deb", {}, kernel=False)
    with pytest.raises(recipe.BuildError, match="no kernel image inside"):
        recipe.Kernel(tmp_path / "other" / "x.deb")


def test_the_archive_is_newc(recipe: ModuleType) -> None:
    cpio = recipe.Cpio()
    cpio.add("dev", stat.S_IFDIR | 0o755)
    cpio.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    cpio.add("init", stat.S_IFREG | 0o755, b"12345")
    archive = cpio.finish()
    # busybox reads it with a parser of its own
    listed = subprocess.run(["busybox", "cpio", "-itv"], input=archive, capture_output=True, check=True).stdout.decode()
    lines = [line.split() for line in listed.splitlines()]
    assert [(line[0], line[-1]) for line in lines] == [
        ("drwxr-xr-x", "dev"),
        ("crw-------", "dev/console"),
        ("-rwxr-xr-x", "init"),
    ]
    assert lines[2][2] == "5" and len(archive) % 4 == 0


def test_it_builds_once_and_again_when_an_input_changes(tmp_path: Path) -> None:
    """With the real init.c and a made-up kernel that is there already: nothing is downloaded."""
    scratch = tmp_path / "deb"
    scratch.mkdir()
    make_deb(scratch / "linux-image-6.0_1_amd64.deb", MODULES)
    output = tmp_path / "guest"
    output.mkdir()
    (scratch / "linux-image-6.0_1_amd64.deb").rename(output / "linux-image-6.0_1_amd64.deb")

    def build() -> str:
        done = subprocess.run([sys.executable, BUILD, "--output", output], capture_output=True, text=True, check=True)
        return done.stdout

    assert "built in" in build()
    made = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert set(made) == {
        "vmlinuz",
        "initramfs.cpio",
        "initramfs-busybox.cpio",
        "guest.json",
        "linux-image-6.0_1_amd64.deb",
    }
    assert "is up to date" in build()
    assert made == {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    record = json.loads((output / "guest.json").read_text())
    (output / "guest.json").write_text(json.dumps({**record, "init": "another"}))
    assert "built in" in build()


def test_without_a_tool_it_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, BUILD, "--output", tmp_path],
        capture_output=True,
        text=True,
        env={"PATH": "/no/such"},
        check=False,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "apt-cache is not installed" in done.stderr
