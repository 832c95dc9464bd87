import json

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_pipelines.sources.bpe import CHAT_TEMPLATE, SPECIAL_TOKENS, train_bpe

TEXTS = ["a red circle and a blue square", "Where is the red circle?", "(12,345),(678,999)", "12 plus 3 is 15"] * 20
CHAT = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": "0.jpg"},
            {"type": "video", "video": "0.mp4"},
            {"type": "text", "text": "Hi"},
        ],
    },
    {"role": "assistant", "content": "Yes"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("bpe") / "tokenizer"
    train_bpe(TEXTS, out, vocab_size=400)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_special_tokens_follow_the_merges_in_the_published_order(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    first = len(tokenizer) - 14
    assert ids == list(range(first, first + 14))
    assert SPECIAL_TOKENS[0] == "<|endoftext|>"
    assert SPECIAL_TOKENS[-1] == "<|video_pad|>"


def test_vocabulary_size_counts_the_special_tokens(tmp_path, tokenizer):
    assert len(tokenizer) <= 400
    train_bpe(TEXTS, tmp_path, vocab_size=280)  # 256 bytes + 10 merges + 14 special tokens
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 280


def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=269: at least 270"):
        train_bpe(TEXTS, tmp_path, vocab_size=269)


@pytest.mark.parametrize("text", ["a red circle", " 12,(3", "čau 你好 🙂\n\n x  y\t", "I'm", "a\r\nb", "zebra"])
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_frequent_words_are_one_token_and_digits_stand_alone(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("a red circle")["input_ids"]) == ["a", "Ġred", "Ġcircle"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("(12,3")["input_ids"]) == ["(", "1", "2", ",", "3"]


def test_transformers_tokenises_as_the_file_says(folder, tokenizer):
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*TEXTS[:4], "e\u0301 x", "a\r\n\nb   c", "<|im_start|>user\nI'M 42<|im_end|>"]:
        assert tokenizer(text)["input_ids"] == raw.encode(text).ids


def test_normalisation_is_nfc(tokenizer):
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]


def test_padding_and_end_tokens_are_the_published_ones(tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == ("<|endoftext|>", "<|im_end|>", "left")


def test_chat_template_writes_the_published_form(tokenizer):
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>Hi<|im_end|>\n"
        "<|im_start|>assistant\nYes<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True, add_vision_id=True)
    assert "Picture 1: <|vision_start|>" in prompt
    assert "Video 1: <|vision_start|>" in prompt
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_the_same_texts_give_the_same_files(folder, tmp_path):
    train_bpe(iter(TEXTS), tmp_path, vocab_size=400)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_settings_equal_the_published_tokenizer(shared_data, folder):
    published = shared_data / "tokenizer"
    assert json.loads((published / "chat_template.json").read_text())["chat_template"] == CHAT_TEMPLATE
    ours, theirs = (json.loads((path / "tokenizer_config.json").read_text()) for path in (folder, published))
    added = [list(config.pop("added_tokens_decoder").values()) for config in (ours, theirs)]
    assert added[0] == added[1]
    assert ours == theirs
    ours, theirs = (json.loads((path / "tokenizer.json").read_text()) for path in (folder, published))
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert ours[part] == theirs[part]
