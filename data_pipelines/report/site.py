"""The inspection page: one HTML file that opens from disk, its details and pictures in files beside it.

Enters: what `overview` and `collect` made. Leaves: `index.html` (style, script, overview and a summary of every
document), `data/*.js` (a document's tokens, loaded when it is opened) and `media/*.webp` (loaded when scrolled to). So
a page of 2,000 samples is 1 MB to open, where embedded pictures would be 60 MB. It asks nothing of any network.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.samples import LedgerEvent
from data_pipelines.whole import write_whole

MAX_PROBLEMS = 500
MARK = "qwen2vl-data inspection page"  # by which a folder is known to be ours, and may be written anew
# The page may load nothing but its own files, not even by mistake.
_POLICY = (
    "default-src 'none'; img-src 'self' file: data:; style-src 'unsafe-inline'; script-src 'self' file: 'unsafe-inline'"
)


@dataclass
class Page:
    """Everything `index.html` holds. `samples` numbers the documents of the section on single samples, in order.

    `documents` are summaries, among them those of packs; `mixture` and `charts` are empty for a page of packs alone.
    """

    title: str
    facts: list[str]
    datasets: list[str]
    capacity: tuple[int, int]
    tiles: list[tuple[str, str, str]] = field(default_factory=list)
    mixture: list[dict[str, Any]] = field(default_factory=list)
    charts: dict[str, Any] = field(default_factory=dict)
    fill: str = ""
    packs: list[dict[str, Any]] = field(default_factory=list)
    documents: list[dict[str, Any]] = field(default_factory=list)
    problems: Sequence[LedgerEvent] = ()


def clear_site(folder: Path) -> None:
    """Make room for a page: an earlier page in `folder` is removed, anything else there is left alone.

    Raises:
        UserError: the folder holds files that are not a page's.
    """
    index = folder / "index.html"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder with --out")
    if folder.is_dir() and any(folder.iterdir()):
        if not index.is_file() or MARK not in index.read_text(encoding="utf-8", errors="replace")[:600]:
            raise UserError(f"{folder} holds other files than an inspection page; give a new folder with --out")
        index.unlink()
        for name in ("data", "media"):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def write_site(page: Page, folder: Path) -> Path:
    """Write `index.html` into `folder`, last and whole: while it is missing, the page is not finished."""
    content = asdict(page)
    problems = [[p.dataset, p.key, p.reason, p.message] for p in page.problems[:MAX_PROBLEMS]]
    content |= {"problems": problems, "num_problems": len(page.problems)}
    # "<" inside a string would let a sample's text end the script element.
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    script = _beside("site_charts.js") + _beside("site_document.js") + _beside("site.js")
    text = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="{MARK}">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(page.title)}</title>\n<style>\n{_beside('site.css')}</style>\n</head>\n"
        f"<body>\n{_beside('site.html')}"
        f'<script type="application/json" id="content">{data}</script>\n<script>\n"use strict";\n{script}</script>\n'
        "</body>\n</html>\n"
    )
    path = folder / "index.html"
    write_whole(path, text)
    return path


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
