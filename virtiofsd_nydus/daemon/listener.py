"""The API's listening socket. A module of its own: launchers look for the file at once and then after 100 ms and more,
so it is made before what takes long is imported; who connects early is answered once the daemon runs."""

import os
import socket

from virtiofsd_nydus.errors import Failure

SUN_PATH_MAX = 107  # sizeof sockaddr_un.sun_path less the NUL
BACKLOG = 128


def listen_api(path: str) -> socket.socket:
    """Listens there; a stale socket is replaced."""
    if len(os.fsencode(path)) > SUN_PATH_MAX:
        raise Failure(f"API socket path {path} is longer than {SUN_PATH_MAX} bytes; choose a shorter one")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        remove_file(path)  # nydusd does so too: a stale file must not stop a start
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise Failure(f"cannot listen on API socket {path}: {error.strerror}") from error
    listener.listen(BACKLOG)
    return listener


def remove_file(path: str) -> None:
    try:
        os.unlink(path)  # noqa: PTH108
    except FileNotFoundError:
        pass
