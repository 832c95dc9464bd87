"""`--remote-cache-dir DIR`, `--remote-timeout-s S`, ...: how a command reads shards behind URLs (`data.remote`).

Enters: an argument parser. Leaves: options for every field of `RemoteConfig`, and the config that was asked for.
"""

from __future__ import annotations

import argparse
from dataclasses import fields

from data_pipelines.config import RemoteConfig


def add_remote_options(parser: argparse.ArgumentParser) -> None:
    """Add one option for each setting of `data.remote`."""
    group = parser.add_argument_group("shards behind URLs", "as `data.remote` of a run")
    for field in fields(RemoteConfig):
        name = f"--remote-{field.name.replace('_', '-')}"
        group.add_argument(name, type=type(field.default), default=field.default, metavar="X", help="(%(default)s)")


def remote_of(options: argparse.Namespace) -> RemoteConfig:
    """The settings that the options name.

    Raises:
        UserError: a value out of range, with the range.
    """
    return RemoteConfig(**{field.name: getattr(options, f"remote_{field.name}") for field in fields(RemoteConfig)})
