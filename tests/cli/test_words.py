"""virtiofsd's words on `virtiofs`: command lines of libvirt and Kata, and what is refused."""

import argparse
import grp
import importlib.resources
import json
import os
import tomllib
from pathlib import Path

import pytest

from virtiofsd_nydus.cli import main as cli
from virtiofsd_nydus.cli import virtiofs, words
from virtiofsd_nydus.errors import Failure, UsageFailure
from virtiofsd_nydus.listening import UnixListener


def parse(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    virtiofs.add_arguments(parser)
    args = parser.parse_args(line)
    words.check_words(args)
    return args


LINES = {
    "libvirt, C virtiofsd": [
        "--fd=27", "-o", "source=/srv/a,,b,cache=always,sandbox=namespace,xattr,no_flock,no_posix_lock",
        "--thread-pool-size=4", "-d",
    ],
    "libvirt, Rust virtiofsd": [
        "--fd=27", "--shared-dir", "/srv/a,b", "--cache", "auto", "--sandbox", "chroot", "--xattr",
        "--thread-pool-size=4", "--rlimit-nofile=4096", "--log-level", "debug",
    ],
    "Kata, plain virtiofsd": [
        "--syslog", "--cache=auto", "--shared-dir=/srv/a,b", "--fd=3", "--thread-pool-size=1",
        "--announce-submounts", "--log-level=debug",
    ],
}  # fmt: skip


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_launchers_lines_name_share_and_log_level(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(virtiofs, "start", lambda args: taken.append(args) or 0)
    assert cli.main(line) == 0  # without a verb
    (args,) = taken
    assert args.shared_dir == "/srv/a,b" and args.fd in (3, 27) and args.log_level == "debug"


@pytest.mark.parametrize("form", [["--log-level", "info"], ["--hybrid-mode", "--log-level", "info"]])
def test_katas_nydus_lines(form: list[str]) -> None:
    args = parse(*form, "--apisock", "a", "--sock", "s")
    assert (args.apisock, args.sock, args.shared_dir, args.log_level) == ("a", "s", None, "info")


@pytest.mark.parametrize(
    "line",
    [
        ["--cache=never"],
        ["-o", "cache=none"],
        ["-o", "timeout=0"],
        ["--readonly"],
        ["--modcaps=-chown"],
        ["--modcaps=+net_admin"],
        ["-o", "modcaps=sys_admin"],
        ["--xattrmap=:map::user.virtiofs.:"],
        ["-o", "xattrmap=:map::user.virtiofs.:"],
        ["--uid-map=:0:1000:1:"],
        ["--translate-gid=map:0:1000:1"],
        ["--posix-acl=never"],
        ["--security-label"],
        ["--inode-file-handles=mandatory"],
        ["--sandbox=namespace", "--seccomp=none"],
        ["-o", "flock"],
        ["-o", "posix_lock"],
        ["-o", "no_xattr"],
        ["-o", "security_label"],
        ["-o", "source=/a", "--shared-dir=/b"],
        ["-o", "xattr=1"],
        ["-o", "nonsense"],
        ["-o", "sandbox=none"],
    ],
    ids=" ".join,
)
def test_what_a_share_does_not_give_is_refused(line: list[str]) -> None:
    with pytest.raises(UsageFailure) as failure:
        parse("--fd=3", *line)
    assert "\n" not in str(failure.value)


def test_modcaps_of_what_is_so_anyway() -> None:
    assert parse("--fd=3", "--modcaps=+sys_admin:-net_admin:+CAP_DAC_READ_SEARCH").modcaps


def test_socket_group_may_connect(tmp_path: Path) -> None:
    gid = os.getgroups()[0] if os.getuid() and os.getgroups() else os.getgid()
    gid = grp.getgrnam("daemon").gr_gid if os.getuid() == 0 else gid
    path = tmp_path / "s"
    listener = UnixListener(str(path), "socket", 1, grp.getgrgid(gid).gr_name)
    try:
        assert (path.stat().st_gid, path.stat().st_mode & 0o777) == (gid, 0o660)
    finally:
        listener.close()
    with pytest.raises(Failure, match="no such group"):
        UnixListener(str(path), "socket", 1, "no-such-group")
    assert not path.exists()


def test_every_word_is_in_the_table() -> None:
    parser = argparse.ArgumentParser()
    words.add_words(parser, parser.add_argument_group("without effect"))
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    table = text.partition("## virtiofsd's words\n")[2].partition("\n## ")[0]
    names = {name for action in parser._actions for name in action.option_strings} - {"-h", "--help"}
    assert not [name for name in sorted(names | words.SWITCHES) if f"`{name}" not in table]


def test_discovery_file_names_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (importlib.resources.files("virtiofsd_nydus") / "vhost" / "50-virtiofsd-nydus.json").read_text()
    assert cli.main(["--print-capabilities"]) == 0
    found = json.loads(text)
    assert found["type"] == json.loads(capsys.readouterr().out)["type"] and set(found) == {
        "description",
        "type",
        "binary",
    }
    assert Path(found["binary"]).is_absolute() and Path(found["binary"]).name == "virtiofsd-nydus"


def test_wheel_installs_the_discovery_file_where_qemu_has_them() -> None:
    project = Path(__file__).parents[2]
    setuptools = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["setuptools"]
    (name,) = setuptools["data-files"]["share/qemu/vhost-user"]
    assert (project / name).is_file() and name.rpartition("/")[2] == "50-virtiofsd-nydus.json"
