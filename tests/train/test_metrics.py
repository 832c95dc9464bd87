"""Held-out scores, by hand."""

import pytest

from qwen2vl_train.evaluation.metrics import constant_baseline, iou, metric_of, same_boxes, same_text


def box(x1, y1, x2, y2):
    return f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


def test_iou_of_half_overlapping_boxes():
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert iou((0, 0, 10, 10), (20, 20, 30, 30)) == 0
    assert iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0


def test_a_box_counts_from_half_overlap():
    assert same_boxes(box(0, 0, 100, 100), box(0, 0, 100, 50))
    assert not same_boxes(box(0, 0, 100, 100), box(0, 0, 100, 49))
    assert not same_boxes(box(0, 0, 100, 100), "no box here")
    assert not same_boxes(box(0, 0, 100, 100), box(0, 0, 100, 100) + box(0, 0, 1, 1))


def test_text_ignores_case_and_outer_spaces():
    assert same_text("A red circle", " a red circle ")
    assert not same_text("a red circle", "a red circle.")


def test_the_baseline_is_the_best_constant_answer_to_each_kind_of_question():
    asked = ["How many dots?", "How many rings?", "How many?", "What color is it?"]
    assert constant_baseline("vqa", asked, ["two", "one", "two", "red"]) == 0.75
    truths = [box(0, 0, 100, 100), box(0, 0, 100, 80), box(500, 500, 600, 600)]
    assert constant_baseline("referring", ["Where is"] * 3, truths) == pytest.approx(2 / 3)
    assert constant_baseline("vqa", [], []) == 0.0


def test_unlisted_tasks_are_scored_by_exact_text():
    assert metric_of("video_order").name == "video_order_exact"
