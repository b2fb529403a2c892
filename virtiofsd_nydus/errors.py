"""The one way the package fails towards a person: one line that says what failed, where, and what to do.

    Failure                     a line and its Cause; every verb shows it and exits
    +-- UsageFailure            the command line or a configuration is wrong: exit 2
    +-- DeadlinePassed          (net.failures) no time was left to ask: says nothing about the server
    +-- RetriableFailure        (net.failures) another attempt may mend it
    |   +-- ProxyLimited        (net.failures) the proxy's own 429: the next attempt goes round it
    +-- TarFailure              (builder.decoding) a tar is wrong; TarSource puts the layer's name before it
    +-- ApplyFailure            (vhost.state) a front-end's message cannot be done
    +-- TimedOut                (vmm.boot) the guest did not get far enough

Others never leave their package, and carry what its caller has to answer: ApiError (daemon), an HTTP status; Refusal
(vhost), a front-end's violation of the protocol; HungUp, BadReply, Refused, GuestFault and NoAnswer (fakeguest), a
guest's view of the daemon.

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
