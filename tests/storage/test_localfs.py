"""Backend localfs: ranges, alternative directories, and what a missing or short file says."""

import os
import subprocess
from pathlib import Path

import pytest

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.storage.factory import create_backend

DATA = bytes(range(256)) * 5000
BLOB = "ab" * 32


def read(backend, *args):
    return b"".join(bytes(piece) for piece in backend.read_range(*args))


def test_read_range(tmp_path: Path) -> None:
    (tmp_path / BLOB).write_bytes(DATA)
    backend = create_backend("localfs", {"dir": str(tmp_path)})
    assert read(backend, BLOB, 0, len(DATA)) == DATA
    assert read(backend, BLOB, 1234, 700_001) == DATA[1234 : 1234 + 700_001]
    assert read(backend, BLOB, 5, 0) == b""
    assert backend.blob_size(BLOB) == len(DATA)
    assert max(len(piece) for piece in backend.read_range(BLOB, 0, len(DATA))) <= 1 << 20
    backend.close()


def test_alt_dirs_and_blob_file(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / BLOB).write_bytes(DATA)
    backend = create_backend(
        "localfs", {"dir": str(tmp_path), "alt_dirs": [str(tmp_path / "none"), str(tmp_path / "other")]}
    )
    assert read(backend, BLOB, 7, 9) == DATA[7:16]
    backend = create_backend("localfs", {"blob_file": str(tmp_path / "other" / BLOB)})
    assert read(backend, "whatever", 7, 9) == DATA[7:16]


def test_missing_blob_names_the_path(tmp_path: Path) -> None:
    backend = create_backend("localfs", {"dir": str(tmp_path)})
    with pytest.raises(Failure, match=str(tmp_path / BLOB)) as caught:
        read(backend, BLOB, 0, 1)
    assert caught.value.cause is Cause.MISSING


def test_short_blob_is_not_a_network_failure(tmp_path: Path) -> None:
    (tmp_path / BLOB).write_bytes(DATA[:100])
    backend = create_backend("localfs", {"dir": str(tmp_path)})
    with pytest.raises(Failure, match="has 100 bytes") as caught:
        read(backend, BLOB, 50, 100)
    assert caught.value.cause is Cause.FORMAT


def test_a_file_that_was_replaced_is_opened_anew(tmp_path: Path) -> None:
    """It is kept open as long as it serves: what was copied only in part may be replaced by the whole."""
    (tmp_path / BLOB).write_bytes(DATA[:100])
    backend = create_backend("localfs", {"dir": str(tmp_path)})
    assert read(backend, BLOB, 0, 50) == DATA[:50]
    with pytest.raises(Failure, match="has 100 bytes"):
        read(backend, BLOB, 50, 100)
    (tmp_path / "new").write_bytes(DATA)
    pieces = backend.read_range(BLOB, 0, len(DATA))
    first = bytes(next(pieces))
    (tmp_path / "new").rename(tmp_path / BLOB)
    assert first + b"".join(bytes(piece) for piece in pieces) == DATA  # in the middle of a range, too
    assert read(backend, BLOB, 50, 100) == DATA[50:150]
    (tmp_path / BLOB).unlink()
    assert read(backend, BLOB, 0, 10) == DATA[:10]  # still open
    with pytest.raises(Failure, match="no blob file"):
        read(backend, BLOB, 0, len(DATA) + 1)
    backend.close()


@pytest.mark.parametrize("blob_id", ["../etc/passwd", "a/b", "", ".", "x" * 65, "a\0b"])
def test_blob_id_stays_in_the_directory(tmp_path: Path, blob_id: str) -> None:
    backend = create_backend("localfs", {"dir": str(tmp_path / "inner")})
    with pytest.raises(Failure, match="blob id") as caught:
        read(backend, blob_id, 0, 1)
    assert caught.value.cause is Cause.FORMAT


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_mounted_directory_that_goes_and_comes_back(tmp_path: Path) -> None:
    """As a NAS does: blobs are missing while it is away, and there again afterwards; an open file is read on."""
    nas, data = tmp_path / "nas", tmp_path / "data"
    nas.mkdir()
    data.mkdir()
    (data / BLOB).write_bytes(DATA)
    backend = create_backend("localfs", {"dir": str(nas)})

    def mount() -> None:
        subprocess.run(["mount", "--bind", str(data), str(nas)], check=True)

    def umount() -> None:
        subprocess.run(["umount", "-l", str(nas)], check=True)

    mount()
    try:
        assert read(backend, BLOB, 100, 5000) == DATA[100:5100]
        pieces = backend.read_range(BLOB, 0, len(DATA))
        first = bytes(next(pieces))
        umount()
        assert first + b"".join(bytes(piece) for piece in pieces) == DATA
    finally:
        subprocess.run(["umount", "-l", str(nas)], check=False, stderr=subprocess.DEVNULL)
    backend.close()
    backend = create_backend("localfs", {"dir": str(nas)})
    with pytest.raises(Failure, match="no blob file") as caught:
        read(backend, BLOB, 0, 10)
    assert caught.value.cause is Cause.MISSING
    mount()
    try:
        assert read(backend, BLOB, 0, len(DATA)) == DATA
    finally:
        backend.close()
        umount()
