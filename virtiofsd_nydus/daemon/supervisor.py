"""The supervisor socket: a process that outlives us keeps our state and the /dev/fuse descriptor.

The supervisor listens for the time of one transfer, we connect: state bytes and one descriptor with the first of them,
then end of stream (as nydus-snapshotter's supervisors do). The state is opaque to it.
"""

import json
import os
import socket

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.documents import parse_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STATE_VERSION = 1
STATE_MAX_BYTES = 4 << 20
FIRST_BYTES = 32 << 10
TIMEOUT_S = 5.0


def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(TIMEOUT_S)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise Failure(f"cannot reach the supervisor at {path}: {error.strerror or error}", Cause.IO) from None
    return connection


def send_state(path: str, state: "dict[str, Any]", fd: int) -> None:
    """Gives the supervisor a copy of the descriptor and what a successor must know."""
    data = json.dumps({"version": STATE_VERSION, **state}).encode()
    with _connect(path) as connection:
        try:
            sent = socket.send_fds(connection, [data], [fd])
            connection.sendall(data[sent:])
        except OSError as error:
            raise Failure(
                f"cannot send the state to the supervisor at {path}: {error.strerror or error}", Cause.IO
            ) from None


def receive_state(path: str) -> "tuple[dict[str, Any], int]":
    """What a predecessor sent, and the descriptor, which is the caller's."""
    fds: list[int] = []
    with _connect(path) as connection:
        try:
            data, fds, _, _ = socket.recv_fds(connection, FIRST_BYTES, 1)
            while len(data) <= STATE_MAX_BYTES:
                more = connection.recv(FIRST_BYTES)
                if not more:
                    break
                data += more
            if not fds:
                raise ValueError("no descriptor came with it")
            state = parse_json(data)
            if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
                raise ValueError("it is of another program or version")
        except (OSError, ValueError) as error:
            for fd in fds:
                os.close(fd)
            raise Failure(f"the state at the supervisor {path} is of no use: {error}", Cause.FORMAT) from None
    os.set_inheritable(fds[0], False)
    return state, fds[0]
