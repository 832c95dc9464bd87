"""The store of checkpoints on its own: what is found, left, set aside and said; the engine is a stand-in."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwen2vl_train.config import CheckpointConfig
from qwen2vl_train.training import checkpoint, conversion
from qwen2vl_train.training.checkpoint import CheckpointError, CheckpointStore
from qwen2vl_train.training.manifest import fault_of
from qwen2vl_train.training.world import World


class Alone(World):
    """A world of one without a process group."""

    def barrier(self):
        return None

    def gather(self, item):
        return [item]

    def from_main(self, make):
        return make()


class Engine:
    """Holds one word."""

    signature = "zero_stage=0 precision=fp32"
    partitioned = False
    word = ""

    def checkpoint_bytes(self):
        return 1

    def save(self, folder):
        (folder / "engine").mkdir()
        (folder / "engine" / "word").write_text(self.word)

    def load(self, folder):
        self.word = (folder / "engine" / "word").read_text()


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def said():
    return []


def store_in(run, said, keep=9):
    world = Alone(0, 1, 0, torch.device("cpu"))
    return CheckpointStore(run / "main" / "checkpoints", CheckpointConfig(keep=keep, min_free_gb=0), world, said.append)


def fill(store, engine, *steps, course="a"):
    for step in steps:
        engine.word = f"{course}{step}"
        store.save(engine, step, {"stage": "main"})


def kept(run):
    return sorted(int(path.name[5:]) for path in (run / "main" / "checkpoints").glob("step-*"))


def latest(run):
    return (run / "main" / "checkpoints" / "latest").read_text()


def test_after_an_older_checkpoint_is_taken_auto_goes_on_from_it(tmp_path, engine, said):
    store = store_in(tmp_path, said)
    fill(store, engine, 1, 2, 3)
    older = str(tmp_path / "main" / "checkpoints" / "step-00000001")
    store.load(engine, store.find(older))
    assert (engine.word, latest(tmp_path), kept(tmp_path)) == ("a1", "step-00000001", [1])
    assert "step-00000003 is of the course that is left" in said[-1]
    assert store_in(tmp_path, said).find("auto").name == "step-00000001"  # also when killed before the next is written
    fill(store, engine, 2, course="b")
    assert (latest(tmp_path), kept(tmp_path)) == ("step-00000002", [1, 2])
    assert not list((tmp_path / "main" / "checkpoints").glob(".abandoned-*"))
    store.load(engine, store.find("auto"))
    assert engine.word == "b2"


def test_a_checkpoint_from_elsewhere_becomes_the_first_of_its_course_here(tmp_path, engine, said):
    fill(store_in(tmp_path / "other", said), engine, 2, course="b")
    elsewhere = shutil.move(tmp_path / "other" / "main" / "checkpoints" / "step-00000002", tmp_path / "copy")
    store = store_in(tmp_path, said)
    fill(store, engine, 1, 2, 3)
    store.load(engine, store.find(str(elsewhere)))
    assert (engine.word, kept(tmp_path), latest(tmp_path)) == ("b2", [2], "step-00000002")
    shutil.rmtree(elsewhere)
    found = store.find("auto")
    assert fault_of(found) is None
    store.load(engine, found)
    assert engine.word == "b2"


def elsewhere(tmp_path, engine, said, step):
    """A checkpoint of another run."""
    fill(store_in(tmp_path / "other", said), engine, step, course="b")
    return tmp_path / "other" / "main" / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize("step", [2, 3, 4], ids=["of a step between", "of the newest's step", "of a later step"])
def test_a_checkpoint_from_elsewhere_that_finds_no_room_leaves_the_course_as_it_was(
    tmp_path, engine, said, step, monkeypatch
):
    named = elsewhere(tmp_path, engine, said, step)
    store = store_in(tmp_path, said)
    fill(store, engine, 1, 2, 3)

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_link", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*make room"):
            store.load(engine, store.find(str(named)))
    assert {path.name for path in (tmp_path / "main" / "checkpoints").iterdir()} == {
        "step-00000001",
        "step-00000002",
        "step-00000003",
        "latest",
    }
    again = store_in(tmp_path, said)
    again.load(engine, again.find("auto"))
    assert (engine.word, latest(tmp_path)) == ("a3", "step-00000003")
    again.load(engine, again.find(str(named)))
    assert (engine.word, kept(tmp_path), latest(tmp_path)) == (f"b{step}", [step], f"step-{step:08d}")
    fill(again, engine, step + 1, course="b")
    assert not list((tmp_path / "main" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_killed_at_any_rename_while_another_course_is_taken_auto_finds_a_whole_one(
    tmp_path, engine, said, step, monkeypatch
):
    """The newest of the course that is left, or the one that was asked for; never none, never an older one."""
    named = elsewhere(tmp_path, engine, said, step)
    rename, found = Path.rename, []
    for killed_at in range(9):
        run = tmp_path / f"killed at {killed_at}"
        store, renamed = store_in(run, said), []
        fill(store, engine, 1, 2, 3)

        def killed(path, target, limit=killed_at, renamed=renamed):
            if len(renamed) == limit:
                raise KeyboardInterrupt
            renamed.append(path)
            return rename(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed)
            with suppress(KeyboardInterrupt):
                store.load(engine, store.find(str(named)))
        if len(renamed) < killed_at:
            break
        again = store_in(run, said)
        again.load(engine, again.find("auto"))
        found.append(engine.word)
    assert found[0] == "a3"
    assert found[-1] == f"b{step}"
    assert set(found) == {"a3", f"b{step}"}


def test_one_that_was_set_aside_can_be_gone_back_to(tmp_path, engine, said):
    store = store_in(tmp_path, said)
    fill(store, engine, 1, 2, 3)
    folder = tmp_path / "main" / "checkpoints"
    store.load(engine, store.find(str(folder / "step-00000001")))
    store.load(engine, store.find(str(folder / ".abandoned-step-00000003")))
    assert (engine.word, kept(tmp_path), latest(tmp_path)) == ("a3", [3], "step-00000003")
    store.load(engine, store.find("auto"))
    assert engine.word == "a3"


@pytest.mark.parametrize(
    "content", ["", "[1, 2]", '{"engine/word": 3}', '{"engine/word": [2, null]}', "\0" * 40], ids=repr
)
def test_a_damaged_manifest_is_passed_over(tmp_path, engine, said, content):
    store = store_in(tmp_path, said)
    fill(store, engine, 1, 2)
    (tmp_path / "main" / "checkpoints" / "step-00000002" / "manifest.json").write_text(content)
    assert store.find("auto").name == "step-00000001"
    assert "step-00000002 is passed over" in said[-1]
    assert "cannot be read" in said[-1]


def test_a_conversion_that_finds_no_room_is_told_with_what_to_do_and_writes_nothing(
    tmp_path, engine, said, monkeypatch
):
    store = store_in(tmp_path, said)
    fill(store, engine, 1)
    path = tmp_path / "main" / "checkpoints" / "step-00000001"
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"world": 2}))
    engine.partitioned = True
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    monkeypatch.setattr(conversion.subprocess, "run", None)
    with pytest.raises(CheckpointError, match=r"(?s)checkpoints has 0\.00 GB free.*make room.*as many ranks"):
        store.load(engine, path)
    assert not list(path.parent.glob(".*"))


def test_the_advice_to_start_anew_names_the_stage(tmp_path, engine, said):
    store = store_in(tmp_path, said)
    fill(store, engine, 1)
    path = tmp_path / "main" / "checkpoints" / "step-00000001"
    engine.signature = "zero_stage=3 precision=bf16"
    with pytest.raises(CheckpointError, match="stage=main resume=none"):
        store.load(engine, path)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="stage=main resume=none"):
        store.find("auto")


def test_a_checkpoint_that_cannot_be_removed_is_told_and_training_goes_on(tmp_path, engine, said, monkeypatch):
    store = store_in(tmp_path, said, keep=1)
    fill(store, engine, 1)

    def busy(path, *options, **more):
        raise OSError(39, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        fill(store, engine, 2)
    assert "step-00000001 could not be removed, training goes on" in said[-1]
    assert (kept(tmp_path), latest(tmp_path)) == ([1, 2], "step-00000002")
    fill(store, engine, 3)  # tried again
    assert kept(tmp_path) == [3]


def test_the_end_of_another_rank_is_no_fault_of_the_disk(tmp_path, engine, said):
    store = store_in(tmp_path, said)

    def save(folder):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")

    engine.save = save
    with pytest.raises(RuntimeError, match="Connection closed by peer") as caught:
        store.save(engine, 1, {})
    assert not isinstance(caught.value, CheckpointError)

    def full(folder):
        raise RuntimeError("PytorchStreamWriter failed writing file data/2: file write failed")

    engine.save = full
    with pytest.raises(CheckpointError, match="make room"):
        store.save(engine, 1, {})


def test_latest_names_what_auto_takes(tmp_path, engine, said):
    store = store_in(tmp_path, said, keep=2)
    for steps in ((1, 2, 3), (4,)):
        fill(store, engine, *steps)
        assert store.find("auto").name == latest(tmp_path)
    (tmp_path / "main" / "checkpoints" / "step-00000004" / "manifest.json").write_text("")
    store.load(engine, store.find("auto"))
    assert (latest(tmp_path), json.loads((store.find("auto") / "state.json").read_text())["step"]) == (
        "step-00000003",
        3,
    )


def test_files_of_a_rank_that_are_not_in_rank_0s_folder_are_not_published(tmp_path, engine, said, monkeypatch):
    """As where each node has a disk of its own under the same name: `latest` must not name it."""
    store = store_in(tmp_path, said)
    fill(store, engine, 1)
    monkeypatch.setattr(
        Alone, "gather", lambda world, item: [item, {"engine/other": (5, 0)}] if isinstance(item, dict) else [item]
    )
    with pytest.raises(CheckpointError, match=r"engine/other, which another rank wrote with 5 bytes.*all nodes share"):
        fill(store, engine, 2)
    assert (latest(tmp_path), kept(tmp_path)) == ("step-00000001", [1])
