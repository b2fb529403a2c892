"""Blobs and backends for the storage tests."""

from collections.abc import Iterator

import pytest

from tests.peers.faulty_server import FaultyServer
from virtiofsd_nydus.storage.blobs import HttpBackend, read_patiently
from virtiofsd_nydus.storage.factory import create_backend

# Not a multiple of any piece, and no two parts alike.
DATA = b"".join(index.to_bytes(4, "little") for index in range(250_001))


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server


@pytest.fixture
def make(server: FaultyServer):
    """A registry backend on the faulty server, impatient so that tests are quick."""
    made = []

    def make(**settings):
        backend = create_backend(
            "registry",
            {"scheme": "http", "host": server.host, "repo": "a/b", "timeout": 0.6, "connect_timeout": 0.6, **settings},
        )
        made.append(backend)
        return backend

    yield make
    for backend in made:
        backend.close()


def read(backend, *args, **options) -> bytes:
    """As a tool reads, which may wait between attempts."""
    if isinstance(backend, HttpBackend):
        return b"".join(bytes(piece) for piece in read_patiently(backend, *args, **options))
    return b"".join(bytes(piece) for piece in backend.read_range(*args, **options))
