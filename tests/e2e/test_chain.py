"""The whole way in small: demo data, four stages on two ranks under ZeRO-3, evaluation, export, kill and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from data_pipelines.config import MediaConfig
from data_pipelines.encode.sample import SampleEncoder
from data_pipelines.index.build import Counting
from data_pipelines.index.source import SourceIndex
from data_pipelines.pack.collate import collate
from data_pipelines.tokenizer import TextTokenizer
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.qwen2vl import LogitsRequest, Qwen2VL
from qwen2vl_train.model.weights import load_hf
from tests.model.builders import reference_inputs

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["language", "vision", "multitask", "instruct"]
SMALL = [
    "data.demo={num_pictures: 120, num_clips: 24, num_texts: 60, num_heldout: 4, vocab_size: 1200}",
    *(f"stages.{stage}.steps=6" for stage in STAGES),
    *(f"stages.{stage}.schedule.warmup_steps=2" for stage in STAGES),
    "shared.plan.max_tokens=512",
    "checkpoint.every=2",
    "monitor.log_every=2",
    "evaluation.max_new_tokens=8",
]


def command(folder: Path, *overrides: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    places = [f"run_dir={folder / 'run'}", f"data.root={folder.parent / 'demo-data'}"]
    return [*launcher, "-m", "qwen2vl_train", "train", "experiment=demo", *places, *SMALL, *overrides]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *overrides),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("chain")
    result = run(folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return folder / "run", result.stdout


def losses(folder: Path, stage: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["stage"] == stage and "loss" in line}


@pytest.mark.distributed
def test_the_summary_holds_every_stage_and_is_the_last_line_printed(finished):
    folder, printed = finished
    path = Path(printed.strip().splitlines()[-1])
    assert path == folder / "summary.json"
    summary = json.loads(path.read_text())
    assert list(summary["stages"]) == STAGES
    assert summary["minutes"] > 0
    for name, stage in summary["stages"].items():
        assert {"tokens", "loss_first", "loss_last", "tokens_per_s", "fill", "held_out"} <= set(stage)
        assert stage["tokens"] > 0
        assert 0 < stage["fill"] <= 1
        if name != "language":
            wanted = {"caption_exact", "referring_acc50", "ocr_exact", "vqa_accuracy", "clip_direction"}
            assert wanted <= set(stage["held_out"])
    assert Path(summary["report"]).is_file()


@pytest.mark.distributed
def test_each_stage_says_what_trains_and_logs_the_mixture_it_gets_beside_the_wanted_one(finished):
    folder, _ = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in STAGES:
        trained = json.loads((folder / name / "result.json").read_text())["trained"]
        parts = json.loads((folder / name / "parameters.json").read_text())
        assert {part for part, counts in parts.items() if counts["trainable"]} == set(trained)
        assert all((counts["trainable"] == 0) != (counts["frozen"] == 0) for counts in parts.values())
        for line in lines:
            if line["stage"] == name and "loss" in line:
                wanted = {key: share for key, share in line.items() if key.endswith(".wanted")}
                assert sum(wanted.values()) == pytest.approx(1)
                assert sum(line[key.removesuffix(".wanted")] for key in wanted) == pytest.approx(1)


@pytest.mark.distributed
def test_the_export_loads_in_transformers_with_the_trainers_logits(finished):
    export = finished[0] / "instruct" / "export"
    theirs, loading = Qwen2VLForConditionalGeneration.from_pretrained(export, dtype="float32", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoTokenizer.from_pretrained(export).chat_template
    ours = Qwen2VL(ModelConfig.from_hf(export))
    load_hf(ours, export)
    tokenizer = TextTokenizer(export)
    encoder = SampleEncoder(tokenizer, "chatml", MediaConfig(min_pixels=3136, max_pixels=31360), 512)
    shard = str(finished[0].parent.parent / "demo-data" / "heldout" / "referring-00000.tar")
    source = SourceIndex("referring", [shard], Counting(tokenizer, "chatml"))
    _, record, _, read = next(source.records())
    batch = collate(0, [encoder.encode(record, read)[0]], tokenizer.special, 512)
    with torch.no_grad():
        mine = ours(LogitsRequest(batch, torch.arange(batch.num_tokens)))
        reference = theirs(**reference_inputs(batch)).logits[0]
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-4)


@pytest.mark.distributed
@pytest.mark.faults
def test_a_killed_rank_ends_the_run_and_the_same_command_continues_bitwise(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    process = subprocess.Popen(
        command(folder), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoints = folder / "run" / "multitask" / "checkpoints"
    deadline = time.monotonic() + 200
    while not (checkpoints / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = [child for child in psutil.Process(process.pid).children() if "qwen2vl_train" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    assert process.wait(60) != 0
    assert not (folder / "run" / "multitask" / "result.json").exists()

    again = run(folder)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "resumed from" in again.stdout
    for stage in STAGES:
        assert losses(folder / "run", stage) == losses(finished[0], stage), stage


@pytest.mark.distributed
def test_a_finished_run_is_not_trained_again(finished):
    folder = finished[0]
    before = (folder / "instruct" / "result.json").stat().st_mtime_ns
    again = run(folder.parent)
    assert again.returncode == 0
    assert (folder / "instruct" / "result.json").stat().st_mtime_ns == before


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.vision.packs_per_step=3", "packs_per_step=3 is not a multiple of the world size 2"),
        ("stages.vision.stepz=3", "did you mean 'steps'"),
        ("data.root=/nowhere data.demo=null", "/nowhere"),
    ],
    ids=["world size", "typo", "missing data"],
)
def test_bad_settings_end_all_ranks_with_one_clear_message(tmp_path, override, message):
    result = run(tmp_path, *override.split())
    assert result.returncode != 0
    assert message in result.stderr
