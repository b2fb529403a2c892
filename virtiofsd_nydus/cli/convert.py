"""`convert SRC DST`: makes a Nydus image from an OCI image."""

import argparse
import json
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from virtiofsd_nydus.arguments import add_build_arguments, add_registry_arguments
from virtiofsd_nydus.cli.build import load_chunk_dict, make_options, transfer_bars
from virtiofsd_nydus.errors import UsageFailure
from virtiofsd_nydus.oci.reference import DOCKER, GRAMMAR, Reference, parse_reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    from rich.progress import TaskID

    from virtiofsd_nydus.oci.convert import ConvertOptions, ConvertResult, Place

# Between two lines about progress, where it is not shown on a terminal.
LINE_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help=GRAMMAR)
    parser.add_argument("target", metavar="DST", help="docker://... or oci:...")
    parser.add_argument(
        "--platform", default="", metavar="OS/ARCH[/VARIANT]", help="which image of an index (this host's)"
    )
    parser.add_argument(
        "--to",
        choices=["nydus", "oci"],
        default="nydus",
        help="oci: SRC is a Nydus image, and becomes an OCI image again (gzip layers)",
    )
    parser.add_argument("--all-platforms", action="store_true", help="convert the image of every platform of an index")
    parser.add_argument(
        "--merge-platform",
        action="store_true",
        help="DST becomes an index of the Nydus image and the OCI image, for clients of both kinds",
    )
    parser.add_argument(
        "--oci-ref",
        action="store_true",
        help="no data of its own: the image reads the gzip layers of the OCI image, which DST gets too",
    )
    parser.add_argument(
        "--sign-key", type=Path, metavar="PEM", help="sign DST by this private key, as cosign does (PKCS #8)"
    )
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="where layers are spooled (TMPDIR)")
    add_registry_arguments(parser)
    parser.add_argument("--src-creds", default="", metavar="USER:PASSWORD", help="login for SRC alone")
    parser.add_argument("--dest-creds", default="", metavar="USER:PASSWORD", help="login for DST alone")
    add_build_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from virtiofsd_nydus.oci.convert import ConvertOptions, Place, convert_image, convert_platforms
    from virtiofsd_nydus.oci.image import open_store
    from virtiofsd_nydus.oci.manifest import parse_platform
    from virtiofsd_nydus.oci.serve import access_of

    source_ref, target_ref = parse_reference(args.source), parse_reference(args.target)
    options = make_options(args, oci_ref=args.oci_ref)
    dictionary = load_chunk_dict(args, options)
    if args.all_platforms and args.platform:
        raise UsageFailure("--all-platforms converts all there are: leave out --platform")
    platform = parse_platform(args.platform) if args.platform else None
    source_creds, target_creds = choose_creds(args, source_ref, target_ref)
    access = access_of(args)
    source = open_store(source_ref, replace(access, creds=source_creds))
    target = open_store(target_ref, replace(access, creds=target_creds))
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the work directory is emptied too
        with ProgressBars() if sys.stderr.isatty() and not args.json else ProgressLines(sys.stderr) as bars:
            wanted = ConvertOptions(
                build=options,
                platform=platform,
                merge_platform=args.merge_platform,
                work_dir=args.work_dir,
                dictionary=dictionary,
                sign_key=args.sign_key,
            )
            places = Place(source, source_ref), Place(target, target_ref)
            if args.to == "oci":
                return _convert_back(args, *places, wanted)
            if args.all_platforms:
                results = convert_platforms(*places, wanted, bars)
            else:
                results = [convert_image(*places, wanted, bars)]
    finally:
        source.close()
        target.close()
    if args.json:
        told = [result.to_json() for result in results]
        print(json.dumps(told if args.all_platforms else told[0], indent=2))
    else:
        for result in results:
            print_summary(result)
    return 0


def _convert_back(args: argparse.Namespace, source: "Place", target: "Place", wanted: "ConvertOptions") -> int:
    from virtiofsd_nydus.cli.to_oci import convert_to_oci

    if args.all_platforms or args.merge_platform or args.oci_ref:
        raise UsageFailure("--to oci makes one OCI image of one Nydus image: leave out the options of the other way")
    result = convert_to_oci(source, target, wanted)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        told = "one layer: they could not be told apart" if result["one_layer"] else f"{len(result['layers'])} layers"
        print(f"{result['target']} is {result['manifest_digest']}, {told}")
    return 0


def choose_creds(args: argparse.Namespace, source: Reference, target: Reference) -> tuple[str, str]:
    """Who logs in where. --creds alone is never sent to two hosts: it is the secret of one."""
    if (
        args.creds
        and source.transport == target.transport == DOCKER
        and source.host != target.host
        and not (args.src_creds or args.dest_creds)
    ):
        raise UsageFailure(f"--creds would go to both {source.host} and {target.host}: say --src-creds or --dest-creds")
    if args.src_creds or args.dest_creds:
        same = source.host == target.host
        return args.src_creds or (args.creds if same else ""), args.dest_creds or (args.creds if same else "")
    return args.creds, args.creds


def print_summary(result: "ConvertResult") -> None:
    mib = 1 << 20
    for layer in result.layers:
        there = "" if layer.pushed else ", was there" if layer.blob_digest else ", no file data"
        print(
            f"layer {layer.source_digest[7:19]}  {layer.source_bytes / mib:8.1f} MiB -> "
            f"{layer.blob_bytes / mib:8.1f} MiB  {layer.chunks} chunks, "
            f"{layer.deduplicated_bytes / mib:.1f} MiB deduplicated{there}"
        )
    layers = {layer.source_digest: layer for layer in result.layers}.values()
    sums = [
        sum(getattr(layer, name) for layer in layers) / mib
        for name in ("file_bytes", "unique_bytes", "stored_bytes", "dictionary_bytes")
    ]
    print("files {:.1f} MiB, unique {:.1f} MiB, stored {:.1f} MiB, saved by the dictionary {:.1f} MiB".format(*sums))
    change = (result.target_bytes / result.source_bytes - 1) * 100 if result.source_bytes else 0.0
    print(
        f"{result.target} is {result.manifest_digest}\n{result.source_bytes / mib:.1f} MiB -> "
        f"{result.target_bytes / mib:.1f} MiB ({change:+.0f} %), bootstrap {result.bootstrap_bytes / mib:.1f} MiB, "
        f"{result.seconds:.1f} s"
    )


class ProgressBars:
    """convert.Progress on a terminal."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._bars = transfer_bars()

    def __enter__(self) -> "ProgressBars":
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def start(self, phase: str, digest: str, total_bytes: int) -> None:
        with self._lock:
            self._tasks[phase, digest] = self._bars.add_task(f"{phase} {digest[7:19]}", total=total_bytes)

    def advance(self, phase: str, digest: str, count_bytes: int) -> None:
        with self._lock:
            self._bars.advance(self._tasks[phase, digest], count_bytes)


class ProgressLines:
    """convert.Progress where there is no terminal: a line each LINE_S, so none of a short run."""

    def __init__(self, out: "TextIO", clock: "Callable[[], float]" = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._lock = threading.Lock()
        self._total = {"convert": 0, "push": 0}
        self._done = {"convert": 0, "push": 0}
        self._began = self._said = clock()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def start(self, phase: str, digest: str, total_bytes: int) -> None:
        with self._lock:
            self._total[phase] += total_bytes

    def advance(self, phase: str, digest: str, count_bytes: int) -> None:
        with self._lock:
            self._done[phase] += count_bytes
            now = self._clock()
            if now - self._said < LINE_S:
                return
            self._said = now
            mib = 1 << 20
            done, total = self._done["convert"], self._total["convert"]
            rate = done / (now - self._began)
            left = f"{(total - done) / rate:.0f} s left" if rate > 0 else "time left unknown"
            print(
                f"read {done / mib:.1f} of {total / mib:.1f} MiB, {rate / mib:.1f} MiB/s, {left}; pushed "
                f"{self._done['push'] / mib:.1f} MiB",
                file=self._out,
                flush=True,
            )
