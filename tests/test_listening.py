"""Listening unix sockets: whose a path is."""

import socket
from pathlib import Path

import pytest

from virtiofsd_nydus.daemon.server import listen_api
from virtiofsd_nydus.errors import Failure


def test_the_socket_of_a_living_daemon_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    first = listen_api(str(path))
    with pytest.raises(Failure, match=r"API socket .* is in use by another process"):
        listen_api(str(path))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        first.socket.settimeout(10)
        first.socket.accept()[0].close()
    first.close()
    assert not path.exists()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    with pytest.raises(Failure, match="exists and is not a socket"):
        listen_api(str(tmp_path / "precious"))
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_successors_socket_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    first = listen_api(str(path))
    path.rename(tmp_path / "kept")  # so that the successor's inode is another one
    second = listen_api(str(path))
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()
