"""Containers as Kata starts them, in a real guest: both runtimes' layouts, two containers on one daemon, and what the
overlay leaves in the host's upper directory."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.kata.conftest import CLI, ROOT, launch
from tests.vmm.conftest import BUSYBOX

APPLETS = (
    "sh",
    "cat",
    "echo",
    "rm",
    "mv",
    "mkdir",
    "mknod",
    "ln",
    "ls",
    "touch",
    "dd",
    "sha256sum",
    "chmod",
    "stat",
    "test",
    "sync",
    "seq",
    "cp",
)
# Every step ends the command where it goes wrong
SCRIPT = """
cat /etc/hostname; test "$(cat /etc/resolv.conf)" = "nameserver 127.0.0.1"
test "$(cat /etc/hosts | grep -c localhost)" = 1; ! rm /etc/hosts 2>/dev/null
echo more >> /etc/conf; test "$(cat /etc/conf)" = "hello
more"
rm /d/gone; test ! -e /d/gone
mv /etc/conf /etc/moved; cat /etc/moved > /dev/null
rm -r /opaque; mkdir /opaque; test -z "$(ls -A /opaque)"; touch /opaque/new
mknod /node c 1 3; echo into > /node
ln -s /etc/moved /link; ln /etc/moved /hard; test "$(cat /link)" = "$(cat /hard)"
dd if=/dev/zero of=/big bs=1M count=20 conv=fsync 2>/dev/null; dd if=/big of=/copy bs=64k 2>/dev/null
test "$(sha256sum < /big)" = "$(sha256sum < /copy)"; rm /copy
cp /large /large2; echo x >> /large; test "$(sha256sum < /large)" != "$(sha256sum < /large2)"
mkdir /many; for i in $(seq 200); do echo $i > /many/f$i; done; test "$(ls /many | cat | grep -c f)" = 200 || exit 9
chmod 4755 /big; stat -c %a /big
sync
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("kata")
    tree = base / "tree"
    for name in ("bin", "etc", "d", "opaque", "out"):
        (tree / name if name != "out" else base / name).mkdir(parents=True)
    (tree / "bin" / "busybox").write_bytes(BUSYBOX.read_bytes())
    (tree / "bin" / "busybox").chmod(0o755)
    for applet in (*APPLETS, "grep"):
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "etc" / "conf").write_text("hello\n")
    (tree / "d" / "gone").write_text("gone\n")
    (tree / "opaque" / "below").write_text("below\n")
    (tree / "large").write_bytes(os.urandom(3 << 20))
    words = ["build", tree, "--bootstrap", base / "out" / "image.boot", "--blob-dir", base / "out"]
    subprocess.run([*CLI, *map(str, words)], check=True, cwd=ROOT, capture_output=True)
    return base / "out"


@pytest.mark.guest
@pytest.mark.parametrize("layout", ["go", "rs"])
def test_two_containers(image: Path, tmp_path: Path, layout: str) -> None:
    keep = tmp_path / "uppers"
    done = launch(image, tmp_path, layout, keep, SCRIPT, "--add-memory", "256")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["c1", "4755", "c2", "4755"]
    assert "256 MiB more memory" in done.stderr
    for cid in ("c1", "c2"):
        upper = keep / cid / "fs"
        whiteout = (upper / "d" / "gone").lstat()
        assert stat.S_ISCHR(whiteout.st_mode) and whiteout.st_rdev == 0
        assert os.getxattr(upper / "opaque", "trusted.overlay.opaque") == b"y"
        assert (upper / "etc" / "moved").read_text() == "hello\nmore\n"
        assert stat.S_ISCHR((upper / "etc" / "conf").lstat().st_mode)
        assert (upper / "etc" / "moved").stat().st_ino == (upper / "hard").stat().st_ino
        assert (upper / "link").readlink() == Path("/etc/moved")
        assert os.major((upper / "node").stat().st_rdev) == 1
        assert (upper / "big").stat().st_size == 20 << 20
        assert (upper / "large").stat().st_size == (3 << 20) + 2
        assert len(list((upper / "many").iterdir())) == 200
