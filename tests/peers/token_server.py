"""A bearer-token server as registries name it in WWW-Authenticate: signs RS256 tokens that docker-registry accepts.

The key work is openssl's, so that no package is needed beyond the standard library.
"""

import base64
import json
import subprocess
import threading
import time
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SERVICE = "registry.test"
ISSUER = "token-server.test"


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class TokenServer:
    """users: name -> password. anonymous_pull: pull without a login. post: whether POST (OAuth2) is known.

    calls: one ("GET" | "POST", user, scopes, status) for each request, in order."""

    def __init__(
        self,
        cert: Path,
        key: Path,
        users: dict[str, str],
        *,
        anonymous_pull: bool = False,
        ttl_s: int = 300,
        post: bool = True,
    ) -> None:
        self._cert = cert
        self._key = key
        self.users = users
        self.anonymous_pull = anonymous_pull
        self.ttl_s = ttl_s
        self.post = post
        self.calls: list[tuple[str, str, tuple[str, ...], int]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
                user, password = "", ""
                header = self.headers.get("Authorization", "")
                if header.startswith("Basic "):
                    user, _, password = base64.b64decode(header[6:]).decode().partition(":")
                self._answer(*owner.answer("GET", user, password, query.get("scope", [])))

            def do_POST(self) -> None:
                form = urllib.parse.parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
                if not owner.post:
                    owner.calls.append(("POST", "", (), 404))
                    self._answer(404, {})
                    return
                scopes = form.get("scope", [""])[0].split()
                self._answer(
                    *owner.answer("POST", form.get("username", [""])[0], form.get("password", [""])[0], scopes)
                )

            def _answer(self, status: int, value: dict[str, Any]) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/token"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, user: str, password: str, scopes: list[str]) -> tuple[int, dict[str, Any]]:
        known = bool(user) and self.users.get(user) == password
        status = 200 if known or (not user and self.anonymous_pull) else 401
        self.calls.append((method, user, tuple(scopes), status))
        if status != 200:
            return status, {"details": "wrong user or password"}
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            granted = [one for one in actions.split(",") if known or one == "pull"]
            access.append({"type": kind, "name": name, "actions": granted})
        token = self.make_token(user, access)
        return 200, {"token": token, "access_token": token, "expires_in": self.ttl_s}

    def make_token(self, user: str, access: list[dict[str, Any]]) -> str:
        der = base64.b64encode(
            base64.b64decode("".join(line for line in self._cert.read_text().splitlines() if "-----" not in line))
        ).decode()
        now = int(time.time())
        header = {"typ": "JWT", "alg": "RS256", "x5c": [der]}
        # not before: a minute ago, the registry's clock may be behind
        claims = {
            "iss": ISSUER,
            "sub": user,
            "aud": SERVICE,
            "exp": now + self.ttl_s,
            "nbf": now - 60,
            "iat": now,
            "jti": uuid.uuid4().hex,
            "access": access,
        }
        text = f"{encode(json.dumps(header).encode())}.{encode(json.dumps(claims).encode())}"
        signed = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", str(self._key)],
            input=text.encode(),
            capture_output=True,
            check=True,
        )
        return f"{text}.{encode(signed.stdout)}"
