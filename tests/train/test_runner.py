"""Held-out scoring: what is drawn on a picture, and what a report about a stalled rank learns of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qwen2vl_train.config import EvaluationConfig
from qwen2vl_train.evaluation import runner
from qwen2vl_train.training.shown import Box
from qwen2vl_train.training.world import World

BOX = "<|box_start|>(100,200),(300,400)<|box_end|>"


def shown(monkeypatch, *kinds):
    monkeypatch.setattr(runner, "_picture", lambda media, question, encoder: np.zeros((28, 56, 3), np.uint8))
    media = {f"{number}.bin": SimpleNamespace(kind=kind) for number, kind in enumerate(kinds)}
    question = runner._Question(SimpleNamespace(key="k"), media, lambda name: b"", None, "where?", BOX)
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

    def question(encoder, record, media, read):
        seen.append(list(at))
        return runner._Question(record, media, read, None, "", "words")

    monkeypatch.setattr(runner, "generate", generate)
    monkeypatch.setattr(runner, "_question", question)
    config = EvaluationConfig(batch_size=2, pictures=0)
    answers = runner._score_task(None, encoder, source, config, World(0, 1, 0, torch.device("cpu")), at)
    assert len(answers) == 4
    assert seen == [["k0"], ["k1"], ["k2"], ["k3"], ["k0", "k1"], ["k2", "k3"]]
    assert at == []
