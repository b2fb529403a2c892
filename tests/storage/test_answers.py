"""An answer is looked at before a byte of it is used: its place, its encoding, and who gave it."""

import pytest

from tests.peers.faulty_server import FaultyServer
from tests.storage.conftest import DATA, read
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.storage.factory import create_backend

START, LENGTH = 500_000, 1000


@pytest.mark.parametrize("at", [-1000, -10, -1, 1, 10, 1000])
@pytest.mark.parametrize("length", [1, LENGTH])
def test_a_range_that_begins_elsewhere_is_not_used(server: FaultyServer, make, at: int, length: int) -> None:
    """Rightly labelled, but not what was asked for: not one byte of it is handed on."""
    blob = server.add(DATA)
    server.inject("shift_range", at_bytes=at)
    assert read(make(timeout=10), blob, START, length) == DATA[START : START + length]
    assert len(server.requests) == 2
    server.inject("shift_range", at_bytes=at, times=-1)
    with pytest.raises(Failure) as caught:
        read(make(timeout=10), blob, START, length)
    assert caught.value.cause is Cause.NETWORK


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "identity, gzip", "aws-chunked"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_range_of_something_encoded_is_not_used(server: FaultyServer, make, encoding: str, whole: bool) -> None:
    """Its offsets count other bytes than the blob's. whole: the answer is a 200 with all of it."""
    data = DATA[:LENGTH]
    blob = server.add(data)
    fault = {"kind": "encode", "text": encoding}
    if whole:
        server.inject("restatus", status=200, headers={"Content-Encoding": encoding})
    else:
        server.inject(**fault)
    assert read(make(timeout=10), blob, 0, LENGTH) == data
    assert len(server.requests) == 2
    server.inject(**fault, times=-1)
    with pytest.raises(Failure) as caught:
        read(make(timeout=10), blob, 0, LENGTH)
    assert caught.value.cause is Cause.NETWORK


@pytest.mark.parametrize("encoding", ["identity", "IDENTITY", ""])
def test_what_is_not_encoded_is_used(server: FaultyServer, make, encoding: str) -> None:
    blob = server.add(DATA)
    server.inject("encode", text=encoding, times=-1)
    assert read(make(timeout=10), blob, START, LENGTH) == DATA[START : START + LENGTH]


@pytest.mark.parametrize("way", ["proxy", "mirror", "redirect"])
def test_a_416_is_final_only_where_the_registry_says_it(server: FaultyServer, way: str) -> None:
    """What stands between may hold a blob that is cut short; the registry's is whole."""
    blob = server.add(DATA)
    settings = {"scheme": "http", "host": server.host, "repo": "a/b", "timeout": 10}
    with FaultyServer({blob: DATA[:1000]}) as between:
        if way == "proxy":
            settings["proxy"] = {"url": between.url}
        elif way == "mirror":
            settings["mirrors"] = [{"host": between.url}]
        else:
            server.inject("redirect", text=between.url)
            between.inject("delay", match="never")
            server.signatures = between.signatures
        backend = create_backend("registry", settings)
        assert read(backend, blob, START, LENGTH) == DATA[START : START + LENGTH]
        backend.close()
        assert between.requests
    short = server.add(DATA[:1000])
    backend = create_backend("registry", {"scheme": "http", "host": server.host, "repo": "a/b", "timeout": 10})
    with pytest.raises(Failure, match="has 1000 bytes") as caught:
        read(backend, short, START, LENGTH)
    assert caught.value.cause is Cause.FORMAT
    backend.close()


@pytest.mark.parametrize("status", [400, 405, 501])
@pytest.mark.parametrize("kind", ["registry", "http-proxy"])
def test_the_size_where_no_head_is_served(server: FaultyServer, kind: str, status: int) -> None:
    blob = server.add(DATA)
    server.inject("status", status=status, match="HEAD ", times=-1)
    settings = {"scheme": "http", "host": server.host, "repo": "a/b"} if kind == "registry" else {"addr": server.url}
    backend = create_backend(kind, {**settings, "timeout": 10})
    assert backend.blob_size(blob) == len(DATA)
    backend.close()
