"""The grammar of image references."""

from pathlib import Path

import pytest

from virtiofsd_nydus.errors import UsageFailure
from virtiofsd_nydus.oci.reference import default_scheme, is_loopback, parse_reference

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "host", "repo", "tag", "digest"),
    [
        ("docker://h/n", "h", "n", "latest", ""),
        ("docker://h:5000/a/b-c_d.e:V1.0_x-", "h:5000", "a/b-c_d.e", "V1.0_x-", ""),
        (f"docker://127.0.0.1:5000/n@{DIGEST}", "127.0.0.1:5000", "n", "", DIGEST),
        (f"docker://h/n:t@{DIGEST}", "h", "n", "", DIGEST),
        ("docker://[::1]:5000/n:t", "[::1]:5000", "n", "t", ""),
    ],
)
def test_docker(text: str, host: str, repo: str, tag: str, digest: str) -> None:
    found = parse_reference(text)
    assert (found.host, found.repo, found.tag, found.digest) == (host, repo, tag, digest)
    assert parse_reference(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "n",
        "docker:/h/n",
        "docker://",
        "docker://h",
        "docker://h/",
        "docker:///n",
        "docker://h/N",
        "docker://h/a//b",
        "docker://h/n:",
        "docker://h/n:a b",
        "docker://h/n@sha256:00",
        "docker://h/n@md5:00",
        "docker://h h/n",
        "docker://u:p@h/n",
        "docker://h/" + "a" * 300,
        "docker://h/n:" + "t" * 129,
        "oci:",
        "docker-archive:",
        "http://h/n",
    ],
)
def test_not_a_reference(text: str) -> None:
    with pytest.raises(UsageFailure):
        parse_reference(text)


def test_layout_and_archive(tmp_path: Path) -> None:
    assert parse_reference("oci:d/e").path == Path("d/e")
    found = parse_reference("oci:/d/e:t")
    assert (found.path, found.tag) == (Path("/d/e"), "t")
    assert str(found) == "oci:/d/e:t"
    colon = tmp_path / "a:b"
    assert parse_reference(f"oci:{colon}").tag == "b"
    colon.mkdir()
    assert (parse_reference(f"oci:{colon}").path, parse_reference(f"oci:{colon}:t").tag) == (colon, "t")
    assert parse_reference("docker-archive:/x:y.tar").path == Path("/x:y.tar")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1:5000", True),
        ("127.8.9.1", True),
        ("localhost", True),
        ("LOCALHOST:80", True),
        ("[::1]:5000", True),
        ("[::1]", True),
        ("10.0.0.1:5000", False),
        ("localhost.example.org", False),
        ("registry.example.org", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_loopback_registries_are_plain_http(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    assert default_scheme(host) == ("http" if loopback else "https")
    assert default_scheme(host, plain_http=True) == "http"
