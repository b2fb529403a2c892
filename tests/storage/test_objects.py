"""Backends s3 and oss: s3 against a server that checks signatures; oss, for which no server can be had, against the
signatures of the vendor's own library."""

import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.faulty_server import FaultyServer
from tests.peers.s3 import REGION, S3Server
from tests.storage.conftest import DATA, read
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.storage.factory import create_backend

BLOB = hashlib.sha256(DATA).hexdigest()
SECRET = "the-secret-key"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.put("images", f"some/pre fix+/{BLOB}", DATA)
        yield server


@pytest.fixture(autouse=True)
def local_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name below localhost is this machine, as RFC 6761 has it; not every resolver knows."""
    look_up = socket.getaddrinfo

    def getaddrinfo(host, *args, **options):
        return look_up("127.0.0.1" if host.endswith("localhost") else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def settings_for(s3: S3Server, **changes: object) -> dict:
    return {
        "scheme": "http",
        "endpoint": s3.host,
        "bucket_name": "images",
        "object_prefix": "some/pre fix+/",
        "region": REGION,
        "access_key_id": s3.key_id,
        "access_key_secret": s3.key_secret,
        "timeout": 20,
        **changes,
    }


@pytest.mark.peer
@pytest.mark.parametrize("path_style", [True, False])
def test_s3_ranges(s3: S3Server, path_style: bool) -> None:
    backend = create_backend("s3", settings_for(s3, path_style=path_style))
    for offset, length in ((0, len(DATA)), (0, 1), (len(DATA) - 1, 1), (12345, 300_000)):
        assert read(backend, BLOB, offset, length) == DATA[offset : offset + length]
    assert backend.blob_size(BLOB) == len(DATA)
    backend.close()


@pytest.mark.peer
def test_s3_session_token(s3: S3Server) -> None:
    made = s3.client("sts", key_id=s3.key_id, key_secret=s3.key_secret).assume_role(
        RoleArn=make_role(s3), RoleSessionName="test"
    )["Credentials"]
    login = {"access_key_id": made["AccessKeyId"], "access_key_secret": made["SecretAccessKey"]}
    backend = create_backend("s3", settings_for(s3, **login, session_token=made["SessionToken"]))
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    backend.close()
    backend = create_backend("s3", settings_for(s3, **login))
    with pytest.raises(Failure) as caught:
        read(backend, BLOB, 5, 10)
    assert caught.value.cause is Cause.AUTH
    backend.close()


def make_role(s3: S3Server) -> str:
    from tests.peers.s3 import POLICY

    iam = s3.client("iam", key_id=s3.key_id, key_secret=s3.key_secret)
    role = iam.create_role(RoleName="pull", AssumeRolePolicyDocument=POLICY)["Role"]
    iam.put_role_policy(RoleName="pull", PolicyName="all", PolicyDocument=POLICY)
    return role["Arn"]


@pytest.mark.peer
@pytest.mark.parametrize(
    ("changes", "cause", "word"),
    [
        ({"access_key_secret": "not-the-word"}, Cause.AUTH, "SignatureDoesNotMatch"),
        ({"access_key_id": "AKIANOBODY"}, Cause.AUTH, "InvalidAccessKeyId"),
        ({"access_key_id": "", "access_key_secret": ""}, Cause.AUTH, "no key is configured"),
        ({"object_prefix": "other/"}, Cause.MISSING, "not there"),
    ],
)
def test_s3_causes(s3: S3Server, changes: dict, cause: Cause, word: str) -> None:
    backend = create_backend("s3", settings_for(s3, **changes))
    with pytest.raises(Failure, match=word) as caught:
        read(backend, BLOB, 0, 10)
    assert caught.value.cause is cause
    assert "not-the-word" not in str(caught.value) and s3.host in str(caught.value)
    assert backend.backoff.state == "open"
    backend.close()


def test_another_region_is_named(server: FaultyServer) -> None:
    server.inject("status", status=301, headers={"x-amz-bucket-region": "mars-1"}, times=-1)
    backend = create_backend(
        "s3",
        {
            "scheme": "http",
            "endpoint": server.host,
            "bucket_name": "b",
            "region": "r",
            "access_key_id": "k",
            "access_key_secret": SECRET,
        },
    )
    with pytest.raises(Failure, match="mars-1"):
        read(backend, BLOB, 0, 10)


@pytest.mark.parametrize("token", ["", "a-session-token"])
@pytest.mark.parametrize("prefix", ["", "some/pre fix+/"])
def test_oss_signs_as_the_vendor_does(token: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same request through oss2, aliyun's own library: equal Authorization for GET with a range and HEAD."""
    import oss2
    from oss2 import http as oss_http

    server = FaultyServer({BLOB: DATA})
    with server:
        endpoint = f"localhost:{server.host.rpartition(':')[2]}"
        backend = create_backend(
            "oss",
            {
                "scheme": "http",
                "endpoint": endpoint,
                "bucket_name": "images",
                "object_prefix": prefix,
                "access_key_id": "the-id",
                "access_key_secret": SECRET,
                "session_token": token,
            },
        )
        assert backend.blob_size(BLOB) == len(DATA)
        assert read(backend, BLOB, 5, 10) == DATA[5:15]
        login = oss2.StsAuth("the-id", SECRET, token) if token else oss2.Auth("the-id", SECRET)
        assert len(server.requests) == 2
        for ours in server.requests:
            assert ours.headers["Host"] == f"images.{endpoint}"
            monkeypatch.setattr(oss2.utils, "http_date", lambda *_, date=ours.headers["Date"]: date)
            request = oss_http.Request(ours.method, f"http://images.{endpoint}/")
            login._sign_request(request, "images", prefix + BLOB)
            assert ours.authorization == request.headers["authorization"]
            assert ours.headers.get("x-oss-security-token", "") == token
        backend.close()


def test_oss_refusals_hold_no_secret(server: FaultyServer) -> None:
    server.inject("status", status=403, times=-1, text=f"<Error><Code>SignatureDoesNotMatch</Code>{SECRET}</Error>")
    backend = create_backend(
        "oss",
        {
            "scheme": "http",
            "endpoint": f"localhost:{server.host.rpartition(':')[2]}",
            "bucket_name": "b",
            "access_key_id": "the-id",
            "access_key_secret": SECRET,
        },
    )
    with pytest.raises(Failure, match="SignatureDoesNotMatch") as caught:
        read(backend, BLOB, 0, 10)
    assert caught.value.cause is Cause.AUTH
    assert SECRET not in str(caught.value) and "the-id" in str(caught.value)


def test_object_names_stay_in_the_bucket(tmp_path: Path) -> None:
    backend = create_backend("oss", {"endpoint": "localhost:1", "bucket_name": "b"})
    with pytest.raises(Failure, match="not one") as caught:
        read(backend, "../other", 0, 1)
    assert caught.value.cause is Cause.FORMAT
