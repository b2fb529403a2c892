"""`bench`: measures. Each measurement is a module of bench/ with add_arguments and run."""

import argparse
import importlib

MEASUREMENTS = {
    "io": ("io", "warm reads and look-ups of the engine, beside the machine's other virtio-fs server"),
    "cold-start": ("cold_start", "whole guests, lazily and against full pull and unpack"),
}

TAKES_COMMAND = True  # cold-start's, after --


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_subparsers(dest="measurement", required=True, metavar="WHAT")
    for name, (module, line) in MEASUREMENTS.items():
        sub = choices.add_parser(name, help=line, description=line, allow_abbrev=False)
        importlib.import_module(f"virtiofsd_nydus.bench.{module}").add_arguments(sub)


def run(args: argparse.Namespace) -> int:
    module = importlib.import_module(f"virtiofsd_nydus.bench.{MEASUREMENTS[args.measurement][0]}")
    status: int = module.run(args)
    return status
