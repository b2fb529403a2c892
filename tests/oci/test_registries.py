"""Registries with the habits that real ones are known for, hosts.toml, and the kubelet's credential providers."""

import json
import socket
import stat
import sys
from pathlib import Path

import pytest

from tests.oci.conftest import BIG
from tests.oci.test_served import read_everything, serving
from tests.peers.memory_registry import HABITS, Habits, MemoryRegistry
from tests.peers.registry import LocalRegistry, make_certificate
from virtiofsd_nydus.cli.main import main
from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.net.hosts import find_hosts
from virtiofsd_nydus.net.kubelet import Providers, matches, parse_duration
from virtiofsd_nydus.storage.factory import create_backend

LOGIN = "user:word"


@pytest.fixture(scope="session")
def nydus(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout with the Nydus image `n`, which is read by ranges."""
    layout = tmp_path_factory.mktemp("nydus") / "layout"
    assert main(["convert", f"oci:{image}:t", f"oci:{layout}:n"]) == 0
    return layout


def creds_of(habits: Habits) -> str:
    return habits.basic or habits.token or ""


@pytest.mark.parametrize("name", HABITS)
def test_every_registry_by_its_habits(
    nydus: Path, image: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain image and a Nydus one, from a registry that logs in, redirects, refuses and answers as this one does."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "none"))
    habits = HABITS[name]
    with MemoryRegistry(habits) as memory:
        memory.load(image, "t")
        memory.load(nydus, "n")
        for tag in ("t", "n"):
            reference = f"docker://{memory.host}/team/app:{tag}"
            with serving(reference, tmp_path / tag, creds=creds_of(habits)) as (_, guest):
                read_everything(guest)
        storage = [one for one in memory.seen if one.path.startswith("/storage/")]
        assert bool(storage) == (habits.redirect is not None)
        assert not any("Authorization" in one.headers for one in storage), "a login went where a redirect led"


def test_a_signed_address_that_expires_in_the_middle_of_a_read(nydus: Path, tmp_path: Path) -> None:
    with MemoryRegistry(Habits(redirect=1)) as memory:
        memory.load(nydus, "n")
        with serving(f"docker://{memory.host}/x:n", tmp_path / "cache") as (_, guest):
            read_everything(guest)
        assert any(one.status == 403 for one in memory.seen if one.path.startswith("/storage/"))


def test_a_range_that_is_answered_whole_is_told(nydus: Path, tmp_path: Path) -> None:
    """A registry that ignores ranges cannot serve lazily; the line says what is to be mended."""
    with MemoryRegistry(Habits(range_status=200)) as memory:
        memory.load(nydus, "n")
        blob = max(memory.blobs, key=lambda one: len(memory.blobs[one]))
        backend = create_backend("registry", {"scheme": "http", "host": memory.host, "repo": "x"})
        with pytest.raises(Failure, match="does not serve byte ranges") as caught:
            list(backend.read_range(blob[7:], 1000, 1000))
        assert caught.value.cause is Cause.NETWORK
        backend.close()


def test_a_range_beyond_the_end_is_told(nydus: Path) -> None:
    with MemoryRegistry() as memory:
        memory.load(nydus, "n")
        blob = max(memory.blobs, key=lambda one: len(memory.blobs[one]))
        backend = create_backend("registry", {"scheme": "http", "host": memory.host, "repo": "x"})
        size = len(memory.blobs[blob])
        with pytest.raises(Failure, match=f"has {size} bytes"):
            list(backend.read_range(blob[7:], size, 10))
        backend.close()


def test_ipv6(nydus: Path, tmp_path: Path) -> None:
    try:
        memory = MemoryRegistry(family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with memory:
        memory.load(nydus, "n")
        with serving(f"docker://{memory.host}/x:n", tmp_path / "cache") as (_, guest):
            assert guest.fuse.read_file("big") == BIG


# ---- hosts.toml


def test_hosts_toml(nydus: Path, tmp_path: Path) -> None:
    """A mirror that has all is asked for all; the registry behind it is not asked at all, and takes over when it
    goes."""
    with MemoryRegistry() as mirror, MemoryRegistry() as memory:
        for one in (mirror, memory):
            one.load(nydus, "n")
        name, _, port = memory.host.partition(":")
        folder = tmp_path / "certs.d" / f"{name}_{port}_"
        folder.mkdir(parents=True)
        (folder / "hosts.toml").write_text(
            f'server = "http://{memory.host}"\n[host."http://{mirror.host}"]\n'
            'capabilities = ["pull", "resolve"]\n[host."http://' + mirror.host + '".header]\nx-team = ["a", "b"]\n'
        )
        reference, options = f"docker://{memory.host}/x:n", {"hosts_dir": str(tmp_path / "certs.d")}
        with serving(reference, tmp_path / "cache", **options) as (_, guest):
            read_everything(guest)
            assert memory.gets("blobs/") <= 3 and mirror.gets("blobs/") > 0  # configuration, bootstrap
            assert {one.headers.get("x-team") for one in mirror.seen if "blobs" in one.path} <= {"a, b", None}
            assert any(f"ns={memory.host}" in one.path for one in mirror.seen)
        mirror.down = True
        with serving(reference, tmp_path / "other", **options) as (_, guest):
            read_everything(guest)


def test_a_mirrors_own_ca_and_path(nydus: Path, tmp_path: Path) -> None:
    """override_path: the API lies below another path, as with proxy caches; ca: for that server alone."""
    folder = tmp_path / "certs.d" / "registry.example"
    folder.mkdir(parents=True)
    make_certificate(folder, "ca")
    (folder / "hosts.toml").write_text(
        '[host."https://cache.example/v2/proxy"]\noverride_path = true\nca = "ca.pem"\n'
        'skip_verify = true\nclient = "x"\n'
        '[host."https://second.example/below"]\ncapabilities = ["resolve"]\n'
    )
    lines: list[str] = []
    hosts = find_hosts(str(tmp_path / "certs.d"), "registry.example", lines.append)
    assert [(one.scheme, one.host, one.prefix, one.pull, one.resolve, one.own) for one in hosts] == [
        ("https", "cache.example", "v2/proxy", True, True, False),
        ("https", "second.example", "below/v2", False, True, False),
        ("https", "registry.example", "v2", True, True, True),
    ]
    assert hosts[0].ca_cert_files == (str(folder / "ca.pem"),) and hosts[0].skip_verify
    assert len(lines) == 1 and "client" in lines[0]
    (folder / "hosts.toml").write_text("server = [")
    with pytest.raises(UsageFailure, match="not TOML"):
        find_hosts(str(tmp_path / "certs.d"), "registry.example")
    assert find_hosts(str(tmp_path / "certs.d"), "other.example") == []


@pytest.mark.peer
def test_a_tls_mirror_by_its_ca(nydus: Path, tmp_path: Path) -> None:
    from tests.oci.conftest import skopeo

    with LocalRegistry(tmp_path / "r", tls=True) as mirror, MemoryRegistry() as memory:
        memory.load(nydus, "n")
        skopeo("copy", "-q", "--dest-tls-verify=false", f"oci:{nydus}:n", f"docker://{mirror.host}/x:n")
        folder = tmp_path / "certs.d" / "_default"
        folder.mkdir(parents=True)
        (folder / "hosts.toml").write_text(f'[host."https://{mirror.host}"]\nca = "{mirror.ca_cert}"\n')
        mirror.clear_log()
        with serving(f"docker://{memory.host}/x:n", tmp_path / "c", hosts_dir=str(tmp_path / "certs.d")) as (_, guest):
            read_everything(guest)
        assert mirror.blob_requests() and memory.gets("blobs/") <= 3


# ---- the kubelet's credential providers

PLUGIN = """#!{python}
import json, sys
asked = json.load(sys.stdin)
with open({log!r}, "a") as log:
    print(asked["image"], " ".join(sys.argv[1:]), file=log)
assert asked["kind"] == "CredentialProviderRequest"
answer = {{"kind": "CredentialProviderResponse", "apiVersion": asked["apiVersion"], "cacheKeyType": {kind!r},
          "cacheDuration": "1h", "auth": {{{pattern!r}: {{"username": "user", "password": "word"}}}}}}
print(json.dumps(answer))
"""


def make_plugin(folder: Path, pattern: str, kind: str = "Registry") -> tuple[str, str, Path]:
    """Configuration, directory of the programs, and what the plugin was asked."""
    folder.mkdir()
    program, log = folder / "cloud-login", folder / "log"
    log.touch()
    program.write_text(PLUGIN.format(python=sys.executable, log=str(log), kind=kind, pattern=pattern))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    provider = {
        "name": "cloud-login", "matchImages": [pattern], "defaultCacheDuration": "0s", "args": ["--v"],
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
    }  # fmt: skip
    config = folder / "config.json"
    config.write_text(json.dumps({"kind": "CredentialProviderConfig", "providers": [provider]}))
    return str(config), str(folder), log


@pytest.mark.parametrize("kind", ["Image", "Registry", "Global"])
def test_a_plugin_gives_the_login(nydus: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "none"))
    with MemoryRegistry(Habits(basic=LOGIN)) as memory:
        memory.load(nydus, "n")
        config, bin_dir, log = make_plugin(tmp_path / "bin", memory.host, kind)
        options = {"provider_config": config, "provider_bin_dir": bin_dir}
        with serving(f"docker://{memory.host}/team/app:n", tmp_path / "cache", **options) as (_, guest):
            read_everything(guest)
        asked = log.read_text().splitlines()
        assert set(asked) == {f"{memory.host}/team/app --v"} and len(asked) <= 2  # the verb, the daemon
        document = json.dumps([one.headers.get("Authorization") for one in memory.seen])
        assert "Basic" in document


@pytest.mark.parametrize(
    ("pattern", "image", "fits"),
    [
        ("registry.io", "registry.io/app", True),
        ("registry.io:8080/path", "registry.io:8080/path/app", True),
        ("registry.io:8080", "registry.io/app", False),
        ("*.registry.io", "a.registry.io/app", True),
        ("*.registry.io", "a.b.registry.io/app", False),
        ("*.*.registry.io", "a.b.registry.io/app", True),
        ("123456789.dkr.ecr.*.amazonaws.com", "123456789.dkr.ecr.eu-1.amazonaws.com/app", True),
        ("registry.io/team", "registry.io/other", False),
    ],
)
def test_patterns_of_images(pattern: str, image: str, fits: bool) -> None:
    assert matches(pattern, image) is fits


@pytest.mark.parametrize(
    ("text", "seconds"), [("12h", 43200.0), ("1h30m", 5400.0), ("0s", 0.0), ("1.5h", 5400.0), ("x", 0.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


def test_plugins_that_fail(tmp_path: Path) -> None:
    config, bin_dir, _ = make_plugin(tmp_path / "bin", "a.example")
    assert Providers(config, bin_dir).find("b.example", "app", 5.0) is None
    program = tmp_path / "bin" / "cloud-login"
    for text, why in (
        ("echo no >&2; exit 3", "no"),
        ("echo '{}'", "no CredentialProviderResponse"),
        ("sleep 9", "no answer"),
    ):
        program.write_text(f"#!/bin/sh\n{text}\n")
        with pytest.raises(Failure, match=why) as caught:
            Providers(config, bin_dir).find("a.example", "app", 0.5)
        assert caught.value.cause is Cause.AUTH
    program.unlink()
    with pytest.raises(Failure, match="No such file"):
        Providers(config, bin_dir).find("a.example", "app", 0.5)
    (tmp_path / "bin/config.json").write_text('{"kind": "CredentialProviderConfig", "providers": [{"name": "../x"}]}')
    with pytest.raises(UsageFailure, match="matchImages"):
        Providers(config, bin_dir)
