"""`qwen2vl-data`: everything about data that needs no training.

Each sub-command lives beside what it does and plugs in here: a module exposes `add_command(commands)`, which adds its
parser and sets `run`, a function from the parsed options to an exit code. Bad input ends in one line on stderr and exit
code 2, never in a traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_pipelines.errors import UserError
from data_pipelines.report import check, indexing, inspection, show, stats
from data_pipelines.sources import command as import_command

COMMANDS = (import_command, indexing, check, stats, inspection, show)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `qwen2vl-data` with all its sub-commands."""
    parser = argparse.ArgumentParser(
        prog="qwen2vl-data",
        description="Make, check and look at training data for Qwen2-VL: webdataset shards and what is in them.",
        epilog="`qwen2vl-data COMMAND --help` explains a command.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (UserError, OSError) as error:
        print(f"qwen2vl-data {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"qwen2vl-data {options.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
