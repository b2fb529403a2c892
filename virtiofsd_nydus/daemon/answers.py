"""The API's answers that are no success, in nydusd's words. Light."""


class ApiError(Exception):
    """An answer other than success: status and the message that nydusd would give. wrapped: the message is the inner
    one, put into the route's WRAPPERS entry (api.py)."""

    def __init__(self, status: int, message: str, *, wrapped: bool = False) -> None:
        super().__init__(message)
        self.status, self.wrapped = status, wrapped


def quoted(text: str) -> str:
    """A string as Rust's Debug shows it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def unexpected(event: str) -> ApiError:
    """The daemon is in a state in which this cannot be."""
    return ApiError(400, f"UnexpectedEvent({quoted(event)})", wrapped=True)


def unsupported() -> ApiError:
    """This daemon never does this."""
    return ApiError(501, "Unsupported", wrapped=True)


def not_ready() -> ApiError:
    """The daemon has no mount table yet: it waits for a predecessor's mounts."""
    return ApiError(503, "NotReady", wrapped=True)
