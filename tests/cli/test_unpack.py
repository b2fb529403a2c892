"""`unpack`: the tar extracts to the tree that umoci makes of the OCI image; failures are one line and leave no tar."""

import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests import tree_listing
from tests.system.conftest import Converter, converter, expected_tree, oci_image, registry, unpacked  # noqa: F401 - fixtures
from tests.system.guest_tree import Record, differences
from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.cli.build import build_image
from virtiofsd_nydus.cli.main import main

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")


def test_the_tar_extracts_to_the_tree_of_the_oci_image(
    converter: Converter, expected_tree: list[Record], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """By way of a configuration as the daemon takes it, from the registry, through a pipe."""
    image = converter.convert()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "device": {"backend": {"type": image.backend_type, "config": image.backend_config},
                   "cache": {"type": "blobcache", "config": {"work_dir": str(tmp_path)}}},
    }))  # fmt: skip
    (tmp_path / "root").mkdir()
    words = ["unpack", str(image.bootstrap), "--config", str(config), "--output", "-"]
    with subprocess.Popen([sys.executable, "-m", "virtiofsd_nydus.cli.main", *words], stdout=subprocess.PIPE) as source:
        subprocess.run(
            ["tar", "--extract", "--file=-", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-permissions",
             "-C", str(tmp_path / "root")],
            stdin=source.stdout, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
    assert source.returncode == 0
    assert differences(expected_tree, list(tree_listing.list_tree(tmp_path / "root"))) == []


@pytest.fixture
def image(tmp_path: Path) -> tuple[Path, Path]:
    """Bootstrap and blob directory of a small directory with a socket and a file with holes."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"file " * 30_000)
    with (source / "holes").open("wb") as out:
        out.seek(3 << 20)
        out.write(b"end")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "socket"))
    build_image(source, tmp_path / "boot", tmp_path / "blobs", BuildOptions(chunk_size=65536))
    return tmp_path / "boot", tmp_path / "blobs"


def test_sockets_are_left_out_and_told(
    image: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["unpack", str(image[0]), "--blob-dir", str(image[1]), "--output", str(tmp_path / "tar")]) == 0
    assert capsys.readouterr().err == "/socket: a socket, which a tar cannot hold, is left out\n"
    with tarfile.open(tmp_path / "tar") as tar:
        assert tar.getnames() == [".", "./file", "./holes"]
        extracted = tar.extractfile("./holes")
        assert extracted is not None and extracted.read() == bytes(3 << 20) + b"end"


def test_damage_is_one_failure_and_leaves_no_tar(
    image: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (blob,) = image[1].iterdir()
    content = bytearray(blob.read_bytes())
    content[10] ^= 1
    blob.write_bytes(content)
    assert main(["unpack", str(image[0]), "--blob-dir", str(image[1]), "--output", str(tmp_path / "tar")]) == 1
    assert "/file cannot be read" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blobs", "boot", "source"]


@pytest.mark.parametrize(("words", "line"), [
    ([], "either --blob-dir or --config"), (["--blob-dir", "/absent"], "no such directory"),
    (["--config", "/absent"], "cannot read configuration"),
])  # fmt: skip
def test_wrong_usage(image: tuple[Path, Path], words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unpack", str(image[0]), "--output", "/dev/null", *words]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


# ---- inspect


def test_inspect_tells_what_the_bootstrap_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    (source / "etc").mkdir(parents=True)
    (source / "etc/file").write_bytes(os.urandom(100_000))
    (source / "link").symlink_to("etc/file")
    os.setxattr(source / "etc/file", "user.note", b"\1\2")
    options = BuildOptions(chunk_size=65536, prefetch_policy="fs", prefetch_patterns=("/etc", "/absent"))
    result = build_image(source, tmp_path / "boot", tmp_path / "blobs", options)
    assert main(["inspect", str(tmp_path / "boot"), "--json", "--tree"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["superblock"]["fs_version"] == 6 and told["superblock"]["chunk_size_bytes"] == 65536
    assert "compression_zstd" in told["superblock"]["flag_names"]
    (blob,) = told["blobs"]
    assert [blob["id"]] == result["blobs"] and blob["chunk_count"] == 2 and "has_toc" in blob["feature_names"]
    assert [one["path"] for one in told["prefetch"]] == ["/etc"]
    assert [one["path"] for one in told["tree"]] == ["/", "/etc", "/link", "/etc/file"]
    assert told["tree"][2]["target"] == "etc/file"
    assert main(["inspect", str(tmp_path / "boot"), "--file", "/etc/file", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["xattrs"] == {"user.note": "0102"}
    assert [(one["file_off"], one["usize_bytes"]) for one in entry["chunks"]] == [(0, 65536), (65536, 34464)]
    assert all(len(one["digest"]) == 64 for one in entry["chunks"])
    for words in ([], ["--tree"], ["--file", "/etc/file"], ["--file", "/etc"]):
        assert main(["inspect", str(tmp_path / "boot"), *words]) == 0
        assert capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "boot"), "--file", "/etc/absent"]) == 1
    assert "no /etc/absent in the image" in capsys.readouterr().err


def test_inspect_knows_v5_and_blobs_with_a_bootstrap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x" * 5000)
    build_image(source, tmp_path / "boot5", tmp_path / "blobs5", BuildOptions(fs_version=5))
    assert main(["inspect", str(tmp_path / "boot5")]) == 0
    assert capsys.readouterr().out.startswith("RAFS v5, 2 inodes")
    build_image(source, tmp_path / "boot6", tmp_path / "blobs6", BuildOptions())
    (blob,) = (tmp_path / "blobs6").iterdir()
    assert main(["inspect", str(blob), "--blob-id", blob.name]) == 0
    assert blob.name in capsys.readouterr().out
