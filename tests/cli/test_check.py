"""`check`: one line and exit 1 for each thing that is wrong with an image."""

import json
import time
from pathlib import Path

import pytest

from tests.peers.faulty_server import FaultyServer
from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.cli.build import build_image
from virtiofsd_nydus.cli.main import main
from virtiofsd_nydus.reader import data


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    top = tmp_path_factory.mktemp("check")
    (top / "source").mkdir()
    (top / "source" / "first").write_bytes(b"first file " * 20_000)
    (top / "source" / "second").write_bytes(bytes(range(251)) * 1000)
    build_image(top / "source", top / "image.boot", top / "blobs", BuildOptions(compressor="none", chunk_size=65536))
    return top / "image.boot", top / "blobs"


def copy_damaged(image: tuple[Path, Path], to: Path, offset: int) -> Path:
    (blob,) = image[1].iterdir()
    to.mkdir()
    content = bytearray(blob.read_bytes())
    content[offset] ^= 1
    (to / blob.name).write_bytes(content)
    return to


def test_sound(image: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(image[0])]) == 0
    assert capsys.readouterr().out == "RAFS v6: 3 names, 3 inodes, 1 blobs: sound\n"
    assert main(["check", str(image[0]), "--blob-dir", str(image[1])]) == 0
    assert "471000 bytes verified: sound" in capsys.readouterr().out
    assert main(["check", str(image[0]), "--blob-dir", str(image[1]), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["bytes"], report["chunks"], report["faults"]) == (471_000, 8, [])


def test_flipped_byte(image: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blobs = copy_damaged(image, tmp_path / "blobs", 100_000)
    assert main(["check", str(image[0]), "--blob-dir", str(blobs)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith(str(image[0]))]
    assert len(lines) == 1
    assert "/first: bytes from" in lines[0]
    assert "wrong bytes" in err


def test_blobs_of_a_configuration(image: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "version": 2,
        "backend": {"type": "localfs", "localfs": {"dir": str(image[1])}},
        "cache": {"type": "blobcache", "filecache": {"work_dir": str(tmp_path)}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["check", str(image[0]), "--config", str(tmp_path / "config.json")]) == 0
    assert "471000 bytes verified: sound" in capsys.readouterr().out
    config["backend"]["localfs"]["dir"] = str(copy_damaged(image, tmp_path / "blobs", 100_000))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["check", str(image[0]), "--config", str(tmp_path / "config.json")]) == 1


def test_missing_blob_is_one_line(image: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (blob,) = image[1].iterdir()
    assert main(["check", str(image[0]), "--blob-dir", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert blob.name in line


def test_no_such_directory_is_usage(image: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(image[0]), "--blob-dir", "/nonexistent"]) == 2
    assert "no such directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "not a RAFS bootstrap"),
        (b"text\n" * 5000, "not a RAFS bootstrap"),
        (None, "cannot be opened"),
    ],
)
def test_not_an_image(tmp_path: Path, content: bytes | None, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    assert main(["check", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert str(path) in line


def test_structure_faults(image: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray(image[0].read_bytes())
    at = content.index(b"first")
    content[at : at + 5] = b"zirst"
    (tmp_path / "boot").write_bytes(content)
    assert main(["check", str(tmp_path / "boot")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "ascending order" in line


def test_a_source_that_gives_nothing_is_told_soon(
    image: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest waits for half a minute; a person is told soon that the server answers every request with 503."""
    monkeypatch.setattr(data, "PATIENCE_S", 0.2)
    (blob,) = image[1].iterdir()
    with FaultyServer({blob.name: blob.read_bytes()}) as server:
        server.inject("status", status=503, times=-1)
        config = {
            "version": 2,
            "backend": {"type": "registry", "registry": {"scheme": "http", "host": server.host, "repo": "a/b"}},
            "cache": {"type": "blobcache", "filecache": {"work_dir": str(tmp_path)}},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        began = time.monotonic()
        assert main(["check", str(image[0]), "--config", str(tmp_path / "config.json")]) == 1
    assert time.monotonic() - began < 20.0  # the read deadline is 30 s
    assert "503" in capsys.readouterr().err
