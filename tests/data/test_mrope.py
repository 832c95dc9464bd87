"""M-RoPE positions against hand-computed sequences."""

import pytest
import torch

from data_pipelines.pack.mrope import position_ids

X, START, END, IMAGE, VIDEO = 1, 2, 3, 8, 9
IMAGE_DOC = [X, START, *[IMAGE] * 6, END, X]  # grid (1, 4, 6): 2 x 3 tokens
BOTH_DOC = [*IMAGE_DOC, START, *[VIDEO] * 8, END, X]  # and a clip of grid (2, 4, 4): 2 x 2 x 2 tokens


def rows(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def positions(ids, grids, **kwargs):
    return position_ids(torch.tensor(ids), grids, IMAGE, VIDEO, **kwargs).tolist()


def test_image_then_clip_follow_the_papers_rule():
    t, h, w = positions(BOTH_DOC, [(1, 4, 6), (2, 4, 4)])
    assert t == rows("0 1 2 2 2 2 2 2 5 6 7 8 8 8 8 9 9 9 9 10 11")
    assert h == rows("0 1 2 2 2 3 3 3 5 6 7 8 8 9 9 8 8 9 9 10 11")
    assert w == rows("0 1 2 3 4 2 3 4 5 6 7 8 9 8 9 8 9 8 9 10 11")


def test_text_after_a_long_clip_starts_after_its_last_step():
    # grid (10, 4, 4): 10 steps of 2 x 2 tokens at positions 1 to 10; the next text is at 11, not at 1 + 4 / 2 = 3
    t, h, w = positions([X, *[VIDEO] * 40, X], [(10, 4, 4)])
    assert (t[-2], t[-1], h[-1], w[-1]) == (10, 11, 11, 11)


def test_positions_restart_in_each_document():
    ids = [*BOTH_DOC, X, X, *IMAGE_DOC]
    borders = torch.tensor([0, 21, 23, 33], dtype=torch.int32)
    packed = positions(ids, [(1, 4, 6), (2, 4, 4), (1, 4, 6)], cu_seqlens=borders)
    both, image = positions(BOTH_DOC, [(1, 4, 6), (2, 4, 4)]), positions(IMAGE_DOC, [(1, 4, 6)])
    for axis in range(3):
        assert packed[axis] == [*both[axis], 0, 1, *image[axis]]


def test_one_dimensional_positions_count_tokens():
    borders = torch.tensor([0, 10, 12], dtype=torch.int32)
    assert (
        positions([*IMAGE_DOC, X, X], [(1, 4, 6)], cu_seqlens=borders, one_dimensional=True) == [[*range(10), 0, 1]] * 3
    )


def test_media_items_side_by_side_are_kept_apart():
    t, h, w = positions([*[IMAGE] * 2, *[IMAGE] * 2, X], [(1, 2, 4), (1, 4, 2)])
    assert (t, h, w) == (rows("0 0 2 2 4"), rows("0 0 2 3 4"), rows("0 1 2 2 4"))


@pytest.mark.parametrize(
    ("ids", "grids"),
    [
        (IMAGE_DOC, []),
        (IMAGE_DOC, [(1, 4, 4)]),
        ([IMAGE, X, IMAGE], [(1, 2, 4)]),
        ([IMAGE, VIDEO], [(1, 2, 4)]),
    ],
)
def test_pads_that_do_not_match_their_grids_are_refused(ids, grids):
    with pytest.raises(ValueError, match="pad tokens"):
        positions(ids, grids)
