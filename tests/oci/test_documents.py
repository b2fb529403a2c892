"""Manifests, indexes, layouts and docker archives made by others: every fault is one line, never a traceback."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.oci.conftest import LAYERS, write_image
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.docker_archive import DockerArchiveStore
from virtiofsd_nydus.oci.layout import LayoutStore
from virtiofsd_nydus.oci.manifest import Descriptor, Platform, digest_of, parse_index, parse_manifest
from virtiofsd_nydus.oci.store import VerifiedReader, find_manifest

DIGEST = "sha256:" + "0a" * 32
GOOD = {"mediaType": "x", "digest": DIGEST, "size": 5}
LINUX = Platform("linux", "amd64")


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "x",
        5,
        {},
        {"schemaVersion": 1},
        {"schemaVersion": 2},
        {"schemaVersion": 2, "layers": []},
        {"schemaVersion": 2, "layers": {}, "config": GOOD},
        {"schemaVersion": 2, "layers": [], "config": 5},
        {"schemaVersion": 2, "layers": [], "config": {**GOOD, "size": -1}},
        {"schemaVersion": 2, "layers": [], "config": {**GOOD, "size": "5"}},
        {"schemaVersion": 2, "layers": [], "config": {**GOOD, "size": True}},
        {"schemaVersion": 2, "layers": [], "config": {**GOOD, "digest": "sha256:../../etc/passwd"}},
        {"schemaVersion": 2, "layers": [], "config": {**GOOD, "digest": DIGEST.upper()}},
        {"schemaVersion": 2, "layers": [{**GOOD, "annotations": {"a": 1}}], "config": GOOD},
        {"schemaVersion": 2, "layers": [None], "config": GOOD},
    ],
)
def test_manifests_that_are_none(value: object) -> None:
    data = json.dumps(value).encode()
    with pytest.raises(Failure, match="image X") as caught:
        parse_manifest(data, Descriptor("", digest_of(data), len(data)), "image X")
    assert caught.value.cause is Cause.FORMAT


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b'{"manifests": 5}', b'{"manifests": [5]}']
)
def test_indexes_that_are_none(data: bytes) -> None:
    with pytest.raises(Failure):
        parse_index(data, "index X")


def test_an_index_that_names_itself_ends(tmp_path: Path) -> None:
    class Store:
        name = "loop"

        def get_manifest(self, version: str) -> tuple[bytes, str]:
            return json.dumps(
                {"manifests": [{**GOOD, "platform": {"os": "linux", "architecture": "amd64"}}]}
            ).encode(), "application/vnd.oci.image.index.v1+json"

    with pytest.raises(Failure):
        find_manifest(Store(), "t", LINUX, nydus=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pieces", "right"),
    [([b"ab", b"", b"cde"], True), ([b"abcd"], False), ([b"abcde", b"f"], False), ([b"abcdx"], False), ([], False)],
)
def test_verified_reader(pieces: list[bytes], right: bool) -> None:
    told: list[int] = []
    descriptor = Descriptor("", digest_of(b"abcde"), 5)
    reader = VerifiedReader(iter([memoryview(piece) for piece in pieces]), descriptor, "blob X", told.append)
    if right:
        assert (reader.read(3), reader.read(9), reader.read(9)) == (b"ab", b"cde", b"")
        reader.finish()
        assert sum(told) == 5
    else:
        with pytest.raises(Failure, match="blob X") as caught:
            reader.readall()
        assert caught.value.cause is Cause.DIGEST


def test_layout_faults(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    digest = write_image(layout, LAYERS[1:2])
    store = LayoutStore(layout)
    assert digest_of(store.get_manifest("")[0]) == digest_of(store.get_manifest("t")[0]) == digest
    with pytest.raises(Failure, match="tags there: t"):
        store.get_manifest("u")
    write_image(layout, LAYERS[2:], tag="u")
    with pytest.raises(Failure, match=r"holds 2 images.*: t, u"):
        store.get_manifest("")
    file = layout / "blobs/sha256" / digest[7:]
    data = file.read_bytes()
    file.write_bytes(data.replace(b"kept", b"bent"))
    with pytest.raises(Failure, match="damaged") as caught:
        store.get_manifest("t")
    assert caught.value.cause is Cause.DIGEST
    file.unlink()
    with pytest.raises(Failure, match="missing") as caught:
        store.get_manifest("t")
    assert caught.value.cause is Cause.MISSING
    for text in ("", "[]", '{"manifests": 1}', '{"manifests": [1]}'):
        (layout / "index.json").write_text(text)
        with pytest.raises(Failure) as caught:
            store.get_manifest("t")
        assert caught.value.cause is Cause.FORMAT


def make_archive(path: Path, members: dict[str, bytes | str]) -> DockerArchiveStore:
    """bytes: a file; str: a symbolic link."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return DockerArchiveStore(path)


def test_docker_archive_with_linked_layers(tmp_path: Path) -> None:
    """As docker before 25 wrote it: a directory a layer, layers that occur twice are links."""
    store = make_archive(
        tmp_path / "a.tar",
        {
            "one/layer.tar": LAYERS[1],
            "two/layer.tar": "../one/layer.tar",
            "c.json": b'{"os":"linux"}',
            "manifest.json": json.dumps(
                [{"Config": "c.json", "RepoTags": ["x:y"], "Layers": ["one/layer.tar", "two/layer.tar"]}]
            ).encode(),
        },
    )
    manifest = find_manifest(store, "", LINUX, nydus=False)
    assert [one.digest for one in manifest.layers] == [digest_of(LAYERS[1])] * 2
    for descriptor, data in ((manifest.layers[1], LAYERS[1]), (manifest.config, b'{"os":"linux"}')):
        assert VerifiedReader(store.read_blob(descriptor), descriptor, "x").readall() == data


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"manifest.json": b"{"},
        {"manifest.json": b"[]"},
        {"manifest.json": b"[{},{}]"},
        {"manifest.json": b"[5]"},
        {"manifest.json": b'[{"Config":"c","Layers":["l"]}]'},
        {"manifest.json": b'[{"Config":"c","Layers":5}]', "c": b""},
        {"manifest.json": b'[{"Config":"c","Layers":["l"]}]', "c": b"", "l": "l"},
        {"manifest.json": "c", "c": "manifest.json"},
    ],
)
def test_docker_archives_that_are_none(tmp_path: Path, members: dict) -> None:
    with pytest.raises(Failure, match=r"a\.tar") as caught:
        make_archive(tmp_path / "a.tar", members).get_manifest("")
    assert caught.value.cause is Cause.FORMAT
