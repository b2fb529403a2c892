"""Starts a keeper for the options of a daemon: its sockets, its log, its first worker."""

import os

from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.keeper.keeper import Keeper
from virtiofsd_nydus.keeper.say import LightLog
from virtiofsd_nydus.listening import UnixListener
from virtiofsd_nydus.vhost.server import BACKLOG, adopt_fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

LOG_MODE = 0o666


def keep(args: "argparse.Namespace", api: "UnixListener | None") -> int:
    """Serves as the options say, until the end; the exit status. Raises Failure where it cannot start."""
    keeper = Keeper(vars(args), LightLog(_open_log(args.log_file), args.log_level, args.log_format))
    if api is not None:
        keeper.add_api(api)
    path = args.sock or args.socket_path
    if path is not None:
        listener = UnixListener(path, "socket", BACKLOG)
        keeper.add_listener(listener.socket, "fs", listener)
    else:
        sock, listens = adopt_fd(args.fd)
        if listens:
            keeper.add_listener(sock, "fs")
        else:
            keeper.add_connected(sock)
    keeper.catch_signals()
    keeper.run()
    if keeper.failure is not None:
        raise keeper.failure
    return 0


def _open_log(path: "str | None") -> int:
    """A descriptor for the log: standard error without a path."""
    if not path:
        return 2
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, LOG_MODE)
    except OSError as error:
        raise Failure(f"cannot write log file {path}: {error.strerror}") from error
