"""`reader: webdataset` through the real trainer: stopped, continued by the same command, damage told, nothing lost."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data_pipelines.plan.progress import Progress
from data_pipelines.plan.stream import stream_order
from data_pipelines.shards.writer import ShardWriter
from data_pipelines.sources.bpe import train_bpe

ROOT = Path(__file__).resolve().parents[2]
SENTENCE = "a red dog sits on the hill "
SHARDS, PER_SHARD, POOL = 16, 6, 4
DAMAGED = 7  # its fourth sample's header is spoilt: the first three stay
STOP_AFTER, STEPS = 5, 20


def key(shard, row):
    return f"m{PER_SHARD * shard + row:03d}"


def keys_of(shards):
    """The usable samples of `shards`."""
    return {key(shard, row) for shard in shards for row in range(3 if shard == DAMAGED else PER_SHARD)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """96 texts in 16 shards, one of them damaged, and a tokenizer."""
    folder = tmp_path_factory.mktemp("stream")
    with ShardWriter(folder, "many", max_records=PER_SHARD) as writer:
        for number in range(SHARDS * PER_SHARD):
            writer.write(f"m{number:03d}", {"text": SENTENCE * (1 + number % 4)}, {})
    damaged = folder / f"many-{DAMAGED:05d}.tar"
    content = bytearray(damaged.read_bytes())
    place = content.index(key(DAMAGED, 3).encode())  # the name in the member's header, which its checksum covers
    content[place] ^= 1
    damaged.write_bytes(content)
    train_bpe([SENTENCE] * 20, folder / "tokenizer", vocab_size=300)
    return folder


def train(data, folder, *overrides, ranks=1, stop_after=0):
    """The command, ended."""
    settings = [
        "experiment=demo", "stage=language", "model=micro", "monitor.wandb=disabled", "monitor.log_every=1",
        f"run_dir={folder}/run", f"data.root={data}", "data.demo=null", "~data.heldout", "~mixture.language.text",
        f"mixture.language.many={{shards: ['{data}/many-*.tar']}}", "stages.language.data.reader=webdataset",
        "shared.plan.max_tokens=64", f"shared.plan.pool_size={POOL}", "shared.plan.window_shards=2",
        "stages.language.packs_per_step=2", f"stages.language.steps={STEPS}", "stages.language.schedule.warmup_steps=2",
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    alone = [sys.executable]
    launcher = [*alone, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*(launcher if ranks > 1 else alone), "-m", "tests.e2e.stream_worker",
         f"{folder}/keys", str(stop_after), *settings, *overrides],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def steps_of(folder):
    """The keys of each step, of all ranks together; the file is emptied."""
    ranks = []
    for path in sorted(folder.glob("keys.rank*")):
        ranks.append([json.loads(line) for line in path.read_text().splitlines()])
        path.unlink()
    return [[key for part in step for key in part] for step in zip(*ranks, strict=True)]


def check_continued(folder, before, after):
    """What the two halves of a run took: nothing lost, nothing repeated but shards that were under way."""
    checkpoint = folder / "run" / "language" / "checkpoints" / f"step-{STOP_AFTER:08d}"
    stream = json.loads((checkpoint / "state.json").read_text())["loader"]["stream"]
    assert stream["packs"] == 2 * STOP_AFTER
    progress = Progress.from_json(stream["sources"]["many"])
    assert progress.epoch == 0  # 93 samples take more than ten packs of 64 tokens
    order = stream_order(SHARDS, 0, "many", 0)
    done = {order[place] for place in range(SHARDS) if progress.done.get(0, 0) >> place & 1}
    rest = set(range(SHARDS)) - done
    first, second = ([key for step in steps for key in step] for steps in (before, after))
    assert 0 < len(done) < SHARDS
    assert keys_of(done) <= set(first)
    assert set(first) | set(second) == keys_of(range(SHARDS))
    # The rest of the epoch comes first, whole; the pool lets as many of the next one pass as it holds.
    assert set(second[: len(keys_of(rest)) - POOL]) <= keys_of(rest)
    assert keys_of(rest) <= set(second[: len(keys_of(rest)) + POOL])
    return {shard for shard in rest if keys_of([shard]) & set(first)}


@pytest.fixture(scope="module")
def continued(data, tmp_path_factory):
    """A run that was asked to stop, and the same command again (with other workers)."""
    folder = tmp_path_factory.mktemp("run")
    stopped = train(data, folder, "shared.loader.num_workers=1", stop_after=STOP_AFTER)
    assert stopped.returncode == 75, stopped.stderr[-4000:]
    assert f"stopped after step {STOP_AFTER} on SIGTERM" in " ".join(stopped.stderr.split())
    before = steps_of(folder)
    again = train(data, folder)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "resumed from" in again.stdout
    return folder, before, steps_of(folder)


def test_a_stopped_run_continues_by_shards_and_loses_no_sample(continued):
    folder, before, after = continued
    assert (len(before), len(after)) == (STOP_AFTER, STEPS - STOP_AFTER)
    under_way = check_continued(folder, before, after)
    assert len(under_way) <= 2 + POOL  # those open, and those whose last samples waited in the pool
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert max(Counter(key for step in before for key in step).values()) == 1


def test_a_broken_tar_is_told_in_the_ledger_and_the_figures(continued):
    stage = continued[0] / "run" / "language"
    lines = [json.loads(line) for line in (stage / "ledger-rank0.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in lines} == {"bad_header"}
    for line in lines:
        assert line["dataset"] == "many"
        assert f"many-{DAMAGED:05d}.tar" in line["key"]
        assert "3 samples before it are used" in line["message"]
    assert set(json.loads((stage / "result.json").read_text())["skipped"]) == {"many/bad_header"}


@pytest.mark.distributed
def test_two_ranks_continue_as_one(data, tmp_path):
    stopped = train(data, tmp_path, ranks=2, stop_after=STOP_AFTER)
    assert stopped.returncode != 0
    before = steps_of(tmp_path)
    assert len(before) == STOP_AFTER
    again = train(data, tmp_path)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "written by 2 rank(s)" in " ".join(again.stdout.split())
    check_continued(tmp_path, before, steps_of(tmp_path))


def test_a_shard_that_cannot_be_reached_ends_the_run_with_its_name(data, tmp_path):
    source = "{shards: ['http://127.0.0.1:9/gone-{0000..0003}.tar']}"
    result = train(data, tmp_path, f"mixture.language.many={source}", "stages.language.data.remote.retries=0")
    assert result.returncode == 2
    assert "http://127.0.0.1:9/gone-000" in result.stderr
    assert "cannot be opened" in result.stderr


def test_an_indexed_stage_indexes_its_shards_once_and_says_so(data, tmp_path):
    index = ["stages.language.data.reader=index", "stages.language.steps=2", "stages.language.schedule.warmup_steps=1"]
    said = []
    for number in range(2):
        result = train(data, tmp_path / str(number), *index)
        assert result.returncode == 0, result.stderr[-4000:]
        said.append("language: indexing 16 shards" in result.stdout)
    assert said == [True, False]


def test_held_out_shards_are_looked_for_as_the_stage_reads_remote_ones(data, tmp_path):
    result = train(
        data, tmp_path, "+data.heldout={caption: 'http://127.0.0.1:9/held-*.tar'}", "stages.language.evaluate=true",
        "stages.language.data.remote.retries=0",
    )  # fmt: skip
    assert result.returncode == 2
    assert "http://127.0.0.1:9/held-*.tar: cannot be listed: ClientConnectorError" in result.stderr
    assert "attempts" not in result.stderr
    assert not (tmp_path / "keys.rank0").exists()
