"""The section of held-out pictures: what was asked, what is true, what each stage answered, with boxes on top.

Enters: `<stage>/pictures/samples.json` and its PNG files. Leaves: cards that buttons filter by stage, task and outcome.
Pictures are kept once each however many stages show them, at most `MAX_SIDE` pixels long, as WebP (about 20 KB each).
Boxes are drawn as SVG from fractions of the picture's size: truth solid, prediction dashed.
"""

from __future__ import annotations

import hashlib
import io
import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qwen2vl_train.report.document import Document, read_json
from qwen2vl_train.report.figures import is_number, metric_title
from qwen2vl_train.report.folder import Run
from qwen2vl_train.report.markup import Html, element
from qwen2vl_train.training.shown import MAX_SIDE

BLANK_SIDE = 28  # the evaluation writes a white picture of this size where a sample has none
QUALITY = 86
_MEDIA = re.compile(r"<\|vision_start\|>((?:<\|(image|video)_pad\|>)+)<\|vision_end\|>")
_TOKENS = re.compile(r"(<\|[a-z_]+\|>|\[(?:image|video)(?:, [0-9]+ tokens)?\])")


@dataclass(frozen=True)
class _Picture:
    """An embedded picture: its id in the page and its size as drawn, pixels."""

    identity: str
    width: int
    height: int


@dataclass(frozen=True)
class _Sample:
    stage: str
    task: str
    key: str
    prompt: str
    truth: str
    prediction: str
    correct: bool
    picture: _Picture | None
    boxes: tuple[tuple[tuple[float, ...], bool], ...]  # ((x1, y1, x2, y2) as fractions, predicted)


def pictures_section(run: Run) -> Html | None:
    """Filter buttons and cards, a sample's stages side by side; None where no stage has left pictures."""
    album = _Album()
    samples = [sample for stage in run.stages if stage.held_out for sample in _read(run, stage.name, album)]
    if not samples:
        return None
    stages = list(dict.fromkeys(sample.stage for sample in samples))
    tasks = list(dict.fromkeys(sample.task for sample in samples))
    ordered = sorted(samples, key=lambda sample: (tasks.index(sample.task), sample.key, stages.index(sample.stage)))
    keys = (
        element("span", element("i", class_="edge truth"), "true box"),
        element("span", element("i", class_="edge predicted"), "predicted box"),
    )
    return element(
        "section",
        element("h2", "Pictures at evaluation"),
        element(
            "div",
            _choices("stage", [*stages, "all"], stages[-1]),
            _choices("task", ["all", *tasks], "all"),
            _choices("answer", ["all", "right", "wrong"], "all"),
            element("div", keys, class_="keys"),
            element("output", class_="shown"),
            class_="filters",
        ),
        album.definitions(),
        element("div", [_card(sample) for sample in ordered], class_="cards"),
        id="pictures",
    )


def _choices(name: str, values: Sequence[str], chosen: str) -> Html:
    buttons = [
        element(
            "button",
            value if value in ("all", "right", "wrong") or name == "stage" else _words(value),
            type="button",
            data_filter=name,
            data_value=value,
            aria_pressed="true" if value == chosen else "false",
        )
        for value in values
    ]
    return element("div", element("span", name), buttons, class_="choices")


class _Album:
    """Embedded pictures by content, so that the same held-out picture of three stages is kept once."""

    def __init__(self) -> None:
        self._by_digest: dict[str, tuple[_Picture, str]] = {}

    def add(self, path: Path) -> _Picture | None:
        """Embed the file; None for the blank picture of a sample without media, and for a file that cannot be read."""
        try:
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if digest not in self._by_digest:
                with Image.open(io.BytesIO(data)) as image:
                    if max(image.size) <= BLANK_SIDE:
                        return None
                    self._by_digest[digest] = self._embed(image.convert("RGB"))
        except (OSError, Image.DecompressionBombError):  # missing, cut, or no picture: the card says its text alone
            return None
        return self._by_digest[digest][0]

    def _embed(self, image: Image.Image) -> tuple[_Picture, str]:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        packed = io.BytesIO()
        image.save(packed, "WEBP", quality=QUALITY)
        picture = _Picture(f"picture-{len(self._by_digest)}", *image.size)
        return picture, f"data:image/webp;base64,{b64encode(packed.getvalue()).decode()}"

    def definitions(self) -> Html:
        """The pictures, invisible; each card's SVG refers to one by its id."""
        images = [
            element("image", id=picture.identity, width=picture.width, height=picture.height, href=address)
            for picture, address in self._by_digest.values()
        ]
        return element("svg", element("defs", images), class_="album", width=0, height=0, aria_hidden="true")


def _read(run: Run, stage: str, album: _Album) -> Iterable[_Sample]:
    folder = run.folder / stage / "pictures"
    path = folder / "samples.json"
    for row in Document(str(path), {"samples": read_json(path, run.faults)}, run.faults).objects("samples"):
        name = row.text("file") or ""
        inside = bool(name) and Path(name).name == name  # a name, not a path that leads elsewhere
        text = {key: row.text(key) or "" for key in ("task", "key", "prompt", "truth", "prediction")}
        picture = album.add(folder / name) if inside else None
        yield _Sample(stage, correct=bool(row.values.get("correct")), picture=picture, boxes=tuple(_boxes(row)), **text)


def _boxes(row: Document) -> Iterable[tuple[tuple[float, ...], bool]]:
    """Boxes of four finite numbers; a predicted box may have its corners swapped, SVG wants them in order."""
    for box in row.objects("boxes"):
        corners = box.values.get("xyxy")
        if isinstance(corners, list) and len(corners) == 4 and all(is_number(value) for value in corners):
            (left, right), (top, bottom) = sorted(corners[0::2]), sorted(corners[1::2])
            yield (left, top, right, bottom), bool(box.values.get("predicted"))


def _card(sample: _Sample) -> Html:
    outcome = "right" if sample.correct else "wrong"
    mark = element("b", "✓" if sample.correct else "✗", class_=f"mark {outcome}", title=outcome)
    head = element(
        "header",
        mark,
        element("span", _words(sample.task), class_="task"),
        element("span", f"after {sample.stage}", class_="after"),
    )
    texts = [
        (element("dt", name, class_=kind), element("dd", _dim_tokens(text), class_=kind))
        for name, kind, text in (
            ("prompt", "prompt", sample.prompt),
            ("truth", "truth", sample.truth),
            ("answer", f"answer {outcome}", sample.prediction),
            ("sample", "key", sample.key),
        )
    ]
    return element(
        "article",
        _drawing(sample),
        head,
        element("dl", texts),
        class_="card",
        data_stage=sample.stage,
        data_task=sample.task,
        data_answer=outcome,
    )


def _drawing(sample: _Sample) -> Html:
    """The picture with its boxes; each box has a pale rim under its coloured line, to stand out on any ground."""
    picture = sample.picture
    if picture is None:
        return element("div", "no picture", class_="blank")
    marks = [element("use", href=f"#{picture.identity}")]
    for (left, top, right, bottom), predicted in sorted(sample.boxes, key=lambda box: box[1]):
        place = {
            "x": left * picture.width,
            "y": top * picture.height,
            "width": (right - left) * picture.width,
            "height": (bottom - top) * picture.height,
        }
        kind = "predicted" if predicted else "truth"
        marks.append(element("rect", class_=f"rim {kind}", **place))
        marks.append(element("rect", element("title", f"{kind} box"), class_=f"box {kind}", **place))
    label = f"Held-out picture {sample.key} with true and predicted boxes"
    view = f"0 0 {picture.width} {picture.height}"
    return element("div", element("svg", marks, viewBox=view, role="img", aria_label=label), class_="drawing")


def _dim_tokens(text: str) -> list[Html | str]:
    """Special tokens set pale, so that the words stand out; a picture's run of pads becomes "[image, 16 tokens]"."""
    short = _MEDIA.sub(_media_words, text)
    if not short:
        return [element("i", "(empty)", class_="token")]
    return [element("i", part, class_="token") if _TOKENS.fullmatch(part) else part for part in _TOKENS.split(short)]


def _media_words(match: re.Match[str]) -> str:
    num_tokens = match[1].count("<|")
    return f"[{match[2]}, {num_tokens} tokens]" if num_tokens > 1 else f"[{match[2]}]"


def _words(task: str) -> str:
    return metric_title(task).lower()
