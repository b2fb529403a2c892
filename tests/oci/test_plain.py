"""Plain OCI images served as they are, of every kind of layer, and what is kept of them on the node."""

import json
import tarfile
from pathlib import Path

import pytest

from tests.oci.conftest import BIG, LAYERS, SMALL, skopeo, write_image
from tests.oci.test_served import read_everything, serving
from tests.peers.registry import LocalRegistry
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.layout import LayoutStore
from virtiofsd_nydus.oci.manifest import MEDIA_LAYER_GZIP, MEDIA_MANIFEST, Descriptor, digest_of
from virtiofsd_nydus.vmm.image import WantedImage, prepare_image

pytestmark = pytest.mark.peer

KINDS = ["gzip", "zstd", "none", "mixed"]


def push(layout: Path, registry: LocalRegistry, name: str) -> str:
    skopeo("copy", "-q", "--dest-tls-verify=false", f"oci:{layout}:t", f"docker://{registry.host}/plain/{name}")
    return f"docker://{registry.host}/plain/{name}"


def make(tmp_path: Path, kind: str) -> Path:
    write_image(tmp_path / "layout", LAYERS, ["gzip", "zstd", "none"] if kind == "mixed" else kind)
    return tmp_path / "layout"


def drop_data(cache: Path) -> None:
    """Cached chunks go, as an eviction takes them; what is known of the layers stays."""
    for path in [*cache.glob("*.blob.data*"), *cache.glob(".virtiofsd-nydus/*")]:
        path.unlink()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["registry", "layout"])
def test_three_starts(registry: LocalRegistry, tmp_path: Path, kind: str, place: str) -> None:
    """The first start reads each layer once; the second has the tree and fetches what is read; a third needs
    nothing."""
    layout = make(tmp_path, kind)
    reference = push(layout, registry, f"three-{kind}:1") if place == "registry" else f"oci:{layout}:t"
    cache = tmp_path / "cache"
    total = sum(path.stat().st_size for path in (layout / "blobs/sha256").iterdir())
    registry.clear_log()
    with serving(reference, cache) as (_, guest):
        read_everything(guest)
        assert guest.fuse.read_file("small3") == SMALL[3]
        with pytest.raises(OSError):
            guest.fuse.walk("etc/gone")
    if place == "registry":
        assert registry.blob_bytes() <= total
    registry.clear_log()
    with serving(reference, cache) as (_, guest):
        read_everything(guest)
    assert registry.blob_bytes() == 0
    drop_data(cache)
    with serving(reference, cache) as (_, guest):
        assert guest.fuse.read_file("etc/hosts") == b"hosts\n"
    if place == "registry" and kind in ("gzip", "none"):
        assert 0 < registry.blob_bytes() < total / 2
    with serving(reference, cache) as (_, guest):
        read_everything(guest)


def test_a_third_start_needs_no_network(tmp_path: Path) -> None:
    layout, cache = make(tmp_path, "mixed"), tmp_path / "cache"
    with LocalRegistry(tmp_path / "r") as registry:
        reference = push(layout, registry, "a:1")
        with serving(reference, cache) as (_, guest):
            read_everything(guest)
    with serving(reference, cache) as (_, guest):
        read_everything(guest)


def test_layers_that_images_share_are_read_once(registry: LocalRegistry, tmp_path: Path) -> None:
    write_image(tmp_path / "one", LAYERS[:1])
    write_image(tmp_path / "two", LAYERS[:2])
    one, two = push(tmp_path / "one", registry, "one:1"), push(tmp_path / "two", registry, "two:1")
    cache = tmp_path / "cache"
    with prepare_image(WantedImage(one, cache_dir=cache)):
        pass
    registry.clear_log()
    with prepare_image(WantedImage(two, cache_dir=cache)) as image:
        pass
    shared = json.loads((tmp_path / "one" / "index.json").read_text())["manifests"][0]["digest"]
    layer = json.loads((tmp_path / "one/blobs/sha256" / shared[7:]).read_text())["layers"][0]["digest"]
    assert registry.blob_requests(layer[7:]) == []
    assert image.fetched_bytes < len(BIG)


@pytest.mark.parametrize("what", ["layer", "blob.meta", "boot", "layers", "json"])
def test_what_is_kept_is_not_believed(tmp_path: Path, what: str) -> None:
    """A flipped byte in what the node keeps of an image is found, and that part is made anew."""
    layout, cache = make(tmp_path, "gzip"), tmp_path / "cache"
    reference = f"oci:{layout}:t"
    with prepare_image(WantedImage(reference, cache_dir=cache)):
        pass
    drop_data(cache)
    for path in (cache / "layers").rglob(f"*.{what}"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.chmod(0o600)
        path.write_bytes(data)
    if what == "layer":  # it is looked at when an image is made of it
        for path in (cache / "layers").glob("*.json"):
            path.unlink()
    with serving(reference, cache) as (_, guest):
        read_everything(guest)


@pytest.mark.parametrize("way", ["docker-archive", "oci-archive", "docker-archive.gz", "oci-archive.gz"])
def test_archives(tmp_path: Path, way: str) -> None:
    layout, cache = make(tmp_path, "gzip"), tmp_path / "cache"
    kind, _, packed = way.partition(".")
    file = tmp_path / "image.tar"
    skopeo("copy", "-q", f"oci:{layout}:t", f"{kind}:{file}" + (":a:b" if kind == "docker-archive" else ":t"))
    if packed:
        import gzip

        file.write_bytes(gzip.compress(file.read_bytes(), 1))
    reference = f"{kind}:{file}"
    with serving(reference, cache) as (_, guest):
        read_everything(guest)
    drop_data(cache)
    with serving(reference, cache) as (_, guest):
        read_everything(guest)


def test_sparse_members_are_read(tmp_path: Path) -> None:
    """What cannot be had from the middle of a gzip stream is had by reading the layer again."""
    tree = tmp_path / "tree"
    tree.mkdir()
    with (tree / "sparse").open("wb") as file:
        file.seek(5 << 20)
        file.write(b"end")
        file.truncate(6 << 20)
    tar = tmp_path / "sparse.tar"
    import subprocess

    subprocess.run(["tar", "--sparse", "--format=gnu", "-C", str(tree), "-cf", str(tar), "sparse"], check=True)
    write_image(tmp_path / "layout", [tar.read_bytes(), LAYERS[0]], "gzip")
    reference, cache = f"oci:{tmp_path / 'layout'}:t", tmp_path / "cache"
    for _ in range(2):
        with serving(reference, cache) as (_, guest):
            assert guest.fuse.read_file("sparse") == (tree / "sparse").read_bytes()
            assert guest.fuse.read_file("big") == BIG
        drop_data(cache)


def test_a_damaged_layer_is_refused(registry: LocalRegistry, tmp_path: Path) -> None:
    from tests.peers.faulty_server import FaultyServer

    layout = make(tmp_path, "gzip")
    push(layout, registry, "damaged:1")
    with FaultyServer(upstream=registry.host) as front:
        front.inject("corrupt", at_bytes=100_000, match="GET ", times=-1)
        with (
            pytest.raises(Failure, match="damaged") as caught,
            prepare_image(WantedImage(f"docker://{front.host}/plain/damaged:1", cache_dir=tmp_path / "cache")),
        ):
            pass
    assert caught.value.cause is Cause.DIGEST
    assert not list((tmp_path / "cache").glob("*.blob.data"))


# ---- layers with tables of contents


def make_estargz(tar: bytes, chunk_size: int = 4 << 20) -> tuple[bytes, str]:
    """A layer as estargz makes them, by the format: a gzip member for each header and each piece of a file, the table,
    the footer. The layer, and the table's digest."""
    import gzip
    import hashlib
    import io

    out, entries = io.BytesIO(), []
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        members = list(archive)
        for member in members:
            header = tar[member.offset : member.offset_data]
            out.write(gzip.compress(header, mtime=0))
            kind = {tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "symlink"}.get(member.type, "reg")
            entry: dict = {"name": member.name, "type": kind, "mode": member.mode, "modtime": "1970-01-01T00:00:00Z"}
            if kind == "symlink":
                entry["linkName"] = member.linkname
            if kind == "reg" and member.size:
                data = tar[member.offset_data : member.offset_data + member.size]
                entry.update(size=member.size, digest=f"sha256:{hashlib.sha256(data).hexdigest()}")
                for start in range(0, member.size, chunk_size):
                    piece = data[start : start + chunk_size]
                    if start:
                        entry = {"name": member.name, "type": "chunk", "chunkOffset": start}
                    entry["offset"] = out.tell()
                    entry["chunkDigest"] = f"sha256:{hashlib.sha256(piece).hexdigest()}"
                    if member.size > chunk_size:
                        entry["chunkSize"] = len(piece)
                    entries.append(entry)
                    out.write(gzip.compress(piece, mtime=0))
                out.write(gzip.compress(bytes(-member.size % 512), mtime=0))
            else:
                entries.append(entry)
    table = json.dumps({"version": 1, "entries": entries}).encode()
    at = out.tell()
    holder = io.BytesIO()
    with tarfile.open(fileobj=holder, mode="w") as archive:
        info = tarfile.TarInfo("stargz.index.json")
        info.size = len(table)
        archive.addfile(info, io.BytesIO(table))
    out.write(gzip.compress(holder.getvalue(), mtime=0))
    extra = b"SG" + (22).to_bytes(2, "little") + f"{at:016x}STARGZ".encode()
    out.write(b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + len(extra).to_bytes(2, "little") + extra)
    out.write(b"\x01\0\0\xff\xff" + bytes(8))
    return out.getvalue(), f"sha256:{hashlib.sha256(table).hexdigest()}"


def write_estargz(layout: Path, spoil: bool = False) -> None:
    """LAYERS with tables; the manifest tells their digests."""
    write_image(layout, LAYERS, "none")
    index = json.loads((layout / "index.json").read_text())
    blobs = layout / "blobs/sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_text())
    for number, (layer, tar) in enumerate(zip(manifest["layers"], LAYERS, strict=True)):
        data, table = make_estargz(tar)
        digest = digest_of(data)
        (blobs / digest[7:]).write_bytes(data)
        (blobs / layer["digest"][7:]).unlink()
        told = "sha256:" + "0" * 64 if spoil and not number else table
        layer.update(mediaType=MEDIA_LAYER_GZIP, digest=digest, size=len(data))
        layer["annotations"] = {"containerd.io/snapshot/stargz/toc.digest": told}
    store = LayoutStore(layout)
    store.put_manifest(json.dumps(manifest).encode(), MEDIA_MANIFEST, "t")
    store.close()


@pytest.mark.parametrize("kind", ["estargz", "zstd:chunked"])
def test_layers_that_tell_their_contents_are_lazy_at_once(registry: LocalRegistry, tmp_path: Path, kind: str) -> None:
    layout = tmp_path / "layout"
    if kind == "estargz":
        write_estargz(layout)
    else:
        write_image(tmp_path / "plain", LAYERS)
        skopeo(
            "copy", "-q", "--dest-compress-format", kind, "--dest-compress", f"oci:{tmp_path / 'plain'}:t",
            f"oci:{layout}:t",
        )  # fmt: skip
    reference, cache = push(layout, registry, f"{kind.replace(':', '-')}:1"), tmp_path / "cache"
    total = sum(path.stat().st_size for path in (layout / "blobs/sha256").iterdir())
    registry.clear_log()
    with serving(reference, cache) as (_, guest):
        assert guest.fuse.read_file("etc/two") == b"two\n"
        assert 0 < registry.blob_bytes() < total / 4
        read_everything(guest)
    drop_data(cache)
    with serving(reference, cache) as (_, guest):
        read_everything(guest)


def test_a_table_that_the_manifest_does_not_name(tmp_path: Path) -> None:
    write_estargz(tmp_path / "layout", spoil=True)
    with (
        pytest.raises(Failure, match="table of layer") as caught,
        prepare_image(WantedImage(f"oci:{tmp_path / 'layout'}:t", cache_dir=tmp_path / "cache")),
    ):
        pass
    assert caught.value.cause is Cause.DIGEST


def test_a_frame_that_is_not_the_tables(tmp_path: Path) -> None:
    """A flipped byte of a frame, and of a chunk in a gzip layer, never arrives."""
    import errno

    write_estargz(tmp_path / "stargz")
    write_image(tmp_path / "gzip", LAYERS[:1])
    for layout in (tmp_path / "stargz", tmp_path / "gzip"):
        cache = tmp_path / f"cache-{layout.name}"
        with prepare_image(WantedImage(f"oci:{layout}:t", cache_dir=cache)):
            pass
        drop_data(cache)
        largest = max((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[1_000_000] ^= 1
        largest.write_bytes(data)
        with serving(f"oci:{layout}:t", cache) as (_, guest):
            with pytest.raises(OSError) as caught:
                guest.fuse.read_file("big")
            assert caught.value.errno == errno.EIO
            assert guest.fuse.read_file("etc/hosts") == b"hosts\n"


def table_of(entries: list[dict]) -> bytes:
    return json.dumps({"version": 1, "entries": entries}).encode()


GOOD_DIGEST = "sha256:" + "1" * 64


@pytest.mark.parametrize(
    "entries",
    [
        [{"type": "reg", "name": "a", "size": 1 << 40, "offset": 5, "digest": GOOD_DIGEST}],
        [{"type": "reg", "name": "a", "size": 10, "offset": 5, "innerOffset": 1 << 40, "digest": GOOD_DIGEST}],
        [{"type": "reg", "name": "a", "size": 10, "offset": -5, "digest": GOOD_DIGEST}],
        [{"type": "reg", "name": "a", "size": -1, "offset": 5, "digest": GOOD_DIGEST}],
        [{"type": "reg", "name": "a", "size": 10, "offset": 5}],
        [{"type": "reg", "name": "a", "size": 10, "offset": 5, "digest": "md5:1"}],
        [{"type": "reg", "name": "a", "size": 10, "offset": 5, "chunkSize": 4, "chunkDigest": GOOD_DIGEST}],
        [{"type": "chunk", "name": "a", "offset": 5, "chunkSize": 4, "chunkDigest": GOOD_DIGEST}],
        [{"type": "odd", "name": "a"}],
        [{"type": "dir"}],
        [{"type": "dir", "name": "a", "modtime": "yesterday"}],
        [{"type": "dir", "name": "a", "xattrs": {"user.x": "?"}}],
        [{"type": "dir", "name": "a\N{REPLACEMENT CHARACTER}"}],
        [7],
    ],
)
def test_tables_that_cannot_be_used(entries: list) -> None:
    """Each is refused as a table, whatever it claims, and the layer is then read whole."""
    from virtiofsd_nydus.oci import toc

    class Store:
        name = "a store"

        def read_blob_range(self, layer: object, offset: int, length: int) -> list[memoryview]:
            return [memoryview(data[offset : offset + length])]

    import zstandard

    packed = zstandard.ZstdCompressor().compress(table_of(entries))
    data = bytes(1000) + packed
    place, digest = toc.CHUNKED[0]
    told = {place: f"1000:{len(packed)}:{len(table_of(entries))}:1", digest: digest_of(packed)}
    layer = Descriptor("application/vnd.oci.image.layer.v1.tar+zstd", GOOD_DIGEST, len(data), told)
    with pytest.raises(Failure, match="not a table of contents") as caught:
        toc.read_table(Store(), layer)  # type: ignore[arg-type]
    assert caught.value.cause is Cause.FORMAT


@pytest.mark.parametrize(
    "frames",
    [
        [[0, 10, -1, 5, 0, 1]], [[0, 1 << 40, 0, 5, 0, 1]], [[0, 10, 0, 5, 0, 3]], [[0, 10, 0, 5, 1 << 40, 2]],
        [[0, 10, 0, 5, 0]], [[0, 10, 0, 5, 0, 1], [5, 10, 0, 5, 0, 1]], [[0, "10", 0, 5, 0, 1]], ["x"], 7,
    ],
)  # fmt: skip
def test_frames_that_cannot_be(tmp_path: Path, frames: object) -> None:
    import zstandard

    from virtiofsd_nydus.oci.layers import FrameTable

    count = len(frames) if isinstance(frames, list) else 0
    (tmp_path / "f").write_bytes(zstandard.ZstdCompressor().compress(json.dumps([frames, ["1"] * count]).encode()))
    with pytest.raises(Failure, match="cannot be read") as caught:
        FrameTable(str(tmp_path / "f"))
    assert caught.value.cause is Cause.FORMAT


def test_holes_of_a_table_take_no_memory(tmp_path: Path) -> None:
    import zstandard

    from virtiofsd_nydus.oci.layers import FrameTable

    frames = [[0, 1 << 40, 0, 0, 0, 0]]
    (tmp_path / "f").write_bytes(zstandard.ZstdCompressor().compress(json.dumps([frames, [""]]).encode()))
    table = FrameTable(str(tmp_path / "f"))
    assert list(table.decode(1 << 30, (1 << 30) + 5, None, "a layer")) == [(1 << 30, bytes(5))]
