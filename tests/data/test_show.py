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
from data_pipelines.report.data_run import DataRun
from data_pipelines.report.show import Wanted, check_course, check_rank, check_reader, find_packs, load_plan

COST = PackCost(1.0, 0.01, 0.5, 0.001)


def run_of(tiny, cost=None, world=2):
    sources = {name: SourceConfig((f"{tiny.folder}/{name}-*.tar",), 1.0) for name in ("pictures", "texts")}
    plan = PlanConfig(192, 768, pool_size=6, block_size=4)
    data = DataConfig(sources, media=MediaConfig(max_pixels=28224), plan=plan, loader=LoaderConfig(num_workers=0))
    return DataRun(tiny.tokenizer.path, data, 5, 4, world, cost)


def loader_of(tiny, run, rank):
    return PackLoader(
        run.data, tiny.tokenizer, run.packs_per_step, rank=rank, world=run.world, seed=run.seed, cost=run.cost
    )


def content_of(page):
    text = (page / "index.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', text, re.DOTALL)[1])


@pytest.mark.parametrize("cost", [None, COST], ids=["in plan order", "dearest first"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_packs_of_a_step_and_rank_are_those_the_loader_gave(tiny, cost, rank):
    run = run_of(tiny, cost)
    steps = iter(loader_of(tiny, run, rank))
    given = [next(steps) for _ in range(5)][4]
    sources = open_sources(run.data, tiny.tokenizer)
    packs = find_packs(new_planner(run.data, sources, run.seed, cost), run, Wanted(step=5, rank=rank))
    reader = PackReader(sources, run.data, tiny.tokenizer)
    assert len(packs) == len(given) == 2
    for pack, batch in zip(packs, given, strict=True):
        rebuilt = reader[pack]
        assert (rebuilt.number, rebuilt.keys) == (batch.number, batch.keys)
        for name in ("input_ids", "labels", "position_ids", "image_patches"):
            assert torch.equal(getattr(rebuilt, name), getattr(batch, name)), name


def test_all_ranks_together_have_the_packs_of_the_step(tiny):
    run = run_of(tiny)
    sources = open_sources(run.data, tiny.tokenizer)
    both = [find_packs(new_planner(run.data, sources, 5), run, Wanted(step=3, rank=rank)) for rank in (0, 1)]
    together = find_packs(new_planner(run.data, sources, 5), run, Wanted(step=3))
    assert [pack.number for pack in together] == [8, 9, 10, 11]
    assert [pack.number for pack in both[0]] == [8, 10]
    assert [pack.number for pack in both[1]] == [9, 11]
    (alone,) = find_packs(new_planner(run.data, sources, 5), run, Wanted(pack=10))
    assert alone == both[0][1]


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
    load_plan(planner, run, Wanted(step=4), path)
    assert planner.number == 8
    items = [pack.items for pack in find_packs(planner, run, Wanted(step=4))]
    assert items == [pack.items for pack in find_packs(new_planner(run.data, sources, 5), run, Wanted(step=4))]
    with pytest.raises(ValueError, match="begins at pack 8, after pack 4"):
        load_plan(new_planner(run.data, sources, run.seed), run, Wanted(step=2), path)
    other = replace(run, data=replace(run.data, template="chatml"))
    with pytest.raises(ValueError, match="template: was plain, is chatml"):
        load_plan(new_planner(run.data, sources, run.seed), other, Wanted(step=4), path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no loader state"):
        load_plan(new_planner(run.data, sources, run.seed), run, Wanted(step=4), path)


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


def test_wrong_questions_say_what_there_is(tiny, tmp_path):
    run = run_of(tiny)
    with pytest.raises(ValueError, match="--step N"):
        Wanted()
    with pytest.raises(ValueError, match="counts from 1"):
        Wanted(step=0)
    with pytest.raises(ValueError, match="ranks 0 to 1"):
        check_rank(run, Wanted(step=1, rank=2))
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "spikes.jsonl").write_text('{"step": 9, "returned_to": 5}\n')
    check_course(tmp_path, "vision", 5)
    check_course(tmp_path, "vision", None)
    with pytest.raises(ValueError, match="from step 9 to 5"):
        check_course(tmp_path, "vision", 6)
    with pytest.raises(ValueError, match="from step 9 to 5"):
        check_course(tmp_path / "config.json", None, 6)  # a run of one stage needs no --stage
    with pytest.raises(ValueError, match="reader=webdataset: the packs of streamed shards cannot be rebuilt"):
        check_reader(replace(run, data=replace(run.data, reader="webdataset")))
    with pytest.raises(ValueError, match="needs --step"):
        check_rank(run, Wanted(pack=1, rank=0))
