"""Objects of the engine that are used after their end."""

import subprocess
import sys

import pytest

USES = {
    "engine": "e = Engine(); e.shutdown(); e.close(); e.next_event(0)",
    "engine, its counters": "e = Engine(); e.shutdown(); e.close(); e.stats()",
    "mount table": "e = Engine(); v = Vfs(e, SESSION_MIXED); v.close(); v.umount('/')",
    "host directory": "e = Engine(); p = Passthrough(e, '/tmp'); p.close(); p.drop_idle()",
    "store": "import tempfile; e = Engine(); s = Store(e, tempfile.mkdtemp()); s.close(); Rafs(e, '/dev/null', s)",
    "device": (
        "from virtiofsd_nydus.vhost.device import EngineDevice as D; e = Engine(); d = D(e, Vfs(e, SESSION_MIXED), 2);"
        " d.close(); d.reset()"
    ),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_is_closed_is_refused(use: str) -> None:
    """A thread that comes late gets an error of its own; a null pointer would end the process."""
    code = f"from virtiofsd_nydus.engine import *\ntry:\n    {use}\nexcept (TypeError, EOFError):\n    print('refused')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
