"""resolve_image: what serves an image, from a registry and from a layout."""

import base64
import json
from pathlib import Path

import pytest

from tests.oci.conftest import LAYERS
from tests.peers.faulty_server import FaultyServer
from tests.peers.registry import LocalRegistry
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.image import resolve_image
from virtiofsd_nydus.oci.store import Access
from virtiofsd_nydus.storage.factory import create_backend

pytestmark = pytest.mark.peer


@pytest.fixture
def references(convert, image: Path, registry: LocalRegistry, tmp_path: Path) -> list[str]:
    targets = [f"docker://{registry.host}/resolve/a:n", f"oci:{tmp_path / 'out'}:n"]
    for target in targets:
        convert(f"oci:{image}:t", target)
    return targets


def test_resolve(references: list[str], tmp_path: Path) -> None:
    found = [
        resolve_image(reference, cache_dir=tmp_path / f"cache{index}") for index, reference in enumerate(references)
    ]
    assert found[0].manifest_digest == found[1].manifest_digest
    assert found[0].bootstrap.read_bytes() == found[1].bootstrap.read_bytes()
    assert found[0].blobs == found[1].blobs and len(found[0].blobs) == 2
    assert found[0].config["config"]["Cmd"] == ["/bin/true"]
    assert [one.backend_type for one in found] == ["registry", "localfs"]
    for one in found:
        backend = create_backend(one.backend_type, one.backend_config()["config"])
        for blob_id, size in one.blobs.items():
            assert backend.blob_size(blob_id) == size
            assert sum(len(piece) for piece in backend.read_range(blob_id, 0, size)) == size
        backend.close()


def test_the_bootstrap_is_fetched_once(references: list[str], registry: LocalRegistry, tmp_path: Path) -> None:
    registry.clear_log()
    first = resolve_image(references[0], cache_dir=tmp_path / "cache")
    again = resolve_image(references[0], cache_dir=tmp_path / "cache")
    assert first == again
    layer = first.bootstrap.name.partition(".")[0]
    assert len(registry.blob_requests(layer)) == 1
    # damaged in the cache: taken out of the layer again; and that one is fetched anew when it is damaged itself
    data = first.bootstrap.read_bytes()
    for file, requests in ((first.bootstrap, 1), (first.bootstrap.with_suffix(".tar.gz"), 2)):
        file.chmod(0o600)
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        assert resolve_image(references[0], cache_dir=tmp_path / "cache").bootstrap.read_bytes() == data
        assert len(registry.blob_requests(layer)) == requests
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".boot", ".gz"]


def test_a_damaged_bootstrap_is_refused(references: list[str], registry: LocalRegistry, tmp_path: Path) -> None:
    layer = resolve_image(references[0], cache_dir=tmp_path / "a").bootstrap.name.partition(".")[0]
    for at_bytes in (5, 100, 1000):
        with FaultyServer(upstream=registry.host) as front:
            front.inject("corrupt", at_bytes=at_bytes, match=layer, times=-1)
            with pytest.raises(Failure, match="damaged") as caught:
                resolve_image(f"docker://{front.host}/resolve/a:n", cache_dir=tmp_path / "b")
            assert caught.value.cause is Cause.DIGEST
    assert list((tmp_path / "b").iterdir()) == []


def test_an_oci_image_is_told_how_to_become_one(image: Path, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"not a Nydus image.*virtiofsd-nydus convert") as caught:
        resolve_image(f"oci:{image}:t", cache_dir=tmp_path)
    assert caught.value.cause is Cause.FORMAT


def test_the_login_goes_along_unseen(convert, image: Path, tmp_path: Path) -> None:
    with LocalRegistry(tmp_path / "r", auth="htpasswd") as registry:
        reference = f"docker://{registry.host}/private/a:n"
        creds = f"{registry.username}:{registry.password}"
        convert(f"oci:{image}:t", reference, "--creds", creds)
        found = resolve_image(reference, cache_dir=tmp_path / "cache", access=Access(creds=creds))
        auth = found.backend_config()["config"]["auth"]
        assert auth not in repr(found) and registry.password not in repr(found)
        backend = create_backend("registry", found.backend_config()["config"])
        blob_id, size = next(iter(found.blobs.items()))
        assert sum(len(piece) for piece in backend.read_range(blob_id, 0, size)) == size
        backend.close()


@pytest.mark.parametrize("kind", ["auth", "identity token"])
def test_dockers_login_stays_where_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """No login of docker's goes into a mount's configuration: the backend looks it up itself, token or password."""
    from tests.oci.conftest import write_image
    from virtiofsd_nydus.cli.main import main

    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    write_image(tmp_path / "layout", LAYERS[:1])
    with LocalRegistry(tmp_path / "r") as registry, FaultyServer(upstream=registry.host) as front:
        assert main(["convert", f"oci:{tmp_path / 'layout'}:t", f"docker://{registry.host}/kept/a:n"]) == 0
        if kind == "auth":
            front.basic_user = "someone:word"
            entry = {"auth": base64.b64encode(b"someone:word").decode()}
        else:
            front.token_user = "refresh:the-token"
            entry = {"auth": base64.b64encode(b"someone:").decode(), "identitytoken": "the-token"}
        (tmp_path / "config.json").write_text(json.dumps({"auths": {front.host: entry}}))
        found = resolve_image(f"docker://{front.host}/kept/a:n", cache_dir=tmp_path / "cache")
        settings = found.backend_config()["config"]
        assert "auth" not in settings and "word" not in json.dumps(settings) and "the-token" not in json.dumps(settings)
        backend = create_backend("registry", settings)
        blob_id, size = next(iter(found.blobs.items()))
        assert sum(len(piece) for piece in backend.read_range(blob_id, 0, size)) == size
        backend.close()


def test_a_tls_registry(convert, image: Path, tmp_path: Path) -> None:
    with LocalRegistry(tmp_path / "r", tls=True) as registry:
        reference = f"docker://{registry.host}/tls/a:n"
        ca = str(registry.ca_cert)
        convert(f"oci:{image}:t", reference, "--ca-cert", ca)
        with pytest.raises(Failure, match="certificate is not trusted") as caught:
            resolve_image(reference, cache_dir=tmp_path / "cache")
        assert caught.value.cause is Cause.SCHEME
        for options in ({"ca_cert_files": (ca,)}, {"skip_verify": True}):
            found = resolve_image(reference, cache_dir=tmp_path / "cache", access=Access(**options))
            settings = found.backend_config()["config"]
            assert settings["scheme"] == "https"
            backend = create_backend("registry", settings)
            blob_id, size = next(iter(found.blobs.items()))
            assert sum(len(piece) for piece in backend.read_range(blob_id, 0, size)) == size
            backend.close()
