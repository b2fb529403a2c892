"""What this build is: the lines of --version and the version object of the API, from one place.

setup.py writes _build.py at build time; nydus-snapshotter compares the commit of --version with the API's.
"""

from virtiofsd_nydus import __version__

try:
    from virtiofsd_nydus._build import BUILD_TIME, GIT_COMMIT
except ImportError:  # run from a tree that was never built
    BUILD_TIME, GIT_COMMIT = "unknown", "unknown"


def version_info() -> dict[str, str]:
    """nydusd's version object: all five fields, for clients that insist on them."""
    return {
        "package_ver": __version__,
        "git_commit": GIT_COMMIT,
        "build_time": BUILD_TIME,
        "profile": "release",
        "rustc": "none",
    }


def version_text() -> str:
    info = version_info()
    return (
        f"virtiofsd-nydus {__version__}\nVersion: \t{info['package_ver']}\nGit Commit: \t{info['git_commit']}\n"
        f"Build Time: \t{info['build_time']}\nProfile: \t{info['profile']}\nRustc: \t\t{info['rustc']}"
    )
