"""Log lines that front-ends can cause have a bound."""

from pathlib import Path

import pytest

from tests.vhost.test_server import Lines, NewDevice, serving
from virtiofsd_nydus.fakeguest.frontend import Protocol, Refused, Request, VhostFrontend
from virtiofsd_nydus.vhost import messages as m
from virtiofsd_nydus.vhost.lines import LINES, PERIOD_S, LineLimit


def test_what_is_left_out_is_told() -> None:
    said: list[tuple[int, str, dict[str, object]]] = []
    now = [0.0]
    say = LineLimit(lambda level, text, **fields: said.append((level, text, fields)), lambda: now[0])
    for number in range(LINES + 5):
        say(30, f"line {number}", front_end=1)
    assert said == [(30, f"line {number}", {"front_end": 1}) for number in range(LINES)]
    now[0] = PERIOD_S
    say(40, "later")
    assert said[LINES:] == [(40, "5 lines about front-ends were left out", {}), (40, "later", {})]


def test_a_flood_of_refusals(new_device: NewDevice, tmp_path: Path) -> None:
    """One front-end's refused requests are told in few lines; another's coming is told all the same."""
    say = Lines()
    with serving(new_device, say, path=str(tmp_path / "sock")):
        noisy = VhostFrontend(tmp_path / "sock")
        noisy.command(Request.SET_PROTOCOL_FEATURES, m.U64.pack(Protocol.REPLY_ACK))
        noisy.reply_ack = True
        for _ in range(500):
            with pytest.raises(Refused):
                noisy.command(Request.SET_FEATURES, m.U64.pack(1 << 60))
        quiet = VhostFrontend(tmp_path / "sock")
        say.wait_for("front-end connected", 2)
        refused = [line for line in say.lines if "refused" in line]
        assert 0 < len(refused) < 500
        quiet.close()
        noisy.close()
