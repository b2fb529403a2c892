"""Builds the C engine as the cffi module virtiofsd_nydus._engine (API mode, limited API).

csrc/vnd.h is the whole contract: its declarations are what Python sees. Run by setuptools (setup.py).
Environment: VND_CFLAGS and VND_LDFLAGS add flags (sanitizers, coverage).
"""

import os
import re
import shlex
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
# The engine's folders, as the Makefile has them: each may use itself and those before it.
LAYERS = (
    "base",
    "blob",
    "cache",
    "store",
    "fs",
    "rafs",
    "disk",
    "passthrough",
    "fuse",
    "vhost",
    "fusedev",
    "precontent",
)
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]


def read_declarations(header: Path) -> str:
    """The header without include guard, includes and conditionals, for FFI.cdef."""
    lines = []
    for line in header.read_text().splitlines():
        if re.match(r"\s*#\s*(include|ifndef|endif|if|define\s+VND_H\b)", line):
            continue
        lines.append(re.sub(r"^(\s*#\s*define\s+\w+\s+\w+).*$", r"\1", line))
    return "\n".join(lines)


def relative(path: Path) -> str:
    return os.path.relpath(path, ROOT)


ffibuilder = FFI()
ffibuilder.cdef(read_declarations(ROOT / "csrc" / "vnd.h"))
ffibuilder.set_source(
    "virtiofsd_nydus._engine",
    '#include "vnd.h"',
    sources=sorted(relative(p) for layer in LAYERS for p in (ROOT / "csrc" / layer).glob("*.c")),
    depends=sorted(relative(p) for p in (ROOT / "csrc").rglob("*.h")),
    include_dirs=[relative(ROOT / "csrc")],
    libraries=["zstd", "lz4", "z", "crypto", "pthread"],
    define_macros=[("_GNU_SOURCE", None)],
    extra_compile_args=[
        "-std=c11",
        "-O2",
        "-g",
        "-fvisibility=hidden",
        *WARNINGS,
        *shlex.split(os.environ.get("VND_CFLAGS", "")),
    ],
    extra_link_args=shlex.split(os.environ.get("VND_LDFLAGS", "")),
    py_limited_api=True,
)
