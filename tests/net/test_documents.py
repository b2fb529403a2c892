"""Texts of others: nested too deeply is a fault of the text, told as such, wherever one is read."""

import os
import re
import socket
import threading
from pathlib import Path

import pytest

from virtiofsd_nydus.daemon.supervisor import receive_state
from virtiofsd_nydus.errors import Failure, UsageFailure
from virtiofsd_nydus.kernelmount.record import FILE, recorded_id
from virtiofsd_nydus.net.documents import parse_json
from virtiofsd_nydus.storage.config import parse_config

DEEP = "[" * 100_000
# These read what a process of ours wrote for them alone, or say what is wrong in words of their own
ON_THEIR_OWN = {
    "net/documents.py",
    "daemon/requests.py",
    "keeper/protocol.py",
    "kernelmount/launch.py",
    "kernelmount/settings.py",
    "oci/serve.py",
    "oci/toc.py",
    "storage/config.py",
    "vhost/sessionstate.py",
    "vmm/servers.py",
}


def test_a_supervisors_state(tmp_path: Path) -> None:
    path = str(tmp_path / "supervisor.sock")
    with socket.socket(socket.AF_UNIX) as listener, open(os.devnull, "rb") as file:
        listener.bind(path)
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                socket.send_fds(connection, [b"["], [file.fileno()])
                connection.sendall(DEEP.encode())

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(Failure, match="nested too deeply"):
            receive_state(path)
        thread.join()


def test_a_record_of_a_mount(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(DEEP)
    assert recorded_id(tmp_path) == 0


@pytest.mark.parametrize("text", [DEEP, f"a = {DEEP}"])
def test_a_configuration(text: str) -> None:
    with pytest.raises(UsageFailure, match="nested too deeply"):
        parse_config(text)


def test_there_is_one_way_to_read_json() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)
    top = Path(__file__).parents[2] / "virtiofsd_nydus"
    found = {str(path.relative_to(top)) for path in top.rglob("*.py") if re.search(r"json\.loads?\(", path.read_text())}
    assert found <= ON_THEIR_OWN
