"""Only what pyproject.toml cannot say: the C engine is a cffi module, and the wheel is abi3."""
from setuptools import setup

setup(
    cffi_modules=[
        "virtiofsd_nydus/engine_build.py:ffibuilder",
        "virtiofsd_nydus/fakeguest_build.py:ffibuilder",
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
