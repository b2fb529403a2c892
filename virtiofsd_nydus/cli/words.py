"""virtiofsd's own words on `virtiofs`: those of the Rust one, and the C one's `-o` list.

A word means here what it means there, or it is without effect and the table in docs/operations.md says so. A value
that asks for more safety than a share gives is refused, never passed over.
"""

import argparse
import re

from virtiofsd_nydus.errors import UsageFailure

# The rights that a daemon keeps (docs/operations.md, Rights)
KEPT_CAPABILITIES = frozenset(
    {
        "chown",
        "dac_override",
        "dac_read_search",
        "fowner",
        "fsetid",
        "setuid",
        "setgid",
        "mknod",
        "setfcap",
        "sys_admin",
    }
)
# Names of `-o` that are flags, each also with no_ before it
SWITCHES = frozenset(
    {
        "allow_direct_io",
        "allow_root",
        "announce_submounts",
        "flock",
        "killpriv_v2",
        "posix_acl",
        "posix_lock",
        "readdirplus",
        "security_label",
        "writeback",
        "xattr",
    }
)
# Of the switches, the values that a share does not give, with the reason
REFUSED = {
    "flock": "locks of a share stay in the guest's kernel, other guests do not see them",
    "posix_lock": "locks of a share stay in the guest's kernel, other guests do not see them",
    "no_posix_acl": "a share always obeys the host's ACLs",
    "no_xattr": "a share always has its extended attributes",
    "security_label": "a share does not label new files for the guest",
}
# Flags with a value that no share has
UNSUPPORTED = ("xattrmap", "uid-map", "gid-map", "translate-uid", "translate-gid")


def add_words(parser: "argparse.ArgumentParser", tolerated: "argparse._ArgumentGroup") -> None:
    """Adds the words to the parser, those without effect to the group tolerated. check_words takes what was parsed."""
    words = parser.add_argument_group("virtiofsd's words")
    words.add_argument("--socket-group", metavar="GROUP", help="the socket belongs to this group, which may connect")
    words.add_argument("-o", dest="options", action="append", default=[], metavar="NAME[=VALUE],...", help="as its -o")
    words.add_argument("-d", dest="debug", action="store_true", help="--log-level debug")
    words.add_argument("--cache", choices=["auto", "always", "metadata", "never"], help="auto, whichever is asked")
    words.add_argument("--sandbox", choices=["namespace", "chroot", "none"], help="see --seccomp")
    words.add_argument("--modcaps", default="", metavar="+CAP:-CAP", help="only what is so anyway")
    words.add_argument("--posix-acl", nargs="?", const="auto", choices=["never", "auto", "always"], help="always")
    words.add_argument("--security-label", nargs="?", const="auto", choices=["never", "auto", "always"], help="never")
    words.add_argument("--inode-file-handles", choices=["never", "prefer", "fallback", "mandatory"], help="prefer")
    for name in ("readonly", *UNSUPPORTED):
        kind = {"action": "store_true"} if name == "readonly" else {"action": "append"}
        words.add_argument(f"--{name}", help=argparse.SUPPRESS, **kind)  # type: ignore[arg-type]
    for name in (
        "xattr",
        "announce-submounts",
        "no-announce-submounts",
        "allow-mmap",
        "allow-direct-io",
        "no-readdirplus",
        "writeback",
        "killpriv-v2",
        "no-killpriv-v2",
        "preserve-noatime",
        "syslog",
        "migration-verify-handles",
        "migration-confirm-paths",
    ):
        tolerated.add_argument(f"--{name}", action="store_true")
    tolerated.add_argument("-f", dest="foreground", action="store_true")
    tolerated.add_argument("--thread-pool-size", type=int, metavar="N")
    tolerated.add_argument("--migration-mode", choices=["find-paths", "file-handles"])
    tolerated.add_argument("--migration-on-error", choices=["abort"])


def check_words(args: "argparse.Namespace") -> None:
    """Puts what -o says into the flags of the same meaning, and refuses what a share does not give. Raises
    UsageFailure."""
    for text in args.options:
        for word in split_options(text):
            _take_option(args, word)
    if args.debug:
        args.log_level = "debug"
    if args.cache == "never":
        raise UsageFailure("--cache never: guests keep names and attributes for a second; use --cache auto")
    if args.sandbox in ("namespace", "chroot") and args.seccomp == "none":
        raise UsageFailure(f"--sandbox {args.sandbox} with --seccomp none would confine nothing: leave one of them out")
    if args.posix_acl == "never":
        raise UsageFailure(f"--posix-acl never: {REFUSED['no_posix_acl']}")
    if args.security_label in ("auto", "always"):
        raise UsageFailure(f"--security-label {args.security_label}: {REFUSED['security_label']}")
    if args.inode_file_handles == "mandatory":
        raise UsageFailure("--inode-file-handles mandatory: a source without file handles is served, too; use prefer")
    if args.readonly:
        raise UsageFailure("--readonly: a share is always writable; share a read-only bind mount of the directory")
    for name in UNSUPPORTED:
        if getattr(args, name.replace("-", "_")):
            raise UsageFailure(
                f"--{name}: owners and attribute names of a share are the host's own, none is translated"
            )
    _check_capabilities(args.modcaps)


def split_options(text: str) -> list[str]:
    """The words of one -o; a comma that belongs to a value is written twice or behind a backslash."""
    words = re.findall(r"(?:,,|\\.|[^,])+", text)
    return [re.sub(r",,|\\(.)", lambda found: found[1] or ",", word) for word in words]


def _take_option(args: "argparse.Namespace", word: str) -> None:
    name, equals, value = word.partition("=")
    plain = name.removeprefix("no_")
    if plain in SWITCHES and not equals:
        if name in REFUSED:
            raise UsageFailure(f"-o {name}: {REFUSED[name]}")
    elif name == "debug" and not equals:
        args.debug = True
    elif name == "source" and value:
        if args.shared_dir not in (None, value):
            raise UsageFailure(f"-o source={value}: --shared-dir {args.shared_dir} names another directory")
        args.shared_dir = value
    elif name == "cache" and value in ("auto", "always", "none"):
        args.cache = "never" if value == "none" else value
    elif name == "sandbox" and value in ("namespace", "chroot"):
        args.sandbox = value
    elif name == "log_level" and value in ("debug", "info", "warn", "err"):
        args.log_level = "error" if value == "err" else value
    elif name == "modcaps" and value:
        args.modcaps = value
    elif name == "xattrmap" and value:
        args.xattrmap = [value]
    elif name == "timeout" and re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        if float(value) < 1:
            raise UsageFailure(f"-o timeout={value}: guests keep names and attributes for a second; give 1 or more")
    elif name == "max_idle_threads" and value.isdecimal():
        pass
    else:
        raise UsageFailure(f"-o {word}: virtiofsd has no such option, or not with this value")


def _check_capabilities(text: str) -> None:
    for word in filter(None, text.split(":")):
        sign, name = word[0], word[1:].lower().removeprefix("cap_")
        if sign not in "+-" or not name:
            raise UsageFailure(f"--modcaps {text}: {word} is not +CAPABILITY or -CAPABILITY")
        if (sign == "+") != (name in KEPT_CAPABILITIES):
            what = "never kept" if sign == "+" else "needed, and not given up"
            raise UsageFailure(f"--modcaps {text}: {name} is {what} (docs/operations.md, Rights)")
