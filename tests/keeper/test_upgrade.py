"""Another installed version goes on with the present state, or the old one serves on."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.keeper.conftest import Image, KeptDaemon
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest

ROUTE = "/api/ext/v1/upgrade"


def other_python(directory: Path, *, before: str = "") -> Path:
    """An interpreter at another path with this package, as another virtual environment has it. before: what makes it
    another version, run before its program."""
    program = directory / "python"
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "import runpy, virtiofsd_nydus.keeper.protocol as protocol\n"
        f"sys.executable = {str(program)!r}\n"
        f"{before}\n"
        "sys.argv = sys.argv[2:]\n"
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
    )
    program.chmod(0o755)
    return program


def check_files(guest: FakeGuest, image: Image) -> None:
    for name, data in image.files.items():
        assert guest.fuse.read_file(name) == data


def test_guest_goes_on(daemon: KeptDaemon, guest: FakeGuest, image: Image, tmp_path: Path) -> None:
    """To another installation and in place, with the guest's session, and the client gets its answer."""
    check_files(guest, image)
    nodeid = guest.fuse.walk("file3").nodeid
    python = other_python(tmp_path)
    for body in ({"python": str(python)}, None, {"python": sys.executable}):
        worker = daemon.worker
        status, answer = daemon.call("PUT", ROUTE, body)
        assert (status, answer) == (204, None)
        assert guest.fuse.read_all(nodeid) == image.files["file3"]
        daemon.await_worker(worker)
        check_files(guest, image)
        daemon.kill_worker()
        check_files(guest, image)
    assert "the worker was ended" not in daemon.log_text().split("upgraded")[0]


@pytest.mark.parametrize(
    ("before", "why"),
    [
        ("protocol.VERSION = 99", "version 99 is spoken there"),
        ("sys.exit(3)", "its program ended"),
        (
            "import virtiofsd_nydus.keeper.worker as w\n"
            "def fail(*_): raise w.Failure('it does not like this image')\n"
            "w.Worker.begin = fail",
            "it does not like this image",
        ),
        (
            "import virtiofsd_nydus.keeper.worker as w, os\nw.Worker.begin = lambda *_: os.abort()",
            "its worker died",
        ),
        (
            "import virtiofsd_nydus.vhost.device as d\nd.EngineDevice.features = staticmethod(lambda: 1 << 32)",
            "it lacks features that front-end 1 uses",
        ),
    ],
)
def test_refusals(daemon: KeptDaemon, guest: FakeGuest, image: Image, tmp_path: Path, before: str, why: str) -> None:
    """What the other version cannot do is told to the client, and the old one serves on."""
    check_files(guest, image)
    worker = daemon.worker
    status, answer = daemon.call("PUT", ROUTE, {"python": str(other_python(tmp_path, before=before))})
    assert status == 500 and why in answer["message"]
    assert daemon.worker == worker
    check_files(guest, image)
    assert why in daemon.await_line("the upgrade is refused")
    daemon.kill_worker()
    check_files(guest, image)


def test_verb(daemon: KeptDaemon, guest: FakeGuest, image: Image) -> None:
    """`upgrade` tells each daemon, and finds those of the host."""
    from virtiofsd_nydus.cli.upgrade import find_daemons

    assert daemon.api_path in find_daemons()
    done = subprocess.run(
        [sys.executable, "-m", "virtiofsd_nydus.cli.main", "upgrade", str(daemon.api_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{daemon.api_path}: upgraded\n"), done.stderr
    check_files(guest, image)
    done = subprocess.run(
        [sys.executable, "-m", "virtiofsd_nydus.cli.main", "upgrade", "/none"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stdout.startswith("/none: no answer")


def test_no_such_version(daemon: KeptDaemon) -> None:
    assert daemon.call("PUT", ROUTE, {"python": "/none/python"})[0] == 500
    assert daemon.call("PUT", ROUTE, {"python": "relative"})[0] == 400
    assert daemon.is_running()


def test_back_to_the_old_version(daemon: KeptDaemon, guest: FakeGuest, image: Image, tmp_path: Path) -> None:
    """A version that takes the mounts and then cannot go on with the devices."""
    check_files(guest, image)
    before = "import virtiofsd_nydus.keeper.worker as w, os\nw.KeptDevice.take = lambda *_: os.abort()"
    assert daemon.call("PUT", ROUTE, {"python": str(other_python(tmp_path, before=before))})[0] == 204
    check_files(guest, image)
    daemon.await_line("back to the old one")
    daemon.kill_worker()
    check_files(guest, image)


def test_without_a_keeper(image: Image) -> None:
    with KeptDaemon(["--no-keeper", *image.options]) as daemon:
        assert daemon.call("PUT", ROUTE)[0] == 501
