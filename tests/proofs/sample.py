"""The image of the proofs: files of random and of compressible bytes, what they hash to, and its blob."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

CHUNK_BYTES = 64 << 10


@dataclass(frozen=True)
class Sample:
    """files: name -> sha256."""

    bootstrap: Path
    blob_dir: Path
    files: dict[str, str]

    @property
    def blob(self) -> Path:
        (found,) = [path for path in self.blob_dir.iterdir() if not path.name.startswith(".")]
        return found


def make_sample(
    directory: Path, files: int = 48, file_bytes: int = 256 << 10, chunk_bytes: int = CHUNK_BYTES
) -> Sample:
    from virtiofsd_nydus.builder.options import BuildOptions
    from virtiofsd_nydus.cli.build import build_image

    random = Random("sample")
    source = directory / "source"
    source.mkdir(parents=True)
    digests = {}
    for number in range(files):
        data = random.randbytes(file_bytes)
        if number % 3 == 0:
            data = bytes(byte & 0x1F for byte in data)
        (source / f"{number:05}").write_bytes(data)
        digests[f"{number:05}"] = hashlib.sha256(data).hexdigest()
    build_image(source, directory / "image.boot", directory / "blobs", BuildOptions(chunk_size=chunk_bytes))
    (directory / "files.json").write_text(json.dumps(digests))
    return load_sample(directory)


def load_sample(directory: Path) -> Sample:
    return Sample(directory / "image.boot", directory / "blobs", json.loads((directory / "files.json").read_text()))
