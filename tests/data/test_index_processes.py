"""Indexing in parallel and telling of it, called from a script as users write them: without a `__main__` guard."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.index import build, progress
from data_pipelines.index.build import build_missing
from data_pipelines.processes import map_in_processes
from data_pipelines.shards.writer import ShardWriter

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
print("the script runs")
from data_pipelines.config import DataConfig, LoaderConfig, PlanConfig, SourceConfig
from data_pipelines.index import build
from data_pipelines.loader import PackLoader
from data_pipelines.tokenizer import TextTokenizer

build.PARALLEL_FROM_BYTES = 1
data = DataConfig({"t": SourceConfig(("shards/*.tar",))}, plan=PlanConfig(64), loader=LoaderConfig(num_workers=0))
loader = PackLoader(data, TextTokenizer(TOKENIZER), packs_per_step=1, rank=0, world=1, seed=0)
for step, (pack,) in zip(range(2), loader):
    print("pack", pack.num_tokens > 0)
loader.close()
"""


def write_texts(folder, shards=3):
    with ShardWriter(folder / "shards", "t", max_records=4) as writer:
        for number in range(4 * shards):
            writer.write(f"{number:02d}", {"text": "a red dog sits on the green hill"}, {})
    return sorted(str(path) for path in (folder / "shards").glob("*.tar"))


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("fed", ["file", "stdin"])
def test_a_script_without_a_guard_indexes_in_parallel(tiny, tmp_path, fed):
    shards = write_texts(tmp_path)
    script = SCRIPT.replace("TOKENIZER", repr(tiny.tokenizer.path))
    (tmp_path / "script.py").write_text(script)
    with open(tmp_path / "script.py") as file:
        words, source = ([], file) if fed == "stdin" else (["script.py"], subprocess.DEVNULL)
        command = [sys.executable, *words]
        done = subprocess.run(
            command, stdin=source, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=180
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the script runs", "pack True", "pack True"]
    assert len(list((tmp_path / "shards" / ".index").glob("*.tar.index"))) == len(shards)


def die_of(task):
    if task == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "raise":
        raise ValueError("what no task should raise")
    return task.upper()


def test_a_task_that_ends_its_process_is_named_and_the_others_are_done():
    results = dict(map_in_processes(die_of, ["a", "bad", "b", "c"], 2, lambda task, code: f"{task} {code}"))
    assert results == {"a": "A", "b": "B", "c": "C", "bad": "bad -9"}


def test_what_a_task_raises_comes_with_its_traceback():
    with pytest.raises(ValueError, match="what no task should raise") as raised:
        list(map_in_processes(die_of, ["raise"], 1, lambda task, code: ""))
    assert "in die_of" in str(raised.value.__cause__)


def test_a_process_that_does_not_start_is_an_error_not_a_loop(monkeypatch):
    monkeypatch.setattr("data_pipelines.processes._START", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match=r"does not start \(exit 3\)"):
        list(map_in_processes(die_of, ["a", "b"], 2, lambda task, code: ""))


def test_a_shard_that_ends_its_process_is_an_error_with_its_name():
    outcome = build._lost(("https://host/web-7.tar?sig=secret", False), -9)
    assert outcome.done
    assert str(outcome.error).startswith("https://host/web-7.tar: the process that indexed it was ended by signal 9")


def test_ctrl_c_ends_the_processes_with_the_script(tmp_path):
    code = (
        "import os, sys, time\nfrom data_pipelines.processes import map_in_processes\n"
        "import slow\nlist(map_in_processes(slow.down, [0, 1], 2, print))\n"
    )
    (tmp_path / "slow.py").write_text(
        "import os, time\ndef down(task):\n    open(f'{task}.pid', 'w').write(f'{os.getpid()} ')\n    time.sleep(60)\n"
    )
    script = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    files = [tmp_path / "0.pid", tmp_path / "1.pid"]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text().endswith(" ") for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    script.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in script.communicate(timeout=60)[1]
    assert not any(Path(f"/proc/{file.read_text().strip()}").exists() for file in files)


def test_slow_indexing_is_told_on_stderr_and_quick_indexing_is_not(tmp_path, capsys, monkeypatch):
    shards = write_texts(tmp_path)
    build_missing(shards, None)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "QUIET_S", 0.1)
    load = build.load_index
    monkeypatch.setattr(build, "load_index", lambda *arguments: time.sleep(0.3) or load(*arguments))
    build_missing(shards, None, rebuild=True)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("indexing shards: 0 of 3 done")
    assert last.startswith("indexed 3 of 3 shards in")


def test_who_shows_progress_itself_is_not_talked_over(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    calls = []
    build_missing(write_texts(tmp_path, 2), None, progress=lambda shard, done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]
    assert capsys.readouterr().err == ""
