"""`qwen2vl-data show`: the packs it rebuilds are the loader's, bit for bit."""

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml

from data_pipelines.cli import main
from data_pipelines.config import DataConfig, LoaderConfig, MediaConfig, PlanConfig, SourceConfig
from data_pipelines.loader import PackLoader, new_planner, open_sources
from data_pipelines.pack.read import PackReader
from data_pipelines.plan.balance import PackCost
from data_pipelines.report import show
from data_pipelines.report.course import Change, Course, read_course
from data_pipelines.report.data_run import DataRun
from data_pipelines.report.show import Wanted, check_rank, check_reader, find_packs, load_plan, read_state, title_of

COST = PackCost(1.0, 0.01, 0.5, 0.001)


def run_of(tiny, cost=None, world=2, packing="pool"):
    sources = {name: SourceConfig((f"{tiny.folder}/{name}-*.tar",), 1.0) for name in ("pictures", "texts")}
    plan = PlanConfig(192, 768, pool_size=6, block_size=4, packing=packing)
    data = DataConfig(sources, media=MediaConfig(max_pixels=28224), plan=plan, loader=LoaderConfig(num_workers=0))
    return DataRun(tiny.tokenizer.path, data, 5, 4, world, cost)


def loader_of(tiny, run, rank):
    return PackLoader(
        run.data, tiny.tokenizer, run.packs_per_step, rank=rank, world=run.world, seed=run.seed, cost=run.cost
    )


def content_of(page):
    text = (page / "index.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', text, re.DOTALL)[1])


@pytest.mark.parametrize(
    ("cost", "world", "rank", "packing"),
    [
        (None, 2, 0, "pool"),
        (None, 2, 1, "pool"),
        (COST, 2, 0, "pool"),
        (COST, 2, 1, "pool"),
        (COST, 1, 0, "pool"),
        (COST, 4, 3, "pool"),
        (COST, 2, 1, "balanced"),
        (COST, 2, 1, "task"),
        (None, 2, 1, "single"),
    ],
)
def test_the_packs_of_a_step_and_rank_are_those_the_loader_gave(tiny, cost, world, rank, packing):
    run = run_of(tiny, cost, world, packing)
    loader = loader_of(tiny, run, rank)
    steps = iter(loader)
    given = [next(steps) for _ in range(5)][4]
    loader.close()
    sources = open_sources(run.data, tiny.tokenizer)
    found = find_packs(new_planner(run.data, sources, run.seed, cost), run, Wanted(step=5, rank=rank))
    reader = PackReader(sources, run.data, tiny.tokenizer)
    assert len(found.packs) == len(given) == 4 // world
    assert set(found.ranks) == {rank}
    for pack, batch in zip(found.packs, given, strict=True):
        rebuilt = reader[pack]
        assert (rebuilt.number, rebuilt.keys) == (batch.number, batch.keys)
        for name in ("input_ids", "labels", "position_ids", "image_patches"):
            assert torch.equal(getattr(rebuilt, name), getattr(batch, name)), name
        alone = find_packs(new_planner(run.data, sources, run.seed, cost), run, Wanted(pack=batch.number))
        assert (alone.packs, alone.ranks, alone.step) == ([pack], [rank], 5)


def test_all_ranks_together_have_the_packs_of_the_step(tiny):
    run = run_of(tiny)
    sources = open_sources(run.data, tiny.tokenizer)
    both = [find_packs(new_planner(run.data, sources, 5), run, Wanted(step=3, rank=rank)).packs for rank in (0, 1)]
    together = find_packs(new_planner(run.data, sources, 5), run, Wanted(step=3))
    assert [pack.number for pack in together.packs] == [8, 9, 10, 11]
    assert [pack.number for pack in both[0]] == [8, 10]
    assert [pack.number for pack in both[1]] == [9, 11]
    assert title_of(run, Wanted(step=3), together) == "Step 3: rank 0 pack 8, 10; rank 1 pack 9, 11"
    alone = find_packs(new_planner(run.data, sources, 5), run, Wanted(pack=10))
    assert alone.packs == [both[0][1]]
    assert title_of(run, Wanted(pack=10), alone) == "Pack 10: step 3, rank 0 of 2"


def test_a_checkpoints_state_saves_planning_and_changes_nothing(tiny, tmp_path):
    run = run_of(tiny)
    loader = loader_of(tiny, run, 0)
    steps = iter(loader)
    for _ in range(2):
        next(steps)
    path = tmp_path / "state.json"
    path.write_text(json.dumps({"step": 2, "loader": loader.state_dict()}))
    sources = open_sources(run.data, tiny.tokenizer)
    planner = new_planner(run.data, sources, run.seed)
    load_plan(planner, run, 12, read_state(path), "it")
    assert planner.number == 8
    items = [pack.items for pack in find_packs(planner, run, Wanted(step=4)).packs]
    assert items == [pack.items for pack in find_packs(new_planner(run.data, sources, 5), run, Wanted(step=4)).packs]
    with pytest.raises(ValueError, match="it: begins at pack 8, after pack 4"):
        load_plan(new_planner(run.data, sources, run.seed), run, 4, read_state(path), "it")
    other = replace(run, data=replace(run.data, template="chatml"))
    with pytest.raises(ValueError, match=r"it: .*template: was plain, is chatml"):
        load_plan(new_planner(run.data, sources, run.seed), other, 12, read_state(path), "it")
    for content in ("{}", "[]", '{"plan": 3, "identity": {}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="no loader state"):
            read_state(path)
    with pytest.raises(ValueError, match="No such file"):
        read_state(tmp_path / "gone.json")


def test_the_command_writes_a_page_of_exactly_these_packs(tiny, tmp_path, capsys):
    settings = {
        "tokenizer": tiny.tokenizer.path,
        "seed": 5,
        "packs_per_step": 4,
        "world": 2,
        "data": {
            "sources": {
                "pictures": {"shards": [f"{tiny.folder}/pictures-*.tar"]},
                "texts": {"shards": [f"{tiny.folder}/texts-*.tar"]},
            },
            "plan": {"max_tokens": 192, "max_patches": 768, "pool_size": 6, "block_size": 4},
            "media": {"max_pixels": 28224},
        },
    }
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(settings))
    words = ["show", str(path), "--step", "3", "--rank", "1", "--out", f"{tmp_path}/page", "--processes", "1"]
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/page/index.html"
    content = content_of(tmp_path / "page")
    assert content["title"] == "Step 3, rank 1 of 2: pack 9, 11"
    assert [pack["number"] for pack in content["packs"]] == [9, 11]
    steps = iter(loader_of(tiny, run_of(tiny), 1))
    given = [next(steps) for _ in range(3)][2]
    assert [entry["key"] for entry in content["documents"]] == [key for batch in given for key in batch.keys]
    supervised = [sum(e["supervised"] for e in content["documents"] if e["pack"] == batch.number) for batch in given]
    assert supervised == [batch.num_supervised for batch in given]


def folder_of(tmp_path, steps=5, chain=("vision",), **files):
    """A run's folder of two stages; `files` of vision by name: lines."""
    stages = {name: {"steps": steps, "packs_per_step": 4} for name in ("vision", "multitask")}
    (tmp_path / "vision").mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"stages": stages, "chain": list(chain)}))
    for name, lines in files.items():
        (tmp_path / "vision" / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return tmp_path


def test_steps_behind_a_return_after_a_spike_are_refused_until_the_data_changed(tmp_path):
    spike = {"step": 9, "returned_to": 5, "packs": [{"pack": 32}, {"pack": 35}]}
    folder_of(tmp_path, spikes=[spike, {"step": 12, "returned_to": None, "packs": [{"pack": 44}]}])
    for config in (tmp_path, tmp_path / "config.json"):
        course = read_course(config, None, 4)  # a run that trains one stage needs no --stage
        assert course.first_pack(5, 4) == 16
        with pytest.raises(ValueError, match="from step 9 to 5"):
            course.first_pack(6, 4)
    assert course.step_of(19, 4) == (5, 16)
    assert course.step_of(20, 4) is None
    # steps 6 and 7 had packs 36 to 43; from step 8 on, counting goes on from the change
    change = {"step": 7, "pack": 44, "changes": ["more"], "loader": {}}
    course = read_course(folder_of(tmp_path, spikes=[spike], data_changes=[change]), "vision", 4)
    assert course.first_pack(8, 4) == 44
    assert course.step_of(50, 4) == (9, 48)


def test_a_line_that_is_damaged_is_left_out_of_the_course(tmp_path, caplog):
    spike = {"step": 9, "returned_to": 5, "packs": [{"pack": 32}]}
    path = folder_of(tmp_path, spikes=[spike]) / "vision" / "spikes.jsonl"
    path.write_text('{"step": 7, "retu{"step": 7}\n' + path.read_text())
    assert read_course(tmp_path, "vision", 4).spikes == [spike]
    assert caplog.messages == [f"{path}: 1 damaged line(s) left out"]


def test_steps_of_a_run_whose_steps_had_another_size_are_refused(tmp_path):
    folder_of(tmp_path)
    path = tmp_path / "vision" / "checkpoints" / "step-00000005" / "state.json"
    path.parent.mkdir(parents=True)
    for number in (20, 16):  # three steps of 4 and two of 2 packs
        path.write_text(json.dumps({"progress": {"step": 5}, "loader": {"plan": {"number": number}}}))
        course = read_course(tmp_path, "vision", 4)
        if number == 20:
            assert (course.first_pack(5, 4), course.step_of(17, 4)) == (16, (5, 16))
    with pytest.raises(ValueError, match=r"--step 4: not all steps .*=4 packs \(pack 16 follows step 5\); ask"):
        course.first_pack(4, 4)
    assert course.step_of(17, 4) is None


def test_packs_from_before_a_change_of_data_are_refused_with_what_rebuilds_them():
    changes = [Change(10, 40, ("shares changed",), {}), Change(20, 80, ("source a is new", "anew"), {})]
    course = Course("vision", changes)
    assert course.start(80) == course.start(95, given=44) == changes[1]
    assert course.start(95, given=88) is None  # the state that is given lies behind the change
    with pytest.raises(ValueError, match=r"pack 39 was planned before .* at pack 80, after step 20 \(source a"):
        course.start(39)
    with pytest.raises(ValueError, match=r"OVERRIDES --stage vision --pack 39$"):
        course.start(39)
    with pytest.raises(ValueError, match=r"--pack 79, with --state the state.json of a checkpoint from pack 40 on$"):
        course.start(79)
    assert course.start(79, given=44) is None
    assert course.start(course.first_pack(21, 4)) == changes[1]
    for step, size in ((20, 4), (20, 400)):  # the steps before may have been of other sizes
        with pytest.raises(ValueError, match="planned before the data changed"):
            course.start(course.first_pack(step, size))


def test_a_pack_far_beyond_the_run_is_refused_before_anything_is_planned(tmp_path):
    course = read_course(folder_of(tmp_path, steps=5), "vision", 4)
    course.check_reach(80)
    with pytest.raises(ValueError, match=r"pack 999,999,999 lies far beyond .* 20 packs"):
        course.check_reach(999_999_999)
    folder_of(tmp_path, steps=0)  # of so many tokens
    read_course(tmp_path, "vision", 4).check_reach(999_999_999)
    (tmp_path / "vision" / "checkpoints" / "step-00000100").mkdir(parents=True)
    assert read_course(tmp_path, "vision", 4).packs == 400
    lines = ({"stage": "vision", "step": 130, "loss": 1}, {"stage": "multitask", "step": 999})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"stage": "vis')
    assert read_course(tmp_path, "vision", 4).packs == 520


def test_a_long_way_is_told_on_stderr(tiny, monkeypatch, capsys):
    run = run_of(tiny)
    monkeypatch.setattr(show, "PROGRESS_S", 0.0)
    find_packs(new_planner(run.data, open_sources(run.data, tiny.tokenizer), 5), run, Wanted(pack=9))
    assert "planned 3 of 8 packs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {sources: {}}\ntokenizer: /t\nsede: 3", r"data.yaml: sede = 3: unknown key"),
        (
            "tokenizer: /t\ndata: {sources: {a: {shards: [x], weight: heavy}}}",
            r"a\.weight = 'heavy': Input should be a",
        ),
        (
            "tokenizer: /t\ndata: {sources: {}}\nworld: 3\npacks_per_step: 2",
            r"data.yaml: packs_per_step=2 is not a multiple",
        ),
        ("tokenizer: [/t", r"data.yaml is not YAML at line 1: expected"),
        ("just words", r"data.yaml: give settings \(tokenizer, data.*, not 'just words'"),
        ("stages: {vision: {}}", r"data.yaml: .*'data' is missing"),
        ("stages: {vision: {}, multitask: {}}", r"holds the stages vision, multitask: say which with --stage"),
    ],
)
def test_faults_of_a_file_of_settings_are_one_line_with_key_and_value(tmp_path, text, message, capsys):
    (tmp_path / "data.yaml").write_text(text)
    assert main(["show", f"{tmp_path}/data.yaml", "--pack", "1"]) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(message, said)
    assert "pydantic" not in said
    assert "input_value" not in said
    assert "\n" not in said


def test_wrong_questions_say_what_there_is(tiny):
    run = run_of(tiny)
    with pytest.raises(ValueError, match="--step N"):
        Wanted()
    with pytest.raises(ValueError, match=r"^--step 0: steps count from 1"):
        Wanted(step=0)
    with pytest.raises(ValueError, match=r"^--pack -1: packs count from 0"):
        Wanted(pack=-1)
    with pytest.raises(ValueError, match="ranks 0 to 1"):
        check_rank(run, Wanted(step=1, rank=2))
    with pytest.raises(ValueError, match="reader=webdataset: the packs of streamed shards cannot be rebuilt"):
        check_reader(replace(run, data=replace(run.data, reader="webdataset")))
    with pytest.raises(ValueError, match="needs --step"):
        check_rank(run, Wanted(pack=1, rank=0))
