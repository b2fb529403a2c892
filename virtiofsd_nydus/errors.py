"""The one way anything in the package fails towards a person: one line that says what, where and what to do.

Light on purpose: the daemon imports it before it answers RUNNING.
"""

import enum


class Cause(enum.IntEnum):
    """Why something failed. Values are csrc/vnd.h's enum vnd_cause (held together by a test)."""

    NONE = 0
    AUTH = 1
    SCHEME = 2
    NETWORK = 3
    DIGEST = 4
    FORMAT = 5
    SPACE = 6
    MISSING = 7
    DEADLINE = 8
    GUEST = 9
    IO = 10


class Failure(Exception):
    """Something failed for a known cause. str() is the line a person reads; it never holds a secret."""

    def __init__(self, message: str, cause: Cause = Cause.NONE) -> None:
        super().__init__(message)
        self.cause = cause


class UsageFailure(Failure):
    """The command line or configuration is wrong: exit 2."""
