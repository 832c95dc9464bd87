"""Chats → documents: ShareGPT, LLaVA, LLaMA-Factory, OpenAI-style messages, alpaca; pictures and clips by their tags.

Reads JSON arrays or JSON lines of the forms that `decode.chat_forms` lists.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_pipelines.decode.chat_forms import read_chat
from data_pipelines.shards.media_files import resolve_media
from data_pipelines.sources.inputs import add_files, each_file, each_object
from data_pipelines.sources.item import Annotations, Entries, Item, MediaSource

HELP = "chats as JSON or JSON lines: ShareGPT, LLaVA, LLaMA-Factory, OpenAI messages, alpaca"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import chat`."""
    add_files(parser, "JSON or JSON-lines files", media_root=True)


def read(options: argparse.Namespace) -> Entries:
    """The items that the options name."""
    return each_file(options.files, lambda path, key: read_chats(path, options.media_root or path.parent, key))


def read_chats(path: Path, media_root: Path, prefix: str) -> Entries:
    """One item for every chat of a file, keyed PREFIX/000000 by its place in the file."""
    return each_object(path, prefix, "chat", lambda key, data: [chat_item(key, data, media_root, path.parent)])


def chat_item(key: str, data: dict[str, Any], root: Path, beside: Path | None, task: str = "chat") -> Item:
    """The document of one chat object; media names are looked up under `root`, then in `beside`.

    Raises:
        DataError: unknown form, unknown role, media that are missing, unsafe, or do not match their tags.
    """
    messages, media = read_chat(key, data)
    sources = [MediaSource(name, kind, resolve_media(name, root, beside, key)) for kind, name in media]
    return Item(key, Annotations(messages=tuple(messages)), tuple(sources), task)
