"""One image, one registry and its conversions for all system tests."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tree_listing
from tests.peers.registry import LocalRegistry
from tests.system.daemon import ServedImage
from tests.system.guest_tree import Record
from tests.system.image import SMALL_CHUNK_BYTES, make_image, unpack_image

CODECS = ("zstd", "lz4_block", "none")
DIGESTERS = ("blake3", "sha256")


@pytest.fixture(scope="session")
def oci_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """umoci's name of the OCI image, DIRECTORY:TAG."""
    if os.geteuid() != 0:
        pytest.skip("umoci restores owners and device nodes as root alone")
    return make_image(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="session")
def unpacked(oci_image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What umoci unpacks of it: what is right. But an xattr without a value, which containerd and GNU tar keep."""
    root = unpack_image(oci_image, tmp_path_factory.mktemp("unpacked") / "bundle")
    os.setxattr(root / "usr/lib/attributes", "user.no-value", b"")
    return root


@pytest.fixture(scope="session")
def expected_tree(unpacked: Path) -> list[Record]:
    """The records of that tree."""
    return list(tree_listing.list_tree(unpacked))


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRegistry]:
    """Tests that stop it or damage its blobs make their own."""
    with LocalRegistry(tmp_path_factory.mktemp("registry")) as server:
        yield server


class Converter:
    """Converts the image into a registry, once for each set of options."""

    def __init__(self, oci_image: str, registry: LocalRegistry, cache_dir: Path) -> None:
        self.oci_image, self.registry, self.cache_dir = oci_image, registry, cache_dir
        self._made: dict[str, ServedImage] = {}

    def convert(
        self, codec: str = "zstd", digester: str = "blake3", chunk_bytes: int = SMALL_CHUNK_BYTES, batch_bytes: int = 0
    ) -> ServedImage:
        name = f"nasty-{codec.replace('_', '-')}-{digester}-{chunk_bytes}-{batch_bytes}"
        if name not in self._made:
            reference = f"docker://{self.registry.host}/{name}:v1"
            run_verb(
                "convert",
                f"oci:{self.oci_image}",
                reference,
                "--compressor",
                codec,
                "--digester",
                digester,
                "--chunk-size",
                str(chunk_bytes),
                "--batch-size",
                str(batch_bytes),
            )
            self._made[name] = resolve(reference, self.cache_dir)
        return self._made[name]


def run_verb(*words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a verb of the command line; it must end with that status."""
    done = subprocess.run(
        [sys.executable, "-m", "virtiofsd_nydus.cli.main", *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status, f"{' '.join(words)}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def resolve(reference: str, cache_dir: Path) -> ServedImage:
    from virtiofsd_nydus.oci.image import resolve_image

    found = resolve_image(reference, cache_dir=cache_dir)
    backend = found.backend_config()
    return ServedImage(found.bootstrap, backend["type"], backend["config"], dict(found.blobs))


@pytest.fixture(scope="session")
def converter(oci_image: str, registry: LocalRegistry, tmp_path_factory: pytest.TempPathFactory) -> Converter:
    return Converter(oci_image, registry, tmp_path_factory.mktemp("bootstraps"))


@pytest.fixture
def image(converter: Converter) -> ServedImage:
    """The image as most tests need it: zstd, blake3, chunks of 64 KiB, in the shared registry."""
    return converter.convert()
