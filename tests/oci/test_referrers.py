"""Artifacts beside an image: pushed and found by the API, by the tag scheme, and in a layout."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.oci.conftest import skopeo
from tests.peers.memory_registry import Habits, MemoryRegistry
from tests.peers.registry import LocalRegistry
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.image import open_store
from virtiofsd_nydus.oci.manifest import Descriptor, digest_of
from virtiofsd_nydus.oci.reference import parse_reference
from virtiofsd_nydus.oci.referrers import (
    ArtifactPart,
    list_referrers,
    push_artifact,
    read_artifact,
    read_part,
    referrers_tag,
)
from virtiofsd_nydus.oci.store import ImageStore

TYPE = "application/vnd.test.index"
PLACES = ["api", "tags", "docker-registry", "layout"]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, image: Path, tmp_path: Path, registry: LocalRegistry) -> Iterator[str]:
    """A reference to the image `t`, in a place of each kind."""
    if request.param == "layout":
        skopeo("copy", "-q", f"oci:{image}:t", f"oci:{tmp_path / 'layout'}:t")
        yield f"oci:{tmp_path / 'layout'}:t"
    elif request.param == "docker-registry":
        name = f"{registry.host}/referrers/a:t"
        skopeo("copy", "-q", "--dest-tls-verify=false", f"oci:{image}:t", f"docker://{name}")
        yield f"docker://{name}"
    else:
        with MemoryRegistry(Habits(referrers=request.param == "api")) as memory:
            skopeo("copy", "-q", "--dest-tls-verify=false", f"oci:{image}:t", f"docker://{memory.host}/x:t")
            yield f"docker://{memory.host}/x:t"


def open_image(reference: str) -> tuple[ImageStore, Descriptor]:
    parsed = parse_reference(reference)
    store = open_store(parsed)
    data, media_type = store.get_manifest(parsed.version)
    return store, Descriptor(media_type, digest_of(data), len(data))


def test_what_is_pushed_is_found(place: str) -> None:
    store, subject = open_image(place)
    assert list_referrers(store, subject.digest) == []
    digest = push_artifact(store, subject, TYPE, [ArtifactPart("text/plain", b"one", {"k": "v"})], {"note": "first"})
    other = push_artifact(store, subject, "application/vnd.test.other", [])
    assert (
        push_artifact(store, subject, TYPE, [ArtifactPart("text/plain", b"one", {"k": "v"})], {"note": "first"})
        == digest
    )
    store.close()
    store, _ = open_image(place)
    found = list_referrers(store, subject.digest, TYPE)
    assert [(one.descriptor.digest, one.annotations) for one in found] == [(digest, {"note": "first"})]
    assert {one.descriptor.digest for one in list_referrers(store, subject.digest)} == {digest, other}
    manifest = read_artifact(store, found[0], subject.digest)
    assert read_part(store, manifest.layers[0], "part") == b"one" and manifest.layers[0].annotations == {"k": "v"}
    assert open_image(place)[1] == subject  # the image is untouched, and still what its tag names
    store.close()


def test_a_layouts_only_image_is_found_beside_its_referrers(image: Path, tmp_path: Path) -> None:
    skopeo("copy", "-q", f"oci:{image}:t", f"oci:{tmp_path / 'layout'}:t")
    store, subject = open_image(f"oci:{tmp_path / 'layout'}")
    push_artifact(store, subject, TYPE, [])
    assert digest_of(store.get_manifest("")[0]) == subject.digest
    store.close()


def test_an_artifact_of_another_image_is_refused(place: str) -> None:
    """A list can say anything: what is read must be the manifest that was listed, and name the subject."""
    store, subject = open_image(place)
    push_artifact(store, subject, TYPE, [])
    found = list_referrers(store, subject.digest)[0]
    with pytest.raises(Failure, match="about another image") as caught:
        read_artifact(store, found, "sha256:" + "0" * 64)
    assert caught.value.cause is Cause.DIGEST
    store.close()


def test_the_tags_index_is_one_of_the_specification() -> None:
    with MemoryRegistry(Habits(referrers=False)) as memory:
        store = open_store(parse_reference(f"docker://{memory.host}/x:t"))
        subject = Descriptor("application/vnd.oci.image.manifest.v1+json", "sha256:" + "1" * 64, 7)
        digest = push_artifact(store, subject, TYPE, [], {"a": "b"})
        media_type, data = memory.manifests[memory.tags[referrers_tag(subject.digest)]]
        assert media_type == "application/vnd.oci.image.index.v1+json"
        entry = json.loads(data)["manifests"][0]
        assert (entry["digest"], entry["artifactType"], entry["annotations"]) == (digest, TYPE, {"a": "b"})
        store.close()
