"""Ask a model folder about pictures and clips: `qwen2vl generate`.

Enters: a Qwen2-VL folder (ours or published), media files in the order they are named, a prompt. Leaves: the answer,
and on request a picture with the answer's boxes and quads drawn on it. The folder's own pixel limits apply unless
others are given. A GIF after --image is its first frame, after --video a clip.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from data_pipelines.config import MediaConfig, Template
from data_pipelines.decode.image import decode_image
from data_pipelines.encode.boxes import parse_boxes, parse_quads, to_pixels
from data_pipelines.encode.sample import SampleEncoder
from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.samples import MediaKind, MediaRef, Message, Record, Text
from data_pipelines.tokenizer import TextTokenizer
from qwen2vl_train.generate import Sampling, generate, open_model

KEY = "the question"
_PHRASE = re.compile(
    r"(?:<\|object_ref_start\|>(?P<phrase>[^<]*)<\|object_ref_end\|>)?"
    r"(?P<places>(?:<\|(?:box|quad)_start\|>[^<]*<\|(?:box|quad)_end\|>)+)"
)
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")


@dataclass(frozen=True)
class MediaFile:
    """A picture or clip on disk; `kind` says how it is to be read."""

    path: Path
    kind: MediaKind


class Assistant:
    """A model folder ready to answer. `max_tokens` bounds prompt, media and answer together."""

    def __init__(
        self,
        folder: Path,
        template: Template = "chatml",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        media: MediaConfig | None = None,
        vision_ids: bool = False,
    ) -> None:
        """Load `folder`. `dtype` None: bfloat16 on CUDA, float32 on the CPU. `media` None: the folder's own limits.

        `vision_ids` writes "Picture 1: ", "Video 1: " before the media: for models that were trained so.
        """
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = TextTokenizer(folder)
        self.model = open_model(folder, device, dtype)
        self.max_tokens = self.model.config.text.max_position_embeddings
        limits = media or read_limits(folder)
        self.encoder = SampleEncoder(self.tokenizer, template, limits, self.max_tokens, vision_ids)

    def answer(
        self, prompt: str, media: Sequence[MediaFile] = (), max_new_tokens: int = 512, sampling: Sampling | None = None
    ) -> str:
        """The answer with its box and reference tokens, without the stop token.

        Raises DataError where a file does not decode or does not fit, FileNotFoundError where it is not there.
        """
        names = {f"{number}{item.path.suffix.lower()}": item.path for number, item in enumerate(media)}
        parts = [MediaRef(name, kind=item.kind) for name, item in zip(names, media, strict=True)]
        record = Record(KEY, "chat", (Message("user", (*parts, Text(prompt))),))
        encoded = self.encoder.encode_prompt(
            record, lambda name: names[name].read_bytes(), reserve_tokens=max_new_tokens
        )
        special = self.tokenizer.special
        stops = (special.im_end, special.endoftext)
        (ids,) = generate(self.model, [encoded], max_new_tokens, stops, sampling)
        return self.tokenizer.decode([token for token in ids if token not in stops])

    def close(self) -> None:
        """End the clip decoder's process."""
        self.encoder.close()


def read_limits(folder: Path) -> MediaConfig:
    """Pixel limits and sampling of the folder's preprocessor files; the published defaults where one says nothing."""
    config = MediaConfig()
    image, video = (
        _read_json(folder / name) for name in ("preprocessor_config.json", "video_preprocessor_config.json")
    )
    return replace(
        config,
        min_pixels=int(image.get("min_pixels", config.min_pixels)),
        max_pixels=int(image.get("max_pixels", config.max_pixels)),
        video_min_pixels=int(video.get("min_pixels", config.video_min_pixels)),
        video_max_pixels=int(video.get("max_pixels", config.video_max_pixels)),
        min_frames=int(video.get("min_frames", config.min_frames)),
        max_frames=int(video.get("max_frames", config.max_frames)),
        fps=float(video.get("fps", config.fps)),
    )


def draw_answer(picture: Image.Image, answer: str) -> tuple[Image.Image, int]:
    """A copy of `picture` with the answer's boxes and quads, each with its phrase; and how many were drawn."""
    drawn = picture.convert("RGB").copy()
    canvas = ImageDraw.Draw(drawn)
    line = max(2, round(max(drawn.size) / 400))
    count = 0
    for phrase, corners in _places(answer):
        colour = _COLOURS[count % len(_COLOURS)]
        points = [(to_pixels(x, drawn.width), to_pixels(y, drawn.height)) for x, y in corners]
        canvas.line([*points, points[0], points[1]], fill=colour, width=line, joint="curve")
        if phrase:
            left, top = min(x for x, _ in points) + line, min(y for _, y in points) + line
            canvas.rectangle(canvas.textbbox((left, top), phrase), fill="white")
            canvas.text((left, top), phrase, fill=colour)
        count += 1
    return drawn, count


def add_arguments(commands: Any) -> None:
    """Add the `generate` command to the sub-parsers of `qwen2vl`; it sets `run`."""
    parser = commands.add_parser(
        "generate",
        help="ask a model about pictures and clips",
        description="Answer a prompt about media in the order given. A GIF after --image is a picture (its first "
        "frame), after --video a clip.",
        epilog='Example: qwen2vl generate --model runs/demo/instruct/export --image a.jpg --prompt "What is here?"',
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a Qwen2-VL folder")
    parser.add_argument("--prompt", required=True, help="the question; it follows the media")
    for kind in ("image", "video"):
        parser.add_argument(
            f"--{kind}", dest="media", action=_AppendMedia, kind=kind, metavar="FILE", help=f"a {kind}; may be repeated"
        )
    parser.add_argument("--template", choices=("chatml", "plain"), default="chatml", help="(%(default)s)")
    parser.add_argument(
        "--vision-ids", action="store_true", help='write "Picture 1: " before the media (data.vision_ids)'
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest word (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the words that hold P")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest words; 0: any")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (%(default)s)")
    parser.add_argument(
        "--max-pixels", type=int, metavar="N", help="pixels of a picture, instead of the folder's limit"
    )
    parser.add_argument("--fps", type=float, metavar="F", help="frames per second of clips, instead of the folder's")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(bfloat16 on cuda, else float32)")
    parser.add_argument("--draw", type=Path, metavar="OUT.png", help="write the picture with the answer's boxes")
    parser.set_defaults(run=run_generate, media=[])


def run_generate(options: argparse.Namespace) -> int:
    """The `generate` command: print the answer, draw where asked; returns the exit code."""
    media: list[MediaFile] = options.media
    missing = [str(item.path) for item in media if not item.path.is_file()]
    if missing:
        raise MissingFileError(f"no such file: {', '.join(missing)}")
    if not (options.model / "config.json").is_file():
        raise MissingFileError(f"--model {options.model}: no config.json there; name a Qwen2-VL folder")
    if options.draw and [item.kind for item in media] != ["image"]:
        raise UserError("--draw needs exactly one --image: the answer's boxes do not say which picture they are of")
    limits = read_limits(options.model)
    if options.max_pixels:
        limits = replace(limits, max_pixels=options.max_pixels, min_pixels=min(limits.min_pixels, options.max_pixels))
    if options.fps:
        limits = replace(limits, fps=options.fps)
    assistant = Assistant(
        options.model,
        options.template,
        torch.device(options.device) if options.device else None,
        getattr(torch, options.dtype) if options.dtype else None,
        limits,
        options.vision_ids,
    )
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
    try:
        answer = assistant.answer(options.prompt, media, options.max_new_tokens, sampling)
    finally:
        assistant.close()
    print(answer)
    if options.draw:
        rgb = decode_image(media[0].path.read_bytes(), media[0].path.name, limits.max_source_pixels)
        picture, count = draw_answer(Image.fromarray(rgb), answer)
        picture.save(options.draw)
        print(f"{count} places drawn: {options.draw}")
    return 0


class _AppendMedia(argparse.Action):
    """Collects --image and --video in one list, in the order they were written."""

    def __init__(self, option_strings: Sequence[str], dest: str, kind: MediaKind, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self.kind: MediaKind = kind

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        item = MediaFile(Path(values), self.kind)
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), item])


def _places(answer: str) -> list[tuple[str, list[tuple[int, int]]]]:
    """(phrase or "", corners on the 0..999 grid) of every box and quad of an answer, tagged or bare."""
    places: list[tuple[str, list[tuple[int, int]]]] = []
    if not _PHRASE.search(answer):
        answer = f"<|box_start|>{answer}<|box_end|>"
    for match in _PHRASE.finditer(answer):
        phrase, text = match["phrase"] or "", match["places"]
        boxes = [[(x1, y1), (x2, y1), (x2, y2), (x1, y2)] for x1, y1, x2, y2 in parse_boxes(text)]
        quads = [list(zip(quad[::2], quad[1::2], strict=True)) for quad in parse_quads(text)]
        places += [(phrase, corners) for corners in (*boxes, *quads)]
    return places


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values: Any = json.loads(path.read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}
