"""Backend registry against docker-registry: each way of logging in, and each way of failing told apart."""

import base64
import hashlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.registry import LocalRegistry
from tests.storage.conftest import DATA, read
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.storage.config import parse_config
from virtiofsd_nydus.storage.factory import change_backend, create_backend

pytestmark = pytest.mark.peer

REPO = "team/image"
BLOB = hashlib.sha256(DATA).hexdigest()
VARIANTS = {"plain": {}, "htpasswd": {"auth": "htpasswd"}, "token": {"auth": "token"}, "tls": {"tls": True}}


def store_blob(registry: LocalRegistry) -> None:
    """As the registry's file system driver has it: no client is needed to fill it."""
    file = registry.blob_file(BLOB)
    file.parent.mkdir(parents=True)
    file.write_bytes(DATA)
    link = registry.directory / f"storage/docker/registry/v2/repositories/{REPO}/_layers/sha256/{BLOB}/link"
    link.parent.mkdir(parents=True)
    link.write_text(f"sha256:{BLOB}")


@pytest.fixture(params=list(VARIANTS))
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalRegistry]:
    with LocalRegistry(tmp_path / "registry", **VARIANTS[request.param]) as registry:
        store_blob(registry)
        yield registry


def settings_for(registry: LocalRegistry, **changes: object) -> dict:
    settings: dict = {"scheme": "https" if registry.tls else "http", "host": registry.host, "repo": REPO}
    login = f"{registry.username}:{registry.password}"
    settings["auth"] = base64.b64encode(login.encode()).decode()
    if registry.tls:
        settings["ca_cert_files"] = [str(registry.ca_cert)]
    return {**settings, **changes}


def fail(settings: dict, blob_id: str = BLOB) -> Failure:
    backend = create_backend("registry", settings)
    with pytest.raises(Failure) as caught:
        read(backend, blob_id, 0, 10)
    backend.close()
    assert "\n" not in str(caught.value) and settings["host"] in str(caught.value)
    return caught.value


def test_ranges(registry: LocalRegistry) -> None:
    backend = create_backend("registry", settings_for(registry))
    for offset, length in ((0, len(DATA)), (0, 1), (len(DATA) - 1, 1), (12345, 300_000)):
        assert read(backend, BLOB, offset, length) == DATA[offset : offset + length]
    assert backend.blob_size(BLOB) == len(DATA)
    deadline = time.monotonic() + 10
    while len(registry.blob_requests(BLOB)) < 4 and time.monotonic() < deadline:
        pass  # the look at the log waits by itself
    assert sorted(one.body_bytes for one in registry.blob_requests(BLOB)) == [1, 1, 300_000, len(DATA)]
    assert registry.blob_bytes() == len(DATA) + 300_002
    if registry.token_server is not None:
        assert len(registry.token_server.calls) == 1
    backend.close()


def test_causes(registry: LocalRegistry) -> None:
    assert fail(settings_for(registry), "0" * 64).cause is Cause.MISSING
    other_scheme = fail(settings_for(registry, scheme="http" if registry.tls else "https"))
    assert other_scheme.cause is Cause.SCHEME
    wrong = base64.b64encode(f"{registry.username}:not-the-word".encode()).decode()
    if "auth:" in (registry.directory / "config.yml").read_text():
        refused = fail(settings_for(registry, auth=wrong))
        assert refused.cause is Cause.AUTH and registry.username in str(refused)
        assert "not-the-word" not in str(refused) and wrong not in str(refused)
        assert fail(settings_for(registry, auth="")).cause is Cause.AUTH
    if registry.tls:
        untrusted = fail(settings_for(registry, ca_cert_files=[]))
        assert untrusted.cause is Cause.SCHEME and "certificate" in str(untrusted)
        backend = create_backend("registry", settings_for(registry, ca_cert_files=[], skip_verify=True))
        assert read(backend, BLOB, 0, 10) == DATA[:10]
    registry.stop(signal.SIGKILL)
    assert fail(settings_for(registry)).cause is Cause.NETWORK


def test_a_registry_that_comes_back(registry: LocalRegistry) -> None:
    """Connections kept from before its death do no harm."""
    backend = create_backend("registry", settings_for(registry))
    assert read(backend, BLOB, 0, 10) == DATA[:10]
    registry.stop(signal.SIGKILL)
    with pytest.raises(Failure) as caught:
        read(backend, BLOB, 0, 10)
    assert caught.value.cause in (Cause.NETWORK, Cause.AUTH)
    registry.start()
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    backend.close()


def test_mirror(tmp_path: Path) -> None:
    """Two real registries: the mirror has one of two blobs, dies, and comes back."""
    with (
        LocalRegistry(tmp_path / "registry", auth="htpasswd") as registry,
        LocalRegistry(tmp_path / "mirror") as mirror,
    ):
        store_blob(registry)
        store_blob(mirror)
        backend = create_backend(
            "registry",
            settings_for(
                registry,
                mirrors=[
                    {
                        "host": f"http://{mirror.host}",
                        "ping_url": f"http://{mirror.host}/v2/",
                        "failure_limit": 1,
                        "health_check_interval": 0.2,
                    }
                ],
            ),
        )
        assert read(backend, BLOB, 5, 10) == DATA[5:15]
        assert (len(mirror.blob_requests()), len(registry.blob_requests())) == (1, 0)
        mirror.stop(signal.SIGKILL)
        for _ in range(3):
            assert read(backend, BLOB, 5, 10) == DATA[5:15]
        assert len(registry.blob_requests()) == 3
        mirror.start()
        deadline = time.monotonic() + 20
        while len(mirror.blob_requests()) < 2:
            assert read(backend, BLOB, 5, 10) == DATA[5:15]
            assert time.monotonic() < deadline
        backend.close()


def test_anonymous_token(tmp_path: Path) -> None:
    with LocalRegistry(tmp_path / "registry", auth="token", anonymous_pull=True) as registry:
        store_blob(registry)
        backend = create_backend("registry", settings_for(registry, auth=""))
        for _ in range(3):
            assert read(backend, BLOB, 5, 10) == DATA[5:15]
        assert registry.token_server is not None
        assert [(call[0], call[1], call[3]) for call in registry.token_server.calls] == [("GET", "", 200)]
        backend.close()


@pytest.mark.parametrize("auth", ["htpasswd", "token"])
def test_logins_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auth: str) -> None:
    """A hot change, used at once though the login before it was refused; the environment; docker's own file."""
    with LocalRegistry(tmp_path / "registry", auth=auth) as registry:
        store_blob(registry)
        login = settings_for(registry)["auth"]
        backend = create_backend("registry", settings_for(registry, auth=base64.b64encode(b"someone:else").decode()))
        with pytest.raises(Failure) as caught:
            read(backend, BLOB, 0, 10)
        assert caught.value.cause is Cause.AUTH and backend.status()["login"] == "refused"
        assert change_backend(backend, {"registry_auth": login}) == []
        assert read(backend, BLOB, 5, 10) == DATA[5:15]
        change_backend(backend, {"registry_auth": base64.b64encode(b"someone:again").decode()})
        with pytest.raises(Failure) as caught:
            read(backend, BLOB, 0, 10)
        assert caught.value.cause is Cause.AUTH
        backend.close()

        config = json.dumps(
            {
                "version": 2,
                "cache": {"type": "blobcache"},
                "backend": {"type": "registry", "registry": settings_for(registry, auth="")},
            }
        )
        monkeypatch.setenv("IMAGE_PULL_AUTH", login)
        parsed = parse_config(config)
        assert read(create_backend(parsed.backend_type, parsed.backend_config), BLOB, 5, 10) == DATA[5:15]
        monkeypatch.delenv("IMAGE_PULL_AUTH")
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        parsed = parse_config(config)
        backend = create_backend(parsed.backend_type, parsed.backend_config)
        with pytest.raises(Failure):
            read(backend, BLOB, 0, 10)
        backend.close()
        (tmp_path / "config.json").write_text(json.dumps({"auths": {registry.host: {"auth": login}}}))
        backend = create_backend(parsed.backend_type, parsed.backend_config)
        assert read(backend, BLOB, 5, 10) == DATA[5:15]
        backend.close()
