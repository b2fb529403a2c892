"""Backend registry: redirects, connections, configuration; the registry itself is the real one where it can be."""

import base64
import threading

import pytest

from tests.peers.faulty_server import FaultyServer
from tests.storage.conftest import DATA, read
from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.storage.factory import create_backend


def test_pieces(server: FaultyServer, make) -> None:
    blob = server.add(DATA)
    sizes = [len(piece) for piece in make().read_range(blob, 3, len(DATA) - 3)]
    assert sum(sizes) == len(DATA) - 3
    assert max(sizes) <= 1 << 20
    assert len(server.requests) == 1
    assert read(make(), blob, 3, 0) == b""


def test_an_abandoned_read_does_no_harm(server: FaultyServer, make) -> None:
    blob = server.add(DATA)
    backend = make()
    pieces = backend.read_range(blob, 0, len(DATA))
    piece = bytes(next(pieces))
    assert 0 < len(piece) < len(DATA) and DATA.startswith(piece)
    pieces.close()
    assert read(backend, blob, 10, 20) == DATA[10:30]


def test_blob_size(server: FaultyServer, make) -> None:
    blob = server.add(DATA)
    backend = make()
    assert backend.blob_size(blob) == backend.blob_size(blob) == len(DATA)
    assert [one.method for one in server.requests] == ["HEAD"]


def test_connections_are_kept(server: FaultyServer, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads, many reads each: no more connections than threads."""
    accepted = []
    accept = server._server.get_request
    monkeypatch.setattr(server._server, "get_request", lambda: accepted.append(1) or accept())
    blob = server.add(DATA)
    backend = make()

    def run() -> None:
        for index in range(10):
            assert read(backend, blob, index * 7, 50_000) == DATA[index * 7 : index * 7 + 50_000]

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(server.requests) == 80
    assert len(accepted) <= 8


def test_what_is_not_read_costs_no_connection(server: FaultyServer, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """HEAD, redirects, refusals and errors leave the connection in use."""
    accepted = []
    accept = server._server.get_request
    monkeypatch.setattr(server._server, "get_request", lambda: accepted.append(1) or accept())
    server.token_user = ""
    blobs = [server.add(DATA[index:]) for index in range(3)]
    backend = make()
    for blob in blobs:
        backend.blob_size(blob)
        server.inject("redirect", match="GET /v2/")
        server.inject("status", status=503, text="{}", match="GET /store/")
        assert read(backend, blob, 0, 5) == server.blobs[blob][:5]
    assert len(accepted) == 1


def test_redirect_across_hosts_drops_the_login(server: FaultyServer, make) -> None:
    """The address a redirect names is kept, used without the login, and renewed when it goes stale."""
    blob = server.add(DATA)
    with FaultyServer({blob: DATA}) as store:
        server.token_user = ""
        server.signatures = store.signatures  # one list: the store honours what the registry signed
        server.inject("redirect", text=store.url, at_bytes=2, match="GET /v2/", times=-1)
        server.tokens = {}
        backend = make()
        # The redirect fault answers before the login is asked for; make the login known first.
        server.heal()
        assert read(backend, blob, 0, 10) == DATA[:10]
        server.inject("redirect", text=store.url, at_bytes=2, match="GET /v2/", times=-1)
        server.requests.clear()
        for index in range(5):
            assert read(backend, blob, index, 100) == DATA[index : index + 100]
        assert all(one.authorization == "" for one in store.requests)
        assert all(one.authorization.startswith("Bearer ") for one in server.requests)
        # 5 reads, 2 to an address: 3 asked of the registry, 2 refusals in between
        assert len(server.requests) == 3
        assert [one.status for one in store.requests] == [206, 206, 403, 206, 206, 403, 206]


def test_relative_redirects_and_hops(server: FaultyServer, make) -> None:
    blob = server.add(DATA)
    server.inject("redirect", match="GET /v2/")
    server.inject("redirect", match="GET /store/", times=2)
    assert read(make(), blob, 5, 10) == DATA[5:15]
    assert [one.status for one in server.requests] == [307, 307, 307, 206]


def test_redirect_rewriting(server: FaultyServer, make) -> None:
    """blob_url_scheme and blob_redirected_host change where a redirect leads."""
    blob = server.add(DATA)
    with FaultyServer({blob: DATA}) as store:
        server.signatures = store.signatures
        server.inject("redirect", text="https://blobs.invalid:444", times=-1)
        backend = make(blob_url_scheme="http", blob_redirected_host=store.host)
        assert read(backend, blob, 5, 10) == DATA[5:15]
        assert len(store.requests) == 1


def test_a_dead_redirect_target_is_asked_for_again(server: FaultyServer, make) -> None:
    blob = server.add(DATA)
    backend = make()
    with FaultyServer({blob: DATA}) as store:
        server.signatures = store.signatures
        server.inject("redirect", text=store.url, match="GET /v2/", times=1)
        assert read(backend, blob, 5, 10) == DATA[5:15]
    assert read(backend, blob, 5, 10) == DATA[5:15]


@pytest.mark.parametrize("blob_id", ["../x", "", "abc", "A" * 64, "x" * 64])
def test_blob_ids_that_are_no_digests(make, blob_id: str) -> None:
    with pytest.raises(Failure, match="no sha256 digest") as caught:
        read(make(), blob_id, 0, 1)
    assert caught.value.cause is Cause.FORMAT


def test_unknown_keys_are_one_warning(server: FaultyServer) -> None:
    lines: list[str] = []
    create_backend(
        "registry",
        {
            "host": "h",
            "repo": "r",
            "colour": 1,
            "proxy": {"url": "", "colour": True},
            "mirrors": [{"host": "m", "taste": 1}],
            "zest": 2,
            "readahead": True,
        },
        warn=lines.append,
    )
    assert lines[0] == "backend registry: unknown keys, without effect: colour, zest"
    assert lines[1].startswith("backend registry: readahead is no longer a key")
    assert sorted(lines[2:]) == [
        "backend registry, mirrors: unknown keys, without effect: taste",
        "backend, proxy: unknown keys, without effect: colour",
    ]


@pytest.mark.parametrize(
    ("kind", "settings", "word"),
    [
        ("ftp", {}, "not supported"),
        ("oss", {}, "endpoint and bucket_name"),
        ("s3", {"bucket_name": "b"}, "region"),
        ("localdisk", {}, "device_path"),
        ("http-proxy", {"addr": "x"}, "unix socket"),
        ("registry", {"host": "h", "repo": "r", "proxy": {"url": "ftp://x"}}, "url must be"),
        ("registry", {"host": "h", "repo": "r", "skip_verify": "yes"}, "true or false"),
        ("registry", {"host": "h", "repo": "r", "mirrors": [{"host": "ftp://x"}]}, "mirrors: host"),
        ("registry", {}, "host and repo"),
        ("registry", {"host": "h"}, "host and repo"),
        ("registry", {"host": 5, "repo": "r"}, "host must be a string"),
        ("registry", {"host": "h", "repo": "r", "auth": "???"}, "base64"),
        ("registry", {"host": "h", "repo": "r", "auth": base64.b64encode(b"nocolon").decode()}, "base64"),
        ("registry", {"host": "h", "repo": "r", "timeout": "5"}, "timeout must be a number"),
        ("registry", {"host": "h", "repo": "r", "ca_cert_files": "x"}, "list of strings"),
        ("localfs", {}, "dir or blob_file"),
        ("localfs", [], "object"),
    ],
)
def test_configurations_that_cannot_be(kind: str, settings: dict, word: str) -> None:
    with pytest.raises(UsageFailure, match=word):
        create_backend(kind, settings)


def test_ca_file_that_is_none(server: FaultyServer, make, tmp_path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(Failure, match=r"ca\.pem") as caught:
        read(make(scheme="https", ca_cert_files=[str(tmp_path / "ca.pem")]), "0" * 64, 0, 1)
    assert caught.value.cause is Cause.SCHEME


def test_skip_verify_goes_on_in_plain_http(server: FaultyServer, make) -> None:
    """As nydusd does: what is configured as an insecure registry may turn out not to speak TLS at all."""
    blob = server.add(DATA)
    assert read(make(scheme="https", skip_verify=True), blob, 0, 10) == DATA[:10]
    with pytest.raises(Failure, match="does not speak TLS") as caught:
        read(make(scheme="https"), blob, 0, 10)
    assert caught.value.cause is Cause.SCHEME
