"""From the signature to the bytes: who signed is asked before anything is mounted, and each link refuses a flipped
bit."""

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.oci.conftest import LAYERS, skopeo, write_image
from tests.oci.test_served import read_everything, serving
from tests.peers.memory_registry import Habits, MemoryRegistry
from virtiofsd_nydus.cli.main import main
from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.oci.manifest import digest_of
from virtiofsd_nydus.oci.policy import list_scopes, read_policy
from virtiofsd_nydus.oci.reference import parse_reference
from virtiofsd_nydus.oci.signatures import signature_tag
from virtiofsd_nydus.vmm.image import WantedImage, prepare_image

pytest.importorskip("cryptography")

KINDS = {
    "ecdsa": ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
    "ed25519": ["-algorithm", "ED25519"],
    "rsa": ["-algorithm", "RSA"],
}


def make_keys(directory: Path, name: str, kind: str = "ecdsa") -> tuple[Path, Path]:
    """A private key and its public one, made by openssl."""
    private, public = directory / f"{name}.key", directory / f"{name}.pub"
    subprocess.run(["openssl", "genpkey", *KINDS[kind], "-out", str(private)], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", str(private), "-pubout", "-out", str(public)], check=True)
    return private, public


@pytest.fixture
def memory() -> Iterator[MemoryRegistry]:
    with MemoryRegistry() as memory:
        yield memory


def prepare(reference: str, cache: Path, *keys: Path, policy: Path | None = None) -> None:
    wanted = WantedImage(
        reference, cache_dir=cache, verify_keys=tuple(map(str, keys)), policy=str(policy) if policy else ""
    )
    with prepare_image(wanted):
        pass


def refused(reference: str, cache: Path, *keys: Path, policy: Path | None = None) -> Failure:
    with pytest.raises(Failure) as caught:
        prepare(reference, cache, *keys, policy=policy)
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["registry with referrers", "registry without", "layout"])
def test_what_convert_signs_is_believed(convert, image: Path, tmp_path: Path, kind: str, place: str) -> None:
    private, public = make_keys(tmp_path, "ours", kind)
    _, other = make_keys(tmp_path, "other")
    with MemoryRegistry(Habits(referrers=place == "registry with referrers")) as memory:
        target = f"oci:{tmp_path / 'out'}:n" if place == "layout" else f"docker://{memory.host}/x:n"
        convert(f"oci:{image}:t", target, "--sign-key", private)
        prepare(target, tmp_path / "cache", public)
        prepare(target, tmp_path / "cache", other, public)
        failure = refused(target, tmp_path / "cache", other)
    assert failure.cause is Cause.AUTH and "signature" in str(failure) and "other.pub" in str(failure)


def test_the_signature_is_cosigns(convert, image: Path, tmp_path: Path, memory: MemoryRegistry) -> None:
    """By the format: the tag, the document's and the signature's names, and openssl as another judge of it."""
    private, public = make_keys(tmp_path, "ours")
    digest = convert(f"oci:{image}:t", f"docker://{memory.host}/team/app:n", "--sign-key", private)["manifest_digest"]
    _, data = memory.manifests[memory.tags[signature_tag(digest)]]
    layer = json.loads(data)["layers"][0]
    payload = memory.blobs[layer["digest"]]
    critical = json.loads(payload)["critical"]
    assert layer["mediaType"] == "application/vnd.dev.cosign.simplesigning.v1+json"
    assert critical["image"]["docker-manifest-digest"] == digest
    assert critical["identity"]["docker-reference"] == f"{memory.host}/team/app"
    (tmp_path / "sig").write_bytes(base64.b64decode(layer["annotations"]["dev.cosignproject.cosign/signature"]))
    (tmp_path / "payload").write_bytes(payload)
    words = ["openssl", "dgst", "-sha256", "-verify", public, "-signature", tmp_path / "sig", tmp_path / "payload"]
    assert subprocess.run(list(map(str, words)), capture_output=True, text=True).stdout.strip() == "Verified OK"


def test_a_plain_image_is_signed_too(image: Path, tmp_path: Path, memory: MemoryRegistry) -> None:
    """A signature of the index vouches for the manifest that it names."""
    from virtiofsd_nydus.oci.image import open_store
    from virtiofsd_nydus.oci.manifest import Descriptor
    from virtiofsd_nydus.oci.signatures import sign_manifest

    private, public = make_keys(tmp_path, "ours")
    reference = f"docker://{memory.host}/x:t"
    skopeo("copy", "-q", "--dest-tls-verify=false", f"oci:{image}:t", reference)
    failure = refused(reference, tmp_path / "cache", public)
    assert failure.cause is Cause.AUTH and "it has no signature" in str(failure)
    assert not list((tmp_path / "cache").glob("*.blob.data")), "refused before anything is read"
    parsed = parse_reference(reference)
    store = open_store(parsed)
    data, media_type = store.get_manifest("t")
    sign_manifest(store, Descriptor(media_type, digest_of(data), len(data)), parsed.name, private)
    store.close()
    with serving(reference, tmp_path / "cache", verify_keys=(str(public),)) as (_, guest):
        read_everything(guest)


def test_signatures_of_other_images_do_not_count(convert, image: Path, tmp_path: Path, memory: MemoryRegistry) -> None:
    private, public = make_keys(tmp_path, "ours")
    write_image(tmp_path / "other", LAYERS[:1])
    one = convert(f"oci:{image}:t", f"docker://{memory.host}/x:one", "--sign-key", private)["manifest_digest"]
    two = convert(f"oci:{tmp_path / 'other'}:t", f"docker://{memory.host}/x:two")["manifest_digest"]
    memory.tags[signature_tag(two)] = memory.tags[signature_tag(one)]
    failure = refused(f"docker://{memory.host}/x:two", tmp_path / "cache", public)
    assert failure.cause is Cause.AUTH and "of another image" in str(failure)


# ---- one flipped bit in each link


def flip(data: bytes, at: int) -> bytes:
    out = bytearray(data)
    out[at] ^= 1
    return bytes(out)


@pytest.mark.parametrize("link", ["signature", "payload", "manifest", "bootstrap layer"])
def test_a_flipped_bit_on_the_way_is_refused(
    convert, image: Path, tmp_path: Path, memory: MemoryRegistry, link: str
) -> None:
    private, public = make_keys(tmp_path, "ours")
    reference = f"docker://{memory.host}/x:n"
    digest = convert(f"oci:{image}:t", reference, "--sign-key", private)["manifest_digest"]
    memory.change(referrers=False)
    tagged = memory.tags[signature_tag(digest)]
    value = json.loads(memory.manifests[tagged][1])
    if link == "signature":
        annotations = value["layers"][0]["annotations"]
        raw = base64.b64decode(annotations["dev.cosignproject.cosign/signature"])
        annotations["dev.cosignproject.cosign/signature"] = base64.b64encode(flip(raw, 20)).decode()
        changed = json.dumps(value).encode()
        memory.tags[signature_tag(digest)] = digest_of(changed)
        memory.manifests[digest_of(changed)] = memory.manifests[tagged][0], changed
    elif link == "payload":
        name = value["layers"][0]["digest"]
        memory.blobs[name] = flip(memory.blobs[name], 50)
    elif link == "manifest":
        media_type, data = memory.manifests[digest]
        memory.manifests[digest] = media_type, flip(data, data.index(b"size") + 7)
    else:
        layers = json.loads(memory.manifests[digest][1])["layers"]
        name = layers[-1]["digest"]
        memory.blobs[name] = flip(memory.blobs[name], len(memory.blobs[name]) // 2)
    failure = refused(reference, tmp_path / "cache", public)
    wanted = {"payload": "signature", "bootstrap layer": "bootstrap"}.get(link, link)
    assert wanted in str(failure) and failure.cause in (Cause.AUTH, Cause.DIGEST), failure


@pytest.mark.parametrize("kind", ["nydus", "plain"])
def test_a_bootstrap_that_is_changed_on_the_node_is_refused(convert, image: Path, tmp_path: Path, kind: str) -> None:
    """Between the look at the manifest and the daemon's open."""
    reference = f"oci:{image}:t"
    if kind == "nydus":
        reference = f"oci:{tmp_path / 'out'}:n"
        convert(f"oci:{image}:t", reference)
    from virtiofsd_nydus.vmm.servers import NydusDaemon

    with prepare_image(WantedImage(reference, cache_dir=tmp_path / "cache")) as prepared:
        bootstrap = Path(prepared.daemon_options[1])
        bootstrap.chmod(0o600)
        bootstrap.write_bytes(flip(bootstrap.read_bytes(), 5000))
        with NydusDaemon(prepared.daemon_options) as daemon:
            failure = daemon.explain_end()
        assert f"bootstrap {bootstrap}: not the bytes" in str(failure)
    with serving(reference, tmp_path / "cache") as (_, guest):  # found and made again
        read_everything(guest)


def test_a_flipped_bit_of_an_index_is_not_used(
    tmp_path: Path, image: Path, memory: MemoryRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = f"docker://{memory.host}/x:t"
    skopeo("copy", "-q", "--dest-tls-verify=false", f"oci:{image}:t", reference)
    before = set(memory.blobs)
    assert main(["index", "push", reference, "--cache-dir", str(tmp_path / "one")]) == 0
    (name,) = (one for one in set(memory.blobs) - before if len(memory.blobs[one]) > 10)
    memory.blobs[name] = flip(memory.blobs[name], 100)
    capsys.readouterr()
    with serving(reference, tmp_path / "two") as (_, guest):
        read_everything(guest)
    assert "index" in capsys.readouterr().err


# ---- who decides


def test_policies(convert, image: Path, tmp_path: Path, memory: MemoryRegistry) -> None:
    private, public = make_keys(tmp_path, "ours")
    _, other = make_keys(tmp_path, "other")
    signed, unsigned = f"docker://{memory.host}/team/app:n", f"docker://{memory.host}/open/app:n"
    convert(f"oci:{image}:t", signed, "--sign-key", private)
    convert(f"oci:{image}:t", unsigned)
    file = tmp_path / "policy.json"

    def check(reference: str, requirements: list[dict[str, object]], default: str = "reject") -> str:
        document = {
            "default": [{"type": default}],
            "transports": {"docker": {f"{memory.host}/team": requirements}},
        }
        file.write_text(json.dumps(document))
        try:
            prepare(reference, tmp_path / "cache", policy=file)
        except Failure as failure:
            assert failure.cause is Cause.AUTH or isinstance(failure, UsageFailure), failure
            return str(failure)
        return ""

    ours = {"type": "sigstoreSigned", "keyPath": "ours.pub"}
    data = base64.b64encode(public.read_bytes()).decode()
    assert check(signed, [ours]) == ""
    assert check(signed, [{"type": "sigstoreSigned", "keyData": data}]) == ""
    assert check(signed, [{**ours, "signedIdentity": {"type": "matchRepository"}}]) == ""
    exact = {"type": "exactRepository", "dockerRepository": "elsewhere.example/app"}
    assert "made for" in check(signed, [{**ours, "signedIdentity": exact}])
    assert "other.pub" in check(signed, [{"type": "sigstoreSigned", "keyPaths": ["other.pub"]}])
    assert "refuses" in check(signed, [{"type": "reject"}])
    assert "signedBy" in check(signed, [{"type": "signedBy"}])
    assert "list of requirements" in check(signed, [])
    assert "refuses" in check(unsigned, [ours])
    assert check(unsigned, [ours], default="insecureAcceptAnything") == ""
    assert str(other)


def test_the_narrowest_scope_decides(tmp_path: Path) -> None:
    reference = parse_reference("docker://a.example.org:5000/team/app:1")
    assert list_scopes(reference) == [
        "a.example.org:5000/team/app:1", "a.example.org:5000/team/app", "a.example.org:5000/team", "a.example.org:5000",
        "*.example.org", "*.org", "",
    ]  # fmt: skip
    file = tmp_path / "policy.json"
    scopes = {name: [{"type": "reject"}] for name in ("*.example.org", "a.example.org:5000/team")}
    file.write_text(json.dumps({"default": [{"type": "reject"}], "transports": {"docker": scopes}}))
    assert read_policy(file, reference)[0] == "scope 'a.example.org:5000/team'"


@pytest.mark.parametrize("text", ["", "[]", '{"default": 1}', "{", '{"transports": {}}'])
def test_policies_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "p").write_text(text)
    with pytest.raises(UsageFailure, match="default"):
        read_policy(tmp_path / "p", parse_reference("oci:x"))


@pytest.mark.parametrize("pem", [b"", b"no key", b"-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\nx\n"])
def test_keys_that_are_none(convert, image: Path, tmp_path: Path, pem: bytes) -> None:
    (tmp_path / "k").write_bytes(pem)
    status, line = convert(f"oci:{image}:t", f"oci:{tmp_path / 'o'}:n", "--sign-key", tmp_path / "k")
    assert status == 2 and str(tmp_path / "k") in line
    failure = refused(f"oci:{image}:t", tmp_path / "cache", tmp_path / "k")
    assert isinstance(failure, UsageFailure) and "not a public key" in str(failure)


def test_explain_trust(
    convert, image: Path, tmp_path: Path, memory: MemoryRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = make_keys(tmp_path, "ours")
    reference = f"docker://{memory.host}/x:n"
    digest = convert(f"oci:{image}:t", reference, "--sign-key", private)["manifest_digest"]
    words = ["explain", "trust", reference, "--cache-dir", str(tmp_path / "cache"), "--verify-key", str(public)]
    assert main([*words, "--json"]) == 0
    links = json.loads(capsys.readouterr().out)
    assert [one["link"] for one in links] == ["signature", "manifest", "layer", "bootstrap", "chunks", "bytes"]
    assert links[0]["digest"] == links[1]["digest"] == digest and links[4]["count"] > 0
    assert main(words) == 0
    assert f"signed {digest}" in capsys.readouterr().out
