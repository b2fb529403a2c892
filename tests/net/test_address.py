"""One reading of an address: the host that is connected to is the one that secrets are given by."""

import base64
from urllib.parse import urlsplit

import pytest

from tests.peers.faulty_server import FaultyServer
from tests.storage.conftest import DATA, read
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.address import host_of, origin_of, parse_address
from virtiofsd_nydus.storage.factory import create_backend

AUTH = base64.b64encode(b"someone:the-secret-word").decode()


@pytest.mark.parametrize(
    ("text", "origin", "target"),
    [
        ("http://Host/a?b", "http://host:80", "/a?b"),
        ("HTTPS://host", "https://host:443", "/"),
        ("http://host:8080?x=1#part", "http://host:8080", "/?x=1"),
        ("http://user:pw@host/a", "http://host:80", "/a"),
        ("http://[::1]:5000/a", "http://[::1]:5000", "/a"),
        ("http://evil#@registry/a", "http://evil:80", "/"),
        ("http://evil?@registry/a", "http://evil:80", "/?@registry/a"),
        ("http://evil/@registry/a", "http://evil:80", "/@registry/a"),
        ("http://host/a b\u00e9\\", "http://host:80", "/a%20b%C3%A9%5C"),
        ("http://host/%2f%zz", "http://host:80", "/%2f%zz"),
    ],
)
def test_parts_of_an_address(text: str, origin: str, target: str) -> None:
    address = parse_address(text)
    assert (address.origin, address.target, origin_of(text)) == (origin, target, origin)


@pytest.mark.parametrize(
    "text",
    [
        "", "host", "ftp://host/", "file:///etc", "http:/host", "http://", "http:///a", "http://evil\\@registry/a",
        "http://registry\\.evil/a", "http://a b/", "http://a\tb/", "http://host:port/", "http://host:0/",
        "http://host:65536/", "http://host:8_0/", "http://host:٣/", "http://[::1/", "http://::1/", "http://a[b]/",
        "http://höst/", "http://a%40b/", "http://a@b@c/", "http://host/\n", "http://host/\x00", "http://" + "a" * 20000,
    ],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(Failure, match="not an http address") as caught:
        parse_address(text)
    assert caught.value.cause is Cause.FORMAT and len(str(caught.value)) < 120
    assert "\n" not in host_of(text) and len(host_of(text)) < 80


CRAFTED = [
    "http://{evil}#@{own}/store/{hex}",
    "http://{evil}?@{own}/store/{hex}",
    "http://{evil}/@{own}/store/{hex}",
    "http://{evil}\\@{own}/store/{hex}",
    "http://{evil}\\\\@{own}/store/{hex}",
    "http://{own}@{evil}/store/{hex}",
    "http://{own}#@{evil}/store/{hex}",
    "http://{own}\\@{evil}/store/{hex}",
    "http://{own}:80@{evil}/store/{hex}",
    "http://{own}%40{evil}/store/{hex}",
    "//{evil}/store/{hex}",
    "\\\\{evil}/store/{hex}",
    "/\\{evil}/store/{hex}",
    "http:\\\\{evil}/store/{hex}",
    "http:///{evil}/store/{hex}",
    "http://{evil}\t@{own}/store/{hex}",
    "http://{evil};@{own}/store/{hex}",
]


@pytest.mark.parametrize("crafted", CRAFTED)
@pytest.mark.parametrize("way", ["registry", "mirror", "http-proxy"])
def test_a_redirect_takes_no_secret_to_another_host(
    server: FaultyServer, crafted: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYDUS_HEADER_Cookie", "the-secret-word")
    monkeypatch.setenv("NYDUS_HEADER_X-Api-Key", "the-secret-word")
    blob = server.add(DATA)
    with FaultyServer({blob: DATA}) as evil:
        target = crafted.format(evil=evil.host, own=server.host, hex=blob)
        server.inject("redirect_bad", text=target, times=-1)
        settings = {"scheme": "http", "host": server.host, "repo": "a/b", "auth": AUTH}
        if way == "mirror":
            mirror = {
                "host": f"http://{server.host}",
                "auth_through": True,
                "headers": {"Authorization": f"Basic {AUTH}"},
            }
            settings = {**settings, "host": evil.host, "mirrors": [mirror]}
            settings.pop("auth")
        elif way == "http-proxy":
            settings = {"addr": f"http://{server.host}"}
        backend = create_backend(
            way if way == "http-proxy" else "registry", {**settings, "retry_limit": 1, "timeout": 2}
        )
        try:
            read(backend, blob, 0, 10)
        except Failure:
            pass
        backend.close()
        sent = [(name, value) for one in evil.requests for name, value in one.headers.items()]
        if (
            way == "mirror"
        ):  # the registry itself is the other host there: it gets the environment's secrets, not the mirror's
            sent = [(name, value) for name, value in sent if name not in ("Cookie", "X-Api-Key")]
        assert [name for name, value in sent if "secret" in value or AUTH in value] == []
        assert server.requests  # it was asked, with its secrets
        if way != "mirror":
            assert server.requests[0].headers["Cookie"] == "the-secret-word"


def test_the_host_connected_to_is_the_one_of_the_address(server: FaultyServer) -> None:
    """A plain redirect elsewhere works, without the login."""
    blob = server.add(DATA)
    with FaultyServer({blob: DATA}) as other:
        server.inject("redirect_bad", text=f"http://{other.host}/x/{blob}?sig=1#part", times=1)
        backend = create_backend("registry", {"scheme": "http", "host": server.host, "repo": "a/b", "auth": AUTH})
        assert read(backend, blob, 0, 10) == DATA[:10]
        backend.close()
        assert [one.path for one in other.requests] == [f"/x/{blob}?sig=1"]
        assert urlsplit(f"http://{other.requests[0].headers['Host']}").port == int(other.host.rpartition(":")[2])


def test_a_mirror_without_auth_through_gets_no_secret(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Cookie", "Authorization", "X-Api-Key", "Private-Token", "X-Auth"):
        monkeypatch.setenv(f"NYDUS_HEADER_{name}", "the-secret-word")
    monkeypatch.setenv("NYDUS_HEADER_X-Plain", "plain")
    blob = server.add(DATA)
    for through in (False, True):
        with FaultyServer({blob: DATA}) as mirror:
            mirrors = [{"host": f"http://{mirror.host}", "auth_through": through}]
            backend = create_backend(
                "registry", {"scheme": "http", "host": server.host, "repo": "a/b", "mirrors": mirrors}
            )
            assert read(backend, blob, 0, 10) == DATA[:10]
            backend.close()
            sent = mirror.requests[0].headers
        assert sent["X-Plain"] == "plain"
        assert sum(value == "the-secret-word" for value in sent.values()) == (5 if through else 0)
