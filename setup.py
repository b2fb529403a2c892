"""Only what pyproject.toml cannot say: two cffi modules, an abi3 wheel, and what --version says of the build."""

import os
import subprocess
import time
from pathlib import Path

from setuptools import setup


def git_commit() -> str:
    """The commit that is built; "unknown" outside a checkout."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


built = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
Path(__file__).with_name("virtiofsd_nydus").joinpath("_build.py").write_text(
    f'"""Written by setup.py."""\n\nGIT_COMMIT = "{git_commit()}"\nBUILD_TIME = "{built}"\n'
)

setup(
    cffi_modules=[
        "virtiofsd_nydus/engine_build.py:ffibuilder",
        "virtiofsd_nydus/fakeguest_build.py:ffibuilder",
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
