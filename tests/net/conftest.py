"""The faulty server and a backend on it, as tests/storage has them."""

from tests.storage.conftest import make, server

__all__ = ["make", "server"]
