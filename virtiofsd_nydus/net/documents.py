"""Texts that others wrote, read without surprises: JSON and numbers in headers. Light."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SIZE_DIGITS_MAX = 19  # of any number of bytes; more are no honest header, and Python refuses some thousands


def parse_json(data: bytes | str) -> "Any":
    """What a JSON text holds. Raises ValueError, and nothing else, for a text that is none or is nested too deeply."""
    import json

    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_size(text: str) -> int | None:
    """A number of bytes or seconds as headers have it: decimal digits alone. None: it is none."""
    if not text.isascii() or not text.isdecimal() or len(text) > SIZE_DIGITS_MAX:
        return None
    return int(text)
