"""Backend localfs: ranges, alternative directories, and what a missing or short file says."""

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
    assert read(backend, BLOB, 1234, 700_001) == DATA[1234:1234 + 700_001]
    assert read(backend, BLOB, 5, 0) == b""
    assert backend.blob_size(BLOB) == len(DATA)
    assert max(len(piece) for piece in backend.read_range(BLOB, 0, len(DATA))) <= 1 << 20
    backend.close()


def test_alt_dirs_and_blob_file(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / BLOB).write_bytes(DATA)
    backend = create_backend("localfs", {"dir": str(tmp_path), "alt_dirs": [
        str(tmp_path / "none"), str(tmp_path / "other")]})
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


@pytest.mark.parametrize("blob_id", ["../etc/passwd", "a/b", "", ".", "x" * 65, "a\0b"])
def test_blob_id_stays_in_the_directory(tmp_path: Path, blob_id: str) -> None:
    backend = create_backend("localfs", {"dir": str(tmp_path / "inner")})
    with pytest.raises(Failure, match="blob id") as caught:
        read(backend, blob_id, 0, 1)
    assert caught.value.cause is Cause.FORMAT
