"""The whole data way: the same packs for every world and worker count, exact resume, failures that stay small."""

import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.config import LoaderConfig, SourceConfig
from data_pipelines.errors import ShardError, UserError
from data_pipelines.index.source import SourceIndex
from data_pipelines.ledger import Ledger
from data_pipelines.loader import PackLoader
from data_pipelines.pack import plan_process
from data_pipelines.plan.planner import Planner
from data_pipelines.samples import LedgerEvent
from data_pipelines.shards.writer import ShardWriter
from data_pipelines.streaming import StreamLoader

STEPS, PACKS = 5, 4


def fingerprint(batch):
    """Every field of a batch, tensors by content."""
    parts = []
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            value = (str(value.dtype), tuple(value.shape), hashlib.sha1(value.numpy().tobytes()).hexdigest())
        parts.append((field.name, value))
    return parts


def loader(tiny, world=1, rank=0, seed=0, packs=PACKS, **kwargs):
    return PackLoader(tiny.config(**kwargs), tiny.tokenizer, packs, rank, world, seed)


def run(tiny, steps, state=None, packs=PACKS, **kwargs):
    """Batches of `steps` steps, and the state after them."""
    instance = loader(tiny, packs=packs, **kwargs)
    if state is not None:
        instance.load_state_dict(json.loads(json.dumps(state)))
    iterator = iter(instance)
    found = [[fingerprint(batch) for batch in next(iterator)] for _ in range(steps)]
    instance.close()
    return found, instance.state_dict()


@pytest.fixture(scope="module")
def reference(tiny):
    return run(tiny, STEPS)[0]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_packs_of_a_step_do_not_depend_on_world_and_workers(tiny, reference, world, workers):
    ranks = [run(tiny, STEPS, world=world, rank=rank, workers=workers)[0] for rank in range(world)]
    for step in range(STEPS):
        # slot m of rank r is pack m * world + r of the step
        assert [ranks[p % world][step][p // world] for p in range(PACKS)] == reference[step]


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_picture_numbers_are_planned_as_they_are_encoded(tiny, tmp_path, template):
    user = [{"type": "image", "image": name} for name in ("0.png", "1.png")] + [{"type": "text", "text": "two birds"}]
    data = [_png(60, 40), _png(50, 90)]
    with ShardWriter(tmp_path, "s") as writer:
        for number in range(6):
            turns = [{"role": "user", "content": user}, {"role": "assistant", "content": "a dog"}]
            writer.write(f"{number}", {"messages": turns}, {"0.png": data[0], "1.png": data[1]})
    config = replace(tiny.config(), sources={"s": SourceConfig((f"{tmp_path}/*.tar",))}, template=template)
    lengths = {}
    for numbered in (False, True):
        config = replace(config, vision_ids=numbered)
        instance = PackLoader(config, tiny.tokenizer, 1, 0, 1, 0)
        batch = next(iter(instance))[0]
        instance.close()
        assert batch.events == ()  # a count other than planned would be one
        first = batch.input_ids[: batch.cu_seqlens[1]].tolist()
        lengths[numbered] = len(first)
        words = tiny.tokenizer.decode([token for token in first if token < tiny.tokenizer.special.endoftext])
        assert ("Picture 1: " in words, "Picture 2: " in words, "Picture 3: " in words) == (numbered, numbered, False)
    extra = sum(len(tiny.tokenizer.encode(f"Picture {number}: ")) for number in (1, 2))
    assert abs(lengths[True] - lengths[False] - extra) <= 1  # "user\n" and "Picture" share a run of text


def _png(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_packs_are_numbered_in_plan_order(reference):
    numbers = [dict(batch)["number"] for step in reference for batch in step]
    assert numbers == list(range(STEPS * PACKS))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_stops_anywhere_continues_bitwise(tiny, workers):
    expected = [batch for step in run(tiny, 12)[0] for batch in step]
    rng = np.random.default_rng(workers)
    done, state, found = 0, None, []
    while done < 12:
        steps = int(rng.integers(1, 5))
        world = int(rng.choice([1, 2, 4]))
        parts = [run(tiny, steps, state, world=world, rank=rank, workers=workers) for rank in range(world)]
        assert all(part[1] == parts[0][1] for part in parts)
        found += [parts[p % world][0][step][p // world] for step in range(steps) for p in range(PACKS)]
        done, state = done + steps, parts[0][1]
    assert found[: len(expected)] == expected


def test_the_number_of_packs_a_step_may_change_on_resume(tiny):
    expected = [batch for step in run(tiny, 6)[0] for batch in step]
    first, state = run(tiny, 2)
    rest = run(tiny, 2, state, packs=8)[0]
    assert [batch for step in first + rest for batch in step] == expected


def test_prefetched_packs_do_not_count_as_done(tiny):
    instance = loader(tiny, workers=2)
    iterator = iter(instance)
    next(iterator)
    assert instance.state_dict()["plan"]["number"] == PACKS
    instance.close()


def test_iterating_again_goes_on_after_the_last_step_handed_out(tiny, reference):
    instance = loader(tiny, workers=1)
    found = [[fingerprint(batch) for batch in next(iter(instance))] for _ in range(3)]
    instance.close()
    assert found == reference[:3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: was 0, is 1"),
        ({"max_tokens": 256}, "differ: plan.max_patches: was 768, is 1024; plan.max_tokens: was 192, is 256. Restore"),
        ({"pictures": 1.0, "texts": 1.0}, "source pictures: was"),
        ({"texts": 1.0}, "source pictures: was .*, is None"),
    ],
)
def test_a_state_of_other_settings_is_refused_by_name(tiny, change, message):
    state = loader(tiny).state_dict()
    with pytest.raises(ValueError, match=message):
        loader(tiny, **change).load_state_dict(state)


def test_how_media_is_decoded_may_change_on_resume(tiny):
    config = tiny.config()
    media = replace(config.media, decode_timeout_s=7.0, video_backend="pyav")
    state = PackLoader(config, tiny.tokenizer, PACKS, 0, 1, 0).state_dict()
    assert PackLoader(replace(config, media=media), tiny.tokenizer, PACKS, 0, 1, 0).load_state_dict(state) == []


def test_a_resume_by_a_version_that_counts_otherwise_is_refused(tiny, monkeypatch):
    """It was taken, and the samples that waited for a pack were lost one by one as defects of the program."""
    instance = loader(tiny)
    next(iter(instance))
    state = json.loads(json.dumps(instance.state_dict()))
    table = SourceIndex.table
    monkeypatch.setattr(
        SourceIndex, "table", lambda *place: replace(table(*place), text_tokens=table(*place).text_tokens + 1)
    )
    with pytest.raises(UserError, match=r"takes \d+ tokens and \d+ patches, not \d+ and \d+ as the plan's state says"):
        loader(tiny).load_state_dict(state)
    monkeypatch.undo()
    state["plan"]["cursors"][0]["next"] = 1000
    with pytest.raises(UserError, match="a block has 4 usable samples, not 1000 or more as the plan's state says"):
        loader(tiny).load_state_dict(state)


def test_a_source_whose_samples_fit_no_pack_is_refused_before_the_first(tiny):
    """They were ledger lines alone: 90% of a data set could be missing; one with `epochs` vanished without a word."""
    for share in ({"weight": 1.0}, {"epochs": 1.0}):
        source = SourceConfig((f"{tiny.folder}/pictures-*.tar",), **share)
        config = replace(tiny.config(max_tokens=5), sources={"long": source})
        with pytest.raises(ShardError, match=r"long: 20 of 20 samples looked at fit no pack.*it needs max_tokens=\d+"):
            PackLoader(config, tiny.tokenizer, PACKS, 0, 1, 0)


def test_as_many_samples_may_fit_no_pack_as_the_sources_error_rate_allows(tiny, tmp_path):
    with ShardWriter(tmp_path, "mixed", max_records=40) as writer:
        for number in range(120):
            asked = {"role": "user", "content": "a red dog " * (1 if number % 10 else 300)}
            answer = {"role": "assistant", "content": "cat"}
            writer.write(f"m{number:03d}", {"messages": [asked, answer]}, {})
    source = SourceConfig((f"{tmp_path}/mixed-*.tar",), max_error_rate=0.2)
    config = replace(tiny.config(), sources={"mixed": source})
    PackLoader(config, tiny.tokenizer, PACKS, 0, 1, 0)
    strict = replace(config, sources={"mixed": replace(source, max_error_rate=0.05)})
    told = r"12 of 120 samples looked at fit no pack, over max_error_rate 0\.05: too_long"
    with pytest.raises(ShardError, match=told):
        PackLoader(strict, tiny.tokenizer, PACKS, 0, 1, 0)


def test_a_world_that_does_not_divide_the_step_is_refused(tiny):
    with pytest.raises(ValueError, match=r"packs_per_step=4 is not a multiple of the world size 3: .*packs_per_step=6"):
        loader(tiny, world=3)


@pytest.mark.parametrize(("rank", "world"), [(5, 4), (4, 4), (-1, 4), (0, 0)])
def test_a_rank_outside_its_world_is_refused(tiny, rank, world):
    for make in (PackLoader, StreamLoader):
        with pytest.raises(UserError, match=rf"rank={rank} of world={world}: ranks count from 0"):
            make(tiny.config(), tiny.tokenizer, PACKS, rank, world, 0)


@pytest.mark.parametrize(
    ("setting", "value", "least"),
    [("num_workers", -1, "at least 0"), ("prefetch_factor", 0, "at least 1"), ("prefetch_mb", -1, "at least 0"),
     ("sample_timeout_s", 0.0, "above 0"), ("sample_timeout_s", float("nan"), "above 0")],
)  # fmt: skip
def test_settings_without_meaning_are_refused_by_name(setting, value, least):
    with pytest.raises(UserError, match=rf"{setting}={value}: must be {least}"):
        LoaderConfig(**{setting: value})


def test_a_schedule_begins_no_earlier_than_training():
    with pytest.raises(UserError, match="no negative token counts"):
        SourceConfig(("a.tar",), schedule=((-1.0, 2.0), (5.0, 1.0)))


@pytest.fixture
def damaged(tiny, tmp_path):
    """Pictures of which one does not decode and one lies about its size; what was lost is found by its key."""
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path, "d") as writer:
        for number in range(6):
            path = tmp_path / "x.png"
            Image.fromarray(rng.integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(path)
            data = path.read_bytes()
            data = data[: len(data) // 2] if number == 2 else data
            side = 90 if number == 4 else 60
            writer.write(
                f"d{number}", {"caption": "a dog", "media": {"0.png": {"width": side, "height": side}}}, {"0.png": data}
            )
    config = tiny.config(workers=1, pictures=1.0)
    source = replace(config.sources["pictures"], shards=(f"{tmp_path}/d-*.tar",))
    return replace(config, sources={"damaged": source})


def test_a_full_disk_costs_lines_of_the_ledger_not_the_run(caplog):
    event = LedgerEvent("web", "k", "bad_json", "not JSON")
    ledger = Ledger(Path("/dev/full"))
    for _ in range(2):
        ledger.add([SimpleNamespace(number=1, events=[event])])
    (said,) = caplog.messages
    assert said.startswith("/dev/full cannot be written, what is lost is only counted from here ([Errno 28] No space")


def test_failing_samples_leave_their_packs_and_are_counted(tiny, damaged, tmp_path):
    instance = PackLoader(damaged, tiny.tokenizer, 2, 0, 1, seed=0)
    ledger = Ledger(tmp_path / "run" / "ledger.jsonl")
    steps = [step for step, _ in zip(instance, range(6), strict=False)]
    instance.close()
    for step in steps:
        ledger.add(step)
    keys = {key for step in steps for batch in step for key in batch.keys}
    assert keys == {"d0", "d1", "d3", "d5"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert {(line["dataset"], line["key"]) for line in lines} == {("damaged", "d2"), ("damaged", "d4")}
    assert {line["reason"] for line in lines if line["key"] == "d4"} == {"size_mismatch"}
    kept = sum(len(batch.keys) for step in steps for batch in step)
    assert len(lines) / (len(lines) + kept) == pytest.approx(1 / 3, abs=0.12)


def test_a_pack_that_lost_everything_is_a_legal_batch(tiny, damaged):
    alone = replace(damaged, plan=replace(damaged.plan, max_tokens=40, pool_size=1))
    instance = PackLoader(alone, tiny.tokenizer, 6, 0, 1, seed=0)
    step = next(iter(instance))
    instance.close()
    empty = [batch for batch in step if not batch.keys]
    assert len(empty) == 2
    assert all(batch.num_tokens == 1 and batch.num_supervised == 0 and batch.dummy_vision for batch in empty)


def test_packs_are_full(tiny):
    config = tiny.config(max_tokens=2048, pool=64, workers=0)
    instance = PackLoader(config, tiny.tokenizer, 4, 0, 1, seed=0)
    iterator = iter(instance)
    batches = [batch for _ in range(4) for batch in next(iterator)]
    instance.close()
    assert sum(batch.num_tokens for batch in batches) / (16 * 2048) > 0.99


def test_an_absent_source_is_an_error_with_its_pattern(tiny):
    with pytest.raises(ShardError, match="no shard matches"):
        PackLoader(tiny.config(absent=1.0), tiny.tokenizer, 1, 0, 1, 0)


def children(process):
    listed = f"/proc/{process}/task/{process}/children"
    return [int(child) for child in open(listed).read().split()] if os.path.exists(listed) else []


def load_and_wait(tiny):
    torch.set_num_threads(1)  # a forked process has none of the threads of its parent's
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    iterator = iter(loader(tiny, workers=2))
    next(iterator)
    time.sleep(60)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_process_takes_its_own_along_however_it_ends(tiny, how):
    parent = multiprocessing.get_context("fork").Process(target=load_and_wait, args=(tiny,))
    parent.start()
    try:
        deadline = time.monotonic() + 40
        while len(made := children(parent.pid)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(made) == 3  # two workers, and the plan's process
        time.sleep(0.3)
        if how == signal.SIGINT:  # a terminal's Ctrl-C reaches all of them
            for process in made:
                os.kill(process, how)
        os.kill(parent.pid, how)
        while any(map(alive, [parent.pid, *made])) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, [parent.pid, *made]))
    finally:
        parent.kill()
        parent.join()


def alive(process):
    """Whether it runs; one that nobody has waited for yet is gone, too."""
    path = Path(f"/proc/{process}/stat")
    try:
        return path.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_training_process_plans_nothing(tiny, reference, monkeypatch):
    plan, here = Planner.next_pack, os.getpid()

    def elsewhere(planner):
        assert os.getpid() != here
        return plan(planner)

    monkeypatch.setattr(Planner, "next_pack", elsewhere)
    assert run(tiny, STEPS, workers=1)[0] == reference


def few_steps_ahead(monkeypatch):
    """Steps so large that the planner is few of them ahead: what becomes of it is soon noticed."""
    state_dict = Planner.state_dict
    monkeypatch.setattr(plan_process, "_AHEAD_BYTES", 0)
    monkeypatch.setattr(Planner, "state_dict", lambda planner: state_dict(planner) | {"more": "x" * 20_000})


@pytest.mark.parametrize("packing", ["pool", "task"])
def test_a_killed_planner_is_replaced_and_the_packs_stay_the_same(tiny, damaged, monkeypatch, packing):
    few_steps_ahead(monkeypatch)
    config = replace(tiny.config(), sources=tiny.config().sources | damaged.sources)
    config = replace(config, plan=replace(config.plan, packing=packing, max_tokens=64))
    whole, _ = packs_of(PackLoader(config, tiny.tokenizer, PACKS, 0, 1, seed=0), 60)
    config = replace(config, loader=replace(config.loader, num_workers=1))
    killed, deaths = packs_of(PackLoader(config, tiny.tokenizer, PACKS, 0, 1, seed=0), 60, kill_at=(1, 2, 30))
    assert killed == whole
    assert deaths
    assert {(event.dataset, event.reason) for event in deaths} == {("", "worker_replaced")}
    assert all("plans the packs died (exit -9)" in event.message for event in deaths)


def packs_of(instance, steps, kill_at=(), how=signal.SIGKILL):
    """The batches of some steps without what was told of deaths, and that; the planner is killed after some steps."""
    found, deaths = [], []
    for number, step in zip(range(steps), instance, strict=False):
        if number in kill_at:
            os.kill(instance._plan.feed.pid, how)
        for batch in step:
            told = [event for event in batch.events if event.reason == "worker_replaced"]
            deaths += told
            batch.events = tuple(event for event in batch.events if event not in told)
            found.append(fingerprint(batch))
    instance.close()
    return found, deaths


def test_a_stopped_planner_is_replaced_and_the_packs_stay_the_same(tiny, monkeypatch):
    few_steps_ahead(monkeypatch)
    whole, _ = packs_of(loader(tiny), 8)
    config = tiny.config(workers=1)
    config = replace(config, loader=replace(config.loader, sample_timeout_s=1.0))
    stopped, told = packs_of(PackLoader(config, tiny.tokenizer, PACKS, 0, 1, 0), 8, (1,), signal.SIGSTOP)
    assert stopped == whole
    (message,) = (event.message for event in told)
    assert re.search(r"plans the packs stood still for 2 s at the packs from \d+ on and was replaced", message)


def test_a_planner_that_dies_again_and_again_ends_the_run(tiny, monkeypatch):
    monkeypatch.setattr(Planner, "next_pack", lambda planner: os.kill(os.getpid(), signal.SIGKILL))
    instance = loader(tiny, workers=1)
    with pytest.raises(RuntimeError, match=r"process that plans the packs dies again and again \(exit -9\)"):
        next(iter(instance))
    instance.close()


def test_an_error_of_the_plan_reaches_the_training_process_as_it_is(tiny, damaged, monkeypatch):
    monkeypatch.setattr("data_pipelines.loader.check_fit", lambda sources, config: None)  # would tell before
    nothing = replace(damaged, plan=replace(damaged.plan, max_tokens=4))  # a picture alone takes as much
    errors = []
    for workers in (0, 1):
        config = replace(nothing, loader=replace(nothing.loader, num_workers=workers))
        instance = PackLoader(config, tiny.tokenizer, PACKS, 0, 1, 0)
        with pytest.raises(ShardError) as raised:
            next(iter(instance))
        instance.close()
        errors.append((raised.value.key, raised.value.reason, str(raised.value)))
    assert errors[0] == errors[1]
    assert errors[0][:2] == ("damaged", "empty_source")


def test_a_defect_of_the_plan_shows_its_traceback(tiny, monkeypatch):
    def broken(planner):
        raise KeyError("a defect")

    monkeypatch.setattr(Planner, "next_pack", broken)
    instance = loader(tiny, workers=1)
    with pytest.raises(RuntimeError, match=r"(?s)process that plans the packs failed.*KeyError: 'a defect'"):
        next(iter(instance))
    instance.close()


def test_closing_and_iterating_again_leave_no_process(tiny):
    before = children(os.getpid())
    instance = loader(tiny, workers=1)
    for _ in range(3):
        next(iter(instance))
        assert len(set(children(os.getpid())) - set(before)) == 2
    instance.close()
    assert not set(children(os.getpid())) - set(before)


@pytest.mark.parametrize("make", [PackLoader, StreamLoader])
def test_closing_without_workers_ends_the_decoder_and_closes_the_shards(tiny, tmp_path, make):
    pytest.importorskip("av")
    from test_video import clip

    for shard in range(3):
        with ShardWriter(tmp_path, f"clips{shard}", max_records=4) as writer:
            for number in range(4):
                writer.write(f"c{shard}{number}", {"caption": "a red dog"}, {"0.mp4": clip(count=8)})
    config = replace(tiny.config(), sources={"clips": SourceConfig((f"{tmp_path}/clips*.tar",))})
    if make is StreamLoader:
        config = replace(config, reader="webdataset")
    before, open_before = set(children(os.getpid())), set(os.listdir("/proc/self/fd"))
    instance = make(config, tiny.tokenizer, PACKS, 0, 1, 0)
    steps = iter(instance)
    next(steps)
    assert set(children(os.getpid())) - before
    instance.close()
    assert not set(children(os.getpid())) - before
    assert set(os.listdir("/proc/self/fd")) <= open_before
    assert next(steps, None) is None
    assert next(iter(instance))  # from the state on
    instance.close()
    assert not set(children(os.getpid())) - before


def test_the_shares_that_a_schedule_wants_change_with_the_tokens(tiny):
    config = tiny.config()
    scheduled = replace(config.sources["texts"], schedule=((500.0, 6.0),))
    config = replace(config, sources=config.sources | {"texts": scheduled})
    for make in (PackLoader, StreamLoader):
        made = make(config, tiny.tokenizer, PACKS, 0, 1, 0)
        assert made.shares(499) == {"pictures": pytest.approx(2 / 3), "texts": pytest.approx(1 / 3)}
        assert made.shares(500) == {"pictures": 0.25, "texts": 0.75}
        made.close()
