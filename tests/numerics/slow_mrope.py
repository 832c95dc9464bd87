"""M-RoPE positions token by token, written from the paper's rule; only tests use it."""

from collections.abc import Sequence
from itertools import pairwise


def slow_position_ids(
    input_ids: Sequence[int],
    grids: Sequence[tuple[int, int, int]],
    image_pad: int,
    video_pad: int,
    borders: Sequence[int],
) -> list[list[int]]:
    """[t, h, w] lists. Qwen2-VL paper, section 2.1: text counts up on all axes; a frame pair's tokens share t and take
    their row and column; each modality starts one above the largest position before it."""
    positions: list[tuple[int, int, int]] = []
    remaining = list(grids)
    for start, stop in pairwise(borders):
        following = 0
        token = start
        while token < stop:
            if input_ids[token] not in (image_pad, video_pad):
                positions.append((following, following, following))
                following += 1
                token += 1
                continue
            steps, rows, columns = remaining.pop(0)
            largest = following
            for k in range(steps):
                for i in range(rows // 2):
                    for j in range(columns // 2):
                        place = (following + k, following + i, following + j)
                        positions.append(place)
                        largest = max(largest, *place)
                        token += 1
            following = largest + 1
    return [[place[axis] for place in positions] for axis in range(3)]
