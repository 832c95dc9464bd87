"""The report of runs in every state, from a folder made by hand."""

import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from qwen2vl_train.config import MonitorConfig
from qwen2vl_train.report import print_summary, write_report
from qwen2vl_train.report.axis import linear_scale, log_scale, loss_scale
from qwen2vl_train.report.chart import WIDTH
from qwen2vl_train.report.curve import MAX_POINTS, Point, make_curve, thin
from qwen2vl_train.report.curves import rates_by_part
from qwen2vl_train.report.figures import amount, count, duration, loss, percent
from qwen2vl_train.report.folder import read_run
from qwen2vl_train.report.markup import Html, element
from qwen2vl_train.training.monitor import Monitor

STAGES = {
    "language": (150, ["llm"], ["text"]),
    "vision": (250, ["vit", "merger"], ["captions"]),
    "multitask": (700, ["vit", "merger", "llm"], ["scenes", "clips", "text"]),
    "instruct": (250, ["llm"], ["scenes", "clips", "text"]),
}
TASKS = {"caption": "caption_exact", "referring": "referring_acc50", "ocr": "ocr_exact", "vqa": "vqa_accuracy"}
TASKS["video_direction"] = "clip_direction"
MAJORITY = {"caption_exact": 0.02, "referring_acc50": 0.03, "ocr_exact": 0.025, "vqa_accuracy": 0.31}
MAJORITY["clip_direction"] = 0.26


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_run(folder: Path, *, done: int = 4, every: int = 10, pictures: int = 2, layers: int = 0) -> Path:
    """A run whose first `done` stages are finished; the next one, if any, stopped half-way."""
    rng = random.Random(0)
    names = list(STAGES)
    settings = {
        name: {"steps": steps, "trainable": parts, "optim": {"lr": dict.fromkeys(parts, 1e-3)}}
        for name, (steps, parts, _) in STAGES.items()
    }
    write_json(folder / "config.json", {"run_dir": str(folder), "seed": 0, "chain": names, "stages": settings})
    write_json(
        folder / "environment.json",
        {"python": "3.11.2", "world_size": 2, "device": "cpu", "revision": "2e906cc", "packages": {"torch": "2.13.0"}},
    )
    lines, results, start = [], {}, 6.5
    for number, (name, (steps, parts, datasets)) in enumerate(STAGES.items()):
        if number > done:
            break
        last = steps if number < done else steps // 2
        floor = start * (0.25 if number < 3 else 0.6)
        mine = [
            training_line(
                rng, name, step, steps, floor + (start - floor) * math.exp(-4 * step / steps), parts, datasets
            )
            for step in sorted({1, *range(every, last + 1, every), last})
        ]
        for line in mine:
            for layer in range(layers):
                line[f"lr/vit.{layer}"] = line[f"lr/vit.{layer}.no_decay"] = 1e-4 * 0.95 ** (layers - layer)
        lines += mine
        start = floor * (1.15 if number < 3 else 1)
        if number < done:
            results[name] = finish_stage(rng, folder, name, number, mine, lines, pictures)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done == len(STAGES):
        write_json(
            folder / "summary.json",
            {
                "minutes": 11.7,
                "export": str(folder / "instruct" / "export"),
                "report": str(folder / "report.html"),
                "stages": results,
            },
        )
    return folder


def rewrite_lines(folder: Path, keep) -> None:
    """Keep the lines of metrics.jsonl for which `keep`, which may change them, is true."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if keep(line)))


def training_line(rng, name, step, steps, loss, parts, datasets) -> dict:
    rate = min(step / 20, 1) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
    line = {
        "stage": name,
        "step": step,
        "loss": loss * rng.uniform(0.96, 1.04),
        "gradient_norm": rng.lognormvariate(0, 0.3) * (0.4 + 3 * math.exp(-step / 40)),
        "tokens": 4080 * step,
        "supervised_tokens": 900 * step,
        "tokens_per_s": rng.gauss(8400, 250),
        "step_s": 0.48,
        "data_wait_share": abs(rng.gauss(0.01, 0.01)),
        "fill": rng.uniform(0.988, 0.9995),
        "vision_share": 0 if name == "language" else rng.uniform(0.35, 0.4),
        "skipped": 0 if step < steps / 2 or name == "language" else 2,
    }
    for part in parts:
        line[f"lr/{part}"] = line[f"lr/{part}.no_decay"] = 1e-3 * rate
    for number, dataset in enumerate(datasets):
        line[f"loss/{dataset}"] = loss * (0.7 + 0.3 * number) * rng.uniform(0.94, 1.06)
    return line


def finish_stage(rng, folder, name, number, mine, lines, pictures) -> dict:
    held_out = {}
    if name != "language":
        skill = {1: 0.3, 2: 0.85, 3: 0.95}[number]
        held_out = {metric: min(0.995, max(0.0, rng.gauss(skill, 0.06))) for metric in TASKS.values()}
        lines.append({"stage": name, "step": mine[-1]["step"]} | {f"held_out/{key}": v for key, v in held_out.items()})
        draw_pictures(folder / name / "pictures", skill, pictures)
    result = {
        "trained": STAGES[name][1],
        "steps": mine[-1]["step"],
        "tokens": mine[-1]["tokens"],
        "supervised_tokens": mine[-1]["supervised_tokens"],
        "loss_first": mine[0]["loss"],
        "loss_last": mine[-1]["loss"],
        "tokens_per_s": 8400.0,
        "fill": 0.994,
        "seconds": mine[-1]["tokens"] / 8400,
        "data_wait_share": 0.012,
        "skipped": {"image_undecodable": 2} if name != "language" else {},
        "held_out": held_out,
        "majority": MAJORITY if held_out else {},
        "export": str(folder / name / "export"),
    }
    write_json(folder / name / "result.json", result)
    return result


def draw_pictures(folder: Path, skill: float, per_task: int) -> None:
    """The same scenes for every stage; the better the stage, the more answers are right."""
    folder.mkdir(parents=True, exist_ok=True)
    luck, rows = random.Random(skill), []
    for task in TASKS:
        scenes = random.Random(task)
        for number in range(per_task):
            width, height = scenes.choice([(112, 112), (168, 96), (90, 150)])
            left, top, side = scenes.randrange(5, width - 50), scenes.randrange(5, height - 50), 40
            picture = Image.new("RGB", (width, height), (210, 212, 205))
            ImageDraw.Draw(picture).ellipse((left, top, left + side, top + side), fill=(40, 70, 230))
            name = f"{len(rows):03d}.png"
            picture.save(folder / name)
            correct = luck.random() < skill
            box = [left / width, top / height, (left + side) / width, (top + side) / height]
            moved = [value + (0.01 if correct else 0.12) for value in box]
            boxes = [{"xyxy": box, "caption": "truth", "predicted": False}]
            boxes.append({"xyxy": moved, "caption": "predicted", "predicted": True})
            truth = "a blue circle" if task != "referring" else box_text(box)
            answer = truth if correct else "a red square"
            rows.append(
                {
                    "file": name,
                    "boxes": boxes if task == "referring" else [],
                    "task": task,
                    "key": f"{task}/{number:06d}",
                    "prompt": "<|vision_start|>" + "<|image_pad|>" * 12 + "<|vision_end|>What is in the image?",
                    "truth": truth,
                    "prediction": answer if task != "referring" else box_text(moved),
                    "correct": correct,
                }
            )
    write_json(folder / "samples.json", rows)


def box_text(box) -> str:
    x1, y1, x2, y2 = (round(1000 * value) for value in box)
    return f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


# ---------------------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects tags with their attributes and fails where they do not close in order."""

    VOID = frozenset({"meta", "br", "hr", "input", "img"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag, **wanted):
        found = [attributes for name, attributes in self.tags if name == tag]
        return [a for a in found if all(a.get(key.rstrip("_")) == value for key, value in wanted.items())]


def read_page(folder: Path) -> Reader:
    return Reader(write_report(folder).read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "demo")
    return folder, read_page(folder)


def test_page_of_a_finished_run_shows_every_section(finished):
    folder, page = finished
    text = "\n".join(page.texts)
    assert [a["id"] for a in page.all("section")] == [
        *("figures", "stages", "held-out", "curves", "pictures", "configuration"),
    ]
    result = json.loads((folder / "instruct" / "result.json").read_text())
    assert percent(result["held_out"]["caption_exact"]) in text
    assert loss(result["loss_last"]) in text
    assert "majority 2.0%" in text
    assert "stages.vision.optim.lr.merger" in text


def test_page_needs_nothing_from_elsewhere(finished):
    _, page = finished
    addresses = [a[key] for _, a in page.tags for key in ("href", "src", "xlink:href") if key in a]
    assert addresses
    assert all(address.startswith(("#", "data:image/webp;base64,")) for address in addresses)
    assert page.all("meta", content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
                    "script-src 'unsafe-inline'")  # fmt: skip
    assert not page.all("link")


def test_every_reference_inside_the_page_leads_somewhere(finished):
    _, page = finished
    identities = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identities) == len(set(identities))
    assert {a["href"][1:] for _, a in page.tags if a.get("href", "").startswith("#")} <= set(identities)


def test_a_picture_that_three_stages_show_is_embedded_once(finished):
    _, page = finished
    assert len(page.all("article")) == 3 * 5 * 2  # stages x tasks x pictures
    assert len(page.all("image")) == 5 * 2
    assert len(page.all("use")) == 30


def test_page_of_a_stopped_run_says_how_far_it_came(tmp_path):
    page = read_page(make_run(tmp_path / "run", done=2))
    text = "\n".join(page.texts)
    assert "unfinished, last figures" in text
    assert "350 of 700" in text
    assert "0 of 250" in text
    states = [a["class"] for a in page.all("span") if a.get("class", "").startswith("state ")]
    assert states[1:] == ["state finished", "state finished", "state unfinished", "state waiting"]


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    write_json(tmp_path / "config.json", {"chain": ["vision"], "stages": {"vision": {"steps": 10}}})
    page = read_page(tmp_path)
    assert "0 of 10" in page.texts
    assert [a["id"] for a in page.all("section")] == ["figures", "stages", "configuration"]


@pytest.mark.parametrize("missing", ["config.json", "environment.json", "summary.json", "metrics.jsonl"])
def test_a_missing_file_costs_only_its_own_figures(tmp_path, missing):
    folder = make_run(tmp_path / "run", pictures=1)
    (folder / missing).unlink()
    page = read_page(folder)
    assert len(page.all("article")) == 15
    assert not page.all("aside")


@pytest.mark.parametrize(
    "broken", ["config.json", "summary.json", "vision/result.json", "vision/pictures/samples.json"]
)
def test_an_unreadable_file_is_named_on_the_page(tmp_path, broken):
    folder = make_run(tmp_path / "run", pictures=1)
    (folder / broken).write_text('{"steps": 1')
    page = read_page(folder)
    assert page.all("aside")
    assert any(str(folder / broken) in text for text in page.texts)


DAMAGED = {
    "a chain that is a number": ("config.json", {"chain": 5, "stages": {}}, "chain is 5, no list of texts"),
    "stages in a list": ("config.json", {"stages": ["vision"]}, "stages is ['vision'], no object"),
    "a length in words": ("config.json", {"stages": {"vision": {"steps": "ten"}}}, "vision: steps is 'ten', no number"),
    "a length beyond the floats": ("config.json", {"stages": {"vision": {"steps": 10**400}}}, "steps is 1000"),
    "a list for an object": ("config.json", [1], "it holds no JSON object"),
    "minutes in words": ("summary.json", {"minutes": "two"}, "minutes is 'two', no number"),
    "a reason without a count": ("vision/result.json", {"skipped": {"a": "x"}}, "skipped: a is 'x', no number"),
    "parts that are a number": ("vision/result.json", {"steps": 1, "trained": 3}, "trained is 3, no list of texts"),
    "scores in a list": ("vision/result.json", {"held_out": [1]}, "held_out is [1], no object"),
    "boxes that are a number": ("vision/pictures/samples.json", [{"boxes": 5}], "samples, 0: boxes is 5, no list"),
    "no list of samples": ("vision/pictures/samples.json", {"a": 1}, "samples is {'a': 1}, no list"),
    "nesting without end": ("vision/pictures/samples.json", "[" * 100_000, "recursion"),
}


@pytest.mark.parametrize(("file", "value", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_value_of_another_type_is_named_on_the_page_and_costs_only_itself(tmp_path, file, value, said):
    folder = make_run(tmp_path / "run", done=2, pictures=1)
    (folder / file).write_text(value if isinstance(value, str) else json.dumps(value))
    page = read_page(folder)
    (fault,) = [text for text in page.texts if said in text]
    assert fault.startswith(str(folder / file))
    assert "150" in page.texts  # the other stage's steps


def test_a_number_beyond_the_floats_in_a_line_costs_the_page_nothing(tmp_path):
    folder = make_run(tmp_path / "run", done=1)
    huge = {"stage": "vision", "step": 130, "loss": 1.0, "tokens": 10**400, "gradient_norm": 10**400}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(huge) + "\n" + json.dumps(huge | {"step": 10**400}) + "\n")
    text = "\n".join(read_page(folder).texts)
    assert "▼ 1 value(s) not finite" in text
    assert "1 unreadable line(s) left out" in text


def test_a_line_being_written_is_left_out_without_a_word_and_a_broken_one_is_counted(tmp_path):
    folder = make_run(tmp_path / "run", done=1)
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_text()
    num_lines = len(whole.splitlines())
    metrics.write_text(whole + '{"stage": "vision", "st')
    assert read_run(folder).faults == []
    metrics.write_text('{"stage": "vis\n[1]\n' + whole)
    run = read_run(folder)
    assert sum(len(stage.lines) for stage in run.stages) == num_lines
    assert run.faults == [f"{metrics}: 2 unreadable line(s) left out"]


def test_a_picture_that_does_not_decode_leaves_its_text(tmp_path):
    folder = make_run(tmp_path / "run", done=2, pictures=1)
    (folder / "vision" / "pictures" / "000.png").write_bytes(b"\x89PNG cut")
    (folder / "vision" / "pictures" / "001.png").unlink()
    page = read_page(folder)
    assert len(page.all("article")) == 5
    assert len(page.all("div", class_="blank")) == 2


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run's folder"):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_report(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_text_of_a_run_never_becomes_markup(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp;"
    folder = make_run(tmp_path / "run", done=1)
    config = json.loads((folder / "config.json").read_text())
    config["run_dir"], config[evil] = evil, {evil: evil}
    write_json(folder / "config.json", config)
    line = {"stage": evil, "step": 1, "loss": 1.0, f"loss/{evil}": 1.0, evil: 2.0, f"lr/{evil}": 1.0, "tokens": 5}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    stage = {"steps": 1, "trained": [evil], "skipped": {evil: 1}, "held_out": {evil: 1.0}, "majority": {evil: 0.5}}
    write_json(folder / "language" / "result.json", stage | {"steps": 150})
    row = dict.fromkeys(["file", "task", "key", "prompt", "truth", "prediction"], evil)
    write_json(folder / "language" / "pictures" / "samples.json", [row | {"correct": True, "boxes": []}])
    page = read_page(folder)
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert any(evil in text for text in page.texts)


def test_a_lone_surrogate_does_not_cost_the_page(tmp_path):
    folder = make_run(tmp_path / "run", done=2, pictures=1)
    path = folder / "vision" / "pictures" / "samples.json"
    rows = json.loads(path.read_text())
    rows[0]["prediction"] = "a \ud83d red"
    write_json(path, rows)
    assert "a ? red" in read_page(folder).texts


def test_a_samples_file_cannot_lead_out_of_its_folder(tmp_path):
    folder = make_run(tmp_path / "run", done=2, pictures=1)
    Image.new("RGB", (64, 64)).save(folder / "secret.png")
    path = folder / "vision" / "pictures" / "samples.json"
    rows = json.loads(path.read_text())
    rows[0]["file"] = "../../secret.png"
    write_json(path, rows)
    assert len(read_page(folder).all("image")) == 4


def test_boxes_lie_on_the_picture_where_they_should(tmp_path):
    folder = make_run(tmp_path / "run", done=2, pictures=0)
    pictures = folder / "vision" / "pictures"
    Image.new("RGB", (100, 50), (9, 9, 9)).save(pictures / "000.png")
    boxes = [{"xyxy": [0.1, 0.2, 0.5, 0.6], "predicted": False}, {"xyxy": [0.9, 0.8, 0.4, 0.2], "predicted": True}]
    boxes += [{"xyxy": [0.1, None, 0.5, 0.6], "predicted": True}, {"xyxy": [0.1]}, None]
    row = {"file": "000.png", "task": "referring", "key": "a", "correct": False, "boxes": boxes}
    write_json(pictures / "samples.json", [row])
    page = read_page(folder)
    place = ("x", "y", "width", "height")
    (truth,) = page.all("rect", class_="box truth")
    (predicted,) = page.all("rect", class_="box predicted")
    assert [truth[key] for key in place] == ["10", "10", "40", "20"]
    assert [predicted[key] for key in place] == ["40", "10", "50", "30"]  # swapped corners put in order


def test_large_pictures_are_shrunk_and_the_blank_one_is_left_out(tmp_path):
    folder = make_run(tmp_path / "run", done=2, pictures=0)
    pictures = folder / "vision" / "pictures"
    Image.new("RGB", (1120, 560)).save(pictures / "000.png")
    Image.new("RGB", (28, 28), (255, 255, 255)).save(pictures / "001.png")
    rows = [{"file": f"00{number}.png", "task": "caption", "key": str(number), "boxes": []} for number in range(2)]
    write_json(pictures / "samples.json", rows)
    (image,) = read_page(folder).all("image")
    assert (image["width"], image["height"]) == ("560", "280")


def test_a_failed_write_leaves_the_page_before_it(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", done=1)
    before = write_report(folder).read_bytes()
    names = {path.name for path in folder.iterdir()}

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == names


def test_figures_of_an_unfinished_stage_are_weighed_by_tokens(tmp_path):
    stages = {"vision": {"steps": 9, "trainable": ["vit"]}}
    write_json(tmp_path / "config.json", {"chain": ["vision"], "stages": stages})
    lines = [
        {"stage": "vision", "step": 1, "loss": 4.0, "tokens": 100, "tokens_per_s": 50, "fill": 1.0, "skipped": 0},
        {"stage": "vision", "step": 2, "loss": 2.0, "tokens": 200, "tokens_per_s": 100, "fill": 0.5, "skipped": 3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (stage,) = read_run(tmp_path).stages
    assert stage.state == "unfinished"
    assert stage.trained == ("vit",)
    assert stage.figures.tokens == 200
    assert stage.figures.seconds == 3.0  # 100 tokens at 50/s and 100 at 100/s
    assert stage.figures.tokens_per_s == pytest.approx(200 / 3)
    assert stage.figures.fill == pytest.approx(200 / 300)  # capacities 100 and 200
    assert (stage.figures.loss_first, stage.figures.loss_last) == (4.0, 2.0)
    assert sum(stage.figures.skipped.values()) == 3


def test_a_stage_of_so_many_tokens_has_trained_once_it_has_seen_them(tmp_path):
    for tokens, state in ((200, "evaluating"), (201, "unfinished")):
        write_json(tmp_path / "config.json", {"chain": ["a"], "stages": {"a": {"steps": 0, "tokens": tokens}}})
        (tmp_path / "metrics.jsonl").write_text('{"stage": "a", "step": 2, "loss": 2.0, "tokens": 200}\n')
        (stage,) = read_run(tmp_path).stages
        assert (stage.state, stage.planned_steps) == (state, None)


def test_a_stage_started_anew_does_not_show_what_its_first_course_left(tmp_path):
    folder = make_run(tmp_path / "run")
    rewrite_lines(folder, lambda line: line["stage"] != "instruct" or line["step"] <= 50)
    (folder / "instruct" / "result.json").unlink()  # as the chain does
    write_json(folder / "instruct" / "held_out.json", {"metrics": {"ocr_exact": 0.9}, "baseline": MAJORITY})
    run = read_run(folder)
    assert [stage.state for stage in run.stages] == ["finished", "finished", "finished", "unfinished"]
    assert run.stages[3].held_out == {}
    assert not run.finished


@pytest.mark.parametrize("lost", ["no room for its last lines", "no labels in its last window"])
def test_a_result_counts_whatever_became_of_the_stages_last_figures(tmp_path, lost):
    folder = make_run(tmp_path / "run")
    late = ("instruct", 200)
    if lost == "no room for its last lines":
        rewrite_lines(folder, lambda line: (line["stage"], line["step"]) <= late or line["stage"] != late[0])
    else:
        rewrite_lines(folder, lambda line: (line["stage"], line["step"]) < late or not line.pop("loss", None) or line)
    run = read_run(folder)
    assert run.faults == []
    assert [stage.state for stage in run.stages] == ["finished"] * 4
    assert run.stages[3].figures.steps == 250
    assert set(run.stages[3].held_out) == set(TASKS.values())


def test_a_window_without_labels_counts_with_all_but_a_loss(tmp_path):
    write_json(tmp_path / "config.json", {"chain": ["vision"], "stages": {"vision": {"steps": 3}}})
    lines = [
        {"stage": "vision", "step": 1, "loss": 4.0, "tokens": 100, "tokens_per_s": 50, "fill": 1.0},
        {"stage": "vision", "step": 2, "tokens": 200, "tokens_per_s": 100, "fill": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (stage,) = read_run(tmp_path).stages
    assert (stage.figures.steps, stage.figures.tokens, stage.figures.seconds) == (2, 200, 3.0)
    assert stage.figures.loss_last == 4.0
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "vision", "step": 3, "tokens": 300}\n')
        file.write('{"stage": "vision", "step": 3}\n')  # an evaluation that had nothing to score
    (stage,) = read_run(tmp_path).stages
    assert (stage.state, stage.figures.tokens) == ("evaluating", 300)


def test_a_stage_that_has_trained_but_not_been_scored_says_so(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "instruct" / "result.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # without the scores
    assert read_run(folder).stages[3].state == "evaluating"


# ---------------------------------------------------------------------------------------------------------------------


def test_thinning_keeps_ends_means_and_every_spike():
    values = [(1, 9.0), (2, 3.0), (3, 5.0), (4, 70.0), (5, 10.0), (6, 1.0)]
    assert thin(values, 4) == (
        Point(1, 9.0, 9.0, 9.0),
        Point(2.5, 4.0, 3.0, 5.0),
        Point(4.5, 40.0, 10.0, 70.0),
        Point(6, 1.0, 1.0, 1.0),
    )
    assert thin(values, 6) == tuple(Point(x, y, y, y) for x, y in values)


def test_values_that_are_not_finite_are_set_apart():
    curve = make_curve("loss", 0, [(1, 2.0), (2, float("nan")), (3, float("inf")), (4, 1.0)])
    assert [point.x for point in curve.points] == [1, 4]
    assert curve.non_finite == (2, 3)
    assert not curve.thinned


def test_what_the_monitor_logs_of_values_that_are_not_finite_is_marked_on_the_page(tmp_path):
    monitor = Monitor(tmp_path, MonitorConfig("disabled"), {}, active=True)
    for step in range(1, 11):
        norm = float("inf") if step == 4 else 1.0
        loss = float("nan") if step == 4 else 2.0 - step / 10
        monitor.log("vision", step, {"loss": loss, "gradient_norm": norm, "tokens": 100 * step})
    page = read_page(tmp_path)
    assert len(page.all("path", class_="lost")) == 2
    assert page.texts.count("▼ 1 value(s) not finite") == 2
    assert "vision, step 4\nvision not finite" in page.texts
    assert "vision, step 5\nvision 1.500" in page.texts


def test_marks_that_would_cover_each_other_are_drawn_once_and_all_counted(tmp_path):
    lines = [{"stage": "vision", "step": step, "loss": 1.0, "gradient_norm": None} for step in range(1, 5001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = read_page(tmp_path)
    assert "▼ 5,000 value(s) not finite" in page.texts
    assert len(page.all("path", class_="lost")) <= WIDTH


def test_a_long_run_stays_a_light_page_that_says_it_was_thinned(tmp_path):
    folder = make_run(tmp_path / "run", done=1)
    rng = random.Random(0)
    lines = [training_line(rng, "vision", step, 8000, 2.0, ["vit"], ["a", "b", "c"]) for step in range(1, 5001)]
    lines[2500]["loss"] = 400.0
    lines[2600]["loss"] = float("nan")
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    page = read_page(folder)
    text = "\n".join(page.texts)
    assert "A chart has about 600 points across" in text
    assert "to 400.0)" in text  # the spike stands in its column's title
    assert "▼ 1 value(s) not finite" in text
    lengths = [len(a["points"].split()) for a in page.all("polyline")]
    assert max(lengths) == MAX_POINTS
    assert sum(lengths) < len(lengths) * MAX_POINTS  # stages share a chart's width
    coordinates = " ".join(a["points"] for a in page.all("polyline") + page.all("polygon"))
    assert re.fullmatch(r"[-0-9., ]+", coordinates)  # no nan, no inf
    assert (folder / "report.html").stat().st_size < 2_000_000


def test_a_new_metric_gets_a_chart_of_its_own(tmp_path):
    folder = make_run(tmp_path / "run", done=1)
    line = {"stage": "vision", "step": 140, "loss": 1.0, "new_figure": 0.41, "memory/peak": 3e9, "memory/held": 2e9}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    labels = {a["aria-label"] for a in read_page(folder).all("svg") if "aria-label" in a}
    assert {"New figure, as logged", "Memory, as logged"} <= labels


def test_the_wanted_share_of_a_dataset_has_its_colour_dashed(tmp_path):
    shares = {"text": 0.2, "ocr": 0.8}
    line = {f"mixture/{name}": share for name, share in shares.items()}
    line |= {f"mixture/{name}.wanted": 0.5 for name in shares}
    texts = [json.dumps({"stage": "vision", "step": step, "loss": 1.0} | line) for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(texts) + "\n")
    classes = {a["data-series"]: a["class"] for a in read_page(tmp_path).all("polyline")}
    assert (classes["text"], classes["text.wanted"]) == ("line c0", "line c0 dashed")
    assert (classes["ocr"], classes["ocr.wanted"]) == ("line c1", "line c1 dashed")


def test_scores_over_steps_are_drawn_where_a_stage_was_scored_more_than_once(tmp_path):
    folder = make_run(tmp_path / "run", done=2)
    assert "Held-out figures, share right" not in {a.get("aria-label") for a in read_page(folder).all("svg")}
    with (folder / "metrics.jsonl").open("a") as file:
        for step in (50, 100):
            file.write(json.dumps({"stage": "multitask", "step": step, "held_out/ocr_exact": step / 200}) + "\n")
    assert "Held-out figures, share right" in {a.get("aria-label") for a in read_page(folder).all("svg")}


def test_rates_are_drawn_once_per_part_and_for_the_outer_layers_of_the_vit():
    slow, fast = [(1, 1e-5)], [(1, 2e-4)]
    series = {f"vit.{layer}{end}": slow if layer < 32 else fast for layer in range(33) for end in ("", ".no_decay")}
    assert rates_by_part(series) == {"vit layer 0": slow, "vit layer 32": fast}
    assert rates_by_part({"merger": fast, "merger.no_decay": fast, "vit": fast, "llm": slow}) == {
        "merger, vit": fast,
        "llm": slow,
    }


def test_scales_start_and_end_at_round_values():
    assert linear_scale([3.2, 9.1]).ticks == (2, 4, 6, 8, 10)
    assert linear_scale([8000, 8500], zero=True).low == 0
    assert linear_scale([0.97, 1.0], top=1.0).high == 1.0
    assert linear_scale([5, 5])(5) == pytest.approx(0.5, abs=0.5)  # a constant has an axis, too
    assert linear_scale([]).ticks[0] == 0
    assert log_scale([0.06, 6.5]).ticks == (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
    assert log_scale([0.1, 10])(1) == pytest.approx(0.5)
    assert log_scale([1e-5, 2e4]).ticks[0] == pytest.approx(1e-5)
    assert loss_scale([0.2, 7.6]).logarithmic
    assert not loss_scale([1.0, 7.6]).logarithmic
    assert not loss_scale([0.0, 7.6]).logarithmic  # zero has no logarithm


def test_figures_read_well():
    assert [amount(value) for value in (1_234_567, 999_900, 950, 0.00042, 1e-3, 0, None)] == [
        "1.23M", "1M", "950", "4.2e-4", "1e-3", "0", "–",
    ]  # fmt: skip
    assert [duration(value) for value in (0.4, 95, 702, 3580, 7320, 200_000, float("nan"))] == [
        "0 s", "1 min 35 s", "12 min", "1 h", "2 h 2 min", "2 d 7 h", "–",
    ]  # fmt: skip
    assert (count(12345.4), percent(0.4567), percent(True)) == ("12,345", "45.7%", "–")


def test_elements_escape_text_and_keep_markup():
    inner = element("b", "<&>")
    assert inner == "<b>&lt;&amp;&gt;</b>"
    assert element("p", 'say "hi" ', [inner, None], class_='a"b', hidden=True, title=None) == (
        '<p class="a&quot;b" hidden>say "hi" <b>&lt;&amp;&gt;</b></p>'
    )
    assert isinstance(inner, Html)


# ---------------------------------------------------------------------------------------------------------------------


def test_summary_ends_with_its_own_path_alone(tmp_path, capsys):
    folder = make_run(tmp_path / ("long-" * 30) / "run", pictures=0)
    print_summary(folder / "summary.json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(folder / "summary.json")
    assert lines[-2] == f"export   {folder / 'instruct' / 'export'}"
    assert lines[-3] == f"report   {folder / 'report.html'}"
    rows = [line.split() for line in lines if line.strip()]
    assert [row[0] for row in rows[3:8]] == ["language", "vision", "multitask", "instruct", "majority"]
    assert rows[7][1:] == ["2.0%", "3.0%", "2.5%", "31.0%", "26.0%"]
    assert rows[5][1:5] == ["vit", "merger", "llm", "2.86M"]
    assert "→" in rows[3]


def test_summary_on_a_narrow_terminal_is_two_tables_without_folded_words(tmp_path, capsys, monkeypatch):
    folder = make_run(tmp_path / "run", pictures=0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the captured output for a terminal
    monkeypatch.setenv("COLUMNS", "80")
    print_summary(folder / "summary.json")
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()]
    assert next(line[:3] for line in lines if line[:1] == ["multitask"]) == ["multitask", "vit", "merger"]
    assert len([line for line in lines if line[:1] == ["multitask"]]) == 2
    assert [line for line in lines if line[:1] == ["majority"]] == [
        ["majority", "2.0%", "3.0%", "2.5%", "31.0%", "26.0%"]
    ]
    assert lines[-1] == [str(folder / "summary.json")]


def test_summary_of_a_run_without_scores_still_prints_and_names_what_is_stale(tmp_path, capsys):
    stage = {"trained": ["vit"], "tokens": 10, "loss_first": 2.0, "loss_last": float("nan"), "held_out": {}}
    write_json(tmp_path / "summary.json", {"stages": {"[red]odd[/red]": stage}, "stale": ["instruct"]})
    print_summary(tmp_path / "summary.json")
    out = capsys.readouterr().out
    assert "[red]odd[/red]" in out
    assert "2.000 → –" in out
    assert "stale    instruct: begun with weights that were trained anew since" in out
    assert out.splitlines()[-1] == str(tmp_path / "summary.json")


def test_summary_leaves_out_and_names_what_a_damaged_result_has_brought_into_it(tmp_path, capsys):
    damaged = {"trained": 3, "tokens": "many", "held_out": 1, "loss_last": 0.5}
    sound = {"trained": ["llm"], "tokens": 10, "held_out": {"ocr_exact": 0.5}}
    write_json(tmp_path / "summary.json", {"stages": {"vision": damaged, "instruct": sound}, "minutes": "two"})
    print_summary(tmp_path / "summary.json")
    lines = capsys.readouterr().out.splitlines()
    place = f"left out {tmp_path / 'summary.json'}"
    assert f"{place}, stages, vision: trained is 3, no list of texts" in lines
    assert f"{place}: minutes is 'two', no number" in lines
    assert next(line.split() for line in lines if "instruct" in line)[-1] == "50.0%"
    assert lines[-1] == str(tmp_path / "summary.json")


def test_summary_prints_in_an_ascii_log_and_torch_is_not_loaded(tmp_path):
    folder = make_run(tmp_path / "run", pictures=0)
    code = (
        "import sys; from pathlib import Path; from qwen2vl_train.report import print_summary, write_report; "
        "write_report(Path(sys.argv[1])); print_summary(Path(sys.argv[1]) / 'summary.json'); "
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "COLUMNS": "60"}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / "summary.json")
    assert any("|instruct" in line and "->" in line for line in done.stdout.splitlines())
