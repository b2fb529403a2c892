"""Builds the fake guest as the cffi module virtiofsd_nydus._fakeguest (API mode, limited API). Run by setuptools.

csrc/fakeguest/fakeguest.h holds the declarations between two markers. Environment: VND_CFLAGS and VND_LDFLAGS.
"""

import os
import shlex
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "fakeguest"


def relative(path: Path) -> str:
    return os.path.relpath(path, ROOT)


ffibuilder = FFI()
declarations = (SOURCE / "fakeguest.h").read_text().split("/* <cdef>", 1)[1].split("/* </cdef> */", 1)[0]
ffibuilder.cdef("/*" + declarations)
ffibuilder.set_source(
    "virtiofsd_nydus._fakeguest",
    '#include "fakeguest.h"',
    sources=sorted(relative(p) for p in SOURCE.glob("*.c")),
    depends=sorted(relative(p) for p in SOURCE.glob("*.h")),
    include_dirs=[relative(SOURCE)],
    define_macros=[("_GNU_SOURCE", None)],
    extra_compile_args=[
        "-std=c11",
        "-O2",
        "-g",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wshadow",
        "-Wno-unused-parameter",
        "-Wno-missing-field-initializers",
        *shlex.split(os.environ.get("VND_CFLAGS", "")),
    ],
    extra_link_args=["-lpthread", *shlex.split(os.environ.get("VND_LDFLAGS", ""))],
    py_limited_api=True,
)
