"""Conversations of the demo data: whole sentences, several turns, about a picture or about nothing to see.

In:   a random generator and, for a conversation about a picture, its `Scene`.
Out:  turns; later ones refer to earlier ones ("it").
Cost: microseconds; no pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from data_pipelines.sources.demo_questions import NUMBERS, Turn, box_part, join_phrases, text
from data_pipelines.sources.demo_scene import COLORS, SHAPES, Scene, Shape

GREETING = ("Hello!", "Hello! How can I help you?")
THANKS = ("Thank you!", "You are welcome!")

FACTS = (
    ("What is the opposite of left?", "The opposite of left is right."),
    ("What is the opposite of right?", "The opposite of right is left."),
    ("What is the opposite of up?", "The opposite of up is down."),
    ("What is the opposite of down?", "The opposite of down is up."),
    ("What is the opposite of above?", "The opposite of above is below."),
    ("What is the opposite of first?", "The opposite of first is last."),
    ("How many sides does a square have?", "A square has four sides."),
    ("How many sides does a triangle have?", "A triangle has three sides."),
    ("What color is the sky?", "The sky is blue."),
    ("What color is grass?", "Grass is green."),
    ("What color is the sun?", "The sun is yellow."),
    ("What color is blood?", "Blood is red."),
    ("What shape is a wheel?", "A wheel is a circle."),
    ("Which animal says meow?", "A cat says meow."),
    ("Which animal gives milk?", "A cow gives milk."),
    ("What falls from the clouds?", "Rain falls from the clouds."),
    ("What do you read?", "I read words in pictures."),
    ("What opens a door?", "A key opens a door."),
    ("Who are you?", "I am a small model that looks at pictures."),
)


def chat(question: str, answer: str) -> Turn:
    """A turn of plain words."""
    return Turn("chat", (text(question),), (text(answer),))


def picture_chat(rng: Random, scene: Scene) -> list[Turn]:
    """Three or four turns about a picture: perhaps a greeting, then questions that build on each other."""
    opening = [chat(*GREETING)] if rng.random() < 0.4 else [say_caption(scene)]
    makers: list[Callable[[Random, Scene], list[Turn]]] = [_talk_shape, _talk_count, _talk_presence, _talk_list]
    if scene.word is not None:
        makers.append(_talk_word)
    rng.shuffle(makers)
    turns = [*opening, *(turn for maker in makers[:2] for turn in maker(rng, scene))]
    return [*turns, chat(*THANKS)] if rng.random() < 0.2 else turns


def fact_chat(rng: Random) -> list[Turn]:
    """A conversation without a picture: one to three facts, perhaps with greeting and thanks."""
    turns = [chat(*fact) for fact in rng.sample(FACTS, rng.randint(1, 3))]
    if rng.random() < 0.3:
        turns.insert(0, chat(*GREETING))
    return [*turns, chat(*THANKS)] if rng.random() < 0.3 else turns


def say_caption(scene: Scene) -> Turn:
    """The caption as a whole sentence."""
    return chat("What do you see?", f"I see {join_phrases([shape.phrase for shape in scene.shapes])}.")


def say_color(shape: Shape) -> Turn:
    """The colour of the only shape of its kind."""
    return chat(f"Tell me the color of the {shape.kind}.", f"The {shape.kind} is {shape.color}.")


def lone_shapes(scene: Scene) -> list[Shape]:
    """Shapes that are the only one of their kind, so that "the circle" names one thing."""
    kinds = [shape.kind for shape in scene.shapes]
    return [shape for shape in scene.shapes if kinds.count(shape.kind) == 1]


def _talk_shape(rng: Random, scene: Scene) -> list[Turn]:
    """A colour, and then the place of what was just spoken of."""
    candidates = lone_shapes(scene)
    if not candidates:
        return _talk_count(rng, scene)
    shape = rng.choice(candidates)
    where = Turn("chat", (text("And where is it?"),), (text("It is at "), box_part(shape.box), text(".")))
    return [say_color(shape), where]


def _talk_count(rng: Random, scene: Scene) -> list[Turn]:
    count = len(scene.shapes)
    answer = "There is one shape." if count == 1 else f"There are {NUMBERS[count]} shapes."
    return [chat("Please count the shapes.", answer)]


def _talk_presence(rng: Random, scene: Scene) -> list[Turn]:
    present = [shape.phrase for shape in scene.shapes]
    if rng.random() < 0.5:
        phrase = rng.choice(present)
        return [chat(f"Do you see a {phrase}?", f"Yes, I see a {phrase}.")]
    phrase = rng.choice([f"{color} {kind}" for color in COLORS for kind in SHAPES if f"{color} {kind}" not in present])
    return [chat(f"Do you see a {phrase}?", f"No, I see no {phrase}.")]


def _talk_list(rng: Random, scene: Scene) -> list[Turn]:
    lines = (f"{number}. {shape.phrase}" for number, shape in enumerate(scene.shapes, 1))
    return [chat("List the shapes.", "\n".join(lines))]


def _talk_word(rng: Random, scene: Scene) -> list[Turn]:
    assert scene.word is not None
    return [chat("Which word is written there?", f"It says {scene.word.text}.")]
