"""The pool packer against packs made by hand, and its bounds on random lengths."""

import bisect
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.config import MAX_POOL
from data_pipelines.plan.packer import PoolPacker, TaskPacker
from data_pipelines.plan.rows import fold, unfold
from data_pipelines.plan.shelf import Item


def items(lengths, patches=None):
    patches = patches or [0] * len(lengths)
    return [Item(0, 0, row, 0, n, p) for row, (n, p) in enumerate(zip(lengths, patches, strict=True))]


def packs(lengths, count, patches=None, max_tokens=10, max_patches=100, pool=3):
    source = itertools.cycle(items(lengths, patches))
    packer = PoolPacker(max_tokens, max_patches, pool)
    return [[item.tokens for item in packer.next_pack(source)] for _ in range(count)]


def test_the_oldest_begins_and_the_longest_that_fits_follows():
    # pool 4 7 3; pack 1: oldest 4, in comes 6: pool 7 3 6, best fit in 6 left is 6, in comes 5: pool 7 3 5, none left.
    # pack 2: oldest 7, in comes 2: pool 3 5 2, best fit in 3 left is 3, in comes 8: pool 5 2 8.
    # pack 3: oldest 5, in comes 1: pool 2 8 1, best fit in 5 left is 2, in comes 9: pool 8 1 9, best fit in 3 is 1.
    assert packs([4, 7, 3, 6, 5, 2, 8, 1], 2) == [[4, 6], [7, 3]]
    assert packs([4, 7, 3, 6, 5, 2, 8, 1, 9, 9], 3)[2] == [5, 2, 1]


def test_the_patch_budget_binds_too():
    # 6 fits the tokens left beside 4 but not the 10 - 8 = 2 patches left; 3 does
    assert packs([4, 6, 3, 9, 9, 9], 1, patches=[8, 3, 2, 0, 0, 0], max_patches=10) == [[4, 3]]


def test_a_full_sample_makes_a_pack_of_its_own():
    assert packs([10, 10, 10], 3) == [[10], [10], [10]]


def test_no_item_waits_longer_than_the_pool():
    rng = np.random.default_rng(0)
    drawn = []

    def draw():
        while True:
            drawn.append(Item(0, 0, len(drawn), 0, int(rng.integers(1, 1000)), 0))
            yield drawn[-1]

    packer, source, seen = PoolPacker(1000, 10**6, 16), draw(), {}
    for number in range(400):
        arrived = len(drawn)
        pack = packer.next_pack(source)
        assert pack[0].row == min(set(range(arrived)) - set(seen), default=pack[0].row)
        seen.update({item.row: number for item in pack})
        assert sum(item.tokens for item in pack) <= 1000
    waiting = [item.row for item in packer.items.values()]
    assert sorted([*seen, *waiting]) == list(range(len(drawn)))


def test_a_pool_that_is_put_back_packs_the_same():
    rng = np.random.default_rng(1)
    source = items(rng.integers(1, 400, 3000).tolist(), rng.integers(0, 400, 3000).tolist())
    one, place = PoolPacker(1000, 900, 32), iter(source)
    for _ in range(50):
        one.next_pack(place)
    rest = list(place)
    two = PoolPacker(1000, 900, 32, one.state())
    first, second = iter(rest), iter(rest)
    for _ in range(50):
        assert one.next_pack(first) == two.next_pack(second)


@pytest.mark.parametrize(("median", "pool"), [(300, 64), (600, 256)])
def test_packs_of_many_short_samples_are_full(median, pool):
    rng = np.random.default_rng(2)
    packer = PoolPacker(16384, 10**9, pool)

    lengths = np.clip(rng.lognormal(np.log(median), 0.8, 40_000), 8, 16384).astype(int)
    source = iter(items(lengths.tolist()))
    fills = [sum(item.tokens for item in packer.next_pack(source)) / 16384 for _ in range(300)]
    assert np.mean(fills) > 0.995
    assert np.mean(np.array(fills) < 0.98) < 0.005


def test_a_rare_task_is_packed_before_its_patience_ends():
    # task 1 is one sample in 1,000: its pool is never ready, its samples wait for 64 x 8 draws
    drawn = []

    def draw():
        while True:
            drawn.append(Item(0, 0, len(drawn), 0, 100, 0, task=int(len(drawn) % 1000 == 0)))
            yield drawn[-1]

    packer, source = TaskPacker(1000, 10**6, 8), draw()
    waits = []
    while len(drawn) < 20_000:
        pack = packer.next_pack(source)
        assert len({item.task for item in pack}) == 1
        waits += [len(drawn) - item.row for item in pack if item.task == 1]
    assert len(waits) == 20
    assert max(waits) == 512


def test_no_task_waits_longer_than_its_patience_however_many_kinds_there_are():
    """With 100 kinds no pool was ready for 29,432 draws, and only packs were moments to look at who waits."""
    drawn = []

    def draw():
        while True:
            drawn.append(Item(0, 0, len(drawn), 0, 100, 0, task=len(drawn) % 100))
            yield drawn[-1]

    packer, source = TaskPacker(16384, 10**6, 64), draw()
    waits = [len(drawn) - item.row for _ in range(300) for item in packer.next_pack(source)]
    assert max(waits) == 64 * 64


def test_task_pools_that_are_put_back_pack_the_same():
    rng = np.random.default_rng(1)
    lengths, tasks = rng.integers(1, 400, 6000).tolist(), rng.integers(0, 5, 6000).tolist()
    source = [item._replace(task=task) for item, task in zip(items(lengths), tasks, strict=True)]
    one, place = TaskPacker(1000, 900, 32), iter(source)
    for _ in range(100):
        one.next_pack(place)
    rest = list(place)
    two = TaskPacker(1000, 900, 32, one.state())
    first, second = iter(rest), iter(rest)
    for _ in range(100):
        assert one.next_pack(first) == two.next_pack(second)


@pytest.mark.parametrize(("kinds", "median"), [(2, 400), (4, 60), (12, 100), (20, 50)])
def test_task_packs_are_full_whatever_the_number_of_kinds(kinds, median):
    """Kinds that come alike often. Best fit alone left the short ones to the end of their patience: 86% at 20 kinds."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(median), 0.8, 120_000), 8, 16384).astype(int).tolist()
    tasks = rng.integers(0, kinds, len(lengths)).tolist()
    source = (Item(0, 0, row, 0, n, 0, 0, task) for row, (n, task) in enumerate(zip(lengths, tasks, strict=True)))
    packer = TaskPacker(16384, 1 << 40, 256)
    fills = [sum(item.tokens for item in packer.next_pack(source)) / 16384 for _ in range(400)]
    assert np.mean(fills) >= 0.995
    assert np.mean(np.array(fills) < 0.98) <= 0.005
    assert len(fold(packer.state()["items"])) < 60_000


@pytest.mark.parametrize(("kinds", "pool"), [(8, 4096), (100, 256)])
def test_what_all_kinds_hold_together_stays_small_and_none_is_lost(kinds, pool):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(60), 0.8, 60_000), 8, 16384).astype(int).tolist()
    drawn = []

    def draw():
        for row, n in enumerate(lengths):
            drawn.append(row)
            yield Item(row % 3, row // 1000, row, 0, n, 4 * n, n * n, row % kinds)

    packer, source, packed, states = TaskPacker(16384, 1 << 40, pool), draw(), [], []
    for _ in range(100):
        pack = packer.next_pack(source)
        assert len({item.task for item in pack}) == 1
        packed += [item.row for item in pack]
        states.append(packer.state()["items"])
    assert max(len(rows) for rows in states) <= MAX_POOL
    assert max(len(fold(rows)) for rows in states) < 60_000
    assert sorted(packed + [row[3] for row in states[-1]]) == drawn


@pytest.mark.parametrize("diet", ["half clips", "clips"])
def test_task_packs_of_long_samples_come_near_the_offline_bound(diet):
    rng = np.random.default_rng(0)
    clips, texts = rng.uniform(4000, 16384, 20_000), rng.lognormal(np.log(400), 0.8, 20_000)
    lengths = clips if diet == "clips" else np.where(rng.random(20_000) < 0.5, clips, texts)
    lengths = np.clip(lengths, 8, 16384).astype(int).tolist()
    source = (Item(0, 0, row, 0, n, 0, 0, row % 2) for row, n in enumerate(lengths))
    packer = TaskPacker(16384, 1 << 40, 256)
    packed = [item for _ in range(4000) for item in packer.next_pack(source)]
    bound = sum(best_fit_decreasing([item.tokens for item in packed if item.task == task]) for task in (0, 1))
    tokens = sum(item.tokens for item in packed)
    assert tokens / (4000 * 16384) >= tokens / (bound * 16384) - 0.005


def best_fit_decreasing(lengths):
    """Packs of 16,384 that hold all of them, known at once."""
    rooms = []
    for n in sorted(lengths, reverse=True):
        place = bisect.bisect_left(rooms, n)
        bisect.insort(rooms, (rooms.pop(place) if place < len(rooms) else 16384) - n)
    return len(rooms)


@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 3), st.integers(0, 16384)), max_size=40))
def test_rows_come_back_from_their_text(rows):
    assert unfold(fold(rows)) == [list(row) for row in rows]
