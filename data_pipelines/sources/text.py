"""Plain text → documents to be learnt whole: text files, and JSON lines with a text field.

Long texts are cut at paragraphs, sentences or spaces, in this order of preference, into pieces of at most `max_chars`
characters, because a trainer would cut off what does not fit into a pack; nothing is lost at a cut. Lines of text files
end in a line feed, whatever the file has.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.decode.fields import text
from data_pipelines.errors import UserError
from data_pipelines.sources.compose import text_part
from data_pipelines.sources.inputs import add_files, each_file, each_object
from data_pipelines.sources.item import Annotations, Entries, Expected, Item, problem

HELP = "plain text: .txt and .md files, JSON or JSON lines with a text field"
DEFAULT_MAX_CHARS = 20_000
_CUTS = ("\n\n", "\n", "。", ". ", "! ", "? ", " ")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import text`."""
    add_files(parser, "text files, JSON or JSON-lines files")
    parser.add_argument("--field", default="text", help="the field that holds the text in JSON (default: text)")
    parser.add_argument("--unit", choices=("file", "line"), default="file", help="what is a document in a text file")
    parser.add_argument("--max-chars", type=int, default=DEFAULT_MAX_CHARS, metavar="N", help="cut longer texts")


def read(options: argparse.Namespace) -> Entries:
    """The items that the options name."""
    return each_file(
        options.files, lambda path, key: read_text(path, key, options.field, options.unit, options.max_chars)
    )


def read_text(
    path: Path, prefix: str, field: str = "text", unit: str = "file", max_chars: int = DEFAULT_MAX_CHARS
) -> Entries:
    """The documents of one file, keyed PREFIX/000000-00 by document and piece."""
    if max_chars < 1:
        raise UserError(f"max_chars = {max_chars}: needs at least 1")
    if path.suffix.lower() not in (".txt", ".md", ".text"):
        yield from each_object(
            path, prefix, "line", lambda key, data: _pieces(key, text(key, field, data.get(field)), max_chars)
        )
        return
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        yield problem(path.name, "bad_text", f"cannot be read as UTF-8: {error}")
        return
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    documents = [content] if unit == "file" else content.split("\n")
    yield Expected(sum(1 + len(document) // max_chars for document in documents if document.strip()))
    for number, document in enumerate(documents):
        if document.strip():
            yield from _pieces(f"{prefix}/{number:06d}", document, max_chars)


def text_item(key: str, words: str) -> Item:
    """The document of one text."""
    message = {"role": "assistant", "content": [text_part(words)]}
    return Item(key, Annotations(messages=(message,)), (), "text")


def _pieces(key: str, document: str, max_chars: int) -> Iterator[Item]:
    for number, piece in enumerate(split_text(document, max_chars)):
        yield text_item(f"{key}-{number:02d}", piece)


def split_text(document: str, max_chars: int) -> list[str]:
    """Pieces of at most `max_chars` characters that joined give the document; blank pieces are left out.

    >>> split_text("One two. Three four.", 12)
    ['One two. ', 'Three four.']
    """
    pieces = []
    start = 0
    while start < len(document):
        end = min(len(document), start + max_chars)
        if end < len(document):
            # Not in the first half: a heading's line break must not leave a piece of one line.
            half = start + max_chars // 2
            cuts = (document.rfind(mark, half, end) + len(mark) for mark in _CUTS if mark in document[half:end])
            end = next(cuts, end)
        if document[start:end].strip():
            pieces.append(document[start:end])
        start = end
    return pieces
