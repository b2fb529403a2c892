"""The API's requests: queries and JSON bodies, and what is wrong with them in nydusd's words. Light."""

import json

from virtiofsd_nydus.daemon.answers import ApiError, quoted


def parse_query(text: str) -> "dict[str, str]":
    """A form's query; of a name that comes twice the first counts."""
    query: dict[str, str] = {}
    for part in text.split("&"):
        if part:
            name, _, value = part.partition("=")
            query.setdefault(unescape(name), unescape(value))
    return query


def unescape(text: str) -> str:
    """Percent-encoded UTF-8; urllib.parse would cost start-up 4 ms."""
    head, *rest = text.replace("+", " ").encode("latin-1").split(b"%")
    for part in rest:
        try:
            head += bytes((int(part[:2], 16),)) + part[2:] if len(part) > 1 else b"%" + part
        except ValueError:
            head += b"%" + part
    return head.decode("utf-8", "replace")


def require_no_body(body: bytes) -> None:
    if body:
        raise ApiError(400, "BadRequest")


# Python's words for a fault of JSON -> nydusd's, where there is more text and at its end
PARSE_FAULTS = {
    "Expecting value": ("expected value", "EOF while parsing a value"),
    "Extra data": ("trailing characters", "trailing characters"),
    "Expecting property name enclosed in double quotes": ("key must be a string", "EOF while parsing an object"),
    "Expecting ':' delimiter": ("expected `:`", "EOF while parsing an object"),
    "Expecting ',' delimiter": ("expected `,` or `}`", "EOF while parsing an object"),
    "Unterminated string starting at": ("EOF while parsing a string", "EOF while parsing a string"),
}


def body_fault(text: str, line: int, column: int) -> ApiError:
    return ApiError(400, f"ParseBody(Error({quoted(text)}, line: {line}, column: {column}))")


def parse_body(body: bytes) -> object:
    """The document that a body holds. A body without a byte is none at all."""
    if not body:
        raise ApiError(400, "BadRequest")
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        ended = error.pos >= len(error.doc.rstrip())
        text = PARSE_FAULTS.get(error.msg, ("expected value",) * 2)[ended]
        column = error.colno
        if ended:
            column -= 1
        elif text == "expected value" and error.doc[error.pos] in "ntf":
            text, column = "expected ident", column + 1  # null, true or false was begun
        raise body_fault(text, error.lineno, column) from None
    except RecursionError:
        raise body_fault("recursion limit exceeded", 1, len(body)) from None
    except ValueError:
        raise body_fault("invalid unicode code point", 1, 1) from None


def describe_kind(value: object) -> str:
    """A JSON value as nydusd names it when it is of the wrong type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"boolean `{str(value).lower()}`"
    if isinstance(value, (int, float)):
        return f"{'integer' if isinstance(value, int) else 'floating point'} `{value}`"
    if isinstance(value, str):
        return f"string {quoted(value)}"
    return "map" if isinstance(value, dict) else "sequence"


def parse_object(body: bytes, expected: str = "a map") -> "dict[str, object]":
    document = parse_body(body)
    if not isinstance(document, dict):
        raise body_fault(f"invalid type: {describe_kind(document)}, expected {expected}", 1, len(body))
    return document


def require_texts(document: "dict[str, object]", names: "tuple[str, ...]", body: bytes) -> None:
    """Checks that these keys are there and hold strings. The column in the message is the body's end."""
    for name in names:
        if name in document and not isinstance(document[name], str):
            raise body_fault(f"invalid type: {describe_kind(document[name])}, expected a string", 1, len(body))
    for name in names:
        if name not in document:
            raise body_fault(f"missing field `{name}`", 1, len(body))


def require_mountpoint(query: "dict[str, str]") -> str:
    if "mountpoint" not in query:
        raise ApiError(400, "QueryString(\"'mountpoint' should be specified in query string\")")
    return query["mountpoint"]
