"""`qwen2vl show`: an experiment's configuration gives the settings that decide its packs."""

import json
from argparse import ArgumentParser
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from data_pipelines.cli import main
from data_pipelines.config import DataConfig, LoaderConfig, MediaConfig, PlanConfig, SourceConfig
from data_pipelines.loader import PackLoader
from data_pipelines.plan.balance import PackCost
from data_pipelines.report.course import read_course
from data_pipelines.report.data_run import add_data_options, data_run_of, read_data_run
from qwen2vl_train.cli import main as qwen2vl
from qwen2vl_train.config import ConfigError, MonitorConfig
from qwen2vl_train.course import keep_settings
from qwen2vl_train.overrides import load_config
from qwen2vl_train.show import data_run
from qwen2vl_train.stages import _open_run
from qwen2vl_train.training.balancing import write_pack_cost
from qwen2vl_train.training.lock import RunLock
from qwen2vl_train.training.monitor import Monitor
from qwen2vl_train.training.trainer import Trainer
from qwen2vl_train.training.world import World
from tests.data.tiny_shards import make_tiny_shards
from tests.model.builders import model_config


def test_the_stage_seed_and_ranks_of_the_overrides_decide_the_packs():
    run, _ = load_config(["experiment=demo", "seed=7", "stages.multitask.packs_per_step=6"])
    settings = data_run(run, "multitask", 3)
    assert (settings.seed, settings.packs_per_step, settings.world) == (7, 6, 3)
    assert settings.data == run.stages["multitask"].data
    assert settings.tokenizer == run.data.tokenizer


def test_the_only_stage_needs_no_name():
    run, _ = load_config(["experiment=demo", "stage=vision"])
    assert data_run(run, None, 1).data == run.stages["vision"].data


def test_a_pack_far_beyond_the_experiment_is_refused_before_anything_is_planned(capsys):
    words = ["show", "experiment=demo", "stage=vision", "stages.vision.steps=50", "--pack", "999999999"]
    assert qwen2vl(words) == 2
    assert "pack 999,999,999 lies far beyond the run, which is known to have 100 packs" in capsys.readouterr().err


def test_impossible_stages_and_ranks_are_refused():
    run, _ = load_config(["experiment=demo"])
    with pytest.raises(ConfigError, match=r"^say which stage with --stage: choose one of"):
        data_run(run, None, 1)
    with pytest.raises(ConfigError, match=r"^--stage dessert is no stage of this experiment: choose one of"):
        data_run(run, "dessert", 1)
    with pytest.raises(ConfigError, match="not a multiple of world=7"):
        data_run(run, "vision", 7)


def test_packs_are_dealt_by_the_cost_that_the_trainer_leaves_in_the_stage_folder(tmp_path):
    run, settings = load_config(["experiment=demo"])
    cost = data_run(run, "multitask", 2).cost
    assert cost is not None
    assert min(cost.per_token, cost.per_token_pair, cost.per_patch, cost.per_patch_pair) > 0
    (tmp_path / "config.json").write_text(json.dumps(settings))
    write_pack_cost(tmp_path / "multitask", cost)
    assert read_data_run(tmp_path, "multitask").cost == cost
    assert read_data_run(tmp_path, "instruct").cost is None


def start(folder, stage, ranks, *overrides):
    """What a start of one stage leaves of its settings; the stage's data has a source whose name holds a dot."""
    run, settings = load_config(["experiment=demo", f"run_dir={folder}", f"stage={stage}", *overrides])
    data = run.stages[stage].data
    data = replace(data, sources={**data.sources, "coco.v2": SourceConfig(("/s/*.tar",), schedule=((1e6, 2.0),))})
    run = replace(run, stages={**run.stages, stage: replace(run.stages[stage], data=data)})
    _open_run(run, folder, settings, World(0, ranks, 0, torch.device("cpu")), RunLock(folder))
    keep_settings(run, stage, world=ranks)
    return replace(data_run(run, stage, ranks), cost=None)


def test_a_later_start_of_another_stage_changes_nothing_of_the_packs_of_those_before(tmp_path):
    vision = start(tmp_path, "vision", 2, "stages.vision.steps=50")
    assert read_data_run(tmp_path, "vision") == vision
    others = ("seed=7", "data.tokenizer=/other", "stages.vision.packs_per_step=6", "stages.vision.steps=40")
    multitask = start(tmp_path, "multitask", 1, *others, "mixture.vision.captions.weight=9")
    assert (multitask.seed, multitask.tokenizer, multitask.world) == (7, "/other", 1)
    assert read_data_run(tmp_path, "multitask") == multitask
    assert read_data_run(tmp_path, "vision") == vision
    assert data_run_of(inspect_options("--config", str(tmp_path), "--stage", "vision")) == vision
    assert read_course(tmp_path, "vision", 2).packs == 100
    assert read_data_run(tmp_path, "instruct").seed == 7  # has not begun: as the last start would begin it


def inspect_options(*words):
    parser = ArgumentParser()
    add_data_options(parser)
    return parser.parse_args(words)


def test_settings_of_a_stage_of_an_older_run_go_with_the_ranks_and_the_loader_of_the_runs_last_start(tmp_path):
    vision = start(tmp_path, "vision", 2)
    path = tmp_path / "vision" / "settings.json"
    later = ("world", "data.tokenizer", "stages.vision.data.loader.", "stages.vision.data.remote.")
    kept = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith(later)}
    path.write_text(json.dumps(kept))
    multitask = start(tmp_path, "multitask", 1, "seed=7", "shared.loader.num_workers=5")
    data = replace(vision.data, loader=multitask.data.loader)
    assert read_data_run(tmp_path, "vision") == replace(vision, world=1, data=data)


@pytest.mark.parametrize("content", ["", '{"seed": 1, "sta', "\0" * 9, "[]", '{"seed": 3}'])
def test_damaged_settings_of_a_stage_are_named(tmp_path, content, capsys):
    start(tmp_path, "vision", 2)
    (tmp_path / "vision" / "settings.json").write_text(content)
    assert main(["show", str(tmp_path), "--stage", "vision", "--pack", "0"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/vision/settings.json is damaged" in said
    assert "restore it from a copy" in said


COST = PackCost(1.0, 0.01, 0.5, 0.001)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_shards(tmp_path_factory.mktemp("tiny"))


def data_of(tiny, weight):
    weights = {"pictures": 2.0, "texts": weight}
    return DataConfig(
        {name: SourceConfig((f"{tiny.folder}/{name}-*.tar",), weight) for name, weight in weights.items()},
        media=MediaConfig(max_pixels=28224),
        plan=PlanConfig(192, 768, pool_size=6, block_size=4),
        loader=LoaderConfig(num_workers=0),
    )


def train(tiny, folder, weight, steps, state=None):
    """What `steps` steps on two ranks leave, resumed from the checkpoint `state`: rank 0's packs and a checkpoint."""
    data = data_of(tiny, weight)
    stages = {"vision": {"steps": 100, "packs_per_step": 4, "data": asdict(data)}}
    settings = {"data": {"tokenizer": tiny.tokenizer.path}, "seed": 5, "stages": stages, "chain": ["vision"]}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "environment.json").write_text(json.dumps({"world_size": 2}))
    write_pack_cost(folder / "vision", COST)
    loader = PackLoader(data, tiny.tokenizer, 4, 0, 2, 5, cost=COST)
    progress = resume(folder / "vision", loader, state)
    given = [step for _, step in zip(range(steps), loader, strict=False)]
    loader.close()
    progress.step += steps
    path = folder / "vision" / "checkpoints" / f"step-{progress.step:08d}" / "state.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"progress": asdict(progress), "loader": loader.state_dict(), "world": 1}))
    return given, path


def resume(stage, loader, state):
    """The trainer's own way on from `state`, without a model."""
    trainer = object.__new__(Trainer)
    trainer._run, trainer._resume_from = SimpleNamespace(data_change="accept"), "auto"
    trainer._name, trainer._folder, trainer._model_config = "vision", stage, model_config()
    trainer._world = SimpleNamespace(size=1, from_main=lambda do: do())
    trainer._monitor = Monitor(stage.parent, MonitorConfig("disabled"), {}, active=False)
    path = None if state is None else state.parent
    store = SimpleNamespace(find=lambda resume: path, load=lambda engine, path: json.loads(state.read_text()))
    return trainer._resume(store, None, loader)


def shown(folder, out, *words):
    """The page that `qwen2vl-data show` writes: its title, packs' numbers and keys."""
    assert main(["show", str(folder), *words, "--out", str(out), "--processes", "1"]) == 0
    text = (out / "index.html").read_text()
    content = json.loads(text.split('<script type="application/json" id="content">')[1].split("</script>")[0])
    numbers = [pack["number"] for pack in content["packs"]]
    return content["title"], numbers, [document["key"] for document in content["documents"]]


def test_packs_behind_an_accepted_change_of_data_are_the_runs_and_those_before_it_refused(tiny, tmp_path, capsys):
    folder, out = tmp_path / "run", tmp_path / "page"
    folder.mkdir()
    before, state = train(tiny, folder, 1.0, steps=4)
    title, numbers, keys = shown(folder, out, "--step", "4", "--rank", "0")
    assert (numbers, keys) == ([b.number for b in before[3]], [key for b in before[3] for key in b.keys])
    after, later = train(tiny, folder, 4.0, steps=3, state=state)
    for step, packs in enumerate(after, 5):
        title, numbers, keys = shown(folder, out, "--step", str(step), "--rank", "0")
        assert (numbers, keys) == ([b.number for b in packs], [key for b in packs for key in b.keys])
    pack = after[2][1]
    title, numbers, keys = shown(folder, out, "--pack", str(pack.number))
    assert (title, numbers, keys) == (f"Pack {pack.number}: step 7, rank 0 of 2", [pack.number], list(pack.keys))
    # a checkpoint behind the change spares planning, one before it is of no use
    for path in (state, later):
        assert shown(folder, out, "--step", "8", "--state", str(path)) == shown(folder, out, "--step", "8")
    capsys.readouterr()
    for words in (["--pack", "15"], ["--step", "4"]):
        assert main(["show", str(folder), *words, "--out", str(out)]) == 2
        assert "was planned before the data changed at pack 16, after step 4 (shares changed" in capsys.readouterr().err
    # a resume behind the change keeps it
    again, _ = train(tiny, folder, 4.0, steps=1, state=later)
    assert shown(folder, out, "--step", "8", "--rank", "0")[2] == [key for b in again[0] for key in b.keys]
    assert len((folder / "vision" / "data_changes.jsonl").read_text().splitlines()) == 1
    # back to the checkpoint before the change, with the data of then: the run never had that change
    train(tiny, folder, 1.0, steps=9, state=state)
    assert shown(folder, out, "--step", "4", "--rank", "0")[1] == [b.number for b in before[3]]
