"""Facts that must stand in one place: causes, version, what is loaded before the daemon answers."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

import virtiofsd_nydus
from virtiofsd_nydus.errors import Cause

ROOT = Path(__file__).resolve().parent.parent

# What the daemon may load before RUNNING costs start-up time (docs/architecture.md, start-up). These are the modules
# that were measured and are kept out until a thread loads them afterwards.
HEAVY = (
    "logging",
    "structlog",
    "urllib3",
    "http",
    "ssl",
    "asyncio",
    "dataclasses",
    "typing",
    "pathlib",
    "zstandard",
    "blake3",
    "hashlib",
    "lz4",
    "rich",
    "importlib.metadata",
    "inspect",
    "email",
    "tempfile",
    "subprocess",
)


def test_causes_are_those_of_the_seam() -> None:
    header = (ROOT / "csrc" / "vnd.h").read_text()
    declared = {name: int(value) for name, value in re.findall(r"VND_CAUSE_(\w+) = (\d+)", header)}
    assert declared == {cause.name: cause.value for cause in Cause}


def test_fetch_slots_are_those_of_the_engine() -> None:
    from virtiofsd_nydus.net.client import POOL_SIZE
    from virtiofsd_nydus.storage.pump import FETCH_SLOTS, FIRST_SLOTS, PREFETCH_SLOTS, SOURCE_SLOTS

    header = (ROOT / "csrc" / "store" / "fetcher.h").read_text()
    declared = {name: int(value) for name, value in re.findall(r"#define FETCH_(\w*SLOTS) (\d+)", header)}
    assert declared["SLOTS"] == FETCH_SLOTS
    assert declared["SOURCE_SLOTS"] == SOURCE_SLOTS
    assert declared["FIRST_SLOTS"] == FIRST_SLOTS
    assert declared["PREFETCH_SLOTS"] == PREFETCH_SLOTS
    assert POOL_SIZE == SOURCE_SLOTS + FIRST_SLOTS  # a connection for each


def test_the_largest_chunk_table_is_the_engines() -> None:
    from virtiofsd_nydus.rafs.layout import TABLE_BYTES_MAX

    source = (ROOT / "csrc" / "blob" / "meta.c").read_text()
    found = re.search(r"#define TABLE_MAX \((\d+)ull << (\d+)\)", source)
    assert found is not None and int(found.group(1)) << int(found.group(2)) == TABLE_BYTES_MAX


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == virtiofsd_nydus.__version__
    assert f"## {virtiofsd_nydus.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_nothing_heavy_is_loaded_before_running() -> None:
    program = (
        "before = set(sys.modules)\n"
        "import argparse, virtiofsd_nydus.cli.main, virtiofsd_nydus.cli.virtiofs\n"
        "import virtiofsd_nydus.daemon.service, virtiofsd_nydus.storage.factory\n"
        "print(' '.join(sorted(set(sys.modules) - before)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{program}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    loaded = done.stdout.split()
    assert "virtiofsd_nydus._engine" in loaded
    assert [name for name in loaded if name in HEAVY] == []


def test_version_says_the_commit_that_the_api_says(capsys: pytest.CaptureFixture[str]) -> None:
    from virtiofsd_nydus.cli.main import main
    from virtiofsd_nydus.version import version_info

    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"virtiofsd-nydus \d", lines[0])
    assert f"Git Commit: \t{version_info()['git_commit']}" in lines
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", version_info()["git_commit"])


def load_script(name: str) -> ModuleType:
    """A script of scripts/ as a module."""
    loader = SourceFileLoader(name.replace("-", "_"), str(ROOT / "scripts" / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_no_circles_and_climbs() -> None:
    found = load_script("count-circles").count(ROOT)
    assert len(found) == 5 and not any(found.values()), found


def test_circles_are_seen(tmp_path: Path) -> None:
    """The count sees a circle of two files, a climb, and a circle of modules."""
    for folder in ("csrc/low", "csrc/high", "virtiofsd_nydus/one", "virtiofsd_nydus/two"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "Makefile").write_text("LAYERS := low high\n")
    (tmp_path / "csrc/low/a.c").write_text('#include "high/b.h"\nint a(void)\n{\n\treturn b();\n}\n')
    (tmp_path / "csrc/high/b.h").write_text("int b(void); /* not a() */\n")
    (tmp_path / "csrc/high/b.c").write_text("int b(void) {\n\treturn a();\n}\n")
    (tmp_path / "virtiofsd_nydus/one/a.py").write_text("def a():\n    from virtiofsd_nydus.two import b\n")
    (tmp_path / "virtiofsd_nydus/two/b.py").write_text("from virtiofsd_nydus.one.a import _hidden\n")
    assert load_script("count-circles").count(tmp_path) == {
        "circles between packages": ["one two"],
        "circles between modules": ["one.a two.b"],
        "private names of another module": ["two.b: one.a._hidden"],
        "circles between files of csrc": ["high/b.c low/a.c"],
        "climbs of csrc": ["low/a.c includes high/b.h"],
    }


# ---- the engine's folders, its symbols and its tests

# (file, header): an internal.h that a file of another folder includes, to be opened. This list may only shrink.
FOREIGN_INTERNALS: tuple[tuple[str, str], ...] = ()


def read_layers() -> list[str]:
    found = re.search(r"^LAYERS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    return found[1].split()


def test_layers_are_the_same_for_make_and_setuptools() -> None:
    built = (ROOT / "virtiofsd_nydus" / "engine_build.py").read_text()
    found = re.search(r"^LAYERS = \(([^)]*)\)$", built, re.MULTILINE)
    assert found is not None
    assert re.findall(r'"(\w+)"', found[1]) == read_layers()
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    assert folders == {*read_layers(), "fakeguest"}


def test_internal_headers_stay_in_their_folder() -> None:
    found = [
        (path.relative_to(ROOT / "csrc").as_posix(), header)
        for path in sorted((ROOT / "csrc").glob("*/*.[ch]"))
        for header in re.findall(r'#include "(\w+/internal\.h)"', path.read_text())
        if header != f"{path.parent.name}/internal.h"
    ]
    assert [one for one in found if one not in FOREIGN_INTERNALS] == []


def test_engine_exports_its_module_alone() -> None:
    """Everything else is reached through it; a name of ours must not meet one of another library in the process."""
    from virtiofsd_nydus import _engine

    listed = subprocess.run(
        ["nm", "--dynamic", "--defined-only", _engine.__file__], capture_output=True, text=True, check=True
    )
    assert [line.split()[-1] for line in listed.stdout.splitlines()] == ["PyInit__engine"]


def test_c_tests_are_named_for_the_source_that_they_test() -> None:
    tests = sorted((ROOT / "tests" / "c").glob("*/test_*.c"))
    assert len(tests) > 20
    for test in tests:
        source = ROOT / "csrc" / test.parent.name / test.name.removeprefix("test_")
        assert source.exists(), f"{test.relative_to(ROOT)} tests no {source.relative_to(ROOT)}"


# ---- documents: what comments and documents name is there

SOURCE_FOLDERS = ("csrc", "virtiofsd_nydus", "tests", "scripts", "vm-images", "docs", ".ci")
SOURCE_FILES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "setup.py", "pyproject.toml")
TEXT = (".c", ".h", ".py", ".md", ".toml", "")
NUMBER = r"\d+(?:\.\d+)*"


def list_texts() -> list[tuple[str, str]]:
    """Every text that people write here: path and content, comment marks and line ends taken out."""
    found = [ROOT / name for name in SOURCE_FILES]
    for folder in SOURCE_FOLDERS:
        found += [path for path in sorted((ROOT / folder).rglob("*")) if path.is_file() and path.suffix in TEXT]
    texts = []
    for path in found:
        name = path.relative_to(ROOT).as_posix()
        if path == Path(__file__).resolve() or "/corpus/" in name or "__pycache__" in name:
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        texts.append((name, re.sub(r"\n[ \t]*(?:\*|#|//)?[ \t]*", " ", text)))
    return texts


def list_headings(path: Path) -> list[str]:
    return [line.lstrip("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]


def test_documents_that_are_named_exist() -> None:
    here = {path.name for path in (*ROOT.glob("*.md"), *(ROOT / "docs").iterdir())}
    missing = []
    for name, text in list_texts():
        for document in re.findall(r"(?<![\w/.-])((?:docs/)?[\w-]+\.md)\b", text):
            if Path(document).name not in here and not (ROOT / name).parent.joinpath(document).exists():
                missing.append(f"{name}: {document}")
        missing += [
            f"{name}: {word}" for word in re.findall(r"docs/[\w-]+\.(?:json|svg)", text) if not (ROOT / word).exists()
        ]
        missing += [
            f"{name}: {word}"
            for word in re.findall(r"(?<!docs/)\b(?:rafs-format|datapath|nydusd-interface|virtiofs-server)\b", text)
        ]
    assert missing == []


def test_sections_that_are_cited_exist() -> None:
    missing = []
    for name, text in list_texts():
        for document, numbers in re.findall(rf"docs/([\w-]+\.md) ({NUMBER}(?:(?:,| to| and|, and) {NUMBER})*)", text):
            headings = [heading.split()[0].rstrip(".") for heading in list_headings(ROOT / "docs" / document)]
            missing += [f"{name}: {document} {n}" for n in re.findall(NUMBER, numbers) if n not in headings]
        for document, words in re.findall(r"docs/([\w-]+\.md), ([A-Z]\w*(?: [\w-]+)?)", text):
            if not any(heading.startswith(words.split()[0]) for heading in list_headings(ROOT / "docs" / document)):
                missing.append(f"{name}: {document}, {words}")
    assert missing == []


def is_defined(path: Path, name: str) -> bool:
    pattern = (
        rf"^\s*(?:async )?(?:def|class) {name}\b" if path.suffix == ".py" else rf"^\w[^;=\n]*\b{name}\([^;]*?\)\n\{{"
    )
    return re.search(pattern, path.read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize(
    "document", ["docs/architecture.md", "docs/datapath.md", "docs/rafs-format.md", "CONTRIBUTING.md"]
)
def test_files_and_functions_that_documents_name_exist(document: str) -> None:
    """`path` is a file or folder, `path:name` a function or class defined there, as are names that follow it."""
    missing = []
    named = r"`((?:csrc|virtiofsd_nydus|tests|scripts|docs)/[\w./-]*)(?::(\w+))?`((?:, `\w+`)*)"
    for match in re.finditer(named, re.sub(r"\s+", " ", (ROOT / document).read_text())):
        path = ROOT / match[1]
        if "NAME" in match[1]:
            continue
        if not path.exists():
            missing.append(match[1])
        elif match[2]:
            names = [match[2], *re.findall(r"`(\w+)`", match[3])]
            missing += [f"{match[1]}:{name}" for name in names if not is_defined(path, name)]
    assert missing == [], f"{document} is to say where they went"


def test_comments_name_their_subjects() -> None:
    """Words that stand for a thing that has a name (docs/words.md, Not used)."""
    unnamed = re.compile(r"\b(?:whoever|somebody|nobody|anybody|everybody|no one)\b", re.IGNORECASE)
    found = []
    allowed = re.compile(r'"nobody|nobody <|unnamed = ')  # names in data; this pattern
    for folder in ("csrc", "virtiofsd_nydus", "tests", "scripts", "vm-images"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in (".c", ".h", ".py", "") or not path.is_file() or "/corpus/" in path.as_posix():
                continue
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                if unnamed.search(line) and not allowed.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


def test_the_document_has_the_system_calls_of_the_source() -> None:
    table = load_script("list-calls").table((ROOT / "csrc" / "base" / "calls.h").read_text())
    assert table in (ROOT / "docs" / "operations.md").read_text()


def test_both_machines_have_the_system_calls() -> None:
    """What is not in the part for x86-64 is in the table that aarch64 has of all newer machines."""
    generic = Path("/usr/include/asm-generic/unistd.h")
    if not generic.exists():
        pytest.skip("no /usr/include/asm-generic/unistd.h: apt-get install linux-libc-dev")
    text = (ROOT / "csrc" / "base" / "calls.h").read_text()
    common = re.sub(r"#ifdef __x86_64__.*?#endif", "", text, flags=re.DOTALL)
    names = set(re.findall(r"^CALL\([\w |]+, (\w+),", common, re.MULTILINE))
    known = set(re.findall(r"#define __NR_(\w+) ", generic.read_text()))
    assert len(names) > 60 and names - known == set()
