"""The whole loader under other numbers of ranks and workers, stopped anywhere; what faults and long runs leave."""

import json
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from test_loader import fingerprint

from data_pipelines.encode.sample import SampleEncoder
from data_pipelines.ledger import Ledger
from data_pipelines.loader import PackLoader
from data_pipelines.plan.balance import PackCost
from data_pipelines.plan.rows import unfold

PACKS, STEPS = 8, 9
PAIRS = list(product((1, 2, 4, 8), (0, 1, 3)))
QUICK = [(2, 1), (8, 0), (4, 3)]


def changing(tiny, workers, packing="pool"):
    """A mixture whose weights change twice within the steps tested, over epochs that end many times within them."""
    config = tiny.config(max_tokens=96, workers=workers)
    config = replace(config, plan=replace(config.plan, packing=packing))
    pictures = replace(config.sources["pictures"], schedule=((1_800, 0.0), (3_900, 1.0)))
    texts = replace(config.sources["texts"], schedule=((3_900, 2.0),))
    return replace(config, sources={"pictures": pictures, "texts": texts})


def steps_of(tiny, world, workers, steps, state=None, packing="pool"):
    """The global batches of `steps` steps, from all ranks, and the state after them, the same on every rank."""
    parts, states = [], []
    cost = None if packing == "pool" else PackCost(1e6, 1e3, 2e6, 1e3)  # with one, the dearest packs come first
    for rank in range(world):
        config = changing(tiny, workers, packing)
        loader = PackLoader(config, tiny.tokenizer, PACKS, rank, world, seed=3, cost=cost)
        if state is not None:
            loader.load_state_dict(state)
        parts.append([[fingerprint(batch) for batch in step] for _, step in zip(range(steps), loader, strict=False)])
        loader.close()
        states.append(json.dumps(loader.state_dict()))
    assert set(states) == {states[0]}
    assert len(states[0]) < 65536
    batches = [[parts[slot % world][step][slot // world] for slot in range(PACKS)] for step in range(steps)]
    return batches, json.loads(states[0])


@pytest.fixture(scope="module")
def reference(tiny):
    return steps_of(tiny, 1, 0, STEPS)[0]


def test_the_reference_crosses_epochs_and_changes_of_the_mixture(tiny, reference):
    drawn = Counter(key for step in reference for batch in step for key in dict(batch)["keys"])
    assert min(drawn.values()) >= 2
    tokens = [sum(dict(batch)["input_ids"][1][0] for batch in step) for step in reference]
    assert sum(tokens[:3]) > 1_800
    assert sum(tokens) > 3_900 + tokens[-1]
    middle = [dict(batch)["datasets"] for batch in reference[4]]
    assert {dataset for datasets in middle for dataset in datasets} == {1}


def check_pair(tiny, reference, world, workers):
    assert steps_of(tiny, world, workers, STEPS)[0] == reference


@pytest.mark.parametrize(("world", "workers"), QUICK)
def test_global_batches_are_the_same_for_some_worlds_and_workers(tiny, reference, world, workers):
    check_pair(tiny, reference, world, workers)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "workers"), [pair for pair in PAIRS if pair not in QUICK])
def test_global_batches_are_the_same_for_all_worlds_and_workers(tiny, reference, world, workers):
    check_pair(tiny, reference, world, workers)


def check_stops(tiny, reference, seed):
    """Stop after random numbers of steps, and go on under a random pair each time."""
    rng = np.random.default_rng(seed)
    found, state = [], None
    while len(found) < STEPS:
        world, workers = PAIRS[int(rng.integers(len(PAIRS)))]
        batches, state = steps_of(tiny, world, workers, min(int(rng.integers(1, 4)), STEPS - len(found)), state)
        found += batches
    assert found == reference


def test_a_run_stopped_anywhere_goes_on_under_another_pair(tiny, reference):
    check_stops(tiny, reference, seed=0)


@pytest.mark.parametrize("packing", ["balanced", "task", "single"])
def test_every_packing_goes_on_under_another_pair(tiny, packing):
    whole, end = steps_of(tiny, 1, 0, 7, packing=packing)
    first, state = steps_of(tiny, 4, 1, 3, packing=packing)
    rest, last = steps_of(tiny, 2, 3, 4, state, packing)
    assert first + rest == whole
    assert last == end


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 17))
def test_runs_stopped_anywhere_go_on_under_other_pairs(tiny, reference, seed):
    check_stops(tiny, reference, seed)


def test_every_stop_within_an_epoch_keeps_each_sample_to_once_an_epoch(tiny):
    config = tiny.config(max_tokens=96, pictures=1.0)
    for stop in range(1, 12):  # 20 pictures an epoch, about three a pack: stops in and around every epoch's last pack
        keys, state = [], None
        for steps in (stop, 12 - stop):
            loader = PackLoader(config, tiny.tokenizer, 1, 0, 1, seed=0)
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
            keys += [key for _, (batch,) in zip(range(steps), loader, strict=False) for key in batch.keys]
            loader.close()
            state = loader.state_dict()
        waiting = [f"p{8 * shard + row:02d}" for _, shard, row, *_ in unfold(state["plan"]["pool"]["items"])]
        drawn = Counter(keys + waiting)
        assert len(drawn) == 20
        assert max(drawn.values()) - min(drawn.values()) <= 1


def ledger_of(loader, steps, path, between=lambda: None):
    """Lines of the ledger, and the keys of all packs, over `steps`; `between` acts after the first."""
    ledger, keys = Ledger(path), []
    for number, step in zip(range(steps), loader, strict=False):
        ledger.add(step)
        keys += [batch.keys for batch in step]
        if number == 0:
            between()
    loader.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return lines, keys


def test_a_killed_worker_is_replaced_and_marked_and_costs_no_sample(tiny, tmp_path):
    expected = ledger_of(PackLoader(tiny.config(), tiny.tokenizer, 4, 0, 1, seed=0), 5, tmp_path / "none")[1]
    loader = PackLoader(tiny.config(workers=2), tiny.tokenizer, 4, 0, 1, seed=0)
    lines, keys = ledger_of(
        loader, 5, tmp_path / "ledger", lambda: os.kill(loader._pool._workers[0].process.pid, signal.SIGKILL)
    )
    assert keys == expected
    # an idle worker dies with nothing in its hands: then there is nothing to mark
    assert {line["reason"] for line in lines} <= {"worker_replaced"}


def test_a_sample_over_its_deadline_is_marked_by_its_key_and_the_run_goes_on(tiny, tmp_path, monkeypatch):
    encode = SampleEncoder.encode

    def stuck(self, record, *arguments, **options):
        if record.key == "p03":
            time.sleep(600)
        return encode(self, record, *arguments, **options)

    monkeypatch.setattr(SampleEncoder, "encode", stuck)
    config = tiny.config(workers=2, pictures=1.0)
    config = replace(config, loader=replace(config.loader, sample_timeout_s=3.0))
    lines, keys = ledger_of(PackLoader(config, tiny.tokenizer, 4, 0, 1, seed=0), 3, tmp_path / "ledger")
    marked = [line for line in lines if line["reason"] == "deadline"]
    assert {(line["dataset"], line["key"]) for line in marked} == {("pictures", "p03")}
    found = {key for pack in keys for key in pack}
    assert "p03" not in found
    assert len(found) == 19


def resident(pids):
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(tiny, warm_up, steps):
    """How much this process, its two workers and the plan's process grow over `steps` steps of 4 packs."""
    loader = PackLoader(tiny.config(workers=2), tiny.tokenizer, 4, 0, 1, seed=0)
    packs = iter(loader)
    for _ in range(warm_up):
        next(packs)
    pids = [os.getpid(), loader._plan.feed.pid, *(worker.process.pid for worker in loader._pool._workers)]
    before = resident(pids)
    for _ in range(steps):
        next(packs)
    after = resident(pids)
    loader.close()
    return after - before


def test_memory_stays_flat_over_many_packs(tiny):
    assert growth(tiny, 50, 100) < 12 << 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_stays_flat_over_twenty_thousand_packs_decoded(tiny):
    assert growth(tiny, 250, 5_000) < 24 << 20
