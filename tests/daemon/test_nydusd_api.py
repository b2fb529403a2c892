"""The whole API, request by request, beside nydusd's answers (nydusd_api.py; regenerate with a new nydusd there)."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import nydusd_api
from tests.fuse.host import VERB, has_fuse

NYDUSD = os.environ.get("NYDUSD", "")
pytestmark = pytest.mark.skipif(bool(has_fuse()), reason=has_fuse())


def is_as(ours: Any, theirs: Any) -> bool:
    """A document has all that nydusd's has, of the same kinds; more does no client harm. What nydusd left null or empty
    in this image may hold something."""
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and all(name in ours and is_as(ours[name], theirs[name]) for name in theirs)
    if isinstance(theirs, list):
        return isinstance(ours, list) and (not ours or not theirs or is_as(ours[0], theirs[0]))
    return bool(ours == theirs)


def is_answer_as(request: nydusd_api.Request, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    if ours["status"] != theirs["status"]:
        return False
    if theirs.get("message", "") is None:  # nydusd's HTTP server refused it before its API saw it
        return True

    def said(answer: dict[str, Any]) -> str:
        message = str(answer.get("message", ""))
        if request.said == "kind":
            return message.partition('"')[0]
        return re.sub(r"column: \d+", "column: N", message)  # columns of faults in JSON are for people

    return (
        ours["type"] == theirs["type"]
        and said(ours) == said(theirs)
        and is_as(ours.get("document"), theirs.get("document"))
    )


def test_answers_as_nydusd(tmp_path: Path) -> None:
    nydusd_api.prepare(tmp_path)
    golden = json.loads(nydusd_api.ANSWERS.read_text())["answers"]
    ours = nydusd_api.ask_all([*VERB, "fuse"], tmp_path)
    assert [request.key() for request, _ in ours] == [entry["request"] for entry in golden], "record nydusd's answers"
    differences = []
    for (request, answer), entry in zip(ours, golden, strict=True):
        theirs = {name: value for name, value in entry.items() if name != "request"}
        if not is_answer_as(request, answer, theirs):
            differences.append(f"{request.key()[:150]}\n  nydusd {theirs}\n  ours   {answer}")
    assert not differences, "\n".join(differences)


@pytest.mark.peer
@pytest.mark.skipif(not shutil.which(NYDUSD), reason="NYDUSD names no nydusd")
def test_the_recorded_answers_are_nydusds() -> None:
    assert nydusd_api.record(NYDUSD)["answers"] == json.loads(nydusd_api.ANSWERS.read_text())["answers"]
