"""The environment's proxies: which server is asked through which, and that it is done."""

import pytest

from tests.peers.faulty_server import FaultyServer
from tests.storage.conftest import DATA, read
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.net.address import parse_address
from virtiofsd_nydus.net.routes import Routes
from virtiofsd_nydus.storage.factory import create_backend


@pytest.mark.parametrize(
    ("no_proxy", "url", "direct"),
    [
        ("", "http://registry.test/", False),
        ("", "http://localhost:5000/", True),
        ("", "http://127.0.0.8/", True),
        ("", "http://[::1]:5000/", True),
        ("*", "http://registry.test/", True),
        ("registry.test", "http://registry.test:5000/", True),
        ("REGISTRY.test", "http://a.Registry.TEST/", True),
        ("registry.test", "http://notregistry.test/", False),
        (".registry.test", "http://registry.test/", False),
        (".registry.test", "http://a.registry.test/", True),
        ("*.registry.test", "http://a.registry.test/", True),
        ("registry.test:5000", "http://registry.test:5000/", True),
        ("registry.test:5000", "http://registry.test/", False),
        ("registry.test:80", "http://registry.test/", True),
        ("other, registry.test ,", "http://registry.test/", True),
        ("10.0.0.0/8", "http://10.1.2.3/", True),
        ("10.0.0.0/8", "http://11.1.2.3/", False),
        ("10.0.0.0/40,x", "http://10.1.2.3/", False),
        ("10.1.2.3", "http://10.1.2.3:5000/", True),
        ("2001:db8::/32", "http://[2001:db8::1]/", True),
        ("[2001:db8::1]:80", "http://[2001:db8::1]/", True),
        ("[2001:db8::1]:81", "http://[2001:db8::1]/", False),
    ],
)
def test_no_proxy(no_proxy: str, url: str, direct: bool) -> None:
    routes = Routes(http="http://proxy:3128", no_proxy=no_proxy)
    assert routes.choose(parse_address(url)) == ("" if direct else "http://proxy:3128")


def test_the_environment_in_both_cases_and_by_scheme() -> None:
    routes = Routes.read_environment({"HTTP_PROXY": "proxy:1", "https_proxy": "https://u:p@proxy:2/", "no_proxy": "x"})
    assert routes.choose(parse_address("http://a/")) == "http://proxy:1"
    assert routes.choose(parse_address("https://a/")) == "https://u:p@proxy:2"
    assert routes.choose(parse_address("https://x/")) == ""
    assert Routes.read_environment({}).choose(parse_address("http://a/")) == ""


@pytest.mark.parametrize("proxy", ["socks5://proxy:1080", "http://", "http://a b", "http://proxy:port"])
def test_a_proxy_that_cannot_be_is_named(proxy: str) -> None:
    with pytest.raises(Failure, match=r"HTTP_PROXY|not an http address"):
        Routes(http=proxy).choose(parse_address("http://a/"))


@pytest.mark.parametrize("kind", ["registry", "s3", "oss", "http-proxy"])
def test_backends_go_by_the_environments_proxy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyServer() as proxy:
        blob = proxy.add(DATA)
        monkeypatch.setenv("HTTP_PROXY", f"http://someone:word@{proxy.host}")
        settings = {
            "registry": {"scheme": "http", "host": "registry.invalid", "repo": "a/b"},
            "s3": {"scheme": "http", "endpoint": "s3.invalid", "bucket_name": "b", "region": "r"},
            "oss": {"scheme": "http", "endpoint": "oss.invalid", "bucket_name": "b"},
            "http-proxy": {"addr": "http://store.invalid"},
        }[kind]
        backend = create_backend(kind, {**settings, "retry_limit": 1})
        assert read(backend, blob, 0, 10) == DATA[:10]
        backend.close()
        asked = proxy.requests[0]
        assert asked.path.startswith("http://") and ".invalid/" in asked.path
        assert asked.headers["proxy-authorization"].startswith("Basic ")
        # the switch that turns it off
        monkeypatch.setenv("NO_PROXY", "*")
        backend = create_backend(kind, {**settings, "retry_limit": 1, "timeout": 1})
        with pytest.raises(Failure, match="cannot be resolved"):
            read(backend, blob, 0, 10)
        backend.close()


def test_the_flag_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse
    import os

    from virtiofsd_nydus.arguments import add_registry_arguments

    monkeypatch.setenv("http_proxy", "http://other:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://other:1")
    parser = argparse.ArgumentParser()
    add_registry_arguments(parser)
    parser.parse_args([])
    assert os.environ["http_proxy"] == "http://other:1"
    parser.parse_args(["--proxy", "http://mine:2"])
    for scheme in ("http", "https"):
        assert Routes.read_environment().choose(parse_address(f"{scheme}://a/")) == "http://mine:2"
    parser.parse_args(["--proxy", ""])
    assert Routes.read_environment().choose(parse_address("http://a/")) == ""
    monkeypatch.setenv("HTTP_PROXY", "")
