"""Starts a keeper for the options of a daemon: its template, its sockets, its log.

The template is forked before anything else is imported: its imports take longest until RUNNING, and the keeper's own
are done beside it.
"""

import os
import signal
import socket

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.arguments import raise_nofile
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.listening import UnixListener

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from virtiofsd_nydus.keeper.keeper import Keeper

LOG_MODE = 0o666


def keep(args: "argparse.Namespace", api: "UnixListener | None") -> int:
    """Serves as the options say, until the end; the exit status. Raises Failure where it cannot start."""
    clamped = raise_nofile(args.rlimit_nofile)  # before rights are given up, which it needs
    channel, pid = _fork_template()
    from virtiofsd_nydus.keeper.keeper import Keeper
    from virtiofsd_nydus.keeper.privilege import reduce_privileges
    from virtiofsd_nydus.keeper.say import LightLog

    log = LightLog(_open_log(args.log_file), args.log_level, args.log_format)
    if clamped:
        log.say(logs.WARNING, clamped)
    keeper = Keeper(vars(args), log)
    keeper.add_template(channel, pid)
    if api is not None:
        keeper.add_api(api)
    _add_sockets(keeper, args)
    keeper.catch_signals()
    reduce_privileges()
    keeper.run()
    if keeper.failure is not None:
        raise keeper.failure
    return 0


def _fork_template() -> "tuple[socket.socket, int]":
    """This process has no thread yet. Our end of the template's channel, and its pid."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid:
        theirs.close()
        return ours, pid
    try:
        from virtiofsd_nydus.keeper import template

        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        signal.set_wakeup_fd(-1)
        template.keep_only(theirs.fileno())
        template.run(theirs)
    finally:
        os._exit(1)


def _add_sockets(keeper: "Keeper", args: "argparse.Namespace") -> None:
    from virtiofsd_nydus.vhost.server import BACKLOG, adopt_fd

    path = args.sock or args.socket_path
    if path is not None:
        listener = UnixListener(path, "socket", BACKLOG, args.socket_group)
        keeper.add_listener(listener.socket, args.device, listener)
        return
    sock, listens = adopt_fd(args.fd)
    if listens:
        keeper.add_listener(sock, args.device)
    else:
        keeper.add_connected(sock)


def _open_log(path: "str | None") -> int:
    """A descriptor for the log: standard error without a path."""
    if not path:
        return 2
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, LOG_MODE)
    except OSError as error:
        raise Failure(f"cannot write log file {path}: {error.strerror}") from error
