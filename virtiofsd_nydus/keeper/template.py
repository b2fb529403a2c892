"""The template: it imports what a worker needs, starts no thread, and forks a worker when the keeper asks for one.

So a worker is there a few milliseconds after the death of another, and shares its memory with the template. Its own
process group of imports: what the first worker needs at once, and after WARM what a worker needs later.
"""

import os
import select
import signal
import socket
import sys

from virtiofsd_nydus import __version__
from virtiofsd_nydus.keeper import protocol
from virtiofsd_nydus.keeper.protocol import Channel, Message

CHANNEL_FD = 3  # of a template that was spawned


def keep_only(*fds: int) -> None:
    """Closes every descriptor but the standard three and these."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        fd = int(name)
        if fd > 2 and fd not in fds:
            try:
                os.close(fd)
            except OSError:  # the listing's own
                pass


def run(sock: socket.socket) -> None:
    """Serves the keeper until it is gone. Does not return in a worker either."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the keeper decides when workers end
    channel = Channel(sock, blocking=True)
    channel.send(
        protocol.HELLO,
        {"version": protocol.VERSION, "package": __version__, "keeper_format": protocol.KEEPER_FORMAT},
    )
    import gc

    import virtiofsd_nydus.keeper.worker  # noqa: F401
    from virtiofsd_nydus.engine import reduce_privileges

    reduce_privileges()
    gc.freeze()  # what is here is not looked at, hence not copied, by workers' collections
    children: dict[int, int] = {}  # pidfd -> pid
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd in children:
                poll.unregister(fd)
                os.close(fd)
                _report_end(channel, children.pop(fd))
                continue
            try:
                message = channel.receive()
            except EOFError:
                return
            if message is not None:
                _serve(channel, message, children, poll)


def _serve(channel: Channel, message: Message, children: "dict[int, int]", poll: select.poll) -> None:
    if message.kind == protocol.FORK:
        ends = [message.take_fd(), message.take_fd()]
        pid = os.fork()
        if pid == 0:
            _become_worker(*ends)
        for fd in ends:
            os.close(fd)
        pidfd = os.pidfd_open(pid)
        children[pidfd] = pid
        poll.register(pidfd, select.POLLIN)
        channel.send(protocol.FORKED, {"pid": pid}, [pidfd])
    elif message.kind == protocol.WARM:
        _import_late()
    message.close()


def _report_end(channel: Channel, pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    try:
        channel.send(protocol.EXITED, {"pid": pid, "status": status})
    except OSError:
        pass  # the keeper is gone: the next receive says so


def _become_worker(channel_fd: int, errors_fd: int) -> None:
    status = 1
    try:
        os.dup2(errors_fd, 1)
        os.dup2(errors_fd, 2)
        keep_only(channel_fd)
        from virtiofsd_nydus.keeper import worker

        status = worker.run(socket.socket(fileno=channel_fd))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stderr.flush()
        finally:
            os._exit(status)


def _import_late() -> None:
    """What a worker loads after it is ready, and would load anew after each death."""
    import gc

    import structlog

    import virtiofsd_nydus.daemon.prometheus
    import virtiofsd_nydus.storage.factory
    import virtiofsd_nydus.storage.localfs
    import virtiofsd_nydus.storage.registry  # noqa: F401

    structlog.get_config()
    gc.freeze()


if __name__ == "__main__":
    run(socket.socket(fileno=CHANNEL_FD))
