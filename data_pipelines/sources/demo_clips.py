"""Clips of the demo data: one or two coloured shapes that move or appear, encoded as H.264 in mp4.

In:   a random generator.
Out:  a `Clip` (what happens), its questions, and its bytes: yuv420p, 8 frames per second, 2 to 3 seconds,
      84 to 112 pixels.
Cost: about 5 ms a clip, one thread.

Sampled at 2 frames per second a clip of 2 s gives 4 frames, 2 temporal steps. A moving shape crosses nearly all of
the picture. A second shape appears between 30% and 50% of the clip: not in its first half second, yet in two sampled
frames at least.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from random import Random

import av
import numpy as np

from data_pipelines.sources.demo_drawing import add_rgb, draw_background, stamp
from data_pipelines.sources.demo_questions import Turn, text
from data_pipelines.sources.demo_scene import COLORS, SHAPES, Background, Rgb, sample_background
from data_pipelines.sources.demo_stencils import Stencils

FRAMES_PER_SECOND = 8
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
MIN_TRAVEL = 0.85  # of the room that a moving shape has along its way


@dataclass(frozen=True, slots=True)
class Actor:
    """A shape of `side` pixels whose top left corner runs from `start` to `end`, seen from `first_frame` on."""

    color: str
    kind: str
    side: int
    start: tuple[int, int]
    end: tuple[int, int]
    first_frame: int
    direction: str | None
    ink: Rgb

    @property
    def phrase(self) -> str:
        """Colour and kind, as every answer names it."""
        return f"{self.color} {self.kind}"

    def corner(self, frame: int, num_frames: int) -> tuple[int, int]:
        """Top left corner at `frame`, pixels."""
        (x1, y1), (x2, y2) = self.start, self.end
        last = num_frames - 1
        return x1 + (x2 - x1) * frame // last, y1 + (y2 - y1) * frame // last


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip. `event` is "move" (one actor at least moves) or "appear" (the second actor appears later)."""

    width: int
    height: int
    num_frames: int
    background: Background
    actors: tuple[Actor, ...]
    event: str

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.num_frames / FRAMES_PER_SECOND


def sample_clip(rng: Random, event: str) -> Clip:
    """A random clip with `event` "move" or "appear"."""
    width, height = (2 * rng.randint(42, 56) for _ in range(2))
    num_frames = rng.choice((16, 16, 16, 20, 24))
    names = rng.sample([(color, kind) for color in COLORS for kind in SHAPES], 2)
    horizontal = rng.random() < 0.5
    side_by_side = width if horizontal else height
    across = height if horizontal else width
    if event == "move" and rng.random() < 0.65:
        lanes = [(0, across)]
    else:
        lanes = [(0, across // 2), (across // 2, across)]
        rng.shuffle(lanes)
    actors: list[Actor] = []
    for number, (color, kind) in enumerate(names[: len(lanes)]):
        low, high = lanes[number]
        side = rng.randint(26, min(38, high - low - 2))
        lane = rng.randint(low, high - side)
        moves = event == "move" and (number == 0 or rng.random() < 0.6)
        first = rng.randint(round(num_frames * 0.3), num_frames // 2) if event == "appear" and number else 0
        begin, end = _sample_path(rng, side_by_side - side, moves)
        start, stop = ((begin, lane), (end, lane)) if horizontal else ((lane, begin), (lane, end))
        names_of_axis = ("left", "right") if horizontal else ("up", "down")
        direction = names_of_axis[end > begin] if moves else None
        ink = (rng.randint(-18, 18), rng.randint(-18, 18), rng.randint(-18, 18))
        actors.append(Actor(color, kind, side, start, stop, first, direction, ink))
    if event == "move":  # told from left to right or top to bottom; shapes that appear are told in their order
        actors.sort(key=lambda actor: actor.start[1] if horizontal else actor.start[0])
    return Clip(width, height, num_frames, sample_background(rng), tuple(actors), event)


def _sample_path(rng: Random, room: int, moves: bool) -> tuple[int, int]:
    """Begin and end, in pixels, along an axis with `room` for the corner: apart by at least MIN_TRAVEL of it."""
    if not moves:
        place = rng.randint(0, room)
        return place, place
    travel = rng.randint(round(room * MIN_TRAVEL), room)
    begin = rng.randint(0, room - travel)
    return (begin, begin + travel) if rng.random() < 0.5 else (begin + travel, begin)


def ask_direction(actor: Actor) -> Turn:
    """Left, right, up or down, of an actor that moves."""
    assert actor.direction is not None
    question = f"Which direction does the {actor.phrase} move?"
    return Turn("video_direction", (text(question),), (text(actor.direction),))


def ask_order(rng: Random, clip: Clip) -> Turn:
    """Which of the two shapes appeared first, or last."""
    which, actor = rng.choice((("first", clip.actors[0]), ("last", clip.actors[1])))
    return Turn("video_order", (text(f"Which shape appears {which}?"),), (text(f"a {actor.phrase}"),))


def ask_events(clip: Clip) -> Turn:
    """The clip in a sentence: from left to right or top to bottom, or in order of appearance."""
    if clip.event == "appear":
        answer = " and then ".join(f"a {actor.phrase} appears" for actor in clip.actors)
    else:
        answer = " and ".join(
            f"a {actor.phrase} moves {actor.direction}" if actor.direction else f"a {actor.phrase} stays"
            for actor in clip.actors
        )
    return Turn("video_caption", (text("Describe the video."),), (text(answer),))


def encode_clip(clip: Clip, stencils: Stencils) -> bytes:
    """The mp4 bytes: H.264, one thread, no time stamps of the machine, so the same clip gives the same bytes."""
    ground = draw_background(clip.background, clip.width, clip.height)
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"preset": "ultrafast", "crf": "18"})
        video.width, video.height, video.pix_fmt = clip.width, clip.height, "yuv420p"
        video.codec_context.thread_count = 1
        for number in range(clip.num_frames):
            frame = ground.copy()
            for actor in clip.actors:
                if number >= actor.first_frame:
                    x, y = actor.corner(number, clip.num_frames)
                    ink = add_rgb(COLORS[actor.color], actor.ink)
                    stamp(frame, stencils.shape(actor.kind, actor.side, actor.side), x, y, ink)
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()
