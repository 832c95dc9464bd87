"""Held-out scoring of an exported model by greedy generation.

Enters: a Hugging Face folder and held-out shards by task, one question per record. Leaves: a `Report` with a figure
per task, the majority baseline and some pictures with true and predicted answers. The records are shared out over the
ranks; each rank holds the whole model as for inference: in bfloat16 on CUDA (17 GB for 7B), in float32 on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.config import DataConfig, RemoteConfig
from data_pipelines.decode.image import decode_image
from data_pipelines.decode.video import read_clip
from data_pipelines.encode.boxes import parse_boxes
from data_pipelines.encode.budget import within_patches
from data_pipelines.encode.chat import tokenize_prompt
from data_pipelines.encode.sample import SampleEncoder
from data_pipelines.errors import DataError
from data_pipelines.index.build import Counting
from data_pipelines.index.source import SourceIndex
from data_pipelines.samples import Encoded, Media, Record, Text
from data_pipelines.shards.storage import expand_shards
from data_pipelines.tokenizer import TextTokenizer
from qwen2vl_train.config import EvaluationConfig
from qwen2vl_train.evaluation.metrics import constant_baseline, metric_of
from qwen2vl_train.generate import generate, open_model
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.training.kept import write_json
from qwen2vl_train.training.shown import MAX_SIDE, Box, Shown
from qwen2vl_train.training.world import World

Picture = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Answer:
    """One scored sample, its task's record `number`. `shown` carries its picture for the first few of each task."""

    number: int
    task: str
    question: str
    truth: str
    prediction: str
    hit: bool
    shown: Shown | None


@dataclass
class Report:
    """Figures by metric name (0 to 1), the constant-answer baseline under the same names, and pictures to look at."""

    metrics: dict[str, float]
    baseline: dict[str, float]
    shown: list[Shown]

    def save_pictures(self, folder: Path) -> None:
        """Write each shown picture as PNG with `samples.json` beside them (prompt, truth, prediction, boxes)."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for number, sample in enumerate(self.shown):
            name = f"{number:03d}.png"
            Image.fromarray(sample.picture).save(folder / name)
            boxes = [{"xyxy": box.xyxy, "caption": box.caption, "predicted": box.predicted} for box in sample.boxes]
            rows.append(
                {"file": name, "boxes": boxes}
                | {key: getattr(sample, key) for key in ("task", "key", "prompt", "truth", "prediction", "correct")}
            )
        write_json(folder / "samples.json", rows)


def evaluate(
    model_folder: Path,
    heldout: Mapping[str, str],
    data: DataConfig,
    config: EvaluationConfig,
    world: World,
    progress: Callable[[int], None] | None = None,
    at: list[str] | None = None,
) -> Report:
    """Score the model in `model_folder` on each task's shards with the stage's template and budgets. Collective.

    `progress` is told the number of sets done after each, by every rank; what it raises ends the evaluation. `at` holds
    the keys of the samples being answered meanwhile.
    """
    at = [] if at is None else at
    tokenizer = TextTokenizer(model_folder)
    model = open_model(model_folder, world.device)
    media = within_patches(data.media, data.plan.max_patches)
    encoder = SampleEncoder(tokenizer, data.template, media, data.plan.max_tokens, data.vision_ids)
    report = Report({}, {}, [])
    for number, (task, shards) in enumerate(heldout.items()):
        source = _open_source(encoder, task, shards, data.remote)
        mine = _score_task(model, encoder, source, config, world, at)
        source.close()
        answers = [answer for part in world.gather(mine) for answer in part]
        answers.sort(key=lambda answer: answer.number)  # as one rank would have them
        if answers:
            name = metric_of(task).name
            report.metrics[name] = sum(answer.hit for answer in answers) / len(answers)
            report.baseline[name] = constant_baseline(
                task, [answer.question for answer in answers], [answer.truth for answer in answers]
            )
            report.shown += [answer.shown for answer in answers if answer.shown]
        if progress is not None:
            progress(number + 1)
    return report


def _open_source(encoder: SampleEncoder, task: str, shards: str, remote: RemoteConfig) -> SourceIndex:
    paths = expand_shards(f"data.heldout.{task}", (shards,), remote)
    return SourceIndex(task, paths, Counting(encoder.tokenizer, encoder.template, encoder.vision_ids), remote)


def _score_task(
    model: Qwen2VL, encoder: SampleEncoder, source: SourceIndex, config: EvaluationConfig, world: World, at: list[str]
) -> list[Answer]:
    """This rank's share of one task (every world-th record), generated in batches, whose keys are in `at` meanwhile."""
    task = source.name
    questions = []
    answers: list[Answer] = []
    records = islice(enumerate(source.records()), world.rank, config.max_samples, world.size)
    for number, (_, record, media, read) in records:
        at[:] = [record.key]
        try:
            questions.append(_question(encoder, number, record, {item.name: item for item, _ in media}, read))
        except DataError as error:
            warnings.warn(f"held-out sample counts as wrong: {error}", stacklevel=2)
            answers.append(Answer(number, task, _asked(record), "", "", False, None))
    stop = (encoder.tokenizer.special.im_end, encoder.tokenizer.special.endoftext)
    for first in range(0, len(questions), config.batch_size):
        batch = questions[first : first + config.batch_size]
        at[:] = [question.record.key for question in batch]
        outputs = generate(model, [question.prompt for question in batch], config.max_new_tokens, stop)
        for question, ids in zip(batch, outputs, strict=True):
            prediction = encoder.tokenizer.decode([token for token in ids if token not in stop])
            hit = metric_of(task).hit(question.truth, prediction)
            looked_at = question.number < config.pictures
            shown = _show(task, question, prediction, hit, encoder) if looked_at else None
            asked = _asked(question.record)
            answers.append(Answer(question.number, task, asked, question.truth, prediction, hit, shown))
    at.clear()
    return answers


@dataclass(frozen=True)
class _Question:
    number: int
    record: Record
    media: Mapping[str, Media]
    read: Callable[[str], bytes]
    prompt: Encoded
    prompt_text: str
    truth: str


def _question(
    encoder: SampleEncoder, number: int, record: Record, media: Mapping[str, Media], read: Callable[[str], bytes]
) -> _Question:
    """The prompt's tokens and pixels, and the true answer as the tokenizer writes it, without its end token."""
    prompt = encoder.encode_prompt(record, read, medias=media)
    asked = tokenize_prompt(record, encoder.tokenizer, encoder.template, media).input_ids
    special = encoder.tokenizer.special
    answer = encoder.tokenize(record, media).input_ids[len(asked) :]
    ends = [place for place, token in enumerate(answer) if token in (special.im_end, special.endoftext)]
    truth = encoder.tokenizer.decode(answer[: ends[0]] if ends else answer)
    return _Question(number, record, media, read, prompt, encoder.tokenizer.decode(asked), truth)


def _asked(record: Record) -> str:
    """The words of the last question."""
    last = [message for message in record.messages if message.role == "user"][-1:]
    return " ".join(part.text for message in last for part in message.parts if isinstance(part, Text)).strip()


def _show(task: str, question: _Question, prediction: str, hit: bool, encoder: SampleEncoder) -> Shown:
    """The sample's picture (clips: their frames side by side) with true and predicted boxes as fractions."""
    pictures = [_picture(media, question, encoder) for media in question.media.values()]
    boxes = [
        Box((x1 / 1000, y1 / 1000, x2 / 1000, y2 / 1000), "predicted" if predicted else "true", predicted)
        for text, predicted in ((question.truth, False), (prediction, True))
        for x1, y1, x2, y2 in parse_boxes(text)
    ]
    picture = _shrink(_side_by_side(pictures)) if pictures else np.full((28, 28, 3), 255, np.uint8)
    # with several pictures a box does not say whose it is, nor with a clip's frames, side by side, in which of them
    still = [media.kind for media in question.media.values()] == ["image"]
    drawn = tuple(boxes) if still else ()
    key = question.record.key
    return Shown(task, key, picture, question.prompt_text, question.truth, prediction, hit, drawn)


def _picture(media: Media, question: _Question, encoder: SampleEncoder) -> Picture:
    data, key = question.read(media.name), question.record.key
    if media.kind == "image":
        return decode_image(data, key, encoder.media_config.max_source_pixels)
    plan = next(plan for plan in question.prompt.media if plan.kind == "video")
    frames = read_clip(data, media, plan, key, encoder.media_config.video_backend)
    return _side_by_side([frame.permute(1, 2, 0).numpy() for frame in frames[:: max(1, len(frames) // 4)]])


def _shrink(picture: Picture) -> Picture:
    """At most `MAX_SIDE` pixels long: 1 MB at most, where 12 megapixels are 36."""
    image = Image.fromarray(picture)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return np.array(image)


def _side_by_side(pictures: Sequence[Picture]) -> Picture:
    """Pictures in a row, 4 white pixels between them, padded to the tallest."""
    height = max(picture.shape[0] for picture in pictures)
    columns = []
    for picture in pictures:
        padded = np.full((height, picture.shape[1] + 4, 3), 255, np.uint8)
        padded[: picture.shape[0], : picture.shape[1]] = picture
        columns.append(padded)
    return np.concatenate(columns, axis=1)[:, :-4]
