"""Configuration: every YAML composes, and every mistake names its key, its value and a remedy."""

from pathlib import Path

import pytest
import yaml

from qwen2vl_train.cli import main
from qwen2vl_train.compose import NOT_GIVEN
from qwen2vl_train.config import ConfigError
from qwen2vl_train.overrides import config_dir, load_config

PLACES = {
    "demo": [],
    "real": ["data.root=/shards", "data.tokenizer=/tokenizer"],
    "qwen2vl_2b": ["data.root=/shards", "data.tokenizer=/tokenizer", "stages.vision.init_from=/start"],
    "qwen2vl_7b": ["data.root=/shards", "data.tokenizer=/tokenizer", "stages.vision.init_from=/start"],
    "qwen2vl_72b": ["data.root=/shards", "data.tokenizer=/tokenizer", "stages.vision.init_from=/start"],
}


def test_every_experiment_file_is_listed_here():
    assert {path.stem for path in (config_dir() / "experiment").glob("*.yaml")} == set(PLACES)


@pytest.mark.parametrize("experiment", PLACES)
def test_experiments_compose_and_follow_the_papers_stages(experiment):
    run, settings = load_config([f"experiment={experiment}", *PLACES[experiment]])
    assert run.stages["vision"].trainable == ("vit", "merger")
    assert run.stages["multitask"].trainable == ("vit", "merger", "llm")
    assert run.stages["instruct"].trainable == ("llm",)
    assert run.chain[-3:] == ("vision", "multitask", "instruct")
    assert settings["run_dir"] == run.run_dir == f"runs/{experiment}"


@pytest.mark.parametrize("experiment", ["real", "qwen2vl_2b", "qwen2vl_7b", "qwen2vl_72b"])
def test_experiments_on_real_images_pack_16384_tokens(experiment):
    run, _ = load_config([f"experiment={experiment}", *PLACES[experiment]])
    papers = [run.stages[name] for name in ("vision", "multitask", "instruct")]
    assert {stage.data.plan.max_tokens for stage in papers} == {16384}
    assert {stage.data.media.max_media_tokens for stage in papers} == {16384}


def test_stage_is_short_for_a_chain_of_one():
    run, _ = load_config(["experiment=demo", "stage=vision"])
    assert run.chain == ("vision",)


def test_a_missing_place_is_named():
    with pytest.raises(ConfigError, match=r"data\.root"):
        load_config(["experiment=qwen2vl_2b"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.vision.stepz=4"], r"stages\.vision\.stepz = 4: unknown key; did you mean 'steps'\?"),
        (["modle=tiny"], r"modle = 'tiny': unknown key; did you mean 'model'\?"),
        (["stages.vision.steps=many"], r"stages\.vision\.steps = 'many': Input should be a valid integer"),
        (["stages.vision.optim.lr.vti=1"], r"optim\.lr\.vti = 1: unknown key; did you mean 'vit'\?"),
        (["stages.vision.trainable=[vit,llm]"], r"llm is trainable but optim\.lr\.llm is not positive"),
        (["stages.vision.schedule.warmup_steps=250"], r"warmup_steps=250 leaves nothing of steps=250"),
        (["stages.vision.tokens=1000000"], r"steps=300, tokens=1000000: a stage has one length; set one of them"),
        (["stages.vision.steps=0"], r"steps=0, tokens=0: a stage has one length"),
        (
            ["stages.vision.steps=0", "stages.vision.tokens=1000000"],
            r"schedule\.warmup_steps=20 in a stage of tokens=1000000: set it to 0 and schedule\.warmup_tokens instead",
        ),
        (["guard={spike_sigma: 6}", "checkpoint.every=0"], r"guard\.spike_sigma=6\.0 .* set checkpoint\.every"),
        (["watchdog={stall_s: 5400}"], r"watchdog\.stall_s=5400 is not below engine\.timeout_s=5400.* raise engine"),
        (["engine.timeout_s=600"], r"watchdog\.stall_s=900 is not below engine\.timeout_s=600"),
        (["engine.zero_stage=9"], r"engine\.zero_stage = 9: Input should be 0, 1, 2 or 3"),
        (["engine.zero_stage=2", "engine.offload_parameters=true"], r"offload_parameters=true needs zero_stage=3"),
        (
            ["stages.visoin.steps=3"],
            r"stages\.visoin = .*: unknown stage; did you mean 'vision'\? .* are language, vision,",
        ),
        (["~mixture.multitask.txt"], r"there is no mixture\.multitask\.txt to take out; known there: .*text"),
        (["shared.media.max_pixels=1,2"], r"several values; write a list, shared\.media\.max_pixels="),
        (["stage=visio"], r"chain=\['visio'\]: choose from the configured stages"),
        (["model.config.text.hidden_size=130"], r"hidden_size 130 is not divisible by num_attention_heads 4"),
        (["experiment=dmeo"], r"Could not find 'experiment/dmeo'.*demo"),
    ],
)
def test_mistakes_name_key_value_and_remedy(overrides, message):
    words = overrides if overrides[0].startswith("experiment=") else ["experiment=demo", *overrides]
    if any("warmup" in word for word in overrides):
        words.append("stages.vision.steps=250")
    with pytest.raises(ConfigError, match=message):
        load_config(words)


FINITE = "must be finite and not negative"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.vision.optim.clip_norm=nan", rf"stages\.vision\.optim.*clip_norm=nan {FINITE}"),
        ("stages.vision.optim.clip_norm=-1", rf"clip_norm=-1\.0 {FINITE}"),
        ("stages.vision.optim.weight_decay=nan", rf"weight_decay=nan {FINITE}"),
        ("stages.vision.optim.weight_decay=inf", rf"weight_decay=inf {FINITE}"),
        ("stages.vision.optim.eps=-1", rf"eps=-1\.0 {FINITE}"),
        ("stages.vision.optim.eps=0", "eps=0 lets AdamW divide by 0"),
        ("stages.vision.optim.betas=[nan,0.9]", r"betas=\(nan, 0\.9\) are outside"),
        ("checkpoint.min_free_gb=nan", rf"min_free_gb=nan {FINITE}"),
        ("checkpoint.keep=0", "keep=0 must be at least 1"),
        ("checkpoint.every=-1", "every=-1 must be at least 0"),
        ("engine.reduce_bucket_size=0", "reduce_bucket_size=0 must be at least 1"),
        ("engine.prefetch_bucket_size=-1", "prefetch_bucket_size=-1 must be at least 0"),
        ("engine.max_live_parameters=-1", "max_live_parameters=-1 must be at least 0"),
        ("engine.param_persistence_threshold=-1", "param_persistence_threshold=-1 must be at least 0"),
        ("engine.timeout_s=nan", "timeout_s=nan must be above 0 and finite"),
        ("guard={max_skipped: -1}", "max_skipped=-1 must be at least 1"),
        ("guard={max_skipped_in_row: 0}", "max_skipped_in_row=0 must be at least 1"),
        ("model.vision_checkpointing=-1", "vision_checkpointing=-1 must be at least 0"),
        ("model.text_checkpointing=-1", "text_checkpointing=-1 must be at least 0"),
        ("stages.vision.data.media.max_pixels=0", r"data\.media.*max_pixels=0: must be at least 784"),
        ("stages.vision.data.media.fps=nan", "fps=nan: must be above 0 and finite"),
        ("stages.vision.data.media.decode_timeout_s=0", r"decode_timeout_s=0\.0: must be above 0 and finite"),
        ("stages.vision.data.plan.max_patches=3", "max_patches=3: a token of a picture takes 4"),
        ("stages.vision.data.plan.pool_size=5000", "pool_size=5000: at most 4096"),
        ("chain=[language,language]", r"chain=\['language', 'language'\] names a stage twice"),
        ("run_dir=", "run_dir is empty: name a folder"),
        ("run_dir=' '", "run_dir is empty: name a folder"),
    ],
)
def test_values_without_meaning_are_refused_in_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(["experiment=demo", override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted((config_dir() / "engine").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_engine_composes_and_is_what_its_name_says(path):
    engine = load_config(["experiment=demo", f"engine={path.stem}"])[0].engine
    assert path.stem.startswith(f"zero{engine.zero_stage}")
    assert engine.offload_optimizer == ("offload" in path.stem)
    assert engine.offload_parameters == (path.stem == "zero3_offload")
    assert engine.precision == ("fp32" if path.stem in ("zero0", "zero3_cpu") else "bf16")


def test_a_value_set_behind_a_reference_changes_this_stage_and_nothing_else_in_it():
    run, _ = load_config(["experiment=demo", "stages.vision.data.media.max_pixels=50176"])
    assert run.stages["vision"].data.media.max_pixels == 50176
    assert run.stages["vision"].data.media.max_frames == 8  # as in shared.media, not the default of 768
    assert run.stages["multitask"].data.media.max_pixels == 31360


@pytest.mark.parametrize(
    "place", ["stages.vision.data.media.max_pixels=50176", "stages.vision.data.media={max_pixels: 50176}"]
)
def test_what_is_set_for_all_stages_reaches_one_with_a_value_of_its_own_in_any_order(place):
    for words in ([place, "shared.media.max_frames=4"], ["shared.media.max_frames=4", place]):
        media = load_config(["experiment=demo", *words])[0].stages["vision"].data.media
        assert (media.max_pixels, media.max_frames) == (50176, 4)


def test_a_source_weighed_anew_in_one_stage_keeps_its_shards_and_the_other_stages_weights():
    run, _ = load_config(["experiment=demo", "mixture.instruct.captions.weight=9", "~mixture.instruct.text"])
    instruct, multitask = (run.stages[name].data.sources for name in ("instruct", "multitask"))
    assert (instruct["captions"].weight, multitask["captions"].weight) == (9.0, 3.0)
    assert instruct["captions"].shards == multitask["captions"].shards
    assert ("text" in instruct, "text" in multitask) == (False, True)


def test_places_that_were_not_given_can_be_left_open():
    run, _ = load_config(["experiment=qwen2vl_2b"], allow_missing=True)
    assert run.data.root == run.data.tokenizer == NOT_GIVEN


def test_the_printed_configuration_shows_every_value_and_where_it_comes_from(capsys):
    assert main(["config", "experiment=demo", "mixture.vision.captions.weight=2"]) == 0
    printed = capsys.readouterr().out
    values = yaml.safe_load(printed)
    assert values["stages"]["vision"]["data"]["sources"]["captions"]["weight"] == 2
    assert values["mixture"]["vision"]["captions"]["weight"] == 2
    assert values["shared"]["media"]["max_frames"] == 8
    assert "      media:  # ${shared.media}\n" in printed
    assert "      sources:  # ${mixture.vision}\n" in printed
    assert "        fps: 2.0  # default\n" in printed
    assert "  tokenizer: data/demo/tokenizer  # ${data.root}/tokenizer\n" in printed


def test_a_stage_can_be_as_long_as_so_many_tokens():
    words = ["stages.vision.steps=0", "stages.vision.tokens=3000000", "stages.vision.schedule.warmup_steps=0"]
    run, _ = load_config(["experiment=demo", *words, "stages.vision.schedule.warmup_tokens=100000"])
    assert run.stages["vision"].length == 3_000_000


def test_another_folder_of_configs_can_be_used(tmp_path: Path):
    (tmp_path / "train.yaml").write_text("run_dir: runs/x\n")
    with pytest.raises(ConfigError, match="stages"):
        load_config([], tmp_path)
