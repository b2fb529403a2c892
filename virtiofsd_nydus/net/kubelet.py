"""Logins by the kubelet's credential provider plugins (credentialprovider.kubelet.k8s.io/v1): programs that clouds
ship, which give a registry's short-lived login for an image.

The configuration is the kubelet's (CredentialProviderConfig, in JSON; in YAML where PyYAML is installed), the programs
lie in its plugin directory. Answers are kept as long as they say.
"""

import fnmatch
import os
import threading
import time

from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.net.credentials import Credentials
from virtiofsd_nydus.net.documents import parse_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CONFIG_BYTES_MAX = 1 << 20
API_GROUP = "credentialprovider.kubelet.k8s.io/"
UNITS_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


class Providers:
    """The plugins of one configuration. Thread-safe."""

    def __init__(self, config: str, bin_dir: str) -> None:
        """Raises UsageFailure for a configuration that cannot be."""
        self._bin_dir = bin_dir
        self._providers = _read_config(config)
        self._kept: dict[tuple[str, str], tuple[float, dict[str, Any]]] = {}  # provider, key -> until, auth
        self._lock = threading.Lock()

    def find(self, host: str, repo: str, limit_s: float) -> Credentials | None:
        """The login for an image; None: no plugin knows it. Raises Failure (AUTH) for a plugin that fails."""
        image = f"{host}/{repo}"
        for provider in self._providers:
            if not any(matches(str(pattern), image) for pattern in provider["matchImages"]):
                continue
            auth = self._ask(provider, image, host, limit_s)
            for pattern in sorted(auth, key=lambda one: -len(one)):
                if matches(pattern, image) and isinstance(auth[pattern], dict):
                    login = auth[pattern]
                    return Credentials(str(login.get("username") or ""), str(login.get("password") or ""))
        return None

    def _ask(self, provider: "dict[str, Any]", image: str, host: str, limit_s: float) -> "dict[str, Any]":
        name = str(provider["name"])
        with self._lock:
            for key in (image, host, "*"):
                until, auth = self._kept.get((name, key), (0.0, {}))
                if until > time.monotonic():
                    return auth
        answer = self._run(provider, name, image, limit_s)
        auth = answer.get("auth") or {}
        if not isinstance(auth, dict):
            raise Failure(f"credential provider {name}: its answer has no logins", Cause.AUTH)
        told = answer.get("cacheDuration") or provider.get("defaultCacheDuration") or "0s"
        key = {"Registry": host, "Global": "*"}.get(str(answer.get("cacheKeyType")), image)
        with self._lock:
            self._kept[name, key] = time.monotonic() + parse_duration(str(told)), auth
        return auth

    def _run(self, provider: "dict[str, Any]", name: str, image: str, limit_s: float) -> "dict[str, Any]":
        import json
        import subprocess

        version = str(provider.get("apiVersion") or f"{API_GROUP}v1")
        request = {"apiVersion": version, "kind": "CredentialProviderRequest", "image": image}
        env = dict(os.environ)
        for one in provider.get("env") or ():
            env[str(one.get("name"))] = str(one.get("value") or "")
        program = os.path.join(self._bin_dir, name)  # noqa: PTH118
        words = [program, *(str(word) for word in provider.get("args") or ())]
        try:
            done = subprocess.run(
                words, input=json.dumps(request).encode(), capture_output=True, timeout=limit_s, env=env
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            why = error.strerror if isinstance(error, OSError) else f"no answer in {limit_s:.0f} s"
            raise Failure(f"credential provider {program}: {why}", Cause.AUTH) from error
        if done.returncode:
            said = " ".join(done.stderr.decode("utf-8", "replace").split())[:120]
            raise Failure(f"credential provider {name} fails for {image}: {said or done.returncode}", Cause.AUTH)
        try:
            answer = parse_json(done.stdout)
            if answer["kind"] != "CredentialProviderResponse":
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise Failure(
                f"credential provider {name}: its answer is no CredentialProviderResponse", Cause.AUTH
            ) from None
        return dict(answer)


def matches(pattern: str, image: str) -> bool:
    """Whether a pattern of matchImages is of an image: each part of the host's name by a glob, the port as it is, the
    path as a prefix."""
    pattern_host, _, pattern_path = pattern.partition("/")
    host, _, path = image.partition("/")
    pattern_name, _, pattern_port = pattern_host.partition(":")
    name, _, port = host.partition(":")
    wanted, given = pattern_name.split("."), name.split(".")
    return (
        len(wanted) == len(given)
        and pattern_port == port
        and all(fnmatch.fnmatchcase(one, glob) for one, glob in zip(given, wanted, strict=True))
        and path.startswith(pattern_path)
    )


def parse_duration(text: str) -> float:
    """Seconds of a Go duration such as 1h30m or 12h0m0s; 0.0 for what is none."""
    import re

    parts = re.findall(r"([0-9.]+)(ms|h|m|s)", text)
    if "".join(number + unit for number, unit in parts) != text:
        return 0.0
    try:
        return sum(float(number) * UNITS_S[unit] for number, unit in parts)
    except ValueError:
        return 0.0


def _read_config(path: str) -> "list[dict[str, Any]]":
    try:
        with open(path, "rb") as file:
            data = file.read(CONFIG_BYTES_MAX)
    except OSError as error:
        raise UsageFailure(f"cannot read {path}: {error.strerror}") from None
    document: Any
    try:
        document = parse_json(data)
    except ValueError:
        document = _parse_yaml(data, path)
    providers = document.get("providers") if isinstance(document, dict) else None
    if not isinstance(document, dict) or document.get("kind") != "CredentialProviderConfig":
        raise UsageFailure(f"{path}: not a CredentialProviderConfig of the kubelet")
    if not isinstance(providers, list) or not all(
        isinstance(one, dict)
        and isinstance(one.get("name"), str)
        and "/" not in one["name"]
        and isinstance(one.get("matchImages"), list)
        and str(one.get("apiVersion") or API_GROUP).startswith(API_GROUP)
        for one in providers
    ):
        raise UsageFailure(
            f"{path}: each provider needs name (without /), matchImages, and an apiVersion of the kubelet's"
        )
    return providers


def _parse_yaml(data: bytes, path: str) -> "Any":
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        raise UsageFailure(f"{path}: it is not JSON, and YAML needs the Python package PyYAML") from None
    try:
        return yaml.safe_load(data)
    except yaml.YAMLError:
        raise UsageFailure(f"{path}: neither JSON nor YAML") from None
