"""convert where registries want a login, fail, or lie, and where a run is ended and begun again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.oci.conftest import LAYERS, make_tar, read_layout, skopeo, write_image
from tests.peers.faulty_server import FaultyServer
from tests.peers.registry import LocalRegistry
from virtiofsd_nydus.oci.workfolder import make_work_folder

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("variant", ["htpasswd", "token", "tls"])
def test_logins_and_tls(convert, image: Path, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalRegistry(tmp_path / "r", auth="" if variant == "tls" else variant, tls=variant == "tls") as registry:
        target = f"docker://{registry.host}/login/a:1"
        if variant == "tls":
            status, line = convert(f"oci:{image}:t", target, "--plain-http")
            assert status == 1 and line.count("\n") == 1
            status, line = convert(f"oci:{image}:t", target)
            assert status == 1 and "certificate is not trusted" in line and "--ca-cert" in line
            result = convert(f"oci:{image}:t", target, "--ca-cert", registry.ca_cert)
            again = convert(f"oci:{image}:t", target, "--ca-cert", registry.ca_cert)
            assert result["manifest_digest"] == again["manifest_digest"]
            return
        good = f"{registry.username}:{registry.password}"
        result = convert(f"oci:{image}:t", target, "--creds", good)
        again = convert(f"oci:{image}:t", target, "--creds", good)
        assert result["manifest_digest"] == again["manifest_digest"]
        status, line = convert(f"oci:{image}:t", target, "--creds", f"{registry.username}:wrong-word")
        assert status == 1 and line.count("\n") == 1
        assert f"'{registry.username}'" in line and registry.host in line and "wrong-word" not in line
        status, line = convert(f"oci:{image}:t", target)
        assert status == 1 and "--creds" in line
        # docker's configuration serves as well
        import base64

        folder = tmp_path / "docker"
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps({"auths": {registry.host: {"auth": base64.b64encode(good.encode()).decode()}}})
        )
        monkeypatch.setenv("DOCKER_CONFIG", str(folder))
        assert convert(f"oci:{image}:t", target)["manifest_digest"] == result["manifest_digest"]
        if registry.token_server is not None:
            # one token a run: pulling is covered by the right to push
            assert [call[3] for call in registry.token_server.calls].count(200) == 3


def test_creds_go_to_one_host_only(convert, registry: LocalRegistry) -> None:
    status, line = convert("docker://a.invalid/x:1", f"docker://{registry.host}/x:1", "--creds", "u:p")
    assert status == 2 and "--src-creds" in line


def test_unreachable_registry(convert, image: Path) -> None:
    status, line = convert(f"oci:{image}:t", "docker://127.0.0.1:1/x:1")
    assert status == 1 and "refused" in line and line.count("\n") == 1


def test_uploads_survive_faults(convert, image: Path, registry: LocalRegistry) -> None:
    with FaultyServer(upstream=registry.host) as front:
        front.inject("status", status=503, match="POST ")
        front.inject("reset", match="PUT /v2/faulty/a/blobs")
        front.inject("status", status=500, match="PUT /v2/faulty/a/manifests")
        convert(f"oci:{image}:t", f"docker://{front.host}/faulty/a:1")
        assert all(fault.times == 0 for fault in front.faults)
    skopeo("inspect", "--tls-verify=false", f"docker://{registry.host}/faulty/a:1")


def test_pulls_survive_faults(convert, image: Path, registry: LocalRegistry, tmp_path: Path) -> None:
    skopeo(
        "copy", "--insecure-policy", "--dest-tls-verify=false", f"oci:{image}:t", f"docker://{registry.host}/pull/src:t"
    )
    with FaultyServer(upstream=registry.host) as front:
        front.inject("truncate", at_bytes=100_000, match="GET /v2/pull/src/blobs", times=2)
        front.inject("status", status=502, match="GET /v2/pull/src/manifests")
        again = convert(f"docker://{front.host}/pull/src:t", f"oci:{tmp_path / 'out'}:x")
        assert all(fault.times == 0 for fault in front.faults)
    assert again["manifest_digest"] == convert(f"oci:{image}:t", f"oci:{tmp_path / 'out'}:y")["manifest_digest"]


def test_a_flipped_byte_of_a_layer_is_found(convert, image: Path, registry: LocalRegistry, tmp_path: Path) -> None:
    skopeo(
        "copy", "--insecure-policy", "--dest-tls-verify=false", f"oci:{image}:t", f"docker://{registry.host}/flip/src:t"
    )
    manifest, _ = read_layout(image, "t")
    for layer in manifest["layers"][:2]:
        for at_bytes in (20, layer["size"] // 2, layer["size"] - 1):
            with FaultyServer(upstream=registry.host) as front:
                front.inject("corrupt", at_bytes=at_bytes, match=layer["digest"], times=-1)
                status, line = convert(f"docker://{front.host}/flip/src:t", f"oci:{tmp_path / 'out'}:x")
                assert status == 1 and "damaged" in line, line
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(
    image: Path, registry: LocalRegistry, tmp_path: Path, how: signal.Signals
) -> None:
    with FaultyServer(upstream=registry.host) as front:
        front.inject("delay", seconds=60, match="PUT /v2/cut/a/blobs", times=-1)
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "virtiofsd_nydus.cli.main",
                "convert",
                f"oci:{image}:t",
                f"docker://{front.host}/cut/a:1",
                "--work-dir",
                str(tmp_path),
            ],
            stderr=subprocess.PIPE,
            env={**os.environ, "DOCKER_CONFIG": str(tmp_path)},
            # What runs the tests in the background may have given them an ignored SIGINT, which children inherit
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 30
        while not any(one.method == "POST" for one in front.requests) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert any(tmp_path.iterdir())
        process.send_signal(how)
        assert process.wait(20) == 130  # without the answers that are still out
    assert list(tmp_path.iterdir()) == []
    done = subprocess.run(
        ["skopeo", "inspect", "--tls-verify=false", f"docker://{registry.host}/cut/a:1"], capture_output=True, text=True
    )
    assert "manifest unknown" in done.stderr or "name unknown" in done.stderr


def test_an_interrupted_run_goes_on_where_it_was(convert, image: Path, registry: LocalRegistry, tmp_path: Path) -> None:
    """The first run fails after its first blob is there; the second sends the others and that one no more."""
    broken = tmp_path / "broken"
    write_image(broken, [LAYERS[0], make_tar([("x", None, {"type": b"Z"})])])
    status, _ = convert(f"oci:{broken}", f"docker://{registry.host}/resume/a:1")
    assert status == 1
    convert(f"oci:{image}:t", f"docker://{registry.host}/resume/a:0")
    registry.clear_log()
    write_image(tmp_path / "mended", [LAYERS[0], make_tar([("x", b"x" * 5000, {})])])
    result = convert(f"oci:{tmp_path / 'mended'}", f"docker://{registry.host}/resume/a:1")
    assert [layer["pushed"] for layer in result["layers"]] == [False, True]
    sent = [one.path for one in registry.requests() if one.method == "PUT" and "/blobs/uploads/" in one.path]
    assert not any(result["layers"][0]["blob_digest"][7:] in path for path in sent)


def test_a_killed_run_goes_on_where_it_was(convert, image: Path, registry: LocalRegistry, tmp_path: Path) -> None:
    """SIGKILL when one blob is there and another one on its way: the next run makes the same image, and the registry's
    own log says that no blob was stored twice. What the killed run left on disk is removed."""
    told = convert(f"oci:{image}:t", f"oci:{tmp_path / 'whole'}:x")
    first, second = (layer["blob_digest"] for layer in told["layers"] if layer["blob_digest"])
    registry.clear_log()

    def stored() -> list[str]:
        return [
            one.path.rpartition("sha256")[2][-64:]
            for one in registry.requests()
            if one.method == "PUT" and "/blobs/uploads/" in one.path and one.status == 201
        ]

    with FaultyServer(upstream=registry.host) as front:
        target = f"docker://{front.host}/killed/a:1"
        front.inject("delay", seconds=60, match=f"digest={second}", times=-1)
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "virtiofsd_nydus.cli.main",
                "convert",
                f"oci:{image}:t",
                target,
                "--work-dir",
                str(tmp_path),
            ],
            env={**os.environ, "DOCKER_CONFIG": str(tmp_path)},
        )
        deadline = time.monotonic() + 60
        while first[7:] not in stored() or sum(one.method == "POST" for one in front.requests) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
        front.heal()
        (left,) = tmp_path.glob("virtiofsd-nydus-convert-*")
        with make_work_folder(tmp_path) as other:  # of a run that lives: the next one leaves it alone
            assert not left.exists()
            result = convert(f"oci:{image}:t", target, "--work-dir", tmp_path)
            assert list(tmp_path.glob("virtiofsd-nydus-convert-*")) == [other]
        assert not other.exists()
        blobs = stored()  # before the front ends, which lets go of what the killed run sent
    assert result["manifest_digest"] == told["manifest_digest"]
    assert {layer["blob_digest"]: layer["pushed"] for layer in result["layers"] if layer["blob_digest"]} == {
        first: False,
        second: True,
    }
    assert {first[7:], second[7:]} <= set(blobs) and len(blobs) == len(set(blobs))
