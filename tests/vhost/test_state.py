"""Descriptors of a front-end: each is closed once, whatever close(2) says."""

import errno
import os

import pytest

from virtiofsd_nydus.vhost.messages import Message
from virtiofsd_nydus.vhost.state import DeviceState, Region


class FailingClose:
    """os.close as some file systems have it: it closes and then tells an error. calls: the descriptors it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[int] = []
        self._close = os.close
        monkeypatch.setattr(os, "close", self)

    def __call__(self, fd: int) -> None:
        self.calls.append(fd)
        self._close(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_every_descriptor_is_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(7)]
    state = DeviceState(2)
    state.regions = [Region(0, 1, 0, 0, fds[0]), Region(1, 1, 1, 0, fds[1])]
    state.rings[0].set_kick(fds[2])
    state.rings[1].set_call(fds[3])
    state.rings[1].set_err(fds[4])
    state.set_inflight(fds[5], 1, 0, 1, 1)
    state.set_log(fds[6], 1, 0)
    closing = FailingClose(monkeypatch)
    assert [error.errno for error in state.close()] == [errno.EIO] * 7
    assert state.close() == []
    assert sorted(closing.calls) == sorted(fds)


def test_a_region_is_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that fails closes what was new; so does its end."""
    region = Region(0, 1, 0, 0, os.open("/dev/null", os.O_RDONLY))
    closing = FailingClose(monkeypatch)
    region.close()
    region.close()
    assert len(closing.calls) == 1


def test_a_new_descriptor_takes_the_place_of_one_that_does_not_close(monkeypatch: pytest.MonkeyPatch) -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
    state = DeviceState(1)
    state.rings[0].set_kick(fds[0])
    closing = FailingClose(monkeypatch)
    state.rings[0].set_kick(fds[1])
    assert state.rings[0].kick_fd == fds[1]
    state.close()
    assert closing.calls == fds


def test_a_message_closes_all_of_its_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    message = Message(1, 1, b"", list(fds))
    closing = FailingClose(monkeypatch)
    message.close()
    message.close()
    assert closing.calls == fds
