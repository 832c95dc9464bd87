"""The exported folder has the published form, file by file: what loaders of every release look for is there."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from data_pipelines.config import MediaConfig
from data_pipelines.errors import UserError
from data_pipelines.sources.bpe import CHAT_TEMPLATE, train_bpe
from data_pipelines.tokenizer import TextTokenizer
from qwen2vl_train import export
from qwen2vl_train.export import export_model, save_processing
from qwen2vl_train.model.weights import SINGLE_NAME, model_tensors
from qwen2vl_train.training.manifest import checksum
from qwen2vl_train.training.world import World
from tests.model.builders import tiny_model

PUBLISHED_FILES = {
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
}


class Alone(World):
    """A world of one without a process group."""

    def barrier(self):
        return None


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["a red dog sits on the green hill", "two birds fly"] * 20, folder, vocab_size=300)
    return TextTokenizer(folder)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "export"
    model, world = tiny_model(), Alone(0, 1, 0, torch.device("cpu"))
    export_model(
        model_tensors(model), model.config, tokenizer, MediaConfig(max_pixels=50_176), folder, torch.bfloat16, world
    )
    return folder


def test_every_published_file_is_there(exported):
    assert {path.name for path in exported.iterdir()} >= PUBLISHED_FILES


def test_the_pad_of_vision_is_the_tokenizers(exported, tokenizer):
    wanted = tokenizer.special.vision_end + 1  # the special tokens keep the published order
    assert read(exported / "config.json")["vision_token_id"] == wanted
    assert AutoTokenizer.from_pretrained(exported).convert_tokens_to_ids("<|vision_pad|>") == wanted
    assert AutoConfig.from_pretrained(exported).vision_token_id == wanted


def test_tokenizers_and_processors_find_the_published_template_where_they_look(exported):
    assert read(exported / "chat_template.json") == {"chat_template": CHAT_TEMPLATE}
    assert read(exported / "tokenizer_config.json")["chat_template"] == CHAT_TEMPLATE
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    told = AutoTokenizer.from_pretrained(exported).apply_chat_template(question, tokenize=False)
    assert told.endswith("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n")


def test_a_tokenizer_saved_by_transformers_5_leaves_in_the_form_that_4_reads(tokenizer, tmp_path):
    # 5.x writes `extra_special_tokens` as a list, on which 4.45 to 4.57 fail, and no `added_tokens_decoder`
    tokenizer.hf.save_pretrained(tmp_path / "saved")
    assert isinstance(read(tmp_path / "saved/tokenizer_config.json")["extra_special_tokens"], list)
    (tmp_path / "out").mkdir()
    save_processing(tmp_path / "out", TextTokenizer(tmp_path / "saved"), MediaConfig())
    settings = read(tmp_path / "out/tokenizer_config.json")
    assert "extra_special_tokens" not in settings
    assert len(settings["additional_special_tokens"]) == 13
    assert settings["added_tokens_decoder"][str(tokenizer.special.im_end)]["content"] == "<|im_end|>"
    assert settings["tokenizer_class"] == "Qwen2Tokenizer"


def test_the_exported_tokenizer_is_the_same_to_an_index(exported, tokenizer):
    assert TextTokenizer(exported).fingerprint == tokenizer.fingerprint


def test_the_published_tokenizers_files_come_out_as_they_went_in(shared_data, tmp_path):
    save_processing(tmp_path, TextTokenizer(shared_data / "tokenizer"), MediaConfig())
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json", "vocab.json"):
        assert read(tmp_path / name) == read(shared_data / "tokenizer" / name), name
    assert (tmp_path / "merges.txt").read_bytes() == (shared_data / "tokenizer" / "merges.txt").read_bytes()


def test_an_export_is_on_disk_before_it_takes_the_place_of_an_older_one_which_stays_until_then(
    tokenizer, tmp_path, monkeypatch
):
    """Flushed when renamed; a kill at the new one's rename leaves both beside each other, never neither."""
    folder, model, world = tmp_path / "export", tiny_model(), Alone(0, 1, 0, torch.device("cpu"))
    flushed = set()

    def write():
        export_model(model_tensors(model), model.config, tokenizer, MediaConfig(), folder, torch.float32, world)

    write()
    first = read(folder / "checksums.json")
    assert first["model.safetensors"] == [(folder / "model.safetensors").stat().st_size, checksum(folder / SINGLE_NAME)]
    rename = Path.rename
    monkeypatch.setattr(export, "flush_to_disk", lambda path: flushed.add(path.name))

    def killed(path, target):
        if path.name == ".writing-export":
            assert {entry.name for entry in path.iterdir()} | {path.name} <= flushed
            raise KeyboardInterrupt
        return rename(path, target)

    with torch.no_grad():
        model.get_parameter("model.norm.weight").add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write()
    assert read(tmp_path / ".replaced-export" / "checksums.json") == first
    write()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert read(folder / "checksums.json") != first


def write_tiny(tokenizer, folder):
    model, world = tiny_model(), Alone(0, 1, 0, torch.device("cpu"))
    export_model(model_tensors(model), model.config, tokenizer, MediaConfig(), folder, torch.float32, world)


def test_an_export_that_has_no_room_is_refused_before_a_weight_is_gathered_and_the_older_one_stays(
    tokenizer, tmp_path, monkeypatch
):
    folder = tmp_path / "export"
    write_tiny(tokenizer, folder)
    first = read(folder / "checksums.json")
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(export, "save_hf", None)
    with pytest.raises(UserError, match=r"could not write the export .*0\.00 GB free.*make room"):
        write_tiny(tokenizer, folder)
    assert read(folder / "checksums.json") == first


def test_a_disk_that_fills_up_during_the_export_is_one_message_with_path_and_remedy(tokenizer, tmp_path, monkeypatch):
    def full(*arguments):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_hf", full)
    with pytest.raises(UserError, match=r"export: Error while serializing: I/O error: No space left.*same command"):
        write_tiny(tokenizer, tmp_path / "export")
