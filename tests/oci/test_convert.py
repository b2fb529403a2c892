"""convert against real registries, with skopeo as the other side."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.hostile.images import CHUNK, ImageV6, build, write_source
from tests.oci.conftest import BIG, LAYERS, blob, make_tar, read_layout, skopeo, write_image
from tests.peers.registry import LocalRegistry
from virtiofsd_nydus.cli.convert import ProgressLines
from virtiofsd_nydus.cli.main import main
from virtiofsd_nydus.oci.image import resolve_image
from virtiofsd_nydus.oci.layout import LayoutStore
from virtiofsd_nydus.oci.manifest import (
    MEDIA_INDEX,
    MEDIA_LAYER_GZIP,
    MEDIA_MANIFEST,
    MEDIA_NYDUS_BLOB,
    get_host_platform,
)

pytestmark = pytest.mark.peer


def test_the_manifest_is_what_nydus_tools_expect(convert, image: Path, registry: LocalRegistry, tmp_path: Path) -> None:
    result = convert(f"oci:{image}:t", f"docker://{registry.host}/form/a:n")
    raw = skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{registry.host}/form/a:n")
    assert hashlib.sha256(raw.encode()).hexdigest() == result["manifest_digest"][7:]
    skopeo(
        "copy",
        "--insecure-policy",
        "--src-tls-verify=false",
        f"docker://{registry.host}/form/a:n",
        f"oci:{tmp_path / 'copy'}:c",
    )
    manifest, config = read_layout(tmp_path / "copy", "c")
    assert manifest == json.loads(raw)
    *blobs, bootstrap = manifest["layers"]
    assert [one["mediaType"] for one in blobs] == [MEDIA_NYDUS_BLOB] * 2  # the third layer has no file data
    assert all(one["annotations"] == {"containerd.io/snapshot/nydus-blob": "true"} for one in blobs)
    assert bootstrap["mediaType"] == MEDIA_LAYER_GZIP
    assert bootstrap["annotations"] == {
        "containerd.io/snapshot/nydus-bootstrap": "true",
        "containerd.io/snapshot/nydus-fs-version": "6",
    }
    assert manifest["annotations"] == {"a.note": "kept"}
    assert [one["blob_digest"] for one in result["layers"]] == [blobs[0]["digest"], blobs[1]["digest"], ""]
    assert result["target_bytes"] == sum(one["size"] for one in manifest["layers"])
    # blob id = digest = diff id; the bootstrap's diff id is that of its tar
    with tarfile.open(tmp_path / "copy/blobs/sha256" / bootstrap["digest"][7:]) as archive:
        members = archive.getmembers()
        boot = archive.extractfile("image/image.boot")
        assert boot is not None
        data = boot.read()
    assert [(one.name, one.mode, one.isdir(), one.mtime, one.uid) for one in members] == [
        ("image", 0o755, True, 0, 0),
        ("image/image.boot", 0o444, False, 0, 0),
        *((f"image/{one['digest'][7:]}.blob.meta", 0o444, False, 0, 0) for one in blobs),
    ]
    assert data[1024:1028] == bytes.fromhex("e2e1f5e0")  # EROFS
    assert len(data) == result["bootstrap_bytes"]
    import gzip

    tar = gzip.decompress(blob(tmp_path / "copy", bootstrap["digest"]))
    assert config["rootfs"]["diff_ids"] == [
        blobs[0]["digest"],
        blobs[1]["digest"],
        f"sha256:{hashlib.sha256(tar).hexdigest()}",
    ]
    assert config["config"] == {"Cmd": ["/bin/true"], "Env": ["A=b"]}
    full = [one for one in config["history"] if not one.get("empty_layer")]
    assert len(full) == len(config["rootfs"]["diff_ids"])
    assert full[-1] == {"created_by": "Nydus Converter", "comment": "Nydus Bootstrap Layer"}


def test_the_same_image_from_anywhere_gives_the_same_digest(
    convert, image: Path, registry: LocalRegistry, tmp_path: Path
) -> None:
    first = convert(f"oci:{image}:t", f"docker://{registry.host}/same/a:1")
    skopeo(
        "copy", "--insecure-policy", "--dest-tls-verify=false", f"oci:{image}:t", f"docker://{registry.host}/same/src:t"
    )
    skopeo("copy", "--insecure-policy", f"oci:{image}:t", f"docker-archive:{tmp_path / 'a.tar'}:x:y")
    for compression in ("zstd", ["none", "zstd", "gzip"]):
        write_image(tmp_path / f"layout-{len(compression)}", LAYERS, compression)
    sources = [
        f"oci:{image}:t",
        f"docker://{registry.host}/same/src:t",
        f"docker-archive:{tmp_path / 'a.tar'}",
        f"docker://{registry.host}/same/src@{first['source_digest']}",
        f"oci:{tmp_path / 'layout-4'}",
        f"oci:{tmp_path / 'layout-3'}:t",
    ]
    blobs = [one["blob_digest"] for one in first["layers"]]
    for source in sources:
        again = convert(source, f"oci:{tmp_path / 'out'}:x")
        assert [one["blob_digest"] for one in again["layers"]] == blobs
        assert again["bootstrap_bytes"] == first["bootstrap_bytes"]
        if not source.startswith("docker-archive"):  # which keeps neither annotations nor the config's form
            assert again["manifest_digest"] == first["manifest_digest"]


def test_a_second_run_sends_no_blob_again(convert, image: Path, registry: LocalRegistry) -> None:
    convert(f"oci:{image}:t", f"docker://{registry.host}/again/a:1")
    registry.clear_log()
    result = convert(f"oci:{image}:t", f"docker://{registry.host}/again/a:2")
    assert not any(layer["pushed"] for layer in result["layers"])
    sent = {
        (one.method, one.path.partition("?")[0]) for one in registry.requests() if one.method not in ("HEAD", "GET")
    }
    assert sent == {("PUT", "/v2/again/a/manifests/2")}


def test_a_layer_that_occurs_twice_is_converted_once(convert, registry: LocalRegistry, tmp_path: Path) -> None:
    write_image(tmp_path / "twice", [LAYERS[0], LAYERS[1], LAYERS[0]])
    registry.clear_log()
    result = convert(f"oci:{tmp_path / 'twice'}", f"docker://{registry.host}/twice/a:1")
    assert result["layers"][0] == result["layers"][2]
    uploads = [one for one in registry.requests() if one.method == "POST"]
    # two blobs at most, bootstrap, configuration
    assert len(uploads) <= 4


def test_deduplication_is_told(convert, image: Path, tmp_path: Path) -> None:
    result = convert(f"oci:{image}:t", f"oci:{tmp_path / 'out'}:x")
    assert result["layers"][0]["deduplicated_bytes"] >= len(BIG)
    assert result["source_bytes"] == sum(one["source_bytes"] for one in result["layers"])


def test_tags_live_side_by_side_in_a_layout(convert, image: Path, tmp_path: Path) -> None:
    one = convert(f"oci:{image}:t", f"oci:{tmp_path / 'out'}:one")
    convert(f"oci:{image}:t", f"oci:{tmp_path / 'out'}:two", "--compressor", "none")
    three = convert(f"oci:{image}:t", f"oci:{tmp_path / 'out'}:one")
    assert one["manifest_digest"] == three["manifest_digest"]
    index = json.loads((tmp_path / "out/index.json").read_bytes())
    assert sorted(entry["annotations"]["org.opencontainers.image.ref.name"] for entry in index["manifests"]) == [
        "one",
        "two",
    ]
    skopeo("inspect", f"oci:{tmp_path / 'out'}:two")
    assert not [path for path in (tmp_path / "out").rglob(".*")]


def test_platforms(convert, tmp_path: Path) -> None:
    """An index: this host's image by default, another when asked, a clear line for none."""
    layout = tmp_path / "multi"
    host = get_host_platform().architecture
    digests = {
        arch: write_image(layout, [make_tar([("arch", arch.encode(), {})])], tag=arch, architecture=arch)
        for arch in (host, "riscv64")
    }
    index = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [
                {
                    "mediaType": "application/vnd.oci.image.manifest.v1+json",
                    "digest": digest,
                    "size": (layout / "blobs/sha256" / digest[7:]).stat().st_size,
                    "platform": {"os": "linux", "architecture": arch},
                }
                for arch, digest in digests.items()
            ],
        }
    ).encode()
    from virtiofsd_nydus.oci.layout import LayoutStore

    LayoutStore(layout).put_manifest(index, "application/vnd.oci.image.index.v1+json", "all")
    found = convert(f"oci:{layout}:all", f"oci:{tmp_path / 'out'}:x")
    assert (found["source_digest"], found["platform"]) == (digests[host], f"linux/{host}")
    found = convert(f"oci:{layout}:all", f"oci:{tmp_path / 'out'}:x", "--platform", "linux/riscv64")
    assert found["source_digest"] == digests["riscv64"]
    status, line = convert(f"oci:{layout}:all", f"oci:{tmp_path / 'out'}:x", "--platform", "linux/s390x")
    assert status == 1 and "linux/riscv64" in line
    status, line = convert(f"oci:{layout}:riscv64", f"oci:{tmp_path / 'out'}:x", "--platform", f"linux/{host}")
    assert status == 1 and "riscv64" in line


def test_sources_that_cannot_be(convert, image: Path, tmp_path: Path) -> None:
    out = f"oci:{tmp_path / 'out'}:x"
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    for source, words in (
        (f"oci:{tmp_path / 'none'}", "no OCI layout"),
        (f"oci:{image}:nope", "tags there: t"),
        (f"docker-archive:{tmp_path / 'none'}", "no such file"),
        (f"docker-archive:{tmp_path / 'junk'}", "not a docker archive"),
    ):
        status, line = convert(source, out)
        assert status == 1 and words in line and line.count("\n") == 1, line
    status, line = convert("nonsense", out)
    assert status == 2 and "docker://HOST" in line
    status, line = convert(f"oci:{image}:t", f"docker-archive:{tmp_path / 'x'}")
    assert status == 1 and "source only" in line
    convert(f"oci:{image}:t", out)
    status, line = convert(out, f"oci:{tmp_path / 'out2'}:x")
    assert status == 1 and "Nydus image already" in line
    write_image(tmp_path / "bad", [b"this is no tar" * 100], "none")
    status, line = convert(f"oci:{tmp_path / 'bad'}:t", out)
    assert status == 1 and "layer" in line


def test_a_full_work_dir_says_so(convert, image: Path, tmp_path: Path) -> None:
    status, line = convert(f"oci:{image}:t", f"oci:{tmp_path / 'out'}:x", "--work-dir", tmp_path / "none")
    assert status == 1 and "--work-dir" in line


@pytest.mark.parametrize("source_kind", ["oci", "docker", "docker-archive"])
def test_an_index_of_both_serves_clients_of_both(
    convert, image: Path, registry: LocalRegistry, tmp_path: Path, source_kind: str
) -> None:
    from virtiofsd_nydus.oci.image import resolve_image

    source = f"oci:{image}:t"
    if source_kind == "docker":
        source = f"docker://{registry.host}/both/src:t"
        skopeo("copy", "--insecure-policy", "--dest-tls-verify=false", f"oci:{image}:t", source)
    if source_kind == "docker-archive":
        source = f"docker-archive:{tmp_path / 'a.tar'}"
        skopeo("copy", "--insecure-policy", f"oci:{image}:t", f"{source}:x:y")
    for target in (f"docker://{registry.host}/both/a-{source_kind}:n", f"oci:{tmp_path / 'out'}:n"):
        alone = convert(source, f"oci:{tmp_path / 'alone'}:n")
        result = convert(source, target, "--merge-platform")
        assert resolve_image(target, cache_dir=tmp_path / "c").manifest_digest == alone["manifest_digest"]
        tls = ["--src-tls-verify=false"] if target.startswith("docker") else []
        skopeo("copy", "--insecure-policy", *tls, target, f"oci:{tmp_path / 'pulled'}:p")
        pulled, config = read_layout(tmp_path / "pulled", "p")
        assert len(pulled["layers"]) == len(result["layers"])
        if source_kind != "docker-archive":  # whose plain layers skopeo compresses for a layout
            assert [one["digest"] for one in pulled["layers"]] == [one["source_digest"] for one in result["layers"]]
        assert config["config"]["Cmd"] == ["/bin/true"]
        # and an index can be a source: its OCI image is taken
        again = convert(target, f"oci:{tmp_path / 'alone'}:m")
        assert [one["blob_digest"] for one in again["layers"]] == [one["blob_digest"] for one in alone["layers"]]


def test_progress_without_a_terminal_is_a_line_now_and_then() -> None:
    """A log shows bytes, rate and time left, and nothing of a run that is over at once."""
    now, out, mib = [100.0], io.StringIO(), 1 << 20
    lines = ProgressLines(out, clock=lambda: now[0])
    for name, size in (("sha256:a", 30 * mib), ("sha256:b", 10 * mib)):
        lines.start("convert", name, size)
    for now[0] in (104.0, 109.9):
        lines.advance("convert", "sha256:a", 5 * mib)
    assert out.getvalue() == ""
    lines.start("push", "sha256:c", 4 * mib)
    for now[0] in (110.0, 119.9):
        lines.advance("push", "sha256:c", mib)
    assert out.getvalue() == "read 10.0 of 40.0 MiB, 1.0 MiB/s, 30 s left; pushed 1.0 MiB\n"
    now[0] = 120.0
    lines.advance("convert", "sha256:b", 10 * mib)
    assert out.getvalue().splitlines()[1:] == ["read 20.0 of 40.0 MiB, 1.0 MiB/s, 20 s left; pushed 2.0 MiB"]


# ---- chunk dictionary, references to the OCI layers


def fetch_bootstrap(reference: str, folder: Path) -> Path:
    from virtiofsd_nydus.oci.image import resolve_image

    return resolve_image(reference, cache_dir=folder).bootstrap


def test_a_dictionary_saves_what_another_image_has(
    convert, image: Path, registry: LocalRegistry, tmp_path: Path
) -> None:
    reference = f"docker://{registry.host}/dict/a:base"
    base = convert(f"oci:{image}:t", reference)
    bootstrap = fetch_bootstrap(reference, tmp_path / "cache")
    write_image(tmp_path / "next", [make_tar([("copied", BIG, {}), ("new", b"something else" * 99, {})])])
    result = convert(f"oci:{tmp_path / 'next'}", f"docker://{registry.host}/dict/a:next", "--chunk-dict", bootstrap)
    (layer,) = result["layers"]
    assert layer["dictionary_bytes"] == len(BIG) and layer["chunks"] == 1
    assert layer["unique_bytes"] == 14 * 99 and layer["blob_bytes"] < 20_000
    raw = json.loads(skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{registry.host}/dict/a:next"))
    digests = [one["digest"] for one in raw["layers"][:-1]]
    assert digests == [layer["blob_digest"], base["layers"][0]["blob_digest"]]
    # a place that lacks the dictionary's blobs is told so before anything is made
    status, line = convert(f"oci:{tmp_path / 'next'}", f"oci:{tmp_path / 'out'}:x", "--chunk-dict", bootstrap)
    assert status == 1 and "push the dictionary's image to it first" in line


def test_a_dictionary_of_other_chunks_is_refused(convert, image: Path, registry: LocalRegistry, tmp_path: Path) -> None:
    reference = f"docker://{registry.host}/dict/b:base"
    convert(f"oci:{image}:t", reference)
    bootstrap = fetch_bootstrap(reference, tmp_path / "cache")
    for words, line in (
        (("--chunk-size", "64K"), "its chunk size is"),
        (("--digester", "sha256"), "other digests"),
        (("--fs-version", "5"), "its RAFS version is 6, the image's 5"),
    ):
        status, error = convert(f"oci:{image}:t", f"oci:{tmp_path / 'out'}:x", "--chunk-dict", bootstrap, *words)
        assert status == 1 and line in error


def test_a_dictionary_without_data_is_told_by_name(convert, image: Path, tmp_path: Path) -> None:
    """As `nydus-image chunkdict generate` writes them: blobs of 0 stored bytes, a file whose name holds '/'."""
    write_source(tmp_path / "source.tar")
    good = build(tmp_path / "source.tar", tmp_path / "dictionary")
    dictionary = tmp_path / "bad"
    for change, line in (
        (lambda one: one.put(one.blob + 88, "Q", 0), "chunks in 0 stored bytes"),
        (lambda one: one.put(one.name("/d", "x"), "B", ord("/")), "its files cannot be read"),
    ):
        bad = ImageV6(good)
        change(bad)
        dictionary.write_bytes(bad.bytes)
        status, error = convert(
            f"oci:{image}:t", f"oci:{tmp_path / 'out'}:x", "--chunk-size", str(CHUNK), "--chunk-dict", dictionary
        )
        assert status == 1 and line in error and error.count("\n") == 1


def test_a_reference_leaves_the_oci_image_as_it_is(
    convert, image: Path, registry: LocalRegistry, tmp_path: Path
) -> None:
    target = f"docker://{registry.host}/ref/a:n"
    result = convert(f"oci:{image}:t", target, "--oci-ref")
    index = json.loads(skopeo("inspect", "--raw", "--tls-verify=false", target))
    oci, nydus = index["manifests"]
    assert oci["digest"] == result["source_digest"]
    manifest = json.loads(
        skopeo("inspect", "--raw", "--tls-verify=false", f"{target.rpartition(':')[0]}@{nydus['digest']}")
    )
    original, _ = read_layout(image, "t")
    *metas, _ = manifest["layers"]
    assert [one["annotations"]["containerd.io/snapshot/nydus-ref"] for one in metas] == [
        one["digest"] for one in original["layers"][:2]
    ]
    assert sum(one["size"] for one in manifest["layers"]) < result["source_bytes"] / 4
    # a client that knows nothing of Nydus gets the very layers it got before
    skopeo("copy", "--insecure-policy", "--src-tls-verify=false", target, f"oci:{tmp_path / 'plain'}:p")
    copied, _ = read_layout(tmp_path / "plain", "p")
    assert copied["layers"] == original["layers"]
    again = convert(f"oci:{image}:t", f"docker://{registry.host}/ref/b:n", "--oci-ref")
    assert again["manifest_digest"] == result["manifest_digest"]


def test_references_need_gzip_layers(convert, tmp_path: Path) -> None:
    write_image(tmp_path / "zstd", LAYERS, "zstd")
    status, line = convert(f"oci:{tmp_path / 'zstd'}", f"oci:{tmp_path / 'out'}:x", "--oci-ref")
    assert status == 1 and "not a gzip layer" in line and line.count("\n") == 1
    assert not (tmp_path / "out/index.json").exists()


@pytest.mark.parametrize("way", ["--fs-version 5", "--batch-size 64K", "--oci-ref", "--compressor lz4_block"])
def test_threads_change_nothing(convert, image: Path, tmp_path: Path, way: str) -> None:
    digests = {
        convert(f"oci:{image}:t", f"oci:{tmp_path / f'out{threads}'}:x", *way.split(), "--threads", threads)[
            "manifest_digest"
        ]
        for threads in (1, 2, 7)
    }
    assert len(digests) == 1


def make_platforms(layout: Path, *architectures: str) -> None:
    """The tag `all` names an index of an image for each architecture, and an attestation."""
    store = LayoutStore(layout)
    entries = []
    for number, architecture in enumerate(architectures):
        digest = write_image(layout, LAYERS[: number + 1], tag=architecture, architecture=architecture)
        size = (layout / "blobs/sha256" / digest[7:]).stat().st_size
        platform = {"os": "linux", "architecture": architecture}
        entries.append({"mediaType": MEDIA_MANIFEST, "digest": digest, "size": size, "platform": platform})
    entries.append({**entries[0], "platform": {"os": "unknown", "architecture": "unknown"}})
    index = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": entries}
    store.put_manifest(json.dumps(index).encode(), MEDIA_INDEX, "all")
    store.close()


@pytest.mark.parametrize("merge", [False, True])
def test_all_platforms(convert, tmp_path: Path, merge: bool) -> None:
    layout, target = tmp_path / "layout", tmp_path / "out"
    make_platforms(layout, "amd64", "arm64")
    words = [f"oci:{layout}:all", f"oci:{target}:n", "--all-platforms", *(["--merge-platform"] if merge else [])]
    results = convert(*words)
    assert [one["platform"] for one in results] == ["linux/amd64", "linux/arm64"]
    store = LayoutStore(target)
    index = json.loads(store.get_manifest("n")[0])
    nydus = [one for one in index["manifests"] if "artifactType" in one]
    assert [one["platform"]["architecture"] for one in nydus] == ["amd64", "arm64"]
    assert len(index["manifests"]) == (4 if merge else 2)
    for platform in ("linux/amd64", "linux/arm64"):
        found = resolve_image(f"oci:{target}:n", cache_dir=tmp_path / "c", platform=platform)
        assert found.config["architecture"] == platform.partition("/")[2]
    store.close()


def test_all_platforms_of_what_has_none(convert, tmp_path: Path) -> None:
    write_image(tmp_path / "layout", LAYERS[:1])
    source = f"oci:{tmp_path / 'layout'}:t"
    status, line = convert(source, f"oci:{tmp_path / 'out'}:n", "--all-platforms")
    assert status == 1 and "not an index" in line
    make_platforms(tmp_path / "layout", "amd64")
    status, line = convert(f"oci:{tmp_path / 'layout'}:all", f"oci:{tmp_path / 'layout'}:all", "--all-platforms")
    assert status == 2 and "is the image to convert" in line


def members_of(data: bytes) -> dict[str, tuple]:
    """Every name of a tar with what it is."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for one in tar:
            stream = tar.extractfile(one) if one.isreg() else None
            content = stream.read() if stream is not None else b""
            if one.name.strip("./"):
                link = one.linkname.removeprefix("./")
                found[one.name.removeprefix("./").rstrip("/")] = one.type, one.mode, one.uid, link, content
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_back_to_oci(convert, tmp_path: Path, count: int) -> None:
    """Layers come back with the same diff content; a layer that left no blob makes it one layer, with the same tree."""
    import gzip

    layers = [
        make_tar(
            [
                ("etc", None, {"type": tarfile.DIRTYPE, "mtime": 1000, "uid": 7}),
                ("etc/hosts", b"hosts\n", {"mtime": 5}),
                ("etc/gone", b"gone\n", {}),
                ("big", BIG, {"mode": 0o600}),
                ("link", None, {"type": tarfile.SYMTYPE, "linkname": "etc/hosts", "mode": 0o777}),
                ("same", None, {"type": tarfile.LNKTYPE, "linkname": "big", "mode": 0o600}),
            ]
        ),
        make_tar([("etc/.wh.gone", b"", {}), ("etc/two", b"two\n", {})]),
        LAYERS[2],
    ][:count]
    write_image(tmp_path / "layout", layers)
    nydus, back = f"oci:{tmp_path / 'nydus'}:n", f"oci:{tmp_path / 'back'}:t"
    convert(f"oci:{tmp_path / 'layout'}:t", nydus)
    result = convert(nydus, back, "--to", "oci")
    assert result["one_layer"] is (count == 3)
    blobs = tmp_path / "back/blobs/sha256"
    tars = [gzip.decompress((blobs / digest[7:]).read_bytes()) for digest in result["layers"]]
    assert [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars] == result["diff_ids"]
    if count == 2:
        assert [members_of(tar) for tar in tars] == [members_of(layer) for layer in layers]
    trees = []
    for reference in (f"oci:{tmp_path / 'layout'}:t", back):
        output = tmp_path / f"{len(trees)}.tar"
        assert main(["unpack", reference, "--output", str(output), "--cache-dir", str(tmp_path / "c")]) == 0
        trees.append(members_of(output.read_bytes()))
    assert trees[0] == trees[1]
    assert json.loads(skopeo("inspect", "--config", back))["config"]["Cmd"] == ["/bin/true"]


def test_what_cannot_go_back(convert, image: Path, tmp_path: Path) -> None:
    convert(f"oci:{image}:t", f"oci:{tmp_path / 'ref'}:n", "--oci-ref")
    status, line = convert(f"oci:{tmp_path / 'ref'}:n", f"oci:{tmp_path / 'out'}:t", "--to", "oci")
    assert status == 1 and "lies beside it" in line
    status, line = convert(f"oci:{image}:t", f"oci:{tmp_path / 'out'}:t", "--to", "oci")
    assert status == 1 and "not a Nydus image" in line
