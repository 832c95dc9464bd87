"""Questions about pictures → one document a picture: VQAv2, OK-VQA, A-OKVQA, GQA, DocVQA, TextVQA.

Read forms, told apart by their fields:

- VQAv2, OK-VQA: {"questions": [{"question_id", "image_id", "question"}]} with --answers {"annotations":
  [{"question_id", "multiple_choice_answer"?, "answers": [{"answer", "answer_confidence"?}]}]}
- TextVQA, DocVQA: {"data": [{"question", "image" | "image_id", "answers": ["..."]}]}
- A-OKVQA: [{"image_id", "question", "choices", "correct_choice_idx", "direct_answers"}]
- GQA: {"questionId": {"imageId", "question", "answer"}}

The answer to learn is the one that the source singles out: the right choice (A-OKVQA), "answer" (GQA), or VQAv2's
"multiple_choice_answer", which is the annotators' most frequent answer whatever their confidence. Where it singles out
none, it is the one of the listed answers with the greatest sum of confidence (Qwen-VL: "the answer with max
confidence"). Questions of one picture share a document, because they share its pass through the ViT.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.decode.fields import fail, mapping, sequence, text
from data_pipelines.errors import DataError, RecordError
from data_pipelines.shards.media_files import resolve_media
from data_pipelines.sources.item import Annotations, Entries, Expected, Item, MediaSource, Question, problem
from data_pipelines.sources.json_files import read_json
from data_pipelines.sources.keys import key_of

HELP = "questions and answers about pictures: VQAv2, OK-VQA, A-OKVQA, GQA, DocVQA, TextVQA"
_CONFIDENCE = {"yes": 1.0, "maybe": 0.5, "no": 0.01}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import vqa`."""
    parser.add_argument(
        "questions", type=Path, metavar="JSON", help="questions (with answers, but for VQAv2 and OK-VQA)"
    )
    parser.add_argument("--answers", type=Path, metavar="JSON", help="the annotations file of VQAv2 and OK-VQA")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the pictures")
    parser.add_argument(
        "--image-name",
        default="{}",
        metavar="FORM",
        help="file name of an image id, such as COCO_val2014_{:012d}.jpg or {}.jpg (default: the id itself)",
    )
    parser.add_argument("--choices", action="store_true", help="ask to choose where the source gives choices")


def read(options: argparse.Namespace) -> Entries:
    """The items that the options name."""
    yield from read_vqa(options.questions, options.answers, options.images, options.image_name, options.choices)


def read_vqa(path: Path, answers: Path | None, images: Path, image_name: str, choices: bool = False) -> Entries:
    """One item a picture with all its questions, in order of first appearance; a broken question is a ledger line."""
    asked: dict[str, list[Question]] = {}
    told = _answers(answers) if answers is not None else {}
    for number, entry in _entries(path):
        key = f"{path.stem}:{number}"
        try:
            fields = mapping(key, "question", entry)
            question = read_question(key, {**fields, **told.get(fields.get("question_id"), {})}, choices)
            asked.setdefault(_image(key, fields, image_name), []).append(question)
        except DataError as error:
            yield problem(key, error.reason, error.message)
    yield Expected(len(asked))
    for number, (name, questions) in enumerate(asked.items()):
        key = f"{number:07d}-{key_of(Path(name).stem)}"
        try:
            image = resolve_media(name, images, None, key)
            media = (MediaSource(image.name, "image", image),)
            yield Item(key, Annotations(questions=tuple(questions)), media, "vqa")
        except DataError as error:
            yield problem(key, error.reason, f"{len(questions)} questions lost: {error.message}")


def read_question(key: str, fields: dict[str, Any], choices: bool = False) -> Question:
    """The question of one entry with the answer to learn.

    Raises:
        RecordError: no question, or no answer (test splits have none).
    """
    question = text(key, "question", fields.get("question")).strip()
    listed = fields.get("choices")
    right = fields.get("correct_choice_idx")
    if listed is not None and isinstance(right, int) and 0 <= right < len(sequence(key, "choices", listed)):
        named = tuple(text(key, f"choices[{i}]", choice) for i, choice in enumerate(listed))
        return Question(question, named[right], named if choices else ())
    for field in ("multiple_choice_answer", "answer"):
        if fields.get(field) is not None:
            return Question(question, text(key, field, fields[field]).strip())
    votes = fields.get("answers", fields.get("direct_answers"))
    return Question(question, best_answer(key, votes))


def best_answer(key: str, votes: object) -> str:
    """The answer with the greatest sum of confidence (yes 1, maybe 0.5, no 0.01); of equals the first given."""
    sums: Counter[str] = Counter()
    for i, vote in enumerate(sequence(key, "answers", votes)):
        if isinstance(vote, dict):
            confidence = _CONFIDENCE.get(str(vote.get("answer_confidence", "yes")), 1.0)
            vote = vote.get("answer")
        else:
            confidence = 1.0
        sums[text(key, f"answers[{i}]", vote).strip()] += confidence  # type: ignore[assignment]  # Counter of floats
    if not sums:
        fail(key, "answers", votes, "needs at least one answer", "no_annotation")
    return max(sums, key=lambda answer: sums[answer])


def _entries(path: Path) -> Iterator[tuple[object, Any]]:
    """The question entries of any of the forms, with their ids."""
    content = read_json(path)
    if isinstance(content, dict):
        for field in ("questions", "data", "annotations"):
            if field in content:
                content = content[field]
                break
        else:
            yield from ((name, entry) for name, entry in content.items())
            return
    for number, entry in enumerate(sequence(path.name, "questions", content)):
        yield (entry.get("question_id", number) if isinstance(entry, dict) else number), entry


def _answers(path: Path) -> dict[object, dict[str, Any]]:
    content = mapping(path.name, "file", read_json(path))
    told: dict[object, dict[str, Any]] = {}
    for i, entry in enumerate(sequence(path.name, "annotations", content.get("annotations"))):
        fields = mapping(path.name, f"annotations[{i}]", entry)
        told[fields.get("question_id")] = {
            field: fields[field] for field in ("multiple_choice_answer", "answers") if field in fields
        }
    return told


def _image(key: str, fields: dict[str, Any], form: str) -> str:
    named = next((fields[field] for field in ("image", "image_id", "imageId") if field in fields), None)
    if isinstance(named, bool) or not isinstance(named, str | int):
        fail(key, "image_id", named, "needs a number or a name", "no_media")
    try:
        return form.format(int(named) if isinstance(named, str) and named.isdecimal() and ":0" in form else named)
    except (ValueError, IndexError, KeyError) as error:
        raise RecordError(key, "bad_field", f"--image-name {form!r} does not fit image {named!r}: {error}") from error
