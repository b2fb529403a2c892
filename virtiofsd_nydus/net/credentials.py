"""Who asks: credentials as they are given on the command line, in configurations and in docker's. Light."""

import binascii
import os

from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.net.documents import parse_json

HELPER_LIMIT_S = 30.0


class Credentials:
    """Who asks. Never shows its secret: not in repr, not in messages."""

    __slots__ = ("identity_token", "password", "username")

    def __init__(self, username: str, password: str, identity_token: str = "") -> None:
        self.username = username
        self.password = password
        self.identity_token = identity_token

    def __repr__(self) -> str:
        return f"Credentials({self.username!r}, ...)"

    def basic_header(self) -> str:
        raw = f"{self.username}:{self.password}".encode()
        return "Basic " + binascii.b2a_base64(raw, newline=False).decode()

    def hide_in(self, text: str) -> str:
        """text without this secret, should a server have sent it back to us."""
        for secret in (self.password, self.identity_token):
            if len(secret) >= 4:
                text = text.replace(secret, "***")
        return text


def decode_basic(text: str, where: str) -> Credentials:
    """base64 of `user:password`, as nydusd's `auth` and docker's config.json have it."""
    try:
        raw = binascii.a2b_base64(text.strip().encode(), strict_mode=False).decode()
    except (ValueError, UnicodeError):
        raw = ""
    user, colon, password = raw.partition(":")
    if not colon or not user:
        raise UsageFailure(f"{where}: not base64 of USER:PASSWORD", Cause.AUTH)
    return Credentials(user, password)


def parse_creds(text: str) -> Credentials:
    """The --creds option: USER:PASSWORD."""
    user, colon, password = text.partition(":")
    if not colon or not user:
        raise UsageFailure("--creds: expected USER:PASSWORD", Cause.AUTH)
    return Credentials(user, password)


def find_docker_credentials(host: str, limit_s: float = HELPER_LIMIT_S) -> Credentials | None:
    """The login for host by docker's config.json (of $DOCKER_CONFIG, else of ~/.docker): its credential helper
    (credHelpers, credsStore), which may take limit_s, else its entry in `auths`."""
    from pathlib import Path

    folder = os.environ.get("DOCKER_CONFIG")
    try:
        path = Path(folder or "~/.docker").expanduser() / "config.json"
    except RuntimeError:  # no home
        return None
    try:
        document = parse_json(path.read_bytes())
        auths = document.get("auths") or {}
        helpers, store = document.get("credHelpers") or {}, str(document.get("credsStore") or "")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise Failure(f"cannot read docker's credentials in {path}: {error}", Cause.AUTH) from error
    names = [host, f"https://{host}", f"http://{host}", f"https://{host}/v1/", f"https://{host}/v2/"]
    if host in ("docker.io", "index.docker.io", "registry-1.docker.io"):
        names += ["https://index.docker.io/v1/", "docker.io", "index.docker.io"]
    helper = next((str(helpers[name]) for name in names if isinstance(helpers, dict) and helpers.get(name)), "")
    for program, name in [(helper, name) for name in names[:1] if helper] + [(store, name) for name in names if store]:
        found = _ask_helper(program, name, limit_s)
        if found is not None:
            return found
    for name in names:
        entry = auths.get(name) if isinstance(auths, dict) else None
        if not isinstance(entry, dict):
            continue
        token = str(entry.get("identitytoken") or "")
        if entry.get("auth"):
            found = decode_basic(str(entry["auth"]), f"{path}, entry {name}")
            return Credentials(found.username, found.password.rstrip("\0"), token)
        if entry.get("username"):
            return Credentials(str(entry["username"]), str(entry.get("password") or ""), token)
    return None


def _ask_helper(program: str, server: str, limit_s: float) -> Credentials | None:
    """What `docker-credential-PROGRAM get` knows of server; None when it knows nothing."""
    import subprocess

    name = f"docker-credential-{program}"
    if "/" in program:
        raise Failure(
            f"docker's config.json names {program!r} as credential helper: a name without / is wanted", Cause.AUTH
        )
    try:
        done = subprocess.run([name, "get"], input=server.encode(), capture_output=True, timeout=limit_s)
    except FileNotFoundError:
        raise Failure(f"docker's credential helper {name} is not installed (not in PATH)", Cause.AUTH) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(f"docker's credential helper {name}: {type(error).__name__}", Cause.AUTH) from error
    if done.returncode:
        # The protocol has one error of its own; what else it says may hold anything, so only its first words are told.
        said = " ".join(done.stdout.decode("utf-8", "replace").split())[:120]
        if "credentials not found" in said or not said:
            return None
        raise Failure(f"docker's credential helper {name} fails for {server}: {said}", Cause.AUTH)
    try:
        found = parse_json(done.stdout)
        user, secret = str(found["Username"]), str(found["Secret"])
    except (ValueError, KeyError, TypeError):
        raise Failure(f"docker's credential helper {name} gives no login for {server}", Cause.AUTH) from None
    return Credentials("", "", secret) if user == "<token>" else Credentials(user, secret)
