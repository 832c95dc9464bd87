"""Documents of the demo data: for every kind of shard and every held-out task, what one record holds.

In:   (seed, split, kind, index); nothing else, so any process can make any record.
Out:  a `Document`: key, record JSON, media bytes by member name.
Cost: about 0.5 ms for one picture, 6 ms for a clip.

Several questions about one picture share a training document: one ViT pass then teaches all of them. The order of the
turns is shuffled, because a held-out record asks one question only, right after the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from data_pipelines.sources import demo_chats as chats
from data_pipelines.sources import demo_comparisons as comparisons
from data_pipelines.sources import demo_questions as questions
from data_pipelines.sources.demo_clips import (
    FRAMES_PER_SECOND,
    Clip,
    ask_direction,
    ask_events,
    ask_order,
    encode_clip,
    sample_clip,
)
from data_pipelines.sources.demo_drawing import draw_scene, encode_picture
from data_pipelines.sources.demo_questions import Turn
from data_pipelines.sources.demo_scene import Scene, sample_scene
from data_pipelines.sources.demo_stencils import Stencils
from data_pipelines.sources.demo_texts import make_text

WORD_SHARE = 0.3  # of the pictures that are not about reading


@dataclass(frozen=True, slots=True)
class Draft:
    """A record before its media are drawn."""

    task: str
    messages: list[dict[str, Any]]
    media: dict[str, Scene | Clip]


@dataclass(frozen=True, slots=True)
class Document:
    """One sample, ready to be written."""

    key: str
    record: dict[str, Any]
    media: dict[str, bytes]


def make_document(seed: int, split: str, kind: str, index: int, stencils: Stencils) -> Document:
    """The record `index` of `kind` ("scenes", "clips", … or a held-out task); a pure function of the first four."""
    makers = TRAIN_KINDS if split == "train" else HELDOUT_TASKS
    draft = makers[kind](Random(f"{seed}/{split}/{kind}/{index}"), stencils)
    record: dict[str, Any] = {"task": draft.task, "messages": draft.messages}
    if draft.media:
        record["media"] = {name: _facts(item) for name, item in draft.media.items()}
    drawn = {name: _draw(item, stencils) for name, item in draft.media.items()}
    return Document(f"{split}-{kind}-{index:07d}", record, drawn)


def demo_texts(seed: int, count: int) -> Iterator[str]:
    """Texts of `count` records of every training kind, to train a tokenizer on; no picture is drawn."""
    stencils = Stencils()
    for kind, maker in TRAIN_KINDS.items():
        for index in range(count):
            for message in maker(Random(f"{seed}/texts/{kind}/{index}"), stencils).messages:
                yield from questions.text_runs(message["content"])


def _facts(item: Scene | Clip) -> dict[str, float]:
    if isinstance(item, Scene):
        return {"width": item.width, "height": item.height}
    return {
        "width": item.width,
        "height": item.height,
        "duration_s": item.duration_s,
        "fps": float(FRAMES_PER_SECOND),
        "frames": item.num_frames,
    }


def _draw(item: Scene | Clip, stencils: Stencils) -> bytes:
    if isinstance(item, Clip):
        return encode_clip(item, stencils)
    return encode_picture(draw_scene(item, stencils), item.suffix)


def _draft(task: str, items: list[Scene | Clip], turns: list[Turn]) -> Draft:
    media = {f"{n}.{item.suffix if isinstance(item, Scene) else 'mp4'}": item for n, item in enumerate(items)}
    return Draft(task, questions.as_messages([questions.media_part(name) for name in media], turns), media)


# ---- training kinds


def _captions(rng: Random, stencils: Stencils) -> Draft:
    """Picture and caption, and the word where there is one: the pairs of stage 1."""
    scene = sample_scene(rng, stencils, word=rng.random() < 0.5)
    turns = [questions.ask_caption(rng, scene)]
    if scene.word is not None:
        turns.insert(rng.randrange(2), questions.ask_ocr(rng, scene))
    return _draft("caption", [scene], turns)


def _scenes(rng: Random, stencils: Stencils) -> Draft:
    """The multitask document: caption (grounded or not), box or phrase of each shape, a question, perhaps the word."""
    scene = sample_scene(rng, stencils, word=rng.random() < WORD_SHARE)
    if rng.random() < 0.25:
        rest = [questions.ask_vqa(rng, scene)]
        turns = [questions.ask_grounded_caption(rng, scene)]
    else:
        rest = [questions.ask_vqa(rng, scene)] if rng.random() < 0.6 else []
        rest += [questions.ask_referring(s) if rng.random() < 0.75 else questions.ask_region(s) for s in scene.shapes]
        turns = [questions.ask_caption(rng, scene)]
    if scene.word is not None:
        rest.append(questions.ask_ocr(rng, scene))
    rng.shuffle(rest)
    # Half of the documents open with the caption; in the others another question meets the bare picture.
    turns = [*turns, *rest] if rng.random() < 0.5 else [*rest, *turns]
    return _draft("scene", [scene], turns)


def _words(rng: Random, stencils: Stencils) -> Draft:
    """A word to read and nothing else: elsewhere one token in thirty is the word, too faint a hint to start from."""
    scene = sample_scene(rng, stencils, num_shapes=rng.choice((1, 2)), word=True)
    return _draft("ocr", [scene], [questions.ask_ocr(rng, scene)])


def _ocr(rng: Random, stencils: Stencils) -> Draft:
    """A word to read, with or without its place, and two questions about the shapes."""
    scene = sample_scene(rng, stencils, num_shapes=rng.choice((1, 2)), word=True)
    read = questions.ask_ocr if rng.random() < 0.6 else questions.ask_ocr_grounding
    shape = rng.choice(scene.shapes)
    turns = [read(rng, scene), questions.ask_caption(rng, scene), questions.ask_referring(shape)]
    rng.shuffle(turns)
    return _draft("ocr", [scene], turns)


def _compare(rng: Random, stencils: Stencils) -> Draft:
    """Two pictures; in one pair of five the shapes are the same."""
    pair = comparisons.sample_pair(rng, stencils, differ=rng.random() < 0.8)
    return _draft("compare", list(pair.scenes), comparisons.comparison_turns(rng, pair))


def _chat(rng: Random, stencils: Stencils) -> Draft:
    """A conversation about a picture; one in five is about none."""
    if rng.random() < 0.2:
        return _draft("chat", [], chats.fact_chat(rng))
    scene = sample_scene(rng, stencils, word=rng.random() < WORD_SHARE)
    return _draft("chat", [scene], chats.picture_chat(rng, scene))


def _clips(rng: Random, stencils: Stencils) -> Draft:
    """A clip with its events asked about, and told in every second one: a direction is one token, a telling fifteen."""
    clip = sample_clip(rng, "move" if rng.random() < 0.7 else "appear")
    if clip.event == "appear":
        turns = [ask_order(rng, clip)]
    else:
        turns = [ask_direction(actor) for actor in clip.actors if actor.direction is not None]
    if rng.random() < 0.5:
        turns.append(ask_events(clip))
    rng.shuffle(turns)
    return _draft("clip", [clip], turns)


def _text(rng: Random, stencils: Stencils) -> Draft:
    return Draft("text", make_text(rng, stencils), {})


# ---- held-out tasks: one question a record


def _held_caption(rng: Random, stencils: Stencils) -> Draft:
    scene = sample_scene(rng, stencils, word=rng.random() < WORD_SHARE)
    return _draft("caption", [scene], [questions.ask_caption(rng, scene)])


def _held_grounded_caption(rng: Random, stencils: Stencils) -> Draft:
    scene = sample_scene(rng, stencils, word=rng.random() < WORD_SHARE)
    return _draft("grounded_caption", [scene], [questions.ask_grounded_caption(rng, scene)])


def _held_referring(rng: Random, stencils: Stencils) -> Draft:
    scene = sample_scene(rng, stencils, word=rng.random() < WORD_SHARE)
    return _draft("referring", [scene], [questions.ask_referring(rng.choice(scene.shapes))])


def _held_region(rng: Random, stencils: Stencils) -> Draft:
    scene = sample_scene(rng, stencils, word=rng.random() < WORD_SHARE)
    return _draft("region", [scene], [questions.ask_region(rng.choice(scene.shapes))])


def _held_ocr(rng: Random, stencils: Stencils) -> Draft:
    scene = sample_scene(rng, stencils, num_shapes=rng.choice((1, 2)), word=True)
    return _draft("ocr", [scene], [questions.ask_ocr(rng, scene)])


def _held_ocr_grounding(rng: Random, stencils: Stencils) -> Draft:
    scene = sample_scene(rng, stencils, num_shapes=rng.choice((1, 2)), word=True)
    return _draft("ocr_grounding", [scene], [questions.ask_ocr_grounding(rng, scene)])


def _held_vqa(rng: Random, stencils: Stencils) -> Draft:
    scene = sample_scene(rng, stencils, word=rng.random() < WORD_SHARE)
    return _draft("vqa", [scene], [questions.ask_vqa(rng, scene)])


def _held_compare(rng: Random, stencils: Stencils) -> Draft:
    pair = comparisons.sample_pair(rng, stencils, differ=True)
    return _draft("compare", list(pair.scenes), [comparisons.ask_difference(pair)])


def _held_chat(rng: Random, stencils: Stencils) -> Draft:
    """The answer looked at comes one turn after the picture."""
    scene = sample_scene(rng, stencils, num_shapes=1, word=rng.random() < WORD_SHARE)
    last = chats.say_color(scene.shapes[0]) if rng.random() < 0.5 else chats.say_caption(scene)
    return _draft("chat", [scene], [chats.chat(*chats.GREETING), last])


def _held_direction(rng: Random, stencils: Stencils) -> Draft:
    clip = sample_clip(rng, "move")
    movers = [actor for actor in clip.actors if actor.direction is not None]
    return _draft("video_direction", [clip], [ask_direction(rng.choice(movers))])


def _held_order(rng: Random, stencils: Stencils) -> Draft:
    clip = sample_clip(rng, "appear")
    return _draft("video_order", [clip], [ask_order(rng, clip)])


def _held_video_caption(rng: Random, stencils: Stencils) -> Draft:
    clip = sample_clip(rng, rng.choice(("move", "appear")))
    return _draft("video_caption", [clip], [ask_events(clip)])


Maker = Callable[[Random, Stencils], Draft]

TRAIN_KINDS: dict[str, Maker] = {
    "captions": _captions,
    "scenes": _scenes,
    "words": _words,
    "ocr": _ocr,
    "compare": _compare,
    "chat": _chat,
    "clips": _clips,
    "text": _text,
}
HELDOUT_TASKS: dict[str, Maker] = {
    "caption": _held_caption,
    "grounded_caption": _held_grounded_caption,
    "referring": _held_referring,
    "region": _held_region,
    "ocr": _held_ocr,
    "ocr_grounding": _held_ocr_grounding,
    "vqa": _held_vqa,
    "compare": _held_compare,
    "chat": _held_chat,
    "video_direction": _held_direction,
    "video_order": _held_order,
    "video_caption": _held_video_caption,
}
