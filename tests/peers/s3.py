"""An S3 service on loopback that checks signatures: moto_server with its IAM authentication on."""

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

from tests.peers.registry import find_free_port

START_LIMIT_S = 60.0
REGION = "eu-central-1"
# Calls that moto lets through unsigned before it begins to check: those that make the user.
UNCHECKED_CALLS = 3
POLICY = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"*","Resource":"*"}]}'


class S3Server:
    """A context manager. key_id and key_secret: a user who may do everything."""

    def __init__(self, directory: Path) -> None:
        self.port = find_free_port()
        self.key_id = self.key_secret = ""
        self._log = directory / "moto.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"localhost:{self.port}"

    def client(self, service: str, **login: str) -> Any:
        import boto3

        return boto3.client(
            service,
            region_name=REGION,
            endpoint_url=f"http://127.0.0.1:{self.port}",
            aws_access_key_id=login.get("key_id", "nobody"),
            aws_secret_access_key=login.get("key_secret", "nothing"),
            aws_session_token=login.get("session_token"),
        )

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": str(UNCHECKED_CALLS)},
            )
        try:
            self._wait_ready()
            iam = self.client("iam")
            iam.create_user(UserName="reader")
            iam.put_user_policy(UserName="reader", PolicyName="all", PolicyDocument=POLICY)
            key = iam.create_access_key(UserName="reader")["AccessKey"]
            self.key_id, self.key_secret = key["AccessKeyId"], key["SecretAccessKey"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Stores an object; makes the bucket when it is not there."""
        s3 = self.client("s3", key_id=self.key_id, key_secret=self.key_secret)
        if bucket not in [one["Name"] for one in s3.list_buckets()["Buckets"]]:
            s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
        s3.put_object(Bucket=bucket, Key=key, Body=data)

    def __exit__(self, *exc: object) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            process.wait(10)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        assert self._process is not None
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/moto-api/data.json", timeout=5).close()
                return
            except OSError:
                time.sleep(0.05)  # between two polls; the deadline decides
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])
        raise RuntimeError(f"moto_server did not start: {tail}")
