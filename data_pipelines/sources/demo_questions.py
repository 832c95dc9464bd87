"""Questions about the demo pictures and their answers, as turns of the record form.

In:   a `Scene` (what a picture holds) and a random generator that picks the object asked about and the wording.
Out:  a `Turn`: task name, question parts, answer parts. A function returns None where its question has no one answer.
Cost: microseconds; no pixels.

Every phrase is "color shape" and every caption lists the shapes from left to right, so that an exact match is well
defined.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from data_pipelines.sources.demo_scene import COLORS, SHAPES, Box, Scene, Shape

Part = dict[str, Any]

NUMBERS = ("zero", "one", "two", "three")
CAPTION_PROMPTS = ("Describe the image.", "What is in the image?")
GROUNDED_PROMPTS = ("Describe the image with boxes.",)
OCR_PROMPTS = ("What does the text say?", "Read the text.")
OCR_GROUNDING_PROMPTS = ("Read the text with its place.",)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer, as content parts of the record form."""

    task: str
    question: tuple[Part, ...]
    answer: tuple[Part, ...]


def text(words: str) -> Part:
    """A text part."""
    return {"type": "text", "text": words}


def phrase_part(phrase: str, image: str | None = None) -> Part:
    """The phrase alone, as a referring question writes it."""
    return _region({"phrase": phrase}, image)


def box_part(box: Box, phrase: str | None = None, image: str | None = None) -> Part:
    """A box (pixels of the picture), with its phrase where one is given."""
    named = {} if phrase is None else {"phrase": phrase}
    return _region({**named, "boxes": [list(box)]}, image)


def _region(fields: Part, image: str | None) -> Part:
    return {"type": "region", **fields, **({} if image is None else {"image": image})}


def as_messages(media: Sequence[Part], turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Messages of a document: the media parts open the first user turn, then every turn asks and answers."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        opening = list(media) if number == 0 else []
        messages.append({"role": "user", "content": [*opening, *turn.question]})
        messages.append({"role": "assistant", "content": list(turn.answer)})
    return messages


def join_phrases(phrases: Sequence[str]) -> str:
    """The caption: "a red circle", "a red circle and a blue cross", "a red circle, a blue cross and a green square"."""
    named = [f"a {phrase}" for phrase in phrases]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def ask_caption(rng: Random, scene: Scene) -> Turn:
    """The shapes from left to right."""
    answer = join_phrases([shape.phrase for shape in scene.shapes])
    return Turn("caption", (text(rng.choice(CAPTION_PROMPTS)),), (text(answer),))


def ask_grounded_caption(rng: Random, scene: Scene) -> Turn:
    """The caption with a box after each phrase."""
    answer: list[Part] = []
    for number, shape in enumerate(scene.shapes):
        last = number == len(scene.shapes) - 1
        joint = "a " if number == 0 else " and a " if last else ", a "
        answer += [text(joint), box_part(shape.box, shape.phrase)]
    return Turn("grounded_caption", (text(rng.choice(GROUNDED_PROMPTS)),), tuple(answer))


def ask_referring(shape: Shape) -> Turn:
    """Phrase → box."""
    question = (text("Where is "), phrase_part(shape.phrase), text("?"))
    return Turn("referring", question, (box_part(shape.box),))


def ask_region(shape: Shape) -> Turn:
    """Box → phrase."""
    return Turn("region", (text("What is in "), box_part(shape.box), text("?")), (text(f"a {shape.phrase}"),))


def ask_ocr(rng: Random, scene: Scene) -> Turn:
    """The word alone."""
    assert scene.word is not None
    return Turn("ocr", (text(rng.choice(OCR_PROMPTS)),), (text(scene.word.text),))


def ask_ocr_grounding(rng: Random, scene: Scene) -> Turn:
    """The word and its quad, clockwise from the top left corner of the first letter."""
    assert scene.word is not None
    answer = {"type": "region", "phrase": scene.word.text, "quads": [list(scene.word.quad)]}
    return Turn("ocr_grounding", (text(rng.choice(OCR_GROUNDING_PROMPTS)),), (answer,))


def ask_vqa(rng: Random, scene: Scene) -> Turn:
    """Counting, colour, kind, relative position or presence, one in five each where the scene allows it."""
    asks = [_ask_count, _ask_color, _ask_kind, _ask_position, _ask_presence]
    rng.shuffle(asks)
    turn = next(turn for ask in asks if (turn := ask(rng, scene)) is not None)
    return turn


def vqa(question: str, answer: str) -> Turn:
    """A question with a short answer."""
    return Turn("vqa", (text(question),), (text(answer),))


def _ask_count(rng: Random, scene: Scene) -> Turn:
    return vqa("How many shapes are there?", NUMBERS[len(scene.shapes)])


def _ask_color(rng: Random, scene: Scene) -> Turn | None:
    """The colour of a shape that is the only one of its kind."""
    kinds = [shape.kind for shape in scene.shapes]
    single = [shape for shape in scene.shapes if kinds.count(shape.kind) == 1]
    if not single:
        return None
    shape = rng.choice(single)
    return vqa(f"What color is the {shape.kind}?", shape.color)


def _ask_kind(rng: Random, scene: Scene) -> Turn | None:
    """The kind of a shape that is the only one of its colour."""
    colors = [shape.color for shape in scene.shapes]
    single = [shape for shape in scene.shapes if colors.count(shape.color) == 1]
    if not single:
        return None
    shape = rng.choice(single)
    return vqa(f"What shape is {shape.color}?", f"a {shape.kind}")


def _ask_position(rng: Random, scene: Scene) -> Turn | None:
    """Left or right, above or below, where the difference is plain: at least a quarter of the shorter side."""
    if len(scene.shapes) < 2:
        return None
    one, other = rng.sample(scene.shapes, 2)
    (x1, y1), (x2, y2) = one.center, other.center
    plain = min(scene.width, scene.height) / 4
    axes = [("left", "right", x1 - x2)] * (abs(x1 - x2) >= plain) + [("above", "below", y1 - y2)] * (
        abs(y1 - y2) >= plain
    )
    if not axes:
        return None
    low, high, difference = rng.choice(axes)
    question = f"Is the {one.phrase} {low} or {high} of the {other.phrase}?"
    if low == "above":
        question = f"Is the {one.phrase} above or below the {other.phrase}?"
    return vqa(question, low if difference < 0 else high)


def _ask_presence(rng: Random, scene: Scene) -> Turn:
    """Yes and no alike often."""
    present = [shape.phrase for shape in scene.shapes]
    if rng.random() < 0.5:
        return vqa(f"Is there a {rng.choice(present)}?", "yes")
    absent = [f"{color} {kind}" for color in COLORS for kind in SHAPES if f"{color} {kind}" not in present]
    return vqa(f"Is there a {rng.choice(absent)}?", "no")


def media_part(name: str) -> Part:
    """The part that places the media member `name`."""
    kind = "video" if name.endswith(".mp4") else "image"
    return {"type": kind, kind: name}


def text_runs(content: str | Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The texts of a message as a tokenizer meets them: one run for each part, media and coordinates left out."""
    parts = [text(content)] if isinstance(content, str) else content
    for part in parts:
        yield from (str(part[field]) for field in ("text", "phrase") if field in part)


def plain_text(content: Sequence[Mapping[str, Any]]) -> str:
    """The words of a question or an answer as one string."""
    return "".join(text_runs(content))
