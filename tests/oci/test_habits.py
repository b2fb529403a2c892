"""Images and registries as they are met: media types, platforms, archives, statuses, and what must be refused."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import tarfile
from pathlib import Path

import pytest

from tests.oci.conftest import LAYERS, make_tar, write_image
from tests.peers.faulty_server import FaultyServer
from tests.peers.registry import LocalRegistry
from virtiofsd_nydus.oci import manifest as manifests
from virtiofsd_nydus.oci.layout import LayoutStore
from virtiofsd_nydus.oci.manifest import LAYER_TYPES, Platform, choose_entry, normalize_platform, parse_index
from virtiofsd_nydus.oci.store import find_manifest

pytestmark = pytest.mark.peer


# ---- media types


def retype(directory: Path, tag: str, media_types: list[str], new_tag: str) -> None:
    """The same image, its layers told as other types."""
    store = LayoutStore(directory)
    data, media_type = store.get_manifest(tag)
    value = json.loads(data)
    for layer, kind in zip(value["layers"], media_types, strict=True):
        layer["mediaType"] = kind
    store.put_manifest(json.dumps(value).encode(), media_type, new_tag)
    store.close()


@pytest.mark.parametrize("media_type", LAYER_TYPES)
def test_every_type_of_layer_is_taken_by_its_bytes(convert, tmp_path: Path, media_type: str) -> None:
    """Registries and builders tell one thing in many words; what the bytes are shows in them."""
    layout = tmp_path / "layout"
    write_image(layout, LAYERS[:1], "zstd" if media_type.endswith("zstd") else "gzip")
    plain = convert(f"oci:{layout}:t", f"oci:{tmp_path / 'plain'}:t")
    retype(layout, "t", [media_type], "u")
    told = convert(f"oci:{layout}:u", f"oci:{tmp_path / 'told'}:t")
    assert [one["blob_digest"] for one in told["layers"]] == [one["blob_digest"] for one in plain["layers"]]


def test_a_type_that_is_no_layer_is_refused(convert, tmp_path: Path) -> None:
    write_image(tmp_path / "layout", LAYERS[:1])
    retype(tmp_path / "layout", "t", ["application/vnd.in-toto+json"], "u")
    status, line = convert(f"oci:{tmp_path / 'layout'}:u", f"oci:{tmp_path / 'x'}:t")
    assert status == 1 and "not a tar that can be converted" in line


# ---- platforms


def index_of(*platforms: str) -> list[manifests.IndexEntry]:
    entries = []
    for number, text in enumerate(platforms):
        os, architecture, *variant = text.split("/")
        platform = {"os": os, "architecture": architecture, **({"variant": variant[0]} if variant else {})}
        digest = f"sha256:{number:064x}"
        entries.append({"mediaType": "m", "digest": digest, "size": 1, "platform": platform})
    return parse_index(json.dumps({"manifests": entries}).encode(), "test")


@pytest.mark.parametrize(
    ("wanted", "there", "chosen"),
    [
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64"], 1),
        ("linux/amd64", ["linux/amd64/v2", "linux/amd64/v1"], 1),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v4", "linux/amd64/v2", "linux/amd64/v3"], 3),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v4", "linux/amd64/v2"], 2),
        ("linux/arm", ["linux/arm/v5", "linux/arm/v6", "linux/arm/v7"], 2),
        ("linux/arm", ["linux/arm/v5", "linux/arm/v6"], 1),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v5"], 1),
        ("linux/arm64", ["linux/arm/v7", "linux/arm64/v8"], 1),
        ("linux/arm64/v8", ["linux/arm64"], 0),
        ("linux/arm64", ["linux/arm64/8"], 0),
        ("linux/x86_64", ["windows/amd64", "linux/amd64"], 1),
        ("linux/s390x", ["linux/amd64", "linux/s390x"], 1),
        ("linux/amd64", ["linux/amd64/odd", "linux/amd64"], 1),
    ],
)
def test_the_platform_is_chosen_as_containerd_does(wanted: str, there: list[str], chosen: int) -> None:
    platform = Platform(*wanted.split("/"))
    entry = choose_entry(index_of(*there), platform, "test", nydus=False)
    assert entry.descriptor.hex == f"{chosen:064x}"


@pytest.mark.parametrize(
    ("wanted", "there"),
    [("linux/amd64", ["linux/amd64/v3"]), ("linux/arm/v6", ["linux/arm/v7"]), ("linux/arm64", ["linux/amd64"])],
)
def test_an_image_that_cannot_run_there_is_not_chosen(wanted: str, there: list[str]) -> None:
    from virtiofsd_nydus.errors import Failure

    with pytest.raises(Failure, match=f"there are: {there[0]}"):
        choose_entry(index_of(*there), Platform(*wanted.split("/")), "test", nydus=False)


def test_variants_that_go_without_saying() -> None:
    assert normalize_platform(Platform("Linux", "aarch64", "v8")) == Platform("linux", "arm64")
    assert normalize_platform(Platform("linux", "armhf")) == Platform("linux", "arm")
    assert normalize_platform(Platform("linux", "armel")) == Platform("linux", "arm", "v6")
    assert manifests.variant_level(Platform("linux", "amd64", "v" + "9" * 5000)) == 9999


# ---- docker archives


def save(file: Path, images: dict[str, bytes], compress=lambda data: data) -> None:
    """What `docker save NAME...` writes: each image with one layer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        listed = []
        for number, (name, layer) in enumerate(images.items()):
            config = {
                "architecture": "amd64",
                "os": "linux",
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
            }
            add(f"{number}.json", json.dumps(config).encode())
            add(f"{number}/layer.tar", layer)
            listed.append({"Config": f"{number}.json", "RepoTags": [name], "Layers": [f"{number}/layer.tar"]})
        add("manifest.json", json.dumps(listed).encode())
    file.write_bytes(compress(out.getvalue()))


def zstd(data: bytes) -> bytes:
    import zstandard

    skippable = b"\x50\x2a\x4d\x18\x02\0\0\0ab"
    return (
        skippable + zstandard.ZstdCompressor().compress(data[:5000]) + zstandard.ZstdCompressor().compress(data[5000:])
    )


TWO = {"example.test/two:1": make_tar([("one", b"1", {})]), "busybox:latest": make_tar([("two", b"2", {})])}


@pytest.mark.parametrize("name", ["example.test/two:1", "busybox", "docker.io/library/busybox:latest"])
def test_one_of_several_images_by_its_name(convert, tmp_path: Path, name: str) -> None:
    save(tmp_path / "two.tar", TWO)
    result = convert(f"docker-archive:{tmp_path / 'two.tar'}:{name}", f"oci:{tmp_path / 'out'}:t", "--merge-platform")
    layer = TWO["example.test/two:1" if name.startswith("example") else "busybox:latest"]
    assert result["layers"][0]["source_digest"] == f"sha256:{hashlib.sha256(layer).hexdigest()}"


def test_an_archive_of_several_images_wants_a_name(convert, tmp_path: Path) -> None:
    save(tmp_path / "two.tar", TWO)
    for reference in ("", ":other:1"):
        status, line = convert(f"docker-archive:{tmp_path / 'two.tar'}{reference}", f"oci:{tmp_path / 'out'}:t")
        assert status == 1 and "there are: example.test/two:1, busybox:latest" in line


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd], ids=["gz", "bz2", "xz", "zst"])
def test_a_compressed_archive(convert, tmp_path: Path, compress) -> None:
    save(tmp_path / "a.tar", {"a:b": TWO["busybox:latest"]}, compress)
    assert convert(f"docker-archive:{tmp_path / 'a.tar'}", f"oci:{tmp_path / 'out'}:t")["layers"]
    whole = (tmp_path / "a.tar").read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:60] + bytes(40) + whole[100:]):
        (tmp_path / "a.tar").write_bytes(damaged)
        status, line = convert(f"docker-archive:{tmp_path / 'a.tar'}", f"oci:{tmp_path / 'out'}:u")
        assert status == 1 and line.count("\n") == 1 and "a.tar" in line


def test_an_archive_nested_too_deeply(convert, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("manifest.json")
        info.size = 200_000
        tar.addfile(info, io.BytesIO(b"[" * 200_000))
    status, line = convert(f"docker-archive:{tmp_path / 'a.tar'}", f"oci:{tmp_path / 'out'}:t")
    assert status == 1 and "not a docker archive" in line


# ---- registries


@pytest.mark.parametrize("opened", [200, 201, 202, 204])
@pytest.mark.parametrize("done", [200, 201, 202, 204])
def test_statuses_of_uploads(
    convert, image: Path, registry: LocalRegistry, opened: int, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyServer(upstream=registry.host) as front:
        front.inject("restatus", status=opened, match="POST ", times=-1)
        front.inject("restatus", status=done, match="PUT ", times=-1)
        name = f"uploads/a{opened}{done}"
        assert "layers" in convert(f"oci:{image}:t", f"docker://{front.host}/{name}:t")
    assert "layers" in convert(f"oci:{image}:t", f"docker://{registry.host}/{name}:t")


@pytest.mark.parametrize("status", [400, 405, 501])
def test_a_registry_that_serves_no_head(convert, image: Path, registry: LocalRegistry, status: int) -> None:
    with FaultyServer(upstream=registry.host) as front:
        front.inject("status", status=status, match="HEAD ", times=-1)
        name = f"heads/a{status}"
        first = convert(f"oci:{image}:t", f"docker://{front.host}/{name}:t")
        assert [one["pushed"] for one in first["layers"] if one["blob_digest"]] == [True, True]
        again = convert(f"oci:{image}:t", f"docker://{front.host}/{name}:t")
        assert [one["pushed"] for one in again["layers"] if one["blob_digest"]] == [False, False]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_documents_that_come_encoded(tmp_path: Path, image: Path, encoding: str) -> None:
    """A server that encodes manifests though none were asked for; the digest is of what they decode to."""
    import zlib

    from virtiofsd_nydus.oci.image import open_store
    from virtiofsd_nydus.oci.reference import parse_reference

    store = LayoutStore(image)
    data, media_type = store.get_manifest("t")
    store.close()
    body = gzip.compress(data) if encoding == "gzip" else zlib.compress(data)
    with FaultyServer() as server:
        headers = {"Content-Type": media_type, "Content-Encoding": encoding}
        text = body.decode("latin-1")
        server.inject("status", status=200, text=text, charset="latin-1", headers=headers, times=-1, match="manifests")
        store_of = open_store(parse_reference(f"docker://{server.host}/a/b:t"))
        assert store_of.get_manifest("t") == (data, media_type)
        store_of.close()


# ---- what must be refused


@pytest.mark.parametrize("wrong", ["content", "count"])
def test_diff_ids_are_compared(convert, tmp_path: Path, wrong: str) -> None:
    """A configuration whose diff_ids are of other layers is refused, as containerd refuses to unpack such an image."""
    layout = tmp_path / "layout"
    write_image(layout, LAYERS[:2])
    store = LayoutStore(layout)
    found = find_manifest(store, "t", Platform("linux", "amd64"), nydus=False)
    config = json.loads((layout / "blobs/sha256" / found.config.hex).read_bytes())
    ids = config["rootfs"]["diff_ids"]
    config["rootfs"]["diff_ids"] = ids[::-1] if wrong == "content" else ids[:1]
    data = json.dumps(config).encode()
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs/sha256" / digest).write_bytes(data)
    value = json.loads(store.get_manifest("t")[0])
    value["config"] |= {"digest": f"sha256:{digest}", "size": len(data)}
    store.put_manifest(json.dumps(value).encode(), value["mediaType"], "u")
    store.close()
    status, line = convert(f"oci:{layout}:u", f"oci:{tmp_path / 'out'}:t")
    assert status == 1 and "put together wrong" in line
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize("how", [[], ["--oci-ref"]])
def test_diff_ids_are_compared_however_layers_are_read(convert, tmp_path: Path, how: list[str]) -> None:
    write_image(tmp_path / "layout", LAYERS)
    assert "layers" in convert(f"oci:{tmp_path / 'layout'}:t", f"oci:{tmp_path / 'out'}:t", *how)


def test_the_source_is_not_overwritten(convert, tmp_path: Path, registry: LocalRegistry) -> None:
    layout = tmp_path / "layout"
    write_image(layout, LAYERS[:1])
    for place in (f"oci:{layout}:t", f"docker://{registry.host}/same/a:t"):
        if place.startswith("docker"):
            from tests.oci.conftest import skopeo

            skopeo("copy", "--insecure-policy", "--dest-tls-verify=false", f"oci:{layout}:t", place)
        before = convert(place, f"oci:{tmp_path / 'x'}:t")["source_digest"]
        status, line = convert(place, place)
        assert status == 2 and "another tag" in line
        assert convert(place, f"oci:{tmp_path / 'x'}:t")["source_digest"] == before
        # beside it, and as one of two, it is kept
        assert "layers" in convert(place, place[:-1] + "n")
        assert "layers" in convert(place, place, "--merge-platform")
        assert convert(place, f"oci:{tmp_path / 'x'}:t")["source_digest"] == before
        # an index of several stays whole
        status, line = convert(place, place, "--merge-platform")
        assert status == 2 and "another tag" in line
