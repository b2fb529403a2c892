"""Images for the tests of the blob store, and what serves them."""

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.cli.build import build_image

CHUNK_BYTES = 64 * 1024
FILES = 12


class Image:
    """A small built image: paths of bootstrap and blob directory, and the files' bytes by name."""

    def __init__(self, directory: Path, compressor: str, digester: str) -> None:
        self.blob_dir = directory / "blobs"
        self.bootstrap = directory / "image.boot"
        source = directory / "source"
        source.mkdir()
        random = Random(f"{compressor} {digester}")
        words = [random.randbytes(6) for _ in range(300)]
        self.files = {
            f"file-{number:02}": b" ".join(random.choices(words, k=number * 9000 + 1)) for number in range(FILES)
        }
        for name, data in self.files.items():
            (source / name).write_bytes(data)
        build_image(
            source,
            self.bootstrap,
            self.blob_dir,
            BuildOptions(compressor=compressor, digester=digester, chunk_size=CHUNK_BYTES),
        )
        (self.blob,) = [path for path in self.blob_dir.iterdir() if not path.name.startswith(".")]


@pytest.fixture(scope="session", params=["zstd", "lz4_block", "none"])
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Chunks digested with BLAKE3, by each codec."""
    return Image(tmp_path_factory.mktemp(request.param), request.param, "blake3")


@pytest.fixture
def work_dir(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "cache"
    directory.mkdir()
    yield directory


@pytest.fixture
def samples() -> Path:
    """Images made by the real Nydus tools."""
    directory = Path(os.environ.get("NYDUS_SAMPLES") or Path(__file__).parents[2].parent / "shared/samples")
    if not (directory / "v6").is_dir():
        pytest.skip(f"no Nydus samples in {directory} (NYDUS_SAMPLES names another place)")
    return directory
