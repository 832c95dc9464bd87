"""One self-contained HTML page of a run: figures, curves, pictures, settings.

Enters: a run's folder in any state. Leaves: `report.html` in it, which opens from disk without a network: style,
script, charts and pictures are inside. Cost: about a second for 10,000 metric lines and 100 pictures; torch stays out.
"""

from __future__ import annotations

import time
from pathlib import Path

from data_pipelines.whole import write_whole
from qwen2vl_train.report.curves import curves_section
from qwen2vl_train.report.figures import duration
from qwen2vl_train.report.folder import Run, read_run
from qwen2vl_train.report.heldout import collect_scores, heldout_section
from qwen2vl_train.report.markup import Html, element
from qwen2vl_train.report.overview import headline_section, stages_section
from qwen2vl_train.report.pictures import pictures_section
from qwen2vl_train.report.settings import settings_section

# The page may load nothing, not even by mistake: a picture or style from elsewhere is refused by the browser.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_SECTIONS = {
    "figures": "Figures",
    "stages": "Stages",
    "held-out": "Held-out",
    "curves": "Curves",
    "pictures": "Pictures",
    "configuration": "Configuration",
}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run's folder, whole or not at all, and return its path.

    Works for finished, running and interrupted runs; missing pieces are left out and unreadable ones named on the page.

    Raises:
        FileNotFoundError: `run_dir` is absent or not a run's folder.
    """
    text = render(read_run(run_dir), now=time.time())
    path = run_dir / "report.html"
    # A lone surrogate in a sample's JSON has no UTF-8 form; it becomes "?" and must not cost the page.
    write_whole(path, text.encode("utf-8", errors="replace"))
    return path


def render(run: Run, now: float) -> str:
    """The page as text; `now` is the time (seconds since 1970) it says it was written."""
    scores = collect_scores(run.stages)
    sections = {
        "figures": headline_section(run, scores),
        "stages": stages_section(run),
        "held-out": heldout_section(scores),
        "curves": curves_section(run.stages),
        "pictures": pictures_section(run),
        "configuration": settings_section(run),
    }
    shown = [name for name, section in sections.items() if section is not None]
    name = run.folder.resolve().name
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{name} · training report"),
        element("style", _beside("page.css")),
    )
    body = element(
        "body",
        element("div", _header(run, name, now), element("nav", [_link(name) for name in shown]), class_="top"),
        element("main", _faults(run), [sections[name] for name in shown]),
        element("script", _beside("page.js")),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _header(run: Run, name: str, now: float) -> Html:
    """The run's name, its state, and one line on where it ran."""
    environment = run.environment
    facts = [
        f"world size {environment['world_size']}" if "world_size" in environment else None,
        f"on {environment['device']}" if "device" in environment else None,
        f"revision {environment['revision']}" if environment.get("revision") else None,
        f"written {time.strftime('%Y-%m-%d %H:%M', time.localtime(now))}",
    ]
    state = "finished" if run.finished else "unfinished"
    if not run.finished and run.last_logged is not None:
        state += f", last figures {duration(max(0.0, now - run.last_logged))} before this page"
    return element(
        "header",
        element("h1", name, " ", element("span", state, class_=f"state {state.split(',')[0]}")),
        element("p", " · ".join(fact for fact in facts if fact), class_="facts"),
        element("p", "export ", element("code", run.export), class_="facts") if run.export else None,
    )


def _link(name: str) -> Html:
    return element("a", _SECTIONS[name], href=f"#{name}")


def _faults(run: Run) -> Html | None:
    if not run.faults:
        return None
    entries = [element("li", fault) for fault in run.faults]
    return element("aside", element("b", "Left out of this page"), element("ul", entries))


def _beside(name: str) -> Html:
    return Html(Path(__file__).with_name(name).read_text(encoding="utf-8"))
