"""What a guest sees of an image is what unpacking the same image gives: names, bytes, modes, owners, times, links,
device numbers and extended attributes of every entry. The judge is `umoci unpack`; the image is the demo's.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.conftest import run_tool
from virtiofsd_nydus.vmm.guest import Deadline
from virtiofsd_nydus.vmm.image import WantedImage, prepare_image
from virtiofsd_nydus.vmm.qemu import GuestFiles, Machine, MachineConfig, Share
from virtiofsd_nydus.vmm.servers import NydusDaemon

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]
LISTING = Path(__file__).parents[1] / "tree_listing.py"
# Python hashing 215 MB and asking 10,600 entries for everything, under TCG
WALK_SECONDS = 400


@pytest.fixture(scope="module")
def unpacked(demo_image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.geteuid() != 0:
        pytest.skip("unpacking owners and device nodes needs root")
    bundle = tmp_path_factory.mktemp("unpacked") / "bundle"
    run_tool("umoci", "unpack", "--image", demo_image.removeprefix("oci:"), bundle)
    return bundle / "rootfs"


@pytest.fixture(scope="module")
def daemon(nydus_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NydusDaemon]:
    cache = tmp_path_factory.mktemp("cache")
    with (
        prepare_image(WantedImage(nydus_image, cache_dir=cache)) as prepared,
        NydusDaemon(prepared.daemon_options) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def booted(guest_files: GuestFiles, daemon: NydusDaemon) -> Iterator[Machine]:
    """The image as it is, no overlay, no /proc and /dev in it."""
    with Machine(
        MachineConfig(guest_files, [Share(daemon.socket_path)], watches={daemon.pidfd: daemon.explain_end})
    ) as machine:
        deadline = Deadline(60, "the boot")
        machine.guest.wait_hello(deadline)
        machine.guest.mount("vfs", deadline, overlay=False, special=False)
        yield machine


def parse(text: str) -> dict[str, dict[str, object]]:
    records = [json.loads(line) for line in text.splitlines()]
    return {record["path"]: record for record in records}


def test_every_entry_of_the_image_is_what_unpacking_gives(booted: Machine, unpacked: Path) -> None:
    expected = parse(run_tool(sys.executable, LISTING, unpacked))
    job = booted.guest.run(["python3", "-c", LISTING.read_text(), "/"], Deadline(WALK_SECONDS, "the walk in the guest"))
    assert job.status == 0, job.stderr.decode(errors="replace")
    seen = parse(job.text)
    assert len(expected) > 9000 and expected["demo/original"]["nlink"] == 3
    assert sorted(seen) == sorted(expected)
    different = {path: (seen[path], expected[path]) for path in expected if seen[path] != expected[path]}
    assert not different, list(different.items())[:5]


def test_programs_of_the_image_run(booted: Machine, deadline: Deadline) -> None:
    python = booted.guest.run(["python3", "-c", "import json, ssl, sqlite3; print('imported')"], deadline)
    assert (python.text, python.status) == ("imported\n", 0)
    listing = booted.guest.run(["dpkg", "-l"], deadline)
    assert listing.status == 0 and "python3-minimal" in listing.text


def test_an_image_is_read_only(booted: Machine, deadline: Deadline) -> None:
    job = booted.guest.run(["sh", "-c", "echo x > /demo/hello.txt"], deadline)
    assert job.status != 0 and b"Read-only file system" in job.stderr


def test_reading_again_fetches_nothing(booted: Machine, daemon: NydusDaemon, deadline: Deadline) -> None:
    booted.guest.run(["sha256sum", "/demo/noise"], deadline)
    before = daemon.stats()["engine"]["fetched_bytes"]
    booted.guest.run(["sh", "-c", "sha256sum /demo/noise /usr/bin/python3"], deadline)
    assert daemon.stats()["engine"]["fetched_bytes"] == before
