"""The plan: every sample once an epoch, shares by weight, exact continuation, clear ends for bad sources."""

import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipelines.config import MediaConfig, PlanConfig, SourceConfig
from data_pipelines.errors import ShardError
from data_pipelines.index.source import ShardTable
from data_pipelines.loader import new_planner, open_sources
from data_pipelines.plan.balance import PackCost
from data_pipelines.plan.mixture import Mixture, Phase, mixture_phases
from data_pipelines.plan.order import SourceOrder, permutation
from data_pipelines.plan.planner import Planner
from data_pipelines.plan.rows import unfold
from data_pipelines.shards.writer import ShardWriter


def planner(tiny, seed=0, change=None, **kwargs):
    config = tiny.config(**kwargs)
    config = replace(config, plan=replace(config.plan, **(change or {})))
    return new_planner(config, open_sources(config, tiny.tokenizer), seed, PackCost(1e6, 1e3, 2e6, 1e3))


def splitmix64(state):
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_permutations_sort_the_published_hash():
    assert splitmix64(1234567) == 6457827717110365317  # the generator's published test value
    key = (1 << 64) - 3
    hashes = [splitmix64(key + number * 0x9E3779B97F4A7C15) for number in range(100)]
    assert permutation(100, key).tolist() == sorted(range(100), key=hashes.__getitem__)


def test_permutations_are_spread_evenly():
    # position of element 0 among 8, over 4,000 keys: 500 each, standard deviation about 21
    places = Counter(int(np.flatnonzero(permutation(8, key) == 0)[0]) for key in range(4000))
    assert all(abs(places[place] - 500) < 100 for place in range(8))


def draw_epochs(order, samples):
    drawn = []
    while len(drawn) < samples:
        block = order.next_block()
        drawn += [(block.epoch, block.shard, int(row)) for row in block.rows]
    return drawn


def test_each_epoch_gives_every_sample_once_in_another_order():
    sizes = [5, 0, 12, 3, 7]
    drawn = draw_epochs(SourceOrder(0, "s", 5, sizes.__getitem__, block_size=4, window_shards=2), 81)
    expected = {(shard, row) for shard, size in enumerate(sizes) for row in range(size)}
    epochs = [[entry[1:] for entry in drawn if entry[0] == epoch] for epoch in range(3)]
    assert [len(epoch) for epoch in epochs] == [27, 27, 27]
    assert all(set(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_an_order_goes_on_from_any_place():
    def make():
        return SourceOrder(3, "s", 5, [5, 0, 12, 3, 7].__getitem__, block_size=4, window_shards=2)

    order = make()
    for _ in range(25):
        other = make()
        other.place = order.place
        expected, found = order.next_block(), other.next_block()
        assert (expected.epoch, expected.shard) == (found.epoch, found.shard)
        assert expected.rows.tolist() == found.rows.tolist()


def test_an_order_asks_only_for_shards_that_come_near():
    asked = set()

    def size(shard):
        asked.add(shard)
        return 1000

    order = SourceOrder(0, "s", 100_000, size, block_size=1000, window_shards=8)
    for _ in range(16):
        order.next_block()
    assert len(asked) == 16


def test_an_order_of_empty_shards_ends():
    with pytest.raises(ValueError, match="source 's' has no samples in its 3 shards"):
        SourceOrder(0, "s", 3, lambda shard: 0, block_size=4).next_block()


def test_shares_follow_the_weights_to_within_a_sample():
    # shares 1/2, 1/3, 1/6; due times 1 3 5 7 9 ..., 1.5 4.5 7.5 ..., 3 9 ...
    mixture = Mixture([3, 2, 1])
    draws = mixture.draws()
    assert [next(draws) for _ in range(6)] == [0, 1, 0, 2, 1, 0]
    for _ in range(5994):
        next(draws)
    assert mixture.drawn == [3000, 2000, 1000]


def test_a_mixture_goes_on_from_its_counts():
    one = Mixture([0.61, 0.07, 0.32])
    draws = one.draws()
    for _ in range(700):
        next(draws)
        rest = Mixture([0.61, 0.07, 0.32], one.drawn).draws()
    assert [next(draws) for _ in range(2000)] == [next(rest) for _ in range(2000)]


def test_a_lead_is_drawn_in_advance_and_given_up_again():
    # shares 1/2: of 10 that wait 8 are the first source's, 3 more than its share: it leads by 2.7, the other by -2.7.
    # Due times with counts 4 and 4: (4.5 - 2.7) * 2 = 3.6, 5.6, ... and (4.5 + 2.7) * 2 = 14.4, ...
    mixture = Mixture([1, 1], [4, 4])
    mixture.make_up_for(Counter({0: 8, 1: 2}))
    assert mixture.leads == pytest.approx([2.7, -2.7])
    draws = mixture.draws()
    assert [next(draws) for _ in range(8)] == [0, 0, 0, 0, 0, 0, 1, 0]
    mixture.make_up_for(Counter({0: 5, 1: 5}))
    draws = mixture.draws()
    assert [next(draws) for _ in range(6)] == [1, 1, 1, 1, 1, 1]


class LengthsOnly:
    """Stands in for a source towards the planner: 40 shards of 1,000 texts with lengths of `draw(rng, 1000)`."""

    num_shards, num_samples = 40, 40_000

    def __init__(self, name, draw):
        self.name, self._draw, self._tables = name, draw, {}

    def table(self, shard):
        if shard not in self._tables:
            lengths = np.clip(self._draw(np.random.default_rng(shard), 1000), 8, 16384).astype(np.int32)
            names = ["width", "height", "frames", "fps", "duration", "kind", "name"]
            parts = ["min_pixels", "max_pixels", "fps", "nframes"]
            arrays = {f"media_{name}": np.zeros(0, np.int64) for name in names}
            arrays |= {f"part_{name}": np.zeros(0, np.int64) for name in parts}
            arrays |= {"media_ends": np.zeros(1000, np.uint64), "task": np.zeros(1000, np.uint32)}
            index = SimpleNamespace(
                num_samples=1000, arrays=arrays, task_name=lambda number: self.name, key=str, media=lambda row: ()
            )
            self._tables[shard] = ShardTable(index, lengths, np.zeros(1000, np.uint8), (), Counter())
        return self._tables[shard]


TEXTS = LengthsOnly("texts", lambda rng, n: rng.lognormal(np.log(400), 0.8, n))
CLIPS = LengthsOnly("clips", lambda rng, n: rng.uniform(4000, 16384, n))
IMAGES = LengthsOnly("images", lambda rng, n: rng.normal(1280, 60, n))


@pytest.mark.parametrize("packing", ["pool", "task", "balanced"])
@pytest.mark.parametrize(
    ("sources", "weights"),
    [
        ((TEXTS, CLIPS), (1, 1)),
        ((TEXTS, CLIPS), (1, 3)),
        ((TEXTS, IMAGES, CLIPS), (1, 1, 1)),
        ((TEXTS, IMAGES), (3, 1)),
    ],
    ids=["halves", "mostly clips", "thirds", "short"],
)
def test_packs_have_the_shares_to_within_one_percent_after_a_thousand(packing, sources, weights):
    """Long samples wait in the pool while short ones fill the gaps: exact draws alone were up to 4 points off."""
    phases = [Phase(0, tuple(map(float, weights)))]
    cost = PackCost(1e6, 1e3, 2e6, 1e3)
    plan = Planner(sources, phases, MediaConfig(), PlanConfig(packing=packing), 0, cost)
    counts = Counter(item.source for _ in range(1000) for item in plan.next_pack().items)
    shares = [counts[number] / counts.total() for number in range(len(sources))]
    assert shares == pytest.approx([weight / sum(weights) for weight in weights], abs=0.01)


def test_packs_have_the_shares_of_a_new_phase_from_its_first_on():
    """2,000 packs of mostly clips, then by halves: what waited counts for the new shares."""
    phases = [Phase(0, (1.0, 3.0)), Phase(30e6, (1.0, 1.0))]
    plan = Planner([TEXTS, CLIPS], phases, MediaConfig(), PlanConfig(), 0)
    while plan.tokens < 30e6:
        plan.next_pack()
    counts = Counter(item.source for _ in range(1000) for item in plan.next_pack().items)
    assert counts[0] / counts.total() == pytest.approx(0.5, abs=0.01)


def test_a_source_without_weight_is_never_drawn():
    mixture = Mixture([0, 1])
    assert set(itertools.islice(mixture.draws(), 2000)) == {1}


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [1, float("nan")], [float("inf")]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        Mixture(weights)


def phases(*sources, sizes=(), temperature=None):
    return mixture_phases([SourceConfig(("x",), **source) for source in sources], lambda: sizes, temperature)


def test_shares_by_epochs_let_all_sources_end_together():
    assert phases({"epochs": 2.0}, {"epochs": 0.5}, sizes=[100, 1000]) == (Phase(0, (200.0, 500.0)),)


def test_a_temperature_lies_between_sizes_and_weights():
    assert phases({}, {"weight": 3.0}, sizes=[100, 10_000], temperature=2.0) == (Phase(0, (0.1, 3.0)),)
    assert phases({}, {}, sizes=[100, 10_000], temperature=1e-3) == (Phase(0, (0.0, 1.0)),)  # overflowed


def test_a_schedule_changes_weights_at_token_counts():
    found = phases({"schedule": ((50, 0.0), (90, 2.0))}, {"schedule": ((70, 5.0),)})
    assert found == (Phase(0, (1, 1)), Phase(50, (0, 1)), Phase(70, (0, 5)), Phase(90, (2, 5)))


@pytest.mark.parametrize(
    "sources",
    [
        [{"epochs": 1.0}, {}],
        [{"epochs": 1.0, "weight": 2.0}],
        [{"schedule": ((9, 1.0), (9, 2.0))}],
        [{"schedule": ((9, 0.0),)}],
    ],
)
def test_contradictory_mixtures_are_refused(sources):
    with pytest.raises(ValueError, match=r"epochs|rise|weights"):
        phases(*sources, sizes=[1, 1])


def test_a_plan_follows_its_schedule_and_goes_on_inside_it(tiny):
    config = tiny.config(pool=1)
    pictures = replace(config.sources["pictures"], weight=1.0, schedule=((2000, 0.0), (4000, 1.0)))
    texts = replace(config.sources["texts"], weight=0.0, schedule=((2000, 1.0),))
    config = replace(config, sources={"pictures": pictures, "texts": texts})
    sources = open_sources(config, tiny.tokenizer)
    plan = new_planner(config, sources, 0)
    while plan.tokens < 6000:
        state, tokens = plan.state_dict(), plan.tokens
        pack = plan.next_pack()
        # the pool of one holds one sample of the phase before
        drawn = {item.source for item in pack.items[2:]}
        assert drawn <= ({0} if tokens < 2000 else {1} if tokens < 4000 else {0, 1})
        other = new_planner(config, sources, 0)
        other.load_state_dict(json.loads(json.dumps(state)))
        assert other.next_pack() == pack


def test_packs_of_one_task_kind_hold_no_other(tiny):
    plan = planner(tiny, change={"packing": "task"})
    packs = [plan.next_pack() for _ in range(40)]
    assert all(len({item.task for item in pack.items}) == 1 for pack in packs)
    assert {pack.items[0].task for pack in packs} == {0, 1}


def test_epochs_count_the_samples_that_fit(tiny):
    """Every second sample of one source is too long; with one epoch each, both begin their second one together."""
    half = LengthsOnly("half", lambda rng, n: np.tile([30, 200], n // 2))
    whole = LengthsOnly("whole", lambda rng, n: np.full(n, 30))
    once = {name: SourceConfig(("x",), epochs=1.0) for name in ("half", "whole")}
    plan = new_planner(replace(tiny.config(max_tokens=64), sources=once), [half, whole], 0)
    assert plan.phases == (Phase(0, (20_000.0, 40_000.0)),)
    drawn, pack = Counter(), plan.next_pack()
    while all(item.epoch == 0 for item in pack.items):
        drawn.update(item.source for item in pack.items)
        pack = plan.next_pack()
    assert [drawn[0], drawn[1]] == pytest.approx([20_000, 40_000], abs=20)


def test_single_packing_keeps_every_document_alone(tiny):
    plan = planner(tiny, change={"packing": "single"})
    assert [len(plan.next_pack().items) for _ in range(40)] == [1] * 40


def test_every_sample_is_planned_once_an_epoch(tiny):
    plan = planner(tiny, pictures=1.0)
    seen, packs = Counter(), 0
    while min(plan.state_dict()["drawn"]) < 80:
        pack = plan.next_pack()
        assert pack.number == packs
        assert pack.num_tokens == sum(item.tokens for item in pack.items) <= 192
        seen.update((item.epoch, item.shard, item.row) for item in pack.items)
        packs += 1
    waiting = [tuple(item) for item in unfold(plan.state_dict()["pool"]["items"])]
    seen.update((epoch, shard, row) for _, shard, row, epoch, *_ in waiting)
    assert max(seen.values()) == 1
    assert [sum(epoch == e for epoch, _, _ in seen) for e in range(4)] == [20] * 4


@pytest.mark.parametrize("packing", ["pool", "balanced", "task", "single"])
def test_a_plan_goes_on_from_any_pack(tiny, packing):
    rng = np.random.default_rng(0)
    one = planner(tiny, change={"packing": packing})
    for _ in range(12):
        for _ in range(int(rng.integers(0, 9))):
            one.next_pack()
        two = planner(tiny, change={"packing": packing})
        two.load_state_dict(json.loads(json.dumps(one.state_dict())))
        assert [two.next_pack() for _ in range(6)] == [one.next_pack() for _ in range(6)]


def test_another_seed_makes_another_plan(tiny):
    first, second = planner(tiny, seed=0), planner(tiny, seed=1)
    assert [first.next_pack().items for _ in range(5)] != [second.next_pack().items for _ in range(5)]


def test_the_state_is_small(tiny):
    plan = planner(tiny, pool=1024)
    plan.next_pack()
    assert len(json.dumps(plan.state_dict())) < 65536


def test_samples_that_never_fit_are_reported_and_left_out(tiny):
    # text of 60 words has more than 40 tokens: records that are texts alone are shortened, captions are not
    plan = planner(tiny, max_tokens=24, pictures=1.0)
    with pytest.raises(ShardError, match=r"source 'pictures' has no usable sample: too_long \(\d+\)"):
        [plan.next_pack() for _ in range(100)]


def test_a_source_without_usable_samples_is_named_with_the_reason(tiny, tmp_path):
    with ShardWriter(tmp_path, "broken") as writer:
        writer.write("k", {"messages": []}, {})
    config = tiny.config(pictures=1.0)
    source = replace(config.sources["pictures"], shards=(f"{tmp_path}/broken-*.tar",))
    sources = open_sources(replace(config, sources={"broken": source}), tiny.tokenizer)
    with pytest.raises(ShardError, match=r"source 'broken' has no usable sample: no_messages \(1\)"):
        Planner(sources, [Phase(0, (1.0,))], config.media, config.plan, 0).next_pack()


def test_what_the_index_left_out_is_told_once_an_epoch(tiny, tmp_path):
    with ShardWriter(tmp_path, "mixed") as writer:
        writer.write("bad", {"messages": []}, {})
        for number in range(3):
            writer.write(f"good{number}", {"text": "a red dog"}, {})
    config = tiny.config(pool=1, pictures=1.0)
    source = replace(config.sources["pictures"], shards=(f"{tmp_path}/mixed-*.tar",))
    sources = open_sources(replace(config, sources={"mixed": source}), tiny.tokenizer)
    plan = Planner(sources, [Phase(0, (1.0,))], config.media, replace(config.plan, max_tokens=4), 0)
    events = [event for _ in range(9) for event in plan.next_pack().events]
    assert {(event.dataset, event.key, event.reason) for event in events} == {("mixed", "bad", "no_messages")}
    assert len(events) == 4  # 9 packs of one sample and one in the pool: epochs 0, 1, 2 and 3


def test_a_shard_that_is_gone_when_its_turn_comes_is_told_as_such(tiny, tmp_path):
    paths = [Path(shutil.copy(path, tmp_path)) for path in tiny.folder.glob("pictures-*.tar")]
    config = replace(tiny.config(), sources={"pictures": SourceConfig((f"{tmp_path}/*.tar",))})
    open_sources(config, tiny.tokenizer)  # indexed, and on the roll
    plan = new_planner(config, open_sources(config, tiny.tokenizer), 0)
    for path in paths:
        path.unlink()
    with pytest.raises(ShardError, match=r"pictures-0000\d\.tar"):
        plan.next_pack()
