"""`qwen2vl plan`: what it foretells is what the loader then gives and what the sizes add up to; refusals are polite."""

import io
import json
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from data_pipelines.loader import PackLoader, open_sources
from qwen2vl_train.cli import main
from qwen2vl_train.config import EngineConfig, LearningRates, OptimConfig, StageConfig
from qwen2vl_train.model.config import ModelConfig, TextConfig
from qwen2vl_train.model.cost import PackLengths, pack_flops
from qwen2vl_train.overrides import load_config
from qwen2vl_train.plan.forecast import forecast
from qwen2vl_train.plan.hardware import find_hardware
from qwen2vl_train.plan.memory import Setting, candidates, common_ranks, heaviest_packs, rank_memory
from qwen2vl_train.plan.page import page
from qwen2vl_train.plan.rehearsal import rehearse
from tests.data.tiny_shards import make_tiny_shards
from tests.model.builders import model_config

PACKS = 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_shards(tmp_path_factory.mktemp("tiny"))


def stage_of(tiny, steps=6, trainable=("vit", "merger", "llm"), **kwargs):
    return StageConfig(trainable, steps, PACKS, OptimConfig(LearningRates(1e-3, 1e-3, 1e-3)), tiny.config(**kwargs))


@pytest.fixture(scope="module")
def rehearsed(tiny):
    """A rehearsal of six steps, and the batches that the loader makes of them."""
    stage = stage_of(tiny)
    sources = open_sources(stage.data, tiny.tokenizer)
    found = rehearse(stage, model_config(), sources, ranks=2, seed=0)
    loader = PackLoader(stage.data, tiny.tokenizer, PACKS, 0, 1, seed=0)
    steps = iter(loader)
    batches = [batch for _ in range(6) for batch in next(steps)]
    loader.close()
    return found, batches


def test_tokens_samples_and_fill_are_those_of_the_packs_that_training_gets(rehearsed):
    found, batches = rehearsed
    assert (found.steps, found.packs) == (6, 24)
    assert found.tokens == sum(batch.num_tokens for batch in batches)
    assert found.fill == pytest.approx(found.tokens / (24 * 192))
    assert found.longest_pack == max(batch.num_tokens for batch in batches)
    for number, source in enumerate(found.sources):
        assert source.planned_samples == sum(batch.datasets.count(number) for batch in batches)
    media = sum(batch.vision_index.shape[0] for batch in batches)
    assert sum(source.planned_media_tokens for source in found.sources) == media


def test_flops_are_those_of_the_decoded_packs(rehearsed):
    found, batches = rehearsed
    trainable = ("vit", "merger", "llm")
    counted = [pack_flops(model_config(), PackLengths.of(batch), trainable) for batch in batches]
    # a pack without a picture runs the ViT on a dummy of 4 patches: not planned, and nothing beside real ones
    for part in ("vit", "merger", "llm"):
        assert found.flops[part] == pytest.approx(sum(getattr(one, part) for one in counted), rel=2e-3)
    # every record was read to learn the supervised share, but samples are drawn unequally often
    assert found.flops["head"] == pytest.approx(sum(one.head for one in counted), rel=0.05)
    assert found.supervised == pytest.approx(sum(batch.num_supervised for batch in batches), rel=0.05)


def test_the_mixture_got_is_near_the_one_wanted_and_epochs_count_usable_samples(rehearsed):
    found, _ = rehearsed
    pictures, texts = found.sources
    assert (pictures.samples, pictures.usable, texts.samples, texts.usable) == (20, 20, 15, 15)
    assert pictures.wanted == pytest.approx(2 / 3)
    assert pictures.got == pytest.approx(2 / 3, abs=0.05)
    assert found.epochs(texts, 12) == pytest.approx(2 * texts.planned_samples / 15)


def test_ranks_are_more_even_with_packs_of_like_cost_side_by_side(rehearsed):
    found, _ = rehearsed
    assert found.imbalance >= found.imbalance_sorted >= 1


def test_a_plan_longer_than_asked_for_stops_and_says_how_far_it_came(tiny):
    stage = stage_of(tiny, steps=1000)
    found = rehearse(stage, model_config(), open_sources(stage.data, tiny.tokenizer), 1, 0, max_packs=9)
    assert found.steps == 2  # whole steps of 4 packs


def test_a_stage_of_so_many_tokens_is_planned_until_the_step_that_reaches_them(tiny, rehearsed):
    six, _ = rehearsed
    for tokens, steps in ((six.tokens, 6), (six.tokens + 1, 7)):
        stage = replace(stage_of(tiny), steps=0, tokens=tokens)
        assert rehearse(stage, model_config(), open_sources(stage.data, tiny.tokenizer), 2, 0).steps == steps


def scheduled(tiny, from_tokens, packs=3, **length):
    """Pictures alone from the beginning, texts alone from `from_tokens` on."""
    stage = stage_of(tiny, pictures=1.0, texts=0.0)
    pictures, texts = (stage.data.sources[name] for name in ("pictures", "texts"))
    pictures = replace(pictures, schedule=((from_tokens, 0.0),))
    texts = replace(texts, schedule=((from_tokens, 1.0),))
    data = replace(stage.data, sources={"pictures": pictures, "texts": texts})
    return replace(stage, data=data, packs_per_step=packs, **length)


def rehearse_tiny(stage, tiny, max_packs=4000):
    return rehearse(stage, model_config(), open_sources(stage.data, tiny.tokenizer), 1, 0, max_packs)


@pytest.mark.parametrize("length", [{"steps": 0, "tokens": 800_000}, {"steps": 1500}], ids=["tokens", "steps"])
def test_a_phase_of_the_mixture_beyond_the_packs_planned_counts_by_its_tokens(tiny, length):
    found = rehearse_tiny(scheduled(tiny, 200_000, **length), tiny, max_packs=150)
    assert [part.from_tokens for part in found.slices] == [0, 200_000]
    first, second = found.slices
    assert 45 <= first.steps + second.steps == found.steps <= 50
    assert first.of_steps == pytest.approx(200_000 / (3 * 192), rel=0.15)  # packs are 90% full
    assert found.stage_steps == pytest.approx(first.of_steps + second.of_steps, abs=1)
    if not length["steps"]:
        assert found.stage_steps * found.tokens_per_step == pytest.approx(800_000, rel=0.001)
    pictures, texts = found.sources
    every = found.stage_steps / found.steps
    assert pictures.planned_tokens * every == pytest.approx(200_000, rel=0.02)
    assert pictures.wanted == pytest.approx(pictures.got)  # the pool is filled anew where the plan skips ahead
    assert found.epochs(pictures, found.stage_steps) == pytest.approx(pictures.planned_samples * every / 20)
    assert texts.planned_tokens == pytest.approx(found.tokens - pictures.planned_tokens)


def test_a_stage_that_is_planned_whole_has_the_packs_of_its_phases_exactly(tiny):
    stage = scheduled(tiny, 2000, steps=12)
    found = rehearse_tiny(stage, tiny)
    loader = PackLoader(stage.data, tiny.tokenizer, 3, 0, 1, seed=0)
    batches = [batch for _, step in zip(range(12), loader, strict=False) for batch in step]
    loader.close()
    assert [(part.from_tokens >= 2000, part.steps, part.of_steps) for part in found.slices] == [
        (False, 4, 4),  # 2,000 tokens are four steps of 3 x 192
        (True, 8, 8),
    ]
    assert (found.steps, found.stage_steps) == (12, 12)
    assert found.tokens == sum(batch.num_tokens for batch in batches)
    for number, source in enumerate(found.sources):
        assert source.planned_samples == sum(batch.datasets.count(number) for batch in batches)


def test_a_phase_behind_the_stages_end_is_not_planned(tiny):
    for length in ({"steps": 5}, {"steps": 0, "tokens": 3000}):
        assert len(rehearse_tiny(scheduled(tiny, 3000, **length), tiny).slices) == 1


def test_what_is_planned_follows_from_counts_alone(tiny, monkeypatch):
    stage = stage_of(tiny, steps=1000)
    assert rehearse_tiny(stage, tiny, 40) == rehearse_tiny(stage, tiny, 40)
    samples = sum(source.planned_samples for source in rehearse_tiny(stage_of(tiny, steps=1), tiny).sources)
    monkeypatch.setattr("qwen2vl_train.plan.rehearsal.PLANNED_SAMPLES", int(3 * samples))
    assert rehearse_tiny(stage, tiny).steps == 3


def test_the_peak_is_that_of_the_precision_that_runs():
    """Nothing switches TF32 on: float32 runs beside the tensor cores."""
    assert torch.get_float32_matmul_precision() == "highest"
    assert find_hardware("h100", 8, "bf16").peak_flops == 989e12
    assert find_hardware("h100", 8, "fp32").peak_flops == 67e12
    assert find_hardware("A100", 8, "fp32").peak_flops == 19.5e12


def test_without_shards_a_length_in_tokens_is_counted_in_full_packs():
    words = ["stages.vision.steps=0", "stages.vision.tokens=1000000000", "stages.vision.schedule.warmup_steps=0"]
    (stage,) = forecast(run_of("stage=vision", *words), find_hardware("H100", 8, "bf16"), 0.4).stages
    assert stage.steps == 477  # 1e9 / (128 * 16,384)


def test_the_heaviest_packs_fill_both_budgets_and_their_parts_with_ranks_that_share(tiny):
    stage = stage_of(tiny, max_tokens=256)
    packs = heaviest_packs(stage)
    assert [pack.patches for pack in packs] == [0, 256, 512, 768, 1024]
    assert [pack.supervised for pack in packs] == [256, 192, 128, 64, 0]
    shared = heaviest_packs(stage, 4)
    assert [pack.tokens for pack in shared] == [64] * 5
    # a picture of 36 x 784 pixels has 144 patches; a frame of a clip at most 602,112 pixels, 3,072 patches: it stays
    # whole, so a rank that shares holds as much as the pack has
    assert [pack.patches for pack in shared] == [0, 256, 512, 768, 1024]


SEVEN = ModelConfig(text=TextConfig(152_064, 3584, 18_944, 28, 28, 4), tie_word_embeddings=False)


def test_memory_of_the_7b_on_eight_ranks_by_hand(tiny):
    count, stage, engine = 8_291_375_616, stage_of(tiny), EngineConfig()
    setting = Setting(3, "bf16", False, False, 1, 1, 1)
    memory = rank_memory(SEVEN, stage, engine, setting, 8)
    assert (memory.parameters, memory.gradients, memory.optimizer) == (2 * count // 8, 4 * count // 8, 12 * count // 8)
    assert memory.gathered == 2 * 1_000_000_000  # max_live_parameters
    assert memory.buckets == 2 * 50_000_000 * 4  # one is reduced while the next fills
    matrix = 152_064 * 3584
    assert memory.activations > 6 * matrix  # the output matrix's gradient, summed in float32, then in bf16
    everything = rank_memory(SEVEN, stage, engine, replace(setting, offload_optimizer=True, offload_parameters=True), 8)
    assert (everything.parameters, everything.host) == (0, 22 * count // 8)


@pytest.mark.parametrize(
    ("zero_stage", "precision", "gradients", "host"),
    [
        # bytes for each parameter of a rank's eighth; an engine holds these (measured)
        (1, "bf16", 8 * 4 + 4, 18),  # grad_accum of all, flat float32 share; masters 4, .grad 4, moments 8, weights 2
        (2, "bf16", 4, 18),
        (3, "bf16", 0, 20),  # masters, .grad, moments, grad_partitions_flat_buffer 4
        (1, "fp32", 8 * 4, 20),  # .grad of all; masters, .grad, moments, weights 4
        (2, "fp32", 4, 24),  # and accumulated_grads_in_cpu 4
        (3, "fp32", 0, 20),
    ],
)
def test_offloading_leaves_gradients_on_the_gpu_in_stages_1_and_2(tiny, zero_stage, precision, gradients, host):
    eighth, stage, engine = 8_291_375_616 // 8, stage_of(tiny), EngineConfig()
    setting = Setting(zero_stage, precision, False, False, 1, 1, 1)
    plain = rank_memory(SEVEN, stage, engine, setting, 8)
    offloaded = rank_memory(SEVEN, stage, engine, replace(setting, offload_optimizer=True), 8)
    assert (offloaded.gradients, offloaded.optimizer) == (gradients * eighth, 0)
    assert (plain.host, offloaded.host) == (0, host * eighth)
    # temp_grad_buffer_for_gpu_offload holds the largest parameter
    largest = 152_064 * 3584 * setting.element_bytes if zero_stage < 3 else 0
    assert offloaded.buckets == plain.buckets + largest


def test_settings_that_could_not_run_are_not_proposed():
    found = list(candidates(Setting(3, "bf16", False, False, 0, 0, 1), heads=28, gpus=8, packs_per_step=[12]))
    assert {setting.sequence_parallel for setting in found} == {2, 4}  # 8 ranks do not divide 12 packs; 8 not 28 heads
    assert 0 not in {setting.zero_stage for setting in found}  # bf16 wants float32 masters
    assert all(setting.zero_stage == 3 for setting in found if setting.offload_parameters)
    assert common_ranks([12, 8]) == 4


def run_of(*overrides):
    return load_config(["experiment=qwen2vl_7b", *overrides], allow_missing=True)[0]


def test_published_sizes_need_no_shards_and_the_page_says_so():
    plan = forecast(run_of(), find_hardware("H100", 8, "bf16"), 0.4)
    assert plan.fits
    assert plan.best.setting.zero_stage == 2  # recomputing every block and cut gradients are enough
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(page(plan))
    said = console.export_text()
    assert "no shards at hand" in said
    assert "The configured settings fit" in said


def test_streamed_shards_have_no_plan_and_are_said_to():
    run = load_config(
        ["experiment=qwen2vl_7b", "data.root=/shards", "data.tokenizer=/start", "stages.vision.data.reader=webdataset"]
    )[0]
    assert "stage vision streams its shards" in forecast(run, find_hardware("H100", 8, "bf16"), 0.4).no_data


def test_the_vocabulary_follows_the_tokenizer_of_streamed_shards_too(tiny):
    run = run_of(
        f"data.tokenizer={tiny.folder}/tokenizer", "data.root=/shards", "stages.vision.data.reader=webdataset",
        "model.config.text.vocab_size=0",
    )  # fmt: skip
    plan = forecast(run, find_hardware("H100", 8, "bf16"), 0.4)
    assert plan.no_data
    assert plan.model.text.vocab_size == tiny.tokenizer.vocab_size


def test_what_does_not_fit_is_refused_with_what_would(capsys):
    assert main(["plan", "experiment=qwen2vl_7b", "--gpus", "4", "--gpu", "card", "--gpu-memory", "48"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "The configured settings do not fit" in said
    assert "engine.offload_optimizer=true" in said


def test_what_no_setting_can_fit_names_the_number_of_gpus_that_would():
    run = load_config(["experiment=qwen2vl_72b"], allow_missing=True)[0]
    plan = forecast(run, find_hardware("H100", 1, "bf16"), 0.4)
    assert not plan.fits
    assert plan.fewest_gpus == 64  # 32 would hold 41 GB of state and 48 GB of a pack
    assert plan.best is None or plan.best.setting.offload_parameters


def plan_tiny(tiny, stage="vision", weights="weight: 1"):
    """Arguments that plan a stage of the demo's on the tiny pictures."""
    return [
        "plan", "experiment=demo", f"stage={stage}", f"data.root={tiny.folder}",
        "data.tokenizer=${data.root}/tokenizer", f"~stages.{stage}.data.sources",
        f"stages.{stage}.data.sources={{pictures: {{shards: ['{tiny.folder}/pictures-*.tar'], {weights}}}}}",
    ]  # fmt: skip


@pytest.mark.parametrize("columns", [80, 120])
def test_the_page_cuts_no_figure_and_no_heading_at_80_columns(tiny, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    schedule = "schedule: [[4e6, 2.0]]"
    options = ["--tokens", "20e6", "--packs", "60", "--gpus", "2"]
    assert main([*plan_tiny(tiny, "multitask", schedule), *options]) == 0
    said = capsys.readouterr().out
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= columns
    facts = dict(re.findall(r"^│ +([\w ]+?) +│ +(\S.*?) +│$", said, re.MULTILINE))
    steps = int(facts["steps"].replace(",", ""))
    assert 9766 <= steps < 2 * 9766  # 20e6 / (2 x 1,024) where packs are full
    assert facts["packs a step"] == "2"
    assert facts["tokens"] == "20 M"
    assert re.fullmatch(r"\d\d\.\d%", facts["ViT"])
    words = " ".join(said.split())
    assert f"multitask: 30 of {steps:,} steps planned, 60 packs; the rest extrapolated by phase" in words
    assert re.search(r"\(6 of [\d,]+ from 0 tokens, 24 of [\d,]+ from 4 M tokens\)", words)


def test_stages_beyond_what_a_table_has_room_for_get_another(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("qwen2vl_train.plan.page.STAGES_A_TABLE", 2)
    main(["plan", "experiment=qwen2vl_7b"])
    heads = [re.findall(r"\w+", line) for line in capsys.readouterr().out.splitlines() if line.startswith("┃")]
    assert heads[:2] == [["vision", "multitask"], ["instruct"]]


def test_the_figures_for_machines_are_json(tiny, capsys):
    options = ["--tokens", "1e6", "--packs", "60", "--gpus", "2", "--peak-flops", "1e12", "--mfu", "0.5", "--json"]
    assert main([*plan_tiny(tiny), *options]) == 0
    plan = json.loads(capsys.readouterr().out)
    stage = plan["stages"]["vision"]
    data = stage["data"]
    assert stage["steps"] == -(-1_000_000 * data["steps"] // data["tokens"])
    assert stage["seconds"] == pytest.approx(stage["steps"] * data["flops_per_step"] / (0.5 * 1e12 * 2))
    assert data["sources"][0]["wanted"] == data["sources"][0]["got"] == 1
    assert plan["no_data"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--gpus", "3"],
            r"packs_per_step=128 is not a multiple of the 3 rank\(s\).*use --gpus 2, or packs_per_step=129",
        ),
        (["--gpus", "8", "engine.sequence_parallel=3"], r"sequence_parallel=3 does not divide --gpus 8"),
        (["--gpu", "abacus"], r"--gpu abacus: known are A100"),
        (["--mfu", "40"], r"--mfu=40\.0: a share of the peak"),
        (["--tokens", "1e9"], r"--tokens=1e\+09 needs shards"),
        (["--tokens", "inf"], r"--tokens=inf: must be finite and above 0"),
        (["--tokens", "nan"], r"--tokens=nan: must be finite and above 0"),
        (["--gpu-memory", "nan"], r"--gpu-memory=nan: must be finite and above 0"),
        (["--peak-flops", "nan"], r"--peak-flops=nan: must be finite and above 0"),
        (["--peak-flops", "inf"], r"--peak-flops=inf: must be finite and above 0"),
        (["model.config.text.vocab_size=0"], r"vocab_size=0: 0 follows the tokenizer, which is not given"),
    ],
)
def test_mistakes_name_the_value_and_what_to_do(options, message, capsys):
    assert main(["plan", "experiment=qwen2vl_7b", *options]) == 2
    assert re.search(message, capsys.readouterr().err)
