"""Held-out scoring: which pictures are shown, what is drawn on them, and what a stalled rank's report learns of it."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError
from qwen2vl_train.config import EvaluationConfig
from qwen2vl_train.evaluation import runner
from qwen2vl_train.training.shown import Box
from qwen2vl_train.training.world import World

BOX = "<|box_start|>(100,200),(300,400)<|box_end|>"


def shown(monkeypatch, *kinds):
    monkeypatch.setattr(runner, "_picture", lambda media, question, encoder: np.zeros((28, 56, 3), np.uint8))
    media = {f"{number}.bin": SimpleNamespace(kind=kind) for number, kind in enumerate(kinds)}
    question = runner._Question(0, SimpleNamespace(key="k"), media, lambda name: b"", None, "where?", BOX)
    return runner._show("referring", question, "nowhere", False, None)


def test_boxes_are_drawn_on_the_one_still_they_belong_to(monkeypatch):
    assert shown(monkeypatch, "image").boxes == (Box((0.1, 0.2, 0.3, 0.4), "true", False),)


@pytest.mark.parametrize("kinds", [("video",), ("image", "image"), ("image", "video"), ()])
def test_no_box_is_drawn_where_frames_or_pictures_stand_side_by_side(monkeypatch, kinds):
    assert shown(monkeypatch, *kinds).boxes == ()


def test_the_samples_being_answered_are_known_meanwhile(monkeypatch):
    """Four records on one rank, two a batch."""
    records = [SimpleNamespace(key=f"k{number}", messages=[]) for number in range(4)]
    source = SimpleNamespace(name="caption", records=lambda: [(0, record, [], None) for record in records])
    tokens = SimpleNamespace(special=SimpleNamespace(im_end=1, endoftext=0), decode=lambda ids: "words")
    encoder = SimpleNamespace(tokenizer=tokens)
    at, seen = [], []

    def generate(model, prompts, limit, stop):
        seen.append(list(at))
        return [[5, 1] for _ in prompts]

    def question(encoder, number, record, media, read):
        seen.append(list(at))
        return runner._Question(number, record, media, read, None, "", "words")

    monkeypatch.setattr(runner, "generate", generate)
    monkeypatch.setattr(runner, "_question", question)
    config = EvaluationConfig(batch_size=2, pictures=0)
    answers = runner._score_task(None, encoder, source, config, World(0, 1, 0, torch.device("cpu")), at)
    assert len(answers) == 4
    assert seen == [["k0"], ["k1"], ["k2"], ["k3"], ["k0", "k1"], ["k2", "k3"]]
    assert at == []


class Ranks:
    """Rank `rank` of `size`; `gather` adds what the ranks before have left."""

    device = torch.device("cpu")

    def __init__(self, rank, size, parts):
        self.rank, self.size, self._parts = rank, size, parts

    def gather(self, item):
        self._parts.append(item)
        return list(self._parts)


@pytest.mark.filterwarnings("ignore:held-out sample counts as wrong")
def test_the_first_pictures_are_shown_whatever_the_number_of_ranks_and_travel_small(monkeypatch):
    """Ten records with pictures of 3 megapixels; the fourth cannot be read."""
    records = [SimpleNamespace(key=f"k{number}", messages=[]) for number in range(10)]
    source = SimpleNamespace(
        name="caption", records=lambda: [(0, record, [], None) for record in records], close=lambda: None
    )
    tokens = SimpleNamespace(special=SimpleNamespace(im_end=1, endoftext=0), decode=lambda ids: "words")
    media = {"0.jpg": SimpleNamespace(kind="image")}

    def question(encoder, number, record, no_media, read):
        if record.key == "k3":
            raise DataError(record.key, "cut", "cut short")
        return runner._Question(number, record, media, read, None, "", BOX)

    monkeypatch.setattr(runner, "TextTokenizer", lambda folder: None)
    monkeypatch.setattr(runner, "open_model", lambda folder, device: None)
    monkeypatch.setattr(runner, "SampleEncoder", lambda *settings: SimpleNamespace(tokenizer=tokens))
    monkeypatch.setattr(runner, "_open_source", lambda *settings: source)
    monkeypatch.setattr(runner, "generate", lambda model, prompts, limit, stop: [[5, 1] for _ in prompts])
    monkeypatch.setattr(runner, "_question", question)
    monkeypatch.setattr(runner, "_picture", lambda *question: np.zeros((1500, 2000, 3), np.uint8))
    config = EvaluationConfig(batch_size=2, pictures=6)
    for size in (1, 2, 8):
        parts = []
        for rank in range(size):
            report = runner.evaluate(Path("x"), {"caption": "x"}, DataConfig({}), config, Ranks(rank, size, parts))
        assert [sample.key for sample in report.shown] == ["k0", "k1", "k2", "k4", "k5"]
        assert {sample.picture.shape for sample in report.shown} == {(420, 560, 3)}
        assert report.shown[0].boxes[0].xyxy == (0.1, 0.2, 0.3, 0.4)  # fractions: they shrink with it
        assert len(pickle.dumps(parts)) < 6e6
