"""Pairs of demo pictures that differ in one shape, and questions that only both together answer.

In:   a random generator and the stencils.
Out:  two `Scene`s and the turns about them.
Cost: as two scenes; no pixels.

The second picture has the places of the first and another ground, so a difference of pixels alone answers nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from data_pipelines.sources.demo_questions import Turn, box_part, join_phrases, phrase_part, text
from data_pipelines.sources.demo_scene import COLORS, SHAPES, Scene, Shape, sample_background, sample_scene
from data_pipelines.sources.demo_stencils import Stencils

ORDINALS = ("first", "second")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pictures; `before` in the first is `after` in the second, both None where the shapes are the same."""

    scenes: tuple[Scene, Scene]
    before: Shape | None
    after: Shape | None

    def name(self, position: int) -> str:
        """The media member of a picture: "0.jpg", "1.png"."""
        return f"{position}.{self.scenes[position].suffix}"


def sample_pair(rng: Random, stencils: Stencils, *, differ: bool) -> Pair:
    """A random pair, mostly of two shapes each; `differ` tells whether one shape changes its colour or its kind."""
    first = sample_scene(rng, stencils, num_shapes=rng.choice((1, 2, 2)))
    second, before, after = _change_shape(rng, first) if differ else (first, None, None)
    second = replace(second, background=sample_background(rng), suffix=rng.choice(("jpg", "jpg", "jpg", "png")))
    return Pair((first, second), before, after)


def _change_shape(rng: Random, scene: Scene) -> tuple[Scene, Shape, Shape]:
    """A copy of `scene` with one shape changed, the shape before, the shape after."""
    position = rng.randrange(len(scene.shapes))
    before = scene.shapes[position]
    present = {shape.phrase for shape in scene.shapes}
    variants = [replace(before, color=color) for color in COLORS] + [replace(before, kind=kind) for kind in SHAPES]
    after = rng.choice([shape for shape in variants if shape.phrase not in present])
    shapes = (*scene.shapes[:position], after, *scene.shapes[position + 1 :])
    return replace(scene, shapes=shapes), before, after


def ask_difference(pair: Pair) -> Turn:
    """What changes from the first picture to the second."""
    answer = "nothing"
    if pair.before is not None and pair.after is not None:
        answer = f"the {pair.before.phrase} becomes a {pair.after.phrase}"
    return Turn("compare", (text("What is different?"),), (text(answer),))


def ask_same(pair: Pair) -> Turn:
    """Whether the shapes of both pictures are the same, as yes or no."""
    answer = "yes" if pair.before is None else "no"
    return Turn("compare", (text("Do the two images show the same shapes?"),), (text(answer),))


def ask_which(rng: Random, pair: Pair) -> Turn:
    """Which of the two pictures holds a shape that only one of them has."""
    assert pair.before is not None
    assert pair.after is not None
    position = rng.randrange(2)
    phrase = (pair.before, pair.after)[position].phrase
    return Turn("compare", (text(f"Which image has a {phrase}?"),), (text(f"the {ORDINALS[position]}"),))


def ask_one_caption(pair: Pair, position: int) -> Turn:
    """The caption of picture 0 or 1 of the pair."""
    answer = join_phrases([shape.phrase for shape in pair.scenes[position].shapes])
    return Turn("compare", (text(f"Describe the {ORDINALS[position]} image."),), (text(answer),))


def ask_place(rng: Random, pair: Pair) -> Turn:
    """Referring in one of several pictures: phrase → box of the named picture."""
    position = rng.randrange(2)
    shape, name = rng.choice(pair.scenes[position].shapes), pair.name(position)
    question = (
        text("Where is "),
        phrase_part(shape.phrase, name),
        text(f" in the {ORDINALS[position]} image?"),
    )
    return Turn("compare", question, (box_part(shape.box, image=name),))


def comparison_turns(rng: Random, pair: Pair) -> list[Turn]:
    """Three turns of a training document: the comparison, a place or a yes or no, and one of the captions."""
    comparison = ask_difference(pair) if pair.before is None or rng.random() < 0.6 else ask_which(rng, pair)
    turns = [comparison, ask_same(pair) if rng.random() < 0.3 else ask_place(rng, pair)]
    turns.append(ask_one_caption(pair, rng.randrange(2)))
    rng.shuffle(turns)
    return turns
