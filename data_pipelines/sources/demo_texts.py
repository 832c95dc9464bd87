"""Pure text of the demo data: what the tiny decoder learns its language from, and keeps it with.

In:   a random generator.
Out:  messages of a text-only record: single sentences, or questions and answers.
Cost: microseconds.

Half of the records describe a scene in words ("red circle (120,300),(400,620)") and ask what the pictures are asked, in
the same words: sorting by coordinate, finding a phrase, naming a place. A decoder that can do this from text has only
the seeing left to learn.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from data_pipelines.sources.demo_chats import fact_chat
from data_pipelines.sources.demo_clips import ask_direction, ask_events, sample_clip
from data_pipelines.sources.demo_questions import (
    NUMBERS,
    OCR_PROMPTS,
    Turn,
    as_messages,
    ask_caption,
    ask_vqa,
    join_phrases,
    plain_text,
)
from data_pipelines.sources.demo_scene import COLORS, SHAPES, WORDS, Scene, Shape, sample_scene
from data_pipelines.sources.demo_stencils import Stencils

Messages = list[dict[str, Any]]


def make_text(rng: Random, stencils: Stencils) -> Messages:
    """One text-only record's messages."""
    makers: tuple[Callable[[Random, Stencils], Messages], ...] = (_scene, _sentence, _arithmetic, _fact, _word, _count)
    return rng.choices(makers, (50, 15, 12, 8, 10, 5))[0](rng, stencils)


def _turns(turns: list[tuple[str, str]]) -> Messages:
    messages: Messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _spoken(turn: Turn) -> tuple[str, str]:
    return plain_text(turn.question), plain_text(turn.answer)


def _place(shape: Shape, scene: Scene) -> str:
    """The box as the model writes it: thousandths of the picture, so (0,0),(999,999) is all of it."""
    x1, y1, x2, y2 = shape.box
    left, right = (min(999, 1000 * x // scene.width) for x in (x1, x2))
    top, bottom = (min(999, 1000 * y // scene.height) for y in (y1, y2))
    return f"({left},{top}),({right},{bottom})"


def _scene(rng: Random, stencils: Stencils) -> Messages:
    """A scene told in any order, and two or three of the questions that pictures get."""
    scene = sample_scene(rng, stencils)
    told = [f"{shape.phrase} {_place(shape, scene)}" for shape in rng.sample(scene.shapes, len(scene.shapes))]
    shape = rng.choice(scene.shapes)
    turns = [
        _spoken(ask_caption(rng, scene)),
        (f"Where is {shape.phrase}?", _place(shape, scene)),
        (f"What is in {_place(shape, scene)}?", f"a {shape.phrase}"),
        _spoken(ask_vqa(rng, scene)),
    ]
    turns = rng.sample(turns, rng.randint(2, 3))
    opening = f"The image has {', '.join(told)}. "
    return _turns([(opening + turns[0][0], turns[0][1]), *turns[1:]])


def _sentence(rng: Random, stencils: Stencils) -> Messages:
    """A caption or a clip's events, as a document to be learnt whole, or a clip told and asked about."""
    if rng.random() < 0.4:
        pairs = rng.sample([f"{color} {kind}" for color in COLORS for kind in SHAPES], rng.randint(1, 3))
        return [{"role": "assistant", "content": join_phrases(pairs)}]
    clip = sample_clip(rng, rng.choice(("move", "appear")))
    told = plain_text(ask_events(clip).answer)
    movers = [actor for actor in clip.actors if actor.direction is not None]
    if not movers or rng.random() < 0.5:
        return [{"role": "assistant", "content": told}]
    question, answer = _spoken(ask_direction(rng.choice(movers)))
    return _turns([(f"In the video {told}. {question}", answer)])


def _arithmetic(rng: Random, stencils: Stencils) -> Messages:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    if rng.random() < 0.5:
        return _turns([(f"What is {a} plus {b}?", str(a + b))])
    c, d = rng.sample(range(1000), 2)
    return _turns([(f"Which is more, {c} or {d}?", str(max(c, d)))])


def _fact(rng: Random, stencils: Stencils) -> Messages:
    return as_messages([], fact_chat(rng))


def _word(rng: Random, stencils: Stencils) -> Messages:
    """A word told and asked back, so that the decoder knows each as an answer before it can read."""
    word = rng.choice(WORDS)
    return _turns([(f"The text says {word}. {rng.choice(OCR_PROMPTS)}", word)])


def _count(rng: Random, stencils: Stencils) -> Messages:
    """Counting a list."""
    count = rng.randint(1, 3)
    names = [f"{rng.choice(tuple(COLORS))} {rng.choice(SHAPES)}" for _ in range(count)]
    return _turns([(f"The image has {', '.join(names)}. How many shapes are there?", NUMBERS[count])])
