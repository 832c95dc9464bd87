"""A stage starts only from weights of the model and the vocabulary that it trains."""

import json
import shutil
from dataclasses import asdict, replace

import pytest

from data_pipelines.sources.bpe import train_bpe
from data_pipelines.tokenizer import TextTokenizer
from qwen2vl_train.config import ConfigError
from qwen2vl_train.start import refuse_other_model, refuse_other_tensors
from tests.model.builders import model_config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["a red dog sits on the green hill", "two birds fly"] * 20, folder, vocab_size=300)
    return TextTokenizer(folder)


@pytest.fixture
def folder(tmp_path, tokenizer):
    """What a start holds besides its weights."""
    (tmp_path / "config.json").write_text(json.dumps(model_config().to_hf()))
    shutil.copyfile(f"{tokenizer.path}/tokenizer.json", tmp_path / "tokenizer.json")
    return tmp_path


def judge(folder, tokenizer, config=None):
    """The warnings, where nothing is refused."""
    warnings = []
    refuse_other_model(folder, "vision", config or model_config(), tokenizer, warnings.append)
    return warnings


def edit(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def edit_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_an_export_of_the_same_model_is_accepted_whatever_its_lengths_and_token_ids(folder, tokenizer):
    assert judge(folder, tokenizer) == []
    edit(folder, max_position_embeddings=77, initializer_range=0.5, eos_token_id=3, bos_token_id=4)
    assert judge(folder, tokenizer) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rope_theta": 123.0},
            r"text\.rope_theta: the folder has 123\.0, this run \S+\). Set \S+theta=123\.0;",
        ),
        ({"rms_norm_eps": 0.1}, r"model\.config\.text\.rms_norm_eps: the folder has 0\.1, this run 1e-06"),
        ({"tie_word_embeddings": False}, r"tie_word_embeddings: the folder has False.*embeddings=false;"),
        ({"positions": "1d"}, r"model\.config\.positions: the folder has 1d, this run mrope"),
        ({"vocab_size": 7}, r"Set model\.config\.text\.vocab_size=7;"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, r"text\.mrope_section=\[2,3,3\]"),
        ({"hidden_act": "gelu"}, r"stages\.vision\.init_from: .*hidden_act is 'gelu'.*choose another folder"),
        ({"model_type": "llama"}, r"stages\.vision\.init_from: .*model_type is 'llama'"),
    ],
)
def test_weights_of_another_architecture_are_refused_by_name_with_both_values(folder, tokenizer, values, message):
    config = model_config()
    assert sum(config.text.mrope_section) == 8
    if "rope_scaling" in values:
        config = replace(config, text=replace(config.text, mrope_section=(4, 2, 2)))
    edit(folder, **values)
    with pytest.raises(ConfigError, match=message):
        judge(folder, tokenizer, config)


def test_a_damaged_configuration_is_one_line(folder, tokenizer):
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"init_from: \S+/config\.json: .*; choose another folder"):
        judge(folder, tokenizer)


def test_several_differences_are_named_at_once_with_one_remedy(folder, tokenizer):
    edit(folder, rope_theta=123.0, rms_norm_eps=0.1)
    with pytest.raises(ConfigError, match=r"rms_norm_eps=0\.1 model\.config\.text\.rope_theta=123\.0"):
        judge(folder, tokenizer)


def test_a_tokenizer_whose_ids_mean_other_tokens_is_refused(folder, tokenizer):
    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    edit_tokenizer(folder, swap)
    with pytest.raises(ConfigError, match=r"2 ids mean other tokens \(\d+ is 'b' there and 'a' here.*data\.tokenizer="):
        judge(folder, tokenizer)


def test_another_tokenizer_file_with_the_same_ids_is_a_warning_and_so_is_none(folder, tokenizer):
    edit_tokenizer(folder, lambda content: content.update(version="1.0"))
    assert "the same tokens" in judge(folder, tokenizer)[0]
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in judge(folder, tokenizer)[0]


def test_tokens_added_behind_the_others_are_a_warning(folder, tokenizer):
    last = tokenizer.vocab_size
    token = {"id": last, "content": "<new>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    edit_tokenizer(folder, lambda content: content["added_tokens"].append(token | {"normalized": False}))
    assert f"({last + 1} there, {last} here)" in judge(folder, tokenizer)[0]


def test_a_checkpoint_of_another_vocabulary_or_shape_is_refused_by_name(tmp_path):
    config = model_config()
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"step": 3, "model": asdict(config)}))
    refuse_other_tensors(tmp_path, replace(config, initializer_range=0.5))
    larger = replace(config, text=replace(config.text, vocab_size=999), vision=replace(config.vision, depth=5))
    message = (
        rf"{tmp_path} is of another model \(model\.config\.vision\.depth: it has 2, this run 5; model\.config\.text\."
        rf"vocab_size: it has {config.text.vocab_size}, this run 999\)\. Set model\.config\.vision\.depth=2 model"
    )
    with pytest.raises(ConfigError, match=message):
        refuse_other_tensors(tmp_path, larger)
    state.write_text(json.dumps({"step": 3}))  # of a release before
    refuse_other_tensors(tmp_path, larger)
